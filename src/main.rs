//! The gateway's command line: reads the arguments, starts the log, does what they say, gives the
//! exit code. 0 done, 1 the run failed, 2 wrong usage or configuration.

mod cli;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use fieldgate::store::postgres;
use tracing::Metadata;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{Cli, Error, LogFormat};

/// What Postgres says as it goes down, the store says better.
const LEVELS: &str = "info,sqlx::postgres::notice=error";

/// How long the end may wait for statements that were given up to end at the server.
const END_LEFT_WITHIN: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let done = cli::parse(std::env::args_os()).and_then(carry_out);
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    if let Some(message) = error.message() {
        // There is nobody left to tell if this fails.
        let _ = writeln!(io::stderr(), "error: {message}");
    }
    ExitCode::from(error.exit_code())
}

fn carry_out(cli: Cli) -> Result<(), Error> {
    start_log(cli.log_format())?;
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
fn start_log(format: LogFormat) -> Result<(), Error> {
    let levels = match std::env::var("RUST_LOG") {
        Ok(levels) if !levels.is_empty() => levels,
        _ => LEVELS.to_owned(),
    };
    let filter = EnvFilter::try_new(&levels)
        .map_err(|error| Error::Usage(format!("RUST_LOG={levels:?}: {error}")))?;
    let is_colored = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(is_colored);
    match format {
        LogFormat::Text => log.finish().with(filter_fn(is_no_secret)).init(),
        LogFormat::Json => log.json().finish().with(filter_fn(is_no_secret)).init(),
    }
    Ok(())
}

/// A line of ~/.pgpass that cannot be understood would be logged whole, with the password in it.
fn is_no_secret(what: &Metadata<'_>) -> bool {
    what.target() != "sqlx_postgres::options::pgpass" || what.fields().field("line").is_none()
}
