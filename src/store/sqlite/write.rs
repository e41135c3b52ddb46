//! Commits one batch in one transaction on one connection. `rows` has the statements of entries and the audit
//! trail, `level0` those of readings, `admit` those of logins and declares. The caller handles checkpoints and
//! classifies errors.
//!
//! Invariants
//! - Watermarks are read inside the transaction that moves them.
//! - Cached state changes only after COMMIT has succeeded, so a failed batch can be committed again unchanged.

use std::collections::BTreeSet;
use std::time::Instant;

use sqlx::SqliteConnection;

use super::admit::Admissions;
use super::bulk::Bulk;
use super::identity::{self, Identity};
use super::level0::{Level0, Step};
use super::open::Purpose;
use super::rows::{Rows, insert_runs, readings_into};
use crate::config::DeviceBounds;
use crate::store::ledger::Watermarks;
use crate::store::reuse::{self, Repeat, Reuse};
use crate::store::rows::{Frame, sorted_runs};
use crate::store::{Batch, Committed, DeviceEvent, Entry, Refusal, StreamId};

/// Returns one row for any number of streams, because SQLite's thread delivers rows one by one.
const FIND_WATERMARKS: &str = "SELECT json_group_array(json_array(s.id, s.durable_seq))
    FROM json_each(?) AS wanted CROSS JOIN streams AS s ON s.id = wanted.value";

/// The connection that writes, and its state between batches.
pub(super) struct Writer {
    pub(super) conn: SqliteConnection,
    rows: Rows,
    readings: ReadingsTable,
    admissions: Admissions,
    move_watermarks: Bulk,
    last_frame_id: i64,
    identity: Identity,
    reuse: Reuse,
    /// Whether a batch was begun but did not finish: the connection may be inside a transaction, and a COMMIT
    /// that was not awaited may have succeeded.
    unsettled: bool,
}

/// Destination of readings.
enum ReadingsTable {
    /// Level 0, compacted later. Boxed because it is large.
    Store(Box<Level0>),
    /// By frame, in order of arrival.
    Spool(Bulk),
}

impl ReadingsTable {
    fn of(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Store => Self::Store(Box::new(Level0::new())),
            Purpose::Spool => Self::Spool(readings_into("readings")),
        }
    }

    async fn store<'a>(
        &mut self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'a>],
        is_idle: bool,
    ) -> Result<Option<Step<'a>>, sqlx::Error> {
        match self {
            Self::Store(recent) => {
                recent.prepare(is_idle).await;
                recent.store(conn, frames, is_idle).await.map(Some)
            }
            Self::Spool(insert) => {
                insert_runs(insert, conn, &sorted_runs(frames)).await?;
                Ok(None)
            }
        }
    }
}

impl Writer {
    pub(super) fn new(conn: SqliteConnection, purpose: Purpose, bounds: DeviceBounds) -> Self {
        Self {
            conn,
            rows: Rows::new(),
            readings: ReadingsTable::of(purpose),
            admissions: Admissions::new(bounds),
            move_watermarks: Bulk::new(
                "WITH moved(id, durable_seq, frames, readings) AS (",
                4,
                ") UPDATE OR FAIL streams SET durable_seq = moved.durable_seq,
                    frames = streams.frames + moved.frames,
                    readings = streams.readings + moved.readings
                FROM moved WHERE streams.id = moved.id",
            )
            .whole(),
            last_frame_id: 0,
            identity: Identity::default(),
            reuse: Reuse::default(),
            unsettled: true,
        }
    }

    /// Returns whether no work is left for commits of empty batches.
    pub(super) fn is_tidy(&self) -> bool {
        match &self.readings {
            ReadingsTable::Store(recent) => recent.is_tidy(),
            ReadingsTable::Spool(_) => true,
        }
    }

    /// # Cancel safety
    /// A dropped future leaves a transaction behind, which the next call rolls back. It is then unknown whether
    /// COMMIT was reached; committing the batch again is correct in either case.
    pub(super) async fn commit(&mut self, batch: &Batch) -> Result<Committed, sqlx::Error> {
        if self.unsettled {
            self.settle().await?;
        }
        self.unsettled = true;
        match self.transaction(batch).await {
            Ok(committed) => {
                self.unsettled = false;
                Ok(committed)
            }
            Err(error) => {
                // Rolls back now, so that locks are not held until the next batch, which rolls back again if
                // this fails.
                self.rollback().await;
                Err(error)
            }
        }
    }

    /// Loads the state from the file.
    pub(super) async fn settle(&mut self) -> Result<(), sqlx::Error> {
        self.rollback().await;
        self.find_last_frame_id().await?;
        if let ReadingsTable::Store(recent) = &mut self.readings {
            recent.settle(&mut self.conn).await?;
        }
        self.identity.settle(&mut self.conn).await?;
        self.unsettled = false;
        Ok(())
    }

    /// A spool also deletes its latest frames; their ids must not be reused while it is open.
    async fn find_last_frame_id(&mut self) -> Result<(), sqlx::Error> {
        let max = sqlx::query_scalar(
            "SELECT max(last_removed, (SELECT coalesce(max(id), 0) FROM frames)) FROM store_identity",
        );
        let in_file: i64 = max.fetch_one(&mut self.conn).await?;
        self.last_frame_id = self.last_frame_id.max(in_file);
        Ok(())
    }

    /// Rolls back. After some errors SQLite has already done so, and this one fails without harm; after any
    /// other failure the next BEGIN fails.
    async fn rollback(&mut self) {
        let _ = sqlx::query("ROLLBACK").execute(&mut self.conn).await;
    }

    async fn transaction(&mut self, batch: &Batch) -> Result<Committed, sqlx::Error> {
        sqlx::query("BEGIN IMMEDIATE")
            .execute(&mut self.conn)
            .await?;
        let has_admissions = !batch.logins.is_empty() || !batch.declares.is_empty();
        let counted = { &mut self.identity }
            .check(&mut self.conn, has_admissions)
            .await?;
        let declares = self
            .admissions
            .declare(&mut self.conn, &batch.declares)
            .await?;
        let mut watermarks = self.watermarks(&batch.entries).await?;
        let mut appended = watermarks
            .append(&batch.entries)
            .map_err(|unknown| identity::unknown_stream(&unknown))?;
        // Sort by stream, like the ledger's index, so that a large batch of small frames does not visit each of
        // its pages many times. The sort is stable, so each stream keeps its order.
        appended.sort_by_key(|item| item.entry.stream);
        if counted.others_wrote {
            // A replay gives its frames new ids.
            self.find_last_frame_id().await?;
        }
        let ids = self.last_frame_id + 1..;
        let frames: Vec<Frame<'_>> = ids
            .zip(appended)
            .map(|(id, item)| Frame { id, item })
            .collect();
        self.rows.store(&mut self.conn, &frames).await?;
        let step = self
            .readings
            .store(&mut self.conn, &frames, batch.is_empty())
            .await?;
        self.store_watermarks(&watermarks).await?;
        let logins = self.admissions.login(&mut self.conn, &batch.logins).await?;
        let refusals = self.refusals(&batch.refusals).await?;
        let reused = self.reused(watermarks.repeats(), &batch.repeats).await?;
        let events: Vec<&DeviceEvent> = { batch.events.iter() }
            .chain(&refusals)
            .chain(&reused)
            .collect();
        self.rows
            .store_clocks(&mut self.conn, &batch.clocks)
            .await?;
        self.rows.store_steps(&mut self.conn, &batch.steps).await?;
        self.rows
            .store_events(&mut self.conn, &frames, &events)
            .await?;
        self.rows
            .store_refusals(&mut self.conn, &batch.refusals)
            .await?;
        sqlx::query("COMMIT").execute(&mut self.conn).await?;

        let moved = watermarks.moved().into_iter().next();
        let moved = moved.map(|(stream, progress)| (stream.0, progress.durable_seq.cast_signed()));
        self.identity.advance(counted, moved);
        if let (ReadingsTable::Store(recent), Some(step)) = (&mut self.readings, step) {
            recent.advance(step);
        }
        if let Some(last) = frames.last() {
            self.last_frame_id = last.id;
        }
        Ok(Committed {
            logins,
            declares,
            receipts: watermarks.receipts(),
            stored: watermarks.stored(),
        })
    }

    /// Returns audit events for refusals of existing devices. Call it after the logins, which may create
    /// devices.
    async fn refusals(&mut self, refusals: &[Refusal]) -> Result<Vec<DeviceEvent>, sqlx::Error> {
        let refusals = refusals.iter().filter(|refusal| refusal.is_audited);
        let names = refusals.clone().map(|refusal| refusal.device.as_str());
        let devices = { &self.admissions }
            .find_devices(&mut self.conn, names.collect())
            .await?;
        let event = |refusal: &Refusal| Some(refusal.of(*devices.get(&refusal.device)?));
        Ok(refusals.filter_map(event).collect())
    }

    /// Compares repeated sequence numbers with the ledger.
    async fn reused(
        &mut self,
        of_entries: &[Repeat],
        others: &[Repeat],
    ) -> Result<Vec<DeviceEvent>, sqlx::Error> {
        let repeats = [of_entries, others].concat();
        if repeats.is_empty() {
            return Ok(Vec::new());
        }
        let wanted: Vec<(i64, i64)> = { repeats.iter() }
            .map(|repeat| (repeat.stream.0, repeat.seq.cast_signed()))
            .collect();
        let found: Vec<(i64, i64, Option<i64>)> = sqlx::query_as(
            "SELECT f.stream_id, f.seq, f.crc FROM json_each(?) AS wanted
             CROSS JOIN frames AS f ON f.stream_id = wanted.value ->> 0 AND f.seq = wanted.value ->> 1",
        )
        .bind(serde_json::to_string(&wanted).map_err(decode)?)
        .fetch_all(&mut self.conn)
        .await?;
        let stored = found.into_iter().map(reuse::row);
        Ok(self.reuse.report(&repeats, stored, Instant::now()))
    }

    async fn watermarks(&mut self, entries: &[Entry]) -> Result<Watermarks, sqlx::Error> {
        let streams: BTreeSet<i64> = entries.iter().map(|entry| entry.stream.0).collect();
        let durable: String = sqlx::query_scalar(FIND_WATERMARKS)
            .bind(serde_json::to_string(&streams).map_err(decode)?)
            .fetch_one(&mut self.conn)
            .await?;
        let durable: Vec<(i64, i64)> = serde_json::from_str(&durable).map_err(decode)?;
        let durable = durable
            .into_iter()
            .map(|(stream, seq)| (StreamId(stream), seq.cast_unsigned()));
        Ok(Watermarks::new(durable))
    }

    async fn store_watermarks(&mut self, watermarks: &Watermarks) -> Result<(), sqlx::Error> {
        let moved = watermarks.moved().into_iter();
        self.move_watermarks
            .execute(&mut self.conn, moved, |params, (stream, progress)| {
                params
                    .bind(stream.0)
                    .bind(progress.durable_seq.cast_signed())
                    .bind(progress.frames.cast_signed())
                    .bind(progress.readings.cast_signed());
            })
            .await
    }
}

fn decode(error: serde_json::Error) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}
