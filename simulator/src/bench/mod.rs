//! This machine's limit, and how near the gateway comes to it, measured in one run.
//!
//! The limit is a loop that does nothing but put the same kind of rows into the same tables, in large
//! synced transactions, on a machine that does nothing else: `sqlite` and `postgres` have one each. The
//! gateway is the real binary over real sockets, with the fleet on the same machine.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use fieldgate::config::{DATABASE_FILE, Settings};
use fieldgate::keys::{FleetKey, KeyError};
use fieldgate::store::reader::OpenError;
use fieldgate::store::url::{PostgresUrl, StoreUrl};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use self::postgres::Database;
use crate::faults::Faults;
use crate::fleet::{self, Counters, FleetError, Terms};
use crate::plan::{self, Clock, Plan, PlanError, Profile};
use crate::report::Summary;

mod postgres;
mod sqlite;

const DEVICES: u32 = 1_000;
const CHANNELS: u8 = 4;
const BATCH: u16 = 15;
const WINDOW_FRAMES: u64 = 16;
const READINGS_OF_FRAME: usize = CHANNELS as usize * BATCH as usize;
/// How long before the present the readings of the burst begin, as after a long outage.
const BACKLOG_US: i64 = 30 * 86_400_000_000;

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
    Bare(#[from] sqlx::Error),
    /// The server gives no database to measure in.
    #[error(
        "cannot make a database on {server}: {reason}; bench needs a database there to connect to, and a \
         user with the right to create others"
    )]
    Server {
        /// Where.
        server: PostgresUrl,
        /// What it says.
        reason: String,
    },
    /// Ctrl-C.
    #[error("stopped; what was made for it is removed")]
    Stopped,
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
    store: &'static str,
    bare_way: String,
    bare_readings_per_s: f64,
    burst: Summary,
    steady: Summary,
    wire: Summary,
}

/// Measures in a directory and a database of its own, which are removed afterwards: beside the file that
/// `store` names, or on its server.
pub async fn run(store: &StoreUrl, is_quick: bool) -> Result<Bench, BenchError> {
    let gateway = gateway_binary()?;
    let site = Site::make(store)?;
    let measured = tokio::select! {
        measured = measure(&gateway, &site, if is_quick { 5 } else { 15 }) => measured,
        stopped = told_to_stop() => Err(stopped.map_or_else(BenchError::Io, |()| BenchError::Stopped)),
    };
    // The first thing that went wrong is what counts.
    let removed = site.remove().await;
    let measured = measured?;
    removed?;
    Ok(measured)
}

async fn told_to_stop() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

/// Where it is measured.
struct Site {
    dir: PathBuf,
    /// `None` for SQLite.
    database: Option<Database>,
}

impl Site {
    fn make(store: &StoreUrl) -> io::Result<Site> {
        let (parent, database) = match store {
            StoreUrl::Sqlite(path) => {
                let parent = path.parent().map(Path::to_owned).unwrap_or_default();
                (parent, None)
            }
            StoreUrl::Postgres(url) => (std::env::temp_dir(), Some(Database::on(url))),
        };
        let dir = parent.join(format!(".fieldgate-bench-{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        Ok(Site { dir, database })
    }

    async fn remove(self) -> Result<(), BenchError> {
        let removed = match self.database {
            Some(database) => database.remove().await,
            None => Ok(()),
        };
        std::fs::remove_dir_all(&self.dir)?;
        removed
    }

    /// The address of a store that has nothing in it yet.
    async fn new_store(&self, data_dir: &Path) -> Result<String, BenchError> {
        match &self.database {
            None => Ok(format!(
                "sqlite://{}",
                data_dir.join(DATABASE_FILE).display()
            )),
            Some(database) => {
                database.make_anew().await?;
                Ok(database.url().with_password().to_owned())
            }
        }
    }
}

fn gateway_binary() -> Result<PathBuf, BenchError> {
    let gateway = std::env::current_exe()?.with_file_name("fieldgate");
    if gateway.exists() {
        Ok(gateway)
    } else {
        Err(BenchError::NoGateway(gateway))
    }
}

async fn measure(gateway: &Path, site: &Site, seconds: u64) -> Result<Bench, BenchError> {
    let duration = Duration::from_secs(seconds);
    let connections = Settings::default().postgres_writers;
    let (store, bare_way) = match &site.database {
        None => ("SQLite", "bare multi-row insert".to_owned()),
        Some(_) => ("Postgres", format!("bare COPY, {connections} connections")),
    };
    say(&format!("{bare_way}, for {seconds} s"));
    let bare_readings_per_s = match &site.database {
        None => sqlite::bare(&site.dir.join("bare.db"), duration).await?,
        Some(database) => {
            database.make_anew().await?;
            postgres::bare(database.url(), connections, duration).await?
        }
    };
    let burst = Shape {
        devices: DEVICES,
        channels: CHANNELS,
        batch: BATCH,
        interval_us: 1_000_000,
    };
    say(&format!("the gateway under burst for {seconds} s"));
    let burst = through_gateway(gateway, site, burst, Profile::Burst, duration).await?;
    let steady = Shape {
        interval_us: 1_000_000 / u64::from(BATCH),
        devices: DEVICES,
        channels: CHANNELS,
        batch: BATCH,
    };
    say(&format!("the gateway at 1,000 frames/s for {seconds} s"));
    let steady = through_gateway(gateway, site, steady, Profile::Steady, duration).await?;
    let wire = Shape {
        devices: 10,
        channels: 1,
        batch: 60,
        interval_us: 1_000_000,
    };
    say("60 readings of one channel in a frame");
    let wire = through_gateway(gateway, site, wire, Profile::Burst, Duration::from_secs(1)).await?;
    Ok(Bench {
        store,
        bare_way,
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
        let what = "synced commits; 1,000 devices x 4 channels x 15 samples";
        table.set_header([&format!("{}, {what}", self.store), ""]);
        table.add_row([&self.bare_way, &per_s(self.bare_readings_per_s)]);
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
    site: &Site,
    shape: Shape,
    profile: Profile,
    duration: Duration,
) -> Result<Summary, BenchError> {
    let data_dir = site.dir.join("gateway");
    let store = site.new_store(&data_dir).await?;
    let (mut gateway, address) = start(binary, &data_dir, &store).await?;
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
        start_us: now_us - BACKLOG_US,
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
async fn start(
    binary: &Path,
    data_dir: &Path,
    store: &str,
) -> Result<(Child, SocketAddr), BenchError> {
    let mut child = Command::new(binary)
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(data_dir)
        // Not as an argument, which every user of the machine can see: there may be a password in it.
        .env("FIELDGATE_STORE", store)
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
