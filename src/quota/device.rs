//! How much a device may send in a while, in whichever of its sessions: one that connects again owes what it
//! has sent before.
//!
//! Invariant: those are remembered that are connected or owe something, and at most as many again, or 1,024 in
//! all. Whoever owes nothing is as good as new.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::quota::rate::{Meter, Rate};
use crate::store::DeviceId;

/// Fewer are not worth looking through.
const TIDY_AT_MIN: usize = 1024;

/// Of each device: one notice a minute, ten at once.
const NOTICES: Rate = Rate {
    per_s: 1,
    burst: 10 * NOTICE,
};
const NOTICE: u64 = 60;

/// What each device may send.
#[derive(Debug)]
pub struct Allowances {
    frames: Rate,
    readings: Rate,
    devices: Mutex<Devices>,
}

#[derive(Debug)]
struct Devices {
    known: HashMap<DeviceId, Arc<Allowance>>,
    /// When there are so many, those that need not be remembered are forgotten.
    tidy_at: usize,
}

/// What one device may send.
#[derive(Debug)]
pub struct Allowance {
    frames: Rate,
    readings: Rate,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    frames: Meter,
    readings: Meter,
    notices: Meter,
}

impl Default for Allowances {
    fn default() -> Allowances {
        let frames = Rate {
            per_s: 20_000,
            burst: 200_000,
        };
        let readings = Rate {
            per_s: 250_000,
            burst: 2_000_000,
        };
        Allowances::new(frames, readings)
    }
}

impl Allowances {
    /// So many frames of any kind, and so many readings, for each.
    pub fn new(frames: Rate, readings: Rate) -> Allowances {
        Allowances {
            frames,
            readings,
            devices: Mutex::new(Devices {
                known: HashMap::new(),
                tidy_at: TIDY_AT_MIN,
            }),
        }
    }

    /// That of a device which has just been admitted.
    pub fn of(&self, device: DeviceId, now_us: u64) -> Arc<Allowance> {
        let mut devices = lock(&self.devices);
        if devices.known.len() >= devices.tidy_at {
            devices
                .known
                .retain(|_, allowance| Arc::strong_count(allowance) > 1 || allowance.owes(now_us));
            devices.tidy_at = TIDY_AT_MIN.max(2 * devices.known.len());
        }
        let allowance = devices.known.entry(device).or_insert_with(|| {
            Arc::new(Allowance {
                frames: self.frames,
                readings: self.readings,
                used: Mutex::default(),
            })
        });
        Arc::clone(allowance)
    }
}

impl Allowance {
    /// Counts frames and readings that have come; gives the moment from which on more may come.
    pub fn spend(&self, frames: u64, readings: u64, now_us: u64) -> u64 {
        let mut used = lock(&self.used);
        let next_us = used.frames.spend(self.frames, frames, now_us);
        next_us.max(used.readings.spend(self.readings, readings, now_us))
    }

    /// Whether the operator is to hear of something that the device did wrong: a few times at once, and then
    /// once a minute, in whichever session.
    pub fn may_tell(&self, now_us: u64) -> bool {
        let used = &mut *lock(&self.used);
        let mut notices = used.notices;
        let has_room = notices.spend(NOTICES, NOTICE, now_us) <= now_us;
        if has_room {
            used.notices = notices;
        }
        has_room
    }

    fn owes(&self, now_us: u64) -> bool {
        let used = lock(&self.used);
        [used.frames, used.readings, used.notices]
            .iter()
            .any(|meter| meter.owes(now_us))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowances() -> Allowances {
        let rate = |per_s, burst| Rate { per_s, burst };
        Allowances::new(rate(10, 20), rate(100, 200))
    }

    #[test]
    fn the_scarcer_of_both_counts() {
        let pump = allowances().of(DeviceId(1), 0);
        assert_eq!(pump.spend(1, 200, 0), 0);
        assert_eq!(pump.spend(1, 50, 0), 500_000);
        assert_eq!(pump.spend(28, 0, 0), 1_000_000);
    }

    #[test]
    fn a_device_that_comes_back_owes_what_it_has_sent() {
        let allowances = allowances();
        let pump = DeviceId(1);
        assert_eq!(allowances.of(pump, 0).spend(20, 250, 0), 500_000);
        assert_eq!(allowances.of(pump, 0).spend(0, 0, 0), 500_000);
        assert_eq!(allowances.of(DeviceId(2), 0).spend(0, 0, 0), 0);
    }

    #[test]
    fn those_that_are_gone_and_owe_nothing_are_forgotten() {
        let allowances = allowances();
        let connected = allowances.of(DeviceId(-1), 0);
        allowances.of(DeviceId(-2), 0).spend(1, 0, 0);
        for second in 0..100_000_u64 {
            let now_us = second * 1_000_000;
            let device = DeviceId(second as i64);
            allowances.of(device, now_us).spend(15, 0, now_us);
            let known = lock(&allowances.devices).known.len();
            assert!(known <= TIDY_AT_MIN, "{known}");
        }
        let last_us = 99_999_000_000;
        let last = allowances.of(DeviceId(99_999), last_us);
        assert_eq!(last.spend(10, 0, last_us), last_us + 500_000);
        let known = &lock(&allowances.devices).known;
        assert!(Arc::ptr_eq(&known[&DeviceId(-1)], &connected));
        assert!(!known.contains_key(&DeviceId(-2)));
    }
}
