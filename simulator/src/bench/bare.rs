//! What the bare loops of both stores have in common.

use std::time::{Duration, Instant};

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
    Passed(Duration),
    Stored(u64),
}

impl Until {
    pub(super) fn is_reached(self, started: Instant, readings: u64) -> bool {
        match self {
            Until::Passed(duration) => started.elapsed() >= duration,
            Until::Stored(count) => readings >= count,
        }
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
