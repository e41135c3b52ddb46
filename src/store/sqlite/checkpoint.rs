//! Keeps the write-ahead log short without blocking commits.
//!
//! A second connection, in a separate task, moves the log's pages into the database while the writer continues
//! (PASSIVE). Under load it never quite catches up, and SQLite restarts the log from the beginning only when a
//! write finds all of it moved. So, when the log exceeds the soft limit, the writer waits for that task between
//! two commits and has the rest moved: while nothing writes, the task catches up.
//!
//! A reader that stays open pins the log: nothing after its snapshot moves. The next attempt then waits until
//! the log has grown by a quarter of the soft limit. Above the hard limit, commits are rejected until the log
//! can be reset, so that a forgotten reader causes a pause instead of a full disk.
//!
//! Invariants
//! - The log is never longer than the hard limit plus one batch.
//! - After an error that is not transient, no checkpoint is tried again: pages whose sync failed might appear
//!   written, and the log that still has them would be overwritten.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row, SqliteConnection};
use tokio::sync::{Mutex, Notify};
use tokio::task::{JoinError, JoinSet};

use super::classify;
use crate::store::StoreError;

/// How long a checkpoint that resets the log waits for readers and for other checkpoints.
pub(super) const WAIT_MAX: Duration = Duration::from_millis(200);
const RETRY: Duration = Duration::from_millis(20);

/// Lengths of the log in bytes, in ascending order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Unmoved part: wake the task.
    pub(super) wake_bytes: u64,
    /// Whole log: finish between two commits.
    pub(super) soft_bytes: u64,
    /// Whole log: reject commits.
    pub(super) hard_bytes: u64,
    pub(super) page_bytes: u64,
}

/// Length of the log in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Log {
    len_bytes: u64,
    /// Length of the part that is in the database.
    moved_bytes: u64,
}

/// The task, and what the writer knows about the log.
pub(super) struct Checkpoints {
    shared: Arc<Shared>,
    limits: Limits,
    log: Log,
    /// Length at which to finish the next time.
    finish_at_bytes: u64,
    /// Aborts the task when dropped.
    task: JoinSet<()>,
}

/// Moves the log of an open store into the database on request.
#[derive(Clone)]
pub struct LogMover(Arc<Shared>);

impl LogMover {
    /// Moves the pages that can be moved without waiting. If nothing reads the rest, the next write uses the space of
    /// the log again, and the database file loses the pages that were returned. Failures are reported by commits.
    pub async fn move_log(&self) {
        if self.0.failure.get().is_none() {
            let _ = self.0.checkpoint(Mode::Passive).await;
        }
    }
}

struct Shared {
    /// Locked during a checkpoint.
    conn: Mutex<SqliteConnection>,
    wake: Notify,
    /// Reason why checkpoints have stopped.
    failure: OnceLock<String>,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Moves the pages that can be moved without waiting.
    Passive,
    /// Moves all pages, waiting briefly for readers to finish.
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

    pub(super) fn mover(&self) -> LogMover {
        LogMover(Arc::clone(&self.shared))
    }

    /// Shortens a long log, before a commit. Doing this after the commit would delay its receipts.
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
                "a reader blocks the checkpoint of the write-ahead log ({} MiB); end long-running queries on \
                 the database",
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

    /// Returns whether the log approaches the length at which commits are rejected, which happens only when
    /// readers pin it.
    pub(super) fn is_log_long(&self) -> bool {
        self.log.len_bytes >= self.limits.hard_bytes / 4 * 3
    }

    /// Moves the whole log and restarts it, as soon as no reader pins it.
    pub(super) async fn finish(&mut self) -> Result<(), StoreError> {
        self.shared.checkpoint(Mode::Restart).await?;
        self.finish_at_bytes = self.limits.soft_bytes;
        Ok(())
    }

    /// Reads the length of the log after a commit, on the writer's connection.
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
        // The log was restarted when a reader finished.
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

    /// Waits for the task to fail; it never ends otherwise.
    pub(super) async fn failure(&mut self) -> StoreError {
        let ended = self.task.join_next().await;
        self.ended(ended)
    }

    fn ended(&self, ended: Option<Result<(), JoinError>>) -> StoreError {
        let panicked = ended.and_then(Result::err).map(|error| error.to_string());
        let reason = self.shared.failure.get().cloned().or(panicked);
        let reason = reason.unwrap_or_else(|| "it ended".to_owned());
        StoreError::Fatal(format!("checkpoint task: {reason}"))
    }

    /// Stops the task; returns the reason if checkpoints failed permanently.
    pub(super) async fn stop(self) -> Option<String> {
        let Self {
            shared, mut task, ..
        } = self;
        task.shutdown().await;
        shared.failure.get().cloned()
    }
}

/// Runs the task: moves the available pages whenever it is woken.
async fn run(shared: Arc<Shared>) {
    loop {
        shared.wake.notified().await;
        match shared.checkpoint(Mode::Passive).await {
            Ok(_) => {}
            // The next commit wakes this task again.
            Err(StoreError::Transient(reason)) => {
                tracing::warn!(reason, "could not checkpoint write-ahead log");
            }
            // The next commit reports it.
            Err(StoreError::Fatal(_) | StoreError::Replaced(_)) => return,
        }
    }
}

impl Shared {
    /// Moves pages. Returns `true` if every page of the log is in the database and, for `Restart`, no reader
    /// uses the log any more.
    async fn checkpoint(&self, mode: Mode) -> Result<bool, StoreError> {
        let began = Instant::now();
        loop {
            let moved_all = self.checkpoint_once(mode).await?;
            // SQLite waits for readers, but not for a checkpoint of a command.
            if moved_all || matches!(mode, Mode::Passive) || began.elapsed() >= WAIT_MAX {
                return Ok(moved_all);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn checkpoint_once(&self, mode: Mode) -> Result<bool, StoreError> {
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

/// Reads the result of a checkpoint: whether it was blocked, the pages in the log, and the pages moved.
fn moved_all(row: &SqliteRow) -> Result<bool, sqlx::Error> {
    let busy: i64 = row.try_get(0)?;
    let (log, moved): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
    Ok(busy == 0 && moved >= log)
}

/// Sets the pragmas of the log on a connection that writes.
pub(super) async fn configure(
    conn: &mut SqliteConnection,
    log_kept_bytes: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query("PRAGMA wal_autocheckpoint = 0")
        .execute(&mut *conn)
        .await?;
    // When it restarts, a log that had grown long returns its space.
    let sql = format!("PRAGMA journal_size_limit = {log_kept_bytes}");
    sqlx::query(AssertSqlSafe(sql)).execute(conn).await?;
    Ok(())
}
