//! Everything from which the content of every frame of a run follows.
//!
//! A [`Plan`] is small and goes into the journal; [`Plan::open`] makes it a [`Script`], which knows the
//! channels and has read the recording, if there is one; a [`DeviceScript`] tells what one device
//! sends. When a frame is sent is left to [`pace`](crate::pace) and the fleet, how it is encoded to
//! the protocol.
//!
//! Invariants: frame `seq` of a device is a pure function of plan, device and `seq`. Frame 1 holds the
//! samples `0..batch`, frame 2 those up to `2 * batch`, and so on; no sample is in two frames. Any
//! frame costs the same, and a warm buffer makes it without allocating.

use crate::catalogue::{self, CHANNELS_MAX};
use crate::faults::{self, Chance, Malformation};
use crate::hash;
use crate::readings::{Channel, Readings};
use crate::replay::{Fingerprint, Replay, ReplayError, ReplayOptions};
use crate::signal::{Signal, Span};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// Version of the meaning of a plan. To be raised whenever the same plan would give other content, be
/// it only by one noise bit.
pub const FORMAT: u32 = 2;
/// Most devices of a fleet.
pub const DEVICES_MAX: u32 = 100_000;
/// Most rows of a frame.
pub const BATCH_MAX: u16 = 1_024;
/// Longest time from sample to sample: a day.
pub const INTERVAL_US_MAX: u64 = 86_400_000_000;
/// Longest prefix of device names: a name has at most 32 bytes, 5 of them digits.
pub const NAME_PREFIX_BYTES_MAX: usize = 27;
/// Longest prefix before what a recording calls a device, which has at most 24 bytes.
const RECORDED_NAME_PREFIX_BYTES_MAX: usize = 8;

/// What a fleet sends. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`FORMAT`] of the program that made it.
    pub format: u32,
    /// Decides all values and all faults.
    pub seed: u64,
    /// Decides stream and boot numbers, and is drawn anew for each run: the same readings sent again
    /// are another queue.
    pub nonce: u64,
    /// What the names of the devices begin with.
    pub name_prefix: String,
    /// How many devices.
    pub devices: u32,
    /// How many channels each device has.
    pub channels: u8,
    /// From sample to sample of a channel, in microseconds.
    pub interval_us: u64,
    /// Rows per frame.
    pub batch: u16,
    /// Frames per device, where that is limited.
    #[serde(deserialize_with = "Option::deserialize")]
    pub frames: Option<u64>,
    /// Which time the devices know.
    pub clock: Clock,
    /// When sample 0 was taken, in microseconds since 1970.
    pub start_us: i64,
    /// How frames follow one another.
    pub profile: Profile,
    /// Probability that a frame is malformed, in billionths.
    pub malformed_billionths: u32,
    /// Where the readings come from instead of signals.
    #[serde(deserialize_with = "Option::deserialize")]
    pub replay: Option<Fingerprint>,
}

/// Which time a device knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The time of day.
    #[default]
    Utc,
    /// Only how long ago it was switched on.
    Boot,
}

/// How the frames of a fleet are spread over time; [`pace`](crate::pace) says it in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Evenly: the devices take turns.
    #[default]
    Steady,
    /// The devices were cut off for a month and send what they kept as fast as it is taken.
    Burst,
    /// The devices join one after another during the first half of the run.
    Ramp,
    /// As steady, but the whole fleet drops its connections at once and returns, every ten seconds.
    Storm,
}

/// Why a plan cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Made by a program whose plans mean something else.
    #[error(
        "the plan has format {found}, this program knows only {FORMAT}; use the version that made it"
    )]
    Format {
        /// Format of the plan.
        found: u32,
    },
    /// A value out of range.
    #[error("{name} is {value}, but must be {range}")]
    Range {
        /// The field.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: String,
    },
    /// The recording cannot be read.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The recording is not what it was.
    #[error("{path} has changed since the run: its {what} was {then} and is {now}", path = path.display())]
    ReplayChanged {
        /// The recording.
        path: std::path::PathBuf,
        /// Size or digest.
        what: &'static str,
        /// As the plan has it.
        then: String,
        /// As it is.
        now: String,
    },
}

impl Plan {
    /// Checks the values, reads the recording if there is one, and makes ready to tell contents.
    pub fn open(self) -> Result<Script, PlanError> {
        let replay = match &self.replay {
            None => None,
            Some(then) => Some(reopen(then, usize::from(self.batch))?),
        };
        Script::new(self, replay)
    }

    /// Makes a plan for a recording: its channels and its fingerprint replace what the plan said, and
    /// the recording need not be read twice. If the recording names its devices, there are as many,
    /// unless `devices` was asked for.
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
        // Never more than CHANNELS_MAX, which the replay has checked.
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

/// Whether names may begin like this; if not, what they may.
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

/// A plan that can tell what is sent.
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

    /// The plan, as it goes into the journal.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The channels that every device of the fleet has, in the order of the columns.
    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// Returns what was guessed about a recording and what could not be taken of it, a line each.
    pub fn notes(&self) -> &[String] {
        self.replay.as_ref().map_or(&[], Replay::notes)
    }

    /// Returns how many frames all devices send, if something limits them.
    pub fn frames(&self) -> Option<u64> {
        (0..self.plan.devices)
            .map(|device| self.frames_of(device))
            .sum()
    }

    /// Returns how many frames a device sends, if something limits them.
    fn frames_of(&self, device: u32) -> Option<u64> {
        let recorded = self.replay.as_ref().map(|replay| replay.frames(device));
        [self.plan.frames, recorded].into_iter().flatten().min()
    }

    /// Returns the name of a device: its number, or what a recording calls it if that has all of them.
    fn name_of(&self, device: u32) -> String {
        let prefix = &self.plan.name_prefix;
        match self.naming().and_then(|replay| replay.id(device)) {
            Some(id) => format!("{prefix}{id}"),
            None => format!("{prefix}{device:05}"),
        }
    }

    /// Returns the number of the device of a name, if there is one.
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

    /// What one device sends. `index` counts from 0 and is below the plan's number of devices.
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
            // 63 bits, as SQL has no unsigned integers of 64.
            stream: (hash::at(drawn, 0) >> 1).max(1),
            boot: (hash::at(drawn, 1) >> 32) as u32,
            uptime_us: hash::between(hash::at(drawn, 2), 60_000_000, 30 * 86_400_000_000),
            signals,
            script: Arc::clone(self),
        }
    }
}

const DEVICE: u64 = u64::from_be_bytes(*b"device\0\0");

/// What one device is and sends.
#[derive(Clone, Debug)]
pub struct DeviceScript {
    index: u32,
    name: String,
    stream: u64,
    boot: u32,
    /// How long it had been on when sample 0 was taken.
    uptime_us: i64,
    signals: Vec<Signal>,
    script: Arc<Script>,
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FrameContent<'a> {
    /// Readings to be stored.
    Readings(&'a Readings),
    /// A frame that must be stored in quarantine.
    Malformed {
        /// What is to be broken.
        variant: Malformation,
        /// What the frame would have held, to be encoded and then broken.
        readings: &'a Readings,
    },
}

impl DeviceScript {
    /// Number of the device in the fleet, from 0.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Returns how many frames it sends, if something limits them.
    pub fn frames(&self) -> Option<u64> {
        self.script.frames_of(self.index)
    }

    /// Name under which it logs in.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of its stream, from 1 to 2^63 - 1.
    pub fn stream(&self) -> u64 {
        self.stream
    }

    /// Number of its boot.
    pub fn boot(&self) -> u32 {
        self.boot
    }

    /// Which time it knows.
    pub fn clock(&self) -> Clock {
        self.script.plan.clock
    }

    /// How long it has been on at a moment, in microseconds: what its own clock shows, if it does not
    /// know the time of day.
    pub fn uptime_us(&self, utc_us: i64) -> i64 {
        utc_us.wrapping_add(self.boot_offset_us())
    }

    /// Makes frame `seq`, counted from 1; `None`, if the device sends no such frame.
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
        // No run comes to where this wraps; a journal that claims so must not stop the verifier.
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

    /// From UTC to the clock that the device knows.
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
