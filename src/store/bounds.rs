//! Limits the number of series, schemas and streams of a device. Existing ones stay usable: a limit rejects
//! only additional ones.
//!
//! Pure, like [`super::ledger`]: a store counts within its transaction and calls this module.

use std::collections::HashMap;
use std::fmt;

use super::DeviceId;
use crate::config::DeviceBounds;

impl DeviceBounds {
    /// Returns the limit that one more schema with `new_series` would exceed, for a device with `counts`.
    pub(super) fn reached(&self, counts: Counts, new_series: u64) -> Option<Reached> {
        if counts.schemas >= u64::from(self.device_schemas_max) {
            return Some(Reached::Schemas(self.device_schemas_max));
        }
        let is_over =
            new_series > 0 && counts.series + new_series > u64::from(self.device_series_max);
        is_over.then_some(Reached::Series(self.device_series_max))
    }
}

/// A limit that a device has reached, with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// [`DeviceBounds::device_series_max`].
    Series(u32),
    /// [`DeviceBounds::device_schemas_max`].
    Schemas(u32),
    /// [`DeviceBounds::device_streams_max`].
    Streams(u32),
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (max, what) = match self {
            Reached::Series(max) => (max, "series"),
            Reached::Schemas(max) => (max, "schemas"),
            Reached::Streams(max) => (max, "streams"),
        };
        write!(
            f,
            "device limit of {max} {what} reached (--device-{what}-max)"
        )
    }
}

/// Number of rows that a device has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) schemas: u64,
    pub(super) series: u64,
}

/// Number of streams that devices may still add.
pub(super) struct StreamRoom {
    counts: HashMap<DeviceId, i64>,
    bounds: DeviceBounds,
}

impl StreamRoom {
    pub(super) fn new(counts: HashMap<DeviceId, i64>, bounds: DeviceBounds) -> StreamRoom {
        StreamRoom { counts, bounds }
    }

    /// Reserves one more stream; returns whether the limit allows it.
    pub(super) fn take(&mut self, device: DeviceId) -> bool {
        let count = self.counts.entry(device).or_default();
        let fits = *count < i64::from(self.bounds.device_streams_max);
        *count += i64::from(fits);
        fits
    }
}
