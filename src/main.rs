//! The gateway's command line: reads the arguments, starts the log, does what they say, gives the
//! exit code. 0 done, 1 the run failed, 2 wrong usage or configuration.

mod cli;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use fieldgate::store::postgres;
use fieldgate::sys::log;
use tracing::Metadata;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{Cli, Error, LogFormat};

/// How long the end waits for a stderr that takes no lines.
const LOG_FLUSH: Duration = Duration::from_secs(1);

/// How long the end may wait for statements that were given up to end at the server.
const END_LEFT_WITHIN: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    // What is wrong with the arguments goes the same way; without a thread it is written at once.
    let _ = log::stderr();
    let args: Vec<_> = std::env::args_os().collect();
    // Until the arguments are understood.
    let mut format = cli::log_format(&args);
    let done = cli::parse(args).and_then(|cli| {
        format = cli.log_format();
        carry_out(cli)
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

fn carry_out(cli: Cli) -> Result<(), Error> {
    start_log(cli.log_format(), &cli.log_levels())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::Failed(format!("cannot start the runtime: {error}")))?;
    let done = runtime.block_on(async {
        let done = cli.carry_out().await;
        postgres::end_left(END_LEFT_WITHIN).await;
        done
    });
    // Whatever still runs has nothing to say any more.
    runtime.shutdown_background();
    done
}

/// Logs go to stderr; stdout is for what was asked for.
fn start_log(format: LogFormat, levels: &str) -> Result<(), Error> {
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
    match format {
        LogFormat::Text => log.finish().with(filter_fn(is_no_secret)).init(),
        LogFormat::Json => log.json().finish().with(filter_fn(is_no_secret)).init(),
    }
    std::panic::set_hook(Box::new(log::log_panic));
    Ok(())
}

/// A line of ~/.pgpass that cannot be understood would be logged whole, with the password in it.
fn is_no_secret(what: &Metadata<'_>) -> bool {
    what.target() != "sqlx_postgres::options::pgpass" || what.fields().field("line").is_none()
}
