//! Logins and declares, as far as they do not depend on the database: how a schema is kept, and what
//! the rows found for a login come to.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use fieldgate_protocol::column::Kind;
use serde::{Deserialize, Serialize};

use super::{
    Admission, Declare, DeclareOutcome, DeclaredChannel, DeviceId, Login, LoginOutcome, Receipt,
    Schema, SchemaChannel, SchemaHash, SeriesId, StreamId,
};
use crate::clock::BootClock;

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

/// The series of some devices.
#[derive(Default)]
pub(super) struct SeriesIndex(HashMap<DeviceId, Vec<SeriesRow>>);

/// A row of `series`.
pub(super) struct SeriesRow {
    pub(super) id: SeriesId,
    pub(super) channel: String,
    pub(super) unit: String,
    pub(super) kind: String,
}

/// What the database has of a batch's logins.
pub(super) struct Found {
    /// By name.
    pub(super) devices: HashMap<String, FoundDevice>,
    /// By device and number; of devices that are let in.
    pub(super) streams: HashMap<(DeviceId, u64), StreamRow>,
    /// Of admitted devices.
    pub(super) clocks: HashMap<DeviceId, Vec<BootClock>>,
    /// Those that the logins name.
    pub(super) schemas: StoredSchemas,
    /// Of the schemas' devices.
    pub(super) series: SeriesIndex,
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
        let stream = self.streams.get(&(device, login.stream));
        let stream = stream.ok_or_else(unreturned)?;
        if login.next_seq <= stream.durable_seq {
            return Ok(LoginOutcome::StreamConflict);
        }
        Ok(LoginOutcome::Admitted(Box::new(Admission {
            device,
            revision: found.revision,
            receipt: Receipt {
                stream: stream.id,
                durable_seq: stream.durable_seq,
            },
            schema: login_schema(login, device, &self.schemas, &self.series)?,
            clocks: self.clocks.get(&device).cloned().unwrap_or_default(),
        })))
    }
}

impl SeriesIndex {
    pub(super) fn add(&mut self, device: DeviceId, series: SeriesRow) {
        self.0.entry(device).or_default().push(series);
    }

    /// The outcome for a declare that was found to be kept.
    pub(super) fn accepted(&self, declare: &Declare) -> Result<DeclareOutcome, sqlx::Error> {
        let channel = |channel| {
            let found = self.channel(declare.device, channel);
            found.ok_or_else(unreturned)
        };
        let channels = declare.channels.iter().map(channel);
        Ok(DeclareOutcome::Accepted(Arc::new(Schema {
            schema: declare.schema,
            channels: channels.collect::<Result<_, _>>()?,
        })))
    }

    pub(super) fn channel(
        &self,
        device: DeviceId,
        declared: &DeclaredChannel,
    ) -> Option<SchemaChannel> {
        let series = self.0.get(&device)?.iter().find(|series| {
            series.channel == declared.name
                && series.unit == declared.unit
                && series.kind == declared.kind.name()
        })?;
        Some(SchemaChannel {
            id: declared.id,
            kind: declared.kind,
            exp10: declared.exp10,
            series: series.id,
        })
    }
}

/// The schema that a login names, if it is stored with the same hash.
fn login_schema(
    login: &Login,
    device: DeviceId,
    schemas: &StoredSchemas,
    series: &SeriesIndex,
) -> Result<Option<Arc<Schema>>, sqlx::Error> {
    let Some((schema, hash)) = login.schema else {
        return Ok(None);
    };
    let Some(stored) = schemas.get(&(device, schema)) else {
        return Ok(None);
    };
    if stored.hash != SchemaHash::as_slice(&hash) {
        return Ok(None);
    }
    let channels = parse_declaration(&stored.declaration)?;
    let channels = channels
        .iter()
        .map(|channel| series.channel(device, channel).ok_or_else(unreturned))
        .collect::<Result<_, _>>()?;
    Ok(Some(Arc::new(Schema { schema, channels })))
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
