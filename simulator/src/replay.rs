//! Recorded measurements from a CSV file, split into frames.
//!
//! [`Recording`] parses the file; this module turns its rows into frames of the plan's size.
//!
//! Invariants: each row is in exactly one frame; times strictly increase within a frame. The content of the frames
//! is determined by the file, the options and the shift, which are in the [`Fingerprint`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use fieldgate::recording::{ReadError, ReadOptions, Recording};
use serde::{Deserialize, Serialize};

use crate::catalogue::CHANNELS_MAX;
use crate::readings::{Channel, Readings};

/// Identity of a replayed file and how it was read, so that a later program can read the same data from it and
/// detect a different file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Absolute path of the file.
    pub path: PathBuf,
    /// Its size, in bytes.
    pub bytes: u64,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
    /// Options with which it was read.
    pub options: ReadOptions,
    /// Offset added to all times, in microseconds.
    pub shift_us: i64,
}

/// Options for replaying a file.
#[derive(Clone, Debug, Default)]
pub struct ReplayOptions {
    /// Format of the file.
    pub read: ReadOptions,
    /// Time to which the last one is shifted, to the second.
    pub last_us: Option<i64>,
}

/// A recording split into frames.
#[derive(Debug)]
pub struct Replay {
    fingerprint: Fingerprint,
    recording: Recording,
    notes: Vec<String>,
    /// For each device, the first row of each frame, and the end of its last row.
    starts: Vec<Vec<usize>>,
}

/// A file could not be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file could not be opened.
    #[error("{path}: {cause}", path = path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        cause: io::Error,
    },
    /// The file could not be parsed.
    #[error("{path}, {cause}", path = path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Position and reason.
        cause: ReadError,
    },
}

impl Replay {
    /// Reads a whole file and splits it into frames of at most `batch` rows.
    ///
    /// # Errors
    /// The file could not be read or parsed.
    pub fn open(path: &Path, batch: usize, options: &ReplayOptions) -> Result<Self, ReplayError> {
        let mut replay = Replay::read(path, batch, options.read.clone())?;
        if let (Some(last_us), Some((_, newest_us))) = (options.last_us, replay.recording.span_us())
        {
            let shift_s = last_us.saturating_sub(newest_us).div_euclid(1_000_000);
            replay.fingerprint.shift_us = shift_s * 1_000_000;
        }
        Ok(replay)
    }

    /// Reads a file again with the same options as before.
    ///
    /// # Errors
    /// The file could not be read or parsed.
    pub fn reopen(then: &Fingerprint, batch: usize) -> Result<Self, ReplayError> {
        let mut replay = Replay::read(&then.path, batch, then.options.clone())?;
        replay.fingerprint.shift_us = then.shift_us;
        Ok(replay)
    }

    fn read(path: &Path, batch: usize, options: ReadOptions) -> Result<Self, ReplayError> {
        let failed = |cause| ReplayError::Open {
            path: path.to_owned(),
            cause,
        };
        let place = std::path::absolute(path).map_err(failed)?;
        let file = File::open(path).map_err(failed)?;
        let mut recording = Recording::read(file, &options).map_err(|cause| ReplayError::Read {
            path: path.to_owned(),
            cause,
        })?;
        let mut notes = std::mem::take(&mut recording.notes);
        let channels = recording.channels.len();
        if channels > CHANNELS_MAX {
            recording.truncate_channels(CHANNELS_MAX);
            notes.push(format!(
                "{channels} numeric columns found, but a simulated device has at most {CHANNELS_MAX} channels: \
                using the first {CHANNELS_MAX}; select with --columns"
            ));
        }
        let devices = recording.devices.iter();
        let starts = devices.map(|device| recording.frame_starts(device.rows.clone(), batch));
        Ok(Replay {
            fingerprint: Fingerprint {
                path: place,
                bytes: recording.bytes,
                sha256: recording.sha256.clone(),
                options,
                shift_us: 0,
            },
            starts: starts.collect(),
            recording,
            notes,
        })
    }

    /// Returns the identity of the file.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Returns one line for each guess about the file and each part of it that was skipped.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Returns one channel for each numeric column.
    pub fn channels(&self) -> &[Channel] {
        &self.recording.channels
    }

    /// Returns the number of devices with rows in the file.
    pub fn devices(&self) -> u32 {
        self.starts.len() as u32
    }

    /// Returns the name of a device in the file; `None` if the file has no device column. Devices beyond the
    /// file's send the same rows as the first ones.
    pub fn id(&self, device: u32) -> Option<&str> {
        let id = self.recording.devices.get(device as usize)?.id.as_str();
        (!id.is_empty()).then_some(id)
    }

    /// Returns the number of frames of a device.
    pub fn frames(&self, device: u32) -> u64 {
        self.starts[self.part(device)].len() as u64 - 1
    }

    /// Returns the number of rows in the file.
    pub fn rows(&self) -> usize {
        self.recording.rows()
    }

    /// Returns the earliest time that is sent, in microseconds since 1970.
    pub fn earliest_us(&self) -> i64 {
        let earliest_us = self.recording.span_us().map_or(0, |(first_us, _)| first_us);
        earliest_us.wrapping_add(self.fingerprint.shift_us)
    }

    /// Fills the buffer with frame `seq` of a device, counted from 1, and moves its times by `shift_us`.
    /// Returns false if there is no such frame.
    pub fn fill(&self, device: u32, seq: u64, shift_us: i64, readings: &mut Readings) -> bool {
        let Some(rows) = self.rows_of(device, seq) else {
            return false;
        };
        let shift_us = shift_us.wrapping_add(self.fingerprint.shift_us);
        let channels = 0..self.recording.channels.len();
        self.recording.fill(rows, channels, shift_us, readings);
        true
    }

    fn rows_of(&self, device: u32, seq: u64) -> Option<Range<usize>> {
        let starts = &self.starts[self.part(device)];
        let end = usize::try_from(seq)
            .ok()
            .filter(|&end| end > 0 && end < starts.len())?;
        Some(starts[end - 1]..starts[end])
    }

    fn part(&self, device: u32) -> usize {
        device as usize % self.starts.len()
    }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
