//! The store in one SQLite file.
//!
//! One gateway writes, on one connection, in write-ahead-log mode, and every commit is synced before it returns.
//! Commands and the pruner also write, in short transactions (`turn`). `open` opens the connections, `write`
//! commits a batch in a transaction (`rows`, `level0`, `admit`, `bulk` have its statements), `checkpoint` keeps the
//! log short. This module combines them and converts errors to [`StoreError`]s.
//!
//! Invariants
//! - A transient error leaves nothing behind, or whole parts of a batch that was cut (`cut`): the same batch may be
//!   committed again.
//! - After a fatal error nothing is written any more, not even by the checkpoint that SQLite runs when its last
//!   connection closes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::Connection;

pub use self::checkpoint::LogMover;
use self::checkpoint::{Checkpoints, Limits};
use self::files::{Header, HeldFiles};
pub use self::files::{file_system_fault, is_in_use};
use self::open::{Locks, WriterSettings};
pub use self::open::{OpenError, Purpose, check, copy, migrate, open_existing};
use self::readers::Readers;
use self::reserve::{LOG_BYTES, RESERVE_BYTES, Reserve};
use self::turn::Turns;
use self::write::Writer;
use super::cut::{Cut, Sum};
use super::hours::hours_of;
use super::rows::Run;
use super::{Batch, Committed, Content, Store, StoreError};
use crate::config::{DeviceBounds, SqliteOptions};
use crate::time::{SystemClock, warn_at_start};

mod admit;
mod bulk;
mod checkpoint;
pub mod files;
mod identity;
mod level0;
mod open;
pub mod readers;
pub(super) mod reserve;
mod rows;
pub(super) mod spool;
#[cfg(test)]
mod tests;
pub(super) mod turn;
mod write;

/// Latest stored time of receipt.
const LATEST_TIME: &str = "SELECT max(at) FROM (
    SELECT max(last_seen_at) AS at FROM devices
    UNION ALL SELECT max(measured_at) FROM clocks
    UNION ALL SELECT (SELECT received_at FROM frames ORDER BY id DESC LIMIT 1)) AS latest";

// SQLite's primary result codes, the low byte of an extended one.
const PERM: i32 = 3;
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const NOMEM: i32 = 7;
const READONLY: i32 = 8;
const FULL: i32 = 13;
const TOOBIG: i32 = 18;
const CANTOPEN: i32 = 14;
const NOTADB: i32 = 26;
/// Extended code of a write that a trigger rejected. This program has no such triggers.
const CONSTRAINT_TRIGGER: i32 = 19 | (7 << 8);
/// Extended code of an I/O error: the log's index, which is rebuilt at every start, could not grow. A full disk
/// causes it.
const IOERR_SHMSIZE: i32 = 10 | (19 << 8);
/// A write that the system rejected, for example because of a quota or a limit on file sizes; a full disk has
/// another code. The data counts only once it is synced, and a failed sync has its own code.
const IOERR_WRITE: i32 = 10 | (3 << 8);

/// Number of readings after which statistics are renewed for the first time. Each interval is twice the
/// previous one, up to the second figure.
const OPTIMIZE_AFTER_READINGS: (u64, u64) = (100_000, 50_000_000);

/// Idle time after which the store is tidied. A store that receives data every half minute is not tidied each
/// time, as that would rewrite its pages.
const TIDY_AFTER: Duration = Duration::from_secs(60);

/// Memory and disk settings of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqliteSettings {
    /// Page cache of the writer's connection, in bytes.
    pub cache_bytes: u64,
    /// Page size in bytes, a power of two from 512 to 65536; used only when the file is created.
    pub page_bytes: u32,
    /// Length of the unmoved part of the write-ahead log, in bytes, at which a checkpoint starts concurrently
    /// with commits.
    pub wal_checkpoint_bytes: u64,
    /// Length of the write-ahead log, in bytes, above which the rest is checkpointed between two commits.
    pub wal_soft_bytes: u64,
    /// Length of the write-ahead log, in bytes, above which commits fail with a transient error while a reader
    /// prevents its reset.
    pub wal_hard_bytes: u64,
    pub bounds: DeviceBounds,
}

/// Measured with frames of 1 and of 60 readings, in batches of 20,000 and 200,000: pages of 8 KiB were never
/// slower than other sizes. The log is checkpointed in small steps, because commits wait while the database is
/// synced. At 1,000 frames per second the p99 of ACKs was 37 ms with steps of 4 MiB and 42 to 49 ms with 64
/// MiB, at the same throughput.
impl SqliteSettings {
    /// Returns the settings with these options, and with the limits `bounds` for each device.
    pub fn new(options: &SqliteOptions, bounds: DeviceBounds) -> Self {
        SqliteSettings {
            cache_bytes: options.cache_bytes,
            page_bytes: 8192,
            wal_checkpoint_bytes: (4 << 20).min(options.wal_bytes_max / 4),
            wal_soft_bytes: (128 << 20).min(options.wal_bytes_max / 2),
            wal_hard_bytes: options.wal_bytes_max,
            bounds,
        }
    }
}

impl Default for SqliteSettings {
    fn default() -> Self {
        SqliteSettings::new(&SqliteOptions::default(), DeviceBounds::default())
    }
}

pub struct SqliteStore {
    /// `None` after a fatal error.
    writer: Option<Writer>,
    checkpoints: Checkpoints,
    statistics: Statistics,
    turns: Turns,
    readers: Readers,
    cut: Cut,
    /// Whether the latest commit was one of an empty batch.
    is_tidying: bool,
    /// Disk reserve; only a spool has one.
    reserve: Option<Reserve>,
    path: PathBuf,
    held: HeldFiles,
    header: Header,
    /// Held while the store is open; dropped after the connections.
    locks: Locks,
}

/// Schedule for renewing the query planner's statistics.
struct Statistics {
    readings: u64,
    due_at_readings: u64,
}

impl SqliteStore {
    /// Opens the database at `path`, creating it if it does not exist, and updates its schema.
    pub async fn open(
        path: impl AsRef<Path>,
        settings: &SqliteSettings,
    ) -> Result<Self, OpenError> {
        Self::open_as(Purpose::Store, path.as_ref(), settings).await
    }

    async fn open_as(
        purpose: Purpose,
        path: &Path,
        settings: &SqliteSettings,
    ) -> Result<Self, OpenError> {
        if settings.wal_checkpoint_bytes > settings.wal_soft_bytes
            || settings.wal_soft_bytes > settings.wal_hard_bytes
        {
            return Err(OpenError::Settings(
                "write-ahead log limits must satisfy checkpoint <= soft <= hard",
            ));
        }
        let (path, locks) = open::claim(path)?;
        let writer_settings = WriterSettings::of(settings, purpose);
        let sqlite = |source| OpenError::Sqlite {
            path: path.clone(),
            source,
        };
        let mut conn = open::writer(&path, &writer_settings).await?;
        let now_us = SystemClock::start().now().utc_us;
        let stored_us = sqlx::query_scalar(LATEST_TIME).fetch_one(&mut conn).await;
        warn_at_start(now_us, stored_us.map_err(sqlite)?);
        match rows::close_sessions(&mut conn, now_us).await {
            // A full disk does not prevent the start either.
            Err(error) if !is_transient(&error) => return Err(sqlite(error)),
            Ok(()) | Err(_) => {}
        }
        let reserve = (purpose == Purpose::Spool).then(|| Reserve::open(&path, RESERVE_BYTES));
        match optimize(&mut conn).await {
            Err(error) if !is_transient(&error) => return Err(sqlite(error)),
            Ok(()) | Err(_) => {}
        }
        let page_size = sqlx::query_scalar("SELECT page_size FROM pragma_page_size");
        let page_bytes: u32 = page_size.fetch_one(&mut conn).await.map_err(sqlite)?;
        let mut checkpoints = Checkpoints::start(
            open::checkpointer(&path).await?,
            Limits {
                wake_bytes: settings.wal_checkpoint_bytes,
                soft_bytes: match purpose {
                    Purpose::Store => settings.wal_soft_bytes,
                    Purpose::Spool => settings.wal_soft_bytes.min(LOG_BYTES),
                },
                hard_bytes: settings.wal_hard_bytes,
                page_bytes: u64::from(page_bytes),
            },
        );
        // A crash may have left a long log.
        checkpoints.observe(&mut conn).await.map_err(sqlite)?;
        let mut writer = Writer::new(conn, purpose, settings.bounds);
        match writer.settle().await {
            // A full disk does not prevent the start: the first commit tries again and reports it.
            Err(error) if !is_transient(&error) => return Err(sqlite(error)),
            Ok(()) | Err(_) => {}
        }
        Ok(Self {
            writer: Some(writer),
            checkpoints,
            statistics: Statistics {
                readings: 0,
                due_at_readings: OPTIMIZE_AFTER_READINGS.0,
            },
            turns: Turns::of_gateway(&path),
            readers: Readers::of_gateway(&path),
            cut: Cut::default(),
            is_tidying: false,
            reserve,
            held: HeldFiles::of_database(&path),
            header: Header::default(),
            path,
            locks,
        })
    }

    /// Returns a handle that moves the log while the store is open.
    pub fn log_mover(&self) -> LogMover {
        self.checkpoints.mover()
    }

    /// Commits the content of one transaction; an error states whether a smaller one may pass.
    async fn try_commit(&mut self, batch: &Batch) -> Result<Committed, (StoreError, bool)> {
        let no_matter = |error| (error, false);
        let Some(writer) = &mut self.writer else {
            let failed = "the store failed earlier".to_owned();
            return Err((StoreError::Fatal(failed), false));
        };
        self.readers.ask_to_end(self.checkpoints.is_log_long());
        self.checkpoints.make_room().await.map_err(no_matter)?;
        self.turns.give_way().await;
        self.statistics
            .look_after(writer)
            .await
            .map_err(no_matter)?;
        let committed = writer.commit(batch).await;
        let committed =
            committed.map_err(|error| (classify(&error, "commit"), depends_on_size(&error)))?;
        // A commit is durable only in a file that the next start will open.
        self.check_files()
            .map_err(|reason| (StoreError::Fatal(reason), false))?;
        self.statistics.count(batch);
        self.observe_log().await;
        Ok(committed)
    }

    fn is_tidy(&self) -> bool {
        self.writer.as_ref().is_none_or(Writer::is_tidy)
    }

    /// Checks that the files are in place and contain what SQLite has written.
    fn check_files(&mut self) -> Result<(), String> {
        self.held.check()?;
        match self.locks.file() {
            Some(file) => self.header.check(file, &self.path),
            None => Ok(()),
        }
    }

    /// Commits a batch, in parts while it is too large as a whole.
    async fn commit_in_parts(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        'cut: loop {
            let (mut sum, mut taken) = (Sum::default(), 0);
            while let Some(part) = self.cut.next_part(batch, &mut taken) {
                match self.try_commit(&part).await {
                    Ok(committed) => {
                        self.cut.pass(&part);
                        sum.add(committed);
                    }
                    Err((error, true)) if self.cut.halve(&part, 0, &error.to_string()) => {
                        continue 'cut;
                    }
                    Err((error, _)) => return Err(error),
                }
            }
            return Ok(sum.committed());
        }
    }

    /// Checks the log after a commit. The commit is durable whatever the result, so an error does not withhold
    /// receipts; a lasting one recurs with the next batch.
    async fn observe_log(&mut self) {
        let Some(writer) = &mut self.writer else {
            return;
        };
        if let Err(error) = self.checkpoints.observe(&mut writer.conn).await {
            tracing::warn!(%error, "could not read write-ahead log size");
        }
        self.readers.ask_to_end(self.checkpoints.is_log_long());
    }

    /// Drops the writer without closing it. Closing the last connection would run one more checkpoint; after a
    /// failed sync, that might seem to succeed and delete the log, the only copy of acknowledged data.
    fn abandon(&mut self) {
        std::mem::forget(self.writer.take());
    }
}

impl Store for SqliteStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        let result = self.commit_in_parts(batch).await;
        self.is_tidying = batch.is_empty();
        if let Err(StoreError::Fatal(_)) = result {
            self.abandon();
        }
        result
    }

    fn tidy_after(&self) -> Option<Duration> {
        (!self.is_tidy()).then_some(match self.is_tidying {
            true => Duration::ZERO,
            false => TIDY_AFTER,
        })
    }

    async fn failure(&mut self) -> StoreError {
        let error = self.checkpoints.failure().await;
        self.abandon();
        error
    }

    async fn close(mut self) -> Result<(), StoreError> {
        // Keeps the file as small and as fast to read as possible.
        while !self.is_tidy() {
            self.commit(&Batch::default()).await?;
        }
        if let Err(reason) = self.check_files() {
            // Closing deletes the log by its name, which may now belong to another log.
            self.abandon();
            return Err(StoreError::Fatal(reason));
        }
        let Some(mut writer) = self.writer.take() else {
            return Ok(());
        };
        if let Some(reason) = self.checkpoints.stop().await {
            std::mem::forget(writer);
            return Err(StoreError::Fatal(reason));
        }
        optimize(&mut writer.conn)
            .await
            .map_err(|error| classify(&error, "optimize"))?;
        // A reader may still pin the log; the next start moves the rest.
        let truncate = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut writer.conn);
        truncate
            .await
            .map_err(|error| classify(&error, "checkpoint"))?;
        writer
            .conn
            .close()
            .await
            .map_err(|error| classify(&error, "close"))
    }
}

impl Statistics {
    fn count(&mut self, batch: &Batch) {
        let readings = batch.entries.iter().map(|entry| match &entry.content {
            Content::Readings(readings) => readings.values.len() as u64,
            _ => 0,
        });
        self.readings += readings.sum::<u64>();
    }

    async fn look_after(&mut self, writer: &mut Writer) -> Result<(), StoreError> {
        if self.readings < self.due_at_readings {
            return Ok(());
        }
        self.due_at_readings = self.readings + self.readings.min(OPTIMIZE_AFTER_READINGS.1);
        match optimize(&mut writer.conn)
            .await
            .map_err(|error| classify(&error, "optimize"))
        {
            // Statistics affect only speed.
            Ok(()) | Err(StoreError::Transient(_)) => Ok(()),
            Err(fatal) => Err(fatal),
        }
    }
}

/// Keeps gateways from using the database at `path` until the result is dropped; returns `None` if one uses it.
///
/// # Errors
/// The database cannot be opened.
pub fn keep_alone(path: &Path) -> Result<Option<impl Sized + Send + use<>>, OpenError> {
    match open::claim(path) {
        Ok((_, locks)) => Ok(Some(locks)),
        Err(OpenError::InUse(..)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Renews the statistics of tables that have none or have grown tenfold. 0x10000 selects all tables, because
/// this connection runs no queries that would need them.
async fn optimize(conn: &mut sqlx::SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::query("PRAGMA optimize = 0x10002")
        .execute(conn)
        .await
        .map(drop)
}

/// Inserts readings into the sorted table, without disturbing a gateway's level 0.
pub(super) async fn insert_sorted(
    conn: &mut sqlx::SqliteConnection,
    runs: &[Run<'_>],
) -> Result<(), sqlx::Error> {
    rows::insert_runs(&rows::readings_into("readings_sorted"), conn, runs).await?;
    level0::insert_hours(conn, &hours_of(runs)).await
}

fn primary_code(error: &sqlx::Error) -> Option<i32> {
    extended_code(error).map(|code| code & 0xff)
}

fn extended_code(error: &sqlx::Error) -> Option<i32> {
    error.as_database_error()?.code()?.parse().ok()
}

fn classify(error: &sqlx::Error, doing: &str) -> StoreError {
    let text = format!("{doing}: {error}");
    match is_transient(error) {
        _ if identity::is_restored(error) => StoreError::Fatal(error.to_string()),
        _ if identity::is_unknown_stream(error) => StoreError::Replaced(error.to_string()),
        true => StoreError::Transient(text),
        false => StoreError::Fatal(text),
    }
}

/// Returns whether a write failed for lack of disk space.
pub(super) fn is_disk_full(error: &sqlx::Error) -> bool {
    primary_code(error) == Some(FULL)
        || matches!(extended_code(error), Some(IOERR_SHMSIZE | IOERR_WRITE))
}

/// Returns whether a smaller transaction may pass where this one failed.
fn depends_on_size(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(NOMEM | TOOBIG))
}

/// Returns whether the store can be trusted after an error. A full disk or a held lock may pass, and so may an
/// operator's trigger that rejects rows. After a failed read, write or sync the content of the disk is unknown.
fn is_transient(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(BUSY | LOCKED | NOMEM | FULL))
        || bulk::is_left_out(error)
        || matches!(
            extended_code(error),
            Some(IOERR_SHMSIZE | IOERR_WRITE | CONSTRAINT_TRIGGER)
        )
}
