//! The bare loop on SQLite: multi-row inserts on one connection.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fieldgate::store::reader::OpenError;
use fieldgate::store::sqlite::{SqliteSettings, migrate};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};

use super::BenchError;
use super::bare::{Job, Until};
use super::cell::{self, Cell, Frame, Frames, Row};

/// Rows of an INSERT: more are no faster.
const ROWS: usize = 1_000;

/// Inserts what a fleet would have stored, and nothing else; returns readings per second.
pub(super) async fn bare(path: &Path, job: &Job) -> Result<f64, BenchError> {
    let migrated = migrate(path, &SqliteSettings::default()).await;
    migrated.map_err(OpenError::from)?;
    // While it is measured nothing is moved out of the log: the loop is spared even that. A store that is
    // only filled may be larger than anybody wants a log to be.
    let checkpoint_pages = match job.until {
        Until::Passed(_) => "0",
        Until::Stored(_) => "32768",
    };
    let mut conn = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", "-262144")
        .pragma("wal_autocheckpoint", checkpoint_pages)
        .connect()
        .await?;
    if let Some(sql) = &job.registry {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.as_str()));
        sql.execute(&mut conn).await?;
    }
    let (frames_insert, readings_insert) = (
        Insert::into("frames", 8),
        Insert::into("readings_sorted", 4),
    );
    let mut frames = Frames::new(job.cell, 0, 1, 1);
    let started = Instant::now();
    let mut readings = 0;
    while !job.until.is_reached(started, readings) {
        let batch = frames.transaction();
        sqlx::query("BEGIN IMMEDIATE").execute(&mut conn).await?;
        let values = |arguments: &mut _, frame| bind_frame(arguments, frame, job.cell);
        let rows = batch.iter().copied();
        frames_insert.execute(&mut conn, rows, values).await?;
        let rows = cell::rows(job.cell, &batch);
        let values = |arguments: &mut _, row| bind_reading(arguments, row, job.start_us);
        readings_insert.execute(&mut conn, rows, values).await?;
        sqlx::query("COMMIT").execute(&mut conn).await?;
        readings += (batch.len() * job.cell.frame_readings()) as u64;
    }
    let rate = readings as f64 / started.elapsed().as_secs_f64();
    conn.close().await?;
    Ok(rate)
}

type Bound = Result<(), sqlx::error::BoxDynError>;

fn bind_frame(arguments: &mut SqliteArguments, frame: Frame, cell: Cell) -> Bound {
    let readings = cell.frame_readings() as i64;
    let Frame { device, seq, id } = frame;
    [id, device, seq, 17, seq, readings, 0, 0]
        .into_iter()
        .try_for_each(|value| arguments.add(value))
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

    /// Inserts all rows. SQLite works in a thread of its own: the next rows are bound meanwhile.
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
    format!("INSERT INTO {table} VALUES {}", vec![row; rows].join(",")).into()
}
