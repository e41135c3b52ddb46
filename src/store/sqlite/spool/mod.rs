//! A spool: a store in which frames stay only until they are in another one. Written by the same code
//! as every SQLite store; here is what it knows of that other one and what forgets, in `read` what
//! reads it in the order of arrival.

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

/// Who a spool is to the store it feeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct SpoolIdentity {
    /// Random, made with the spool.
    pub(in crate::store) id: String,
    /// Whether the spool knows where the store's streams stand.
    pub(in crate::store) is_registered: bool,
    /// By which the store knows the gateway that began with this file last.
    pub(in crate::store) instance: String,
    /// By which the store will know this gateway; empty before [`SqliteStore::begin_instance`].
    pub(in crate::store) next_instance: String,
    /// Number of the file that was used last, in its file system; 0 before the first use.
    pub(in crate::store) inode: i64,
    /// How many commits of the spool's content it has forgotten.
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

/// A row of `schemas`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct SchemaRow {
    pub(in crate::store) device: DeviceId,
    pub(in crate::store) schema: u16,
    pub(in crate::store) hash: Vec<u8>,
    pub(in crate::store) declaration: String,
}

/// A row of `streams`.
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

/// What a spool has to know of the store before it may answer devices in its place.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct Standing {
    pub(in crate::store) devices: Vec<(DeviceId, DeviceRow)>,
    pub(in crate::store) streams: Vec<StreamRow>,
    pub(in crate::store) schemas: Vec<SchemaRow>,
    pub(in crate::store) series: Vec<SeriesRow>,
    pub(in crate::store) clocks: Vec<(DeviceId, BootClock)>,
    pub(in crate::store) steps: Vec<ClockStep>,
    /// How many commits of a spool's content the store counts.
    pub(in crate::store) drained: i64,
}

/// Something that is waiting to be told to the store.
#[derive(Debug)]
pub(in crate::store) enum Change {
    Device(DeviceId, DeviceRow),
    Schema(SchemaRow),
    Clock(DeviceId, BootClock),
    Step(ClockStep),
}

/// What a spool holds that is not in the store yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Frames.
    pub frames: u64,
    /// Readings in them.
    pub readings: u64,
    /// When the oldest of them arrived, microseconds UTC; `None` if there is none.
    pub oldest_received_us: Option<i64>,
}

/// How far a spool was read.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::store) struct Cursor {
    frame: i64,
    event: i64,
    change: i64,
    refusal: i64,
}

/// A part of what waits, in the order in which it came.
#[derive(Debug, Default)]
pub(in crate::store) struct Chunk {
    pub(in crate::store) entries: Vec<Entry>,
    pub(in crate::store) events: Vec<DeviceEvent>,
    pub(in crate::store) changes: Vec<Change>,
    pub(in crate::store) refusals: Vec<Refusal>,
    /// Where the next one begins.
    pub(in crate::store) end: Cursor,
    event_ids: Vec<i64>,
    change_ids: Vec<i64>,
    /// Ids of refusals, and how often each was read to have been.
    refusal_counts: Vec<(i64, i64)>,
}

impl Chunk {
    /// Returns one that only brings these.
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
    /// Opens the spool at `path`, creating it if there is none.
    ///
    /// # Errors
    /// As [`SqliteStore::open`]; a store is not taken for a spool.
    pub(in crate::store) async fn open_spool(
        path: &Path,
        settings: &SqliteSettings,
    ) -> Result<Self, OpenError> {
        Self::open_as(Purpose::Spool, path, settings).await
    }

    fn spool_conn(&mut self) -> Result<&mut SqliteConnection, StoreError> {
        let failed = || StoreError::Fatal("the spool has failed before".to_owned());
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

    /// Draws the name by which the store will know this gateway. One that a gateway drew before, of which is not
    /// known whether the store heard of it, is kept.
    pub(in crate::store) async fn begin_instance(&mut self) -> Result<(), StoreError> {
        let sql = "UPDATE spool SET next_instance = lower(hex(randomblob(16)))
            WHERE next_instance = instance";
        self.change_spool(sql, &[], "draw the spool's instance")
            .await
    }

    /// The store knows this gateway now, which uses the file of this number.
    pub(in crate::store) async fn end_claim(&mut self, inode: i64) -> Result<(), StoreError> {
        let sql = "UPDATE spool SET instance = next_instance, inode = ?
            WHERE instance <> next_instance OR inode <> ?";
        self.change_spool(sql, &[inode, inode], "keep the spool's instance")
            .await
    }

    /// Sets how many commits of the spool's content count as forgotten.
    pub(in crate::store) async fn set_drained(&mut self, drained: i64) -> Result<(), StoreError> {
        let sql = "UPDATE spool SET drained = ?";
        self.change_spool(sql, &[drained], "keep the spool's count")
            .await
    }

    /// Has everything brought to the store again that is brought to it when it changes.
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

    /// Bytes that are in use in the file; what was forgotten leaves room in it and is not counted.
    pub(in crate::store) async fn used_bytes(&mut self) -> Result<u64, StoreError> {
        let pages = "SELECT (page_count - freelist_count) * page_size
            FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
        let bytes: i64 = sqlx::query_scalar(pages)
            .fetch_one(self.spool_conn()?)
            .await
            .map_err(|error| classify(&error, "measure the spool"))?;
        Ok(bytes.unsigned_abs())
    }

    /// How many frames wait.
    pub(in crate::store) async fn frames_waiting(&mut self) -> Result<u64, StoreError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM frames")
            .fetch_one(self.spool_conn()?)
            .await
            .map_err(|error| classify(&error, "count the spool's frames"))?;
        Ok(count.unsigned_abs())
    }

    /// Takes over where the store's streams stand: from now on the spool answers devices.
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

    /// From now on the store's streams may move without this spool.
    pub(in crate::store) async fn set_unregistered(&mut self) -> Result<(), StoreError> {
        sqlx::query("UPDATE spool SET is_registered = 0")
            .execute(self.spool_conn()?)
            .await
            .map(drop)
            .map_err(|error| classify(&error, "give up the spool"))
    }

    /// Whether the disk has room for more frames and for what it takes to forget them.
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

    /// Gives up the room that was set aside, and moves the log; tells whether there was any.
    async fn use_reserve(&mut self) -> Result<bool, StoreError> {
        if !self.reserve.as_mut().is_some_and(Reserve::release) {
            return Ok(false);
        }
        tracing::warn!(
            "the spool's disk is full; using the room that was set aside to drain it. No frame is taken until \
             there is room again"
        );
        self.checkpoints.finish().await?;
        Ok(true)
    }

    /// Forgets what is in the store, on a full disk with the room that was set aside for that.
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
        let forgotten = forgotten.map_err(|error| classify(&error, "forget what was drained"));
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

/// Commits what was done, or rolls back what failed.
async fn end(
    conn: &mut SqliteConnection,
    done: Result<(), sqlx::Error>,
) -> Result<(), sqlx::Error> {
    let done = match done {
        Ok(()) => sqlx::query("COMMIT").execute(&mut *conn).await.map(drop),
        Err(error) => Err(error),
    };
    if done.is_err() {
        // SQLite may have rolled back by itself; then this one means nothing.
        let _ = sqlx::query("ROLLBACK").execute(conn).await;
    }
    done
}

/// What hangs on frames goes before them, and by them.
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
    // More may have come since they were read.
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
    // What came from the store need not be told to it.
    sqlx::query("DELETE FROM changes")
        .execute(&mut *conn)
        .await?;
    let registered = sqlx::query("UPDATE spool SET is_registered = 1");
    registered.execute(conn).await.map(drop)
}

#[cfg(test)]
impl SqliteStore {
    /// Lets all streams begin again behind this number.
    pub(in crate::store) async fn set_durable_seq(&mut self, seq: i64) {
        sqlx::query("UPDATE streams SET durable_seq = ?")
            .bind(seq)
            .execute(self.spool_conn().unwrap())
            .await
            .unwrap();
    }
}
