//! This machine's limit, and how near the gateway comes to it, measured in one run.
//!
//! The limit is a loop that does nothing but insert the same kind of rows into the same tables, in large
//! synced transactions, on a machine that does nothing else. The gateway is the real binary over real
//! sockets, with the fleet on the same machine.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use fieldgate::keys::{FleetKey, KeyError};
use fieldgate::store::sqlite::{OpenError, SqliteSettings, migrate};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::faults::Faults;
use crate::fleet::{self, Counters, FleetError, Terms};
use crate::plan::{self, Clock, Plan, PlanError, Profile};
use crate::report::Summary;

const DEVICES: u32 = 1_000;
const CHANNELS: u8 = 4;
const BATCH: u16 = 15;
const WINDOW_FRAMES: u64 = 16;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The gateway's binary is not there.
    #[error("no gateway at {0}: build it with `cargo build --release`")]
    NoGateway(PathBuf),
    /// The gateway did not start.
    #[error("the gateway did not start; it said: {0}")]
    NotStarted(String),
    /// Files or processes.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The store cannot be made.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store does not do what it is told.
    #[error("the bare loop failed: {0}")]
    Sqlite(#[from] sqlx::Error),
    /// The gateway's key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The fleet.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

/// What was measured.
#[derive(Debug)]
pub struct Bench {
    bare_readings_per_s: f64,
    burst: Summary,
    steady: Summary,
    wire: Summary,
}

/// Measures in a new directory within `parent`, which is removed afterwards.
pub async fn run(parent: &Path, is_quick: bool) -> Result<Bench, BenchError> {
    let gateway = gateway_binary()?;
    let dir = parent.join(format!(".fieldgate-bench-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let measured = measure(&gateway, &dir, if is_quick { 5 } else { 15 }).await;
    std::fs::remove_dir_all(&dir)?;
    measured
}

fn gateway_binary() -> Result<PathBuf, BenchError> {
    let gateway = std::env::current_exe()?.with_file_name("fieldgate");
    if gateway.exists() {
        Ok(gateway)
    } else {
        Err(BenchError::NoGateway(gateway))
    }
}

async fn measure(gateway: &Path, dir: &Path, seconds: u64) -> Result<Bench, BenchError> {
    let duration = Duration::from_secs(seconds);
    say(&format!("bare inserts for {seconds} s"));
    let bare_readings_per_s = bare(&dir.join("bare.db"), duration).await?;
    let burst = Shape {
        devices: DEVICES,
        channels: CHANNELS,
        batch: BATCH,
        interval_us: 1_000_000,
    };
    say(&format!("the gateway under burst for {seconds} s"));
    let burst = through_gateway(gateway, dir, burst, Profile::Burst, duration).await?;
    let steady = Shape {
        interval_us: 1_000_000 / u64::from(BATCH),
        devices: DEVICES,
        channels: CHANNELS,
        batch: BATCH,
    };
    say(&format!("the gateway at 1,000 frames/s for {seconds} s"));
    let steady = through_gateway(gateway, dir, steady, Profile::Steady, duration).await?;
    let wire = Shape {
        devices: 10,
        channels: 1,
        batch: 60,
        interval_us: 1_000_000,
    };
    say("60 readings of one channel in a frame");
    let wire = through_gateway(gateway, dir, wire, Profile::Burst, Duration::from_secs(1)).await?;
    Ok(Bench {
        bare_readings_per_s,
        burst,
        steady,
        wire,
    })
}

fn say(what: &str) {
    eprintln!("measuring: {what}");
}

impl std::fmt::Display for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let per_s = |rate: f64| format!("{:.0} readings/s", rate);
        let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header([
            "SQLite, synced commits; 1,000 devices x 4 channels x 15 samples",
            "",
        ]);
        table.add_row(["bare multi-row insert", &per_s(self.bare_readings_per_s)]);
        table.add_row([
            "acked by the gateway, burst",
            &per_s(self.burst.readings_per_s),
        ]);
        let ratio = self.burst.readings_per_s / self.bare_readings_per_s;
        table.add_row(["ratio", &format!("{ratio:.2}")]);
        table.add_row(["ack p99 in the burst", &ms(self.burst.ack_ms.p99)]);
        table.add_row(["ack p50 at 1,000 frames/s", &ms(self.steady.ack_ms.p50)]);
        table.add_row(["ack p99 at 1,000 frames/s", &ms(self.steady.ack_ms.p99)]);
        let wire = format!("{:.2} bytes", self.wire.bytes_per_reading);
        table.add_row(["wire per reading, 60 of 0.01 resolution in a frame", &wire]);
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        write!(f, "{}", table.trim_fmt())
    }
}

/// What a fleet looks like.
#[derive(Clone, Copy)]
struct Shape {
    devices: u32,
    channels: u8,
    batch: u16,
    interval_us: u64,
}

async fn through_gateway(
    binary: &Path,
    dir: &Path,
    shape: Shape,
    profile: Profile,
    duration: Duration,
) -> Result<Summary, BenchError> {
    let data_dir = dir.join("gateway");
    let (mut gateway, address) = start(binary, &data_dir).await?;
    let fleet_key = *FleetKey::load(&data_dir.join(fieldgate::keys::KEY_FILE))?.as_bytes();
    let now_us = jiff::Timestamp::now().as_microsecond();
    let plan = Plan {
        format: plan::FORMAT,
        seed: 1,
        nonce: now_us.unsigned_abs(),
        name_prefix: "bench-".into(),
        devices: shape.devices,
        channels: shape.channels,
        interval_us: shape.interval_us,
        batch: shape.batch,
        frames: None,
        clock: Clock::Utc,
        start_us: now_us - 30 * 86_400_000_000,
        profile,
        malformed_billionths: 0,
        replay: None,
    };
    let terms = Terms {
        gateway: address,
        fleet_key,
        duration: Some(duration),
        window_frames: WINDOW_FRAMES,
        faults: Faults::default(),
    };
    let script = Arc::new(plan.open()?);
    let counters = Arc::new(Counters::default());
    let summary = fleet::run(script, terms, None, counters, CancellationToken::new()).await;
    gateway.kill().await?;
    std::fs::remove_dir_all(&data_dir)?;
    Ok(summary?)
}

/// Starts a gateway on a free port and waits until it listens.
async fn start(binary: &Path, data_dir: &Path) -> Result<(Child, SocketAddr), BenchError> {
    let mut child = Command::new(binary)
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(data_dir)
        .env("RUST_LOG", "warn")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("no stdout"))?;
    let mut lines = BufReader::new(stdout).lines();
    let mut said = String::new();
    while let Some(line) = lines.next_line().await? {
        let address = line
            .strip_prefix("listening on")
            .map(|rest| rest.trim().parse());
        if let Some(Ok(address)) = address {
            return Ok((child, address));
        }
        said = line;
    }
    Err(BenchError::NotStarted(said))
}

/// Rows of an INSERT, frames of a commit: what was found fastest.
const ROWS: usize = 1_000;
const FRAMES: usize = 3_400;
const READINGS_OF_FRAME: usize = CHANNELS as usize * BATCH as usize;

/// Inserts what a fleet of the burst's shape would, and nothing else; returns readings per second.
async fn bare(path: &Path, duration: Duration) -> Result<f64, BenchError> {
    migrate(path, &SqliteSettings::default()).await?;
    let mut connection = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", "-262144")
        // 128 MiB of log: a page that many commits write is moved once.
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
