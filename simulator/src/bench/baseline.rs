//! Common code of the baselines for both stores.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::WARM_UP;
use super::workload::Workload;
use crate::catalogue;

pub(super) const NAME_PREFIX: &str = "bench-";

/// Task of a baseline run.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) workload: Workload,
    pub(super) until: Until,
    /// Time of the first sample.
    pub(super) start_us: i64,
    /// SQL that inserts rows for devices, streams and series, if the store is to be used afterwards.
    pub(super) registry: Option<String>,
}

impl Job {
    /// Returns the time that the samples cover, at one per second.
    pub(super) fn span_us(&self) -> i64 {
        match self.until {
            // No machine is fast enough for ten devices to store more than this in the seconds of a round.
            Until::Passed(_) => 10 * 86_400_000_000,
            Until::Stored(readings) => {
                let series = u64::from(self.workload.devices) * u64::from(self.workload.channels);
                let seconds = readings.div_ceil(series).saturating_mul(1_000_000);
                // One day more, because devices do not advance equally.
                i64::try_from(seconds).unwrap_or(i64::MAX / 2) + 86_400_000_000
            }
        }
    }
}

/// Stop condition of a baseline run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    /// After the warm-up and this time.
    Passed(Duration),
    Stored(u64),
}

/// Counts what all connections of a baseline have stored. An empty store is faster than one that has
/// been filled for a second, so the baseline warms up like the gateway before it counts.
#[derive(Debug)]
pub(super) struct Meter {
    until: Until,
    started: Instant,
    readings: AtomicU64,
    /// End of the warm-up, and the number of readings stored by then.
    warm: OnceLock<(Instant, u64)>,
}

impl Meter {
    pub(super) fn start(until: Until) -> Meter {
        Meter {
            until,
            started: Instant::now(),
            readings: AtomicU64::new(0),
            warm: OnceLock::new(),
        }
    }

    /// Counts durable readings.
    pub(super) fn add(&self, readings: usize) {
        let readings = readings as u64;
        let stored = self.readings.fetch_add(readings, Ordering::Relaxed) + readings;
        if self.started.elapsed() >= WARM_UP {
            self.warm.get_or_init(|| (Instant::now(), stored));
        }
    }

    pub(super) fn is_over(&self) -> bool {
        match self.until {
            Until::Passed(duration) => self.started.elapsed() >= WARM_UP + duration,
            Until::Stored(count) => self.readings.load(Ordering::Relaxed) >= count,
        }
    }

    /// Returns readings per second since the warm-up, or since the start if the warm-up has not ended.
    pub(super) fn rate(&self) -> f64 {
        let (since, before) = self.warm.get().copied().unwrap_or((self.started, 0));
        let readings = self.readings.load(Ordering::Relaxed) - before;
        readings as f64 / since.elapsed().as_secs_f64()
    }
}

/// Returns SQL for the rows of a workload's devices, as a gateway inserts them at login. The ids of devices, streams
/// and series match [`Frames`](super::workload::Frames) and [`rows`](super::workload::rows). The stream differs
/// from those of a fleet, so `created_at` (SQL for a time) is the only other value needed.
pub(super) fn registry(workload: Workload, created_at: &str) -> String {
    let devices = || 1..=workload.devices;
    let names = devices().map(|id| format!("('{NAME_PREFIX}{:05}')", id - 1));
    let streams = devices().map(|id| format!("({id},1,{created_at})"));
    let channels = catalogue::channels(workload.channels.into());
    let series = devices().flat_map(|id| {
        channels.iter().map(move |channel| {
            let (name, unit, kind) = (&channel.name, &channel.unit, channel.kind.name());
            format!("({id},'{name}','{unit}','{kind}')")
        })
    });
    let insert = |head: &str, rows: &mut dyn Iterator<Item = String>| {
        format!(
            "INSERT INTO {head} VALUES {};",
            rows.collect::<Vec<_>>().join(",")
        )
    };
    [
        insert("devices (name)", &mut names.into_iter()),
        insert(
            "streams (device_id,stream,created_at)",
            &mut streams.into_iter(),
        ),
        insert(
            "series (device_id,channel,unit,kind)",
            &mut series.into_iter(),
        ),
    ]
    .concat()
}
