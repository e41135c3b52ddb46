//! Recordings: sensor readings from CSV files of any common style.
//!
//! [`Recording::read`] detects the file's format, reports each guess in a line, and returns UTC
//! times and columns of numbers. `fieldgate import` and the simulator's `--replay` use it.
//!
//! Nothing is dropped silently: rows that cannot be read, cells that are not numbers, and numbers
//! that change when stored are counted and reported with their line numbers.
//!
//! Invariants: the same bytes with the same options give the same recording. Rows of a device are
//! sorted by time. If times repeat, the rows form several runs of strictly increasing times: the
//! first row of each time, then the second, and so on. The whole file is held in memory: its text,
//! and 9 bytes per value.

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
    /// Size of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Columns that were read.
    pub channels: Vec<Channel>,
    /// Devices with their rows.
    pub devices: Vec<DeviceRows>,
    /// Guesses and reported losses, one line each.
    pub notes: Vec<String>,
    times_us: Vec<i64>,
    columns: Vec<(Values, Nulls)>,
}

/// Rows of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRows {
    /// Device id from the device column, as a part of a name; empty without such a column.
    pub id: String,
    /// Range of its rows.
    pub rows: Range<usize>,
}

/// Reason why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub struct ReadError {
    line: Option<u64>,
    reason: String,
    source: Option<io::Error>,
}

impl ReadError {
    /// Creates an error about the whole file.
    pub(crate) fn file(reason: String) -> ReadError {
        ReadError {
            line: None,
            reason,
            source: None,
        }
    }

    /// Creates an error about a line, counted from 1.
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
    /// The file cannot be read or understood; the message names the line and the likely cause.
    pub fn read(mut input: impl Read, options: &ReadOptions) -> Result<Recording, ReadError> {
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes)?;
        let file_bytes = bytes.len() as u64;
        let sha256 = hex::encode(digest(&SHA256, &bytes));
        let (text, encoding) = text::decode(bytes)?;
        let mut recording = rows::read(&text, encoding, options)?;
        recording.bytes = file_bytes;
        recording.sha256 = sha256;
        Ok(recording)
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.times_us.len()
    }

    /// Returns the number of readings with a value.
    pub fn readings(&self) -> u64 {
        let nulls: u64 = self.columns.iter().map(|(_, nulls)| nulls.count()).sum();
        (self.rows() * self.columns.len()) as u64 - nulls
    }

    /// Returns the first and the last time in microseconds since 1970; `None` without rows.
    pub fn span_us(&self) -> Option<(i64, i64)> {
        Some((*self.times_us.iter().min()?, *self.times_us.iter().max()?))
    }

    /// Removes all channels but the first `count`.
    pub fn truncate_channels(&mut self, count: usize) {
        self.channels.truncate(count);
        self.columns.truncate(count);
    }

    /// Divides `rows` into frames; returns the first row of each frame and, last, the end of the
    /// rows. A frame ends after `rows_max` rows, and before a row whose time does not increase.
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

    /// Fills the buffer with the given rows and channels, shifting times by `shift_us`. The rows'
    /// times must increase.
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
                _ => unreachable!(
                    "columns of a file are integers or doubles, and reset created the same kind"
                ),
            }
            let missing = rows.clone().filter(|&row| nulls.contains(row));
            missing.for_each(|row| column.nulls.insert(row - rows.start));
        }
    }
}

/// Returns the step between rows if it is constant, otherwise 0. Returns 1 for a single row, where
/// any step is valid.
fn even_step_us(times_us: &[i64]) -> u64 {
    let mut steps = times_us.windows(2).map(|pair| pair[1].abs_diff(pair[0]));
    let first = steps.next().unwrap_or(1);
    if steps.all(|step_us| step_us == first) {
        first
    } else {
        0
    }
}

#[cfg(test)]
mod tests;
