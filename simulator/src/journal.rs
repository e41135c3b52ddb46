//! Journal of a run: its plan, and the progress of each device.
//!
//! The file is JSON Lines, written and flushed at most once a second. The first line holds the plan, each following
//! line the changes since the line before, and the last line states that the run ended normally. A killed run leaves
//! a shorter journal that is as correct as a complete one. The verifier compares the journal with a store.
//!
//! Invariants: everything that a journal calls acked was acknowledged (it may lack later ACKs); acked never exceeds
//! sent, and neither decreases. Lines hold increments, and devices that advanced by the same numbers share an entry,
//! so the size grows with the duration of a run and hardly with the readings. The totals on each line reveal a
//! missing line. Logins, damaged frames and frames that the gateway lost are listed individually:
//! [`verify`](crate::verify) compares the store's times, addresses and quarantined bytes with them. A last line
//! without its line break was torn by a crash and is ignored; anything else out of order is an error.

use crate::plan::{self, Plan};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Version of the line format.
pub const FORMAT: u32 = 2;
/// Minimum interval between two lines, in microseconds.
pub const TICK_US: u64 = 1_000_000;

/// A journal could not be written or is invalid.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file exists, and evidence must not be overwritten.
    #[error("{path} already exists; remove it or choose another journal", path = .0.display())]
    Exists(PathBuf),
    /// The file could not be opened or read.
    #[error("{path}: {cause}", path = path.display())]
    Read {
        /// File of the journal.
        path: PathBuf,
        /// Error of the system.
        cause: io::Error,
    },
    /// A line could not be written.
    #[error("could not write the journal: {cause}")]
    Write {
        /// Error of the system.
        cause: io::Error,
    },
    /// The fleet reported an impossible event.
    #[error("device {device}: {reason}")]
    Progress {
        /// Index of the device.
        device: u32,
        /// Description of the event.
        reason: String,
    },
    /// The first line does not belong to a journal that this program can read.
    #[error("could not read journal {path}: {reason}", path = path.display())]
    Foreign {
        /// File of the journal.
        path: PathBuf,
        /// Description of the problem.
        reason: String,
    },
    /// A line after the first is invalid.
    #[error("{path}, line {line}: {reason}", path = path.display())]
    Line {
        /// File of the journal.
        path: PathBuf,
        /// Line number, counted from 1.
        line: u64,
        /// Description of the problem.
        reason: String,
    },
}

impl From<io::Error> for JournalError {
    fn from(cause: io::Error) -> Self {
        Self::Write { cause }
    }
}

/// Writes a journal. Holds 32 bytes per device.
#[derive(Debug)]
pub struct Journal<W> {
    out: W,
    devices: Vec<Progress>,
    /// Devices that advanced since the last line, each once.
    moved: Vec<u32>,
    /// Other events since the last line.
    notes: Notes,
    /// Offset of the gateway's clock from the fleet's; `None` before the first WELCOME.
    clock_us: Option<ClockBounds>,
    totals: Totals,
    next_tick_us: u64,
}

/// Offset of one clock from another, from several measurements, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ClockBounds {
    /// Union of the measured ranges.
    all: (i64, i64),
    /// Intersection of the measured ranges; reversed if one of the clocks stepped.
    common: (i64, i64),
}

impl ClockBounds {
    fn add(&mut self, least_us: i64, most_us: i64) {
        self.all = (self.all.0.min(least_us), self.all.1.max(most_us));
        self.common = (self.common.0.max(least_us), self.common.1.min(most_us));
    }

    fn bounds(self) -> (i64, i64) {
        match self.common.0 <= self.common.1 {
            true => self.common,
            false => self.all,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    sent: u64,
    acked: u64,
    written_sent: u64,
    written_acked: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    sent: u64,
    acked: u64,
}

impl Journal<BufWriter<File>> {
    /// Creates a journal in a new file.
    pub fn create(path: &Path, plan: &Plan) -> Result<Self, JournalError> {
        let file = File::create_new(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::AlreadyExists => JournalError::Exists(path.into()),
            _ => JournalError::Read {
                path: path.into(),
                cause,
            },
        })?;
        Self::begin(BufWriter::new(file), plan)
    }
}

impl<W: Write> Journal<W> {
    /// Creates a journal and writes the plan to it.
    pub fn begin(mut out: W, plan: &Plan) -> Result<Self, JournalError> {
        let program = format!("fieldgate-sim {}", env!("CARGO_PKG_VERSION"));
        write_line(
            &mut out,
            &Header {
                journal: FORMAT,
                program,
                plan: plan.clone(),
            },
        )?;
        Ok(Self {
            out,
            devices: vec![Progress::default(); plan.devices as usize],
            moved: Vec::new(),
            notes: Notes::default(),
            clock_us: None,
            totals: Totals::default(),
            next_tick_us: 0,
        })
    }

    /// Records the start of the run, on the fleet's clock in microseconds since 1970.
    pub fn started(&mut self, utc_us: i64) {
        self.notes.started_us = Some(utc_us);
    }

    /// Records a connection on which the device proved its key.
    pub fn login(&mut self, device: u32, login: Login) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.logins.push((device, login));
        Ok(())
    }

    /// Records that the gateway's clock was ahead of the fleet's by `least_us` to `most_us`.
    pub fn clock(&mut self, least_us: i64, most_us: i64) {
        let known = self.clock_us;
        let clock = self.clock_us.get_or_insert(ClockBounds {
            all: (least_us, most_us),
            common: (least_us, most_us),
        });
        clock.add(least_us, most_us);
        if known != Some(*clock) {
            self.notes.clock_us = Some(clock.bounds());
        }
    }

    /// Records that a frame is sent with one bit of its payload flipped, counted from the payload's first byte.
    pub fn damaged(&mut self, device: u32, seq: u64, bit: u32) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.damaged.push((device, seq, bit));
        Ok(())
    }

    /// Records that a device has sent frames up to `seq`. A lower `seq`, of a resent frame, changes nothing.
    /// Call this before sending the frame, because its ACK may follow immediately.
    pub fn sent(&mut self, device: u32, seq: u64) -> Result<(), JournalError> {
        let known = self.progress(device)?.sent;
        self.advance(device, |progress| progress.sent = known.max(seq));
        Ok(())
    }

    /// Records that the gateway acknowledged the frames of a device up to `seq`.
    pub fn acked(&mut self, device: u32, seq: u64) -> Result<(), JournalError> {
        let known = self.progress(device)?;
        let reason = if seq > known.sent {
            format!(
                "frame {seq} is acknowledged, but the last sent frame is {}",
                known.sent
            )
        } else if seq < known.acked {
            format!(
                "frame {seq} is acknowledged out of order, after frame {}",
                known.acked
            )
        } else {
            self.advance(device, |progress| progress.acked = seq);
            return Ok(());
        };
        Err(JournalError::Progress { device, reason })
    }

    /// Records that the gateway lost the frames `first` to `last` after acknowledging them.
    pub fn lost(&mut self, device: u32, first: u64, last: u64) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.lost.push((device, first, last));
        Ok(())
    }

    /// Records that the gateway quarantined a frame, with the code of its NACK.
    pub fn quarantined(&mut self, device: u32, seq: u64, code: u8) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.quarantined.push((device, seq, code));
        Ok(())
    }

    /// Writes and flushes the changes if a second has passed since the last line; returns whether it did.
    /// `elapsed_us` is the time since the run began.
    pub fn tick(&mut self, elapsed_us: u64) -> Result<bool, JournalError> {
        if elapsed_us < self.next_tick_us || (self.moved.is_empty() && self.notes.is_empty()) {
            return Ok(false);
        }
        self.next_tick_us = elapsed_us.saturating_add(TICK_US);
        self.write(elapsed_us, None)?;
        Ok(true)
    }

    /// Writes the remaining changes and the line that ends the run.
    pub fn complete(mut self, elapsed_us: u64) -> Result<W, JournalError> {
        self.write(elapsed_us, Some(true))?;
        Ok(self.out)
    }

    fn progress(&self, device: u32) -> Result<Progress, JournalError> {
        self.devices
            .get(device as usize)
            .copied()
            .ok_or_else(|| JournalError::Progress {
                device,
                reason: "no such device in the plan".to_owned(),
            })
    }

    fn advance(&mut self, device: u32, by: impl Fn(&mut Progress)) {
        let progress = &mut self.devices[device as usize];
        let was_still = progress.is_written();
        by(progress);
        if was_still && !progress.is_written() {
            self.moved.push(device);
        }
    }

    fn write(&mut self, elapsed_us: u64, complete: Option<bool>) -> Result<(), JournalError> {
        let mut alike: BTreeMap<(u64, u64), Vec<u32>> = BTreeMap::new();
        self.moved.sort_unstable();
        for &device in &self.moved {
            let progress = &mut self.devices[device as usize];
            let sent = progress.sent - progress.written_sent;
            let acked = progress.acked - progress.written_acked;
            (progress.written_sent, progress.written_acked) = (progress.sent, progress.acked);
            self.totals.sent += sent;
            self.totals.acked += acked;
            alike.entry((sent, acked)).or_default().push(device);
        }
        self.moved.clear();
        let moved = alike.into_iter().map(|((sent, acked), devices)| Moved {
            sent: sent as i64,
            acked: acked as i64,
            devices: ranges(&devices),
        });
        let line = Line {
            complete,
            elapsed_ms: elapsed_us / 1_000,
            sent_total: self.totals.sent,
            acked_total: self.totals.acked,
            moved: moved.collect(),
            notes: std::mem::take(&mut self.notes),
        };
        write_line(&mut self.out, &line)
    }
}

impl Progress {
    fn is_written(&self) -> bool {
        self.sent == self.written_sent && self.acked == self.written_acked
    }
}

/// Final state of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    /// Plan of the run.
    pub plan: Plan,
    /// Program that wrote it, with its version.
    pub program: String,
    /// Progress of each device, in the order of their indices.
    pub devices: Vec<DeviceLedger>,
    /// Start of the run, on the fleet's clock in microseconds since 1970; `None` if it never started.
    pub started_us: Option<i64>,
    /// The least and the most by which the gateway's clock was ahead of the fleet's; `None` if no device was ever
    /// welcomed.
    pub clock_us: Option<(i64, i64)>,
    /// Whether the run ended normally.
    pub complete: bool,
    /// Time of the last line, in milliseconds since the run began.
    pub elapsed_ms: u64,
    /// Whether the last line was torn and therefore ignored.
    pub torn: bool,
}

/// Progress of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceLedger {
    /// The last frame that was sent, or 0. If the simulator crashed, it may have sent up to a second's worth of
    /// frames more.
    pub sent: u64,
    /// The last frame up to which the gateway acknowledged all, or 0.
    pub acked: u64,
    /// Frames that the gateway quarantined, with their NACK codes.
    pub quarantined: Vec<(u64, u8)>,
    /// Connections on which the device proved its key.
    pub logins: Vec<Login>,
    /// Frames sent with one bit of the payload flipped: sequence number and bit.
    pub damaged: Vec<(u64, u32)>,
    /// First and last frames of ranges that were acknowledged but not durable at a later WELCOME.
    pub lost: Vec<(u64, u64)>,
}

/// A connection on which a device proved its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// Time from HELLO to WELCOME, or to the end of the connection, in microseconds.
    pub took_us: u64,
    /// Address of the device's end of the connection.
    pub from: SocketAddr,
    /// Whether the gateway sent WELCOME.
    pub welcomed: bool,
}

impl Ledger {
    /// Reads a journal line by line and accumulates its state.
    pub fn read(path: &Path) -> Result<Self, JournalError> {
        let failed = |cause| JournalError::Read {
            path: path.into(),
            cause,
        };
        let mut input = BufReader::new(File::open(path).map_err(failed)?);
        let mut bytes = Vec::new();
        input.read_until(b'\n', &mut bytes).map_err(failed)?;
        let header = parse_header(&bytes).map_err(|reason| JournalError::Foreign {
            path: path.into(),
            reason,
        })?;
        let mut ledger = Self {
            devices: vec![DeviceLedger::default(); header.plan.devices as usize],
            plan: header.plan,
            program: header.program,
            started_us: None,
            clock_us: None,
            complete: false,
            elapsed_ms: 0,
            torn: false,
        };
        let mut totals = Totals::default();
        for line in 2.. {
            bytes.clear();
            input.read_until(b'\n', &mut bytes).map_err(failed)?;
            if bytes.last() != Some(&b'\n') {
                ledger.torn = !bytes.is_empty();
                break;
            }
            let folded = ledger.fold(&bytes, &mut totals);
            folded.map_err(|reason| JournalError::Line {
                path: path.into(),
                line,
                reason,
            })?;
        }
        Ok(ledger)
    }

    fn fold(&mut self, bytes: &[u8], totals: &mut Totals) -> Result<(), String> {
        if self.complete {
            return Err("unexpected line after the end of the run".to_owned());
        }
        let line: Line = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if line.elapsed_ms < self.elapsed_ms {
            return Err("time goes backwards".to_owned());
        }
        for moved in &line.moved {
            self.fold_moved(moved, totals)?;
        }
        self.fold_notes(line.notes)?;
        let written = Totals {
            sent: line.sent_total,
            acked: line.acked_total,
        };
        if *totals != written {
            return Err(format!(
                "device totals are {} frames sent and {} acknowledged, expected {} and {}: a line \
                is missing or was changed",
                totals.sent, totals.acked, written.sent, written.acked
            ));
        }
        self.complete = line.complete == Some(true);
        self.elapsed_ms = line.elapsed_ms;
        Ok(())
    }

    fn fold_notes(&mut self, notes: Notes) -> Result<(), String> {
        self.started_us = notes.started_us.or(self.started_us);
        self.clock_us = notes.clock_us.or(self.clock_us);
        for (device, seq, code) in notes.quarantined {
            self.device(device)?.quarantined.push((seq, code));
        }
        for (device, login) in notes.logins {
            self.device(device)?.logins.push(login);
        }
        for (device, seq, bit) in notes.damaged {
            self.device(device)?.damaged.push((seq, bit));
        }
        for (device, first, last) in notes.lost {
            self.device(device)?.lost.push((first, last));
        }
        Ok(())
    }

    fn fold_moved(&mut self, moved: &Moved, totals: &mut Totals) -> Result<(), String> {
        let forward = |by: i64, what: &str| {
            u64::try_from(by).map_err(|_| format!("{what} must not decrease"))
        };
        let (sent, acked) = (forward(moved.sent, "sent")?, forward(moved.acked, "acked")?);
        for range in moved.devices.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let bounds = first.parse::<u32>().ok().zip(last.parse::<u32>().ok());
            let (first, last) = bounds.ok_or_else(|| format!("invalid device range {range:?}"))?;
            // Check the last device first, so that a huge range fails immediately.
            self.device(last)?;
            for device in first..=last {
                let ledger = self.device(device)?;
                ledger.sent = ledger.sent.checked_add(sent).ok_or("too many frames")?;
                ledger.acked = ledger.acked.checked_add(acked).ok_or("too many frames")?;
                if ledger.acked > ledger.sent {
                    return Err(format!(
                        "device {device} has more frames acknowledged than sent"
                    ));
                }
                totals.sent = totals.sent.checked_add(sent).ok_or("too many frames")?;
                totals.acked = totals.acked.checked_add(acked).ok_or("too many frames")?;
            }
        }
        Ok(())
    }

    fn device(&mut self, device: u32) -> Result<&mut DeviceLedger, String> {
        let missing = || format!("device {device} is not in the plan");
        self.devices.get_mut(device as usize).ok_or_else(missing)
    }
}

fn parse_header(bytes: &[u8]) -> Result<Header, String> {
    let Some(line) = bytes.strip_suffix(b"\n") else {
        return Err("first line is missing or incomplete".to_owned());
    };
    let header: serde_json::Value = serde_json::from_slice(line)
        .map_err(|_| "first line does not contain a plan".to_owned())?;
    // Check the format versions first: the fields of another version are unknown.
    for (field, found, known) in [
        ("journal", &header["journal"], FORMAT),
        ("plan", &header["plan"]["format"], plan::FORMAT),
    ] {
        if *found != known {
            let by = header["program"].as_str().unwrap_or("another program");
            return Err(format!(
                "{field} format {found}, not {known}; it was written by {by}"
            ));
        }
    }
    let header: Header = serde_json::from_value(header).map_err(|error| error.to_string())?;
    if header.plan.devices > plan::DEVICES_MAX {
        return Err(format!("its plan has {} devices", header.plan.devices));
    }
    Ok(header)
}

fn write_line(out: &mut impl Write, line: &impl Serialize) -> Result<(), JournalError> {
    // A single write, so that a crash of this process tears no line.
    let mut bytes = serde_json::to_vec(line).map_err(io::Error::from)?;
    bytes.push(b'\n');
    out.write_all(&bytes)?;
    out.flush()?;
    Ok(())
}

/// Formats `[0, 1, 2, 7]` as `0-2,7`. The devices must be sorted.
fn ranges(devices: &[u32]) -> String {
    let runs = devices.chunk_by(|before, after| before + 1 == *after);
    let texts = runs.map(|run| match run {
        [one] => one.to_string(),
        run => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    texts.collect::<Vec<_>>().join(",")
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    journal: u32,
    program: String,
    plan: Plan,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    complete: Option<bool>,
    elapsed_ms: u64,
    sent_total: u64,
    acked_total: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    moved: Vec<Moved>,
    #[serde(default, skip_serializing_if = "Notes::is_empty")]
    notes: Notes,
}

/// Events other than frames sent and acknowledged; each item has the index of its device.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Notes {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    started_us: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clock_us: Option<(i64, i64)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    quarantined: Vec<(u32, u64, u8)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    logins: Vec<(u32, Login)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    damaged: Vec<(u32, u64, u32)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lost: Vec<(u32, u64, u64)>,
}

impl Notes {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Number of frames by which some devices advanced. Signed, so that a decrease can be reported.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Moved {
    sent: i64,
    acked: i64,
    devices: String,
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
