//! Device quotas: limits what a device may send across all of its sessions; a reconnecting device
//! keeps its debt.
//!
//! Invariant: state is kept for all devices that are connected or in debt, and for a bounded number
//! of others: at most as many as these, or at most 1,024 devices in total. A device without debt
//! has the same state as a new one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::DeviceRates;
use crate::quota::rate::{Gcra, Rate};
use crate::store::DeviceId;

/// Below this number of devices, cleaning up is not worthwhile.
const TIDY_AT_MIN: usize = 1024;

/// Notices per device: one per minute, with a burst of ten.
const NOTICES: Rate = Rate {
    per_s: 1,
    burst: 10 * NOTICE,
};
const NOTICE: u64 = 60;

#[derive(Debug)]
pub struct DeviceQuotas {
    devices: Mutex<Devices>,
}

#[derive(Debug)]
struct Devices {
    rates: Rates,
    known: HashMap<DeviceId, Arc<DeviceQuota>>,
    /// Number of devices at which those without debt or connection are removed.
    tidy_at: usize,
}

/// Rates of each device.
#[derive(Clone, Copy, Debug)]
struct Rates {
    frames: Rate,
    readings: Rate,
}

impl Rates {
    fn new(rates: &DeviceRates) -> Rates {
        Rates {
            frames: Rate {
                per_s: rates.device_frames_per_s,
                burst: rates.device_frames_burst,
            },
            readings: Rate {
                per_s: rates.device_readings_per_s,
                burst: rates.device_readings_burst,
            },
        }
    }
}

#[derive(Debug)]
pub struct DeviceQuota {
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    rates: Rates,
    frames: Gcra,
    readings: Gcra,
    notices: Gcra,
}

impl Default for DeviceQuotas {
    fn default() -> DeviceQuotas {
        DeviceQuotas::new(&DeviceRates::default())
    }
}

impl DeviceQuotas {
    /// Creates quotas with these rates for each device; a frame of any type counts.
    pub fn new(rates: &DeviceRates) -> DeviceQuotas {
        DeviceQuotas {
            devices: Mutex::new(Devices {
                rates: Rates::new(rates),
                known: HashMap::new(),
                tidy_at: TIDY_AT_MIN,
            }),
        }
    }

    /// Changes the rates of all devices; debts stay.
    pub fn set_rates(&self, rates: &DeviceRates) {
        let rates = Rates::new(rates);
        let mut devices = lock(&self.devices);
        devices.rates = rates;
        for quota in devices.known.values() {
            lock(&quota.used).rates = rates;
        }
    }

    /// Returns the device's limiter, creating it if needed.
    pub fn of(&self, device: DeviceId, now_us: u64) -> Arc<DeviceQuota> {
        let mut devices = lock(&self.devices);
        if devices.known.len() >= devices.tidy_at {
            devices
                .known
                .retain(|_, quota| Arc::strong_count(quota) > 1 || quota.is_in_debt(now_us));
            devices.tidy_at = TIDY_AT_MIN.max(2 * devices.known.len());
        }
        let rates = devices.rates;
        let quota = devices.known.entry(device).or_insert_with(|| {
            Arc::new(DeviceQuota {
                used: Mutex::new(Used {
                    rates,
                    frames: Gcra::default(),
                    readings: Gcra::default(),
                    notices: Gcra::default(),
                }),
            })
        });
        Arc::clone(quota)
    }
}

impl DeviceQuota {
    /// Counts received frames and readings; returns the time from which more may be received.
    pub fn consume(&self, frames: u64, readings: u64, now_us: u64) -> u64 {
        let mut used = lock(&self.used);
        let rates = used.rates;
        let next_us = used.frames.consume(rates.frames, frames, now_us);
        next_us.max(used.readings.consume(rates.readings, readings, now_us))
    }

    /// Returns whether the operator is notified of another fault of the device: a few immediately,
    /// then one per minute, across all sessions.
    pub fn may_report(&self, now_us: u64) -> bool {
        let used = &mut *lock(&self.used);
        let mut notices = used.notices;
        let has_room = notices.consume(NOTICES, NOTICE, now_us) <= now_us;
        if has_room {
            used.notices = notices;
        }
        has_room
    }

    fn is_in_debt(&self, now_us: u64) -> bool {
        let used = lock(&self.used);
        [used.frames, used.readings, used.notices]
            .iter()
            .any(|meter| meter.is_in_debt(now_us))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas() -> DeviceQuotas {
        DeviceQuotas::new(&DeviceRates {
            device_frames_per_s: 10,
            device_frames_burst: 20,
            device_readings_per_s: 100,
            device_readings_burst: 200,
        })
    }

    #[test]
    fn the_scarcer_of_both_counts() {
        let pump = quotas().of(DeviceId(1), 0);
        assert_eq!(pump.consume(1, 200, 0), 0);
        assert_eq!(pump.consume(1, 50, 0), 500_000);
        assert_eq!(pump.consume(28, 0, 0), 1_000_000);
    }

    #[test]
    fn a_reconnecting_device_keeps_its_debt() {
        let quotas = quotas();
        let pump = DeviceId(1);
        assert_eq!(quotas.of(pump, 0).consume(20, 250, 0), 500_000);
        assert_eq!(quotas.of(pump, 0).consume(0, 0, 0), 500_000);
        assert_eq!(quotas.of(DeviceId(2), 0).consume(0, 0, 0), 0);
    }

    #[test]
    fn disconnected_devices_without_debt_are_forgotten() {
        let quotas = quotas();
        let connected = quotas.of(DeviceId(-1), 0);
        quotas.of(DeviceId(-2), 0).consume(1, 0, 0);
        for second in 0..100_000_u64 {
            let now_us = second * 1_000_000;
            let device = DeviceId(second as i64);
            quotas.of(device, now_us).consume(15, 0, now_us);
            let known = lock(&quotas.devices).known.len();
            assert!(known <= TIDY_AT_MIN, "{known}");
        }
        let last_us = 99_999_000_000;
        let last = quotas.of(DeviceId(99_999), last_us);
        assert_eq!(last.consume(10, 0, last_us), last_us + 500_000);
        let known = &lock(&quotas.devices).known;
        assert!(Arc::ptr_eq(&known[&DeviceId(-1)], &connected));
        assert!(!known.contains_key(&DeviceId(-2)));
    }
}
