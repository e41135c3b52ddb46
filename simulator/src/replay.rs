//! Recorded measurements from a CSV file, cut into frames.
//!
//! The first column that reads as a time is the time; every other column is a channel, its header
//! `name [unit]`. Times are RFC 3339, or with a blank for the `T`, and must say their offset from UTC;
//! only where the header itself says so, as in `Time [UTC]`, may the offset be left out: a guess
//! would move the readings by hours in silence. Parts of a microsecond are cut off. An empty cell (or
//! `NaN`) is a sample without a valid value. What a number becomes is left to
//! [`decimal`](crate::decimal).
//!
//! Invariants: rows keep the order of the file, and each is in exactly one frame; times strictly
//! increase within a frame. The whole file is held in memory, 8 bytes for a value and 8 for a time.

use crate::decimal::{ColumnBuilder, Decimal};
use crate::readings::{Channel, Nulls, Readings, Values};
use fieldgate_protocol::column::Kind;
use jiff::civil::DateTime;
use jiff::tz::Offset;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Which file was replayed, so that a later program can tell whether it still is that file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Where it was, as an absolute path.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
}

/// A recording.
#[derive(Debug)]
pub struct Replay {
    fingerprint: Fingerprint,
    channels: Vec<Channel>,
    times_us: Vec<i64>,
    columns: Vec<(Values, Nulls)>,
    /// First row of each frame, and in the end the number of rows.
    starts: Vec<usize>,
}

/// Why a file cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file cannot be read.
    #[error("{path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A line cannot be understood as a whole.
    #[error("{path}, line {line}: {reason}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1, the header included.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A cell cannot be understood.
    #[error("{path}, line {line}, column {column} ({header}): {reason}", path = path.display())]
    Cell {
        /// The file.
        path: PathBuf,
        /// Counted from 1, the header included.
        line: u64,
        /// Counted from 1.
        column: usize,
        /// What the header calls that column.
        header: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Replay {
    /// Reads a whole file and cuts it into frames of at most `batch` rows.
    pub fn open(path: &Path, batch: usize) -> Result<Self, ReplayError> {
        let failed = |cause| ReplayError::Read {
            path: path.to_owned(),
            cause,
        };
        let place = std::path::absolute(path).map_err(failed)?;
        let file = File::open(path).map_err(failed)?;
        let mut input = Fingerprinting {
            inner: file,
            sha256: Sha256::new(),
            bytes: 0,
        };
        let (channels, times_us, columns) = Table::read(path, &mut input)?.finish();
        let fingerprint = Fingerprint {
            path: place,
            bytes: input.bytes,
            sha256: input
                .sha256
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        };
        let starts = partition(&times_us, batch);
        Ok(Self {
            fingerprint,
            channels,
            times_us,
            columns,
            starts,
        })
    }

    /// Which file this is.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// One channel for each value column.
    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// How many frames the file makes.
    pub fn frames(&self) -> u64 {
        self.starts.len() as u64 - 1
    }

    /// How many rows the file has.
    pub fn rows(&self) -> usize {
        self.times_us.len()
    }

    /// The earliest time in the file, in microseconds since 1970; 0 if it has no row.
    pub fn earliest_us(&self) -> i64 {
        self.times_us.iter().copied().min().unwrap_or(0)
    }

    /// Fills the buffer with frame `seq`, counted from 1, and moves its times by `shift_us`. False, if
    /// there is no such frame.
    pub fn fill(&self, seq: u64, shift_us: i64, readings: &mut Readings) -> bool {
        let Some(rows) = self.rows_of(seq) else {
            return false;
        };
        let times_us = &self.times_us[rows.clone()];
        readings.reset(&self.channels);
        readings.rows = rows.len();
        readings.t0_us = times_us[0].wrapping_add(shift_us);
        readings.step_us = even_step_us(times_us);
        if readings.step_us == 0 {
            readings
                .offsets_us
                .extend(times_us.iter().map(|time_us| time_us.abs_diff(times_us[0])));
        }
        for (column, (values, nulls)) in readings.columns.iter_mut().zip(&self.columns) {
            match (&mut column.values, values) {
                (Values::Integer(to), Values::Integer(from)) => to.extend(&from[rows.clone()]),
                (Values::F64(to), Values::F64(from)) => to.extend(&from[rows.clone()]),
                _ => unreachable!("a file gives integers or doubles, and reset made the same kind"),
            }
            let missing = rows.clone().filter(|&row| nulls.contains(row));
            missing.for_each(|row| column.nulls.insert(row - rows.start));
        }
        true
    }

    fn rows_of(&self, seq: u64) -> Option<Range<usize>> {
        let end = usize::try_from(seq)
            .ok()
            .filter(|&end| end > 0 && end < self.starts.len())?;
        Some(self.starts[end - 1]..self.starts[end])
    }
}

/// Where frames begin: after `batch` rows, and before a time that does not increase.
fn partition(times_us: &[i64], batch: usize) -> Vec<usize> {
    let mut starts = vec![0];
    for row in 1..times_us.len() {
        let full = row - starts[starts.len() - 1] == batch;
        if full || times_us[row] <= times_us[row - 1] {
            starts.push(row);
        }
    }
    if !times_us.is_empty() {
        starts.push(times_us.len());
    }
    starts
}

/// The distance between rows if it is the same for all of them, else 0. A lone row gets 1, as any
/// distance would do.
fn even_step_us(times_us: &[i64]) -> u64 {
    let mut steps = times_us.windows(2).map(|pair| pair[1].abs_diff(pair[0]));
    let first = steps.next().unwrap_or(1);
    if steps.all(|step_us| step_us == first) {
        first
    } else {
        0
    }
}

/// A file while it is read.
struct Table<'a> {
    path: &'a Path,
    headers: Vec<String>,
    time: TimeColumn,
    times_us: Vec<i64>,
    /// One for each column of the file; that of the time stays empty.
    columns: Vec<ColumnBuilder>,
}

struct TimeColumn {
    index: usize,
    /// Whether the header says that times without an offset are UTC.
    utc: bool,
}

impl<'a> Table<'a> {
    fn read(path: &'a Path, input: impl Read) -> Result<Self, ReplayError> {
        let mut reader = csv::ReaderBuilder::new()
            .trim(csv::Trim::All)
            .from_reader(input);
        let line_error = |line, reason: String| ReplayError::Line {
            path: path.into(),
            line,
            reason,
        };
        let headers: Vec<String> = match reader.headers() {
            Ok(record) => record.iter().map(str::to_owned).collect(),
            Err(error) => return Err(from_csv(path, error)),
        };
        let mut record = csv::StringRecord::new();
        let mut table: Option<Self> = None;
        while reader
            .read_record(&mut record)
            .map_err(|error| from_csv(path, error))?
        {
            let byte = record.position().map_or(0, csv::Position::byte);
            let table = match &mut table {
                Some(table) => table,
                None => table.insert(Self::begin(path, &headers, &record, byte)?),
            };
            table.push(&record, byte)?;
        }
        table.ok_or_else(|| line_error(1, "no readings: nothing follows the header".into()))
    }

    fn begin(
        path: &'a Path,
        headers: &[String],
        first: &csv::StringRecord,
        byte: u64,
    ) -> Result<Self, ReplayError> {
        let reason = "no column holds a time such as 2025-06-01T12:00:00Z".to_owned();
        let index = first
            .iter()
            .position(|cell| parse_time(cell).is_some())
            .ok_or_else(|| ReplayError::Line {
                path: path.into(),
                line: line_at(path, byte),
                reason,
            })?;
        let utc = split_header(&headers[index]).1.eq_ignore_ascii_case("utc");
        let table = Self {
            path,
            headers: headers.to_vec(),
            time: TimeColumn { index, utc },
            times_us: Vec::new(),
            columns: headers.iter().map(|_| ColumnBuilder::default()).collect(),
        };
        table.check_headers()?;
        Ok(table)
    }

    fn check_headers(&self) -> Result<(), ReplayError> {
        let mut names = std::collections::HashSet::new();
        for (column, header) in self.headers.iter().enumerate() {
            let (name, unit) = split_header(header);
            let fault = match () {
                () if column == self.time.index => None,
                () if name.is_empty() => Some("the channel has no name"),
                () if name.len() > 32 => Some("the channel's name is longer than 32 bytes"),
                () if unit.len() > 16 => Some("the unit is longer than 16 bytes"),
                () if !names.insert(name) => Some("another column has the same name"),
                () => None,
            };
            if let Some(reason) = fault {
                return Err(self.cell_error(0, column, reason.to_owned()));
            }
        }
        let reason = match self.headers.len() - 1 {
            0 => "no column with values beside that of the time".to_owned(),
            1..=crate::catalogue::CHANNELS_MAX => return Ok(()),
            more => format!("{more} columns with values; a device has at most 32 channels"),
        };
        Err(ReplayError::Line {
            path: self.path.into(),
            line: 1,
            reason,
        })
    }

    fn push(&mut self, record: &csv::StringRecord, byte: u64) -> Result<(), ReplayError> {
        for (column, cell) in record.iter().enumerate() {
            if column == self.time.index {
                let time_us = self.time.parse(cell);
                let time_us = time_us.map_err(|reason| self.cell_error(byte, column, reason))?;
                self.times_us.push(time_us);
                continue;
            }
            let missing = cell.is_empty() || cell.eq_ignore_ascii_case("nan");
            let value = Decimal::parse(cell);
            if value.is_none() && !missing {
                let reason = format!("{cell:?} is not a number");
                return Err(self.cell_error(byte, column, reason));
            }
            self.columns[column].push(value);
        }
        Ok(())
    }

    fn finish(self) -> (Vec<Channel>, Vec<i64>, Vec<(Values, Nulls)>) {
        let (mut channels, mut columns) = (Vec::new(), Vec::new());
        for (index, (builder, header)) in self.columns.into_iter().zip(&self.headers).enumerate() {
            if index == self.time.index {
                continue;
            }
            let (name, unit) = split_header(header);
            let (kind, exp10, values, nulls): (Kind, i8, Values, Nulls) = builder.finish();
            channels.push(Channel {
                name: name.into(),
                unit: unit.into(),
                kind,
                exp10,
            });
            columns.push((values, nulls));
        }
        (channels, self.times_us, columns)
    }

    fn cell_error(&self, byte: u64, column: usize, reason: String) -> ReplayError {
        let header = self.headers[column].clone();
        let line = line_at(self.path, byte);
        ReplayError::Cell {
            path: self.path.into(),
            line,
            column: column + 1,
            header,
            reason,
        }
    }
}

impl TimeColumn {
    fn parse(&self, cell: &str) -> Result<i64, String> {
        match parse_time(cell) {
            Some(Time::Utc(time_us)) => Ok(time_us),
            Some(Time::Local(time)) if self.utc => match Offset::UTC.to_timestamp(time) {
                Ok(time) => Ok(time.as_microsecond()),
                Err(_) => Err(format!("{cell:?} is out of range")),
            },
            Some(Time::Local(_)) => Err(format!(
                "{cell:?} does not say its offset from UTC; add it, or head the column \"Time [UTC]\""
            )),
            None => Err(format!(
                "{cell:?} is not a time such as 2025-06-01T12:00:00Z"
            )),
        }
    }
}

enum Time {
    /// Microseconds since 1970.
    Utc(i64),
    /// Without an offset.
    Local(DateTime),
}

fn parse_time(cell: &str) -> Option<Time> {
    // A date without a time of day is no moment, though it could be read as midnight.
    let clock = cell.get(11..)?;
    let offset_at = clock.find([' ', '+', '-', 'Z', 'z']).unwrap_or(clock.len());
    let (time, offset) = cell.split_at(11 + offset_at);
    let offset = match offset.trim_start() {
        "" => return time.parse().ok().map(Time::Local),
        "UTC" | "utc" | "GMT" => "Z",
        offset => offset,
    };
    let moment: jiff::Timestamp = format!("{time}{offset}").parse().ok()?;
    Some(Time::Utc(moment.as_microsecond()))
}

/// `name [unit]` in its parts; the unit may be missing.
fn split_header(header: &str) -> (&str, &str) {
    match header
        .strip_suffix(']')
        .and_then(|rest| rest.rsplit_once('['))
    {
        Some((name, unit)) => (name.trim(), unit.trim()),
        None => (header.trim(), ""),
    }
}

fn from_csv(path: &Path, error: csv::Error) -> ReplayError {
    let line = line_at(path, error.position().map_or(0, csv::Position::byte));
    let reason = match error.into_kind() {
        csv::ErrorKind::Io(cause) => {
            return ReplayError::Read {
                path: path.into(),
                cause,
            };
        }
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!("{len} columns where the header has {expected_len}")
        }
        csv::ErrorKind::Utf8 { err, .. } => format!("column {} is not UTF-8", err.field() + 1),
        _ => "not CSV".to_owned(),
    };
    ReplayError::Line {
        path: path.into(),
        line,
        reason,
    }
}

/// The line, counted from 1, of the record after `byte`. The CSV reader's own count is of where it
/// stood before it skipped blank lines and the second half of a CRLF; people look for the record.
/// Only errors ask, so the file is read again rather than counted all the way.
fn line_at(path: &Path, byte: u64) -> u64 {
    let Ok(file) = File::open(path) else { return 1 };
    let mut newlines = 0;
    for (at, read) in io::BufReader::new(file)
        .bytes()
        .map_while(Result::ok)
        .enumerate()
    {
        if at as u64 >= byte && !matches!(read, b'\r' | b'\n') {
            break;
        }
        newlines += u64::from(read == b'\n');
    }
    1 + newlines
}

/// Passes bytes on and takes their fingerprint, so that it is of exactly what was read.
struct Fingerprinting<R> {
    inner: R,
    sha256: Sha256,
    bytes: u64,
}

impl<R: Read> Read for Fingerprinting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.sha256.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
