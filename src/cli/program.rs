//! The program: arguments, log, runtime, exit code.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use crate::store::postgres;
use crate::sys::log;
use crate::sys::service::InheritedSockets;
use tracing::Metadata;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::{Cli, Error, LogFormat, Process, SetLevels};

/// Maximum wait for a blocked stderr at exit.
const LOG_FLUSH: Duration = Duration::from_secs(1);

/// Maximum wait at exit for abandoned statements to end on the Postgres server.
const END_LEFT_WITHIN: Duration = Duration::from_secs(3);

/// Reads the arguments, starts the log, runs the subcommand, and returns the exit code: 0 for success, 1 for a failed
/// run, 2 for wrong usage or configuration.
pub fn main() -> ExitCode {
    // Before any thread starts.
    let inherited = InheritedSockets::take();
    // Errors in the arguments use the log's writer, too. If its thread cannot start, they are written directly.
    let _ = log::stderr();
    let args: Vec<_> = std::env::args_os().collect();
    // Applies until the arguments are parsed.
    let mut format = super::log_format(&args);
    let done = super::parse(args.clone()).and_then(|cli| {
        format = cli.log_format();
        carry_out(cli, args, inherited)
    });
    let code = match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(line) = error.line(format) {
                log::urgent(&line);
            }
            ExitCode::from(error.exit_code())
        }
    };
    log::flush(LOG_FLUSH);
    code
}

fn carry_out(cli: Cli, args: Vec<OsString>, inherited: InheritedSockets) -> Result<(), Error> {
    let process = Process {
        set_levels: start_log(cli.log_format(), &cli.log_levels())?,
        args,
        inherited,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::Failed(format!("could not start the runtime: {error}")))?;
    let done = runtime.block_on(async {
        let done = cli.carry_out(process).await;
        postgres::end_left(END_LEFT_WITHIN).await;
        done
    });
    // Tasks that still run have no more results to report.
    runtime.shutdown_background();
    done
}

/// Starts logging to stderr; returns how to change the levels. Stdout is reserved for results.
fn start_log(format: LogFormat, levels: &str) -> Result<SetLevels, Error> {
    let filter = EnvFilter::try_new(levels)
        .map_err(|error| Error::Usage(format!("RUST_LOG={levels:?}: {error}")))?;
    let is_colored = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let writer = log::stderr()
        .map_err(|error| Error::Failed(format!("could not start the log: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .log_internal_errors(false)
        .with_ansi(is_colored);
    let set_levels = match format {
        LogFormat::Text => {
            let log = log.with_filter_reloading();
            let set_levels = set_levels(log.reload_handle());
            log.finish().with(filter_fn(is_no_secret)).init();
            set_levels
        }
        LogFormat::Json => {
            let log = log.json().with_filter_reloading();
            let set_levels = set_levels(log.reload_handle());
            log.finish().with(filter_fn(is_no_secret)).init();
            set_levels
        }
    };
    std::panic::set_hook(Box::new(log::log_panic));
    Ok(set_levels)
}

fn set_levels<S: 'static>(filter: reload::Handle<EnvFilter, S>) -> SetLevels {
    Box::new(move |levels| {
        let new = EnvFilter::try_new(levels).map_err(|error| error.to_string())?;
        filter.reload(new).map_err(|error| error.to_string())
    })
}

/// Returns whether an event may be logged. sqlx logs an invalid line of ~/.pgpass as a whole, with the password.
fn is_no_secret(event: &Metadata<'_>) -> bool {
    event.target() != "sqlx_postgres::options::pgpass" || event.fields().field("line").is_none()
}
