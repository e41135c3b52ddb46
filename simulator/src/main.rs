//! Entry point of the simulator: parses the arguments, runs the subcommand, and returns the exit code.
//!
//! Exit codes: 0 success, 1 failure, 2 invalid usage or configuration.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::error::{ContextKind, ContextValue};
use fieldgate::auth::fleet_key::FleetKey;
use fieldgate::config::store_url;
use fieldgate::sys::secret_file::SecretReaders;
use fieldgate_simulator::args::{self, BenchArgs, Command, RunArgs, RunOptions, VerifyArgs};
use fieldgate_simulator::bench;
use fieldgate_simulator::fleet::{self, Counters, FleetError, FleetTls, Played, Terms};
use fieldgate_simulator::journal::{Journal, Ledger};
use fieldgate_simulator::plan::Script;
use fieldgate_simulator::progress::{self, Progress};
use fieldgate_simulator::say;
use fieldgate_simulator::verify;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = args::parse().unwrap_or_else(|error| without_password(error).exit());
    let carried_out = match cli.command {
        Command::Run(args) => run(&args).await,
        Command::Verify(args) => verify(&args).await,
        Command::Bench(args) => bench(&args).await,
    };
    match carried_out {
        Ok(code) => code,
        Err(Failure { error, code }) => {
            say::note(format_args!("error: {}", with_causes(&error)));
            code
        }
    }
}

async fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    let now_us = jiff::Timestamp::now().as_microsecond();
    let script = args
        .script(random().map_err(failure)?, now_us)
        .map_err(configuration)?;
    script.notes().iter().for_each(say::note);
    let options = args.options();
    let leave = CancellationToken::new();
    let terms = terms(&options, leave.clone())
        .await
        .map_err(configuration)?;
    let report = options.report.as_deref().map(ReportFile::open);
    let report = report.transpose().map_err(configuration)?;
    let journal = match &options.journal {
        Some(path) => Some(Journal::create(path, script.plan()).map_err(configuration)?),
        None => None,
    };
    output(format_args!("seed {}", script.plan().seed))?;
    let script = Arc::new(script);
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    tokio::spawn(stop_on_signal(stop.clone(), leave.clone()));
    let bar = tokio::spawn(show_progress(
        Arc::clone(&script),
        terms.duration,
        Arc::clone(&counters),
    ));
    let played = fleet::run(script, terms, journal, Arc::clone(&counters), stop).await;
    bar.abort();
    // Waits until the bar is removed, whether the task was aborted or has finished.
    let _ = bar.await;
    counters.notices(Instant::now()).iter().for_each(say::note);
    let Played { summary, error } = played.map_err(|error| match error {
        FleetError::Frames(_) => configuration(error),
        error => failure(error),
    })?;
    let printed = output(&summary);
    if let Some(report) = report {
        report.write(&summary).map_err(failure)?;
    }
    if let Some(error) = error {
        return Err(failure(error));
    }
    if summary.frames_lost > 0 {
        let lost = summary.frames_lost;
        return Err(failure(anyhow!(
            "the gateway lost {lost} acknowledged frames; was its store restored to an earlier state?"
        )));
    }
    if summary.frames_acked == 0 {
        return Err(failure(anyhow!("no frame was acknowledged")));
    }
    if leave.is_cancelled() {
        return Err(failure(anyhow!("stopped before the last ACKs")));
    }
    printed?;
    output(next_steps(&options))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the commands to run next, ready to copy.
fn next_steps(options: &RunOptions) -> String {
    let data_dir = match &options.data_dir {
        Some(dir) => format!(" --data-dir {}", quoted(&dir.display().to_string())),
        None => String::new(),
    };
    let proof = match &options.journal {
        Some(journal) => {
            let journal = quoted(&journal.display().to_string());
            format!("fieldgate-sim verify{data_dir} --journal {journal}")
        }
        None => "run again with --journal FILE to be able to verify".to_owned(),
    };
    format!(
        "verify what is stored: {proof}\n\
        query the readings:    fieldgate query{data_dir} \"SELECT device, channel, value FROM latest LIMIT 10\""
    )
}

/// Quotes an argument for a shell, if needed.
fn quoted(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:,@".contains(&byte);
    match !text.is_empty() && text.bytes().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// Writes the command's output to stdout.
fn output(text: impl std::fmt::Display) -> Result<(), Failure> {
    say::out(text).map_err(|error| failure(anyhow!("could not write the output: {error}")))
}

/// Returns the error with its causes, leaving out causes that its text already contains.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Returns the terms of the run: the gateway's address, TLS, the fleet key and limits.
async fn terms(options: &RunOptions, leave: CancellationToken) -> anyhow::Result<Terms> {
    let fleet_key = *FleetKey::load(&options.key_file, SecretReaders::Owner)?.as_bytes();
    let gateway: SocketAddr = tokio::net::lookup_host(&options.gateway)
        .await
        .with_context(|| format!("could not resolve {}", options.gateway))?
        .next()
        .with_context(|| format!("{} does not resolve to any address", options.gateway))?;
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
        leave,
    })
}

/// A file for results, opened before the run so that an unwritable path is reported immediately.
struct ReportFile {
    file: File,
    path: PathBuf,
}

impl ReportFile {
    fn open(path: &Path) -> anyhow::Result<ReportFile> {
        // Keep the old content until there are new results.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = file.with_context(|| format!("could not write {}", path.display()))?;
        Ok(ReportFile {
            file,
            path: path.to_owned(),
        })
    }

    fn write(mut self, figures: &impl serde::Serialize) -> anyhow::Result<()> {
        let json = serde_json::to_string_pretty(figures)? + "\n";
        // A pipe cannot be truncated.
        let is_file = self
            .file
            .metadata()
            .is_ok_and(|metadata| metadata.is_file());
        let emptied = if is_file {
            self.file.set_len(0)
        } else {
            Ok(())
        };
        let written = emptied.and_then(|()| self.file.write_all(json.as_bytes()));
        written.with_context(|| format!("could not write {}", self.path.display()))
    }
}

/// Handles Ctrl-C and SIGTERM. The first one stops new frames and waits for those in flight, the second stops
/// waiting, and the third exits the process.
async fn stop_on_signal(stop: CancellationToken, leave: CancellationToken) {
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
        if leave.is_cancelled() {
            std::process::exit(1);
        } else if stop.is_cancelled() {
            leave.cancel();
        } else {
            let settle_s = fleet::SETTLE.as_secs();
            say::note(format_args!(
                "stopping: waiting up to {settle_s} s for the last ACKs; press Ctrl-C again to stop now"
            ));
            stop.cancel();
        }
    }
}

/// Updates the bar twice a second: by frames if their number is known, otherwise by time.
async fn show_progress(script: Arc<Script>, duration: Option<Duration>, counters: Arc<Counters>) {
    let started = Instant::now();
    let frames = script.frames();
    let length = match (duration, frames) {
        (Some(duration), _) => duration.as_millis() as u64,
        (None, frames) => frames.unwrap_or(1),
    };
    let devices = script.plan().devices;
    let mut progress = Progress::new(length);
    let mut stall = Stall::default();
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    loop {
        tick.tick().await;
        let elapsed = started.elapsed();
        for line in counters.notices(Instant::now()) {
            progress.say(&line);
        }
        let acked = counters.frames_acked.load(Relaxed);
        let in_flight = counters.frames_sent.load(Relaxed).saturating_sub(acked);
        let ready = counters.devices_ready.load(Relaxed);
        if let Some(for_s) = stall.look(acked, in_flight, elapsed) {
            progress.say(&format!(
                "waiting: no ACK for {for_s} s, {in_flight} frames in flight, {ready} of {devices} \
                devices connected"
            ));
        }
        let position = match duration {
            Some(_) => elapsed.as_millis() as u64,
            None => acked,
        };
        let readings = counters.readings_acked.load(Relaxed);
        let rate = progress::rate(readings, elapsed);
        let words =
            format!("{ready} of {devices} devices connected, {readings} readings stored, {rate}");
        progress.show(position.min(length), words);
    }
}

/// Detects that ACKs have stopped arriving.
#[derive(Default)]
struct Stall {
    acked: u64,
    since: Duration,
    next: Duration,
}

impl Stall {
    /// While frames are in flight, returns every few seconds for how long nothing was acknowledged.
    fn look(&mut self, acked: u64, in_flight: u64, elapsed: Duration) -> Option<u64> {
        const PATIENCE: Duration = Duration::from_secs(5);
        if acked != self.acked || in_flight == 0 {
            (self.acked, self.since, self.next) = (acked, elapsed, elapsed + PATIENCE);
            return None;
        }
        (elapsed >= self.next).then(|| {
            self.next = elapsed + PATIENCE;
            (elapsed - self.since).as_secs()
        })
    }
}

async fn verify(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    let ledgers: Result<Vec<Ledger>, _> =
        args.journal.iter().map(|path| Ledger::read(path)).collect();
    let ledgers = ledgers.map_err(configuration)?;
    if ledgers.iter().any(|ledger| !ledger.complete) {
        say::note("a journal is incomplete because its run was killed; verifying what it contains");
    }
    let devices = ledgers
        .iter()
        .map(|ledger| ledger.devices.len() as u64)
        .sum();
    let mut progress = Progress::new(devices);
    let verdict = verify::verify(ledgers, &args.store(), args.others, |done| {
        progress.show(done, format!("{done} of {devices} devices compared"))
    })
    .await
    .map_err(|error| match error {
        verify::VerifyError::Read(_) => failure(error),
        error => configuration(error),
    })?;
    drop(progress);
    output(&verdict)?;
    Ok(if verdict.is_equal() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let report = args.json.as_deref().map(ReportFile::open);
    let report = report.transpose().map_err(configuration)?;
    let measured = bench::run(args).await.map_err(failure)?;
    output(&measured)?;
    if let Some(report) = report {
        report.write(&measured).map_err(failure)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes passwords from the values that clap shows: a store URL may contain one, even in the wrong argument.
fn without_password(mut error: clap::Error) -> clap::Error {
    for kind in [ContextKind::InvalidValue, ContextKind::InvalidArg] {
        if let Some(ContextValue::String(value)) = error.get(kind) {
            let shown = ContextValue::String(store_url::without_password(value));
            error.insert(kind, shown);
        }
    }
    error
}

fn random() -> anyhow::Result<[u64; 2]> {
    let mut random = [0; 2];
    for number in &mut random {
        *number = getrandom::u64().context("could not get random numbers from the system")?;
    }
    // A seed of 53 bits is easier to type, and every JSON parser reads it exactly.
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
