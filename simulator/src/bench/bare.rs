//! What the bare loops of both stores have in common.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::WARM_UP;
use super::cell::Cell;
use super::gateway::NAME_PREFIX;
use crate::catalogue;

/// What a bare loop is to do.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) cell: Cell,
    pub(super) until: Until,
    /// Time of the first sample.
    pub(super) start_us: i64,
    /// SQL that makes rows for devices, streams and series, where somebody is to find them.
    pub(super) registry: Option<String>,
}

impl Job {
    /// How long the samples go on, at one each second.
    pub(super) fn span_us(&self) -> i64 {
        match self.until {
            // Nothing is so fast that ten devices would tell of more in the seconds of a round.
            Until::Passed(_) => 10 * 86_400_000_000,
            Until::Stored(readings) => {
                let series = u64::from(self.cell.devices) * u64::from(self.cell.channels);
                let seconds = readings.div_ceil(series).saturating_mul(1_000_000);
                // A day more, as devices do not get quite as far as each other.
                i64::try_from(seconds).unwrap_or(i64::MAX / 2) + 86_400_000_000
            }
        }
    }
}

/// When a bare loop ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    /// After the warm-up and so long.
    Passed(Duration),
    Stored(u64),
}

/// Counts what all connections of a bare loop have stored. An empty store is quicker than one that has
/// been filled for a second, so the loop warms up as the gateway does before it counts.
#[derive(Debug)]
pub(super) struct Meter {
    until: Until,
    started: Instant,
    readings: AtomicU64,
    /// When the warm-up was over, and what was stored by then.
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

    /// Tells of readings that are durable.
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

    /// Readings per second since the warm-up, or in all if it was not over.
    pub(super) fn rate(&self) -> f64 {
        let (since, before) = self.warm.get().copied().unwrap_or((self.started, 0));
        let readings = self.readings.load(Ordering::Relaxed) - before;
        readings as f64 / since.elapsed().as_secs_f64()
    }
}

/// Rows for the devices of a cell, as a gateway makes them when they log in: ids of devices, streams and
/// series are what [`Frames`](super::cell::Frames) and [`rows`](super::cell::rows) say. The stream is
/// another one than a fleet will have, so `created_at` (SQL for a time) is all that must be told.
pub(super) fn registry(cell: Cell, created_at: &str) -> String {
    let devices = || 1..=cell.devices;
    let names = devices().map(|id| format!("('{NAME_PREFIX}{:05}')", id - 1));
    let streams = devices().map(|id| format!("({id},1,{created_at})"));
    let channels = catalogue::channels(cell.channels.into());
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
