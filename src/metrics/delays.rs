//! Counts of delays by interval, which can be read back, unlike a histogram of Prometheus.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Number of intervals.
pub const ACK_DELAYS: usize = 34;
/// Upper limit of the first interval.
const FIRST: Duration = Duration::from_millis(1);

/// Counts of delays. The limits of the intervals grow by the square root of 2, from 1 ms to 65 s.
#[derive(Debug)]
pub(super) struct Delays([AtomicU64; ACK_DELAYS]);

impl Default for Delays {
    fn default() -> Delays {
        Delays(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Delays {
    pub(super) fn observe(&self, delay: Duration) {
        let ratio = delay.as_secs_f64() / FIRST.as_secs_f64();
        // A negative number becomes 0.
        let index = (2.0 * ratio.log2()).ceil() as usize;
        self.0[index.min(ACK_DELAYS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> [u64; ACK_DELAYS] {
        std::array::from_fn(|index| self.0[index].load(Ordering::Relaxed))
    }
}

/// Returns the upper limit of an interval in seconds; the last one has none.
pub(super) fn limit_s(index: usize) -> f64 {
    match index {
        ..33 => FIRST.as_secs_f64() * (index as f64 / 2.0).exp2(),
        _ => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_counted_at_the_limit_above_it() {
        for us in [0, 1, 999, 1000, 1001, 1500, 77_000, 1_000_000, 65_000_000] {
            let delays = Delays::default();
            delays.observe(Duration::from_micros(us));
            let index = delays
                .counts()
                .iter()
                .position(|count| *count == 1)
                .unwrap();
            let delay_s = us as f64 / 1e6;
            assert!(delay_s <= limit_s(index) * 1.000_001, "{us} in {index}");
            let below = index.checked_sub(1).map_or(0.0, limit_s);
            assert!(delay_s >= below, "{us} in {index}");
        }
        let delays = Delays::default();
        delays.observe(Duration::MAX);
        assert_eq!(delays.counts()[ACK_DELAYS - 1], 1);
        assert_eq!(limit_s(ACK_DELAYS - 1), f64::INFINITY);
    }
}
