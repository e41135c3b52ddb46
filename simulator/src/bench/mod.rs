//! Measures the limit of this machine and how close the gateway comes to it; also latency, connections, hostile peers
//! and a full store.
//!
//! The limit is the baseline: a loop that only inserts the same kind of rows into the same tables, in large
//! synced transactions, on an otherwise idle machine; `sqlite` and `postgres` have one each. The
//! gateway is the real binary (`gateway`) over real sockets, with the fleet (`load`) on the same machine.
//! `workload` defines what is sent. The measurements are in `throughput`, `latency`, `tls`, `connections`,
//! `hostile` (with its `peers`) and `prefilled`; `show` formats them as tables.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use fieldgate::auth::fleet_key::KeyError;
use fieldgate::config::store_url::PostgresUrl;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use self::connections::Connections;
use self::gateway::Site;
use self::hostile::Hostile;
use self::latency::Latency;
use self::machine::Machine;
use self::prefilled::Stored;
use self::throughput::Throughput;
use self::tls::Secured;
use self::workload::{SMOKE, Workload};
use crate::args::{BenchArgs, Section};
use crate::descriptors::{self, TooFew};
use crate::fleet::{FleetError, TlsError};
use crate::plan::PlanError;
use crate::say;

mod baseline;
mod connections;
mod gateway;
mod hostile;
mod latency;
mod load;
mod machine;
mod peers;
mod postgres;
mod prefilled;
mod show;
mod sqlite;
mod throughput;
mod tls;
mod workload;

/// Excluded from the measurement: for a gateway, after all devices are connected; for a baseline, after its
/// first transaction.
const WARM_UP: Duration = Duration::from_secs(1);
/// Duration of the measured burst of `--smoke`.
const SMOKE_BURST: Duration = Duration::from_millis(500);

/// The measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The gateway's binary does not exist.
    #[error("no gateway at {0}; build it with `cargo build --release`")]
    NoGateway(PathBuf),
    /// The gateway did not start.
    #[error("gateway did not start: {0}")]
    NotStarted(String),
    /// TLS could not be configured.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The gateway did not exit after SIGTERM.
    #[error("gateway did not exit after SIGTERM; see its output above")]
    NotLeft,
    /// A condition did not become true in time.
    #[error("timed out waiting for {0}: is the machine busy?")]
    TooLong(&'static str),
    /// The fleet finished before it was measured.
    #[error("the fleet finished too early: is the machine busy?")]
    TooShort,
    /// An operation on files or processes failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The tables could not be created.
    #[error("{0}")]
    Migrate(String),
    /// A statement on the store failed.
    #[error("the baseline failed: {0}")]
    Baseline(#[from] sqlx::Error),
    /// The server does not allow creating a database for the measurement.
    #[error(
        "could not create a database on {server}: {reason}; bench needs an existing database to connect to and \
        a user with CREATEDB"
    )]
    Server {
        /// URL of the server.
        server: PostgresUrl,
        /// Error of the server.
        reason: String,
    },
    /// Stopped by Ctrl-C.
    #[error("stopped; temporary files and databases were removed")]
    Stopped,
    /// The fleet key could not be created or loaded.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The limit on open files is too low.
    #[error(transparent)]
    Descriptors(#[from] TooFew),
    /// The plan of the fleet is invalid.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The run of the fleet failed.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

/// Results of the measurements. Serialized, they are the `--json`; displayed, they are tables.
#[derive(Clone, Debug, Serialize)]
pub struct Bench {
    store: &'static str,
    machine: Machine,
    rounds: u32,
    throughput: Vec<Throughput>,
    latency: Vec<Latency>,
    secured: Vec<Secured>,
    connections: Option<Connections>,
    hostile: Vec<Hostile>,
    stored: Option<Stored>,
}

/// Extent and location of the measurements.
struct Scope<'a> {
    binary: &'a Path,
    site: &'a Site,
    is_quick: bool,
    /// Workloads measured in bursts.
    workloads: Vec<Workload>,
    rounds: u32,
    /// Duration of each burst and each baseline run.
    burst: Duration,
    latency: Duration,
    connections: u32,
    /// Number of connections that are also measured with TLS.
    connections_tls: u32,
    /// Time between two frames of a periodically sending device; the next field is the duration of that measurement.
    slow_period: Duration,
    slow: Duration,
    /// Duration of the measurement with each kind of hostile peers.
    hostile: Duration,
}

impl<'a> Scope<'a> {
    fn new(args: &BenchArgs, binary: &'a Path, site: &'a Site) -> Scope<'a> {
        let s = Duration::from_secs;
        let of = |full, quick| if args.quick { quick } else { full };
        Scope {
            binary,
            site,
            is_quick: args.quick,
            workloads: match args.smoke {
                true => vec![SMOKE],
                false => Workload::all(args.quick),
            },
            rounds: args
                .rounds
                .unwrap_or(if args.quick || args.smoke { 1 } else { 5 }),
            burst: match args.smoke {
                true => SMOKE_BURST,
                false => of(s(5), s(2)),
            },
            latency: of(s(15), s(4)),
            connections: match (args.smoke, args.quick) {
                (true, _) => SMOKE.devices,
                (_, true) => 2_000,
                _ => 15_000,
            },
            connections_tls: if args.quick { 1_000 } else { 10_000 },
            slow_period: of(s(15), s(3)),
            slow: of(s(15), s(3)),
            hostile: of(s(10), s(4)),
        }
    }
}

/// Measures in a private directory and private databases, and removes them afterwards. They are next to the file in
/// the store's URL, or on its server.
pub async fn run(args: &BenchArgs) -> Result<Bench, BenchError> {
    let binary = gateway_binary()?;
    let site = Site::make(&args.store)?;
    let scope = Scope::new(args, &binary, &site);
    let sections = match args.smoke {
        true => vec![Section::Throughput],
        false => Section::wanted(&args.only),
    };
    let measured = tokio::select! {
        measured = measure(&scope, &sections, args.stored) => measured,
        stopped = stop_signal() => Err(stopped.map_or_else(BenchError::Io, |()| BenchError::Stopped)),
    };
    // The first failure is the one to report.
    let removed = site.remove().await;
    let measured = measured?;
    removed?;
    Ok(measured)
}

async fn stop_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
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

async fn measure(
    scope: &Scope<'_>,
    sections: &[Section],
    stored: Option<u64>,
) -> Result<Bench, BenchError> {
    // Fail now, not after a quarter of an hour. The gateways inherit the limit.
    descriptors::raise_for(scope.connections)?;
    let mut bench = Bench {
        store: match scope.site.is_postgres() {
            true => "Postgres",
            false => "SQLite",
        },
        machine: Machine::this(&scope.site.dir),
        rounds: scope.rounds,
        throughput: Vec::new(),
        latency: Vec::new(),
        secured: Vec::new(),
        connections: None,
        hostile: Vec::new(),
        stored: None,
    };
    for section in sections {
        match section {
            Section::Throughput => throughput::measure(scope, &mut bench).await?,
            Section::Latency => latency::measure(scope, &mut bench).await?,
            Section::Tls => tls::measure(scope, &mut bench).await?,
            Section::Connections => connections::measure(scope, &mut bench).await?,
            Section::Hostile => hostile::measure(scope, &mut bench).await?,
        }
    }
    if let Some(readings) = stored {
        prefilled::measure(scope, readings, &mut bench).await?;
    }
    Ok(bench)
}

/// Prints the current measurement and the time since the program started.
fn say(what: &str) {
    static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
    say::note(format_args!("{:4} s: {what}", STARTED.elapsed().as_secs()));
}

/// Returns the median, which is the mean of the two middle values if their number is even; NaN for no values.
fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_unstable_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => figures[middle],
        _ => (figures[middle - 1] + figures[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |figures: &[f64]| median(figures.iter().copied());
        assert_eq!(of(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(of(&[4.0, 1.0, 9.0, 2.0]), 3.0);
        assert_eq!(of(&[7.0]), 7.0);
        assert!(of(&[]).is_nan());
    }
}
