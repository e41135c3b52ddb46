//! Recorded measurements from a CSV file, cut into frames.
//!
//! [`Recording`] says how a file is read; here its rows become frames of the plan's size.
//!
//! Invariants: each row is in exactly one frame; times strictly increase within a frame. What a frame
//! holds follows from the file, the options and the shift, which are in the [`Fingerprint`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use fieldgate::recording::{ReadError, ReadOptions, Recording};
use serde::{Deserialize, Serialize};

use crate::catalogue::CHANNELS_MAX;
use crate::readings::{Channel, Readings};

/// Which file was replayed and how, so that a later program can read the same from it, and notice if
/// it is another file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Where it was, as an absolute path.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
    /// How it was read.
    pub options: ReadOptions,
    /// By how much all times were moved.
    pub shift_us: i64,
}

/// How a file is to be replayed.
#[derive(Clone, Debug, Default)]
pub struct ReplayOptions {
    /// How it is read.
    pub read: ReadOptions,
    /// Moves all times so that the last one is this, to the second.
    pub last_us: Option<i64>,
}

/// A recording.
#[derive(Debug)]
pub struct Replay {
    fingerprint: Fingerprint,
    recording: Recording,
    notes: Vec<String>,
    /// For each device, the first row of each frame, and in the end that behind its last row.
    starts: Vec<Vec<usize>>,
}

/// Why a file cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file cannot be opened.
    #[error("{path}: {cause}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The file cannot be understood.
    #[error("{path}, {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where and why.
        cause: ReadError,
    },
}

impl Replay {
    /// Reads a whole file and cuts it into frames of at most `batch` rows.
    ///
    /// # Errors
    /// The file cannot be read or understood.
    pub fn open(path: &Path, batch: usize, options: &ReplayOptions) -> Result<Self, ReplayError> {
        let mut replay = Replay::read(path, batch, options.read.clone())?;
        if let (Some(last_us), Some((_, newest_us))) = (options.last_us, replay.recording.span_us())
        {
            let shift_s = last_us.saturating_sub(newest_us).div_euclid(1_000_000);
            replay.fingerprint.shift_us = shift_s * 1_000_000;
        }
        Ok(replay)
    }

    /// Reads a file once more, as it was read before.
    ///
    /// # Errors
    /// The file cannot be read or understood.
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
                "{channels} columns hold numbers, and a simulated device has at most {CHANNELS_MAX} channels: \
                 the first {CHANNELS_MAX} are taken; choose with --columns"
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

    /// Returns which file this is.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Returns what was guessed and what could not be taken, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Returns one channel for each column of numbers.
    pub fn channels(&self) -> &[Channel] {
        &self.recording.channels
    }

    /// Returns how many devices the file has rows of.
    pub fn devices(&self) -> u32 {
        self.starts.len() as u32
    }

    /// Returns what the file calls a device; `None` if it has no column of devices. Devices beyond the
    /// file's send what the first ones do.
    pub fn id(&self, device: u32) -> Option<&str> {
        let id = self.recording.devices.get(device as usize)?.id.as_str();
        (!id.is_empty()).then_some(id)
    }

    /// Returns how many frames a device sends.
    pub fn frames(&self, device: u32) -> u64 {
        self.starts[self.part(device)].len() as u64 - 1
    }

    /// Returns how many rows the file has.
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
