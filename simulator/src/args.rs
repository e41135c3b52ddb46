//! The command line: flags, environment variables, and the plan and options that result from them.
//!
//! Every flag can also be set by an environment variable, `FIELDGATE_SIM_` plus the flag's name, except the flags for
//! the format of a `--replay` file. `--data-dir` and `--store` of `run` and `verify` also read the gateway's own
//! `FIELDGATE_DATA_DIR` and `FIELDGATE_STORE`. An empty variable counts as unset.
//!
//! Ranges are checked here, so that no other module has to handle a fleet without devices. The caller supplies
//! randomness and the time of day, so that tests can choose them.

use crate::catalogue::CHANNELS_MAX;
use crate::faults::{Fault, Faults};
use crate::pace::Pace;
use crate::plan::{self, Clock, Plan, PlanError, Profile, Script};
use crate::replay::ReplayOptions;
use crate::verify::Others;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use fieldgate::config::Location;
use fieldgate::config::store_url::{StoreUrl, StoreUrlError};
use fieldgate::recording::ReadOptions;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

/// Simulates a fleet of field devices and verifies what the gateway stored
#[derive(Debug, Parser)]
#[command(name = "fieldgate-sim", version, max_term_width = 100)]
pub struct Cli {
    /// Subcommand to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Reads the command line and the environment.
///
/// # Errors
/// The arguments are invalid, or clap has help or a version to print.
pub fn parse() -> Result<Cli, clap::Error> {
    let command = with_environment(Cli::command(), |name| std::env::var_os(name));
    Cli::from_arg_matches(&command.try_get_matches()?)
}

/// Selects the environment variables from which flags are read; empty ones are ignored.
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

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Send readings from a simulated fleet and report the results
    Run(Box<RunArgs>),
    /// Verify that every acknowledged reading of a run is stored once and unchanged; the exit code is 0 only then
    Verify(VerifyArgs),
    /// Measure the limit of this machine and how close the gateway comes to it
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

    /// File with the fleet key, from which the device keys are derived [default: fleet.key in the data directory]
    #[arg(long, value_name = "FILE", env = "FIELDGATE_SIM_KEY_FILE")]
    pub key_file: Option<PathBuf>,

    /// Number of devices, 1 to 100000 [default: 10, or the number of devices in the --replay file]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_DEVICES",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(plan::DEVICES_MAX)))]
    pub devices: Option<u32>,

    /// Number of channels per device, 1 to 32
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_CHANNELS", default_value_t = 4,
          value_parser = clap::value_parser!(u8).range(1..=CHANNELS_MAX as i64))]
    pub channels: u8,

    /// Time between two samples of a channel, such as 100ms or 1s, at most 1 day; with
    /// --replay, the time between sending two rows
    #[arg(long, value_name = "DUR", env = "FIELDGATE_SIM_INTERVAL", default_value = "100ms",
          value_parser = interval)]
    pub interval: Duration,

    /// Number of samples per channel and frame, 1 to 1024
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_BATCH", default_value_t = 15,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(plan::BATCH_MAX)))]
    pub batch: u16,

    /// Duration of the run, such as 90s or 2h [default: 30s, unless --frames or --replay ends the run
    /// earlier]
    #[arg(long, value_name = "DUR", env = "FIELDGATE_SIM_DURATION", value_parser = duration)]
    pub duration: Option<Duration>,

    /// Number of frames per device, instead of --duration [default: limited only by the duration]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_FRAMES", conflicts_with = "duration",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub frames: Option<u64>,

    /// Load profile [default: steady; with --replay burst]
    #[arg(
        long,
        value_name = "PROFILE",
        env = "FIELDGATE_SIM_PROFILE",
        value_enum
    )]
    pub profile: Option<Profile>,

    /// Maximum number of unacknowledged frames per device, 1 to 1024
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_WINDOW", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=1_024))]
    pub window: u16,

    /// Seed for all values and faults; the same seed sends the same readings
    /// [default: random, printed at start]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_SEED")]
    pub seed: Option<u64>,

    /// CSV file whose rows each device sends instead of generated readings. The format is detected and
    /// each guess printed; flags override the guesses [default: none]
    #[arg(
        long,
        value_name = "FILE.csv",
        env = "FIELDGATE_SIM_REPLAY",
        conflicts_with = "channels"
    )]
    pub replay: Option<PathBuf>,

    /// Shift the times of --replay so that the last one is now [default: unchanged]
    #[arg(long, env = "FIELDGATE_SIM_SHIFT_TO_NOW", requires = "replay")]
    pub shift_to_now: bool,

    /// Format of the --replay file.
    #[command(flatten)]
    pub read: ReadOptions,

    /// Journal file to create, required by verify [default: none]
    #[arg(long, value_name = "FILE", env = "FIELDGATE_SIM_JOURNAL")]
    pub journal: Option<PathBuf>,

    /// Write the run's statistics to this file as JSON [default: none]
    #[arg(long, value_name = "FILE.json", env = "FIELDGATE_SIM_REPORT")]
    pub report: Option<PathBuf>,

    /// Faults to inject, as NAME or NAME=PROBABILITY per frame, separated by commas, such as
    /// disconnect=0.01,corrupt=0.1%,malformed; names are disconnect, duplicate, corrupt, malformed,
    /// slow, abandon and all [default: none]
    #[arg(long, value_name = "SPEC", env = "FIELDGATE_SIM_FAULTS")]
    pub faults: Option<Faults>,

    /// Prefix of the device names, at most 27 bytes; sim- gives sim-00000, sim-00001
    #[arg(long, value_name = "PREFIX", env = "FIELDGATE_SIM_NAME_PREFIX", default_value = "sim-",
          value_parser = name_prefix)]
    pub name_prefix: String,

    /// Connect through TLS; --gateway must then name the gateway's --tls-listen address [default: no]
    #[arg(long, env = "FIELDGATE_SIM_TLS")]
    pub tls: bool,

    /// PEM file with the CA certificate of the gateway [default: tls/ca.pem in the data directory]
    #[arg(long, value_name = "FILE", env = "FIELDGATE_SIM_CA", requires = "tls")]
    pub ca: Option<PathBuf>,

    /// Directory with NAME.pem and NAME.key for each device, for a gateway that requires client
    /// certificates [default: no client certificates]
    #[arg(
        long,
        value_name = "DIR",
        env = "FIELDGATE_SIM_IDENTITIES",
        requires = "tls"
    )]
    pub identities: Option<PathBuf>,

    /// Clock of the devices
    #[arg(long, value_name = "CLOCK", env = "FIELDGATE_SIM_CLOCK", value_enum,
          default_value_t = Clock::Utc)]
    pub clock: Clock,
}

/// Flags of `verify`.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    /// Journal of the run, written by run --journal. Repeat the option to verify several runs in one
    /// store together
    #[arg(
        long,
        value_name = "FILE",
        env = "FIELDGATE_SIM_JOURNAL",
        required = true
    )]
    pub journal: Vec<PathBuf>,

    /// Other data that the store may contain
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

    /// Store of the gateway: sqlite://PATH or postgres://USER@HOST/DATABASE. Put the password in
    /// PGPASSWORD or ~/.pgpass instead [default: fieldgate.db in the data directory]
    #[arg(long, value_name = "URL", env = "FIELDGATE_SIM_STORE", hide_env_values = true, value_parser = store)]
    pub store: Option<StoreUrl>,
}

impl VerifyArgs {
    /// Returns the URL of the gateway's store.
    pub fn store(&self) -> StoreUrl {
        let location = Location {
            data_dir: self.data_dir.clone(),
            store: self.store.clone(),
            ..Location::default()
        };
        location.store()
    }
}

/// Flags of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Store to measure: sqlite://PATH uses new files next to PATH, because the disk matters;
    /// postgres://USER@HOST/DATABASE uses a new database, which USER must be allowed to create. The files
    /// or the database are removed afterwards
    #[arg(long, value_name = "URL", env = "FIELDGATE_SIM_STORE", hide_env_values = true, value_parser = store,
          default_value = "sqlite://bench.db")]
    pub store: StoreUrl,

    /// Run shorter, less accurate measurements: two to three minutes in total instead of 20
    /// [default: no]
    #[arg(long, env = "FIELDGATE_SIM_QUICK")]
    pub quick: bool,

    /// Run one short burst of a small fleet, only to check that bench works on this machine. The results
    /// are not meaningful [default: no]
    #[arg(long, env = "FIELDGATE_SIM_SMOKE", conflicts_with_all = ["quick", "rounds", "only", "stored"])]
    pub smoke: bool,

    /// Number of rounds, of which the medians are shown; each takes about 2 minutes [default: 5, with --quick 1]
    #[arg(long, value_name = "N", env = "FIELDGATE_SIM_ROUNDS",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,

    /// Measure only these sections, such as tls,hostile; latency also runs throughput, because it is
    /// relative to it [default: all]
    #[arg(
        long,
        value_enum,
        value_name = "SECTIONS",
        value_delimiter = ',',
        env = "FIELDGATE_SIM_ONLY"
    )]
    pub only: Vec<Section>,

    /// Also compare a store that already holds this many readings, such as 100000000, with an empty one;
    /// on SQLite, filling it takes about 4 minutes and 5 GB for a hundred million
    /// [default: not measured]
    #[arg(long, value_name = "ROWS", env = "FIELDGATE_SIM_STORED",
          value_parser = clap::value_parser!(u64).range(1..=100_000_000_000))]
    pub stored: Option<u64>,

    /// Write all results to this file as JSON [default: none]
    #[arg(long, value_name = "FILE.json", env = "FIELDGATE_SIM_JSON")]
    pub json: Option<PathBuf>,
}

/// Section of the measurements of `bench`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Bursts from several fleets, compared with a baseline loop
    Throughput,
    /// ACK latency at fixed rates
    Latency,
    /// Bursts over TLS, compared with plain TCP
    Tls,
    /// Memory and CPU time of many connections
    Connections,
    /// Effect of misbehaving peers on healthy devices
    Hostile,
}

impl Section {
    /// Returns the sections to measure, in order: those in `only` and the ones they need, or all if it is empty.
    pub fn wanted(only: &[Section]) -> Vec<Section> {
        let is_wanted = |section: &&Section| {
            let needs = only.contains(&Section::Latency) && **section == Section::Throughput;
            only.is_empty() || only.contains(section) || needs
        };
        let all = Section::value_variants().iter();
        all.filter(is_wanted).copied().collect()
    }
}

/// Options for carrying out a plan; none of them alters the content of the frames.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Address of the gateway, as host:port.
    pub gateway: String,
    /// Data directory of the gateway, if it is not the default one.
    pub data_dir: Option<PathBuf>,
    /// File with the fleet key.
    pub key_file: PathBuf,
    /// CA certificate of the gateway; `None` without TLS.
    pub ca: Option<PathBuf>,
    /// Directory with the devices' own certificates.
    pub identities: Option<PathBuf>,
    /// Time limit, if the plan itself has no end.
    pub duration: Option<Duration>,
    /// Maximum number of unacknowledged frames per device.
    pub window: u16,
    /// File for the journal.
    pub journal: Option<PathBuf>,
    /// File for the statistics.
    pub report: Option<PathBuf>,
    /// Faults in transit. The plan holds the probability of malformed content.
    pub faults: Faults,
}

const DEVICES_DEFAULT: u32 = 10;
/// Duration of a run that nothing else ends.
pub const DURATION_DEFAULT: Duration = Duration::from_secs(30);

impl RunArgs {
    /// Returns the script of the run. `random` supplies 64 fresh bits each for the nonce and, if none was given,
    /// for the seed; `now_us` is the time in microseconds since 1970.
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

    /// Returns the options for carrying out the plan.
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
    /// Returns the data directory given by --data-dir, or the directory of the key file.
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
    Location::default().data_dir
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
        Ok(_) => Err("must be greater than zero".to_owned()),
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
