//! The command line: what can be asked for, and a file for each subcommand that does it.
//!
//! A setting is a flag of `serve` or one that all subcommands have. It has one name, the long name of its flag:
//! `--listen`, `FIELDGATE_LISTEN`, and the key `listen` of the file given by `--config`. A flag wins over the
//! environment, which wins over the file (see [`settings_file`]). What the other subcommands act on, and that
//! they may do so, is said on the command line alone: a variable that is left in a shell must not delete data.
//!
//! Invariants
//! - What was asked for goes to stdout, everything else to stderr.
//! - An error is one line, two at most, and says what failed, on what, and what to do.

mod address;
mod check;
mod device;
mod fleet_key;
mod import;
mod migrate;
mod nearest;
mod output;
#[cfg(test)]
mod plans;
mod quarantine;
mod query;
mod serve;
mod settings_file;
mod statement;
mod status;
mod tls;
mod value;

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use fieldgate::auth::fleet_key::KeyError;
use fieldgate::config::units::Unit;
use fieldgate::config::{self, ConfigError, Settings};
use fieldgate::net::tls::TlsError;
use fieldgate::store::reader::{OpenError, ReadError};
use fieldgate::store::spool::SpoolError;
use fieldgate::store::url::{StoreUrl, without_password};
use fieldgate::store::{postgres, sqlite};
use fieldgate::sys::secret_file::SecretReaders;
use jiff::Timestamp;

use self::fleet_key::FleetKeyFile;
use self::nearest::near;
use self::settings_file::FileError;

/// Takes sensor readings from field devices and puts them into SQL, each exactly once.
#[derive(Debug, Parser)]
#[command(name = "fieldgate", version, after_help = PRECEDENCE)]
pub struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
    /// Settings that differ from their defaults, as they may be shown.
    #[arg(skip)]
    changed: String,
}

/// What the environment variables of settings begin with.
const ENV_PREFIX: &str = "FIELDGATE_";

/// The subcommand whose flags are settings.
const SETTINGS_COMMAND: &str = "serve";
/// Its one flag that says what to do, and so is no setting.
const CHECK_FLAG: &str = "check";

const PRECEDENCE: &str = "Every option --some-name of all subcommands and of serve is also the environment \
    variable FIELDGATE_SOME_NAME and the key some-name of the file given by --config. A flag wins over the \
    environment, which wins over the file; an empty variable counts as not set. Sizes and durations may have \
    units (64MiB, 2GB; 500ms, 30s, 5min). RUST_LOG sets log levels (default: info).";

#[derive(Args, Debug)]
#[command(next_help_heading = "Options of all subcommands")]
struct GlobalArgs {
    /// TOML file with settings; its keys are the long names of the flags. Paths in it are relative
    /// to the working directory
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Directory of the fleet key and the database. Change it to where a service keeps its data,
    /// such as /var/lib/fieldgate
    #[arg(long, global = true, value_name = "DIR", default_value_os_t = Settings::default().data_dir)]
    data_dir: PathBuf,

    /// The database, as sqlite://PATH or postgres://USER@HOST/DATABASE [default: fieldgate.db in the
    /// data directory]. A password is better left to PGPASSWORD or ~/.pgpass
    #[arg(long, global = true, value_name = "URL")]
    store: Option<StoreUrl>,

    /// Take a fleet key and a TLS key that the group of their file may read (mode 0640), if this process
    /// belongs to that group: Kubernetes' fsGroup, Debian's ssl-cert
    #[arg(long, global = true)]
    allow_group_read: bool,

    /// How log lines on stderr are written. Take json if a program reads them
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,

    /// Log events of this level and above. RUST_LOG, if set, decides instead and may name single parts
    #[arg(long, global = true, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Info)]
    log_level: LogLevel,
}

impl GlobalArgs {
    fn store(&self) -> StoreUrl {
        config::store_url(&self.data_dir, self.store.as_ref())
    }

    fn secret_readers(&self) -> SecretReaders {
        match self.allow_group_read {
            true => SecretReaders::Group,
            false => SecretReaders::Owner,
        }
    }

    fn fleet_key(&self) -> FleetKeyFile<'_> {
        FleetKeyFile {
            data_dir: &self.data_dir,
            readers: self.secret_readers(),
        }
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The lowest level that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    /// What ends the gateway or loses readings.
    Error,
    /// What an operator should look at.
    Warn,
    /// What happens to the gateway as a whole.
    Info,
    /// What happens to single connections.
    Debug,
    /// All there is.
    Trace,
}

impl LogLevel {
    /// The same as directives of RUST_LOG. What Postgres says as it goes down, the store says better.
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
    /// Run the gateway; the first run makes the data directory, the database and the fleet key
    Serve(Box<serve::ServeArgs>),
    /// Run one SQL statement that reads, also beside a running gateway
    Query(query::QueryArgs),
    /// Look at devices, and say which may connect and with which keys
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// Look at the fleet key that the store's devices belong to, or give the store another one
    #[command(subcommand)]
    FleetKey(fleet_key::FleetKeyCommand),
    /// Look at frames that arrived whole and could not be understood, and get rid of them
    #[command(subcommand)]
    Quarantine(quarantine::QuarantineCommand),
    /// Make certificates of your own, to try TLS with or for a closed network
    #[command(subcommand)]
    Tls(tls::TlsCommand),
    /// Store the readings of a CSV file as a device's, exactly once, through a running gateway
    Import(Box<import::ImportArgs>),
    /// Create the store's tables or bring them up to date, then exit; the gateway must not run
    Migrate,
    /// Show what is stored, in one screen
    Status,
}

/// Why the program ends other than well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Wrong arguments or environment.
    #[error("{0}")]
    Usage(String),
    /// Something was shown instead of done, help mostly; `0` is the exit code.
    #[error("")]
    Shown(u8),
    /// Wrong settings file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Wrong settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No fleet key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The spool cannot be opened.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The store did not answer.
    #[error("the store does not answer: {0}")]
    Store(#[from] ReadError),
    /// Whoever read the output is gone, or there is no room for it.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// Anything else.
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
    /// Returns what stderr gets at the end of the program, without the line end; `None` if there is nothing to say.
    pub fn line(&self, format: LogFormat) -> Option<String> {
        let message = self.message()?;
        Some(match format {
            LogFormat::Text => format!("error: {message}"),
            // As the log's events are written, whatever levels are logged.
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

    /// What to tell; `None` if there is nobody to be told, or nothing to tell.
    fn message(&self) -> Option<String> {
        match self {
            Error::Shown(_) => None,
            // `| head` has seen enough.
            Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
            error => Some(error.to_string()),
        }
    }

    /// 0 done, 1 the run failed, 2 wrong usage or configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Shown(code) => *code,
            Error::Usage(_) | Error::File(_) | Error::Config(_) => 2,
            Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }
}

/// Returns the log's format as far as it is known before the arguments are understood: for what is wrong with them.
pub fn log_format(args: &[OsString]) -> LogFormat {
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

/// Reads the arguments, the environment and the settings file. Help is shown here.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    // Once to find the file, and again with what is in it as defaults.
    let matches = match_args(command(), &args)?;
    let matches = match matches.get_one::<PathBuf>("config") {
        None => matches,
        Some(path) => match_args(settings_file::read(path)?.apply(command(), path)?, &args)?,
    };
    let mut cli = Cli::from_arg_matches(&matches).map_err(|error| usage_error(&error, &args))?;
    cli.changed = changed_settings(&matches);
    Ok(cli)
}

/// Returns the flags that differ from the program's defaults, wherever their values come from, without passwords.
fn changed_settings(matches: &clap::ArgMatches) -> String {
    let mut command = command();
    command.build();
    let Some((name, matches)) = matches.subcommand() else {
        return String::new();
    };
    let args = command.find_subcommand(name).into_iter();
    let args = args.flat_map(clap::Command::get_arguments);
    let changed = args.filter_map(|arg| {
        let flag = arg.get_long()?;
        let given: Vec<_> = matches.try_get_raw(arg.get_id().as_str()).ok()??.collect();
        let text = |value: &&OsStr| without_password(&value.to_string_lossy());
        let given: Vec<_> = given.iter().map(text).collect();
        let default: Vec<_> = arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy().into_owned())
            .collect();
        (given != default).then(|| format!("{flag}={}", given.join(",")))
    });
    changed.collect::<Vec<_>>().join(" ")
}

fn match_args(command: clap::Command, args: &[OsString]) -> Result<clap::ArgMatches, Error> {
    command
        .try_get_matches_from(args)
        .map_err(|error| usage_error(&error, args))
}

fn command() -> clap::Command {
    with_environment(Cli::command())
}

/// Gives each setting its environment variable, and lets it take units.
fn with_environment(command: clap::Command) -> clap::Command {
    command
        .mut_args(as_setting)
        .mut_subcommand(SETTINGS_COMMAND, |serve| serve.mut_args(as_setting))
}

fn as_setting(arg: Arg) -> Arg {
    let Some(long) = arg.get_long().filter(|long| *long != CHECK_FLAG) else {
        return arg;
    };
    let long = long.to_owned();
    let arg = match Unit::of_setting(&long) {
        Some(unit) => with_unit(arg, unit),
        None => arg,
    };
    let variable = env_name(&long);
    // An empty variable is how compose files and unit files leave a setting out.
    if std::env::var_os(&variable).is_some_and(|value| value.is_empty()) {
        return arg;
    }
    let arg = arg.env(variable).hide_env_values(true);
    match arg.get_action() {
        // Variables are set to 1 as often as to true.
        ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
        _ => arg,
    }
}

/// Replaces the parser of a number by one that takes units, too.
fn with_unit(arg: Arg, unit: Unit) -> Arg {
    let number = arg.get_value_parser().type_id();
    if number == TypeId::of::<u16>() {
        arg.value_parser(move |text: &str| unit.parse::<u16>(text))
    } else if number == TypeId::of::<usize>() {
        arg.value_parser(move |text: &str| unit.parse::<usize>(text))
    } else {
        arg.value_parser(move |text: &str| unit.parse::<u64>(text))
    }
}

/// Returns a line for each environment variable that looks like a setting and is none.
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
        let bare = |name: &'_ str| name.trim_start_matches(ENV_PREFIX).to_owned();
        let settings: Vec<String> = settings.iter().map(|name| bare(name)).collect();
        // A longer name that begins alike is another setting, not a misspelt one.
        let is_alike = |setting: &&str| setting.len().abs_diff(bare(&name).len()) <= 2;
        let settings = settings.iter().map(String::as_str).filter(is_alike);
        match near(&bare(&name), settings).first() {
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

/// Clap's message in two lines at most, without its repetition of the usage.
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

/// Clap's message, which shows what was given: the address of a store may hold a password, and be in the wrong
/// place, too.
fn rendered(error: &clap::Error) -> String {
    let mut rendered = error.render().to_string();
    for (_, given) in error.context() {
        if let ContextValue::String(given) = given {
            rendered = rendered.replace(given, &without_password(given));
        }
    }
    rendered
}

/// The environment variable that a refused value came from, if it was no argument.
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
    /// How to write the log.
    pub fn log_format(&self) -> LogFormat {
        self.global.log_format
    }

    /// What to log, as directives of RUST_LOG.
    pub fn log_levels(&self) -> String {
        match std::env::var("RUST_LOG") {
            Ok(levels) if !levels.is_empty() => levels,
            _ => self.global.log_level.directives().to_owned(),
        }
    }

    /// Does what was asked for.
    pub async fn carry_out(self) -> Result<(), Error> {
        for variable in unknown_variables(std::env::vars_os().map(|(name, _)| name)) {
            tracing::warn!(%variable, "environment variable ignored: it is no setting");
        }
        let (store, format) = (self.global.store(), self.global.log_format);
        match self.command {
            Command::Serve(args) if args.check => {
                check::check(args.into_settings(self.global)?, format).await
            }
            Command::Serve(args) => {
                serve::serve(args.into_settings(self.global)?, &self.changed, format).await
            }
            Command::Query(args) => query::query(&store, &args).await,
            Command::Device(command) => {
                device::device(self.global.fleet_key(), &store, &command).await
            }
            Command::FleetKey(command) => {
                fleet_key::fleet_key(self.global.fleet_key(), &store, &command).await
            }
            Command::Quarantine(command) => quarantine::quarantine(&store, &command).await,
            Command::Tls(command) => tls::tls(&self.global.data_dir, &command),
            Command::Import(args) => import::import(self.global.fleet_key(), &store, &args).await,
            Command::Migrate => migrate::migrate(&self.global.data_dir, &store).await,
            Command::Status => status::status(&store, &self.global.data_dir).await,
        }
    }
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
        let (serve, others): (Vec<_>, Vec<_>) = command
            .get_subcommands()
            .partition(|command| command.get_name() == SETTINGS_COMMAND);
        for (long, variable) in flags(&command).chain(flags(serve[0])) {
            let name = (long != CHECK_FLAG).then(|| env_name(long));
            assert_eq!(variable, name.as_deref());
        }
        others.into_iter().for_each(check_none);
        assert_eq!(env_name("allow-plaintext"), "FIELDGATE_ALLOW_PLAINTEXT");
    }

    #[test]
    fn variables_that_are_no_settings_are_found() {
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
