//! The simulator's command line: reads the arguments, does what they say, gives the exit code.
//!
//! 0 done, 1 failed, 2 wrong usage or configuration.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::Parser;
use clap::error::{ContextKind, ContextValue};
use fieldgate::keys::{FleetKey, SecretReaders};
use fieldgate::store::url;
use fieldgate_simulator::args::{BenchArgs, Cli, Command, RunArgs, RunOptions, VerifyArgs};
use fieldgate_simulator::bench;
use fieldgate_simulator::fleet::{self, Counters, FleetError, FleetTls, Terms};
use fieldgate_simulator::journal::{Journal, Ledger};
use fieldgate_simulator::plan::Script;
use fieldgate_simulator::progress::{self, Progress};
use fieldgate_simulator::verify;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| without_password(error).exit());
    let carried_out = match cli.command {
        Command::Run(args) => run(&args).await,
        Command::Verify(args) => verify(&args).await,
        Command::Bench(args) => bench(&args).await,
    };
    match carried_out {
        Ok(code) => code,
        Err(Failure { error, code }) => {
            eprintln!("error: {}", with_causes(&error));
            code
        }
    }
}

async fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    let now_us = jiff::Timestamp::now().as_microsecond();
    let script = args
        .script(random().map_err(failure)?, now_us)
        .map_err(configuration)?;
    for note in script.notes() {
        // Without a reader of stderr the run goes on.
        let _ = writeln!(std::io::stderr(), "{note}");
    }
    let options = args.options();
    let terms = terms(&options).await.map_err(configuration)?;
    let journal = match &options.journal {
        Some(path) => Some(Journal::create(path, script.plan()).map_err(configuration)?),
        None => None,
    };
    println!("seed {}", script.plan().seed);
    let script = Arc::new(script);
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    tokio::spawn(stop_when_told(stop.clone()));
    let bar = tokio::spawn(show_progress(
        Arc::clone(&script),
        terms.duration,
        Arc::clone(&counters),
    ));
    let played = fleet::run(script, terms, journal, counters, stop).await;
    bar.abort();
    // Aborted or not, the bar is gone before the report is printed.
    let _ = bar.await;
    let summary = played.map_err(|error| match error {
        FleetError::Connect { .. } | FleetError::Journal(_) => failure(error),
        FleetError::Frames(_) => configuration(error),
        error => failure(error),
    })?;
    println!("{summary}");
    if let Some(path) = &options.report {
        write_report(path, &summary).map_err(failure)?;
    }
    if summary.frames_acked == 0 {
        return Err(failure(anyhow!("no frame was acked")));
    }
    if summary.frames_lost > 0 {
        let lost = summary.frames_lost;
        return Err(failure(anyhow!(
            "the gateway lost {lost} frames that it had acknowledged: was its store put back to an older state?"
        )));
    }
    Ok(ExitCode::SUCCESS)
}

/// The error and what caused it; some tell their cause in their own words already.
fn with_causes(error: &anyhow::Error) -> String {
    let mut told = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}

/// Where and with which key.
async fn terms(options: &RunOptions) -> anyhow::Result<Terms> {
    let fleet_key = *FleetKey::load(&options.key_file, SecretReaders::Owner)?.as_bytes();
    let gateway: SocketAddr = tokio::net::lookup_host(&options.gateway)
        .await
        .with_context(|| format!("cannot look up {}", options.gateway))?
        .next()
        .with_context(|| format!("{} has no address", options.gateway))?;
    let host = options
        .gateway
        .rsplit_once(':')
        .map_or("", |(host, _)| host);
    let tls = match &options.ca {
        Some(ca) => Some(FleetTls::new(host, ca, options.identities.as_deref())?),
        None => None,
    };
    Ok(Terms {
        gateway,
        tls,
        fleet_key,
        duration: options.duration,
        window_frames: u64::from(options.window),
        is_silent: false,
        storm_every: None,
        faults: options.faults.clone(),
    })
}

fn write_report(path: &Path, summary: &impl serde::Serialize) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(summary)?;
    std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// Ctrl-C or SIGTERM: no new frames; those in flight are awaited. A second one leaves at once.
async fn stop_when_told(stop: CancellationToken) {
    let Ok(mut terminate) =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
    else {
        return;
    };
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        if stop.is_cancelled() {
            std::process::exit(1);
        }
        eprintln!("stopping: waiting for the last ACKs; once more to leave at once");
        stop.cancel();
    }
}

/// Moves the bar twice a second: by frames where their number is known, else by time.
async fn show_progress(script: Arc<Script>, duration: Option<Duration>, counters: Arc<Counters>) {
    let started = Instant::now();
    let frames = script.frames();
    let length = match (duration, frames) {
        (Some(duration), _) => duration.as_millis() as u64,
        (None, frames) => frames.unwrap_or(1),
    };
    let progress = BarOnDrop(Progress::new(length));
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    loop {
        tick.tick().await;
        let elapsed = started.elapsed();
        let position = match duration {
            Some(_) => elapsed.as_millis() as u64,
            None => counters.frames_acked.load(Relaxed),
        };
        let rate = progress::rate(counters.readings_acked.load(Relaxed), elapsed);
        let ready = counters.devices_ready.load(Relaxed);
        progress
            .0
            .show(position.min(length), format!("{ready} connected, {rate}"));
    }
}

/// Takes the bar away when its task is ended.
struct BarOnDrop(Progress);

impl Drop for BarOnDrop {
    fn drop(&mut self) {
        self.0.clear();
    }
}

async fn verify(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    let ledgers: Result<Vec<Ledger>, _> =
        args.journal.iter().map(|path| Ledger::read(path)).collect();
    let ledgers = ledgers.map_err(configuration)?;
    if ledgers.iter().any(|ledger| !ledger.complete) {
        eprintln!("a journal has no end: its run was killed; what it says is compared");
    }
    let devices = ledgers
        .iter()
        .map(|ledger| ledger.devices.len() as u64)
        .sum();
    let progress = BarOnDrop(Progress::new(devices));
    let verdict = verify::verify(ledgers, &args.store, args.others, |done| {
        progress.0.show(done, "devices".into())
    })
    .await
    .map_err(|error| match error {
        verify::VerifyError::Read(_) => failure(error),
        error => configuration(error),
    })?;
    drop(progress);
    println!("{verdict}");
    Ok(if verdict.is_equal() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let measured = bench::run(args).await.map_err(failure)?;
    println!("{measured}");
    if let Some(path) = &args.json {
        write_report(path, &measured).map_err(failure)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is refused is shown: the address of a store may hold a password, and be in the wrong place, too.
fn without_password(mut error: clap::Error) -> clap::Error {
    for kind in [ContextKind::InvalidValue, ContextKind::InvalidArg] {
        if let Some(ContextValue::String(value)) = error.get(kind) {
            let shown = ContextValue::String(url::without_password(value));
            error.insert(kind, shown);
        }
    }
    error
}

fn random() -> anyhow::Result<[u64; 2]> {
    let mut random = [0; 2];
    for number in &mut random {
        *number = getrandom::u64().context("the system gives no random numbers")?;
    }
    // 53 bits make a seed that is easier to type, and that any reader of JSON keeps.
    Ok([random[0] >> 11, random[1] >> 11])
}

struct Failure {
    error: anyhow::Error,
    code: ExitCode,
}

fn failure(error: impl Into<anyhow::Error>) -> Failure {
    Failure {
        error: error.into(),
        code: ExitCode::from(1),
    }
}

fn configuration(error: impl Into<anyhow::Error>) -> Failure {
    Failure {
        error: error.into(),
        code: ExitCode::from(2),
    }
}
