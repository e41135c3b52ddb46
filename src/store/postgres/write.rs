//! Commits one batch in one transaction on one connection. `admit` has the statements of logins and declares.
//!
//! Invariants
//! - Watermarks are read under a lock on their streams' rows, in the transaction that moves them.
//! - Every effect of a batch is idempotent, for a retry after a COMMIT with unknown outcome: frames through the
//!   ledger, logins, declares and clocks through their keys, audit events through a lookup.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use super::admit::{Admissions, keep_clocks};
use super::copy::copy;
use super::errors::CommitError;
use super::identity::{Identity, OwnedSeries, store_lost};
use super::link::Link;
use super::newest::Newest;
use super::timestamp::Timestamp;
use super::{PostgresSettings, run};
use crate::config::DeviceBounds;
use crate::store::hours::KnownHours;
use crate::store::ledger::{self, Watermarks};
use crate::store::reuse::{self, Repeat, Reuse};
use crate::store::rows::{Frame, Run, reading_span, resolved_time, sorted_runs};
use crate::store::{Batch, Committed, Content, DeviceEvent, DeviceId, Entry, StreamId};
use crate::time::ClockStep;

/// Number of ids in one block of the sequence `frame_id_blocks`.
const FRAME_IDS_IN_BLOCK: i64 = 1024;

/// Minimum number of readings for which COPY is faster than INSERT. COPY takes two writes to the socket with no
/// read between them, and sqlx leaves Nagle's algorithm on: the second write waits for the server's delayed
/// acknowledgement, about 40 ms.
const COPY_READINGS_MIN: usize = 10_000;

/// Interval between comparisons with the server's configuration; a reload is noticed by the first commit after
/// it.
const COMPARE_INTERVAL: Duration = Duration::from_secs(5);

/// A connection that writes, and its state between batches.
pub(super) struct Writer {
    pub(super) conn: Link,
    /// Ids that this transaction has taken but not assigned to a frame.
    frame_ids: std::ops::Range<i64>,
    hours: KnownHours,
    series: OwnedSeries,
    reuse: Reuse,
    bounds: DeviceBounds,
    /// Whether a commit must survive a crash of the server.
    keeps: bool,
    /// Whether the server reports row counts for `readings`; a table of another scheme may not.
    counts_readings: bool,
    /// Time of the latest comparison of the session's `synchronous_commit` with the operator's.
    compared_at: Instant,
    /// Gateway whose sessions it stores.
    pub(super) gateway: String,
}

impl Writer {
    pub(super) fn new(conn: Link, settings: &PostgresSettings, counts_readings: bool) -> Self {
        Self {
            conn,
            frame_ids: 0..0,
            hours: KnownHours::default(),
            series: OwnedSeries::default(),
            reuse: Reuse::default(),
            bounds: settings.bounds,
            keeps: !settings.options.allow_postgres_data_loss,
            counts_readings,
            compared_at: Instant::now(),
            gateway: settings.gateway.clone(),
        }
    }

    /// Commits the batch. After an error the connection must be dropped.
    pub(super) async fn commit(
        &mut self,
        batch: &Batch,
        identity: &mut Identity,
        newest: &mut Newest,
    ) -> Result<Committed, CommitError> {
        self.follow_operator().await?;
        identity.begin(&mut self.conn).await?;
        // Ids of an earlier block would be lower than those that readers of the feed have passed.
        self.frame_ids = 0..0;
        // Every transaction locks rows of streams before those of devices.
        let mut watermarks = self.lock_watermarks(&batch.entries, identity).await?;
        let mut admissions = Admissions::new(&mut self.conn, self.bounds);
        let declares = admissions.declare(&batch.declares, &batch.logins).await?;
        self.series.check(&mut self.conn, &batch.entries).await?;
        let mut appended = watermarks.append(&batch.entries)?;
        // Sort by stream, like the ledger's index. The sort is stable, so each stream keeps its order.
        appended.sort_by_key(|item| item.entry.stream);
        let ids = self.take_frame_ids(appended.len()).await?;
        let frames: Vec<Frame<'_>> = ids
            .into_iter()
            .zip(appended)
            .map(|(id, item)| Frame { id, item })
            .collect();
        self.store_ledger(&frames).await?;
        self.store_readings(&frames).await?;
        self.store_gaps(&frames).await?;
        self.store_quarantine(&frames).await?;
        self.store_watermarks(&watermarks).await?;
        let mut admissions = Admissions::new(&mut self.conn, self.bounds);
        let mut logins = admissions.login(&batch.logins).await?;
        let lost = identity.lost(&batch.logins, &logins);
        if !lost.is_empty() {
            let ids = self.take_frame_ids(lost.len()).await?;
            store_lost(&mut self.conn, ids, &lost, &mut logins).await?;
        }
        keep_clocks(&mut self.conn, &batch.clocks).await?;
        self.store_steps(&batch.steps).await?;
        let refusals = self.refusals(&batch.refusals).await?;
        let reused = self.reused(watermarks.repeats(), &batch.repeats).await?;
        let events: Vec<&DeviceEvent> = { batch.events.iter() }
            .chain(&refusals)
            .chain(&reused)
            .collect();
        self.store_events(&frames, &events).await?;
        self.store_refusals(&batch.refusals).await?;
        // Rows shared by all devices come last: a transaction that locks one of them no longer waits for a
        // device's row.
        let hours = self.hours.missing(&frames);
        insert_hours(&mut self.conn, &hours).await?;
        // Taken before the COMMIT, so that these readings also count if its outcome stays unknown.
        newest.take(&frames);
        let now = Instant::now();
        let is_flushed = newest.flush(&mut self.conn, batch.is_empty(), now).await?;
        self.end_transaction().await?;
        self.hours.learn(hours);
        if is_flushed {
            newest.flushed(now);
        }
        newest.check(&mut self.conn, batch.is_empty(), now).await?;
        Ok(Committed {
            logins,
            declares,
            receipts: watermarks.receipts(),
            stored: watermarks.stored(),
        })
    }

    /// Commits, unless the server would not sync it. A server reads its configuration between messages, so the
    /// check and the COMMIT are one message.
    async fn end_transaction(&mut self) -> Result<(), CommitError> {
        const LOOK: &str = "SELECT CASE
            WHEN current_setting('fsync')::boolean AND current_setting('full_page_writes')::boolean
            THEN 0 ELSE ('fsync ' || current_setting('fsync') || ' and full_page_writes '
                || current_setting('full_page_writes'))::integer END; COMMIT";
        if !self.keeps {
            return Ok(run(&mut self.conn, "COMMIT").await?);
        }
        let ended = run(&mut self.conn, LOOK).await;
        match ended {
            // The error message quotes the text that is not a number.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("22P02") => {
                let found = error.message().split('"').nth(1);
                Err(CommitError::Unsafe(found.unwrap_or_default().to_owned()))
            }
            ended => Ok(ended?),
        }
    }

    /// Raises the session's `synchronous_commit` if the operator's has become higher.
    async fn follow_operator(&mut self) -> Result<(), sqlx::Error> {
        if !self.keeps || self.compared_at.elapsed() < COMPARE_INTERVAL {
            return Ok(());
        }
        let raise = "SELECT set_config(name, reset_val, false)
            FROM pg_settings, (SELECT ARRAY['off', 'local', 'remote_write', 'on', 'remote_apply'])
                AS levels (low_to_high)
            WHERE name = 'synchronous_commit'
                AND array_position(low_to_high, reset_val) > array_position(low_to_high, setting)";
        run(&mut self.conn, raise).await?;
        self.compared_at = Instant::now();
        Ok(())
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
        let found: Vec<(i64, i64, Option<i64>)> = sqlx::query_as(
            "SELECT stream_id, seq, crc FROM unnest($1::bigint[], $2::bigint[])
                 AS wanted (stream_id, seq)
             JOIN frames USING (stream_id, seq)",
        )
        .bind(
            { repeats.iter() }
                .map(|repeat| repeat.stream.0)
                .collect::<Vec<_>>(),
        )
        .bind(
            { repeats.iter() }
                .map(|repeat| repeat.seq.cast_signed())
                .collect::<Vec<_>>(),
        )
        .fetch_all(&mut self.conn)
        .await?;
        let stored = found.into_iter().map(reuse::row);
        Ok(self.reuse.report(&repeats, stored, Instant::now()))
    }

    async fn lock_watermarks(
        &mut self,
        entries: &[Entry],
        identity: &Identity,
    ) -> Result<Watermarks, CommitError> {
        let owners: BTreeMap<StreamId, DeviceId> = { entries.iter() }
            .map(|entry| (entry.stream, entry.device))
            .collect();
        if owners.is_empty() {
            return Ok(Watermarks::default());
        }
        let ids: Vec<i64> = owners.keys().map(|stream| stream.0).collect();
        let found: Vec<(i64, i64, i64, i64)> = sqlx::query_as(
            "SELECT id, device_id, stream, durable_seq FROM streams WHERE id = ANY($1)
             ORDER BY id FOR NO KEY UPDATE",
        )
        .bind(ids)
        .fetch_all(&mut self.conn)
        .await?;
        let mut durable = Vec::with_capacity(found.len());
        for (id, device, number, durable_seq) in found {
            let (stream, device) = (StreamId(id), DeviceId(device));
            if owners.get(&stream) != Some(&device) {
                let reason = "a stream belongs to another device";
                return Err(CommitError::Replaced(reason.to_owned()));
            }
            let durable_seq = durable_seq.cast_unsigned();
            identity.check_stream(stream, device, number.cast_unsigned(), durable_seq)?;
            durable.push((stream, durable_seq));
        }
        Ok(Watermarks::new(durable))
    }

    /// Returns one id per frame. The ids of a failed transaction are never used.
    async fn take_frame_ids(&mut self, count: usize) -> Result<Vec<i64>, sqlx::Error> {
        let mut ids: Vec<i64> = self.frame_ids.by_ref().take(count).collect();
        let missing = (count - ids.len()) as i64;
        if missing > 0 {
            let blocks = (missing + FRAME_IDS_IN_BLOCK - 1) / FRAME_IDS_IN_BLOCK;
            let blocks: Vec<i64> = sqlx::query_scalar("SELECT take_frame_id_blocks($1)")
                .bind(blocks)
                .fetch_all(&mut self.conn)
                .await?;
            for block in blocks {
                self.frame_ids = block * FRAME_IDS_IN_BLOCK..(block + 1) * FRAME_IDS_IN_BLOCK;
                ids.extend(self.frame_ids.by_ref().take(count - ids.len()));
            }
        }
        Ok(ids)
    }

    async fn store_ledger(&mut self, frames: &[Frame<'_>]) -> Result<(), sqlx::Error> {
        if frames.is_empty() {
            return Ok(());
        }
        let entries = || frames.iter().map(|frame| frame.item.entry);
        let times = || entries().map(resolved_time);
        let spans = || entries().map(reading_span);
        let readings = frames.iter().map(|frame| frame.item.readings() as i32);
        sqlx::query(
            "INSERT INTO frames (id, stream_id, seq, type, received_at, readings, quality,
                 clock_offset_us, first_ts, last_ts, crc)
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::smallint[],
                 $5::timestamptz[], $6::integer[], $7::smallint[], $8::bigint[],
                 $9::timestamptz[], $10::timestamptz[], $11::bigint[])",
        )
        .bind(frames.iter().map(|frame| frame.id).collect::<Vec<i64>>())
        .bind(entries().map(|entry| entry.stream.0).collect::<Vec<i64>>())
        .bind(
            entries()
                .map(|entry| entry.seq.cast_signed())
                .collect::<Vec<i64>>(),
        )
        .bind(
            entries()
                .map(|entry| entry.frame_type.into())
                .collect::<Vec<i16>>(),
        )
        .bind(
            entries()
                .map(|entry| Timestamp(entry.received_at_us))
                .collect::<Vec<_>>(),
        )
        .bind(readings.collect::<Vec<i32>>())
        .bind(
            times()
                .map(|time| time.map(|time| time.quality as i16))
                .collect::<Vec<_>>(),
        )
        .bind(
            times()
                .map(|time| time.map(|time| time.offset_us))
                .collect::<Vec<_>>(),
        )
        .bind(
            spans()
                .map(|span| span.map(|(first_us, _)| Timestamp(first_us)))
                .collect::<Vec<_>>(),
        )
        .bind(
            spans()
                .map(|span| span.map(|(_, last_us)| Timestamp(last_us)))
                .collect::<Vec<_>>(),
        )
        .bind(
            entries()
                .map(|entry| entry.crc.map(i64::from))
                .collect::<Vec<_>>(),
        )
        .execute(&mut self.conn)
        .await
        .and_then(|done| is_whole("frames", frames.len(), done.rows_affected()))
    }

    /// Inserts readings, without ON CONFLICT: the ledger has already skipped stored frames.
    async fn store_readings(&mut self, frames: &[Frame<'_>]) -> Result<(), sqlx::Error> {
        let runs = sorted_runs(frames);
        let readings: usize = runs.iter().map(|run| run.times_us.len()).sum();
        let stored = match readings < COPY_READINGS_MIN {
            true => insert_readings(&mut self.conn, &runs).await?,
            false => self.copy_readings(&runs).await?,
        };
        match self.counts_readings {
            true => is_whole("readings", readings, stored),
            false => Ok(()),
        }
    }

    async fn copy_readings(&mut self, runs: &[Run<'_>]) -> Result<u64, sqlx::Error> {
        let table = "readings (series_id, ts, frame_id, value)";
        copy(&mut self.conn, table, runs, |rows, run| {
            for (series, ts_us, frame, value) in run.readings() {
                rows.row(4)
                    .int8(series)
                    .timestamptz(ts_us)
                    .int8(frame)
                    .float8(value);
            }
        })
        .await
    }

    async fn store_gaps(&mut self, frames: &[Frame<'_>]) -> Result<(), sqlx::Error> {
        for frame in frames {
            let entry = frame.item.entry;
            let Some(reason) = frame.item.gap_reason() else {
                continue;
            };
            sqlx::query(
                "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
                 VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(entry.stream.0)
            .bind(frame.item.first_seq.cast_signed())
            .bind(entry.seq.cast_signed())
            .bind(i16::from(reason))
            .bind(Timestamp(entry.received_at_us))
            .execute(&mut self.conn)
            .await
            .and_then(|done| is_whole("gaps", 1, done.rows_affected()))?;
        }
        Ok(())
    }

    async fn store_quarantine(&mut self, frames: &[Frame<'_>]) -> Result<(), sqlx::Error> {
        let is_quarantined =
            |frame: &&Frame<'_>| matches!(frame.item.entry.content, Content::Quarantined { .. });
        let mut frames: Vec<_> = frames.iter().filter(is_quarantined).collect();
        // In the order in which the trigger of a purge locks the rows of `quarantine_usage`.
        frames.sort_by_key(|frame| frame.item.entry.device.0);
        for frame in frames {
            let entry = frame.item.entry;
            let Content::Quarantined {
                code,
                detail,
                bytes,
                peer,
            } = &entry.content
            else {
                continue;
            };
            sqlx::query(
                "INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail,
                     bytes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            )
            .bind(entry.device.0)
            .bind(entry.stream.0)
            .bind(entry.seq.cast_signed())
            .bind(Timestamp(entry.received_at_us))
            .bind(peer)
            .bind(i16::from(*code))
            .bind(detail)
            .bind(bytes)
            .execute(&mut self.conn)
            .await
            .and_then(|done| is_whole("quarantine", 1, done.rows_affected()))?;
        }
        Ok(())
    }

    async fn store_watermarks(&mut self, watermarks: &Watermarks) -> Result<(), sqlx::Error> {
        let moved = watermarks.moved();
        if moved.is_empty() {
            return Ok(());
        }
        let column = |value: fn(&(StreamId, ledger::Progress)) -> i64| {
            moved.iter().map(value).collect::<Vec<i64>>()
        };
        sqlx::query(
            "UPDATE streams SET durable_seq = moved.durable_seq,
                 frames = streams.frames + moved.frames,
                 readings = streams.readings + moved.readings
             FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[])
                 AS moved (id, durable_seq, frames, readings)
             WHERE streams.id = moved.id",
        )
        .bind(column(|(stream, _)| stream.0))
        .bind(column(|(_, progress)| progress.durable_seq.cast_signed()))
        .bind(column(|(_, progress)| progress.frames.cast_signed()))
        .bind(column(|(_, progress)| progress.readings.cast_signed()))
        .execute(&mut self.conn)
        .await
        .and_then(|done| is_whole("streams", moved.len(), done.rows_affected()))
    }

    async fn store_steps(&mut self, steps: &[ClockStep]) -> Result<(), sqlx::Error> {
        for step in steps {
            sqlx::query(
                "INSERT INTO clock_steps (timeline, origin_us, since_at, before_at, after_at, step_us)
                 VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (timeline, origin_us) DO NOTHING",
            )
            .bind(step.origin.timeline)
            .bind(step.origin.at_us)
            .bind(Timestamp(step.since_us))
            .bind(Timestamp(step.before_us))
            .bind(Timestamp(step.after_us))
            .bind(step.size_us())
            .execute(&mut self.conn)
            .await?;
        }
        Ok(())
    }
}

/// Verifies that all rows were stored: an operator's trigger or rule may drop rows without an error.
pub(super) fn is_whole(table: &str, rows: usize, stored: u64) -> Result<(), sqlx::Error> {
    if stored == rows as u64 {
        return Ok(());
    }
    Err(sqlx::Error::Io(io::Error::other(format!(
        "only {stored} of {rows} rows were stored in {table}: a trigger or rule drops rows; remove it"
    ))))
}

/// Inserts the hours that are missing.
pub(in crate::store) async fn insert_hours(
    conn: &mut Link,
    hours: &[i64],
) -> Result<(), sqlx::Error> {
    if hours.is_empty() {
        return Ok(());
    }
    let hours = hours.iter().copied().map(Timestamp);
    sqlx::query("INSERT INTO reading_hours SELECT unnest($1::timestamptz[]) ON CONFLICT DO NOTHING")
        .bind(hours.collect::<Vec<_>>())
        .execute(conn)
        .await
        .map(drop)
}

/// Inserts readings with one statement; returns how many rows the server stored.
pub(in crate::store) async fn insert_readings(
    conn: &mut Link,
    runs: &[Run<'_>],
) -> Result<u64, sqlx::Error> {
    if runs.is_empty() {
        return Ok(0);
    }
    let (mut series, mut times, mut frames, mut values) = (vec![], vec![], vec![], vec![]);
    for run in runs {
        for (of_series, ts_us, frame, value) in run.readings() {
            series.push(of_series);
            times.push(Timestamp(ts_us));
            frames.push(frame);
            values.push(value);
        }
    }
    sqlx::query(
        "INSERT INTO readings (series_id, ts, frame_id, value)
         SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::bigint[],
             $4::double precision[])",
    )
    .bind(series)
    .bind(times)
    .bind(frames)
    .bind(values)
    .execute(conn)
    .await
    .map(|done| done.rows_affected())
}
