//! A local SQLite file in front of Postgres: frames are acknowledged when they are in the file, and a task
//! drains it into the database, in the order of arrival, whenever that is there.
//!
//! Frames always take this way, also while Postgres answers: so an ACK means the same at all times, and
//! nothing has to be decided when the database goes or comes back. A crash on either side leaves frames
//! in the file that are in the database already; they are sent again, and its ledger passes over them.
//!
//! Invariants
//! - Nothing is forgotten here before a receipt of the database covers it.
//! - While the spool is registered, no other gateway writes to the database, so the spool alone knows
//!   where every stream stands, with the database or without it.
//! - The file stays within its bound, and one batch: then nothing is taken until room has come free.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::hash::Hash;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fieldgate_protocol::frame::types;
use tokio::sync::{Mutex, Notify};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::postgres::{
    self, OpenError, PostgresSettings, PostgresStore, REASON_LOST_BY_STORE, SpoolClaim, feed,
};
pub use super::sqlite::spool::Waiting;
use super::sqlite::spool::{Change, Chunk, Cursor, SpoolReader};
use super::sqlite::{self, SqliteSettings, SqliteStore};
use super::{Batch, Committed, Content, DeviceId, Entry, SeriesId, Store, StoreError, StreamId};
use crate::config::PostgresOptions;
use crate::time::SystemClock;

#[cfg(test)]
mod tests;

/// How long the drain waits before it tries an absent database again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a start waits for the database to say who feeds it.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// Streams in one transaction, where each gets a gap.
const STREAMS_AT_ONCE: usize = 4096;

/// Why a spool could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file.
    #[error(transparent)]
    File(#[from] sqlite::OpenError),
    /// The database, which has to be there when a spool begins.
    #[error(transparent)]
    Database(#[from] postgres::OpenError),
    /// The file does not do what it is told.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A gateway without a spool would not know where the streams stand.
    #[error(
        "{frames} acknowledged frames wait in {path} for the database: start with --spool until they \
         are there (`fieldgate status` shows how many are left)"
    )]
    NotDrained {
        /// How many.
        frames: u64,
        /// The spool.
        path: String,
    },
}

/// The store; see the module.
pub struct SpoolStore {
    spool: Arc<Mutex<SqliteStore>>,
    bytes_max: u64,
    arrived: Arc<Notify>,
    stop: CancellationToken,
    /// Cancelled when closing may not wait for the database any longer.
    give_up: CancellationToken,
    close_within: Duration,
    /// Ends the drain when dropped; gives the reason if it cannot go on.
    drain: JoinSet<Option<String>>,
}

impl SpoolStore {
    /// Opens the spool at `path`, creating it if there is none, and begins to drain it. The database
    /// has to be there only for a spool that it does not know yet. Closing goes on to drain for
    /// `close_within` at most.
    ///
    /// # Errors
    /// [`SpoolError`] says in one line what is wrong and what to do.
    pub async fn open(
        path: &Path,
        sqlite: &SqliteSettings,
        bytes_max: u64,
        close_within: Duration,
        postgres: PostgresSettings,
    ) -> Result<Self, SpoolError> {
        let mut spool = SqliteStore::open_spool(path, sqlite).await?;
        spool.begin_instance().await?;
        let identity = spool.identity().await?;
        if !identity.is_registered {
            let standing = feed::register(&postgres, &identity.id).await?;
            spool.take_over(&standing).await?;
        }
        let mut feeder = Feeder {
            settings: PostgresSettings {
                options: PostgresOptions {
                    postgres_writers: 1,
                    ..postgres.options
                },
                ..postgres
            },
            reader: SpoolReader::open(path).await?,
            spool: Arc::new(Mutex::new(spool)),
            path: path.to_owned(),
        };
        let connected = match timeout(START_PATIENCE, feeder.begin()).await {
            Ok(connected) => connected?,
            Err(_) => None,
        };
        let spool = Arc::clone(&feeder.spool);
        let arrived = Arc::new(Notify::new());
        let (stop, give_up) = (CancellationToken::new(), CancellationToken::new());
        let drain = Drain {
            feeder,
            arrived: Arc::clone(&arrived),
            stop: stop.clone(),
            give_up: give_up.clone(),
            connected,
            next: None,
        };
        let mut task = JoinSet::new();
        task.spawn(drain.run());
        Ok(Self {
            spool,
            bytes_max,
            arrived,
            stop,
            give_up,
            close_within,
            drain: task,
        })
    }
}

/// What waits in the spool at `path`, also while a gateway uses it; `None` if it is not in use.
///
/// # Errors
/// There is a file that is no spool, or it cannot be read.
pub async fn waiting(path: &Path) -> Result<Option<Waiting>, SpoolError> {
    if !path.exists() {
        return Ok(None);
    }
    let mut reader = SpoolReader::open(path).await?;
    let waiting = reader.waiting().await;
    waiting.map_err(|error| StoreError::Transient(error.to_string()).into())
}

/// Makes sure that nothing waits in the spool at `path`, if there is one: for a gateway that stores
/// elsewhere, and would leave it there.
///
/// # Errors
/// [`SpoolError::NotDrained`], and as [`waiting`].
pub async fn refuse_undrained(path: &Path) -> Result<(), SpoolError> {
    let frames = waiting(path).await?.map_or(0, |waiting| waiting.frames);
    if frames == 0 {
        return Ok(());
    }
    let path = path.display().to_string();
    Err(SpoolError::NotDrained { frames, path })
}

/// Makes sure that a gateway may do without the spool at `path`, if there is one: an empty one is given
/// up, and the database given free.
///
/// # Errors
/// [`SpoolError::NotDrained`], and as [`SpoolStore::open`].
pub async fn leave(
    path: &Path,
    sqlite: &SqliteSettings,
    postgres: &PostgresSettings,
) -> Result<(), SpoolError> {
    if !path.exists() {
        return Ok(());
    }
    refuse_undrained(path).await?;
    let mut spool = SqliteStore::open_spool(path, sqlite).await?;
    let identity = spool.identity().await?;
    if identity.is_registered {
        // In this order: a spool that does not know that it was given up would trust what it knows.
        spool.set_unregistered().await?;
    }
    feed::release(postgres, &identity).await?;
    spool.close().await?;
    Ok(())
}

impl Store for SpoolStore {
    async fn commit(&mut self, batch: &Batch) -> Result<Committed, StoreError> {
        if let Some(ended) = self.drain.try_join_next() {
            return Err(drain_ended(ended));
        }
        let mut spool = self.spool.lock().await;
        let used_bytes = spool.used_bytes().await?;
        if used_bytes > self.bytes_max {
            return Err(StoreError::Transient(format!(
                "the spool is full, {} MiB, and waits for Postgres to be drained into",
                used_bytes >> 20
            )));
        }
        if !spool.has_room().await? {
            return Err(StoreError::Transient(
                "the spool's disk is full, and waits for Postgres to be drained into".to_owned(),
            ));
        }
        let committed = spool.commit(batch).await?;
        drop(spool);
        self.arrived.notify_one();
        Ok(committed)
    }

    async fn failure(&mut self) -> StoreError {
        let ended = self.drain.join_next().await;
        drain_ended(ended.unwrap_or(Ok(None)))
    }

    async fn close(mut self) -> Result<(), StoreError> {
        // The drain goes on until nothing is left, the database does not answer, or time is up: what is
        // left is acknowledged by right, and the next start drains it.
        self.stop.cancel();
        let ended = async { while self.drain.join_next().await.is_some() {} };
        if timeout(self.close_within, ended).await.is_err() {
            self.give_up.cancel();
            while self.drain.join_next().await.is_some() {}
        }
        let spool = Arc::into_inner(self.spool).map(Mutex::into_inner);
        let Some(mut spool) = spool else {
            return Err(StoreError::Fatal("the drain has not ended".to_owned()));
        };
        let frames = spool.frames_waiting().await?;
        if frames > 0 {
            tracing::warn!(
                frames,
                "frames are left in the spool; the next start drains them"
            );
        }
        spool.close().await
    }
}

fn drain_ended(ended: Result<Option<String>, JoinError>) -> StoreError {
    StoreError::Fatal(match ended {
        Ok(Some(reason)) => reason,
        Ok(None) => "the task that drains the spool has ended".to_owned(),
        Err(error) => format!("the task that drains the spool: {error}"),
    })
}

/// The task that drains.
struct Drain {
    feeder: Feeder,
    arrived: Arc<Notify>,
    stop: CancellationToken,
    give_up: CancellationToken,
    /// `None` while the database is away.
    connected: Option<Connected>,
    /// Read while what comes before it was committed.
    next: Option<Chunk>,
}

/// A spool and the way to its database.
struct Feeder {
    settings: PostgresSettings,
    reader: SpoolReader,
    spool: Arc<Mutex<SqliteStore>>,
    path: PathBuf,
}

/// Why nothing is drained.
#[derive(Debug, thiserror::Error)]
enum DrainError {
    /// It may go on later.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The spool must not go on.
    #[error(transparent)]
    Refused(OpenError),
}

/// The database, and the ids that rows of the spool have there.
struct Connected {
    store: PostgresStore,
    /// Whether the database was found to lack what the spool had brought to it.
    is_restored: bool,
    devices: HashMap<DeviceId, DeviceId>,
    streams: HashMap<StreamId, StreamId>,
    series: HashMap<SeriesId, SeriesId>,
}

impl Drain {
    async fn run(mut self) -> Option<String> {
        let mut absent: Option<String> = None;
        loop {
            let wait = match self.drain_some().await {
                Ok(is_empty) => {
                    if absent.take().is_some() {
                        tracing::info!("Postgres takes data again; draining the spool");
                    }
                    if !is_empty {
                        continue;
                    }
                    None
                }
                Err(DrainError::Refused(error)) => return Some(error.to_string()),
                Err(DrainError::Store(error)) => {
                    // Ids may be other ones when the database comes back.
                    self.connected = None;
                    self.next = None;
                    let reason = error.to_string();
                    if absent.as_ref() != Some(&reason) {
                        tracing::warn!(%reason, "Postgres does not take data; frames stay in the spool");
                        absent = Some(reason);
                    }
                    Some(RETRY)
                }
            };
            if self.stop.is_cancelled() {
                return None;
            }
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = self.arrived.notified(), if wait.is_none() => {}
                () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
            }
        }
    }

    /// Moves the oldest of what waits; `true` if nothing waits.
    async fn drain_some(&mut self) -> Result<bool, DrainError> {
        let mut chunk = match self.next.take() {
            Some(chunk) => chunk,
            None => read(&mut self.feeder.reader, Cursor::default()).await?,
        };
        if chunk.is_empty() {
            return Ok(true);
        }
        // What is given up here is nothing that the spool waits for: it forgets only afterwards.
        let give_up = self.give_up.clone();
        let next = tokio::select! {
            next = self.bring(&mut chunk) => next?,
            () = give_up.cancelled() => {
                return Err(StoreError::Transient("the gateway ends".to_owned()).into());
            }
        };
        self.feeder.spool.lock().await.forget(&chunk).await?;
        if let Some(connected) = &mut self.connected {
            connected.store.advance_drained();
        }
        // An empty one may have been read before more came.
        self.next = Some(next).filter(|next| !next.is_empty());
        Ok(false)
    }

    /// Brings a chunk to the database; gives the next one.
    async fn bring(&mut self, chunk: &mut Chunk) -> Result<Chunk, DrainError> {
        let connected = match &mut self.connected {
            Some(connected) => connected,
            absent => absent.insert(self.feeder.connect().await?),
        };
        let reader = &mut self.feeder.reader;
        let mut batch = connected.translate(chunk, reader).await?;
        let (committed, next) = tokio::join!(connected.commit(&mut batch), read(reader, chunk.end));
        committed?;
        Ok(next?)
    }
}

impl Feeder {
    /// Connects for the first time, if the database answers: a spool serves without it. Goes on from where the
    /// database stands if the file is an earlier state of itself.
    async fn begin(&mut self) -> Result<Option<Connected>, SpoolError> {
        let mut connected = self.try_connect().await?;
        if let Err(OpenError::SpoolRestored { .. }) = connected {
            tracing::error!(
                "the spool was put back to an earlier state; what it had acknowledged since and not drained \
                 is lost, and devices go on from where the database stands"
            );
            let standing = feed::read_standing(&self.settings).await?;
            let mut spool = self.spool.lock().await;
            spool.take_over(&standing).await?;
            spool.set_drained(standing.drained).await?;
            drop(spool);
            connected = self.try_connect().await?;
        }
        match connected {
            Ok(mut connected) => {
                // What fails now is found once more by the drain.
                let recorded = self.record_lost(&mut connected).await;
                Ok(recorded.ok().map(|()| connected))
            }
            Err(copied @ OpenError::SpoolCopied { .. }) => Err(copied.into()),
            Err(error) => {
                tracing::debug!(%error, "the spool begins without its database");
                Ok(None)
            }
        }
    }

    async fn connect(&mut self) -> Result<Connected, DrainError> {
        let mut connected = match self.try_connect().await? {
            Ok(connected) => connected,
            Err(error @ (OpenError::SpoolCopied { .. } | OpenError::SpoolRestored { .. })) => {
                return Err(DrainError::Refused(error));
            }
            Err(error) => return Err(StoreError::Transient(error.to_string()).into()),
        };
        self.record_lost(&mut connected).await?;
        Ok(connected)
    }

    /// Makes this gateway the one that feeds the database, and connects.
    async fn try_connect(&self) -> Result<Result<Connected, OpenError>, StoreError> {
        let mut spool = self.spool.lock().await;
        let identity = spool.identity().await?;
        drop(spool);
        let inode = fs::metadata(&self.path).map_or(0, |file| file.ino().cast_signed());
        let request = feed::ClaimRequest {
            is_other_file: ![0, inode].contains(&identity.inode),
            identity,
        };
        let claimed = match feed::claim(&self.settings, &request).await {
            Ok(claimed) => claimed,
            Err(error) => return Ok(Err(error)),
        };
        self.spool.lock().await.end_claim(inode).await?;
        let feed::ClaimRequest { identity, .. } = request;
        // One more may be of a commit whose content was not forgotten before a crash.
        if claimed.drained > identity.drained + 1 {
            let url = self.settings.url.clone();
            return Ok(Err(OpenError::SpoolRestored { url }));
        }
        let settings = PostgresSettings {
            spool: Some(SpoolClaim {
                id: identity.id,
                instance: identity.next_instance,
                drained: identity.drained,
                found_drained: claimed.drained,
            }),
            ..self.settings.clone()
        };
        Ok(Connected::open(settings, claimed.is_restored).await)
    }

    /// Brings to a database, if it was put back, all that it may lack besides readings, and a gap for each stream
    /// in place of those.
    async fn record_lost(&mut self, connected: &mut Connected) -> Result<(), StoreError> {
        if !connected.is_restored {
            return Ok(());
        }
        tracing::error!(
            "the database was put back to an earlier state; what this spool had brought to it since is \
             recorded as gaps of reason 254"
        );
        self.spool.lock().await.repeat_changes().await?;
        let at_us = SystemClock::start().now().utc_us;
        let drained = self.reader.drained(REASON_LOST_BY_STORE, at_us).await;
        let drained = drained.map_err(|error| StoreError::Transient(error.to_string()))?;
        for streams in drained.chunks(STREAMS_AT_ONCE) {
            let mut chunk = Chunk::of(streams.to_vec());
            let mut batch = connected.translate(&mut chunk, &mut self.reader).await?;
            connected.commit(&mut batch).await?;
        }
        Ok(())
    }
}

async fn read(reader: &mut SpoolReader, after: Cursor) -> Result<Chunk, StoreError> {
    let chunk = reader.chunk(after).await;
    chunk.map_err(|error| StoreError::Transient(error.to_string()))
}

impl Connected {
    async fn open(settings: PostgresSettings, is_restored: bool) -> Result<Self, OpenError> {
        let mut stores = PostgresStore::open(settings).await?;
        Ok(Self {
            store: stores.swap_remove(0),
            is_restored,
            devices: HashMap::new(),
            streams: HashMap::new(),
            series: HashMap::new(),
        })
    }

    /// Takes a chunk's content as a batch, with the ids of the database; rows that it has not are made.
    async fn translate(
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

    async fn adopt_devices(
        &mut self,
        rows: Vec<(DeviceId, sqlite::spool::DeviceRow)>,
    ) -> Result<(), StoreError> {
        let only_rows: Vec<_> = rows.iter().map(|(_, row)| row).collect();
        let ids = self.store.adopt_devices(&only_rows).await?;
        self.devices
            .extend(rows.iter().map(|(device, _)| *device).zip(ids));
        Ok(())
    }

    async fn adopt_streams(
        &mut self,
        rows: Vec<(StreamId, sqlite::spool::StreamRow)>,
    ) -> Result<(), StoreError> {
        // A stream's device may not have been named by anything else.
        let (here, mut rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        for row in &mut rows {
            row.device = self.devices[&row.device];
        }
        let ids = self.store.adopt_streams(&rows).await?;
        self.streams.extend(here.into_iter().zip(ids));
        Ok(())
    }

    async fn adopt_series(
        &mut self,
        rows: Vec<(SeriesId, sqlite::spool::SeriesRow)>,
    ) -> Result<(), StoreError> {
        let (here, mut rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        for row in &mut rows {
            row.device = self.devices[&row.device];
        }
        let ids = self.store.adopt_series(&rows).await?;
        self.series.extend(here.into_iter().zip(ids));
        Ok(())
    }

    /// Commits the batch, with a gap before it where the database lacks what it once had.
    async fn commit(&mut self, batch: &mut Batch) -> Result<(), StoreError> {
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
        // What follows is that the spool forgets them, so the database's own word is needed for each.
        let durable = durable_seqs(&committed);
        let is_taken = |entry: &Entry| durable.get(&entry.stream) >= Some(&entry.seq);
        if batch.entries.iter().all(is_taken) {
            return Ok(());
        }
        let reason = "Postgres does not take frames that continue their streams";
        Err(StoreError::Transient(reason.to_owned()))
    }
}

/// The ids that `known` does not have.
fn missing<I: Ord + Hash>(ids: impl Iterator<Item = I>, known: &HashMap<I, I>) -> BTreeSet<I> {
    ids.filter(|id| !known.contains_key(id)).collect()
}

/// How far each stream is in the database.
fn durable_seqs(committed: &Committed) -> HashMap<StreamId, u64> {
    let receipts = committed.receipts.iter();
    receipts
        .map(|receipt| (receipt.stream(), receipt.durable_seq()))
        .collect()
}

/// Gaps that stand for what has to be in the database for `entries` to be taken, and is not.
fn lost_ranges(entries: &[Entry], committed: &Committed) -> Vec<Entry> {
    let durable = durable_seqs(committed);
    // What is read of a stream is contiguous, so its first entry tells.
    let mut seen = BTreeSet::new();
    let firsts = entries.iter().filter(|entry| seen.insert(entry.stream));
    let lacking = |first: &Entry| {
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
    firsts.filter_map(lacking).collect()
}
