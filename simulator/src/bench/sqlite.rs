//! The baseline on SQLite: multi-row inserts on one connection.

use std::path::Path;
use std::sync::Arc;

use fieldgate::internals::{SqliteSettings, migrate_sqlite};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, Row as _, SqliteConnection};

use super::BenchError;
use super::baseline::{Job, Meter};
use super::workload::{self, Frame, Frames, Row};

/// Number of rows per INSERT; more are not faster.
const ROWS: usize = 1_000;
/// Size of the write-ahead log, in pages, above which it is checkpointed completely, so that it restarts; the
/// gateway uses the same limit.
const LOG_PAGES: i64 = (128 << 20) / 8192;

/// Inserts what a fleet would have stored, and nothing else; returns readings per second.
pub(super) async fn baseline(path: &Path, job: &Job) -> Result<f64, BenchError> {
    let migrated = migrate_sqlite(path, &SqliteSettings::default()).await;
    migrated.map_err(|error| BenchError::Migrate(error.to_string()))?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", "-262144")
        .pragma("wal_autocheckpoint", "0");
    let (mut conn, mut checkpointer) = (options.connect().await?, options.connect().await?);
    if let Some(sql) = &job.registry {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.as_str()));
        sql.execute(&mut conn).await?;
    }
    let inserts = Inserts {
        frames: Insert::into("frames", 11),
        readings: Insert::into("readings_sorted", 4),
    };
    let mut frames = Frames::new(job.workload, 0, 1, 1);
    let meter = Meter::start(job.until);
    while !meter.is_over() {
        let batch = frames.transaction();
        // Another thread checkpoints the log during the transaction, at no further cost to it.
        let (done, log_pages) = tokio::join!(
            inserts.transaction(&mut conn, job, &batch),
            checkpoint(&mut checkpointer)
        );
        done?;
        if log_pages? > LOG_PAGES {
            checkpoint(&mut checkpointer).await?;
        }
        meter.add(batch.len() * job.workload.frame_readings());
    }
    let rate = meter.rate();
    checkpointer.close().await?;
    conn.close().await?;
    Ok(rate)
}

/// Checkpoints what is possible without waiting for the other connection; returns the size of the log in pages.
async fn checkpoint(conn: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
    let row = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(conn);
    row.await?.try_get(1)
}

struct Inserts {
    frames: Insert,
    readings: Insert,
}

impl Inserts {
    async fn transaction(
        &self,
        conn: &mut SqliteConnection,
        job: &Job,
        batch: &[Frame],
    ) -> Result<(), sqlx::Error> {
        sqlx::query("BEGIN IMMEDIATE").execute(&mut *conn).await?;
        let values = |arguments: &mut _, frame| bind_frame(arguments, frame, job);
        let rows = batch.iter().copied();
        self.frames.execute(&mut *conn, rows, values).await?;
        let rows = workload::rows(job.workload, batch);
        let values = |arguments: &mut _, row| bind_reading(arguments, row, job.start_us);
        self.readings.execute(&mut *conn, rows, values).await?;
        sqlx::query("COMMIT").execute(conn).await?;
        Ok(())
    }
}

type Bound = Result<(), sqlx::error::BoxDynError>;

/// Placeholder for the checksum of a frame.
const CRC: i64 = 0x89AB_CDEF;

fn bind_frame(arguments: &mut SqliteArguments, frame: Frame, job: &Job) -> Bound {
    let readings = job.workload.frame_readings() as i64;
    let Frame { device, seq, id } = frame;
    let last_us = job.start_us;
    let first_us = (job.workload.samples > 1).then_some(last_us);
    for value in [id, device, seq, 17, seq, readings, 0, 0] {
        arguments.add(value)?;
    }
    arguments.add(first_us)?;
    arguments.add(last_us)?;
    arguments.add(CRC)
}

fn bind_reading(arguments: &mut SqliteArguments, row: Row, start_us: i64) -> Bound {
    arguments.add(row.series)?;
    arguments.add(start_us + row.second * 1_000_000)?;
    arguments.add(row.frame_id)?;
    arguments.add(row.value)
}

/// An INSERT of many rows.
struct Insert {
    table: &'static str,
    columns: usize,
    full: Arc<str>,
}

impl Insert {
    fn into(table: &'static str, columns: usize) -> Insert {
        Insert {
            table,
            columns,
            full: sql(table, columns, ROWS),
        }
    }

    /// Inserts all rows. SQLite runs in its own thread; the next rows are bound meanwhile.
    async fn execute<R>(
        &self,
        conn: &mut SqliteConnection,
        mut rows: impl Iterator<Item = R>,
        bind: impl Fn(&mut SqliteArguments, R) -> Bound,
    ) -> Result<(), sqlx::Error> {
        let mut next = self.bind(&mut rows, &bind)?;
        while let Some((sql, arguments)) = next {
            let run = sqlx::query_with(AssertSqlSafe(sql), arguments).execute(&mut *conn);
            let (done, bound) = tokio::join!(run, async { self.bind(&mut rows, &bind) });
            done?;
            next = bound?;
        }
        Ok(())
    }

    fn bind<R>(
        &self,
        rows: &mut impl Iterator<Item = R>,
        bind: impl Fn(&mut SqliteArguments, R) -> Bound,
    ) -> Result<Option<(Arc<str>, SqliteArguments)>, sqlx::Error> {
        let mut arguments = SqliteArguments::default();
        arguments.reserve(ROWS * self.columns, 0);
        let mut count = 0;
        for row in rows.take(ROWS) {
            bind(&mut arguments, row).map_err(sqlx::Error::Encode)?;
            count += 1;
        }
        Ok(match count {
            0 => None,
            ROWS => Some((Arc::clone(&self.full), arguments)),
            _ => Some((sql(self.table, self.columns, count), arguments)),
        })
    }
}

fn sql(table: &str, columns: usize, rows: usize) -> Arc<str> {
    let row = format!("({})", vec!["?"; columns].join(","));
    // A failure ends the whole bench, so no statement journal is needed to undo half of a statement.
    format!(
        "INSERT OR FAIL INTO {table} VALUES {}",
        vec![row; rows].join(",")
    )
    .into()
}
