//! Logins, for every database: converts the rows found for a login to its outcome.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::bounds::Reached;
use super::schemas::{
    SeriesIndex, SeriesKey, StoredSchemas, parse_declaration, series_keys, unreturned,
};
use super::{
    Admission, DeclaredChannel, DeviceId, Login, LoginOutcome, Receipt, Schema, SchemaHash,
    StreamId,
};
use crate::config::DeviceBounds;
use crate::time::{BootClock, Origin};

#[derive(Clone, Copy)]
pub(super) struct FoundDevice {
    pub(super) id: DeviceId,
    pub(super) is_enabled: bool,
    pub(super) revision: i64,
    pub(super) key_revision: i64,
}

impl FoundDevice {
    /// Returns whether the device may connect with the key that it proved.
    pub(super) fn lets_in(&self, login: &Login) -> bool {
        self.is_enabled && self.key_revision == login.key_revision
    }
}

#[derive(Clone, Copy)]
pub(super) struct StreamRow {
    pub(super) id: StreamId,
    pub(super) durable_seq: u64,
}

/// Number of boot clocks that a login receives.
pub(super) const CLOCKS_MAX: usize = 8;

/// Measurements later than the login by more than this come from a wrong clock and are ranked last.
pub(super) const MEASURED_AHEAD_MAX_US: i64 = 60_000_000;

type SchemaKey = (DeviceId, u16, SchemaHash);

/// Channels of the schemas named in logins, if they are stored with the same hash.
pub(super) struct NamedSchemas(BTreeMap<SchemaKey, Vec<DeclaredChannel>>);

/// Rows that the database has for a batch's logins.
pub(super) struct Found {
    pub(super) devices: HashMap<String, FoundDevice>,
    /// Streams by device and number; only of admitted devices.
    pub(super) streams: HashMap<(DeviceId, u64), StreamRow>,
    /// Clocks of admitted devices.
    pub(super) clocks: HashMap<DeviceId, Vec<BootClock>>,
    /// Schemas named in the logins.
    pub(super) schemas: HashMap<SchemaKey, Arc<Schema>>,
    pub(super) bounds: DeviceBounds,
}

/// Stored clocks of devices, to be merged with those of logins.
#[derive(Default)]
pub(super) struct KeptClocks(HashMap<DeviceId, Vec<BootClock>>);

impl KeptClocks {
    /// Adds a row of `clocks`. `origin_us` is the latest origin of its timeline, if the timeline was stepped.
    pub(super) fn add(&mut self, device: DeviceId, clock: BootClock, origin_us: Option<i64>) {
        let origin = Origin {
            timeline: clock.origin.timeline,
            at_us: origin_us.unwrap_or(clock.origin.at_us),
        };
        let clocks = self.0.entry(device).or_default();
        if clocks.iter().all(|known| known.boot != clock.boot) {
            clocks.push(clock.corrected(origin));
        }
    }

    /// Merges the clocks measured by logins; returns the clocks to store.
    pub(super) fn offer(&mut self, logins: &[(DeviceId, &Login)]) -> Vec<(DeviceId, BootClock)> {
        let mut changed = BTreeMap::new();
        for (device, login) in logins {
            let clocks = self.0.entry(*device).or_default();
            let place = clocks
                .iter()
                .position(|clock| clock.boot == login.clock.boot);
            let kept = match place {
                Some(place) => clocks[place].replaced_by(&login.clock),
                None => Some(login.clock),
            };
            if let Some(kept) = kept {
                match place {
                    Some(place) => clocks[place] = kept,
                    None => clocks.push(kept),
                }
                changed.insert((*device, kept.boot), kept);
            }
            sort_clocks(clocks, login);
        }
        let changed = changed.into_iter();
        changed
            .map(|((device, _), clock)| (device, clock))
            .collect()
    }

    /// Returns the clocks of each device, as its login receives them.
    pub(super) fn into_latest(mut self) -> HashMap<DeviceId, Vec<BootClock>> {
        for clocks in self.0.values_mut() {
            clocks.truncate(CLOCKS_MAX);
        }
        self.0
    }
}

/// Sorts the login's own boot first, then by latest.
pub(super) fn sort_clocks(clocks: &mut [BootClock], login: &Login) {
    let latest_us = login.at_us.saturating_add(MEASURED_AHEAD_MAX_US);
    clocks.sort_by_key(|clock| {
        let is_other = clock.boot != login.clock.boot;
        let is_ahead = clock.measured_at_us > latest_us;
        let latest_first = std::cmp::Reverse((clock.measured_at_us, clock.boot));
        (is_other, is_ahead, latest_first)
    });
}

impl Found {
    pub(super) fn outcome(&self, login: &Login) -> Result<LoginOutcome, sqlx::Error> {
        let Some(found) = self.devices.get(&login.device) else {
            return match login.may_register {
                true => Err(unreturned()),
                false => Ok(LoginOutcome::Unregistered),
            };
        };
        if found.key_revision != login.key_revision {
            return Ok(LoginOutcome::KeyReplaced);
        }
        if !found.is_enabled {
            return Ok(LoginOutcome::Disabled);
        }
        let device = found.id;
        // A login creates its stream unless the device has too many.
        let Some(stream) = self.streams.get(&(device, login.stream)) else {
            let reached = Reached::Streams(self.bounds.device_streams_max);
            return Ok(LoginOutcome::OverBound(reached));
        };
        if login.next_seq <= stream.durable_seq {
            return Ok(LoginOutcome::StreamConflict);
        }
        let named = |(schema, hash)| self.schemas.get(&(device, schema, hash));
        Ok(LoginOutcome::Admitted(Box::new(Admission {
            device,
            revision: found.revision,
            receipt: Receipt {
                stream: stream.id,
                durable_seq: stream.durable_seq,
            },
            schema: login.schema.and_then(named).cloned(),
            clocks: self.clocks.get(&device).cloned().unwrap_or_default(),
        })))
    }
}

impl NamedSchemas {
    pub(super) fn of(
        logins: &[(DeviceId, &Login)],
        stored: &StoredSchemas,
    ) -> Result<Self, sqlx::Error> {
        let mut named = BTreeMap::new();
        for (device, login) in logins {
            let Some((schema, hash)) = login.schema else {
                continue;
            };
            let stored = stored.get(&(*device, schema));
            if let Some(stored) = stored.filter(|stored| stored.hash == hash) {
                let channels = parse_declaration(&stored.declaration)?;
                named.insert((*device, schema, hash), channels);
            }
        }
        Ok(Self(named))
    }

    pub(super) fn series_keys(&self) -> Vec<SeriesKey<'_>> {
        let schemas = self.0.iter();
        schemas
            .flat_map(|((device, ..), channels)| series_keys(*device, channels))
            .collect()
    }

    pub(super) fn schemas(
        &self,
        series: &SeriesIndex<'_>,
    ) -> Result<HashMap<SchemaKey, Arc<Schema>>, sqlx::Error> {
        let schema = |(key, channels): (&SchemaKey, &Vec<_>)| {
            let (device, number, _) = *key;
            Ok((*key, series.schema(device, number, channels)?))
        };
        self.0.iter().map(schema).collect()
    }
}
