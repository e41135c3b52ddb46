//! Plan of a run, which determines the content of every frame.
//!
//! A [`Plan`] is small and is written to the journal. [`Plan::open`] turns it into a [`Script`], which knows the
//! channels and has read the recording, if any. A [`DeviceScript`] generates the frames of one device.
//! [`pace`](crate::pace) and the fleet determine when a frame is sent, and the protocol determines how it is encoded.
//!
//! Invariants: frame `seq` of a device is a pure function of plan, device and `seq`. Frame 1 holds the
//! samples `0..batch`, frame 2 those up to `2 * batch`, and so on; no sample is in two frames. Every
//! frame costs the same to generate, and a warm buffer generates it without allocating.

use crate::catalogue::{self, CHANNELS_MAX};
use crate::faults::{self, Chance, Malformation};
use crate::hash;
use crate::readings::{Channel, Readings};
use crate::replay::{Fingerprint, Replay, ReplayError, ReplayOptions};
use crate::signal::{Signal, Span};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// Version of the meaning of a plan. Increase it whenever the same plan would give different content, even by a
/// single noise bit.
pub const FORMAT: u32 = 2;
/// Maximum number of devices in a fleet.
pub const DEVICES_MAX: u32 = 100_000;
/// Maximum number of rows in a frame.
pub const BATCH_MAX: u16 = 1_024;
/// Longest sample interval, in microseconds: one day.
pub const INTERVAL_US_MAX: u64 = 86_400_000_000;
/// Longest prefix of device names, in bytes: a name has at most 32 bytes, 5 of them digits.
pub const NAME_PREFIX_BYTES_MAX: usize = 27;
/// Longest prefix before a device name from a recording, which has at most 24 bytes.
const RECORDED_NAME_PREFIX_BYTES_MAX: usize = 8;

/// Everything that determines what a fleet sends. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`FORMAT`] of the program that created the plan.
    pub format: u32,
    /// Determines all values and all faults.
    pub seed: u64,
    /// Determines stream and boot numbers. It is drawn for each run, so that the same readings sent again
    /// belong to a new stream.
    pub nonce: u64,
    /// Prefix of the device names.
    pub name_prefix: String,
    /// Number of devices.
    pub devices: u32,
    /// Number of channels per device.
    pub channels: u8,
    /// Time between two samples of a channel, in microseconds.
    pub interval_us: u64,
    /// Number of rows per frame.
    pub batch: u16,
    /// Number of frames per device, if limited.
    #[serde(deserialize_with = "Option::deserialize")]
    pub frames: Option<u64>,
    /// Clock of the devices.
    pub clock: Clock,
    /// Time of sample 0, in microseconds since 1970.
    pub start_us: i64,
    /// Load profile.
    pub profile: Profile,
    /// Probability that a frame is malformed, in billionths.
    pub malformed_billionths: u32,
    /// Recording to replay instead of generated signals.
    #[serde(deserialize_with = "Option::deserialize")]
    pub replay: Option<Fingerprint>,
}

/// Clock of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The time of day.
    #[default]
    Utc,
    /// Only the time since boot.
    Boot,
}

/// Distribution of a fleet's frames over time; [`pace`](crate::pace) defines it in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Constant rate: the devices send in turn.
    #[default]
    Steady,
    /// Maximum rate: devices send a month of backlog as fast as the gateway accepts it.
    Burst,
    /// The devices join one after another during the first half of the run.
    Ramp,
    /// Like steady, but every ten seconds the whole fleet disconnects simultaneously and reconnects.
    Storm,
}

/// A plan could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The plan's format is not supported.
    #[error("plan format {found} is not supported, only {FORMAT}; use the version that created it")]
    Format {
        /// Format of the plan.
        found: u32,
    },
    /// A value is out of range.
    #[error("{name} must be {range}, but is {value}")]
    Range {
        /// Name of the field.
        name: &'static str,
        /// Its value.
        value: String,
        /// Allowed range.
        range: String,
    },
    /// The recording could not be read.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The recording has changed since the plan was made.
    #[error("{path} has changed since the run: its {what} was {then} and is {now}", path = path.display())]
    ReplayChanged {
        /// File of the recording.
        path: std::path::PathBuf,
        /// Property that changed: size or digest.
        what: &'static str,
        /// Value in the plan.
        then: String,
        /// Current value.
        now: String,
    },
}

impl Plan {
    /// Checks the values and reads the recording, if any.
    pub fn open(self) -> Result<Script, PlanError> {
        let replay = match &self.replay {
            None => None,
            Some(then) => Some(reopen(then, usize::from(self.batch))?),
        };
        Script::new(self, replay)
    }

    /// Returns the plan for a recording, whose channels and fingerprint replace the plan's own; the recording is not
    /// read a second time. If the recording names its devices, it also sets their number, unless `devices` is
    /// given.
    pub fn replaying(
        mut self,
        path: &Path,
        options: &ReplayOptions,
        devices: Option<u32>,
    ) -> Result<Script, PlanError> {
        self.check()?;
        let replay = Replay::open(path, usize::from(self.batch), options)?;
        self.replay = Some(replay.fingerprint().clone());
        if replay.id(0).is_some() && devices.is_none() {
            self.devices = replay.devices();
        }
        // At most CHANNELS_MAX, as checked by the replay.
        self.channels = replay.channels().len() as u8;
        Script::new(self, Some(replay))
    }

    fn check(&self) -> Result<(), PlanError> {
        if self.format != FORMAT {
            return Err(PlanError::Format { found: self.format });
        }
        check_range("devices", self.devices.into(), 1, DEVICES_MAX.into())?;
        check_range("channels", self.channels.into(), 1, CHANNELS_MAX as u64)?;
        check_range("interval_us", self.interval_us, 1, INTERVAL_US_MAX)?;
        check_range("batch", self.batch.into(), 1, BATCH_MAX.into())?;
        check_range("frames", self.frames.unwrap_or(1), 1, u64::MAX)?;
        let sure = Chance::ALWAYS.billionths();
        check_range(
            "malformed_billionths",
            self.malformed_billionths.into(),
            0,
            sure.into(),
        )?;
        check_name_prefix(&self.name_prefix).map_err(|range| PlanError::Range {
            name: "name_prefix",
            value: format!("{:?}", self.name_prefix),
            range,
        })
    }
}

/// Checks a prefix of device names; the error describes the valid ones.
pub fn check_name_prefix(prefix: &str) -> Result<(), String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    if prefix.len() <= NAME_PREFIX_BYTES_MAX && prefix.bytes().all(fits) {
        return Ok(());
    }
    Err(format!(
        "at most {NAME_PREFIX_BYTES_MAX} letters, digits, '.', '_', ':' or '-'"
    ))
}

fn check_range(name: &'static str, value: u64, low: u64, high: u64) -> Result<(), PlanError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(PlanError::Range {
        name,
        value: value.to_string(),
        range: format!("{low} to {high}"),
    })
}

fn reopen(then: &Fingerprint, batch: usize) -> Result<Replay, PlanError> {
    let replay = Replay::reopen(then, batch)?;
    let now = replay.fingerprint();
    let changed = |what, then_is: &dyn ToString, now_is: &dyn ToString| PlanError::ReplayChanged {
        path: then.path.clone(),
        what,
        then: then_is.to_string(),
        now: now_is.to_string(),
    };
    if now.bytes != then.bytes {
        return Err(changed("size in bytes", &then.bytes, &now.bytes));
    }
    if now.sha256 != then.sha256 {
        return Err(changed("SHA-256", &then.sha256, &now.sha256));
    }
    Ok(replay)
}

/// A plan that can generate the data to be sent.
#[derive(Debug)]
pub struct Script {
    plan: Plan,
    channels: Vec<Channel>,
    replay: Option<Replay>,
    malformed: Chance,
}

impl Script {
    fn new(plan: Plan, replay: Option<Replay>) -> Result<Self, PlanError> {
        plan.check()?;
        let channels = match &replay {
            Some(replay) => {
                let found = replay.channels().len() as u64;
                check_range("channels", plan.channels.into(), found, found)?;
                replay.channels().to_vec()
            }
            None => catalogue::channels(plan.channels.into()),
        };
        let malformed = Chance::from_billionths(plan.malformed_billionths).unwrap_or_default();
        Ok(Self {
            plan,
            channels,
            replay,
            malformed,
        })
    }

    /// Returns the plan, as written to the journal.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the channels that every device of the fleet has, in column order.
    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// Returns one line for each guess about the recording and each part of it that was skipped.
    pub fn notes(&self) -> &[String] {
        self.replay.as_ref().map_or(&[], Replay::notes)
    }

    /// Returns the number of frames of all devices, if limited.
    pub fn frames(&self) -> Option<u64> {
        (0..self.plan.devices)
            .map(|device| self.frames_of(device))
            .sum()
    }

    /// Returns the number of frames of a device, if limited.
    fn frames_of(&self, device: u32) -> Option<u64> {
        let recorded = self.replay.as_ref().map(|replay| replay.frames(device));
        [self.plan.frames, recorded].into_iter().flatten().min()
    }

    /// Returns the name of a device: its number, or its name in the recording if that names all devices.
    fn name_of(&self, device: u32) -> String {
        let prefix = &self.plan.name_prefix;
        match self.naming().and_then(|replay| replay.id(device)) {
            Some(id) => format!("{prefix}{id}"),
            None => format!("{prefix}{device:05}"),
        }
    }

    /// Returns the index of the device with this name, if it exists.
    pub fn index_of(&self, name: &str) -> Option<u32> {
        let own = name.strip_prefix(&self.plan.name_prefix)?;
        let index = match self.naming() {
            Some(replay) => {
                (0..self.plan.devices).find(|device| replay.id(*device) == Some(own))?
            }
            None => own.parse().ok()?,
        };
        (index < self.plan.devices && self.name_of(index) == name).then_some(index)
    }

    /// Returns the recording, if it names the devices.
    fn naming(&self) -> Option<&Replay> {
        let fits = self.plan.name_prefix.len() <= RECORDED_NAME_PREFIX_BYTES_MAX;
        let has_all = |replay: &&Replay| self.plan.devices <= replay.devices();
        let replay = self.replay.as_ref().filter(has_all);
        replay.filter(|replay| fits && replay.id(0).is_some())
    }

    /// Returns the script of one device. `index` counts from 0 and is below the plan's number of devices.
    pub fn device(self: &Arc<Self>, index: u32) -> DeviceScript {
        let Plan {
            seed,
            nonce,
            start_us,
            ..
        } = self.plan;
        let drawn = hash::key(&[DEVICE, seed, nonce, u64::from(index)]);
        let signals = match self.replay {
            Some(_) => Vec::new(),
            None => (0..self.channels.len())
                .map(|channel| Signal::new(seed, index, channel, start_us))
                .collect(),
        };
        DeviceScript {
            index,
            name: self.name_of(index),
            // 63 bits, because SQL has no unsigned 64-bit integers.
            stream: (hash::at(drawn, 0) >> 1).max(1),
            boot: (hash::at(drawn, 1) >> 32) as u32,
            uptime_us: hash::between(hash::at(drawn, 2), 60_000_000, 30 * 86_400_000_000),
            signals,
            script: Arc::clone(self),
        }
    }
}

const DEVICE: u64 = u64::from_be_bytes(*b"device\0\0");

/// Identity and frames of one device.
#[derive(Clone, Debug)]
pub struct DeviceScript {
    index: u32,
    name: String,
    stream: u64,
    boot: u32,
    /// Uptime when sample 0 was taken.
    uptime_us: i64,
    signals: Vec<Signal>,
    script: Arc<Script>,
}

/// Content of a frame.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FrameContent<'a> {
    /// Readings to be stored.
    Readings(&'a Readings),
    /// A frame that must be quarantined.
    Malformed {
        /// Fault to apply.
        variant: Malformation,
        /// Readings to encode before the fault is applied.
        readings: &'a Readings,
    },
}

impl DeviceScript {
    /// Returns the index of the device in the fleet, from 0.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Returns the number of frames that it sends, if limited.
    pub fn frames(&self) -> Option<u64> {
        self.script.frames_of(self.index)
    }

    /// Returns the name under which it logs in.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of its stream, from 1 to 2^63 - 1.
    pub fn stream(&self) -> u64 {
        self.stream
    }

    /// Returns the number of its boot.
    pub fn boot(&self) -> u32 {
        self.boot
    }

    /// Returns its clock.
    pub fn clock(&self) -> Clock {
        self.script.plan.clock
    }

    /// Returns its uptime at a moment, in microseconds: the time on its own clock, if it does not know
    /// the time of day.
    pub fn uptime_us(&self, utc_us: i64) -> i64 {
        utc_us.wrapping_add(self.boot_offset_us())
    }

    /// Generates frame `seq`, counted from 1, or returns `None` if the device sends no such frame.
    pub fn frame<'a>(&self, seq: u64, readings: &'a mut Readings) -> Option<FrameContent<'a>> {
        if seq == 0 || self.frames().is_some_and(|frames| seq > frames) {
            return None;
        }
        match &self.script.replay {
            Some(replay) => {
                let shift_us = self.shift_us();
                replay
                    .fill(self.index, seq, shift_us, readings)
                    .then_some(())?;
            }
            None => self.measure(seq, readings),
        }
        let Plan { seed, .. } = self.script.plan;
        Some(
            match faults::malformation(self.script.malformed, seed, self.index, seq) {
                None => FrameContent::Readings(readings),
                Some(variant) => FrameContent::Malformed { variant, readings },
            },
        )
    }

    fn measure(&self, seq: u64, readings: &mut Readings) {
        let Plan {
            batch,
            interval_us,
            start_us,
            ..
        } = self.script.plan;
        // No real run is long enough to wrap here; a journal that claims one must not crash the verifier.
        let first_sample = (seq - 1).wrapping_mul(u64::from(batch));
        let t0_us = start_us.wrapping_add_unsigned(first_sample.wrapping_mul(interval_us));
        let span = Span {
            first_sample,
            t0_us,
            step_us: interval_us,
            rows: usize::from(batch),
        };
        readings.reset(&self.script.channels);
        readings.rows = span.rows;
        readings.t0_us = t0_us.wrapping_add(self.shift_us());
        readings.step_us = interval_us;
        for (signal, column) in self.signals.iter().zip(&mut readings.columns) {
            signal.fill(span, column);
        }
    }

    /// Returns the offset from UTC to the device's clock, in microseconds.
    fn shift_us(&self) -> i64 {
        match self.script.plan.clock {
            Clock::Utc => 0,
            Clock::Boot => self.boot_offset_us(),
        }
    }

    fn boot_offset_us(&self) -> i64 {
        let first_us = match &self.script.replay {
            Some(replay) => replay.earliest_us(),
            None => self.script.plan.start_us,
        };
        self.uptime_us.wrapping_sub(first_us)
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
