//! The command line: its definition, and one file per subcommand.
//!
//! A setting is a flag of `serve` or a global flag. It has one name, the long name of its flag: `--listen`,
//! `FIELDGATE_LISTEN`, and the key `listen` in the `--config` file. A flag overrides the environment, which
//! overrides the file (see [`settings_file`]). Arguments of the other subcommands can only be given on the
//! command line: a variable left over in a shell must not delete data.
//!
//! Invariants
//! - Results go to stdout, everything else to stderr.
//! - An error is one line, at most two, and names the operation, its object and the remedy.

mod backup;
mod check;
mod device;
mod fleet_key;
mod gateway_http;
mod import;
mod manual;
mod migrate;
mod nearest;
mod output;
#[cfg(test)]
mod plans;
mod program;
mod quarantine;
mod query;
#[cfg(test)]
mod reference;
mod retention;
mod serve;
mod setting_values;
mod settings_file;
mod status;
mod tail;
mod tls;
mod value;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use crate::auth::fleet_key::KeyError;
use crate::config::store_url::without_password;
use crate::config::{Config, ConfigError, Location, Settings};
use crate::net::tls::TlsError;
use crate::store::admin::{OpenError, QueryError};
use crate::store::spool::SpoolError;
use crate::store::{postgres, sqlite};
use crate::sys::service::InheritedSockets;
use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;

use self::fleet_key::FleetKeyFile;
use self::nearest::near;
pub use self::program::main;
use self::setting_values::{SettingValue, setting_values};
use self::settings_file::FileError;

/// Stores sensor readings from field devices in a SQL database, each exactly once.
#[derive(Debug, Parser)]
#[command(name = "fieldgate", version, after_help = PRECEDENCE)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
    /// Every setting of the subcommand.
    #[arg(skip)]
    values: Vec<SettingValue>,
}

/// Prefix of the settings' environment variables.
const ENV_PREFIX: &str = "FIELDGATE_";

/// The subcommands whose flags are settings: the same flags.
const SETTINGS_COMMANDS: [&[&str]; 4] = [
    &["serve"],
    &["doctor"],
    &["retention"],
    &["config", "check"],
];

const PRECEDENCE: &str = "Every global option and every option of serve, --some-name, can also be set with the \
    environment variable FIELDGATE_SOME_NAME or the key some-name in the --config file. Flags override the \
    environment, which overrides the file; an empty variable counts as unset. Sizes and durations accept \
    units (64MiB, 2GB; 500ms, 30s, 5min). RUST_LOG overrides --log-level.";

#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
struct GlobalArgs {
    /// TOML file with settings. Its keys are the long names of the flags; its paths are relative to the
    /// working directory
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    location: Location,

    /// Format of the log lines on stderr. Use json for log collectors
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,

    /// Minimum level of logged events. RUST_LOG overrides it and can set levels per module
    #[arg(long, global = true, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Info)]
    log_level: LogLevel,
}

/// Changes the levels of the log, given as RUST_LOG directives; fails if they are invalid and changes nothing.
type SetLevels = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// What the process was started with, and its log.
struct Process {
    args: Vec<OsString>,
    inherited: InheritedSockets,
    set_levels: SetLevels,
}

impl GlobalArgs {
    fn fleet_key(&self) -> FleetKeyFile<'_> {
        FleetKeyFile {
            data_dir: &self.location.data_dir,
            readers: self.location.secret_readers(),
        }
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

/// Minimum level of logged events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    /// Events that stop the gateway or lose readings.
    Error,
    /// Events that need an operator's attention.
    Warn,
    /// Events of the whole gateway, refusals, and frames put into quarantine.
    Info,
    /// Events of single connections.
    Debug,
    /// All events.
    Trace,
}

impl LogLevel {
    /// Returns the level as RUST_LOG directives. Postgres notices are limited to errors, because the store
    /// reports a Postgres shutdown itself.
    fn directives(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn,sqlx::postgres::notice=error",
            LogLevel::Info => "info,sqlx::postgres::notice=error",
            LogLevel::Debug => "info,fieldgate=debug,sqlx::postgres::notice=error",
            LogLevel::Trace => "info,fieldgate=trace,sqlx::postgres::notice=error",
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway. The first run creates the data directory, the database and the fleet key
    Serve(Box<serve::ServeArgs>),
    /// Check the gateway's settings, files, ports, store and machine, even while it runs, and print a line with ok,
    /// warn or fail for each check. Run it as the gateway's user with the gateway's settings
    Doctor(Box<check::CheckArgs>),
    /// Check the gateway's settings
    #[command(subcommand)]
    Config(check::ConfigCommand),
    /// Run one read-only SQL statement, even while the gateway runs
    Query(query::QueryArgs),
    /// List and manage devices and their keys
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// Show or replace the fleet key of the store
    #[command(subcommand)]
    FleetKey(fleet_key::FleetKeyCommand),
    /// List, show, replay or delete quarantined frames
    #[command(subcommand)]
    Quarantine(quarantine::QuarantineCommand),
    /// Create a private CA and certificates, for tests or closed networks
    #[command(subcommand)]
    Tls(tls::TlsCommand),
    /// Import a CSV file as a device's readings, exactly once, through a running gateway
    Import(Box<import::ImportArgs>),
    /// Create or upgrade the store's schema, then exit. Stop the gateway first
    Migrate,
    /// Show readings as a running gateway commits them
    Tail(tail::TailArgs),
    /// Show a one-screen summary of the running gateway and its store, or of the store alone
    Status(status::StatusArgs),
    /// Copy a SQLite store to FILE, even while the gateway runs. The copy does not contain the fleet key. After a
    /// restore, devices resend the frames that they still hold; other frames since the backup appear in missing_frames
    Backup(backup::BackupArgs),
    /// Show how many rows the retention settings delete from the store, or delete them now. Run it with the gateway's
    /// settings
    Retention(Box<retention::RetentionArgs>),
    /// Print the completion script for a shell
    Completions(manual::CompletionsArgs),
    /// Write a man page for each command into a directory
    Man(manual::ManArgs),
}

/// Reason why the program does not end with success.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// Wrong arguments or environment.
    #[error("{0}")]
    Usage(String),
    /// Output was already printed, such as help or the problems of `config check`. Holds the exit code.
    #[error("")]
    Shown(u8),
    /// Invalid settings file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Invalid settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The fleet key could not be loaded or created.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The TLS files could not be loaded.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The spool could not be opened.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// A query to the store failed.
    #[error("could not query the store: {0}")]
    Store(#[from] QueryError),
    /// The output's reader is gone, or the disk is full.
    #[error("could not write the output: {0}")]
    Output(#[from] io::Error),
    /// Any other failure.
    #[error("{0}")]
    Failed(String),
}

impl From<sqlite::OpenError> for Error {
    fn from(error: sqlite::OpenError) -> Self {
        Error::Open(error.into())
    }
}

impl From<postgres::OpenError> for Error {
    fn from(error: postgres::OpenError) -> Self {
        Error::Open(error.into())
    }
}

impl Error {
    /// Returns the final line for stderr, without a line end; `None` if there is nothing to report.
    pub fn line(&self, format: LogFormat) -> Option<String> {
        let message = self.message()?;
        Some(match format {
            LogFormat::Text => format!("error: {message}"),
            // The format of the log's events, written whatever the log level.
            LogFormat::Json => serde_json::json!({
                "timestamp": Timestamp::now().to_string(),
                "level": "ERROR",
                "fields": {
                    "message": "fieldgate failed",
                    "error": message,
                    "exit_code": self.exit_code(),
                },
                "target": "fieldgate",
            })
            .to_string(),
        })
    }

    /// Returns the message to print; `None` if there is none, or if the reader of the output has gone.
    fn message(&self) -> Option<String> {
        match self {
            Error::Shown(_) => None,
            // `| head` closes the pipe early; that is not an error.
            Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
            error => Some(error.to_string()),
        }
    }

    /// Returns 0 for success, 1 for a failed run, 2 for wrong usage or configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Shown(code) => *code,
            // A name server may answer later.
            Error::Config(ConfigError::Unresolved { .. }) => 1,
            Error::Usage(_) | Error::File(_) | Error::Config(_) => 2,
            Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }
}

/// Returns the log format as far as it can be found before the arguments are parsed. Errors in the arguments are
/// reported in it.
fn log_format(args: &[OsString]) -> LogFormat {
    let flag = args.iter().enumerate().rev().find_map(|(at, arg)| {
        let value = arg.to_str()?.strip_prefix("--log-format")?;
        match value.strip_prefix('=') {
            Some(value) => Some(value.to_owned()),
            None if value.is_empty() => Some(args.get(at + 1)?.to_str()?.to_owned()),
            None => None,
        }
    });
    let value = flag.or_else(|| std::env::var(env_name("log-format")).ok());
    let format = value.map(|value| LogFormat::from_str(&value, false));
    format.and_then(Result::ok).unwrap_or(LogFormat::Text)
}

/// Reads the arguments, the environment and the settings file. Prints help if it is requested.
fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    // Parse once to find the settings file, then again with its values as defaults.
    let matches = match_args(command(), &args)?;
    let matches = match matches.get_one::<PathBuf>("config") {
        None => matches,
        Some(path) => match_args(settings_file::read(path)?.apply(command(), path)?, &args)?,
    };
    let mut cli = Cli::from_arg_matches(&matches).map_err(|error| usage_error(&error, &args))?;
    cli.values = setting_values(&matches);
    Ok(cli)
}

fn match_args(command: clap::Command, args: &[OsString]) -> Result<clap::ArgMatches, Error> {
    command
        .try_get_matches_from(args)
        .map_err(|error| usage_error(&error, args))
}

fn command() -> clap::Command {
    with_environment(Cli::command())
}

/// Adds an environment variable to each setting.
fn with_environment(command: clap::Command) -> clap::Command {
    with_settings(command, as_setting)
}

/// Changes each argument that may be a setting.
fn with_settings(command: clap::Command, change: impl Fn(Arg) -> Arg) -> clap::Command {
    let command = command.mut_args(&change);
    SETTINGS_COMMANDS.iter().fold(command, |command, path| {
        change_within(command, path, &|command| command.mut_args(&change))
    })
}

/// Changes the subcommand at `path`.
fn change_within(
    command: clap::Command,
    path: &[&str],
    change: &dyn Fn(clap::Command) -> clap::Command,
) -> clap::Command {
    match path {
        [] => change(command),
        [name, rest @ ..] => {
            command.mut_subcommand(name, |command| change_within(command, rest, change))
        }
    }
}

fn as_setting(arg: Arg) -> Arg {
    let Some(long) = arg.get_long() else {
        return arg;
    };
    let long = long.to_owned();
    let variable = env_name(&long);
    // Compose files and unit files leave a setting out by setting its variable to an empty string.
    if std::env::var_os(&variable).is_some_and(|value| value.is_empty()) {
        return arg;
    }
    let arg = arg.env(variable).hide_env_values(true);
    match arg.get_action() {
        // People set such variables to 1 as often as to true.
        ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
        _ => arg,
    }
}

/// Returns a line for each environment variable that has the prefix of settings but is not a setting.
fn unknown_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    let command = command();
    let settings: Vec<String> = settings_file::settings(&command)
        .chain(["config"])
        .map(env_name)
        .collect();
    let is_unknown = |name: &String| {
        let of_others = ["TEST_", "SIM_"].iter();
        let is_ours = name
            .strip_prefix(ENV_PREFIX)
            .is_some_and(|name| !of_others.clone().any(|prefix| name.starts_with(prefix)));
        is_ours && !settings.contains(name)
    };
    let with_hint = |name: String| {
        let stripped = |name: &'_ str| name.trim_start_matches(ENV_PREFIX).to_owned();
        let settings: Vec<String> = settings.iter().map(|name| stripped(name)).collect();
        // A longer name with the same beginning is a different setting, not a misspelling.
        let is_alike = |setting: &&str| setting.len().abs_diff(stripped(&name).len()) <= 2;
        let settings = settings.iter().map(String::as_str).filter(is_alike);
        match near(&stripped(&name), settings).first() {
            Some(setting) => format!("{name}; did you mean {ENV_PREFIX}{setting}?"),
            None => name,
        }
    };
    let names = names.filter_map(|name| name.into_string().ok());
    names.filter(is_unknown).map(with_hint).collect()
}

fn env_name(flag: &str) -> String {
    format!("{ENV_PREFIX}{}", flag.to_uppercase().replace('-', "_"))
}

/// Reduces clap's message to at most two lines, without the usage.
fn usage_error(error: &clap::Error, args: &[OsString]) -> Error {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return match error.print() {
            Ok(()) => Error::Shown(error.exit_code() as u8),
            Err(error) => Error::Output(error),
        };
    }
    let rendered = rendered(error);
    let mut paragraphs = rendered
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|paragraph| !paragraph.is_empty() && !paragraph.starts_with("Usage:"));
    let mut message = paragraphs.next().unwrap_or_default();
    if let Some(text) = message.strip_prefix("error: ") {
        message = text.to_owned();
    }
    if let Some(name) = environment_of(error, args) {
        message.push_str(&format!(" (from {name})"));
    }
    if let Some(more) = paragraphs.next() {
        message.push_str(&format!("\n{more}"));
    }
    Error::Usage(message)
}

/// Returns clap's message without passwords. The message quotes the arguments, and a store URL may hold a
/// password even where no store URL belongs.
fn rendered(error: &clap::Error) -> String {
    let mut rendered = error.render().to_string();
    for (_, given) in error.context() {
        if let ContextValue::String(given) = given {
            rendered = rendered.replace(given, &without_password(given));
        }
    }
    rendered
}

/// Returns the environment variable that holds the rejected value, unless the value is an argument.
fn environment_of(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let Some(ContextValue::String(arg)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let flag = arg.strip_prefix("--")?.split(' ').next()?;
    let is_argument = args.iter().any(|arg| {
        let arg = arg.to_string_lossy();
        let given = arg.strip_prefix("--").unwrap_or_default();
        given == flag || given.starts_with(&format!("{flag}="))
    });
    let name = env_name(flag);
    (!is_argument && std::env::var_os(&name).is_some()).then_some(name)
}

impl Cli {
    /// Returns the format of the log.
    fn log_format(&self) -> LogFormat {
        self.global.log_format
    }

    /// Returns the log levels as RUST_LOG directives.
    fn log_levels(&self) -> String {
        match std::env::var("RUST_LOG") {
            Ok(levels) if !levels.is_empty() => levels,
            _ => self.global.log_level.directives().to_owned(),
        }
    }

    /// Runs the subcommand.
    async fn carry_out(self, process: Process) -> Result<(), Error> {
        for variable in unknown_variables(std::env::vars_os().map(|(name, _)| name)) {
            tracing::warn!(%variable, "unknown environment variable ignored");
        }
        let (store, format) = (self.global.location.store(), self.global.log_format);
        match self.command {
            Command::Serve(args) => {
                let start = serve::Start {
                    values: self.values,
                    inherited: process.inherited,
                    format,
                    args: process.args,
                    set_levels: process.set_levels,
                };
                serve::serve(args.settings, self.global.location, start).await
            }
            Command::Config(check::ConfigCommand::Check(args)) => {
                check::check(args.settings, self.global.location, format).await
            }
            Command::Doctor(args) => check::doctor(args.settings, self.global.location).await,
            Command::Query(args) => query::query(&store, &args).await,
            Command::Retention(args) => retention::retention(*args, self.global.location).await,
            Command::Device(command) => {
                device::device(self.global.fleet_key(), &store, &command).await
            }
            Command::FleetKey(command) => {
                fleet_key::fleet_key(self.global.fleet_key(), &store, &command).await
            }
            Command::Quarantine(command) => quarantine::quarantine(&store, &command).await,
            Command::Tls(command) => tls::tls(&self.global.location.data_dir, &command),
            Command::Import(args) => import::import(self.global.fleet_key(), &store, &args).await,
            Command::Migrate => migrate::migrate(&self.global.location.data_dir, &store).await,
            Command::Backup(args) => {
                backup::backup(&self.global.location.data_dir, &store, &args).await
            }
            Command::Completions(args) => manual::completions(&args),
            Command::Man(args) => manual::man(&args),
            Command::Tail(args) => tail::tail(args, self.global.location.secret_readers()).await,
            Command::Status(args) => status::status(&store, &self.global.location, &args).await,
        }
    }
}

/// Returns the settings if they are valid, or the first fault.
fn valid_config(settings: Settings, location: Location) -> Result<Config, Error> {
    Config::new(settings, location).map_err(|faults| {
        let first = faults.into_iter().next();
        first.map_or_else(|| Error::Shown(2), Error::Config)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn only_settings_have_environment_variables() {
        fn flags(command: &clap::Command) -> impl Iterator<Item = (&str, Option<&str>)> {
            command.get_arguments().filter_map(|arg| {
                let variable = arg.get_env().and_then(|name| name.to_str());
                Some((arg.get_long()?, variable))
            })
        }
        fn check_none(command: &clap::Command) {
            for (long, variable) in flags(command) {
                assert_eq!(variable, None, "{}: --{long}", command.get_name());
            }
            command.get_subcommands().for_each(check_none);
        }
        let command = command();
        let with_settings = SETTINGS_COMMANDS.map(|path| {
            let found = path
                .iter()
                .try_fold(&command, |command, name| command.find_subcommand(name));
            found.expect("a subcommand")
        });
        let others = command.get_subcommands().filter(|command| {
            SETTINGS_COMMANDS
                .iter()
                .all(|path| path[0] != command.get_name())
        });
        for (long, variable) in flags(&command).chain(with_settings.into_iter().flat_map(flags)) {
            assert_eq!(variable, Some(env_name(long).as_str()));
        }
        others.for_each(check_none);
        assert_eq!(env_name("allow-plaintext"), "FIELDGATE_ALLOW_PLAINTEXT");
    }

    #[test]
    fn unknown_variables_are_found() {
        let names = [
            "FIELDGATE_LISTEN",
            "FIELDGATE_CONFIG",
            "FIELDGATE_TEST_LOGS",
            "FIELDGATE_LISTN",
            "FIELDGATE_ALL",
            "PATH",
        ];
        let found = unknown_variables(names.iter().map(OsString::from));
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0], "FIELDGATE_LISTN; did you mean FIELDGATE_LISTEN?");
        assert_eq!(found[1], "FIELDGATE_ALL");
    }
}
