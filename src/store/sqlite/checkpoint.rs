//! Keeps the write-ahead log short without holding up commits.
//!
//! A second connection, in a task of its own, moves the log's pages into the database while the
//! writer goes on (PASSIVE). Under load it never quite catches up, and SQLite starts the log from the
//! beginning again only when a write finds it moved whole. So, when the log passes the soft limit,
//! the writer waits for that task between two commits and has the remainder moved: with nobody
//! writing, it catches up.
//!
//! A reader that stays open pins the log: nothing behind its snapshot moves. Trying again then waits
//! until the log has grown by a quarter of the soft limit. Past the hard limit no commit is taken
//! until the log can be reset, so that a forgotten reader costs a pause and not the disk.
//!
//! Invariants
//! - The log is never longer than the hard limit and one batch.
//! - After an error that is not transient, no checkpoint is tried again: pages whose sync failed
//!   could pass for written, and the log that still has them be overwritten.

use std::sync::{Arc, OnceLock};

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row, SqliteConnection};
use tokio::sync::{Mutex, Notify};
use tokio::task::{JoinError, JoinSet};

use super::classify;
use crate::store::StoreError;

/// Lengths of the log in bytes, each at most the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Not yet moved: wake the task.
    pub(super) wake_bytes: u64,
    /// Whole log: finish between two commits.
    pub(super) soft_bytes: u64,
    /// Whole log: take no commit.
    pub(super) hard_bytes: u64,
    /// Bytes of a page.
    pub(super) page_bytes: u64,
}

/// What is in the log, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Log {
    /// From its beginning.
    len_bytes: u64,
    /// Moved into the database.
    moved_bytes: u64,
}

/// The task and what the writer knows of the log.
pub(super) struct Checkpoints {
    shared: Arc<Shared>,
    limits: Limits,
    log: Log,
    /// Length at which finishing is tried next.
    finish_at_bytes: u64,
    /// Ends the task when dropped.
    task: JoinSet<()>,
}

struct Shared {
    /// Held for the time of a checkpoint.
    conn: Mutex<SqliteConnection>,
    wake: Notify,
    /// Why no checkpoint may be tried any more.
    failure: OnceLock<String>,
}

/// How hard to try.
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// What can be moved without waiting for anybody.
    Passive,
    /// Everything, waiting a moment for readers to leave.
    Restart,
}

impl Checkpoints {
    pub(super) fn start(conn: SqliteConnection, limits: Limits) -> Self {
        let shared = Arc::new(Shared {
            conn: Mutex::new(conn),
            wake: Notify::new(),
            failure: OnceLock::new(),
        });
        let mut task = JoinSet::new();
        task.spawn(run(Arc::clone(&shared)));
        let finish_at_bytes = limits.soft_bytes;
        Self {
            shared,
            limits,
            log: Log::default(),
            finish_at_bytes,
            task,
        }
    }

    /// Before a commit: shortens the log if it is long. This is not done after the commit, so that
    /// its receipts do not wait for it.
    pub(super) async fn make_room(&mut self) -> Result<(), StoreError> {
        if let Some(reason) = self.shared.failure.get() {
            return Err(StoreError::Fatal(reason.clone()));
        }
        if let Some(ended) = self.task.try_join_next() {
            return Err(self.ended(Some(ended)));
        }
        if self.log.len_bytes > self.limits.hard_bytes {
            if self.shared.checkpoint(Mode::Restart).await? {
                self.finish_at_bytes = self.limits.soft_bytes;
                return Ok(());
            }
            return Err(StoreError::Transient(format!(
                "a reader holds the write-ahead log, which has grown to {} MiB: end long-running \
                 queries on the database, and storing goes on",
                self.log.len_bytes >> 20
            )));
        }
        if self.log.len_bytes >= self.finish_at_bytes {
            let moved_all = self.shared.checkpoint(Mode::Passive).await?;
            self.finish_at_bytes = if moved_all {
                self.limits.soft_bytes
            } else {
                self.log.len_bytes + self.limits.soft_bytes / 4
            };
        }
        Ok(())
    }

    /// Whether the log comes near the length at which no commit is taken, which it does only when readers hold it.
    pub(super) fn is_log_long(&self) -> bool {
        self.log.len_bytes >= self.limits.hard_bytes / 4 * 3
    }

    /// Moves the whole log, and has it begin again, as soon as no reader is in the way.
    pub(super) async fn finish(&mut self) -> Result<(), StoreError> {
        self.shared.checkpoint(Mode::Restart).await?;
        self.finish_at_bytes = self.limits.soft_bytes;
        Ok(())
    }

    /// After a commit: sees how long the log has become, on the writer's connection.
    pub(super) async fn observe(
        &mut self,
        writer: &mut SqliteConnection,
    ) -> Result<(), sqlx::Error> {
        let row = sqlx::query("PRAGMA wal_checkpoint(NOOP)")
            .fetch_one(writer)
            .await?;
        let bytes = |column| {
            let pages = u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0);
            Ok::<u64, sqlx::Error>(pages * self.limits.page_bytes)
        };
        self.log = Log {
            len_bytes: bytes(1)?,
            moved_bytes: bytes(2)?,
        };
        // The log began again by itself after a reader had left.
        if self.log.len_bytes < self.limits.soft_bytes {
            self.finish_at_bytes = self.limits.soft_bytes;
        }
        if self.log.len_bytes - self.log.moved_bytes.min(self.log.len_bytes)
            >= self.limits.wake_bytes
        {
            self.shared.wake.notify_one();
        }
        Ok(())
    }

    /// Waits until the task has ended, which it does only by failing.
    pub(super) async fn failure(&mut self) -> StoreError {
        let ended = self.task.join_next().await;
        self.ended(ended)
    }

    fn ended(&self, ended: Option<Result<(), JoinError>>) -> StoreError {
        let panicked = ended.and_then(Result::err).map(|error| error.to_string());
        let reason = self.shared.failure.get().cloned().or(panicked);
        let reason = reason.unwrap_or_else(|| "it ended".to_owned());
        StoreError::Fatal(format!(
            "the task that shortens the write-ahead log: {reason}"
        ))
    }

    /// Ends the task and gives back the reason if checkpoints have failed for good.
    pub(super) async fn stop(self) -> Option<String> {
        let Self {
            shared, mut task, ..
        } = self;
        task.shutdown().await;
        shared.failure.get().cloned()
    }
}

/// The task: moves what there is whenever it is woken.
async fn run(shared: Arc<Shared>) {
    loop {
        shared.wake.notified().await;
        match shared.checkpoint(Mode::Passive).await {
            Ok(_) => {}
            // The next commit wakes this task again.
            Err(StoreError::Transient(reason)) => {
                tracing::warn!(reason, "the write-ahead log could not be shortened");
            }
            // The next commit reports it.
            Err(StoreError::Fatal(_) | StoreError::Replaced(_)) => return,
        }
    }
}

impl Shared {
    /// Moves pages; `true` if no page is left in the log that is not in the database, and, for
    /// `Restart`, nobody reads from the log any more.
    async fn checkpoint(&self, mode: Mode) -> Result<bool, StoreError> {
        let mut conn = self.conn.lock().await;
        let sql = match mode {
            Mode::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
            Mode::Restart => "PRAGMA wal_checkpoint(RESTART)",
        };
        let done = match sqlx::query(sql).fetch_one(&mut *conn).await {
            Ok(row) => moved_all(&row),
            Err(error) => Err(error),
        };
        done.map_err(|error| {
            let error = classify(&error, "checkpoint");
            if let StoreError::Fatal(reason) = &error {
                self.failure.get_or_init(|| reason.clone());
            }
            error
        })
    }
}

/// Reads what a checkpoint says of itself: whether it was kept from its work, the pages in the log,
/// and the pages moved.
fn moved_all(row: &SqliteRow) -> Result<bool, sqlx::Error> {
    let busy: i64 = row.try_get(0)?;
    let (log, moved): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
    Ok(busy == 0 && moved >= log)
}

/// Sets what belongs to the log on a connection that writes.
pub(super) async fn configure(
    conn: &mut SqliteConnection,
    log_kept_bytes: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query("PRAGMA wal_autocheckpoint = 0")
        .execute(&mut *conn)
        .await?;
    // After a restart, a log that had grown long gives its space back.
    let sql = format!("PRAGMA journal_size_limit = {log_kept_bytes}");
    sqlx::query(AssertSqlSafe(sql)).execute(conn).await?;
    Ok(())
}
