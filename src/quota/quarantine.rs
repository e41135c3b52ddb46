//! Usage of quarantine, and reservations for further frames.
//!
//! Frames stay in quarantine until an operator replays or purges them, because the device has
//! deleted them. Quarantine is therefore limited on entry: a frame without space is not accepted,
//! and stays on its device. One device can use only a part of the space, so that it cannot block
//! all others.
//!
//! A task reads the usage from the store periodically, to include purges by operators and additions
//! by other gateways. In between, the gauge counts the additions of this gateway.
//!
//! Invariant: sessions of this gateway never exceed the limit of quarantine, because space is
//! reserved before a frame is submitted, and counts until a usage query that began after its
//! commit. It holds after the first usage query; before that, frames already in quarantine count
//! as zero.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fieldgate_protocol::frame::FRAME_BYTES_MAX;

use crate::store::DeviceId;
use crate::store::admin::quarantine_usage::{QuarantineUsage, UsageReader};
use crate::store::admin::{Pace, Poll, QueryError};

/// Divisor for the share of quarantine that one device may use.
pub const DEVICE_SHARE: u64 = 8;

/// Usage of quarantine.
#[derive(Debug)]
pub struct Gauge {
    bytes_max: u64,
    device_bytes_max: u64,
    levels: Mutex<Levels>,
}

#[derive(Debug, Default)]
struct Levels {
    /// Usage at the last query.
    stored: HashMap<DeviceId, u64>,
    /// Submitted, but not known to be committed.
    in_flight: HashMap<DeviceId, u64>,
    /// Committed before the current usage query began, so the query includes them.
    settled: HashMap<DeviceId, u64>,
    /// Committed since then.
    settled_since: HashMap<DeviceId, u64>,
    /// Devices that were asked to wait because their own share of quarantine is used up.
    full_devices: HashSet<DeviceId>,
    /// Whether a device was asked to wait because quarantine is full.
    is_full: bool,
}

/// Reserved space for a frame; released on drop, after its commit.
#[derive(Debug)]
pub struct Reservation {
    gauge: Arc<Gauge>,
    device: DeviceId,
    bytes: u64,
}

impl Gauge {
    /// Creates an empty gauge with this limit.
    pub fn new(bytes_max: u64) -> Gauge {
        Gauge {
            bytes_max,
            device_bytes_max: bytes_max / DEVICE_SHARE,
            levels: Mutex::default(),
        }
    }

    /// Reserves space for a frame of `bytes`, if available.
    pub fn reserve(self: &Arc<Self>, device: DeviceId, bytes: usize) -> Option<Reservation> {
        let bytes = bytes as u64;
        let mut levels = self.lock();
        if levels.total() + bytes > self.bytes_max {
            if !std::mem::replace(&mut levels.is_full, true) {
                let bytes_max = self.bytes_max;
                tracing::warn!(
                    bytes_max,
                    "quarantine full, devices are waiting; replay or purge frames"
                );
            }
            return None;
        }
        if levels.of(device) + bytes > self.device_bytes_max {
            if levels.full_devices.insert(device) {
                let bytes_max = self.device_bytes_max;
                tracing::warn!(
                    device = device.0,
                    bytes_max,
                    "device quarantine quota used up, device is waiting; replay or purge its frames"
                );
            }
            return None;
        }
        *levels.in_flight.entry(device).or_default() += bytes;
        drop(levels);
        Some(Reservation {
            gauge: Arc::clone(self),
            device,
            bytes,
        })
    }

    /// Marks the start of a usage query: it includes everything committed so far.
    pub(crate) fn begin_reading(&self) {
        let mut levels = self.lock();
        for (device, bytes) in std::mem::take(&mut levels.settled_since) {
            *levels.settled.entry(device).or_default() += bytes;
        }
    }

    /// Stores the result of the current usage query. Frames committed meanwhile may be included and
    /// are counted twice until the next query, so usage is never underestimated.
    pub(crate) fn end_reading(&self, stored: QuarantineUsage) {
        let mut levels = self.lock();
        levels.settled.clear();
        levels.stored = stored;
        let frame_bytes = FRAME_BYTES_MAX as u64;
        if levels.is_full && levels.total() + frame_bytes <= self.bytes_max {
            levels.is_full = false;
            tracing::info!("quarantine has space again");
        }
        let has_room =
            |device: &DeviceId| levels.of(*device) + frame_bytes <= self.device_bytes_max;
        let relieved: Vec<DeviceId> = { levels.full_devices.iter().copied() }
            .filter(has_room)
            .collect();
        for device in relieved {
            levels.full_devices.remove(&device);
            tracing::info!(device = device.0, "device has space in quarantine again");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Levels> {
        // Safe after a panic: each change is a few additions, and the next query corrects the
        // numbers.
        self.levels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Unlimited, for programs other than the gateway.
impl Default for Gauge {
    fn default() -> Self {
        Gauge::new(u64::MAX / 2)
    }
}

impl Levels {
    fn parts(&self) -> [&HashMap<DeviceId, u64>; 4] {
        [
            &self.stored,
            &self.in_flight,
            &self.settled,
            &self.settled_since,
        ]
    }

    fn total(&self) -> u64 {
        let part = |part: &HashMap<DeviceId, u64>| part.values().sum::<u64>();
        self.parts().map(part).iter().sum()
    }

    fn of(&self, device: DeviceId) -> u64 {
        let part = |part: &HashMap<DeviceId, u64>| part.get(&device).copied().unwrap_or(0);
        self.parts().map(part).iter().sum()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut levels = self.gauge.lock();
        if let Some(bytes) = levels.in_flight.get_mut(&self.device) {
            *bytes -= self.bytes;
            if *bytes == 0 {
                levels.in_flight.remove(&self.device);
            }
        }
        *levels.settled_since.entry(self.device).or_default() += self.bytes;
    }
}

/// Queries the usage of quarantine; the previous usage remains if that fails.
pub struct UsageWatch {
    /// Gauge to update.
    pub gauge: Arc<Gauge>,
    /// Source of the usage.
    pub usage: UsageReader,
}

impl Poll for UsageWatch {
    const TASK: &'static str = "quarantine";
    /// The share of the time is limited, so that a large quarantine costs no more than a small one.
    const PACE: Pace = Pace {
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(5),
        share: 20,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        self.gauge.begin_reading();
        self.gauge.end_reading(self.usage.bytes().await?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: DeviceId = DeviceId(1);
    const B: DeviceId = DeviceId(2);

    fn gauge(bytes_max: u64) -> Arc<Gauge> {
        Arc::new(Gauge::new(bytes_max))
    }

    #[test]
    fn a_device_may_use_an_eighth_and_all_devices_the_whole() {
        let gauge = gauge(800);
        let held: Vec<_> = (0..10).filter_map(|_| gauge.reserve(A, 10)).collect();
        assert_eq!(held.len(), 10);
        assert!(gauge.reserve(A, 1).is_none(), "more than an eighth");
        let others: Vec<_> = (2..9)
            .map(|device| gauge.reserve(DeviceId(device), 100).unwrap())
            .collect();
        assert!(gauge.reserve(DeviceId(99), 1).is_none(), "more than all");
        assert!(gauge.lock().is_full);
        drop((held, others));
        // The submitted frames may be committed.
        assert!(gauge.reserve(DeviceId(99), 1).is_none());
    }

    #[test]
    fn committed_frames_count_until_a_usage_query_includes_them() {
        let gauge = gauge(800);
        let before = gauge.reserve(A, 40).unwrap();
        drop(before);
        gauge.begin_reading();
        let during = gauge.reserve(A, 30).unwrap();
        drop(during);
        let in_flight = gauge.reserve(A, 20).unwrap();
        // The query includes the first frame, and possibly the second.
        gauge.end_reading(HashMap::from([(A, 70)]));
        assert_eq!(gauge.lock().of(A), 70 + 30 + 20);
        gauge.begin_reading();
        gauge.end_reading(HashMap::from([(A, 70)]));
        assert_eq!(gauge.lock().of(A), 70 + 20);
        drop(in_flight);
        assert_eq!(gauge.lock().of(A), 70 + 20);
    }

    #[test]
    fn a_failed_usage_query_changes_nothing() {
        let gauge = gauge(800);
        drop(gauge.reserve(A, 60).unwrap());
        gauge.begin_reading();
        gauge.begin_reading();
        assert_eq!(gauge.lock().of(A), 60);
        assert!(gauge.reserve(A, 60).is_none());
    }

    #[test]
    fn changes_by_others_are_noticed() {
        let bytes_max = 16 * FRAME_BYTES_MAX as u64;
        let gauge = gauge(bytes_max);
        gauge.begin_reading();
        gauge.end_reading(HashMap::from([(A, bytes_max), (B, 1)]));
        assert!(gauge.reserve(B, 1).is_none());
        assert!(gauge.lock().is_full);
        gauge.begin_reading();
        gauge.end_reading(HashMap::from([(A, bytes_max / 8), (B, 1)]));
        assert!(!gauge.lock().is_full);
        assert!(gauge.reserve(B, 1).is_some());
        assert!(gauge.reserve(A, 1).is_none());
        assert_eq!(gauge.lock().full_devices, HashSet::from([A]));
        gauge.begin_reading();
        gauge.end_reading(HashMap::new());
        assert!(gauge.lock().full_devices.is_empty());
    }
}
