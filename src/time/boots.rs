//! Converts a device's time since boot to UTC, with the measured clock of each boot or, for a boot
//! that was never measured, a chosen one.

use serde::{Deserialize, Serialize};

use super::{Now, Origin};

/// Origin of a frame's UTC times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Quality {
    /// The device sent plausible UTC times.
    Utc = 0,
    /// Time since boot, converted with the measured offset of that boot.
    Anchored = 1,
    /// Time since a boot whose offset was never measured; one offset was chosen for the whole boot.
    Unanchored = 2,
    /// The device's time is implausible; stored as sent, or with an offset that does not match it.
    Suspect = 3,
}

/// A boot's clock relative to UTC: `utc = device time since boot + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootClock {
    pub boot: u32,
    /// Microseconds to add to time since boot.
    pub offset_us: i64,
    /// Round-trip time of the measurement: the offset error is at most half of this. [`UNMEASURED`]
    /// if there was no measurement.
    pub delay_us: u64,
    /// Time of the measurement, microseconds UTC.
    pub measured_at_us: i64,
    /// The gateway's clock at that time.
    pub origin: Origin,
    /// The first time since boot to which the clock applies; above 0 if the device's time went
    /// back.
    pub valid_from_us: i64,
}

/// Delay of a clock that was chosen, not measured (R74).
pub const UNMEASURED: u64 = i64::MAX as u64;

/// Assumed growth of a measurement's error with age: 50 microseconds of delay per second. As a
/// delay is twice the error, this corresponds to a crystal error of 25 ppm.
const DRIFT_DIVISOR: u64 = 20_000;
/// Largest drift of a usable crystal, as a fraction of the age: two measurements of one boot that
/// differ by more are not of the same clock.
const DRIFT_MAX_DIVISOR: u64 = 2_000;
/// Difference of two measurements that is always accepted.
const AGREEMENT_US: u64 = 10_000;
/// How far a device's time may go back before it counts as a wrap or a restart: between two
/// measurements, and between two frames. The limit for frames is higher, because a frame that was
/// filled slowly is numbered after newer ones.
const BACKWARD_MAX_US: i64 = 10_000_000;
const BACKWARD_FRAME_MAX_US: i64 = 1_800_000_000;
/// Period of a 32-bit counter of microseconds. The period of a millisecond counter is a thousand
/// times as long.
const WRAP_US: i64 = 1 << 32;
/// How far an anchored row may be ahead of its receipt before its offset is considered wrong.
const ANCHORED_AHEAD_US: i64 = 60_000_000;

/// UTC before this comes from a clock that was never set: 2020-01-01T00:00:00Z.
const UTC_PLAUSIBLE_FROM_US: i64 = 1_577_836_800_000_000;
/// UTC more than a day ahead of its receipt comes from a wrong clock.
const UTC_PLAUSIBLE_AHEAD_US: i64 = 86_400_000_000;

/// Maximum number of boots without a measured clock per session. Frames arrive in the order of
/// boots.
const CHOSEN_MAX: usize = 8;

impl BootClock {
    /// Measures a round trip that started at the gateway and ended there at `now`, `elapsed_us`
    /// later. The device received at `device_received_us` and sent at `device_sent_us`, both in its
    /// time since boot.
    /// Returns `None` if such a round trip is impossible.
    pub fn measure(
        boot: u32,
        elapsed_us: i64,
        device_received_us: u64,
        device_sent_us: u64,
        now: Now,
    ) -> Option<BootClock> {
        let held_us = i64::try_from(device_sent_us.checked_sub(device_received_us)?).ok()?;
        let delay_us = u64::try_from(elapsed_us.checked_sub(held_us)?).ok()?;
        let half_us = (delay_us / 2) as i64;
        let offset_us = now.utc_us - half_us - i64::try_from(device_sent_us).ok()?;
        Some(BootClock {
            boot,
            offset_us,
            delay_us,
            measured_at_us: now.utc_us,
            origin: now.origin,
            valid_from_us: 0,
        })
    }

    /// Returns the device's time since boot at the measurement.
    fn device_us(&self) -> i64 {
        let half_us = (self.delay_us / 2) as i64;
        (self.measured_at_us.saturating_sub(half_us)).saturating_sub(self.offset_us)
    }

    fn is_measured(&self) -> bool {
        self.delay_us != UNMEASURED
    }

    /// Returns the same clock relative to the gateway's clock of `origin`: adds a step since the
    /// measurement.
    #[must_use]
    pub fn corrected(self, origin: Origin) -> BootClock {
        let step_us = self.origin.step_to(origin);
        if step_us == 0 {
            return self;
        }
        BootClock {
            offset_us: self.offset_us.saturating_add(step_us),
            measured_at_us: self.measured_at_us.saturating_add(step_us),
            origin,
            ..self
        }
    }

    /// Returns the clock of a boot after the measurement `newer`; `None` if it stays the same
    /// (R73).
    pub fn replaced_by(&self, newer: &BootClock) -> Option<BootClock> {
        let kept = self.corrected(newer.origin);
        let went_back = kept.is_measured()
            && newer.device_us() < kept.device_us().saturating_sub(BACKWARD_MAX_US);
        let valid_from_us = match went_back || kept.has_wrapped_by(newer) {
            true => newer.device_us(),
            false => kept.valid_from_us,
        };
        let replacement = BootClock {
            valid_from_us,
            ..*newer
        };
        (went_back || kept.is_contradicted_by(newer) || kept.is_beaten_by(newer))
            .then_some(replacement)
    }

    /// Returns whether the device's time was reset by one or more wraps of a 32-bit counter of
    /// microseconds or milliseconds.
    fn has_wrapped_by(&self, newer: &BootClock) -> bool {
        let lost_us = newer.offset_us.saturating_sub(self.offset_us);
        let over_us = lost_us.rem_euclid(WRAP_US);
        let apart_us = over_us.min(WRAP_US - over_us).unsigned_abs();
        lost_us > WRAP_US / 2 && self.is_measured() && apart_us <= self.disagreement_max_us(newer)
    }

    /// Returns whether `newer` is the better measurement of the same clock.
    fn is_beaten_by(&self, newer: &BootClock) -> bool {
        let age_us = newer.measured_at_us.saturating_sub(self.measured_at_us);
        let growth_us = age_us.max(0) as u64 / DRIFT_DIVISOR;
        newer.delay_us <= self.delay_us.saturating_add(growth_us)
    }

    /// Returns whether the two contradict each other: the gateway's clock was set between them, or
    /// the device's clock is a different one.
    fn is_contradicted_by(&self, newer: &BootClock) -> bool {
        self.offset_us.abs_diff(newer.offset_us) > self.disagreement_max_us(newer)
    }

    /// Returns the maximum difference between two measurements of one clock.
    fn disagreement_max_us(&self, newer: &BootClock) -> u64 {
        let age_us = newer.measured_at_us.saturating_sub(self.measured_at_us);
        let errors_us = (self.delay_us / 2).saturating_add(newer.delay_us / 2);
        let drift_us = age_us.unsigned_abs() / DRIFT_MAX_DIVISOR;
        errors_us.saturating_add(drift_us.saturating_add(AGREEMENT_US))
    }
}

/// Conversion of device time to UTC: device time = resolved time - `offset_us`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedTime {
    /// Microseconds added to the device's time; 0 if the device sent UTC.
    pub offset_us: i64,
    pub quality: Quality,
}

/// Origin of a frame's time, for [`BootClocks::advance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The boot; `None` for a frame with UTC times.
    pub boot: Option<u32>,
    /// Time of the newest row, in the device's own time.
    pub newest_us: i64,
    pub time: ResolvedTime,
    /// A clock chosen for a boot without one, to be stored with the frame.
    pub chosen: Option<BootClock>,
}

/// The clocks of a device's boots, and its latest time.
#[derive(Clone, Debug, Default)]
pub struct BootClocks {
    clocks: Vec<BootClock>,
    /// The current boot of this session, whose clock is measured repeatedly.
    present: Option<u32>,
    /// Latest time in the boot of the latest frame.
    latest: Option<Progress>,
    /// The newest reliable time of a frame in this session, microseconds UTC.
    alive_us: Option<i64>,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    boot: u32,
    newest_us: i64,
    /// The time went back, and no measurement has been made since.
    is_back: bool,
}

impl BootClocks {
    pub fn new(clocks: Vec<BootClock>) -> BootClocks {
        BootClocks {
            clocks,
            ..BootClocks::default()
        }
    }

    /// Returns the clocks for a session whose current boot is `present`.
    #[must_use]
    pub fn of_session(self, present: u32) -> BootClocks {
        BootClocks {
            present: Some(present),
            ..self
        }
    }

    fn find(&self, boot: u32) -> Option<&BootClock> {
        self.clocks.iter().find(|clock| clock.boot == boot)
    }

    /// Applies a measurement; returns the clock to store for its boot if that changes.
    pub fn improve(&mut self, measured: BootClock) -> Option<BootClock> {
        // Forgets the latest time of the boot, so that its check starts again.
        self.latest.take_if(|latest| latest.boot == measured.boot);
        let place = { self.clocks.iter() }.position(|clock| clock.boot == measured.boot);
        let better = match place {
            Some(place) => self.clocks[place].replaced_by(&measured)?,
            None => measured,
        };
        match place {
            Some(place) => self.clocks[place] = better,
            None => self.clocks.push(better),
        }
        Some(better)
    }

    /// Converts times since `boot` to UTC, for a frame with rows from `oldest_us` to `newest_us`,
    /// received at `now`. The second value is a clock that was chosen for a boot without one.
    pub fn resolve_boot(
        &self,
        boot: u32,
        (oldest_us, newest_us): (i64, i64),
        received_at_us: i64,
        origin: Origin,
    ) -> (ResolvedTime, Option<BootClock>) {
        let (clock, chosen) = match self.find(boot) {
            Some(clock) => (clock.corrected(origin), None),
            None => {
                let chosen = self.choose(boot, newest_us, received_at_us, origin);
                (chosen, Some(chosen))
            }
        };
        let ahead_us = newest_us
            .saturating_add(clock.offset_us)
            .saturating_sub(received_at_us);
        let age_us = received_at_us.saturating_sub(clock.measured_at_us);
        let ahead_max_us = match clock.is_measured() {
            true => ANCHORED_AHEAD_US + age_us.max(0) / DRIFT_MAX_DIVISOR as i64,
            false => UTC_PLAUSIBLE_AHEAD_US,
        };
        let is_doubtful = ahead_us > ahead_max_us
            || oldest_us < clock.valid_from_us
            || self.went_back(boot, newest_us);
        let quality = match (is_doubtful, clock.is_measured()) {
            (true, _) => Quality::Suspect,
            (false, true) => Quality::Anchored,
            (false, false) => Quality::Unanchored,
        };
        let time = ResolvedTime {
            offset_us: clock.offset_us,
            quality,
        };
        (time, chosen)
    }

    /// Returns whether a boot's time went back further than the order of frames explains: a counter
    /// wrapped.
    fn went_back(&self, boot: u32, newest_us: i64) -> bool {
        let latest = self.latest.filter(|latest| latest.boot == boot);
        latest.is_some_and(|latest| {
            latest.is_back || newest_us < latest.newest_us.saturating_sub(BACKWARD_FRAME_MAX_US)
        })
    }

    /// Chooses a clock for a boot that was never measured (R74): the boot began when the device was
    /// last known to be running. If that is unknown or too late, the newest row is assumed to have
    /// been measured at receipt.
    fn choose(&self, boot: u32, newest_us: i64, received_at_us: i64, origin: Origin) -> BootClock {
        let latest_start_us = received_at_us.saturating_sub(newest_us);
        let measured = self.clocks.iter().filter(|clock| {
            clock.is_measured() && clock.boot != boot && Some(clock.boot) != self.present
        });
        let alive_us = measured.map(|clock| clock.corrected(origin).measured_at_us);
        let alive_us = alive_us.chain(self.alive_us);
        let offset_us = alive_us
            .filter(|alive_us| *alive_us <= latest_start_us)
            .max();
        let offset_us = offset_us.unwrap_or(latest_start_us);
        BootClock {
            boot,
            offset_us,
            delay_us: UNMEASURED,
            // Ordered by the time of its newest row: it is older than a measurement made now.
            measured_at_us: offset_us.saturating_add(newest_us),
            origin,
            valid_from_us: 0,
        }
    }

    /// Records the time of an accepted frame.
    pub fn advance(&mut self, stamp: &Stamp) {
        if let Some(chosen) = stamp.chosen {
            let is_chosen = |clock: &&BootClock| !clock.is_measured();
            if self.clocks.iter().filter(is_chosen).count() >= CHOSEN_MAX
                && let Some(oldest) = self.clocks.iter().position(|clock| is_chosen(&clock))
            {
                self.clocks.remove(oldest);
            }
            self.clocks.push(chosen);
        }
        if let Some(boot) = stamp.boot {
            let is_back = self.went_back(boot, stamp.newest_us);
            let before = self.latest.filter(|latest| latest.boot == boot);
            let newest_us = match before {
                Some(before) if !is_back => before.newest_us.max(stamp.newest_us),
                _ => stamp.newest_us,
            };
            self.latest = Some(Progress {
                boot,
                newest_us,
                is_back,
            });
        }
        if stamp.time.quality != Quality::Suspect {
            let newest_us = stamp.newest_us.saturating_add(stamp.time.offset_us);
            self.alive_us = self.alive_us.max(Some(newest_us));
        }
    }
}

/// Returns the quality of a device's own UTC, for a frame with rows from `oldest_us` to
/// `newest_us`.
pub fn resolve_utc(oldest_us: i64, newest_us: i64, received_at_us: i64) -> ResolvedTime {
    let is_plausible = oldest_us >= UTC_PLAUSIBLE_FROM_US
        && newest_us <= received_at_us.saturating_add(UTC_PLAUSIBLE_AHEAD_US);
    let quality = if is_plausible {
        Quality::Utc
    } else {
        Quality::Suspect
    };
    ResolvedTime {
        offset_us: 0,
        quality,
    }
}

#[cfg(test)]
mod tests;
