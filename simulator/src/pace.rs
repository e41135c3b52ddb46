//! Due time of each frame of each device, for every profile.
//!
//! Pure arithmetic in microseconds since the start of the run. The fleet waits, connects, and handles
//! devices that fall behind.
//!
//! Invariants: the frames of a device are due in the order of their numbers. Except in a burst, every
//! device sends `batch` rows every `interval * batch`.

use crate::plan::{Plan, Profile};

/// Length of the outage before a run in [`Profile::Burst`], in microseconds: 30 days.
pub const CUT_OFF_US: u64 = 30 * 86_400_000_000;
/// Interval at which the whole fleet reconnects in [`Profile::Storm`], in microseconds.
pub const STORM_US: u64 = 10_000_000;

/// Timetable of a run.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    profile: Profile,
    devices: u64,
    /// Time between two frames of a device.
    period_us: u64,
    /// Time during which devices join in [`Profile::Ramp`].
    ramp_us: u64,
}

impl Pace {
    /// Returns the timetable of a plan for a run of `duration_us`, which may be an estimate.
    pub fn new(plan: &Plan, duration_us: u64) -> Self {
        Self {
            profile: plan.profile,
            devices: u64::from(plan.devices.max(1)),
            period_us: plan.interval_us.saturating_mul(u64::from(plan.batch)),
            ramp_us: duration_us / 2,
        }
    }

    /// Returns when frame `seq`, counted from 1, of a device is due, since the start of the run. A
    /// device connects when its frame 1 is due.
    pub fn due_us(&self, device: u32, seq: u64) -> u64 {
        if self.profile == Profile::Burst {
            return 0;
        }
        self.join_us(device)
            .saturating_add((seq - 1).saturating_mul(self.period_us))
    }

    /// Returns whether frames are due at fixed times, however long the gateway takes for earlier ones.
    pub fn is_open_loop(&self) -> bool {
        self.profile != Profile::Burst
    }

    /// Returns when the fleet drops its connections for the `number`-th time, counted from 1; `None` in
    /// most profiles.
    pub fn storm_us(&self, number: u64) -> Option<u64> {
        (self.profile == Profile::Storm).then(|| number.saturating_mul(STORM_US))
    }

    /// Returns how long before the start of the run sample 0 was taken, so that no frame is due before its
    /// last sample: the devices start with a corresponding backlog.
    pub fn backlog_us(&self) -> u64 {
        match self.profile {
            Profile::Burst => CUT_OFF_US,
            _ => self.period_us,
        }
    }

    fn join_us(&self, device: u32) -> u64 {
        let spread_us = match self.profile {
            Profile::Steady | Profile::Storm => self.period_us,
            Profile::Burst => 0,
            Profile::Ramp => self.ramp_us,
        };
        // In 128 bits, because a day times 1,024 rows times 100,000 devices exceeds 64.
        (u128::from(spread_us) * u128::from(device) / u128::from(self.devices)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Clock, FORMAT};

    fn pace(profile: Profile) -> Pace {
        let plan = Plan {
            format: FORMAT,
            seed: 1,
            nonce: 2,
            name_prefix: String::new(),
            devices: 10,
            channels: 1,
            interval_us: 100,
            batch: 10,
            frames: None,
            clock: Clock::Utc,
            start_us: 0,
            profile,
            malformed_billionths: 0,
            replay: None,
        };
        Pace::new(&plan, 60_000)
    }

    fn due(profile: Profile, cases: [(u32, u64); 4]) -> [u64; 4] {
        cases.map(|(device, seq)| pace(profile).due_us(device, seq))
    }

    #[test]
    fn every_profile_has_its_timetable() {
        let cases = [(0, 1), (9, 1), (0, 2), (9, 12)];
        assert_eq!(due(Profile::Steady, cases), [0, 900, 1_000, 11_900]);
        assert_eq!(due(Profile::Storm, cases), [0, 900, 1_000, 11_900]);
        assert_eq!(due(Profile::Burst, cases), [0, 0, 0, 0]);
        assert_eq!(due(Profile::Ramp, cases), [0, 27_000, 1_000, 38_000]);
    }

    #[test]
    fn only_a_storm_drops_connections() {
        assert_eq!(pace(Profile::Storm).storm_us(3), Some(30_000_000));
        assert_eq!(pace(Profile::Steady).storm_us(3), None);
    }

    #[test]
    fn no_frame_is_due_before_its_last_sample() {
        for profile in [
            Profile::Steady,
            Profile::Burst,
            Profile::Ramp,
            Profile::Storm,
        ] {
            let pace = pace(profile);
            for seq in 1..100 {
                let last_sample_us = (seq * 10 - 1) * 100;
                assert!(
                    pace.due_us(0, seq) + pace.backlog_us() >= last_sample_us,
                    "{profile:?} {seq}"
                );
            }
        }
    }
}
