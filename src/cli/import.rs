//! `fieldgate import`: sends the readings of a CSV file to the gateway, stored exactly once.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::store_url::StoreUrl;
use crate::import::{History, ImportError, Progress, Target, send};
use crate::recording::{DeviceRows, ReadOptions, Recording};
use clap::Args;

use super::Error;
use super::device::{device_name, keys_of, read_key};
use super::fleet_key::FleetKeyFile;
use super::output::{self, count};
use crate::text::utc_text;

/// Longest device name, in bytes.
const NAME_BYTES_MAX: usize = 32;
/// Interval between progress lines if stderr is not a terminal.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
#[command(
    after_help = "An import can be interrupted at any time: run the same command again to resume; nothing is \
    stored twice. If the file has grown, it counts as a new file, and all of its rows are stored. A gateway with \
    a retention acknowledges rows that are too old, and does not store most of them.\n\n\
    Examples:\n  fieldgate import weather.csv --dry-run\n  fieldgate import weather.csv --device roof-1 \
    --time-zone Europe/Berlin\n  fieldgate import stations.csv --device-column station --columns temp,hum"
)]
pub struct ImportArgs {
    /// CSV file; - for standard input
    file: PathBuf,

    /// Name of the device; with several devices in the file, a prefix of their names [default: the file name].
    /// These devices must not be connected during the import
    #[arg(long, value_name = "NAME", value_parser = device_name)]
    device: Option<String>,

    /// Running gateway to send to, as host:port of its plain TCP listener
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7300")]
    gateway: String,

    /// File with the device's key (64 hexadecimal digits), if the fleet key is not on this machine [default: the
    /// key that `fieldgate device key` prints]
    #[arg(long, value_name = "FILE")]
    device_key_file: Option<PathBuf>,

    /// Read the file, report what would be stored, and store nothing
    #[arg(long)]
    dry_run: bool,

    /// Format of the file.
    #[command(flatten)]
    read: ReadOptions,
}

/// Reads the file and sends the frames that are not stored yet.
pub async fn import(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &ImportArgs,
) -> Result<(), Error> {
    let recording = read(args)?;
    for note in &recording.notes {
        let _ = writeln!(io::stderr(), "{note}");
    }
    let names = names(args, &recording.devices)?;
    if args.dry_run {
        return dry_run(&recording, &names);
    }
    let keys = match &args.device_key_file {
        Some(_) if names.len() > 1 => {
            let what = "--device-key-file holds one device's key, but the file has several devices";
            return Err(Error::Usage(what.to_owned()));
        }
        Some(path) => vec![read_key(path)?],
        None => keys_of(key_file, store, &names).await?,
    };
    let gateway = resolve(&args.gateway).await?;
    let mut out = output::stdout();
    for ((device, name), key) in recording.devices.iter().zip(&names).zip(keys) {
        let target = Target {
            gateway,
            name: name.clone(),
            key: *key.as_bytes(),
        };
        let frames = import_device(&recording, device, &target).await?;
        writeln!(out, "{}", summary(&recording, device, name, &frames))?;
        out.flush()?;
    }
    Ok(())
}

fn read(args: &ImportArgs) -> Result<Recording, Error> {
    let shown = args.file.display();
    let failed =
        |error: &dyn std::fmt::Display| Error::Failed(format!("could not read {shown}: {error}"));
    let input: Box<dyn Read> = match args.file == Path::new("-") {
        true => Box::new(io::stdin()),
        false => Box::new(File::open(&args.file).map_err(|error| failed(&error))?),
    };
    Recording::read(input, &args.read).map_err(|error| failed(&error))
}

/// Number of a device's frames: in total, and stored before this import.
struct Frames {
    all: u64,
    before: u64,
}

async fn import_device(
    recording: &Recording,
    device: &DeviceRows,
    target: &Target,
) -> Result<Frames, Error> {
    let history = History::new(recording, device, &target.name);
    let mut history = history.map_err(|error| Error::Failed(error.to_string()))?;
    let mut line = ProgressLine::new(&target.name, history.frames());
    let sent = send(target, &mut history, |progress| line.show(&progress)).await;
    let before = line.end();
    match sent {
        Ok(()) => Ok(Frames {
            all: history.frames(),
            before,
        }),
        Err(error @ ImportError::Connect { .. }) => Err(Error::Failed(error.to_string())),
        Err(error) => {
            let (stored, all) = (history.durable_seq(), history.frames());
            Err(Error::Failed(format!(
                "{error} ({stored} of {} acknowledged)",
                count(all, "frame")
            )))
        }
    }
}

fn summary(recording: &Recording, device: &DeviceRows, name: &str, frames: &Frames) -> String {
    let rows = count(device.rows.len() as u64, "row");
    let channels = count(recording.channels.len() as u64, "channel");
    let now = frames.all - frames.before;
    match (now, frames.before) {
        (0, _) => format!("{name}: all {rows} of {channels} already acknowledged, nothing to do"),
        (_, 0) => format!(
            "{name}: {rows} of {channels} acknowledged in {}",
            count(now, "frame")
        ),
        (_, before) => format!(
            "{name}: {rows} of {channels} acknowledged in {}, {before} of them earlier",
            count(frames.all, "frame")
        ),
    }
}

fn dry_run(recording: &Recording, names: &[String]) -> Result<(), Error> {
    let mut out = output::stdout();
    for channel in &recording.channels {
        let unit = match channel.unit.as_str() {
            "" => String::new(),
            unit => format!(" [{unit}]"),
        };
        writeln!(
            out,
            "channel {}{unit}, {}",
            channel.name,
            channel.kind.name()
        )?;
    }
    for (name, device) in names.iter().zip(&recording.devices) {
        writeln!(
            out,
            "device {name}: {}",
            count(device.rows.len() as u64, "row")
        )?;
    }
    if let Some((first_us, last_us)) = recording.span_us() {
        writeln!(out, "from {} to {}", utc_text(first_us), utc_text(last_us))?;
    }
    let readings = count(recording.readings(), "value");
    writeln!(
        out,
        "{} with {readings}; nothing was stored",
        count(recording.rows() as u64, "row")
    )?;
    out.flush().map_err(Error::Output)
}

fn names(args: &ImportArgs, devices: &[DeviceRows]) -> Result<Vec<String>, Error> {
    let base = match &args.device {
        Some(name) => name.clone(),
        None => name_of_file(&args.file)?,
    };
    let longest = devices
        .iter()
        .map(|device| device.id.len())
        .max()
        .unwrap_or(0);
    if longest == 0 {
        return Ok(vec![base]);
    }
    let base_max = NAME_BYTES_MAX - 1 - longest;
    if base.len() > base_max && args.device.is_some() {
        return Err(Error::Usage(format!(
            "--device may be at most {base_max} characters long, because the longest id in the file has {longest}"
        )));
    }
    let base = &base[..base.len().min(base_max)];
    Ok(devices
        .iter()
        .map(|device| format!("{base}-{}", device.id))
        .collect())
}

/// Derives a device name from the file name.
fn name_of_file(file: &Path) -> Result<String, Error> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let fits = |char: char| char.is_ascii_alphanumeric() || "._:-".contains(char);
    let name: String = stem
        .chars()
        .map(|char| if fits(char) { char } else { '-' })
        .take(NAME_BYTES_MAX)
        .collect();
    match stem.as_ref() {
        "" | "-" => Err(Error::Usage(
            "the input has no file name; use --device NAME".to_owned(),
        )),
        _ => Ok(name),
    }
}

async fn resolve(gateway: &str) -> Result<SocketAddr, Error> {
    let failed = |reason: String| {
        Error::Failed(format!(
            "could not resolve {gateway}: {reason}; expected host:port"
        ))
    };
    let mut found = tokio::net::lookup_host(gateway)
        .await
        .map_err(|error| failed(error.to_string()))?;
    found
        .next()
        .ok_or_else(|| failed("it does not resolve to any address".to_owned()))
}

/// Shows the progress of an import on stderr: one updating line on a terminal, otherwise an occasional line.
struct ProgressLine<'n> {
    name: &'n str,
    frames: u64,
    is_terminal: bool,
    shown_at: Option<Instant>,
    waiting: Option<String>,
    /// Number of frames stored at login.
    before: Option<u64>,
}

impl<'n> ProgressLine<'n> {
    fn new(name: &'n str, frames: u64) -> ProgressLine<'n> {
        ProgressLine {
            name,
            frames,
            is_terminal: io::stderr().is_terminal(),
            shown_at: None,
            waiting: None,
            before: None,
        }
    }

    fn show(&mut self, progress: &Progress) {
        match progress {
            Progress::Waiting(reason) => {
                if self.waiting.as_ref() != Some(reason) {
                    let _ = writeln!(io::stderr(), "{}: waiting: {reason}", self.name);
                    self.waiting = Some(reason.clone());
                }
            }
            Progress::Stored(through) => {
                self.waiting = None;
                self.before.get_or_insert(*through);
                let every = match self.is_terminal {
                    true => Duration::from_millis(200),
                    false => PROGRESS_EVERY,
                };
                let now = Instant::now();
                let shown_at = *self.shown_at.get_or_insert(now);
                if now.duration_since(shown_at) >= every {
                    self.shown_at = Some(now);
                    self.write(*through);
                }
            }
        }
    }

    fn write(&self, through: u64) {
        let percent = 100 * through / self.frames.max(1);
        let line = format!(
            "{}: {through} of {} frames acknowledged, {percent} %",
            self.name, self.frames
        );
        let _ = match self.is_terminal {
            true => write!(io::stderr(), "\r{line}\x1b[K"),
            false => writeln!(io::stderr(), "{line}"),
        };
    }

    /// Clears the line. Returns the number of frames stored before this import.
    fn end(self) -> u64 {
        if self.is_terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
        self.before.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_derive_from_file_names() {
        let name = |file: &str| name_of_file(Path::new(file)).ok();
        assert_eq!(
            name("data/Water flow (2022).csv").as_deref(),
            Some("Water-flow--2022-")
        );
        assert_eq!(
            name(&format!("{}.csv", "a".repeat(40))),
            Some("a".repeat(32))
        );
        assert_eq!(name("-"), None);
    }
}
