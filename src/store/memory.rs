//! A store in memory: what simulation runs over, and the plainest statement of what every store does.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::ledger::Watermarks;
use super::{
    Admission, Batch, Committed, Content, Declare, DeclareOutcome, DeviceEvent, DeviceId, Entry,
    Login, LoginOutcome, Receipt, Schema, SchemaChannel, SchemaHash, SeriesId, Store, StoreError,
    StreamId,
};
use crate::clock::BootClock;

/// Clocks that a login brings back.
const BOOTS_MAX: usize = 8;

/// A store whose durability lasts as long as the value.
#[derive(Debug, Default)]
pub struct MemoryStore {
    devices: HashMap<String, DeviceId>,
    disabled: Vec<DeviceId>,
    streams: HashMap<(DeviceId, u64), StreamId>,
    durable_seqs: HashMap<StreamId, u64>,
    schemas: HashMap<(DeviceId, u16), (SchemaHash, Arc<Schema>)>,
    series: HashMap<(DeviceId, String, String, u8), SeriesId>,
    clocks: HashMap<DeviceId, Vec<BootClock>>,
    ledger: BTreeMap<(StreamId, u64), (u64, Content)>,
    events: Vec<DeviceEvent>,
    transient_failures: usize,
}

impl MemoryStore {
    /// The next `count` commits fail and do nothing.
    pub fn fail_next(&mut self, count: usize) {
        self.transient_failures = count;
    }

    /// An operator disables a device.
    pub fn disable(&mut self, device: &str) {
        self.disabled.extend(self.devices.get(device));
    }

    /// What is stored of a device's stream: number, first number covered, content.
    pub fn stored(&self, device: &str, stream: u64) -> Vec<(u64, u64, &Content)> {
        let Some(stream) = self
            .devices
            .get(device)
            .and_then(|device| self.streams.get(&(*device, stream)))
        else {
            return Vec::new();
        };
        self.ledger
            .range((*stream, 0)..=(*stream, u64::MAX))
            .map(|((_, seq), (first_seq, content))| (*seq, *first_seq, content))
            .collect()
    }

    /// The audit trail.
    pub fn events(&self) -> &[DeviceEvent] {
        &self.events
    }

    fn login(&mut self, login: &Login) -> LoginOutcome {
        let next_device = DeviceId(self.devices.len() as i64 + 1);
        let device = *self
            .devices
            .entry(login.device.clone())
            .or_insert(next_device);
        if self.disabled.contains(&device) {
            return LoginOutcome::Disabled;
        }
        let next_stream = StreamId(self.streams.len() as i64 + 1);
        let stream = *self
            .streams
            .entry((device, login.stream))
            .or_insert(next_stream);
        let durable_seq = *self.durable_seqs.entry(stream).or_default();
        if login.next_seq <= durable_seq {
            return LoginOutcome::StreamConflict;
        }
        let schema = login.schema.and_then(|(number, hash)| {
            let (stored, schema) = self.schemas.get(&(device, number))?;
            (*stored == hash).then(|| Arc::clone(schema))
        });
        let receipt = Receipt {
            stream,
            durable_seq,
        };
        let clocks = self.clocks.get(&device).cloned().unwrap_or_default();
        LoginOutcome::Admitted(Box::new(Admission {
            device,
            receipt,
            schema,
            clocks,
        }))
    }

    fn declare(&mut self, declare: &Declare) -> DeclareOutcome {
        if let Some((hash, schema)) = self.schemas.get(&(declare.device, declare.schema)) {
            return if *hash == declare.hash {
                DeclareOutcome::Accepted(Arc::clone(schema))
            } else {
                DeclareOutcome::Conflict
            };
        }
        let mut channels = Vec::new();
        for channel in &declare.channels {
            let key = (
                declare.device,
                channel.name.clone(),
                channel.unit.clone(),
                channel.kind as u8,
            );
            let next = SeriesId(self.series.len() as i64 + 1);
            let series = *self.series.entry(key).or_insert(next);
            let (id, kind, exp10) = (channel.id, channel.kind, channel.exp10);
            channels.push(SchemaChannel {
                id,
                kind,
                exp10,
                series,
            });
        }
        let schema = Arc::new(Schema {
            schema: declare.schema,
            channels,
        });
        let kept = (declare.hash, Arc::clone(&schema));
        self.schemas.insert((declare.device, declare.schema), kept);
        DeclareOutcome::Accepted(schema)
    }

    fn store(&mut self, entries: &[Entry]) -> Vec<Receipt> {
        let stored = entries.iter().map(|entry| {
            (
                entry.stream,
                self.durable_seqs
                    .get(&entry.stream)
                    .copied()
                    .unwrap_or_default(),
            )
        });
        let mut watermarks = Watermarks::new(stored);
        for (entry, first_seq) in watermarks.admit(entries) {
            let key = (entry.stream, entry.seq);
            let before = self.ledger.insert(key, (first_seq, entry.content.clone()));
            assert!(before.is_none(), "the ledger takes each number once");
        }
        let receipts = watermarks.receipts();
        for receipt in &receipts {
            self.durable_seqs
                .insert(receipt.stream, receipt.durable_seq);
        }
        receipts
    }

    fn keep_clock(&mut self, device: DeviceId, clock: BootClock) {
        let clocks = self.clocks.entry(device).or_default();
        clocks.retain(|known| known.boot != clock.boot);
        clocks.insert(0, clock);
        clocks.truncate(BOOTS_MAX);
    }
}

impl Store for MemoryStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        if self.transient_failures > 0 {
            self.transient_failures -= 1;
            return Err(StoreError::Transient("failure on order".into()));
        }
        let declares = batch
            .declares
            .iter()
            .map(|declare| self.declare(declare))
            .collect();
        let receipts = self.store(&batch.entries);
        let logins = batch.logins.iter().map(|login| self.login(login)).collect();
        for (device, clock) in &batch.clocks {
            self.keep_clock(*device, *clock);
        }
        self.events.extend(batch.events.iter().cloned());
        Ok(Committed {
            logins,
            declares,
            receipts,
        })
    }

    async fn close(self) -> Result<(), StoreError> {
        Ok(())
    }
}
