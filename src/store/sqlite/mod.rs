//! The store in one SQLite file.
//!
//! One gateway writes, on one connection for all that it commits, in write-ahead-log mode, and every commit is synced
//! before it returns. Commands and the pruner write next to it in short transactions (`turn`). `open` gets the
//! connections, `write` turns a batch into a transaction (`rows`, `recent`, `admit`, `bulk` have its statements),
//! `checkpoint` keeps the log short. Here they are put together, and errors become [`StoreError`]s.
//!
//! Invariants
//! - A transient error leaves nothing behind, or whole parts of a batch that was cut (`cut`): the same batch may
//!   be committed again.
//! - After a fatal error nothing is written any more, not even the checkpoint that SQLite makes when
//!   its last connection closes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::Connection;

use self::checkpoint::{Checkpoints, Limits};
use self::files::{Header, HeldFiles};
use self::open::{Locks, Purpose, WriterSettings};
pub use self::open::{OpenError, migrate, open_editor, open_reader};
use self::readers::Readers;
use self::reserve::{LOG_BYTES, RESERVE_BYTES, Reserve};
use self::turn::Turns;
use self::write::Writer;
use super::bounds::DeviceBounds;
use super::cut::{Cut, Sum};
use super::hours::hours_of;
use super::rows::Run;
use super::{Batch, Committed, Content, Store, StoreError};
use crate::time::{SystemClock, warn_at_start};

mod admit;
mod bulk;
mod checkpoint;
pub mod files;
mod identity;
mod open;
pub mod readers;
mod recent;
mod reserve;
mod rows;
pub(super) mod spool;
#[cfg(test)]
mod tests;
pub(super) mod turn;
mod write;

/// The latest time of receipt that is stored.
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
/// Extended code of what a trigger refused. This program has none that do.
const CONSTRAINT_TRIGGER: i32 = 19 | (7 << 8);
/// Extended code of an I/O error: the log's index, which is rebuilt at every start, could not grow.
/// It is how a full disk shows there.
const IOERR_SHMSIZE: i32 = 10 | (19 << 8);
/// A write that the system refused, as it does beyond a quota or a limit on the size of files; SQLite tells a
/// full disk from it, and nothing else. What was to be written counts only once it is synced, and a sync that
/// fails has a code of its own.
const IOERR_WRITE: i32 = 10 | (3 << 8);

/// After how many readings statistics are looked after for the first time; then each time after
/// twice as many, up to the second figure.
const OPTIMIZE_AFTER_READINGS: (u64, u64) = (100_000, 50_000_000);

/// After how long without anything to commit the store is tidied. A store to which something comes each half
/// minute is not tidied each time: that would write its pages again.
const TIDY_AFTER: Duration = Duration::from_secs(60);

/// How the store uses memory and disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqliteSettings {
    /// Memory for pages on the writer's connection.
    pub cache_bytes: u64,
    /// Bytes of a page, a power of two from 512 to 65536; counts only when the file is created.
    pub page_bytes: u32,
    /// Pages are moved from the write-ahead log into the database, beside commits, when so much of
    /// it has not been moved.
    pub wal_checkpoint_bytes: u64,
    /// When the write-ahead log is longer than this, the rest of it is moved between two commits.
    pub wal_soft_bytes: u64,
    /// When a reader keeps the write-ahead log from being reset and it is longer than this, commits
    /// are refused as transient until the reader is gone.
    pub wal_hard_bytes: u64,
    /// What each device may have.
    pub bounds: DeviceBounds,
}

/// Measured with frames of 1 and of 60 readings, in batches of 20,000 and 200,000: pages of 8 KiB take
/// no more time than others in any of them. The log is moved a little at a time: commits wait while the
/// database is synced, and at 1,000 frames a second the p99 of ACKs was 37 ms with 4 MiB at a time and
/// 42 to 49 ms with 64 MiB, for the same throughput.
impl Default for SqliteSettings {
    fn default() -> Self {
        Self {
            cache_bytes: 256 << 20,
            page_bytes: 8192,
            wal_checkpoint_bytes: 4 << 20,
            wal_soft_bytes: 128 << 20,
            wal_hard_bytes: 1 << 30,
            bounds: DeviceBounds::default(),
        }
    }
}

/// The store; see the module.
pub struct SqliteStore {
    /// `None` after a fatal error.
    writer: Option<Writer>,
    checkpoints: Checkpoints,
    statistics: Statistics,
    turns: Turns,
    readers: Readers,
    cut: Cut,
    /// The latest commit was one of an empty batch.
    is_tidying: bool,
    /// Of a spool.
    reserve: Option<Reserve>,
    path: PathBuf,
    held: HeldFiles,
    header: Header,
    /// Held while the store is open; closed after the connections.
    locks: Locks,
}

/// When to look after the statistics that the query planner goes by.
struct Statistics {
    readings: u64,
    due_at_readings: u64,
}

impl SqliteStore {
    /// Opens the database at `path`, creating it if there is none, and brings its schema up to date.
    ///
    /// # Errors
    /// [`OpenError`] says in one line what is wrong and what to do.
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
                "the limits of the write-ahead log must not shrink from checkpoint to soft to hard",
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
            // Nor is a full disk a reason not to start.
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
        // A crash may have left a long log behind.
        checkpoints.observe(&mut conn).await.map_err(sqlite)?;
        let mut writer = Writer::new(conn, purpose, settings.bounds);
        match writer.settle().await {
            // A full disk is no reason not to start: the first commit tries again, and tells.
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

    /// Commits what goes into one transaction; an error comes with whether a smaller one may pass.
    async fn try_commit(&mut self, batch: &Batch) -> Result<Committed, (StoreError, bool)> {
        let no_matter = |error| (error, false);
        let Some(writer) = &mut self.writer else {
            let failed = "the store has failed before".to_owned();
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
        // What was committed is durable only in a file that will be found again.
        self.check_files()
            .map_err(|reason| (StoreError::Fatal(reason), false))?;
        self.statistics.count(batch);
        self.observe_log().await;
        Ok(committed)
    }

    fn is_tidy(&self) -> bool {
        self.writer.as_ref().is_none_or(Writer::is_tidy)
    }

    /// Makes sure that the files are where they were and hold what SQLite has written.
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

    /// After a commit. What was committed is durable whatever this finds: an error is no reason to
    /// withhold receipts, and a real one comes back with the next batch.
    async fn observe_log(&mut self) {
        let Some(writer) = &mut self.writer else {
            return;
        };
        if let Err(error) = self.checkpoints.observe(&mut writer.conn).await {
            tracing::warn!(%error, "the length of the write-ahead log is not known");
        }
        self.readers.ask_to_end(self.checkpoints.is_log_long());
    }

    /// Gives the writer up without closing it: closing the last connection would try a checkpoint
    /// once more, and after a failed sync that may seem to succeed and delete the log, which alone
    /// still has what was acknowledged.
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
        // So that the file is as small and as quick to read as it can be.
        while !self.is_tidy() {
            self.commit(&Batch::default()).await?;
        }
        if let Err(reason) = self.check_files() {
            // Closing deletes the log by its name, which may be another's by now.
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
        // A reader may hold on to the log; what is not moved now is moved at the next start.
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
            // Statistics only serve speed.
            Ok(()) | Err(StoreError::Transient(_)) => Ok(()),
            Err(fatal) => Err(fatal),
        }
    }
}

/// Keeps gateways from the database at `path` until it is dropped; `None` if one uses it.
///
/// # Errors
/// It cannot be opened.
pub fn keep_alone(path: &Path) -> Result<Option<impl Sized + Send + use<>>, OpenError> {
    match open::claim(path) {
        Ok((_, locks)) => Ok(Some(locks)),
        Err(OpenError::InUse(..)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Has SQLite renew the statistics of tables that have none or have grown tenfold; 0x10000 means all
/// tables, since this connection runs no queries that would need them.
async fn optimize(conn: &mut sqlx::SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::query("PRAGMA optimize = 0x10002")
        .execute(conn)
        .await
        .map(drop)
}

/// Puts readings where they stay, beside what a gateway has still to sort in.
pub(super) async fn insert_sorted(
    conn: &mut sqlx::SqliteConnection,
    runs: &[Run<'_>],
) -> Result<(), sqlx::Error> {
    rows::insert_runs(&rows::readings_into("readings_sorted"), conn, runs).await?;
    recent::insert_hours(conn, &hours_of(runs)).await
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
        _ if identity::is_put_back(error) => StoreError::Fatal(error.to_string()),
        _ if identity::is_unknown_stream(error) => StoreError::Replaced(error.to_string()),
        true => StoreError::Transient(text),
        false => StoreError::Fatal(text),
    }
}

/// Whether a smaller transaction may pass where this one did not.
fn depends_on_size(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(NOMEM | TOOBIG))
}

/// Whether the store can be trusted after an error: a disk that is full or a lock that is held may
/// pass, and so may a trigger of the operator's own that refuses rows; but after a failed read, write or sync nobody knows what is on the disk.
fn is_transient(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(BUSY | LOCKED | NOMEM | FULL))
        || bulk::is_left_out(error)
        || matches!(
            extended_code(error),
            Some(IOERR_SHMSIZE | IOERR_WRITE | CONSTRAINT_TRIGGER)
        )
}
