//! Capacity of a shard's queue, in readings and in bytes.
//!
//! Invariant: capacity that was acquired is released when its [`Space`] is dropped.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::batcher::Size;
use crate::metrics::Metrics;

/// Capacity of a shard. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Capacity(Arc<Semaphores>);

#[derive(Debug)]
struct Semaphores {
    limits: Size,
    metrics: Arc<Metrics>,
    readings: Semaphore,
    bytes: Semaphore,
}

impl Capacity {
    pub(super) fn new(limits: Size, metrics: Arc<Metrics>) -> Capacity {
        Capacity(Arc::new(Semaphores {
            limits,
            metrics,
            readings: Semaphore::new(limits.readings),
            bytes: Semaphore::new(limits.bytes),
        }))
    }

    pub(super) fn try_acquire(&self, size: Size) -> Option<Space> {
        let readings = self.0.readings.try_acquire_many(size.readings as u32);
        let readings = readings.ok()?;
        let bytes = self.0.bytes.try_acquire_many(size.bytes as u32).ok()?;
        readings.forget();
        bytes.forget();
        self.count(size, 1);
        Some(self.space(size))
    }

    /// Waits for capacity; waiting callers are served in order. A size above the whole capacity is reduced to it.
    ///
    /// # Cancel safety
    /// A cancelled call acquires nothing.
    pub(super) async fn acquire(&self, size: Size) -> Space {
        let size = Size {
            readings: size.readings.min(self.0.limits.readings),
            bytes: size.bytes.min(self.0.limits.bytes),
        };
        let never_closed = "the semaphores are never closed";
        let readings = self.0.readings.acquire_many(size.readings as u32);
        let readings = readings.await.expect(never_closed);
        let bytes = self.0.bytes.acquire_many(size.bytes as u32);
        bytes.await.expect(never_closed).forget();
        readings.forget();
        self.count(size, 1);
        self.space(size)
    }

    /// Counts acquired capacity, or with `sign` -1 released capacity.
    fn count(&self, size: Size, sign: i64) {
        let metrics = &self.0.metrics;
        metrics.queue_readings.inc_by(sign * size.readings as i64);
        metrics.queue_bytes.inc_by(sign * size.bytes as i64);
    }

    fn space(&self, size: Size) -> Space {
        Space {
            size,
            capacity: self.clone(),
        }
    }
}

/// Acquired capacity; released on drop.
#[derive(Debug)]
pub struct Space {
    size: Size,
    capacity: Capacity,
}

impl Space {
    /// Splits off this much, if the space is large enough.
    pub(super) fn split(&mut self, size: Size) -> Option<Space> {
        let readings = self.size.readings.checked_sub(size.readings)?;
        let bytes = self.size.bytes.checked_sub(size.bytes)?;
        self.size = Size { readings, bytes };
        Some(self.capacity.space(size))
    }

    /// Adds the space of `other`, which must belong to the same shard.
    pub(super) fn merge(&mut self, mut other: Space) {
        debug_assert!(Arc::ptr_eq(&self.capacity.0, &other.capacity.0));
        self.size += std::mem::take(&mut other.size);
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.capacity.count(self.size, -1);
        self.capacity.0.readings.add_permits(self.size.readings);
        self.capacity.0.bytes.add_permits(self.size.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_capacity_is_released() {
        let limits = Size {
            readings: 100,
            bytes: 1000,
        };
        let size = |readings, bytes| Size { readings, bytes };
        let capacity = Capacity::new(limits, Arc::default());
        let mut grant = capacity.try_acquire(size(60, 600)).unwrap();
        assert!(capacity.try_acquire(size(41, 1)).is_none());
        assert!(capacity.try_acquire(size(1, 401)).is_none());
        let mut first = grant.split(size(20, 100)).unwrap();
        let second = grant.split(size(30, 400)).unwrap();
        assert!(grant.split(size(11, 1)).is_none() && grant.split(size(1, 101)).is_none());
        drop(grant);
        first.merge(second);
        assert!(capacity.try_acquire(size(51, 500)).is_none());
        assert!(capacity.try_acquire(size(50, 500)).is_some());
        drop(first);
        assert!(capacity.try_acquire(size(100, 1000)).is_some());
    }
}
