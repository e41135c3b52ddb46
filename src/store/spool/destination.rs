//! The database that a spool drains into, under the database's ids.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use fieldgate_protocol::frame::types;

use crate::store::postgres::{OpenError, PostgresSettings, PostgresStore, REASON_LOST_BY_STORE};
use crate::store::sqlite::spool::{Change, Chunk, DeviceRow, SeriesRow, SpoolReader, StreamRow};
use crate::store::{
    Batch, Committed, Content, DeviceId, Entry, SeriesId, Store, StoreError, StreamId,
};

/// The database, and the ids there of rows in the spool.
pub(super) struct Destination {
    pub(super) store: PostgresStore,
    /// Whether the database lacks content that the spool had drained.
    pub(super) is_restored: bool,
    devices: HashMap<DeviceId, DeviceId>,
    streams: HashMap<StreamId, StreamId>,
    series: HashMap<SeriesId, SeriesId>,
}

impl Destination {
    pub(super) async fn open(
        settings: PostgresSettings,
        is_restored: bool,
    ) -> Result<Self, OpenError> {
        let mut stores = PostgresStore::open(settings).await?;
        Ok(Self {
            store: stores.swap_remove(0),
            is_restored,
            devices: HashMap::new(),
            streams: HashMap::new(),
            series: HashMap::new(),
        })
    }

    /// Moves a chunk's content to a batch with the database's ids. Creates rows that the database lacks.
    pub(super) async fn translate(
        &mut self,
        chunk: &mut Chunk,
        reader: &mut SpoolReader,
    ) -> Result<Batch, StoreError> {
        let damaged = |error: sqlx::Error| StoreError::Transient(error.to_string());
        let mut devices = Vec::new();
        let mut schemas = Vec::new();
        let mut clocks = Vec::new();
        let mut steps = Vec::new();
        for change in std::mem::take(&mut chunk.changes) {
            match change {
                Change::Device(device, row) => devices.push((device, row)),
                Change::Schema(row) => schemas.push(row),
                Change::Clock(device, clock) => clocks.push((device, clock)),
                Change::Step(step) => steps.push(step),
            }
        }
        let named = chunk.entries.iter().map(|entry| entry.device);
        let named = named.chain(chunk.events.iter().map(|event| event.device));
        let named = named.chain(schemas.iter().map(|row| row.device));
        let named = named.chain(clocks.iter().map(|(device, _)| *device));
        let named = missing(named, &self.devices);
        devices.extend(reader.devices(named).await.map_err(damaged)?);
        self.adopt_devices(devices).await?;

        let streams = missing(
            chunk.entries.iter().map(|entry| entry.stream),
            &self.streams,
        );
        let streams = reader.streams(streams).await.map_err(damaged)?;
        self.adopt_streams(streams).await?;
        let of_readings = chunk.entries.iter().flat_map(|entry| match &entry.content {
            Content::Readings(readings) => readings.series.as_slice(),
            _ => &[],
        });
        let series = missing(of_readings.copied(), &self.series);
        let series = reader.series(series).await.map_err(damaged)?;
        self.adopt_series(series).await?;
        for schema in &mut schemas {
            schema.device = self.devices[&schema.device];
        }
        self.store.adopt_schemas(&schemas).await?;

        let mut batch = Batch {
            entries: std::mem::take(&mut chunk.entries),
            events: std::mem::take(&mut chunk.events),
            refusals: std::mem::take(&mut chunk.refusals),
            clocks,
            steps,
            ..Batch::default()
        };
        for entry in &mut batch.entries {
            entry.device = self.devices[&entry.device];
            entry.stream = self.streams[&entry.stream];
            if let Content::Readings(readings) = &mut entry.content {
                for series in &mut readings.series {
                    *series = self.series[series];
                }
            }
        }
        for event in &mut batch.events {
            event.device = self.devices[&event.device];
        }
        for (device, _) in &mut batch.clocks {
            *device = self.devices[device];
        }
        Ok(batch)
    }

    async fn adopt_devices(&mut self, rows: Vec<(DeviceId, DeviceRow)>) -> Result<(), StoreError> {
        let only_rows: Vec<_> = rows.iter().map(|(_, row)| row).collect();
        let ids = self.store.adopt_devices(&only_rows).await?;
        self.devices
            .extend(rows.iter().map(|(device, _)| *device).zip(ids));
        Ok(())
    }

    async fn adopt_streams(&mut self, rows: Vec<(StreamId, StreamRow)>) -> Result<(), StoreError> {
        let (here, mut rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        for row in &mut rows {
            row.device = self.devices[&row.device];
        }
        let ids = self.store.adopt_streams(&rows).await?;
        self.streams.extend(here.into_iter().zip(ids));
        Ok(())
    }

    async fn adopt_series(&mut self, rows: Vec<(SeriesId, SeriesRow)>) -> Result<(), StoreError> {
        let (here, mut rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        for row in &mut rows {
            row.device = self.devices[&row.device];
        }
        let ids = self.store.adopt_series(&rows).await?;
        self.series.extend(here.into_iter().zip(ids));
        Ok(())
    }

    /// Commits the batch. First records a gap for each range of earlier frames that the database has lost.
    pub(super) async fn commit(&mut self, batch: &mut Batch) -> Result<(), StoreError> {
        let mut committed = self.store.commit(batch).await?;
        let lost = lost_ranges(&batch.entries, &committed);
        for gap in &lost {
            tracing::error!(
                stream = gap.stream.0,
                from_seq = gap.first_seq,
                to_seq = gap.seq,
                "database lost acknowledged frames, gap recorded"
            );
        }
        if !lost.is_empty() {
            batch.entries.splice(0..0, lost);
            committed = self.store.commit(batch).await?;
        }
        // The spool then deletes the frames, so the database must confirm each.
        let durable = durable_seqs(&committed);
        let is_stored = |entry: &Entry| durable.get(&entry.stream) >= Some(&entry.seq);
        if batch.entries.iter().all(is_stored) {
            return Ok(());
        }
        let reason = "Postgres rejects frames that continue their streams";
        Err(StoreError::Transient(reason.to_owned()))
    }
}

fn missing<I: Ord + Hash>(ids: impl Iterator<Item = I>, known: &HashMap<I, I>) -> BTreeSet<I> {
    ids.filter(|id| !known.contains_key(id)).collect()
}

/// Returns the position of each stream in the database.
fn durable_seqs(committed: &Committed) -> HashMap<StreamId, u64> {
    let receipts = committed.receipts.iter();
    receipts
        .map(|receipt| (receipt.stream(), receipt.durable_seq()))
        .collect()
}

/// Returns gaps for the frames before `entries` that the database lacks, without which it rejects `entries`.
fn lost_ranges(entries: &[Entry], committed: &Committed) -> Vec<Entry> {
    let durable = durable_seqs(committed);
    // The entries of a stream are contiguous, so only the first can have a gap before it.
    let mut seen = BTreeSet::new();
    let firsts = entries.iter().filter(|entry| seen.insert(entry.stream));
    let gap = |first: &Entry| {
        let durable_seq = durable.get(&first.stream).copied().unwrap_or(0);
        (durable_seq + 1 < first.first_seq).then(|| Entry {
            first_seq: durable_seq + 1,
            seq: first.first_seq - 1,
            frame_type: types::GAP,
            crc: None,
            content: Content::Gap {
                reason: REASON_LOST_BY_STORE,
            },
            ..first.clone()
        })
    };
    firsts.filter_map(gap).collect()
}
