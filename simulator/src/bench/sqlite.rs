//! The bare loop on SQLite: multi-row inserts on one connection.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldgate::store::reader::OpenError;
use fieldgate::store::sqlite::{SqliteSettings, migrate};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};

use super::{BATCH, BenchError, CHANNELS, DEVICES, READINGS_OF_FRAME, WINDOW_FRAMES};

/// Rows of an INSERT, frames of a commit: what was found fastest.
const ROWS: usize = 1_000;
const FRAMES: usize = 3_400;

/// Inserts what a fleet of the burst's shape would, and nothing else; returns readings per second.
pub(super) async fn bare(path: &Path, duration: Duration) -> Result<f64, BenchError> {
    let migrated = migrate(path, &SqliteSettings::default()).await;
    migrated.map_err(OpenError::from)?;
    let mut connection = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", "-262144")
        // Nothing is moved out of the log while it is measured: the loop is spared even that.
        .pragma("wal_autocheckpoint", "0")
        .connect()
        .await?;
    let (frames_sql, readings_sql) = (insert("frames", 8, 100), insert("readings", 4, ROWS));
    let started = Instant::now();
    let mut frames = 0;
    while started.elapsed() < duration {
        sqlx::query("BEGIN IMMEDIATE")
            .execute(&mut connection)
            .await?;
        insert_frames(&mut connection, &frames_sql, frames).await?;
        insert_readings(&mut connection, &readings_sql, frames).await?;
        sqlx::query("COMMIT").execute(&mut connection).await?;
        frames += FRAMES;
    }
    let rate = (frames * READINGS_OF_FRAME) as f64 / started.elapsed().as_secs_f64();
    connection.close().await?;
    Ok(rate)
}

fn insert(table: &str, columns: usize, rows: usize) -> Arc<str> {
    let row = format!("({})", vec!["?"; columns].join(","));
    format!("INSERT INTO {table} VALUES {}", vec![row; rows].join(",")).into()
}

/// Device and number within its stream of the `frame`-th frame: each device sends a window, and then
/// it is the next one's turn. That is how frames arrive in a burst.
fn place(frame: usize) -> (i64, i64) {
    let (devices, window) = (DEVICES as usize, WINDOW_FRAMES as usize);
    let (turn, in_window) = (frame / window, frame % window);
    let seq = turn / devices * window + in_window + 1;
    ((turn % devices) as i64, seq as i64)
}

async fn insert_frames(
    connection: &mut SqliteConnection,
    sql: &Arc<str>,
    first: usize,
) -> Result<(), sqlx::Error> {
    for chunk in (first..first + FRAMES).collect::<Vec<_>>().chunks(100) {
        let mut arguments = SqliteArguments::default();
        for &frame in chunk {
            let (device, seq) = place(frame);
            let row = [
                frame as i64 + 1,
                device,
                seq,
                17,
                seq,
                READINGS_OF_FRAME as i64,
                0,
                0,
            ];
            for value in row {
                arguments.add(value).map_err(sqlx::Error::Encode)?;
            }
        }
        let query = sqlx::query_with(AssertSqlSafe(Arc::clone(sql)), arguments);
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

async fn insert_readings(
    connection: &mut SqliteConnection,
    sql: &Arc<str>,
    first: usize,
) -> Result<(), sqlx::Error> {
    let mut rows = Vec::with_capacity(FRAMES * READINGS_OF_FRAME);
    for frame in first..first + FRAMES {
        let (device, seq) = place(frame);
        for channel in 0..i64::from(CHANNELS) {
            for sample in 0..i64::from(BATCH) {
                let ts_us = (seq * i64::from(BATCH) + sample) * 1_000_000;
                let series = device * i64::from(CHANNELS) + channel;
                rows.push((series, ts_us, frame as i64 + 1, ts_us as f64 / 100.0));
            }
        }
    }
    rows.sort_unstable_by_key(|row| (row.0, row.1, row.2));
    for chunk in rows.chunks_exact(ROWS) {
        let mut arguments = SqliteArguments::default();
        arguments.reserve(ROWS * 4, 0);
        for &(series, ts_us, frame_id, value) in chunk {
            arguments.add(series).map_err(sqlx::Error::Encode)?;
            arguments.add(ts_us).map_err(sqlx::Error::Encode)?;
            arguments.add(frame_id).map_err(sqlx::Error::Encode)?;
            arguments.add(value).map_err(sqlx::Error::Encode)?;
        }
        let query = sqlx::query_with(AssertSqlSafe(Arc::clone(sql)), arguments);
        query.execute(&mut *connection).await?;
    }
    Ok(())
}
