//! This machine's limit, and how near the gateway comes to it; and what latency, connections and a store
//! that is full do to it.
//!
//! The limit is a loop that does nothing but put the same kind of rows into the same tables, in large
//! synced transactions, on a machine that does nothing else: `sqlite` and `postgres` have one each. The
//! gateway is the real binary (`gateway`) over real sockets, with the fleet (`load`) on the same machine.
//! `cell` says what is sent. What is measured is in `throughput`, `latency`, `secured`, `connections`,
//! `hostile` (with the `peers` that are) and `stored`; `show` makes tables of it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use fieldgate::auth::fleet_key::KeyError;
use fieldgate::store::reader::OpenError;
use fieldgate::store::url::PostgresUrl;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use self::cell::{Cell, SMOKE};
use self::connections::Connections;
use self::gateway::Site;
use self::hostile::Hostile;
use self::latency::Latency;
use self::machine::Machine;
use self::secured::Secured;
use self::stored::Stored;
use self::throughput::Throughput;
use crate::args::{BenchArgs, Section};
use crate::descriptors::{self, TooFew};
use crate::fleet::{FleetError, TlsError};
use crate::plan::PlanError;
use crate::say;

mod bare;
mod cell;
mod connections;
mod gateway;
mod hostile;
mod latency;
mod load;
mod machine;
mod peers;
mod postgres;
mod secured;
mod show;
mod sqlite;
mod stored;
mod throughput;

/// What is not measured: of a gateway from the moment when all devices are there, of a bare loop from its
/// first transaction.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long the burst of `--smoke` is measured.
const SMOKE_BURST: Duration = Duration::from_millis(500);

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The gateway's binary is not there.
    #[error("no gateway at {0}: build it with `cargo build --release`")]
    NoGateway(PathBuf),
    /// The gateway did not start.
    #[error("the gateway did not start; it said: {0}")]
    NotStarted(String),
    /// No TLS to measure.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The gateway did not end when it was told to.
    #[error("the gateway did not leave when it was told to; see what it said above")]
    NotLeft,
    /// Something never came.
    #[error("waited too long for {0}: is the machine busy with other things?")]
    TooLong(&'static str),
    /// The fleet was done before it was measured.
    #[error("the fleet was done too soon: is the machine busy with other things?")]
    TooShort,
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
    /// Too many connections.
    #[error(transparent)]
    Descriptors(#[from] TooFew),
    /// The fleet.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

/// What was measured. Serialized, it is the `--json`; displayed, it is tables.
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

/// How much is measured, and where.
struct Scope<'a> {
    binary: &'a Path,
    site: &'a Site,
    is_quick: bool,
    /// What is measured in bursts.
    cells: Vec<Cell>,
    rounds: u32,
    /// How long each burst and each bare loop is measured.
    burst: Duration,
    latency: Duration,
    connections: u32,
    /// Of them, those that are measured with TLS, too.
    connections_tls: u32,
    /// From frame to frame of a device that sends now and then, and how long that is measured.
    slow_period: Duration,
    slow: Duration,
    /// How long devices are measured beside peers that misbehave.
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
            cells: match args.smoke {
                true => vec![SMOKE],
                false => Cell::all(args.quick),
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

/// Measures in a directory and databases of its own, which are removed afterwards: beside the file that
/// the store's address names, or on its server.
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
    // Told at once, not after a quarter of an hour; and gateways inherit it.
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
            Section::Tls => secured::measure(scope, &mut bench).await?,
            Section::Connections => connections::measure(scope, &mut bench).await?,
            Section::Hostile => hostile::measure(scope, &mut bench).await?,
        }
    }
    if let Some(readings) = stored {
        stored::measure(scope, readings, &mut bench).await?;
    }
    Ok(bench)
}

/// Tells what is measured, and since when the program runs.
fn say(what: &str) {
    static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
    say::note(format_args!("{:4} s: {what}", STARTED.elapsed().as_secs()));
}

/// The middle of what was measured, or the mean of the two in the middle; no number of nothing.
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
