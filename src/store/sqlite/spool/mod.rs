//! A spool: a store that keeps frames only until they are in another store. Commits use the code of every SQLite
//! store. This module has the state of the drain and deletes drained frames; `read` reads frames in order of arrival.

use std::collections::HashMap;
use std::path::Path;

use sqlx::SqliteConnection;

pub(in crate::store) use self::read::SpoolReader;
use super::open::{OpenError, Purpose};
use super::reserve::Reserve;
use super::{SqliteSettings, SqliteStore, classify};
use crate::store::{DeviceEvent, DeviceId, Entry, Refusal, StoreError};
use crate::time::{BootClock, ClockStep};

#[cfg(test)]
mod plans;
mod read;

/// Identity of a spool in the store that it drains into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct SpoolIdentity {
    /// Random; created with the spool.
    pub(in crate::store) id: String,
    /// Whether the spool knows the positions of the store's streams.
    pub(in crate::store) is_registered: bool,
    /// Name by which the store knows the gateway that last claimed it with this file.
    pub(in crate::store) instance: String,
    /// Name for the next claim; empty before [`SqliteStore::begin_instance`].
    pub(in crate::store) next_instance: String,
    /// Inode of the file at the last claim; 0 before the first.
    pub(in crate::store) inode: i64,
    /// Number of chunks that were drained and deleted.
    pub(in crate::store) drained: i64,
}

/// A row of `devices`, without its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct DeviceRow {
    pub(in crate::store) name: String,
    pub(in crate::store) is_enabled: bool,
    pub(in crate::store) firmware: Option<String>,
    pub(in crate::store) first_seen_us: Option<i64>,
    pub(in crate::store) last_seen_us: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct SchemaRow {
    pub(in crate::store) device: DeviceId,
    pub(in crate::store) schema: u16,
    pub(in crate::store) hash: Vec<u8>,
    pub(in crate::store) declaration: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct StreamRow {
    pub(in crate::store) device: DeviceId,
    pub(in crate::store) number: i64,
    pub(in crate::store) durable_seq: i64,
    pub(in crate::store) created_us: i64,
}

/// A row of `series`, without its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct SeriesRow {
    pub(in crate::store) device: DeviceId,
    pub(in crate::store) channel: String,
    pub(in crate::store) unit: String,
    pub(in crate::store) kind: String,
}

/// State of a store that a spool needs before it may answer devices.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct Standing {
    pub(in crate::store) devices: Vec<(DeviceId, DeviceRow)>,
    pub(in crate::store) streams: Vec<StreamRow>,
    pub(in crate::store) schemas: Vec<SchemaRow>,
    pub(in crate::store) series: Vec<SeriesRow>,
    pub(in crate::store) clocks: Vec<(DeviceId, BootClock)>,
    pub(in crate::store) steps: Vec<ClockStep>,
    /// Number of chunks that the store has received.
    pub(in crate::store) drained: i64,
}

/// A changed row to send to the store.
#[derive(Debug)]
pub(in crate::store) enum Change {
    Device(DeviceId, DeviceRow),
    Schema(SchemaRow),
    Clock(DeviceId, BootClock),
    Step(ClockStep),
}

/// Content of a spool that is not in the store yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub frames: u64,
    pub readings: u64,
    /// Arrival of the oldest frame, microseconds UTC; `None` if there is none.
    pub oldest_received_us: Option<i64>,
}

/// What is read of a spool without a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Size without the free pages of the file, which `--spool-bytes-max` limits.
    pub used_bytes: u64,
    /// Arrival of the oldest frame, microseconds UTC; `None` if there is none.
    pub oldest_received_us: Option<i64>,
}

/// Reads [`Usage::used_bytes`].
const USED_BYTES: &str = "SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count, pragma_freelist_count, pragma_page_size";

/// Position in a spool.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::store) struct Cursor {
    frame: i64,
    event: i64,
    change: i64,
    refusal: i64,
}

/// Content of a spool, in order of arrival.
#[derive(Debug, Default)]
pub(in crate::store) struct Chunk {
    pub(in crate::store) entries: Vec<Entry>,
    pub(in crate::store) events: Vec<DeviceEvent>,
    pub(in crate::store) changes: Vec<Change>,
    pub(in crate::store) refusals: Vec<Refusal>,
    /// Position of the next chunk.
    pub(in crate::store) end: Cursor,
    event_ids: Vec<i64>,
    change_ids: Vec<i64>,
    /// Ids of refusals, and the counts that were read.
    refusal_counts: Vec<(i64, i64)>,
}

impl Chunk {
    /// Creates a chunk of entries only.
    pub(in crate::store) fn of(entries: Vec<Entry>) -> Chunk {
        Chunk {
            entries,
            ..Chunk::default()
        }
    }

    pub(in crate::store) fn is_empty(&self) -> bool {
        self.entries.is_empty()
            && self.events.is_empty()
            && self.changes.is_empty()
            && self.refusals.is_empty()
    }
}

impl SqliteStore {
    /// Opens the spool at `path`, creating it if it does not exist.
    ///
    /// # Errors
    /// As for [`SqliteStore::open`]; the file is a store and not a spool.
    pub(in crate::store) async fn open_spool(
        path: &Path,
        settings: &SqliteSettings,
    ) -> Result<Self, OpenError> {
        Self::open_as(Purpose::Spool, path, settings).await
    }

    fn spool_conn(&mut self) -> Result<&mut SqliteConnection, StoreError> {
        let failed = || StoreError::Fatal("the spool failed earlier".to_owned());
        Ok(&mut self.writer.as_mut().ok_or_else(failed)?.conn)
    }

    pub(in crate::store) async fn identity(&mut self) -> Result<SpoolIdentity, StoreError> {
        let sql = "SELECT id, is_registered, instance, next_instance, inode, drained FROM spool";
        let row: (String, bool, String, String, i64, i64) = sqlx::query_as(sql)
            .fetch_one(self.spool_conn()?)
            .await
            .map_err(|error| classify(&error, "read the spool's identity"))?;
        let (id, is_registered, instance, next_instance, inode, drained) = row;
        Ok(SpoolIdentity {
            id,
            is_registered,
            instance,
            next_instance,
            inode,
            drained,
        })
    }

    /// Generates the name for the next claim. Keeps a name that an earlier gateway generated but may not have claimed
    /// the store with.
    pub(in crate::store) async fn begin_instance(&mut self) -> Result<(), StoreError> {
        let sql = "UPDATE spool SET next_instance = lower(hex(randomblob(16)))
            WHERE next_instance = instance";
        self.change_spool(sql, &[], "generate the spool's instance")
            .await
    }

    /// Records a successful claim, and the inode of the file.
    pub(in crate::store) async fn end_claim(&mut self, inode: i64) -> Result<(), StoreError> {
        let sql = "UPDATE spool SET instance = next_instance, inode = ?
            WHERE instance <> next_instance OR inode <> ?";
        self.change_spool(sql, &[inode, inode], "store the spool's instance")
            .await
    }

    pub(in crate::store) async fn set_drained(&mut self, drained: i64) -> Result<(), StoreError> {
        let sql = "UPDATE spool SET drained = ?";
        self.change_spool(sql, &[drained], "store the spool's position")
            .await
    }

    /// Marks all devices, schemas and clocks as changed, so that the drain sends them again.
    pub(in crate::store) async fn repeat_changes(&mut self) -> Result<(), StoreError> {
        for sql in [
            "INSERT OR IGNORE INTO changes (what, device_id, key) SELECT 'device', id, 0 FROM devices",
            "INSERT OR IGNORE INTO changes (what, device_id, key)
                SELECT 'schema', device_id, schema FROM schemas",
            "INSERT OR IGNORE INTO changes (what, device_id, key)
                SELECT 'clock', device_id, boot FROM clocks",
        ] {
            self.change_spool(sql, &[], "repeat changes").await?;
        }
        Ok(())
    }

    async fn change_spool(
        &mut self,
        sql: &'static str,
        values: &[i64],
        doing: &str,
    ) -> Result<(), StoreError> {
        match execute(self.spool_conn()?, sql, values, doing).await {
            Err(StoreError::Transient(_)) if self.use_reserve().await? => {
                execute(self.spool_conn()?, sql, values, doing).await
            }
            done => done,
        }
    }

    /// Returns the number of bytes in use; the file may be larger, with free space from deleted rows.
    pub(in crate::store) async fn used_bytes(&mut self) -> Result<u64, StoreError> {
        let bytes: i64 = sqlx::query_scalar(USED_BYTES)
            .fetch_one(self.spool_conn()?)
            .await
            .map_err(|error| classify(&error, "measure the spool"))?;
        Ok(bytes.unsigned_abs())
    }

    pub(in crate::store) async fn frames_waiting(&mut self) -> Result<u64, StoreError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM frames")
            .fetch_one(self.spool_conn()?)
            .await
            .map_err(|error| classify(&error, "count the spool's frames"))?;
        Ok(count.unsigned_abs())
    }

    /// Takes over the positions of the store's streams: from now on the spool answers devices.
    pub(in crate::store) async fn take_over(
        &mut self,
        standing: &Standing,
    ) -> Result<(), StoreError> {
        let conn = self.spool_conn()?;
        begin(conn).await?;
        let taken = write_standing(conn, standing).await;
        let taken = end(conn, taken).await;
        taken.map_err(|error| classify(&error, "take over the store's streams"))
    }

    /// Records that the store's streams may move without this spool from now on.
    pub(in crate::store) async fn set_unregistered(&mut self) -> Result<(), StoreError> {
        sqlx::query("UPDATE spool SET is_registered = 0")
            .execute(self.spool_conn()?)
            .await
            .map(drop)
            .map_err(|error| classify(&error, "unregister the spool"))
    }

    /// Returns whether the disk has space for more frames, and for deleting them later.
    pub(in crate::store) async fn has_room(&mut self) -> Result<bool, StoreError> {
        let Some(reserve) = &mut self.reserve else {
            return Ok(true);
        };
        if reserve.restore() {
            return Ok(true);
        }
        let needed = reserve.bytes_min();
        let free = "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size";
        let bytes: i64 = sqlx::query_scalar(free)
            .fetch_one(self.spool_conn()?)
            .await
            .map_err(|error| classify(&error, "measure the spool"))?;
        Ok(bytes.unsigned_abs() >= needed)
    }

    /// Releases the reserved disk space and checkpoints the log; returns whether there was a reserve.
    async fn use_reserve(&mut self) -> Result<bool, StoreError> {
        if !self.reserve.as_mut().is_some_and(Reserve::release) {
            return Ok(false);
        }
        tracing::warn!(
            "disk of the spool full, using reserved space to drain it; no frames are accepted until there is space"
        );
        self.checkpoints.finish().await?;
        Ok(true)
    }

    /// Deletes a drained chunk. On a full disk, uses the reserved space.
    pub(in crate::store) async fn forget(&mut self, chunk: &Chunk) -> Result<(), StoreError> {
        match self.try_forget(chunk).await {
            Err(StoreError::Transient(_)) if self.use_reserve().await? => {
                self.try_forget(chunk).await
            }
            done => done,
        }
    }

    async fn try_forget(&mut self, chunk: &Chunk) -> Result<(), StoreError> {
        self.checkpoints.make_room().await?;
        let conn = self.spool_conn()?;
        begin(conn).await?;
        let forgotten = delete_read(conn, chunk).await;
        let forgotten = end(conn, forgotten).await;
        let forgotten = forgotten.map_err(|error| classify(&error, "delete drained frames"));
        if let Err(StoreError::Fatal(_)) = forgotten {
            self.abandon();
        }
        forgotten?;
        self.observe_log().await;
        Ok(())
    }
}

async fn execute(
    conn: &mut SqliteConnection,
    sql: &'static str,
    values: &[i64],
    doing: &str,
) -> Result<(), StoreError> {
    let mut query = sqlx::query(sql);
    for value in values {
        query = query.bind(*value);
    }
    let changed = query.execute(conn).await;
    changed.map(drop).map_err(|error| classify(&error, doing))
}

async fn begin(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    let begun = sqlx::query("BEGIN IMMEDIATE").execute(conn).await;
    begun.map(drop).map_err(|error| classify(&error, "begin"))
}

/// Ends the transaction: commits it if it succeeded, and rolls it back otherwise.
async fn end(
    conn: &mut SqliteConnection,
    done: Result<(), sqlx::Error>,
) -> Result<(), sqlx::Error> {
    let done = match done {
        Ok(()) => sqlx::query("COMMIT").execute(&mut *conn).await.map(drop),
        Err(error) => Err(error),
    };
    if done.is_err() {
        // SQLite may have rolled back by itself; then this error has no meaning.
        let _ = sqlx::query("ROLLBACK").execute(conn).await;
    }
    done
}

/// Deletes the rows that belong to drained frames, then the frames.
const FORGET: [&str; 5] = [
    "DELETE FROM gaps INDEXED BY gaps_by_frame WHERE (stream_id, to_seq) IN
         (SELECT stream_id, seq FROM frames WHERE id <= ?)",
    "DELETE FROM quarantine WHERE (stream_id, seq) IN
         (SELECT stream_id, seq FROM frames WHERE id <= ?)",
    "DELETE FROM device_events WHERE frame_id <= ?",
    "DELETE FROM readings WHERE frame_id <= ?",
    "DELETE FROM frames WHERE id <= ?",
];

async fn delete_read(conn: &mut SqliteConnection, chunk: &Chunk) -> Result<(), sqlx::Error> {
    for sql in FORGET {
        let delete = sqlx::query(sql).bind(chunk.end.frame);
        delete.execute(&mut *conn).await?;
    }
    sqlx::query("UPDATE spool SET drained = drained + 1")
        .execute(&mut *conn)
        .await?;
    for (sql, ids) in [
        ("DELETE FROM device_events WHERE id = ?", &chunk.event_ids),
        ("DELETE FROM changes WHERE id = ?", &chunk.change_ids),
    ] {
        for id in ids {
            sqlx::query(sql).bind(id).execute(&mut *conn).await?;
        }
    }
    // More refusals may have been counted since.
    for (id, count) in &chunk.refusal_counts {
        sqlx::query("UPDATE refusals SET count = count - ? WHERE id = ?")
            .bind(count)
            .bind(id)
            .execute(&mut *conn)
            .await?;
    }
    sqlx::query("DELETE FROM refusals WHERE count <= 0")
        .execute(&mut *conn)
        .await
        .map(drop)
}

async fn write_standing(
    conn: &mut SqliteConnection,
    standing: &Standing,
) -> Result<(), sqlx::Error> {
    let mut ids: HashMap<DeviceId, i64> = HashMap::new();
    for (device, row) in &standing.devices {
        let id = sqlx::query_scalar(
            "INSERT INTO devices (name, enabled, firmware, first_seen_at, last_seen_at)
             VALUES (?, ?, ?, ?, ?)
             ON CONFLICT (name) DO UPDATE SET enabled = excluded.enabled RETURNING id",
        )
        .bind(&row.name)
        .bind(row.is_enabled)
        .bind(&row.firmware)
        .bind(row.first_seen_us)
        .bind(row.last_seen_us)
        .fetch_one(&mut *conn)
        .await?;
        ids.insert(*device, id);
    }
    let id_of = |device: &DeviceId| ids.get(device).copied().ok_or(sqlx::Error::RowNotFound);
    for row in &standing.streams {
        sqlx::query(
            "INSERT INTO streams (device_id, stream, durable_seq, created_at) VALUES (?, ?, ?, ?)
             ON CONFLICT (device_id, stream) DO UPDATE
                 SET durable_seq = max(durable_seq, excluded.durable_seq)",
        )
        .bind(id_of(&row.device)?)
        .bind(row.number)
        .bind(row.durable_seq)
        .bind(row.created_us)
        .execute(&mut *conn)
        .await?;
    }
    for row in &standing.schemas {
        sqlx::query(
            "INSERT INTO schemas (device_id, schema, hash, declaration) VALUES (?, ?, ?, ?)
             ON CONFLICT DO NOTHING",
        )
        .bind(id_of(&row.device)?)
        .bind(row.schema)
        .bind(&row.hash)
        .bind(&row.declaration)
        .execute(&mut *conn)
        .await?;
    }
    for row in &standing.series {
        sqlx::query(
            "INSERT INTO series (device_id, channel, unit, kind) VALUES (?, ?, ?, ?)
             ON CONFLICT DO NOTHING",
        )
        .bind(id_of(&row.device)?)
        .bind(&row.channel)
        .bind(&row.unit)
        .bind(&row.kind)
        .execute(&mut *conn)
        .await?;
    }
    for (device, clock) in &standing.clocks {
        sqlx::query(
            "INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at, timeline, origin_us,
                 valid_from_us)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(id_of(device)?)
        .bind(clock.boot)
        .bind(clock.offset_us)
        .bind(clock.delay_us.cast_signed())
        .bind(clock.measured_at_us)
        .bind(clock.origin.timeline)
        .bind(clock.origin.at_us)
        .bind(clock.valid_from_us)
        .execute(&mut *conn)
        .await?;
    }
    for step in &standing.steps {
        sqlx::query(
            "INSERT INTO clock_steps (timeline, origin_us, since_at, before_at, after_at, step_us)
             VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(step.origin.timeline)
        .bind(step.origin.at_us)
        .bind(step.since_us)
        .bind(step.before_us)
        .bind(step.after_us)
        .bind(step.size_us())
        .execute(&mut *conn)
        .await?;
    }
    // The store has these rows.
    sqlx::query("DELETE FROM changes")
        .execute(&mut *conn)
        .await?;
    let registered = sqlx::query("UPDATE spool SET is_registered = 1");
    registered.execute(conn).await.map(drop)
}

#[cfg(test)]
impl SqliteStore {
    /// Moves all streams to this position.
    pub(in crate::store) async fn set_durable_seq(&mut self, seq: i64) {
        sqlx::query("UPDATE streams SET durable_seq = ?")
            .bind(seq)
            .execute(self.spool_conn().unwrap())
            .await
            .unwrap();
    }
}
