//! Usage of quarantine, and reservations for further frames.
//!
//! Frames stay in quarantine until an operator replays or purges them, because the device has
//! deleted them. Quarantine is therefore limited on entry: a frame without space is not accepted,
//! and stays on its device. One device can use only a part of the space, so that it cannot block
//! all others.
//!
//! A task queries the usage that the store records (`quarantine_usage`), to include purges by operators and additions
//! by other gateways. In between, the gauge adds what this gateway reserves.
//!
//! Invariant: sessions of this gateway never exceed the limit of quarantine, because space is
//! reserved before a frame is submitted, and counts until the end of a usage query that began after
//! its commit. It holds after the first usage query; before that, frames already in quarantine
//! count as zero.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
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
    bytes_max: AtomicU64,
    levels: Mutex<Levels>,
}

#[derive(Debug, Default)]
struct Levels {
    /// Usage of the devices that use quarantine or wait for it.
    devices: HashMap<DeviceId, Usage>,
    /// Whether a device was asked to wait because quarantine is full.
    is_full: bool,
}

/// Bytes of one device.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// In the store at the last query.
    stored: u64,
    /// Reserved, and possibly not included in `stored`.
    reserved: u64,
    /// The part of `reserved` whose commits have ended.
    committed: u64,
    /// Whether the device was asked to wait because its own share is used up.
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
    pub fn new(bytes_max: u64) -> Gauge {
        Gauge {
            bytes_max: AtomicU64::new(bytes_max),
            levels: Mutex::default(),
        }
    }

    /// Returns the usage, with the frames that are not committed yet, in bytes.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    /// Returns the maximum size of quarantine, in bytes.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max.load(Ordering::Relaxed)
    }

    /// Changes the maximum size of quarantine. Frames beyond a smaller one stay.
    pub fn set_bytes_max(&self, bytes_max: u64) {
        self.bytes_max.store(bytes_max, Ordering::Relaxed);
    }

    fn device_bytes_max(&self) -> u64 {
        self.bytes_max() / DEVICE_SHARE
    }

    pub fn reserve(self: &Arc<Self>, device: DeviceId, bytes: usize) -> Option<Reservation> {
        let bytes = bytes as u64;
        let mut levels = self.lock();
        if levels.bytes() + bytes > self.bytes_max() {
            if !std::mem::replace(&mut levels.is_full, true) {
                let bytes_max = self.bytes_max();
                tracing::warn!(
                    bytes_max,
                    "quarantine full, devices are waiting; replay or purge frames"
                );
            }
            return None;
        }
        let usage = levels.devices.entry(device).or_default();
        if usage.bytes() + bytes > self.device_bytes_max() {
            if !std::mem::replace(&mut usage.is_full, true) {
                let bytes_max = self.device_bytes_max();
                tracing::warn!(
                    device = device.0,
                    bytes_max,
                    "device quarantine quota used up, device is waiting; replay or purge its frames"
                );
            }
            return None;
        }
        usage.reserved += bytes;
        drop(levels);
        Some(Reservation {
            gauge: Arc::clone(self),
            device,
            bytes,
        })
    }

    /// Returns the bytes by device that a usage query which begins now will include.
    pub(crate) fn committed(&self) -> QuarantineUsage {
        let levels = self.lock();
        let devices = levels.devices.iter();
        devices
            .map(|(device, usage)| (*device, usage.committed))
            .collect()
    }

    /// Stores the result of a usage query. `included` is [`Gauge::committed`] from before the query. Frames committed
    /// since may be in both, and count twice until the next query, so usage is never underestimated.
    pub(crate) fn update(&self, stored: &QuarantineUsage, included: &QuarantineUsage) {
        let mut levels = self.lock();
        for usage in levels.devices.values_mut() {
            usage.stored = 0;
        }
        for (device, bytes) in stored {
            levels.devices.entry(*device).or_default().stored = *bytes;
        }
        for (device, bytes) in included {
            let usage = levels.devices.entry(*device).or_default();
            usage.reserved -= bytes;
            usage.committed -= bytes;
        }
        let frame_bytes = FRAME_BYTES_MAX as u64;
        if levels.is_full && levels.bytes() + frame_bytes <= self.bytes_max() {
            levels.is_full = false;
            tracing::info!("quarantine has space again");
        }
        levels.devices.retain(|device, usage| {
            if usage.is_full && usage.bytes() + frame_bytes <= self.device_bytes_max() {
                usage.is_full = false;
                tracing::info!(device = device.0, "device has space in quarantine again");
            }
            usage.is_full || usage.bytes() > 0
        });
    }

    fn lock(&self) -> MutexGuard<'_, Levels> {
        // Each change is a few additions, which do not panic.
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
    fn bytes(&self) -> u64 {
        self.devices.values().map(Usage::bytes).sum()
    }
}

impl Usage {
    fn bytes(&self) -> u64 {
        self.stored + self.reserved
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut levels = self.gauge.lock();
        levels.devices.entry(self.device).or_default().committed += self.bytes;
    }
}

/// Queries the usage of quarantine; the previous usage remains if that fails.
pub struct UsageWatch {
    pub gauge: Arc<Gauge>,
    pub usage: UsageReader,
}

impl Poll for UsageWatch {
    const TASK: &'static str = "quarantine";
    const PACE: Pace = Pace {
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(5),
        share: 20,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        let included = self.gauge.committed();
        let stored = self.usage.bytes().await?;
        self.gauge.update(&stored, &included);
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

    /// Applies a usage query with the result `stored`, without concurrent changes.
    fn query(gauge: &Gauge, stored: QuarantineUsage) {
        gauge.update(&stored, &gauge.committed());
    }

    fn bytes(gauge: &Gauge, device: DeviceId) -> u64 {
        gauge.lock().devices.get(&device).map_or(0, Usage::bytes)
    }

    #[test]
    fn committed_frames_count_until_a_usage_query_includes_them() {
        let gauge = gauge(800);
        let before = gauge.reserve(A, 40).unwrap();
        drop(before);
        let included = gauge.committed();
        let during = gauge.reserve(A, 30).unwrap();
        drop(during);
        let in_flight = gauge.reserve(A, 20).unwrap();
        // The query includes the first frame, and possibly the second.
        gauge.update(&HashMap::from([(A, 70)]), &included);
        assert_eq!(bytes(&gauge, A), 70 + 30 + 20);
        query(&gauge, HashMap::from([(A, 70)]));
        assert_eq!(bytes(&gauge, A), 70 + 20);
        drop(in_flight);
        assert_eq!(bytes(&gauge, A), 70 + 20);
    }

    #[test]
    fn a_failed_usage_query_changes_nothing() {
        let gauge = gauge(800);
        drop(gauge.reserve(A, 60).unwrap());
        drop(gauge.committed());
        assert_eq!(bytes(&gauge, A), 60);
        assert!(gauge.reserve(A, 60).is_none());
        query(&gauge, HashMap::from([(A, 60)]));
        assert_eq!(bytes(&gauge, A), 60);
    }

    #[test]
    fn changes_by_others_are_noticed() {
        let bytes_max = 16 * FRAME_BYTES_MAX as u64;
        let gauge = gauge(bytes_max);
        query(&gauge, HashMap::from([(A, bytes_max), (B, 1)]));
        assert!(gauge.reserve(B, 1).is_none());
        assert!(gauge.lock().is_full);
        query(&gauge, HashMap::from([(A, bytes_max / 8), (B, 1)]));
        assert!(!gauge.lock().is_full);
        assert!(gauge.reserve(B, 1).is_some());
        assert!(gauge.reserve(A, 1).is_none());
        assert!(gauge.lock().devices[&A].is_full);
        query(&gauge, HashMap::new());
        assert!(gauge.lock().devices.is_empty());
    }
}
