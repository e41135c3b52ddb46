//! Logins and declares, as far as they do not depend on the database: how a schema is kept, and what
//! the rows found for a login come to.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use fieldgate_protocol::column::Kind;
use serde::{Deserialize, Serialize};

use super::bounds::{DeclareVerdict, DeviceBounds, Reached};
use super::{
    Admission, Declare, DeclareOutcome, DeclaredChannel, DeviceId, Login, LoginOutcome, Receipt,
    Schema, SchemaChannel, SchemaHash, SeriesId, StreamId,
};
use crate::time::{BootClock, Origin};

/// A channel as it stands in `schemas.declaration`.
#[derive(Serialize, Deserialize)]
struct ChannelJson<'a> {
    id: u8,
    name: Cow<'a, str>,
    unit: Cow<'a, str>,
    kind: Cow<'a, str>,
    exp10: i8,
}

/// A row of `schemas`.
pub(super) struct StoredSchema {
    pub(super) hash: Vec<u8>,
    pub(super) declaration: String,
}

pub(super) type StoredSchemas = HashMap<(DeviceId, u16), StoredSchema>;

/// A device, as its row stands.
#[derive(Clone, Copy)]
pub(super) struct FoundDevice {
    pub(super) id: DeviceId,
    pub(super) is_enabled: bool,
    pub(super) revision: i64,
    pub(super) key_revision: i64,
}

impl FoundDevice {
    /// Whether it may come in with the key that it proved.
    pub(super) fn lets_in(&self, login: &Login) -> bool {
        self.is_enabled && self.key_revision == login.key_revision
    }
}

/// Where a stream stands.
#[derive(Clone, Copy)]
pub(super) struct StreamRow {
    pub(super) id: StreamId,
    pub(super) durable_seq: u64,
}

/// How many boots' clocks a login gets.
pub(super) const CLOCKS_MAX: usize = 8;
/// Clocks that were measured later than a login by more than this were measured by a wrong clock, and come
/// after all others.
pub(super) const MEASURED_AHEAD_MAX_US: i64 = 60_000_000;

type SchemaKey = (DeviceId, u16, SchemaHash);

/// The channels of the schemas that logins name, where they are stored with the same hash.
pub(super) struct NamedSchemas(BTreeMap<SchemaKey, Vec<DeclaredChannel>>);

/// Device, channel, unit and kind, which tell a series from all others. By nothing less are series
/// looked for: a device may have declared any number of them.
pub(super) type SeriesKey<'a> = (DeviceId, &'a str, &'a str, &'a str);

/// The series that a batch's schemas need.
#[derive(Default)]
pub(super) struct SeriesIndex<'a>(HashMap<SeriesKey<'a>, SeriesId>);

/// What the database has of a batch's logins.
pub(super) struct Found {
    /// By name.
    pub(super) devices: HashMap<String, FoundDevice>,
    /// By device and number; of devices that are let in.
    pub(super) streams: HashMap<(DeviceId, u64), StreamRow>,
    /// Of admitted devices.
    pub(super) clocks: HashMap<DeviceId, Vec<BootClock>>,
    /// Those that the logins name.
    pub(super) schemas: HashMap<SchemaKey, Arc<Schema>>,
    pub(super) bounds: DeviceBounds,
}

/// The clocks that a store keeps of devices, to which logins bring others.
#[derive(Default)]
pub(super) struct KeptClocks(HashMap<DeviceId, Vec<BootClock>>);

impl KeptClocks {
    /// Takes in a row of `clocks`. `origin_us` is where its timeline was set to last, if it was set.
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

    /// Takes in what logins have measured; returns what is to be stored of it.
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

    /// Those of each device, as its login gets them.
    pub(super) fn into_latest(mut self) -> HashMap<DeviceId, Vec<BootClock>> {
        for clocks in self.0.values_mut() {
            clocks.truncate(CLOCKS_MAX);
        }
        self.0
    }
}

/// The boot of the login first, then the latest.
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
        // A stream that a login brings is made, unless the device has too many.
        let Some(stream) = self.streams.get(&(device, login.stream)) else {
            let reached = Reached::Streams(self.bounds.streams_max);
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

impl<'a> SeriesIndex<'a> {
    /// `found` has the places in `wanted` of what there is, and its ids.
    pub(super) fn new(wanted: &[SeriesKey<'a>], found: &[(i64, i64)]) -> Self {
        let series = |(n, id): &(i64, i64)| (wanted[*n as usize], SeriesId(*id));
        Self(found.iter().map(series).collect())
    }

    pub(super) fn contains(&self, key: &SeriesKey<'a>) -> bool {
        self.0.contains_key(key)
    }

    pub(super) fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    /// What a verdict comes to; a kept declare's series are here.
    pub(super) fn outcome(
        &self,
        declare: &Declare,
        verdict: DeclareVerdict,
    ) -> Result<DeclareOutcome, sqlx::Error> {
        Ok(match verdict {
            DeclareVerdict::Conflict => DeclareOutcome::Conflict,
            DeclareVerdict::Over(reached) => DeclareOutcome::OverBound(reached),
            DeclareVerdict::Known | DeclareVerdict::New => {
                let schema = self.schema(declare.device, declare.schema, &declare.channels)?;
                DeclareOutcome::Accepted(schema)
            }
        })
    }

    fn schema(
        &self,
        device: DeviceId,
        schema: u16,
        channels: &[DeclaredChannel],
    ) -> Result<Arc<Schema>, sqlx::Error> {
        let channel = |channel: &DeclaredChannel| {
            let series = self.0.get(&series_key(device, channel));
            Ok(channel.with(*series.ok_or_else(unreturned)?))
        };
        let channels: Result<_, sqlx::Error> = channels.iter().map(channel).collect();
        let channels = channels?;
        Ok(Arc::new(Schema { schema, channels }))
    }
}

impl DeclaredChannel {
    /// As it is once its series is known.
    pub(super) fn with(&self, series: SeriesId) -> SchemaChannel {
        SchemaChannel {
            id: self.id,
            kind: self.kind,
            exp10: self.exp10,
            series,
        }
    }
}

pub(super) fn series_key(device: DeviceId, channel: &DeclaredChannel) -> SeriesKey<'_> {
    (device, &channel.name, &channel.unit, channel.kind.name())
}

pub(super) fn series_keys(
    device: DeviceId,
    channels: &[DeclaredChannel],
) -> impl Iterator<Item = SeriesKey<'_>> {
    channels
        .iter()
        .map(move |channel| series_key(device, channel))
}

/// A schema as it is kept.
pub(super) fn declaration(channels: &[DeclaredChannel]) -> Result<String, sqlx::Error> {
    let channels: Vec<ChannelJson<'_>> = channels
        .iter()
        .map(|channel| ChannelJson {
            id: channel.id,
            name: channel.name.as_str().into(),
            unit: channel.unit.as_str().into(),
            kind: channel.kind.name().into(),
            exp10: channel.exp10,
        })
        .collect();
    serde_json::to_string(&channels).map_err(|error| sqlx::Error::Encode(error.into()))
}

pub(super) fn parse_declaration(declaration: &str) -> Result<Vec<DeclaredChannel>, sqlx::Error> {
    let damaged =
        |what: String| sqlx::Error::Protocol(format!("schemas.declaration cannot be read: {what}"));
    let channels: Vec<ChannelJson<'_>> =
        serde_json::from_str(declaration).map_err(|error| damaged(error.to_string()))?;
    let channel = |channel: ChannelJson<'_>| {
        let kind = parse_kind(&channel.kind);
        Ok(DeclaredChannel {
            id: channel.id,
            kind: kind.ok_or_else(|| damaged(format!("kind {}", channel.kind)))?,
            name: channel.name.into_owned(),
            unit: channel.unit.into_owned(),
            exp10: channel.exp10,
        })
    };
    channels.into_iter().map(channel).collect()
}

fn parse_kind(word: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| kind.name() == word)
}

/// A row that was written a moment ago in the same transaction was not found again.
fn unreturned() -> sqlx::Error {
    sqlx::Error::RowNotFound
}
