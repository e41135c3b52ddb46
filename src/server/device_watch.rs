//! Changes of devices by operators, looked for several times a second: a session ends when its device was
//! disabled or given another key after it was admitted.

use std::sync::Arc;
use std::time::Duration;

use crate::auth::credentials::Credentials;
use crate::ingest::registry::Registry;
use crate::store::lifecycle::ChangeReader;
use crate::store::steady::SteadyError;

/// From one look for changes to the next: a session shall be over within a second.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A look that takes longer is given up.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Looks for changes once, before anybody connects.
///
/// # Errors
/// The store does not answer: who may connect is not known.
pub async fn load(
    credentials: &Credentials,
    changes: &mut ChangeReader,
) -> Result<(), SteadyError> {
    if let Some(changes) = changes.changes().await? {
        credentials.take_in(&changes);
    }
    Ok(())
}

/// Looks for changes again and again, and ends the sessions of devices that may not go on, for as long as
/// it is polled.
pub async fn watch<T>(
    credentials: Arc<Credentials>,
    registry: Arc<Registry>,
    mut changes: ChangeReader,
) -> T {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        match tokio::time::timeout(LOOK_TIMEOUT, changes.changes()).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(changes))) => {
                // In this order: whoever is cut off shall not come back by the old key.
                credentials.take_in(&changes);
                registry.change(&changes);
            }
            // That the store does not answer is told by those who commit.
            Ok(Err(error)) => tracing::debug!(%error, "changes of devices cannot be read"),
            Err(_) => tracing::debug!("changes of devices are not read in time"),
        }
    }
}
