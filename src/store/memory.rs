//! An in-memory store for deterministic simulation, with the semantics of the real stores.
//!
//! Handles are cheap to clone and share one state, so that a test can inspect the store while the gateway owns
//! it. It does not model a restart: "durable" means "survives the session", and dropping the last handle
//! deletes everything.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::admission::KeptClocks;
use super::bounds::{Counts, Reached};
use super::ledger::Watermarks;
use super::rows::sessions;
use super::{
    Admission, Batch, BootClock, Committed, Declare, DeclareOutcome, DeclaredChannel, DeviceEvent,
    DeviceId, Entry, Kind, Login, LoginOutcome, REFUSALS_MAX, Receipt, Refusal, Schema,
    SchemaChannel, SchemaHash, SeriesId, SessionId, Store, StoreError, StreamId,
};
use crate::config::DeviceBounds;
use crate::metrics::Stored;
use crate::time::UNMEASURED;

#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Debug)]
pub struct StoredEntry {
    /// First stored number; greater than the entry's own only for a gap that overlapped durable numbers.
    pub first_seq: u64,
    pub entry: Entry,
}

/// Identity of a series.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SeriesKey {
    pub device: DeviceId,
    pub channel: String,
    pub unit: String,
    pub kind: Kind,
}

#[derive(Clone, Debug, Default)]
struct State {
    failures_left: u32,
    bounds: DeviceBounds,
    /// Number of an operator's latest change.
    revision: i64,
    devices: Vec<Device>,
    device_ids: HashMap<String, DeviceId>,
    streams: Vec<Stream>,
    stream_ids: HashMap<(DeviceId, u64), StreamId>,
    schemas: HashMap<(DeviceId, u16), (SchemaHash, Arc<Schema>)>,
    series: Vec<SeriesKey>,
    series_ids: HashMap<SeriesKey, SeriesId>,
    events: Vec<DeviceEvent>,
    /// Open sessions, with the events that opened them.
    sessions: BTreeMap<SessionId, DeviceEvent>,
    /// Latest origin of each timeline.
    origins: HashMap<i64, i64>,
    /// Refusals by peer, claimed name and code.
    refusals: BTreeMap<(IpAddr, String, u8), Refusal>,
}

#[derive(Clone, Debug)]
struct Device {
    name: String,
    enabled: bool,
    revision: i64,
    key_revision: i64,
    clocks: BTreeMap<u32, BootClock>,
}

#[derive(Clone, Debug)]
struct Stream {
    device: DeviceId,
    durable_seq: u64,
    entries: BTreeMap<u64, StoredEntry>,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the next `n` commits fail with [`StoreError::Transient`], storing nothing.
    pub fn fail_next_commits(&self, n: u32) {
        self.state().failures_left = n;
    }

    /// Enables or disables a device, and optionally replaces its key. Returns the number of the change, or
    /// `None` if the device does not exist.
    pub fn change(&self, device: &str, is_enabled: bool, replaces_key: bool) -> Option<i64> {
        let mut state = self.state();
        let id = state.device_ids.get(device).copied()?;
        state.revision += 1;
        let revision = state.revision;
        let device = state.device_mut(id);
        device.enabled = is_enabled;
        device.revision = revision;
        if replaces_key {
            device.key_revision = revision;
        }
        Some(revision)
    }

    /// Returns all streams with the names of their devices.
    pub fn streams(&self) -> Vec<(StreamId, String)> {
        let state = self.state();
        let name = |stream: &Stream| state.devices[row(stream.device.0)].name.clone();
        (1..)
            .map(StreamId)
            .zip(state.streams.iter().map(name))
            .collect()
    }

    /// Returns the durable number of a stream; 0 if it does not exist.
    pub fn durable_seq(&self, stream: StreamId) -> u64 {
        self.state()
            .streams
            .get(row(stream.0))
            .map_or(0, |stream| stream.durable_seq)
    }

    /// Returns the stored entries of a stream, by sequence number.
    pub fn entries(&self, stream: StreamId) -> BTreeMap<u64, StoredEntry> {
        let state = self.state();
        state
            .streams
            .get(row(stream.0))
            .map(|stream| stream.entries.clone())
            .unwrap_or_default()
    }

    pub fn series(&self, series: SeriesId) -> Option<SeriesKey> {
        self.state().series.get(row(series.0)).cloned()
    }

    /// Returns all stored clocks of a device, by boot.
    pub fn clocks(&self, device: DeviceId) -> Vec<BootClock> {
        let state = self.state();
        let device = state.devices.get(row(device.0));
        device
            .map(|device| device.clocks.values().copied().collect())
            .unwrap_or_default()
    }

    /// Returns the session events in order.
    pub fn events(&self) -> Vec<DeviceEvent> {
        self.state().events.clone()
    }

    /// Locks the state. A test that panicked with the lock held has already failed, and the maps are still
    /// consistent.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        self.state().commit(batch)
    }

    async fn close(self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl State {
    fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        if self.failures_left > 0 {
            self.failures_left -= 1;
            return Err(StoreError::Transient(
                "a fault injected by the test".to_owned(),
            ));
        }
        // Entries first: only this step can fail, and it must fail before any change. Declares do not depend on
        // it.
        let (receipts, stored) = self.store_entries(&batch.entries)?;
        let declares = batch
            .declares
            .iter()
            .map(|declare| self.declare(declare))
            .collect();
        let logins = batch.logins.iter().map(|login| self.login(login)).collect();
        for (device, clock) in &batch.clocks {
            let clocks = &mut self.device_mut(*device).clocks;
            if clock.delay_us == UNMEASURED {
                clocks.entry(clock.boot).or_insert(*clock);
            } else {
                clocks.insert(clock.boot, *clock);
            }
        }
        self.origins.extend(
            batch
                .steps
                .iter()
                .map(|step| (step.origin.timeline, step.origin.at_us)),
        );
        let (begun, ended) = sessions(&batch.events.iter().collect::<Vec<_>>());
        self.sessions.extend(
            begun
                .iter()
                .map(|(session, event)| (*session, (*event).clone())),
        );
        self.sessions.retain(|session, _| !ended.contains(session));
        self.events.extend_from_slice(&batch.events);
        let refused = |refusal: &Refusal| {
            let device = self.device_ids.get(&refusal.device)?;
            refusal.is_audited.then(|| refusal.of(*device))
        };
        let refusals = batch.refusals.iter().filter_map(refused);
        self.events.extend(refusals);
        self.note_refusals(&batch.refusals);
        Ok(Committed {
            logins,
            declares,
            receipts,
            stored,
        })
    }

    fn note_refusals(&mut self, refusals: &[Refusal]) {
        for refusal in refusals {
            let key = (refusal.peer, refusal.device.clone(), refusal.code);
            let noted = self.refusals.entry(key).or_insert_with(|| Refusal {
                count: 0,
                ..refusal.clone()
            });
            noted.count += refusal.count;
            noted.at_us = refusal.at_us;
        }
        let now_us = refusals.last().map(|refusal| refusal.at_us);
        while self.refusals.len() > REFUSALS_MAX as usize {
            let age = |refusal: &Refusal| (Some(refusal.at_us) <= now_us, refusal.at_us);
            let oldest = self.refusals.iter().min_by_key(|(_, refusal)| age(refusal));
            let Some(key) = oldest.map(|(key, _)| key.clone()) else {
                break;
            };
            self.refusals.remove(&key);
        }
    }

    fn store_entries(&mut self, entries: &[Entry]) -> Result<(Vec<Receipt>, Stored), StoreError> {
        let durable = entries.iter().filter_map(|entry| {
            let stream = self.streams.get(row(entry.stream.0))?;
            Some((entry.stream, stream.durable_seq))
        });
        let mut watermarks = Watermarks::new(durable);
        let appended = watermarks
            .append(entries)
            .map_err(|error| StoreError::Replaced(error.to_string()))?;
        for item in appended {
            let stored = StoredEntry {
                first_seq: item.first_seq,
                entry: item.entry.clone(),
            };
            self.stream_mut(item.entry.stream)
                .entries
                .insert(item.entry.seq, stored);
        }
        for (stream, progress) in watermarks.moved() {
            self.stream_mut(stream).durable_seq = progress.durable_seq;
        }
        Ok((watermarks.receipts(), watermarks.stored()))
    }

    fn declare(&mut self, declare: &Declare) -> DeclareOutcome {
        let key = (declare.device, declare.schema);
        if let Some((hash, schema)) = self.schemas.get(&key) {
            return if *hash == declare.hash {
                DeclareOutcome::Accepted(Arc::clone(schema))
            } else {
                DeclareOutcome::Conflict
            };
        }
        if let Some(reached) = self.reached(declare) {
            return DeclareOutcome::OverBound(reached);
        }
        let channels = declare
            .channels
            .iter()
            .map(|channel| self.channel(declare.device, channel));
        let schema = Arc::new(Schema {
            schema: declare.schema,
            channels: channels.collect(),
        });
        self.schemas
            .insert(key, (declare.hash, Arc::clone(&schema)));
        DeclareOutcome::Accepted(schema)
    }

    /// Returns the limit that a new schema would exceed.
    fn reached(&self, declare: &Declare) -> Option<Reached> {
        let device = declare.device;
        let schemas = self.schemas.keys().filter(|(of, _)| *of == device);
        let series = self.series.iter().filter(|key| key.device == device);
        let keys = declare.channels.iter().map(|channel| key(device, channel));
        let new = keys.filter(|key| !self.series_ids.contains_key(key));
        let counts = Counts {
            schemas: schemas.count() as u64,
            series: series.count() as u64,
        };
        self.bounds.reached(counts, new.count() as u64)
    }

    fn channel(&mut self, device: DeviceId, declared: &DeclaredChannel) -> SchemaChannel {
        let key = key(device, declared);
        let series = *self.series_ids.entry(key).or_insert_with_key(|key| {
            self.series.push(key.clone());
            SeriesId(self.series.len() as i64)
        });
        SchemaChannel {
            id: declared.id,
            kind: declared.kind,
            exp10: declared.exp10,
            series,
        }
    }

    fn login(&mut self, login: &Login) -> LoginOutcome {
        if !login.may_register && !self.device_ids.contains_key(&login.device) {
            return LoginOutcome::Unregistered;
        }
        let device = self.find_or_create_device(&login.device);
        let Device {
            enabled,
            revision,
            key_revision,
            ..
        } = *self.device_mut(device);
        if key_revision != login.key_revision {
            return LoginOutcome::KeyReplaced;
        }
        if !enabled {
            return LoginOutcome::Disabled;
        }
        if !self.stream_ids.contains_key(&(device, login.stream)) {
            let streams_max = self.bounds.device_streams_max;
            let of_device = self.stream_ids.keys().filter(|(of, _)| *of == device);
            if of_device.count() >= streams_max as usize {
                return LoginOutcome::OverBound(Reached::Streams(streams_max));
            }
        }
        let stream = self.find_or_create_stream(device, login.stream);
        let durable_seq = self.stream_mut(stream).durable_seq;
        if login.next_seq <= durable_seq {
            return LoginOutcome::StreamConflict;
        }
        let clocks = self.offer_clock(device, login);
        LoginOutcome::Admitted(Box::new(Admission {
            device,
            revision,
            receipt: Receipt {
                stream,
                durable_seq,
            },
            schema: login.schema.and_then(|(schema, hash)| {
                let (stored, schema) = self.schemas.get(&(device, schema))?;
                (*stored == hash).then(|| Arc::clone(schema))
            }),
            clocks,
        }))
    }

    fn find_or_create_device(&mut self, name: &str) -> DeviceId {
        if let Some(id) = self.device_ids.get(name) {
            return *id;
        }
        let device = Device {
            name: name.to_owned(),
            enabled: true,
            revision: 0,
            key_revision: 0,
            clocks: BTreeMap::new(),
        };
        self.devices.push(device);
        let id = DeviceId(self.devices.len() as i64);
        self.device_ids.insert(name.to_owned(), id);
        id
    }

    fn find_or_create_stream(&mut self, device: DeviceId, stream: u64) -> StreamId {
        *self.stream_ids.entry((device, stream)).or_insert_with(|| {
            self.streams.push(Stream {
                device,
                durable_seq: 0,
                entries: BTreeMap::new(),
            });
            StreamId(self.streams.len() as i64)
        })
    }

    fn offer_clock(&mut self, device: DeviceId, login: &Login) -> Vec<BootClock> {
        let mut kept = KeptClocks::default();
        for clock in self.devices[row(device.0)].clocks.values() {
            let origin_us = self.origins.get(&clock.origin.timeline).copied();
            kept.add(device, *clock, origin_us);
        }
        let clocks = &mut self.device_mut(device).clocks;
        for (_, clock) in kept.offer(&[(device, login)]) {
            clocks.insert(clock.boot, clock);
        }
        kept.into_latest().remove(&device).unwrap_or_default()
    }

    /// Returns a device's row, which exists because this store assigned the id.
    fn device_mut(&mut self, device: DeviceId) -> &mut Device {
        &mut self.devices[row(device.0)]
    }

    fn stream_mut(&mut self, stream: StreamId) -> &mut Stream {
        &mut self.streams[row(stream.0)]
    }
}

fn key(device: DeviceId, declared: &DeclaredChannel) -> SeriesKey {
    SeriesKey {
        device,
        channel: declared.name.clone(),
        unit: declared.unit.clone(),
        kind: declared.kind,
    }
}

/// Converts an id to an index. Ids count from 1, like SQL's; smaller ids are never assigned.
fn row(id: i64) -> usize {
    usize::try_from(id - 1).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
