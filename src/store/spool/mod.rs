//! A local SQLite file in front of Postgres. Frames are acknowledged when they are in the file; a task drains the file
//! into the database, in order of arrival, whenever the database is available.
//!
//! All frames pass through the file, even while Postgres is available. So the meaning of an ACK never changes, and no
//! switchover is needed when the database fails or returns. After a crash on either side the file may hold frames that
//! the database has already; they are sent again, and its ledger skips them.
//!
//! Invariants
//! - The spool deletes nothing before a receipt of the database covers it.
//! - While the spool is registered, no other gateway writes to the database. So the spool knows the position of every
//!   stream, whether the database is available or not.
//! - The file exceeds its limit by at most one batch; then commits fail until there is space.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::drain::{Drain, Feeder};
use super::postgres::{self, PostgresSettings, feed};
use super::sqlite::spool::SpoolReader;
pub use super::sqlite::spool::{Usage, Waiting};
use super::sqlite::{self, SqliteSettings, SqliteStore};
use super::{Batch, Committed, Store, StoreError};
use crate::config::PostgresOptions;

mod destination;
mod drain;
#[cfg(test)]
mod tests;

/// Maximum wait at startup for the database.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// The message states in one line what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error(transparent)]
    File(#[from] sqlite::OpenError),
    /// The database could not be opened; a new spool needs it.
    #[error(transparent)]
    Database(#[from] postgres::OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The spool still holds frames, so a gateway without it would not know the positions of the streams.
    #[error(
        "{frames} acknowledged frames wait in {path} for the database; start with --spool until they are drained \
         (`fieldgate status` shows how many are left)"
    )]
    NotDrained { frames: u64, path: String },
}

pub struct SpoolStore {
    spool: Arc<Mutex<SqliteStore>>,
    bytes_max: u64,
    arrived: Arc<Notify>,
    /// Cancelled to end the drain when the spool is empty or the database unavailable.
    stop: CancellationToken,
    /// Cancelled to end the drain immediately.
    abort: CancellationToken,
    close_timeout: Duration,
    /// Drain task, which ends when this is dropped; it returns the reason if it cannot continue.
    drain: JoinSet<Option<String>>,
}

impl SpoolStore {
    /// Opens the spool at `path`, creating it if it does not exist, and starts to drain it. Only a new spool needs
    /// the database. Closing the store continues to drain for up to `close_timeout`.
    pub async fn open(
        path: &Path,
        sqlite: &SqliteSettings,
        bytes_max: u64,
        close_timeout: Duration,
        postgres: PostgresSettings,
    ) -> Result<Self, SpoolError> {
        let mut spool = SqliteStore::open_spool(path, sqlite).await?;
        spool.begin_instance().await?;
        let identity = spool.identity().await?;
        if !identity.is_registered {
            let standing = feed::register(&postgres, &identity.id).await?;
            spool.take_over(&standing).await?;
        }
        let mut feeder = Feeder {
            settings: PostgresSettings {
                options: PostgresOptions {
                    postgres_writers: 1,
                    ..postgres.options
                },
                ..postgres
            },
            reader: SpoolReader::open(path).await?,
            spool: Arc::new(Mutex::new(spool)),
            path: path.to_owned(),
        };
        let destination = match timeout(START_TIMEOUT, feeder.begin()).await {
            Ok(destination) => destination?,
            Err(_) => None,
        };
        let spool = Arc::clone(&feeder.spool);
        let arrived = Arc::new(Notify::new());
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let drain = Drain {
            feeder,
            arrived: Arc::clone(&arrived),
            stop: stop.clone(),
            abort: abort.clone(),
            destination,
            next: None,
        };
        let mut task = JoinSet::new();
        task.spawn(drain.run());
        Ok(Self {
            spool,
            bytes_max,
            arrived,
            stop,
            abort,
            close_timeout,
            drain: task,
        })
    }
}

/// Returns the content of the spool at `path`, even while a gateway uses it; `None` if it is not in use.
pub async fn waiting(path: &Path) -> Result<Option<Waiting>, SpoolError> {
    if !path.exists() {
        return Ok(None);
    }
    let mut reader = SpoolReader::open(path).await?;
    let waiting = reader.waiting().await;
    waiting.map_err(|error| StoreError::Transient(error.to_string()).into())
}

/// Returns how much of the spool at `path` is used.
pub async fn usage(path: &Path) -> Result<Usage, SpoolError> {
    let mut reader = SpoolReader::open(path).await?;
    let usage = reader.usage().await;
    usage.map_err(|error| StoreError::Transient(error.to_string()).into())
}

/// Returns the size of the free pages in the spool at `path`, in bytes. New frames use them before the file grows.
pub async fn reusable_bytes(path: &Path) -> Result<u64, SpoolError> {
    let mut reader = SpoolReader::open(path).await?;
    let reusable = reader.reusable_bytes().await;
    reusable.map_err(|error| StoreError::Transient(error.to_string()).into())
}

/// Fails if frames wait in the spool at `path`. Call it for a gateway that uses another store and would not drain
/// them.
///
/// # Errors
/// [`SpoolError::NotDrained`], or as for [`waiting`].
pub async fn refuse_undrained(path: &Path) -> Result<(), SpoolError> {
    let frames = waiting(path).await?.map_or(0, |waiting| waiting.frames);
    if frames == 0 {
        return Ok(());
    }
    let path = path.display().to_string();
    Err(SpoolError::NotDrained { frames, path })
}

/// Prepares a gateway to run without the spool at `path`, if there is one: unregisters an empty spool, so that
/// gateways without a spool may write to the database.
///
/// # Errors
/// [`SpoolError::NotDrained`], or as for [`SpoolStore::open`].
pub async fn leave(
    path: &Path,
    sqlite: &SqliteSettings,
    postgres: &PostgresSettings,
) -> Result<(), SpoolError> {
    if !path.exists() {
        return Ok(());
    }
    refuse_undrained(path).await?;
    let mut spool = SqliteStore::open_spool(path, sqlite).await?;
    let identity = spool.identity().await?;
    if identity.is_registered {
        // In this order: a spool that is no longer registered in the database must not trust its positions.
        spool.set_unregistered().await?;
    }
    feed::release(postgres, &identity).await?;
    spool.close().await?;
    Ok(())
}

impl Store for SpoolStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        if let Some(ended) = self.drain.try_join_next() {
            return Err(drain_ended(ended));
        }
        let mut spool = self.spool.lock().await;
        let used_bytes = spool.used_bytes().await?;
        if used_bytes > self.bytes_max {
            return Err(StoreError::Transient(format!(
                "spool full ({} MiB), waiting until it is drained into Postgres",
                used_bytes >> 20
            )));
        }
        if !spool.has_room().await? {
            return Err(StoreError::Transient(
                "disk of the spool full, waiting until the spool is drained into Postgres"
                    .to_owned(),
            ));
        }
        let committed = spool.commit(batch).await?;
        drop(spool);
        self.arrived.notify_one();
        Ok(committed)
    }

    async fn failure(&mut self) -> StoreError {
        let ended = self.drain.join_next().await;
        drain_ended(ended.unwrap_or(Ok(None)))
    }

    async fn close(mut self) -> Result<(), StoreError> {
        // Remaining frames are acknowledged already; the next start drains them.
        self.stop.cancel();
        let ended = async { while self.drain.join_next().await.is_some() {} };
        if timeout(self.close_timeout, ended).await.is_err() {
            self.abort.cancel();
            while self.drain.join_next().await.is_some() {}
        }
        let spool = Arc::into_inner(self.spool).map(Mutex::into_inner);
        let Some(mut spool) = spool else {
            return Err(StoreError::Fatal("the drain has not ended".to_owned()));
        };
        let frames = spool.frames_waiting().await?;
        if frames > 0 {
            tracing::warn!(
                frames,
                "frames left in the spool; the next start drains them"
            );
        }
        spool.close().await
    }
}

fn drain_ended(ended: Result<Option<String>, JoinError>) -> StoreError {
    StoreError::Fatal(match ended {
        Ok(Some(reason)) => reason,
        Ok(None) => "the task that drains the spool has ended".to_owned(),
        Err(error) => format!("the task that drains the spool: {error}"),
    })
}
