//! Schemas and series for every database: the stored form of a schema and the decision on a DECLARE.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use fieldgate_protocol::value::Kind;
use serde::{Deserialize, Serialize};

use super::bounds::{Counts, Reached};
use super::{Declare, DeclareOutcome, DeclaredChannel, DeviceId, Schema, SchemaChannel, SeriesId};
use crate::config::DeviceBounds;

/// A channel in `schemas.declaration`.
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

/// Device, channel, unit and kind, which together identify a series. Always look up series by the full key: a
/// device may have declared any number of them.
pub(super) type SeriesKey<'a> = (DeviceId, &'a str, &'a str, &'a str);

/// Series that the schemas of a batch need.
#[derive(Default)]
pub(super) struct SeriesIndex<'a>(HashMap<SeriesKey<'a>, SeriesId>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeclareVerdict {
    /// Already stored with the same content, possibly by an earlier declare of the batch.
    Known,
    /// Store it.
    New,
    /// The schema number is stored with different content.
    Conflict,
    /// Storing it would exceed a limit.
    Over(Reached),
}

impl DeclareVerdict {
    /// Returns whether the schema is stored after the batch.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self, DeclareVerdict::Known | DeclareVerdict::New)
    }
}

/// Returns the declares with a new schema number, for which [`judge_declares`] needs the counts and series.
pub(super) fn new_declares<'d>(
    declares: &'d [Declare],
    stored: &StoredSchemas,
) -> Vec<&'d Declare> {
    let is_new = |declare: &&Declare| !stored.contains_key(&(declare.device, declare.schema));
    declares.iter().filter(is_new).collect()
}

/// Decides on declares in order. `series` has the existing series of the new declares, `counts` the totals of
/// their devices.
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

impl<'a> SeriesIndex<'a> {
    /// Creates the index. `found` pairs indexes into `wanted` with the ids of existing series.
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

    /// Converts a verdict to an outcome. The index must contain the series of every stored declare.
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

    pub(super) fn schema(
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

/// Returns a schema's stored form.
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
        |what: String| sqlx::Error::Protocol(format!("could not read schemas.declaration: {what}"));
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

/// Returns the error for a row that this transaction wrote but could not read back.
pub(super) fn unreturned() -> sqlx::Error {
    sqlx::Error::RowNotFound
}
