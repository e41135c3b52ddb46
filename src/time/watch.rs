//! Detects steps of the machine's wall clock, and a wrong wall clock at startup.

use std::time::Duration;

use super::{Now, Origin, SystemClock};

/// Poll interval. Sessions do not depend on it: they compare the clocks with each frame.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum distance of stored times ahead of the wall clock at startup, to allow for clock
/// differences between gateways.
const STORED_AHEAD_MAX_US: i64 = 60_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockStep {
    /// The clock after the step.
    pub origin: Origin,
    /// Time of gateway startup or of the previous step, on the clock before this step, microseconds
    /// UTC.
    pub since_us: i64,
    /// The clock's time without the step, microseconds UTC.
    pub before_us: i64,
    /// The clock's time, microseconds UTC.
    pub after_us: i64,
}

impl ClockStep {
    /// Returns how far the clock was set forward, in microseconds.
    pub fn size_us(&self) -> i64 {
        self.after_us.saturating_sub(self.before_us)
    }

    fn between(since: Now, now: Now) -> Option<ClockStep> {
        let size_us = since.origin.step_to(now.origin);
        (size_us != 0).then(|| ClockStep {
            origin: now.origin,
            since_us: since.utc_us,
            before_us: now.utc_us.saturating_sub(size_us),
            after_us: now.utc_us,
        })
    }
}

/// Passes each step of the wall clock to `record`, for as long as the future is polled.
pub async fn watch<T>(clock: SystemClock, mut record: impl AsyncFnMut(ClockStep)) -> T {
    let mut since = clock.now();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let now = clock.now();
        let Some(step) = ClockStep::between(since, now) else {
            continue;
        };
        let is_standing = since.is_out_of_bounds() && now.is_out_of_bounds();
        since = now;
        if is_standing {
            continue;
        }
        let step_s = step.size_us() as f64 / 1e6;
        tracing::warn!(
            step_s,
            since_us = step.since_us,
            before_us = step.before_us,
            after_us = step.after_us,
            "system clock stepped; correcting device clock offsets, see table clock_steps"
        );
        record(step).await;
    }
}

/// Warns of a wrong wall clock at startup. `stored_us` is the latest time of receipt in the store.
pub fn warn_at_start(now_us: i64, stored_us: Option<i64>) {
    if let Some(doubt) = doubt_at_start(now_us, stored_us) {
        tracing::warn!(
            %doubt,
            now_us,
            stored_us,
            "system clock looks wrong, receive times may be wrong; set the clock"
        );
    }
}

/// Returns why the wall clock is probably wrong, if it is. `stored_us` is the latest time of receipt in the store.
pub fn doubt_at_start(now_us: i64, stored_us: Option<i64>) -> Option<&'static str> {
    let built_s: i64 = env!("FIELDGATE_BUILT_S").parse().unwrap_or_default();
    doubts_at_start(now_us, built_s.saturating_mul(1_000_000), stored_us)
}

/// Returns why the wall clock is probably wrong: it is before the build time of this program, or
/// before stored times of receipt.
fn doubts_at_start(now_us: i64, built_us: i64, stored_us: Option<i64>) -> Option<&'static str> {
    if now_us < built_us {
        return Some("earlier than the build time of this program");
    }
    let latest_us = now_us.saturating_add(STORED_AHEAD_MAX_US);
    if stored_us.is_some_and(|stored_us| stored_us > latest_us) {
        return Some("earlier than the newest receive time in the store");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_US: i64 = 3_600_000_000;

    fn now(mono_us: i64, set_us: i64) -> Now {
        Now {
            mono_us: mono_us.unsigned_abs(),
            utc_us: mono_us + set_us,
            origin: Origin {
                timeline: 7,
                at_us: set_us,
            },
        }
    }

    #[test]
    fn a_step_has_its_size_and_the_period_before_it() {
        for size_us in [2 * HOUR_US, -2 * HOUR_US, 150_000] {
            let step = ClockStep::between(now(0, HOUR_US), now(5, HOUR_US + size_us)).unwrap();
            assert_eq!(step.size_us(), size_us);
            assert_eq!((step.since_us, step.before_us), (HOUR_US, HOUR_US + 5));
        }
        assert_eq!(ClockStep::between(now(0, 0), now(HOUR_US, 99_999)), None);
    }

    #[test]
    fn a_clock_earlier_than_known_times_is_doubted() {
        let doubt = |now_us, stored_us| doubts_at_start(now_us, HOUR_US, stored_us).is_some();
        assert!(doubt(0, None) && doubt(HOUR_US - 1, None));
        assert!(!doubt(HOUR_US, None) && !doubt(2 * HOUR_US, Some(2 * HOUR_US)));
        assert!(!doubt(2 * HOUR_US, Some(2 * HOUR_US + 59_000_000)));
        assert!(doubt(2 * HOUR_US, Some(2 * HOUR_US + 61_000_000)));
    }
}
