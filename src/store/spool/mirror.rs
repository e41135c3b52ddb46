//! What operators change about devices, brought from the database to the spool: a gateway with a spool asks
//! the spool who may connect, with the database or without it.

use std::path::PathBuf;
use std::time::Duration;

use crate::store::editor::Editor;
use crate::store::lifecycle::{ChangeReader, adopt};
use crate::store::reader::{OpenError, ReadError};
use crate::store::steady::{SteadyError, SteadyReader};
use crate::store::url::StoreUrl;

/// From one look for changes to the next. The gateway looks as often again, and within a second a
/// change shall have got through.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A look that takes longer is given up.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Brings changes from a database to a spool.
pub struct Mirror {
    changes: ChangeReader,
    spool: PathBuf,
}

/// Why nothing was brought.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The database does not answer.
    #[error(transparent)]
    Database(#[from] SteadyError),
    /// The spool cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The spool does not take it.
    #[error(transparent)]
    Spool(#[from] ReadError),
}

impl Mirror {
    /// From `database` to the spool in the file `spool`.
    pub fn new(database: StoreUrl, spool: PathBuf) -> Mirror {
        Mirror {
            changes: ChangeReader::new(SteadyReader::new(database)),
            spool,
        }
    }

    /// Brings what has changed.
    ///
    /// # Errors
    /// One of the two does not answer; the next call brings all.
    pub async fn copy(&mut self) -> Result<(), MirrorError> {
        let Some(changes) = self.changes.changes().await? else {
            return Ok(());
        };
        // Until it is there, it is not seen.
        let seen = self.changes.forget();
        let mut editor = Editor::open_spool(&self.spool).await?;
        adopt(&mut editor, &changes).await?;
        self.changes.remember(seen);
        Ok(())
    }

    /// Brings what changes again and again, for as long as it is polled.
    pub async fn watch<T>(mut self) -> T {
        loop {
            match tokio::time::timeout(LOOK_TIMEOUT, self.copy()).await {
                Ok(Ok(())) => {}
                // That the database is away is told by the drain.
                Ok(Err(error)) => {
                    tracing::debug!(%error, "changes of devices do not reach the spool")
                }
                Err(_) => tracing::debug!("changes of devices do not reach the spool in time"),
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}
