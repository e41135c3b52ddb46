//! How much quarantine holds, and whether another frame has room in it.
//!
//! What is in quarantine stays until an operator replays or purges it, for its device has forgotten it.
//! So it is bounded where it fills: a frame for which there is no room is not taken, and stays on its
//! device. One device may use a part of the room only, so that it cannot make all others wait.
//!
//! The store knows what quarantine holds, and a task reads it there every now and then: what operators
//! purge and what other gateways add is noticed so. In between, the gauge counts what this gateway adds.
//!
//! Invariant: what sessions of this gateway add never takes quarantine beyond its bound, for room is reserved before
//! a frame is submitted, and counts until a reading that began after its commit. It holds once the store was read for
//! the first time; until then what is stored already counts as nothing.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fieldgate_protocol::frame::FRAME_BYTES_MAX;

use crate::store::DeviceId;
use crate::store::kept::{KeptBytes, KeptFrames};

/// A device may use the room of quarantine divided by this.
pub const DEVICE_SHARE: u64 = 8;

/// From one reading of the store to the next, at least.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// Readings take one part in this of the time, so that a large quarantine costs no more than a small one.
const READ_SHARE: u32 = 20;
/// A reading that takes longer is given up, and what was known before holds.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How full quarantine is.
#[derive(Debug)]
pub struct Gauge {
    bytes_max: u64,
    device_bytes_max: u64,
    levels: Mutex<Levels>,
}

#[derive(Debug, Default)]
struct Levels {
    /// As the store was last read.
    stored: HashMap<DeviceId, u64>,
    /// Submitted, and not known to be committed.
    in_flight: HashMap<DeviceId, u64>,
    /// Committed before the reading that is under way began: it will have them.
    settled: HashMap<DeviceId, u64>,
    /// Committed since.
    settled_since: HashMap<DeviceId, u64>,
    /// Devices that were told to wait, as far as it was their own share that was used up.
    full_devices: HashSet<DeviceId>,
    /// Whether somebody was told to wait because there was no room at all.
    is_full: bool,
}

/// Room for a frame; given back when dropped, which is after its commit.
#[derive(Debug)]
pub struct Reservation {
    gauge: Arc<Gauge>,
    device: DeviceId,
    bytes: u64,
}

impl Gauge {
    /// An empty one, for so many bytes of frames.
    pub fn new(bytes_max: u64) -> Gauge {
        Gauge {
            bytes_max,
            device_bytes_max: bytes_max / DEVICE_SHARE,
            levels: Mutex::default(),
        }
    }

    /// Room for a frame of `bytes`, if there is so much.
    pub fn reserve(self: &Arc<Self>, device: DeviceId, bytes: usize) -> Option<Reservation> {
        let bytes = bytes as u64;
        let mut levels = self.lock();
        if levels.total() + bytes > self.bytes_max {
            if !std::mem::replace(&mut levels.is_full, true) {
                let bytes_max = self.bytes_max;
                tracing::warn!(
                    bytes_max,
                    "quarantine is full: devices keep what belongs there and wait; replay or purge it"
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
                    "a device has used up its share of quarantine and waits; replay or purge it"
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

    /// A reading of the store begins: it will have all that is committed by now.
    pub(crate) fn begin_reading(&self) {
        let mut levels = self.lock();
        for (device, bytes) in std::mem::take(&mut levels.settled_since) {
            *levels.settled.entry(device).or_default() += bytes;
        }
    }

    /// The reading that began last found this. What was committed meanwhile may be in it and is counted
    /// twice until the next one: too much rather than too little.
    pub(crate) fn end_reading(&self, stored: KeptBytes) {
        let mut levels = self.lock();
        levels.settled.clear();
        levels.stored = stored;
        let frame_bytes = FRAME_BYTES_MAX as u64;
        if levels.is_full && levels.total() + frame_bytes <= self.bytes_max {
            levels.is_full = false;
            tracing::info!("quarantine has room again");
        }
        let has_room =
            |device: &DeviceId| levels.of(*device) + frame_bytes <= self.device_bytes_max;
        let relieved: Vec<DeviceId> = { levels.full_devices.iter().copied() }
            .filter(has_room)
            .collect();
        for device in relieved {
            levels.full_devices.remove(&device);
            tracing::info!(device = device.0, "a device has room in quarantine again");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Levels> {
        // Each change is a few additions: whoever panicked left numbers that the next reading mends.
        self.levels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without bounds, for what is not the gateway itself.
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

/// Reads what quarantine holds, once.
pub async fn read(gauge: &Gauge, kept: &mut KeptFrames) {
    gauge.begin_reading();
    match tokio::time::timeout(READ_TIMEOUT, kept.bytes()).await {
        Ok(Ok(bytes)) => gauge.end_reading(bytes),
        // What was known holds; that the store does not answer is told by those who commit.
        Ok(Err(error)) => tracing::debug!(%error, "quarantine cannot be read"),
        Err(_) => tracing::debug!("quarantine is not read in time"),
    }
}

/// Reads what quarantine holds again and again, for as long as it is polled.
pub async fn watch<T>(gauge: Arc<Gauge>, mut kept: KeptFrames) -> T {
    loop {
        let began = Instant::now();
        read(&gauge, &mut kept).await;
        let pause = READ_INTERVAL.max(began.elapsed() * (READ_SHARE - 1));
        tokio::time::sleep(pause).await;
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
    fn a_device_has_an_eighth_and_all_together_have_the_whole() {
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
        // What was submitted is committed, as far as anybody knows.
        assert!(gauge.reserve(DeviceId(99), 1).is_none());
    }

    #[test]
    fn what_is_committed_counts_until_a_reading_has_it() {
        let gauge = gauge(800);
        let before = gauge.reserve(A, 40).unwrap();
        drop(before);
        gauge.begin_reading();
        let during = gauge.reserve(A, 30).unwrap();
        drop(during);
        let in_flight = gauge.reserve(A, 20).unwrap();
        // The reading has the first, and happens to have the second as well.
        gauge.end_reading(HashMap::from([(A, 70)]));
        assert_eq!(gauge.lock().of(A), 70 + 30 + 20);
        gauge.begin_reading();
        gauge.end_reading(HashMap::from([(A, 70)]));
        assert_eq!(gauge.lock().of(A), 70 + 20);
        drop(in_flight);
        assert_eq!(gauge.lock().of(A), 70 + 20);
    }

    #[test]
    fn a_reading_that_fails_forgets_nothing() {
        let gauge = gauge(800);
        drop(gauge.reserve(A, 60).unwrap());
        gauge.begin_reading();
        gauge.begin_reading();
        assert_eq!(gauge.lock().of(A), 60);
        assert!(gauge.reserve(A, 60).is_none());
    }

    #[test]
    fn what_others_take_and_give_back_is_noticed() {
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
