//! How many series, schemas and streams one device may have. What a device has already stays usable: a bound
//! refuses only what would be one more.
//!
//! Pure, like [`super::ledger`]: a store counts inside its transaction and asks here.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::admission::{SeriesIndex, StoredSchemas, series_keys};
use super::{Declare, DeviceId};

/// The bounds that hold for each device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBounds {
    /// Series, over all schemas.
    pub series_max: u32,
    /// Schemas.
    pub schemas_max: u32,
    /// Streams.
    pub streams_max: u32,
}

impl DeviceBounds {
    /// Room for a device with 100 channels that renames all of them 40 times, and for one that draws a new
    /// stream at each boot and boots each hour for two years.
    pub const DEFAULT: DeviceBounds = DeviceBounds {
        series_max: 4096,
        schemas_max: 1024,
        streams_max: 16_384,
    };

    /// The bound that one more schema with `new_series` would exceed, for a device that has `counts`.
    pub(super) fn reached(&self, counts: Counts, new_series: u64) -> Option<Reached> {
        if counts.schemas >= u64::from(self.schemas_max) {
            return Some(Reached::Schemas(self.schemas_max));
        }
        let is_over = new_series > 0 && counts.series + new_series > u64::from(self.series_max);
        is_over.then_some(Reached::Series(self.series_max))
    }
}

impl Default for DeviceBounds {
    fn default() -> Self {
        DeviceBounds::DEFAULT
    }
}

/// A bound that a device has reached, and its figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// [`DeviceBounds::series_max`].
    Series(u32),
    /// [`DeviceBounds::schemas_max`].
    Schemas(u32),
    /// [`DeviceBounds::streams_max`].
    Streams(u32),
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (max, what) = match self {
            Reached::Series(max) => (max, "series"),
            Reached::Schemas(max) => (max, "schemas"),
            Reached::Streams(max) => (max, "streams"),
        };
        write!(f, "a device may have {max} {what} (--device-{what}-max)")
    }
}

/// What a device has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) schemas: u64,
    pub(super) series: u64,
}

/// What is to be done with a [`Declare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeclareVerdict {
    /// It is stored with the same content, perhaps by an earlier one of the batch.
    Known,
    /// Store it.
    New,
    /// Its number is taken by other content.
    Conflict,
    /// Storing it would exceed a bound.
    Over(Reached),
}

impl DeclareVerdict {
    /// Whether the schema is in the store afterwards.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self, DeclareVerdict::Known | DeclareVerdict::New)
    }
}

/// How many streams devices may still add.
pub(super) struct StreamRoom {
    counts: HashMap<DeviceId, i64>,
    bounds: DeviceBounds,
}

impl StreamRoom {
    /// `counts` has what the devices have.
    pub(super) fn new(counts: HashMap<DeviceId, i64>, bounds: DeviceBounds) -> StreamRoom {
        StreamRoom { counts, bounds }
    }

    /// Takes room for one stream more, if there is any.
    pub(super) fn take(&mut self, device: DeviceId) -> bool {
        let count = self.counts.entry(device).or_default();
        let has_room = *count < i64::from(self.bounds.streams_max);
        *count += i64::from(has_room);
        has_room
    }
}

/// The declares whose number is not stored, which [`judge_declares`] needs counts and series for.
pub(super) fn new_declares<'d>(
    declares: &'d [Declare],
    stored: &StoredSchemas,
) -> Vec<&'d Declare> {
    let is_new = |declare: &&Declare| !stored.contains_key(&(declare.device, declare.schema));
    declares.iter().filter(is_new).collect()
}

/// Judges declares in their order. `series` has what there is of the new ones' series, `counts` what their
/// devices have.
pub(super) fn judge_declares(
    declares: &[Declare],
    stored: &StoredSchemas,
    series: &SeriesIndex<'_>,
    mut counts: HashMap<DeviceId, Counts>,
    bounds: DeviceBounds,
) -> Vec<DeclareVerdict> {
    let mut hashes: HashMap<_, &[u8]> = HashMap::new();
    let mut new_series = HashSet::new();
    let mut verdicts = Vec::with_capacity(declares.len());
    for declare in declares {
        let key = (declare.device, declare.schema);
        let stored = stored.get(&key).map(|stored| stored.hash.as_slice());
        if let Some(hash) = hashes.get(&key).copied().or(stored) {
            verdicts.push(match hash == declare.hash {
                true => DeclareVerdict::Known,
                false => DeclareVerdict::Conflict,
            });
            continue;
        }
        let missing: HashSet<_> = series_keys(declare.device, &declare.channels)
            .filter(|key| !series.contains(key) && !new_series.contains(key))
            .collect();
        let counts = counts.entry(declare.device).or_default();
        if let Some(reached) = bounds.reached(*counts, missing.len() as u64) {
            verdicts.push(DeclareVerdict::Over(reached));
            continue;
        }
        counts.schemas += 1;
        counts.series += missing.len() as u64;
        new_series.extend(missing);
        hashes.insert(key, &declare.hash);
        verdicts.push(DeclareVerdict::New);
    }
    verdicts
}
