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
    /// The device's boot number.
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
    /// Quality of the result.
    pub quality: Quality,
}

/// Origin of a frame's time, for [`BootClocks::advance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The boot; `None` for a frame with UTC times.
    pub boot: Option<u32>,
    /// Time of the newest row, in the device's own time.
    pub newest_us: i64,
    /// Conversion to UTC.
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
    /// Creates the clocks from those in a store.
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
mod tests {
    use super::*;

    const HOUR_US: i64 = 3_600_000_000;
    const NOON_US: i64 = 1_700_000_000_000_000;

    fn now(utc_us: i64) -> Now {
        Now {
            mono_us: 0,
            utc_us,
            origin: Origin::default(),
        }
    }

    fn set_by(step_us: i64) -> Origin {
        Origin {
            timeline: 7,
            at_us: NOON_US + step_us,
        }
    }

    fn clock(boot: u32, offset_us: i64, delay_us: u64, measured_at_us: i64) -> BootClock {
        BootClock {
            boot,
            offset_us,
            delay_us,
            measured_at_us,
            origin: Origin::default(),
            valid_from_us: 0,
        }
    }

    fn resolve(
        clocks: &mut BootClocks,
        boot: u32,
        newest_us: i64,
        received_at_us: i64,
    ) -> ResolvedTime {
        let rows = (newest_us, newest_us);
        let (time, chosen) = clocks.resolve_boot(boot, rows, received_at_us, Origin::default());
        clocks.advance(&Stamp {
            boot: Some(boot),
            newest_us,
            time,
            chosen,
        });
        time
    }

    #[test]
    fn a_round_trip_gives_offset_and_delay() {
        // True offset 1,000,000; 300 us in each direction; the device takes 50 us to reply.
        let clock = BootClock::measure(7, 650, 300, 350, now(1_000_650)).unwrap();
        assert_eq!((clock.offset_us, clock.delay_us), (1_000_000, 600));
        assert_eq!(clock.device_us(), 350);
    }

    #[test]
    fn an_impossible_round_trip_measures_nothing() {
        assert_eq!(BootClock::measure(7, 1_000, 500, 400, now(2_000)), None);
        assert_eq!(BootClock::measure(7, 1_000, 0, 5_000, now(2_000)), None);
        assert_eq!(BootClock::measure(7, -1_000, 0, 0, now(1_000)), None);
    }

    /// The numbers of R73.
    #[test]
    fn the_exchange_with_the_least_delay_is_kept_until_50_ppm_of_its_age_exceed_it() {
        let kept = clock(1, 5, 10_000, NOON_US);
        let newer = |delay_us, age_us| clock(1, 5, delay_us, NOON_US + age_us);
        let holds = |newer: BootClock| kept.replaced_by(&newer).is_none();
        assert!(!holds(newer(10_000, 0)) && !holds(newer(9_000, 0)));
        assert!(holds(newer(13_000, 59_000_000)) && !holds(newer(13_000, 60_000_000)));
        assert!(holds(newer(50_000, 799_000_000)) && !holds(newer(50_000, 800_000_000)));
    }

    /// A step that no gateway observed: between two runs, or on another gateway.
    #[test]
    fn a_contradicting_measurement_replaces_the_kept_one_at_any_delay() {
        let kept = clock(1, NOON_US, 1_000, NOON_US + HOUR_US);
        for (newer, replaces) in [
            // The gateway's clock was 2 h ahead and was set back, or the reverse, or it was at
            // 1970.
            (
                clock(
                    1,
                    NOON_US - 2 * HOUR_US,
                    900_000,
                    NOON_US - HOUR_US + 60_000_000,
                ),
                true,
            ),
            (
                clock(
                    1,
                    NOON_US + 2 * HOUR_US,
                    900_000,
                    NOON_US + 3 * HOUR_US + 60_000_000,
                ),
                true,
            ),
            (clock(1, 60_000_000, 900_000, HOUR_US + 120_000_000), true),
            // Neither the error of a slow exchange nor the drift of a crystal is a contradiction.
            (
                clock(
                    1,
                    NOON_US + 449_000,
                    900_000,
                    NOON_US + HOUR_US + 60_000_000,
                ),
                false,
            ),
            (
                clock(1, NOON_US + 30_000, 20_000, NOON_US + HOUR_US + 60_000_000),
                false,
            ),
        ] {
            assert_eq!(
                kept.replaced_by(&newer),
                replaces.then_some(newer),
                "{newer:?}"
            );
        }
    }

    #[test]
    fn measurements_before_a_step_are_corrected() {
        let before = BootClock {
            origin: set_by(2 * HOUR_US),
            ..clock(1, NOON_US + 2 * HOUR_US, 1_000, NOON_US + 3 * HOUR_US)
        };
        let clocks = BootClocks::new(vec![before]);
        let at_us = NOON_US + HOUR_US;
        let (time, chosen) = clocks.resolve_boot(1, (HOUR_US, HOUR_US), at_us, set_by(0));
        assert_eq!(
            (time.offset_us, time.quality, chosen),
            (NOON_US, Quality::Anchored, None)
        );
        // Noise between two readings of the clocks is not a step.
        let (time, _) = clocks.resolve_boot(1, (0, 0), at_us, set_by(2 * HOUR_US + 900));
        assert_eq!(time.offset_us, NOON_US + 2 * HOUR_US);
        // It agrees with the measurement after the step, so the one with the smaller delay is used.
        let worse = BootClock {
            origin: set_by(0),
            ..clock(1, NOON_US + 100_000, 900_000, at_us)
        };
        assert_eq!(before.replaced_by(&worse), None);
    }

    /// A 32-bit counter of milliseconds wraps after 49.7 days, of microseconds after 71 minutes.
    #[test]
    fn a_counter_that_wraps_within_a_boot_anchors_nothing_in_the_past() {
        for period_us in [WRAP_US, 1000 * WRAP_US] {
            let up_us = period_us - 60_000_000;
            let known = clock(1, NOON_US, 1_000, NOON_US + up_us);
            let mut clocks = BootClocks::new(vec![known]).of_session(1);
            let anchored = resolve(&mut clocks, 1, up_us, NOON_US + up_us);
            assert_eq!(anchored.quality, Quality::Anchored);
            for after_us in [0, 60_000_000, period_us / 8] {
                let received_at_us = NOON_US + period_us + after_us;
                let wrapped = resolve(&mut clocks, 1, after_us, received_at_us);
                assert_eq!(wrapped.quality, Quality::Suspect, "{after_us}");
            }
            // The next PING measures it; older times may belong to either period.
            let (at_us, offset_us) = (period_us / 4, NOON_US + period_us);
            let measured = clock(1, offset_us, 500_000, offset_us + at_us + 250_000);
            let kept = clocks.improve(measured).expect("replaces");
            assert_eq!(kept.valid_from_us, at_us);
            let received_at_us = offset_us + at_us + 1_000_000;
            let live = resolve(&mut clocks, 1, at_us + 1, received_at_us);
            assert_eq!(
                (live.offset_us, live.quality),
                (offset_us, Quality::Anchored)
            );
            let older = resolve(&mut clocks, 1, at_us / 2, received_at_us);
            assert_eq!(older.quality, Quality::Suspect);
        }
    }

    /// A device that was unreachable while its counter wrapped shows a later time than before.
    #[test]
    fn a_counter_that_wrapped_while_unreachable_is_detected() {
        let kept = clock(1, NOON_US, 1_000, NOON_US + 60_000_000);
        for rounds in [1, 20, 1000] {
            let offset_us = NOON_US + rounds * WRAP_US + 1_000_000;
            let newer = clock(1, offset_us, 3_000_000, offset_us + 600_000_000);
            let replacement = kept.replaced_by(&newer).expect("contradicts");
            assert_eq!(replacement.valid_from_us, newer.device_us());
        }
    }

    #[test]
    fn a_row_far_ahead_of_its_receipt_is_not_anchored() {
        let mut clocks = BootClocks::new(vec![clock(1, NOON_US, 1_000, NOON_US)]);
        let mut quality = |newest_us| resolve(&mut clocks, 1, newest_us, NOON_US + HOUR_US).quality;
        assert_eq!(quality(HOUR_US + 59_000_000), Quality::Anchored);
        assert_eq!(quality(HOUR_US + 70_000_000), Quality::Suspect);
    }

    /// A slowly filled frame gets its number after newer ones.
    #[test]
    fn frames_of_other_channels_may_be_older() {
        let mut clocks = BootClocks::new(vec![clock(1, NOON_US, 1_000, NOON_US)]);
        for newest_us in [HOUR_US, HOUR_US / 2 + 1, HOUR_US + 1] {
            let time = resolve(&mut clocks, 1, newest_us, NOON_US + 2 * HOUR_US);
            assert_eq!(time.quality, Quality::Anchored);
        }
    }

    #[test]
    fn a_boot_without_a_clock_has_one_offset() {
        // Nothing is known about the device: the newest row of the first frame gets the time of
        // receipt.
        let mut clocks = BootClocks::new(vec![clock(2, NOON_US, 1_000, NOON_US)]).of_session(2);
        for hour in 1..=6 {
            let time = resolve(&mut clocks, 1, hour * HOUR_US, NOON_US + hour);
            assert_eq!(time.offset_us, NOON_US + 1 - HOUR_US, "{hour}");
            assert_eq!(time.quality, Quality::Unanchored);
        }
        // A time more than a day ahead is suspect, but keeps its offset.
        let time = resolve(&mut clocks, 1, 30 * HOUR_US, NOON_US);
        assert_eq!(
            (time.offset_us, time.quality),
            (NOON_US + 1 - HOUR_US, Quality::Suspect)
        );
    }

    #[test]
    fn a_boot_without_a_clock_begins_when_the_device_was_last_alive() {
        let known = vec![
            clock(9, NOON_US, 1_000, NOON_US + HOUR_US),
            clock(5, NOON_US - 41 * HOUR_US, 1_000, NOON_US - 40 * HOUR_US),
        ];
        let mut clocks = BootClocks::new(known).of_session(9);
        let received_at_us = NOON_US + HOUR_US;
        // A frame of the previous boot gives a later time than its measurement.
        let alive_us = NOON_US - 39 * HOUR_US;
        let time = resolve(&mut clocks, 5, 2 * HOUR_US, received_at_us);
        assert_eq!(
            (time.offset_us, time.quality),
            (NOON_US - 41 * HOUR_US, Quality::Anchored)
        );
        assert_eq!(
            resolve(&mut clocks, 6, HOUR_US, received_at_us).offset_us,
            alive_us
        );
        assert_eq!(
            resolve(&mut clocks, 6, 2 * HOUR_US, received_at_us).offset_us,
            alive_us
        );
        // The next boot begins where the previous one ended.
        let time = resolve(&mut clocks, 7, HOUR_US, received_at_us);
        assert_eq!(time.offset_us, alive_us + 2 * HOUR_US);
        // A boot that does not fit between then and now ends now.
        let time = resolve(&mut clocks, 8, 100 * HOUR_US, received_at_us);
        assert_eq!(time.offset_us, received_at_us - 100 * HOUR_US);
    }

    #[test]
    fn boots_without_a_clock_are_bounded() {
        let mut clocks = BootClocks::new(vec![clock(0, NOON_US, 1_000, NOON_US)]).of_session(0);
        for boot in 1..1_000 {
            resolve(&mut clocks, boot, 1, NOON_US);
        }
        assert_eq!(clocks.clocks.len(), 1 + CHOSEN_MAX);
        assert!(clocks.find(0).is_some() && clocks.find(999).is_some());
    }

    /// The published test vectors.
    #[test]
    fn times_are_resolved_as_the_vectors_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/protocol/vectors/times.json");
        let text = std::fs::read_to_string(path).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        let number = |of: &serde_json::Value, key: &str| of[key].as_i64().expect("a number");
        let of = |clock: &serde_json::Value| {
            let [offset_us, delay_us, measured_at_us] =
                ["offset_us", "delay_us", "measured_at_us"].map(|key| number(clock, key));
            let boot = number(clock, "boot") as u32;
            self::clock(boot, offset_us, delay_us.unsigned_abs(), measured_at_us)
        };
        for case in file["cases"].as_array().unwrap() {
            let known = case["known"].as_array().unwrap().iter().map(of);
            let present = number(case, "present_boot") as u32;
            let mut clocks = BootClocks::new(known.collect()).of_session(present);
            for step in case["steps"].as_array().unwrap() {
                if step["measured"].is_object() {
                    let measured = of(&step["measured"]);
                    clocks.improve(measured);
                    let kept = clocks.find(measured.boot).expect("kept");
                    assert_eq!(kept.offset_us, number(step, "offset_us"), "{}", case["id"]);
                    continue;
                }
                let frame = &step["frame"];
                let rows = (number(frame, "oldest_us"), number(frame, "newest_us"));
                let received_at_us = number(frame, "received_us");
                let boot = frame["boot"].as_u64().map(|boot| boot as u32);
                let (time, chosen) = match boot {
                    Some(boot) => clocks.resolve_boot(boot, rows, received_at_us, Origin::NONE),
                    None => (resolve_utc(rows.0, rows.1, received_at_us), None),
                };
                clocks.advance(&Stamp {
                    boot,
                    newest_us: rows.1,
                    time,
                    chosen,
                });
                let quality = serde_json::to_value(time.quality).unwrap();
                let expected = (&step["offset_us"], &step["quality"]);
                let found = (&serde_json::Value::from(time.offset_us), &quality);
                assert_eq!(found, expected, "{}: {step}", case["id"]);
            }
        }
    }

    #[test]
    fn implausible_utc_is_suspect_and_kept() {
        let now_us = 1_700_000_000_000_000;
        assert_eq!(resolve_utc(now_us, now_us, now_us).quality, Quality::Utc);
        assert_eq!(resolve_utc(0, 5, now_us).quality, Quality::Suspect);
        let ahead_us = now_us + UTC_PLAUSIBLE_AHEAD_US + 1;
        assert_eq!(
            resolve_utc(now_us, ahead_us, now_us).quality,
            Quality::Suspect
        );
    }
}
