//! The hours that hold readings, which `telemetry_hourly` finds its readings by.

use std::collections::BTreeSet;

use super::rows::{Frame, Run};
use super::{Content, Readings};

const HOUR_US: i64 = 3_600_000_000;
/// Hours kept in memory; a device whose clock runs wild could make any number.
const KNOWN_MAX: usize = 10_000;

/// Hours that are known to be in the table `reading_hours`, each as its first microsecond.
#[derive(Debug, Default)]
pub(super) struct KnownHours(BTreeSet<i64>);

impl KnownHours {
    /// Returns the hours of the readings of `frames` that may be missing in the table, in their order: two
    /// transactions that add the same hours then wait for each other in one direction only.
    pub(super) fn missing(&self, frames: &[Frame<'_>]) -> Vec<i64> {
        let mut missing = BTreeSet::new();
        for frame in frames {
            if let Content::Readings(Readings { times_us, .. }) = &frame.item.entry.content {
                self.add_missing(times_us, &mut missing);
            }
        }
        missing.into_iter().collect()
    }

    fn add_missing(&self, times_us: &[i64], missing: &mut BTreeSet<i64>) {
        let mut before = None;
        for ts_us in times_us {
            let hour = hour_of(*ts_us);
            if before != Some(hour) && !self.0.contains(&hour) {
                missing.insert(hour);
            }
            before = Some(hour);
        }
    }

    /// Remembers hours whose transaction is committed.
    pub(super) fn learn(&mut self, hours: Vec<i64>) {
        if self.0.len() + hours.len() > KNOWN_MAX {
            self.0.clear();
        }
        self.0.extend(hours.into_iter().take(KNOWN_MAX));
    }
}

/// Returns the hours of the readings of `runs`, in their order.
pub(super) fn hours_of(runs: &[Run<'_>]) -> Vec<i64> {
    let known = KnownHours::default();
    let mut hours = BTreeSet::new();
    for run in runs {
        known.add_missing(run.times_us, &mut hours);
    }
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
    fn what_is_remembered_is_bounded() {
        let mut known = KnownHours::default();
        known.learn((0..30_000).collect());
        known.learn((0..9_000).collect());
        assert!(known.0.len() <= KNOWN_MAX);
        let mut missing = BTreeSet::new();
        known.add_missing(&[HOUR_US * 3, HOUR_US * 3 + 1, -5], &mut missing);
        assert_eq!(
            missing.into_iter().collect::<Vec<_>>(),
            [-HOUR_US, HOUR_US * 3]
        );
    }
}
