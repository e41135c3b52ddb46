//! Recordings: readings of sensors in CSV files, as they are found in public.
//!
//! [`Recording::read`] finds out how a file is written, reports each guess in a line, and gives times in
//! UTC and columns of numbers. `fieldgate import` and the simulator's `--replay` read by it.
//!
//! Nothing is dropped silently: rows that cannot be read, cells that are no numbers and numbers that
//! change when they are stored are counted and reported with their lines.
//!
//! Invariants: the same bytes with the same options give the same recording. Rows of a device are
//! sorted by time; rows of the same time come one after another in the order of the file, in runs of
//! strictly increasing times. The whole file is held in memory: its text, and 9 bytes for a value.

mod columns;
pub mod decimal;
pub mod encode;
mod gather;
mod layout;
mod notes;
mod number;
mod options;
pub mod readings;
mod records;
mod rows;
mod text;
mod time;

use std::fmt;
use std::io::{self, Read};
use std::ops::Range;

use ring::digest::{SHA256, digest};

pub use self::options::ReadOptions;
use self::readings::{Channel, Nulls, Readings, Values};

/// Readings of one or more devices with the same channels.
#[derive(Debug)]
pub struct Recording {
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Each column that was taken.
    pub channels: Vec<Channel>,
    /// The devices, each with its rows.
    pub devices: Vec<DeviceRows>,
    /// Guesses and losses, a line each.
    pub notes: Vec<String>,
    times_us: Vec<i64>,
    columns: Vec<(Values, Nulls)>,
}

/// Which rows are a device's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRows {
    /// What the column of devices calls it, as a part of a name; empty without such a column.
    pub id: String,
    /// Its rows.
    pub rows: Range<usize>,
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub struct ReadError {
    line: Option<u64>,
    reason: String,
    source: Option<io::Error>,
}

impl ReadError {
    /// Makes an error about the whole file.
    pub(crate) fn file(reason: String) -> ReadError {
        ReadError {
            line: None,
            reason,
            source: None,
        }
    }

    /// Makes an error about a line, counted from 1.
    pub(crate) fn line(line: u64, reason: String) -> ReadError {
        ReadError {
            line: Some(line),
            reason,
            source: None,
        }
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, &self.source) {
            (_, Some(error)) => write!(f, "{error}"),
            (Some(line), _) => write!(f, "line {line}: {}", self.reason),
            (None, _) => f.write_str(&self.reason),
        }
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> ReadError {
        ReadError {
            line: None,
            reason: String::new(),
            source: Some(error),
        }
    }
}

impl Recording {
    /// Reads a whole file.
    ///
    /// # Errors
    /// It cannot be read, or not be understood; the message names the line and the likely cause.
    pub fn read(mut input: impl Read, options: &ReadOptions) -> Result<Recording, ReadError> {
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes)?;
        let file_bytes = bytes.len() as u64;
        let sha256 = hex(digest(&SHA256, &bytes).as_ref());
        let (text, encoding) = text::decode(bytes)?;
        let mut recording = rows::read(&text, encoding, options)?;
        recording.bytes = file_bytes;
        recording.sha256 = sha256;
        Ok(recording)
    }

    /// Returns how many rows there are.
    pub fn rows(&self) -> usize {
        self.times_us.len()
    }

    /// Returns how many readings have a value.
    pub fn readings(&self) -> u64 {
        let nulls: u64 = self.columns.iter().map(|(_, nulls)| nulls.count()).sum();
        (self.rows() * self.columns.len()) as u64 - nulls
    }

    /// Returns the first and the last time in microseconds since 1970; `None` without rows.
    pub fn span_us(&self) -> Option<(i64, i64)> {
        Some((*self.times_us.iter().min()?, *self.times_us.iter().max()?))
    }

    /// Leaves out all channels but the first `count`.
    pub fn truncate_channels(&mut self, count: usize) {
        self.channels.truncate(count);
        self.columns.truncate(count);
    }

    /// Returns where frames begin among `rows`: after `rows_max` rows, and before a time that does not
    /// increase. The last number is the end of the rows.
    pub fn frame_starts(&self, rows: Range<usize>, rows_max: usize) -> Vec<usize> {
        let mut starts = vec![rows.start];
        for row in rows.start + 1..rows.end {
            let is_full = row - starts[starts.len() - 1] == rows_max;
            if is_full || self.times_us[row] <= self.times_us[row - 1] {
                starts.push(row);
            }
        }
        if !rows.is_empty() {
            starts.push(rows.end);
        }
        starts
    }

    /// Fills the buffer with some rows and channels, and moves the times by `shift_us`. The rows' times
    /// must increase.
    pub fn fill(
        &self,
        rows: Range<usize>,
        channels: Range<usize>,
        shift_us: i64,
        readings: &mut Readings,
    ) {
        let times_us = &self.times_us[rows.clone()];
        readings.reset(&self.channels[channels.clone()]);
        readings.rows = rows.len();
        readings.t0_us = times_us[0].wrapping_add(shift_us);
        readings.step_us = even_step_us(times_us);
        if readings.step_us == 0 {
            let offsets = times_us.iter().map(|time_us| time_us.abs_diff(times_us[0]));
            readings.offsets_us.extend(offsets);
        }
        for (column, (values, nulls)) in readings.columns.iter_mut().zip(&self.columns[channels]) {
            match (&mut column.values, values) {
                (Values::Integer(to), Values::Integer(from)) => to.extend(&from[rows.clone()]),
                (Values::F64(to), Values::F64(from)) => to.extend(&from[rows.clone()]),
                _ => unreachable!("a file gives integers or doubles, and reset made the same kind"),
            }
            let missing = rows.clone().filter(|&row| nulls.contains(row));
            missing.for_each(|row| column.nulls.insert(row - rows.start));
        }
    }
}

/// Returns the distance between rows if it is the same for all of them, else 0. A lone row gets 1, as
/// any distance would do.
fn even_step_us(times_us: &[i64]) -> u64 {
    let mut steps = times_us.windows(2).map(|pair| pair[1].abs_diff(pair[0]));
    let first = steps.next().unwrap_or(1);
    if steps.all(|step_us| step_us == first) {
        first
    } else {
        0
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
