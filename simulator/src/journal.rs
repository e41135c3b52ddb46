//! The record of a run: what was planned, and how far each device came.
//!
//! JSON Lines, appended to and flushed at most once a second. The first line holds the plan, each
//! following line what changed since the line before, the last line that the run ended in order. A
//! stopped run leaves a shorter journal that is as true as a whole one. Comparing it with a store is
//! left to the verifier.
//!
//! Invariants: what a journal calls acked was acked (it may call less); acked never exceeds sent and
//! neither decreases. Lines hold increments, and devices that advanced alike share an entry, so the
//! size grows with the time that a run takes and hardly with the readings; the totals on each line
//! show if one is missing. Logins, damaged frames and frames that the gateway lost are listed one by one:
//! [`verify`](crate::verify) holds the store's times, addresses and quarantined bytes against them. A last line without its line break was torn by a crash and is ignored;
//! anything else out of order is an error.

use crate::plan::{self, Plan};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Version of the form of the lines.
pub const FORMAT: u32 = 2;
/// Least time between two lines, in microseconds.
pub const TICK_US: u64 = 1_000_000;

/// Why a journal cannot be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file exists, and a proof is not to be overwritten.
    #[error("{path} exists already; remove it or name another journal", path = .0.display())]
    Exists(PathBuf),
    /// The file cannot be opened or read.
    #[error("{path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A line cannot be written.
    #[error("cannot write the journal: {cause}")]
    Write {
        /// What the system said.
        cause: io::Error,
    },
    /// The fleet reports what cannot be.
    #[error("device {device}: {reason}")]
    Progress {
        /// Index of the device.
        device: u32,
        /// What does not fit.
        reason: String,
    },
    /// The first line is not that of a journal this program can read.
    #[error("{path} is no journal that this program can read: {reason}", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A later line is not as it should be.
    #[error("{path}, line {line}: {reason}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// What is wrong with it.
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
    /// What else happened since the last line.
    notes: Notes,
    /// The gateway's clock less the fleet's; `None` before the first WELCOME.
    clock_us: Option<ClockBounds>,
    totals: Totals,
    next_tick_us: u64,
}

/// By how much one clock is ahead of another, from several measurements, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ClockBounds {
    /// The least and the most that any measurement allows.
    all: (i64, i64),
    /// The least and the most that every measurement allows; the wrong way round if one of the clocks stepped.
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
    /// Begins a journal in a new file.
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
    /// Begins a journal with the plan.
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

    /// Notes when the run began, on the fleet's clock in microseconds since 1970.
    pub fn started(&mut self, utc_us: i64) {
        self.notes.started_us = Some(utc_us);
    }

    /// Notes a connection on which the device proved its key.
    pub fn login(&mut self, device: u32, login: Login) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.logins.push((device, login));
        Ok(())
    }

    /// Notes that the gateway's clock was ahead of the fleet's by `least_us` to `most_us`.
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

    /// Notes that a frame leaves with one bit of its payload flipped, counted from the payload's first byte.
    pub fn damaged(&mut self, device: u32, seq: u64, bit: u32) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.damaged.push((device, seq, bit));
        Ok(())
    }

    /// Notes that a device has sent frames up to `seq`. A lower `seq`, sent again, changes nothing.
    /// To be noted before the frame leaves, for an ACK may follow at once.
    pub fn sent(&mut self, device: u32, seq: u64) -> Result<(), JournalError> {
        let known = self.progress(device)?.sent;
        self.advance(device, |progress| progress.sent = known.max(seq));
        Ok(())
    }

    /// Notes that the frames of a device up to `seq` are durable, by word of the gateway.
    pub fn acked(&mut self, device: u32, seq: u64) -> Result<(), JournalError> {
        let known = self.progress(device)?;
        let reason = if seq > known.sent {
            format!(
                "frame {seq} was acked, but {} is the last that was sent",
                known.sent
            )
        } else if seq < known.acked {
            format!("frame {seq} was acked after frame {}", known.acked)
        } else {
            self.advance(device, |progress| progress.acked = seq);
            return Ok(());
        };
        Err(JournalError::Progress { device, reason })
    }

    /// Notes that the gateway no longer knows frames that it had acked: `first` to `last`.
    pub fn lost(&mut self, device: u32, first: u64, last: u64) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.lost.push((device, first, last));
        Ok(())
    }

    /// Notes that the gateway says it stored a frame in quarantine, with its NACK code.
    pub fn quarantined(&mut self, device: u32, seq: u64, code: u8) -> Result<(), JournalError> {
        self.progress(device)?;
        self.notes.quarantined.push((device, seq, code));
        Ok(())
    }

    /// Writes and flushes what changed, if a second has passed since the last line; tells whether it
    /// did. `elapsed_us` is the time since the run began.
    pub fn tick(&mut self, elapsed_us: u64) -> Result<bool, JournalError> {
        if elapsed_us < self.next_tick_us || (self.moved.is_empty() && self.notes.is_empty()) {
            return Ok(false);
        }
        self.next_tick_us = elapsed_us.saturating_add(TICK_US);
        self.write(elapsed_us, None)?;
        Ok(true)
    }

    /// Writes what remains and that the run ended in order.
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
                reason: "there is no such device in the plan".to_owned(),
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

/// What a journal comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    /// What was planned.
    pub plan: Plan,
    /// The program that wrote it, with its version.
    pub program: String,
    /// How far each device came, in the order of their indices.
    pub devices: Vec<DeviceLedger>,
    /// When the run began, on the fleet's clock in microseconds since 1970; `None` if it never did.
    pub started_us: Option<i64>,
    /// By how much the gateway's clock was ahead of the fleet's, at least and at most; `None` if no device was
    /// ever welcomed.
    pub clock_us: Option<(i64, i64)>,
    /// Whether the run ended in order.
    pub complete: bool,
    /// When the last line was written, in milliseconds since the run began.
    pub elapsed_ms: u64,
    /// Whether the last line was torn and therefore ignored.
    pub torn: bool,
}

/// How far a device came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceLedger {
    /// The last frame that was sent, or 0. After a crash of the simulator a second's worth of frames
    /// may have been sent beyond it.
    pub sent: u64,
    /// The last frame up to which all are durable by word of the gateway, or 0.
    pub acked: u64,
    /// Frames that the gateway says are in quarantine, with the NACK code.
    pub quarantined: Vec<(u64, u8)>,
    /// Connections on which it proved its key.
    pub logins: Vec<Login>,
    /// Frames sent with one bit of the payload flipped: number and bit.
    pub damaged: Vec<(u64, u32)>,
    /// First and last of frames that were acked, and not durable any more by a later WELCOME.
    pub lost: Vec<(u64, u64)>,
}

/// A connection on which a device proved its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// From HELLO to WELCOME, or to the end of the connection, in microseconds.
    pub took_us: u64,
    /// The device's end of the connection.
    pub from: SocketAddr,
    /// Whether the WELCOME came.
    pub welcomed: bool,
}

impl Ledger {
    /// Reads and folds a journal, line by line.
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
            return Err("nothing may follow the line that completes the run".to_owned());
        }
        let line: Line = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if line.elapsed_ms < self.elapsed_ms {
            return Err("the time runs backwards".to_owned());
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
                "the devices add up to {} frames sent and {} acked, not {} and {}: a line is missing or \
                 was altered",
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
            u64::try_from(by).map_err(|_| format!("what was {what} must not decrease"))
        };
        let (sent, acked) = (forward(moved.sent, "sent")?, forward(moved.acked, "acked")?);
        for range in moved.devices.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let bounds = first.parse::<u32>().ok().zip(last.parse::<u32>().ok());
            let (first, last) =
                bounds.ok_or_else(|| format!("{range:?} is no range of devices"))?;
            // The last device decides first, so that a huge range ends at once.
            self.device(last)?;
            for device in first..=last {
                let ledger = self.device(device)?;
                ledger.sent = ledger.sent.checked_add(sent).ok_or("too many frames")?;
                ledger.acked = ledger.acked.checked_add(acked).ok_or("too many frames")?;
                if ledger.acked > ledger.sent {
                    return Err(format!("device {device} has more frames acked than sent"));
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
        return Err("its first line is missing or torn".to_owned());
    };
    let header: serde_json::Value = serde_json::from_slice(line)
        .map_err(|_| "its first line does not hold a plan".to_owned())?;
    // The formats come first: of another format no field can be expected.
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
    // One write, so that a crash of this process tears no line.
    let mut bytes = serde_json::to_vec(line).map_err(io::Error::from)?;
    bytes.push(b'\n');
    out.write_all(&bytes)?;
    out.flush()?;
    Ok(())
}

/// `[0, 1, 2, 7]` as `0-2,7`. The devices must be sorted.
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

/// What happened besides frames sent and acked; each item with the index of its device.
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

/// By how many frames some devices advanced. Signed, so that a decrease can be told as such.
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
