//! Hours that contain readings; `telemetry_hourly` uses them to find its readings.

use std::collections::BTreeSet;

use super::rows::{Frame, Run};
use super::{Content, Readings};

const HOUR_US: i64 = 3_600_000_000;
/// Maximum number of cached hours; a device with a faulty clock could produce any number.
const KNOWN_MAX: usize = 10_000;

/// Hours that are known to be in the table `reading_hours`, each as its first microsecond.
#[derive(Debug, Default)]
pub(super) struct KnownHours(BTreeSet<i64>);

impl KnownHours {
    /// Returns the hours of `frames` that may be missing in the table, in ascending order, so that two
    /// transactions that add the same hours cannot deadlock.
    pub(super) fn missing(&self, frames: &[Frame<'_>]) -> Vec<i64> {
        let readings = frames
            .iter()
            .filter_map(|frame| match &frame.item.entry.content {
                Content::Readings(Readings { times_us, .. }) => Some(times_us.as_slice()),
                _ => None,
            });
        self.missing_of(readings).into_iter().collect()
    }

    fn missing_of<'a>(&self, times_us: impl Iterator<Item = &'a [i64]>) -> BTreeSet<i64> {
        let mut missing = BTreeSet::new();
        // Most readings belong to the same hour as the previous one.
        let mut latest = 0..0;
        for ts_us in times_us.flatten() {
            if latest.contains(ts_us) {
                continue;
            }
            let hour = hour_of(*ts_us);
            latest = hour..hour.saturating_add(HOUR_US);
            if !self.0.contains(&hour) {
                missing.insert(hour);
            }
        }
        missing
    }

    /// Caches hours after their transaction has committed.
    pub(super) fn learn(&mut self, hours: Vec<i64>) {
        if self.0.len() + hours.len() > KNOWN_MAX {
            self.0.clear();
        }
        self.0.extend(hours.into_iter().take(KNOWN_MAX));
    }
}

/// Returns the hours of the readings of `runs`, in ascending order.
pub(super) fn hours_of(runs: &[Run<'_>]) -> Vec<i64> {
    let times_us = runs.iter().map(|run| run.times_us);
    let hours = KnownHours::default().missing_of(times_us);
    hours.into_iter().collect()
}

fn hour_of(ts_us: i64) -> i64 {
    ts_us.saturating_sub(ts_us.rem_euclid(HOUR_US))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_begin_before_their_readings() {
        for (ts_us, hour) in [
            (0, 0),
            (HOUR_US - 1, 0),
            (HOUR_US, HOUR_US),
            (-1, -HOUR_US),
            (i64::MIN, i64::MIN),
        ] {
            assert_eq!(hour_of(ts_us), hour);
        }
    }

    #[test]
    fn the_cache_is_bounded() {
        let mut known = KnownHours::default();
        known.learn((0..30_000).collect());
        known.learn((0..9_000).collect());
        assert!(known.0.len() <= KNOWN_MAX);
        let times_us = [HOUR_US * 3, HOUR_US * 3 + 1, -5];
        let missing = known.missing_of([times_us.as_slice()].into_iter());
        assert_eq!(
            missing.into_iter().collect::<Vec<_>>(),
            [-HOUR_US, HOUR_US * 3]
        );
    }
}
