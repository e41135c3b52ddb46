//! Keeps the write-ahead log short without making commits wait.
//!
//! A task with a connection of its own copies the log into the database while the writer goes on.
//! That alone never lets the log begin anew under load, for the writer is always ahead; so once the log
//! is long, the writer copies the small rest itself between two commits, and its next transaction
//! begins at the log's start.
//!
//! Invariant: the log is no longer than `wal_bytes_max` and one commit. A reader that stays open keeps
//! the log from beginning anew; at the bound, commits fail as transient until it lets go.

use std::sync::Arc;

use sqlx::{Connection, Row, SqliteConnection};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::write::classify;
use crate::store::StoreError;

/// The log is copied when this much has been added. A little at a time: commits wait while the copy is
/// synced, and a long copy is felt in the latency of ACKs.
const COPY_BYTES: u64 = 4 << 20;
/// The log is begun anew once it is this long.
pub(super) const RESTART_BYTES: u64 = 64 << 20;
/// A page, and the log's header for it.
const WAL_FRAME_BYTES: u64 = 4096 + 24;

/// Lengths in pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct WalLimits {
    copy: u64,
    restart: u64,
    max: u64,
}

impl WalLimits {
    pub(super) fn new(wal_bytes_max: u64) -> WalLimits {
        WalLimits {
            copy: COPY_BYTES / WAL_FRAME_BYTES,
            restart: RESTART_BYTES.min(wal_bytes_max / 2) / WAL_FRAME_BYTES,
            max: wal_bytes_max / WAL_FRAME_BYTES,
        }
    }
}

/// The log's length and how much of it is copied, in pages.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    log: u64,
    copied: u64,
}

/// The writer's end of the copying task.
#[derive(Debug)]
pub(super) struct Checkpointer {
    limits: WalLimits,
    progress: Progress,
    wake: Arc<Notify>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Checkpointer {
    pub(super) fn start(connection: SqliteConnection, limits: WalLimits) -> Checkpointer {
        let (wake, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let task = tokio::spawn(copy_when_woken(connection, Arc::clone(&wake), stop.clone()));
        Checkpointer {
            limits,
            progress: Progress::default(),
            wake,
            stop,
            task,
        }
    }

    /// Before a transaction: begins the log anew where it is long, refuses where it cannot.
    pub(super) async fn make_room(
        &mut self,
        connection: &mut SqliteConnection,
    ) -> Result<(), StoreError> {
        if self.progress.log < self.limits.restart {
            return Ok(());
        }
        self.progress = checkpoint(connection, "PRAGMA wal_checkpoint(PASSIVE)").await?;
        let is_pinned = self.progress.copied < self.progress.log;
        if is_pinned && self.progress.log >= self.limits.max {
            let mib = (self.progress.log * WAL_FRAME_BYTES) >> 20;
            return Err(StoreError::Transient(format!(
                "the write-ahead log is {mib} MiB long and a reader that stays open keeps it from \
                 being emptied; end long queries on the database"
            )));
        }
        Ok(())
    }

    /// After a transaction: has the log copied where much was added.
    pub(super) async fn after_commit(
        &mut self,
        connection: &mut SqliteConnection,
    ) -> Result<(), StoreError> {
        self.progress = checkpoint(connection, "PRAGMA wal_checkpoint(NOOP)").await?;
        if self.progress.log - self.progress.copied.min(self.progress.log) >= self.limits.copy {
            self.wake.notify_one();
        }
        Ok(())
    }

    pub(super) async fn stop(&mut self) {
        self.stop.cancel();
        let _ = (&mut self.task).await;
    }
}

async fn copy_when_woken(
    mut connection: SqliteConnection,
    wake: Arc<Notify>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = wake.notified() => {}
            () = stop.cancelled() => break,
        }
        if let Err(error) = checkpoint(&mut connection, "PRAGMA wal_checkpoint(PASSIVE)").await {
            // The writer meets the same trouble with its next commit, and decides what it means.
            tracing::warn!(%error, "cannot copy the write-ahead log into the database");
        }
    }
    let _ = connection.close().await;
}

async fn checkpoint(
    connection: &mut SqliteConnection,
    pragma: &'static str,
) -> Result<Progress, StoreError> {
    let row = sqlx::query(pragma)
        .fetch_one(connection)
        .await
        .map_err(classify)?;
    // Busy, pages in the log, pages copied; -1 where there is no log yet.
    let pages = |column| {
        row.try_get::<i64, _>(column)
            .map(|pages| pages.max(0) as u64)
    };
    Ok(Progress {
        log: pages(1).map_err(classify)?,
        copied: pages(2).map_err(classify)?,
    })
}
