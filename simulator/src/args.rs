//! The command line: what may be said, and what it comes to.
//!
//! Every flag can also be given as an environment variable, `FIELDGATE_SIM_` and the flag's name, except those that
//! say how a file of `--replay` is read. `--data-dir` and `--store` of `run` and `verify` follow the gateway's own
//! `FIELDGATE_DATA_DIR` and `FIELDGATE_STORE`, too. An empty variable counts as not set. Ranges are checked here, so
//! that nothing else meets a fleet of no devices. Randomness and the time of day come from the caller, so that tests
//! can decide them.

use crate::catalogue::CHANNELS_MAX;
use crate::faults::{Fault, Faults};
use crate::pace::Pace;
use crate::plan::{self, Clock, Plan, PlanError, Profile, Script};
use crate::replay::ReplayOptions;
use crate::verify::Others;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use fieldgate::config::{self, Settings};
use fieldgate::recording::ReadOptions;
use fieldgate::store::url::{StoreUrl, StoreUrlError};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

/// Plays a fleet of field devices to a Fieldgate gateway, and proves what was stored
#[derive(Debug, Parser)]
#[command(name = "fieldgate-sim", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Reads the command line and the environment.
///
/// # Errors
/// What clap says, or shows.
pub fn parse() -> Result<Cli, clap::Error> {
    let command = with_environment(Cli::command(), |name| std::env::var_os(name));
    Cli::from_arg_matches(&command.try_get_matches()?)
}

/// Decides from which variables flags are read, if they are set to something.
fn with_environment(
    command: clap::Command,
    variable: impl Fn(&str) -> Option<OsString>,
) -> clap::Command {
    let is_set = |name: &str| variable(name).is_some_and(|value| !value.is_empty());
    command.mut_subcommands(|subcommand| {
        let follows = subcommand.get_name() != "bench";
        subcommand.mut_args(|arg| {
            let Some(own) = arg.get_env().and_then(OsStr::to_str).map(str::to_owned) else {
                return arg;
            };
            let gateways = own.replace("FIELDGATE_SIM_", "FIELDGATE_");
            let is_shared = follows && ["data_dir", "store"].contains(&arg.get_id().as_str());
            let arg = if is_set(&own) {
                arg
            } else if is_shared && is_set(&gateways) {
                arg.env(gateways)
            } else if variable(&own).is_some() {
                arg.env(None::<&str>)
            } else {
                arg
            };
            match arg.get_action() {
                // Variables are set to 1 as often as to true.
                ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
                _ => arg,
            }
        })
    })
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Send readings as a fleet of devices, and report how the gateway did
    Run(Box<RunArgs>),
    /// Prove that all readings acked in a run are in the store, once and unchanged; exit 0 only then
    Verify(VerifyArgs),
    /// Measure the limit of this machine, and how near the gateway comes to it
    Bench(BenchArgs),
}

/// Flags of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Gateway to send to, as host:port
    #[arg(long, value_name = "ADDR", env = "FIELDGATE_SIM_GATEWAY", default_value = "127.0.0.1:7300",
          value_parser = address)]
    pub gateway: String,

    /// Data directory of the gateway
    #[arg(long, value_name = "DIR", env = "FIELDGATE_SIM_DATA_DIR", default_value_os_t = data_dir())]
    pub data_dir: PathBuf,

    /// File with the fleet key, from which each device derives its own [default: fleet.key in the data directory]
    #[arg(long, value_name = "FILE", env = "FIELDGATE_SIM_KEY_FILE")]
    pub key_file: Option<PathBuf>,

    /// Number of devices, 1 to 100000 [default: 10; those that a --replay names]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_DEVICES",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(plan::DEVICES_MAX)))]
    pub devices: Option<u32>,

    /// Channels of each device, 1 to 32
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_CHANNELS", default_value_t = 4,
          value_parser = clap::value_parser!(u8).range(1..=CHANNELS_MAX as i64))]
    pub channels: u8,

    /// Time from one sample of a channel to the next, such as 100ms or 1s, at most 1 day; with
    /// --replay, the time from sending one row to the next
    #[arg(long, value_name = "DUR", env = "FIELDGATE_SIM_INTERVAL", default_value = "100ms",
          value_parser = interval)]
    pub interval: Duration,

    /// Samples of each channel per frame, 1 to 1024
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_BATCH", default_value_t = 15,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(plan::BATCH_MAX)))]
    pub batch: u16,

    /// How long to send, such as 90s or 2h [default: 30s, if neither --frames nor --replay ends the
    /// run]
    #[arg(long, value_name = "DUR", env = "FIELDGATE_SIM_DURATION", value_parser = duration)]
    pub duration: Option<Duration>,

    /// Frames that each device sends, instead of --duration [default: as many as the time allows]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_FRAMES", conflicts_with = "duration",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub frames: Option<u64>,

    /// How frames are spread over time [default: steady; with --replay burst]
    #[arg(
        long,
        value_name = "PROFILE",
        env = "FIELDGATE_SIM_PROFILE",
        value_enum
    )]
    pub profile: Option<Profile>,

    /// Frames that a device may have in flight without an ACK, 1 to 1024
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_WINDOW", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=1_024))]
    pub window: u16,

    /// Number from which all values and faults follow; the same seed sends the same readings
    /// [default: random, and printed]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_SEED")]
    pub seed: Option<u64>,

    /// CSV file to send instead of made-up readings, whole, as each device. How it is written is found
    /// out, and each guess reported; flags replace the guesses [default: none]
    #[arg(
        long,
        value_name = "FILE.csv",
        env = "FIELDGATE_SIM_REPLAY",
        conflicts_with = "channels"
    )]
    pub replay: Option<PathBuf>,

    /// Move the times of --replay so that the last one is now [default: sent as they are in the file]
    #[arg(long, env = "FIELDGATE_SIM_SHIFT_TO_NOW", requires = "replay")]
    pub shift_to_now: bool,

    /// How the file of --replay is read.
    #[command(flatten)]
    pub read: ReadOptions,

    /// New file for the record of the run, which verify needs [default: none]
    #[arg(long, value_name = "FILE", env = "FIELDGATE_SIM_JOURNAL")]
    pub journal: Option<PathBuf>,

    /// File for the figures of the run as JSON [default: none]
    #[arg(long, value_name = "FILE.json", env = "FIELDGATE_SIM_REPORT")]
    pub report: Option<PathBuf>,

    /// Faults to make, as name or name=probability per frame, separated by commas, such as
    /// disconnect=0.01,corrupt=0.1%,malformed; names are disconnect, duplicate, corrupt, malformed,
    /// slow, abandon and all [default: none]
    #[arg(long, value_name = "SPEC", env = "FIELDGATE_SIM_FAULTS")]
    pub faults: Option<Faults>,

    /// What the names of the devices begin with, at most 27 bytes; sim- makes sim-00000, sim-00001
    #[arg(long, value_name = "PREFIX", env = "FIELDGATE_SIM_NAME_PREFIX", default_value = "sim-",
          value_parser = name_prefix)]
    pub name_prefix: String,

    /// Go through TLS; --gateway must be the host and port of its --tls-listen then [default: no]
    #[arg(long, env = "FIELDGATE_SIM_TLS")]
    pub tls: bool,

    /// PEM file with what the gateway's certificate leads to [default: tls/ca.pem in the data directory]
    #[arg(long, value_name = "FILE", env = "FIELDGATE_SIM_CA", requires = "tls")]
    pub ca: Option<PathBuf>,

    /// Directory with NAME.pem and NAME.key for each device, for a gateway that asks for certificates
    /// [default: no certificate is shown]
    #[arg(
        long,
        value_name = "DIR",
        env = "FIELDGATE_SIM_IDENTITIES",
        requires = "tls"
    )]
    pub identities: Option<PathBuf>,

    /// Which time the devices know
    #[arg(long, value_name = "CLOCK", env = "FIELDGATE_SIM_CLOCK", value_enum,
          default_value_t = Clock::Utc)]
    pub clock: Clock,
}

/// Flags of `verify`.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    /// Record of the run, as written by run --journal. For several runs into one store, give each journal with
    /// a --journal of its own
    #[arg(
        long,
        value_name = "FILE",
        env = "FIELDGATE_SIM_JOURNAL",
        required = true
    )]
    pub journal: Vec<PathBuf>,

    /// What the store may hold besides the data of these runs
    #[arg(
        long,
        value_name = "WHAT",
        env = "FIELDGATE_SIM_OTHERS",
        value_enum,
        default_value_t = Others::Older
    )]
    pub others: Others,

    /// Data directory of the gateway
    #[arg(long, value_name = "DIR", env = "FIELDGATE_SIM_DATA_DIR", default_value_os_t = data_dir())]
    pub data_dir: PathBuf,

    /// Store of the gateway, as sqlite://PATH or postgres://USER@HOST/DATABASE; a password is better
    /// left to PGPASSWORD or ~/.pgpass [default: fieldgate.db in the data directory]
    #[arg(long, value_name = "URL", env = "FIELDGATE_SIM_STORE", hide_env_values = true, value_parser = store)]
    pub store: Option<StoreUrl>,
}

impl VerifyArgs {
    /// The store of the gateway.
    pub fn store(&self) -> StoreUrl {
        config::store_url(&self.data_dir, self.store.as_ref())
    }
}

/// Flags of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Store to measure: sqlite://PATH, in new files beside PATH, for the disk counts; or
    /// postgres://USER@HOST/DATABASE, in a new database on that server, which USER may create. Both are
    /// removed afterwards
    #[arg(long, value_name = "URL", env = "FIELDGATE_SIM_STORE", hide_env_values = true, value_parser = store,
          default_value = "sqlite://bench.db")]
    pub store: StoreUrl,

    /// Measure less, for a few seconds each, and less exactly: two to three minutes instead of 20 in all
    /// [default: no]
    #[arg(long, env = "FIELDGATE_SIM_QUICK")]
    pub quick: bool,

    /// Measure one burst of a small fleet for a moment, and nothing else: whether bench works here. The figures
    /// say nothing [default: no]
    #[arg(long, env = "FIELDGATE_SIM_SMOKE", conflicts_with_all = ["quick", "rounds", "only", "stored"])]
    pub smoke: bool,

    /// Rounds of which the medians are shown; each takes 2 minutes [default: 5, with --quick 1]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_ROUNDS",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,

    /// Measure these only, such as tls,hostile; latency is told as a share of throughput, and takes that along
    /// [default: all]
    #[arg(
        long,
        value_enum,
        value_name = "SECTIONS",
        value_delimiter = ',',
        env = "FIELDGATE_SIM_ONLY"
    )]
    pub only: Vec<Section>,

    /// Measure also a store that holds so many readings already, such as 100000000, against an empty
    /// one; filling it takes some 4 minutes and 5 GB of disk for a hundred million, on SQLite
    /// [default: not measured]
    #[arg(long, value_name = "ROWS", env = "FIELDGATE_SIM_STORED",
          value_parser = clap::value_parser!(u64).range(1..=100_000_000_000))]
    pub stored: Option<u64>,

    /// File for all figures as JSON [default: none]
    #[arg(long, value_name = "FILE.json", env = "FIELDGATE_SIM_JSON")]
    pub json: Option<PathBuf>,
}

/// What `bench` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Bursts of several fleets, against a bare loop
    Throughput,
    /// What frames wait at fixed rates
    Latency,
    /// Bursts through TLS, against those in plain text
    Tls,
    /// Memory and time that many connections take
    Connections,
    /// What devices feel of peers that misbehave
    Hostile,
}

impl Section {
    /// Those that are measured if these are asked for, in their order: all, if none is.
    pub fn wanted(only: &[Section]) -> Vec<Section> {
        let is_wanted = |section: &&Section| {
            let needs = only.contains(&Section::Latency) && **section == Section::Throughput;
            only.is_empty() || only.contains(section) || needs
        };
        let all = Section::value_variants().iter();
        all.filter(is_wanted).copied().collect()
    }
}

/// How a plan is to be carried out: all that does not alter what the frames hold.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Where the gateway listens, as host:port.
    pub gateway: String,
    /// Data directory of the gateway, where it is not the usual one.
    pub data_dir: Option<PathBuf>,
    /// File with the fleet key.
    pub key_file: PathBuf,
    /// What the gateway's certificate leads to; `None` without TLS.
    pub ca: Option<PathBuf>,
    /// Where the devices' own certificates are.
    pub identities: Option<PathBuf>,
    /// When to stop, if the plan itself does not end.
    pub duration: Option<Duration>,
    /// Most frames of a device in flight.
    pub window: u16,
    /// Where the journal goes.
    pub journal: Option<PathBuf>,
    /// Where the figures go.
    pub report: Option<PathBuf>,
    /// What goes wrong on the way. The plan holds the probability of malformed content.
    pub faults: Faults,
}

/// Devices of a fleet, if nothing says how many.
const DEVICES_DEFAULT: u32 = 10;
/// How long a run lasts that nothing else ends.
pub const DURATION_DEFAULT: Duration = Duration::from_secs(30);

impl RunArgs {
    /// What is to be sent. `random` gives 64 fresh bits each for the seed, if none was given, and for
    /// the nonce; `now_us` is the time in microseconds since 1970.
    pub fn script(&self, random: [u64; 2], now_us: i64) -> Result<Script, PlanError> {
        let mut plan = Plan {
            format: plan::FORMAT,
            seed: self.seed.unwrap_or(random[0]),
            nonce: random[1],
            name_prefix: self.name_prefix.clone(),
            devices: self.devices.unwrap_or(DEVICES_DEFAULT),
            channels: self.channels,
            interval_us: self.interval.as_micros() as u64,
            batch: self.batch,
            frames: self.frames,
            clock: self.clock,
            start_us: now_us,
            profile: self.profile.unwrap_or(match self.replay {
                Some(_) => Profile::Burst,
                None => Profile::Steady,
            }),
            malformed_billionths: self.options().faults.chance(Fault::Malformed).billionths(),
            replay: None,
        };
        plan.start_us = now_us.saturating_sub_unsigned(Pace::new(&plan, 0).backlog_us());
        match &self.replay {
            Some(path) => {
                let options = ReplayOptions {
                    read: self.read.clone(),
                    last_us: self.shift_to_now.then_some(now_us),
                };
                plan.replaying(path, &options, self.devices)
            }
            None => plan.open(),
        }
    }

    /// How it is to be sent.
    pub fn options(&self) -> RunOptions {
        let within =
            |file: &Option<PathBuf>, name| file.clone().unwrap_or_else(|| self.data_dir.join(name));
        let endless = self.frames.is_none() && self.replay.is_none();
        RunOptions {
            gateway: self.gateway.clone(),
            data_dir: self.named_data_dir(),
            key_file: within(&self.key_file, "fleet.key"),
            ca: self.tls.then(|| within(&self.ca, "tls/ca.pem")),
            identities: self.identities.clone(),
            duration: self.duration.or(endless.then_some(DURATION_DEFAULT)),
            window: self.window,
            journal: self.journal.clone(),
            report: self.report.clone(),
            faults: self.faults.clone().unwrap_or_default(),
        }
    }
}

impl RunArgs {
    /// The data directory that was named, or the one in which the key is.
    fn named_data_dir(&self) -> Option<PathBuf> {
        let is_key = |path: &&PathBuf| path.file_name() == Some(OsStr::new("fleet.key"));
        let of_key = self
            .key_file
            .as_ref()
            .filter(is_key)
            .and_then(|path| path.parent());
        let dir = of_key.map_or(self.data_dir.clone(), PathBuf::from);
        (dir != data_dir()).then_some(dir)
    }
}

fn data_dir() -> PathBuf {
    Settings::default().data_dir
}

fn address(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let port: u16 = port.parse().unwrap_or(0);
    // An IPv6 address without brackets would lose its last group to the port.
    let ambiguous = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    match host.is_empty() || port == 0 || ambiguous {
        true => Err("expected host:port, such as 127.0.0.1:7300 or [::1]:7300".to_owned()),
        false => Ok(text.to_owned()),
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    let fits = interval.as_micros() <= u128::from(plan::INTERVAL_US_MAX)
        && interval.subsec_nanos().is_multiple_of(1_000);
    match fits {
        true => Ok(interval),
        false => Err("expected whole microseconds, 1us to 1day".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("must be longer than nothing".to_owned()),
        Err(error) => Err(format!("{error}; expected a time such as 500ms, 30s or 2h")),
    }
}

fn name_prefix(text: &str) -> Result<String, String> {
    match plan::check_name_prefix(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(range) => Err(format!("expected {range}")),
    }
}

fn store(text: &str) -> Result<StoreUrl, String> {
    text.parse()
        .map_err(|error: StoreUrlError| error.to_string())
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
