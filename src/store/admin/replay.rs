//! Reads quarantined frames with everything needed to decode them, and stores them as if they had been decoded
//! on arrival.
//!
//! Invariant: the transaction that stores a frame's content first deletes its row in the quarantine. A
//! concurrent replay finds the row missing and does nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::connection::Driver;
use super::{Argument, Connection, QueryError, Row};
use crate::store::hours::hours_of;
use crate::store::rows::Run;
use crate::store::schemas::{parse_declaration, series_key};
use crate::store::{Content, DeviceId, Schema, SeriesId, StreamId, postgres, sqlite};
use crate::time::{BootClock, BootClocks, Origin, ResolvedTime, Stamp};

/// Maximum number of retries of a frame if a gateway keeps creating the partition of its readings concurrently.
const OVERTAKEN_MAX: usize = 10;

#[derive(Clone, Debug)]
pub struct QuarantinedFrame {
    pub id: i64,
    pub device: DeviceId,
    pub device_name: String,
    pub stream: StreamId,
    pub seq: u64,
    pub received_at_us: i64,
    /// Whole frame as received.
    pub bytes: Vec<u8>,
}

/// A frame that can be decoded now.
#[derive(Clone, Debug)]
pub struct Understood {
    pub frame_type: u8,
    /// First sequence number that it covers; less than its own only for a gap.
    pub first_seq: u64,
    pub content: Content,
    /// Source of its time, if it has one.
    pub stamp: Option<Stamp>,
}

/// Returns the query of [`Connection::quarantined_frames`].
pub fn quarantined_frames_sql(condition: &str, after: i64, count: u32) -> String {
    format!(
        "SELECT q.id, q.device_id, d.name, q.stream_id, q.seq, q.received_at, q.bytes
         FROM quarantine AS q LEFT JOIN devices AS d ON d.id = q.device_id
         WHERE q.id > {after} AND {condition} ORDER BY q.id LIMIT {count}"
    )
}

impl Connection {
    /// Returns up to `count` quarantined frames, oldest first, with ids above `after` and matching `condition`,
    /// an SQL expression over `quarantine AS q`.
    ///
    /// # Errors
    /// The store is unavailable, or a row has unexpected content.
    pub async fn quarantined_frames(
        &mut self,
        condition: &str,
        arguments: &[Argument<'_>],
        after: i64,
        count: u32,
    ) -> Result<Vec<QuarantinedFrame>, QueryError> {
        let sql = quarantined_frames_sql(condition, after, count);
        let rows = self.rows(&sql, arguments).await?;
        let frame = |row: &Row| {
            Ok(QuarantinedFrame {
                id: row.integer(0)?,
                device: DeviceId(row.integer(1)?),
                device_name: row.text(2)?.to_owned(),
                stream: StreamId(row.integer(3)?),
                seq: row.integer(4)?.cast_unsigned(),
                received_at_us: row.integer(5)?,
                bytes: row.bytes(6)?.to_vec(),
            })
        };
        rows.iter().map(frame).collect()
    }

    pub async fn clocks(&mut self, device: DeviceId) -> Result<BootClocks, QueryError> {
        let sql = "SELECT c.boot, c.offset_us, c.delay_us, c.measured_at, c.timeline, c.origin_us,
                c.valid_from_us,
                (SELECT s.origin_us FROM clock_steps AS s WHERE s.timeline = c.timeline
                    ORDER BY s.id DESC LIMIT 1)
            FROM clocks AS c WHERE c.device_id = $1";
        let rows = self.rows(sql, &[device.0.into()]).await?;
        let clock = |row: &Row| {
            let origin = |at_us| -> Result<Origin, QueryError> {
                Ok(Origin {
                    timeline: row.integer(4)?,
                    at_us,
                })
            };
            let clock = BootClock {
                boot: row.integer(0)? as u32,
                offset_us: row.integer(1)?,
                delay_us: row.integer(2)?.cast_unsigned(),
                measured_at_us: row.integer(3)?,
                origin: origin(row.integer(5)?)?,
                valid_from_us: row.integer(6)?,
            };
            let latest_us = row.integer_or_null(7)?.unwrap_or(clock.origin.at_us);
            Ok(clock.corrected(origin(latest_us)?))
        };
        let clocks: Result<_, QueryError> = rows.iter().map(clock).collect();
        Ok(BootClocks::new(clocks?))
    }

    /// Returns a schema that a device declared; `None` if it did not, or if a series of the schema is missing.
    pub async fn schema(
        &mut self,
        device: DeviceId,
        schema: u16,
    ) -> Result<Option<Schema>, QueryError> {
        let sql = "SELECT declaration FROM schemas WHERE device_id = $1 AND schema = $2";
        let rows = self
            .rows(sql, &[device.0.into(), i64::from(schema).into()])
            .await?;
        let Some(declaration) = rows.first() else {
            return Ok(None);
        };
        let declared = parse_declaration(declaration.text(0)?)?;
        let sql = "SELECT id FROM series
             WHERE device_id = $1 AND channel = $2 AND unit = $3 AND kind = $4";
        let mut channels = Vec::with_capacity(declared.len());
        for channel in &declared {
            let (device, name, unit, kind) = series_key(device, channel);
            let key = [device.0.into(), name.into(), unit.into(), kind.into()];
            let rows = self.rows(sql, &key).await?;
            let Some(series) = rows.first() else {
                return Ok(None);
            };
            channels.push(channel.with(SeriesId(series.integer(0)?)));
        }
        Ok(Some(Schema { schema, channels }))
    }

    /// Stores the content of a quarantined frame under its number and with its time of arrival from the ledger,
    /// and removes it from quarantine, in one transaction. Returns `false` if it is no longer in quarantine.
    ///
    /// # Errors
    /// The store is unavailable, or the ledger lacks the frame; nothing was changed.
    pub async fn replay(
        &mut self,
        frame: &QuarantinedFrame,
        understood: &Understood,
    ) -> Result<bool, QueryError> {
        let mut retries = OVERTAKEN_MAX;
        loop {
            self.begin().await?;
            let moved = self.move_out(frame, understood).await;
            match self.end(moved).await {
                Err(QueryError::Sql(error)) if retries > 0 && postgres::is_overtaken(&error) => {
                    retries -= 1;
                }
                done => return done,
            }
        }
    }

    async fn move_out(
        &mut self,
        frame: &QuarantinedFrame,
        understood: &Understood,
    ) -> Result<bool, QueryError> {
        if let Content::Quarantined { .. } = understood.content {
            return Ok(false);
        }
        let delete = "DELETE FROM quarantine WHERE id = $1";
        if self.execute(delete, &[frame.id.into()]).await? == 0 {
            return Ok(false);
        }
        if let Some(clock) = understood.stamp.and_then(|stamp| stamp.chosen) {
            self.keep_chosen(frame.device, &clock).await?;
        }
        let of_frame = [frame.stream.0.into(), frame.seq.cast_signed().into()];
        let ledger = "SELECT id FROM frames WHERE stream_id = $1 AND seq = $2";
        let ledger = self.rows(ledger, &of_frame).await?;
        let before = ledger.first().ok_or(sqlx::Error::RowNotFound)?.integer(0)?;
        // A new id, so that readers of the feed, which have passed the old one, receive its readings.
        let id = self.next_frame_id().await?;
        let sql = "UPDATE frames SET type = $1, id = $2 WHERE id = $3";
        let frame_type = i64::from(understood.frame_type);
        let values = [frame_type.into(), id.into(), before.into()];
        self.execute(sql, &values).await?;
        match &understood.content {
            Content::Readings(readings) => {
                let count = readings.values.len() as i64;
                self.resolve(id, readings.time).await?;
                let sql = "UPDATE frames SET readings = $1 WHERE id = $2";
                self.execute(sql, &[count.into(), id.into()]).await?;
                if let Some((first_us, last_us)) = readings.span() {
                    let sql = "UPDATE frames SET first_ts = $1, last_ts = $2 WHERE id = $3";
                    let span = [Argument::Time(first_us), Argument::Time(last_us), id.into()];
                    self.execute(sql, &span).await?;
                }
                let runs: Vec<Run<'_>> = Run::of(id, readings).collect();
                match &mut self.driver {
                    Driver::Sqlite(conn) => sqlite::insert_sorted(conn, &runs).await?,
                    Driver::Postgres(conn) => {
                        postgres::insert_readings(conn, &runs).await?;
                    }
                }
                let sql = "UPDATE streams SET readings = readings + $1 WHERE id = $2";
                self.execute(sql, &[count.into(), frame.stream.0.into()])
                    .await?;
                if let Driver::Postgres(conn) = &mut self.driver {
                    // Last, like a gateway.
                    postgres::insert_hours(conn, &hours_of(&runs)).await?;
                    postgres::insert_newest(conn, id, frame.received_at_us, readings).await?;
                }
            }
            Content::Gap { reason } => self.add_gap(frame, understood.first_seq, *reason).await?,
            Content::Event {
                time,
                at_us,
                level,
                code,
                text,
            } => {
                self.resolve(id, *time).await?;
                let sql =
                    "INSERT INTO device_events (device_id, at, kind, level, code, detail, frame_id)
                    VALUES ($1, $2, 'event', $3, $4, $5, $6)";
                let values = [
                    frame.device.0.into(),
                    Argument::Time(*at_us),
                    i64::from(*level).into(),
                    i64::from(*code).into(),
                    text.as_str().into(),
                    id.into(),
                ];
                self.execute(sql, &values).await?;
            }
            Content::Quarantined { .. } => {}
        }
        Ok(true)
    }

    /// Takes an id above those of all frames, within the transaction.
    async fn next_frame_id(&mut self) -> Result<i64, QueryError> {
        let sql = match self.is_sqlite() {
            true => {
                "SELECT max(last_removed, (SELECT coalesce(max(id), 0) FROM frames)) + 1
                 FROM store_identity"
            }
            false => "SELECT take_frame_id_blocks(1) * 1024",
        };
        self.integer(sql, &[]).await
    }

    /// Stores the clock chosen for a boot, unless a clock has been stored meanwhile.
    async fn keep_chosen(&mut self, device: DeviceId, clock: &BootClock) -> Result<(), QueryError> {
        let sql = "INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at)
            VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING";
        let values = [
            device.0.into(),
            i64::from(clock.boot).into(),
            clock.offset_us.into(),
            clock.delay_us.cast_signed().into(),
            Argument::Time(clock.measured_at_us),
        ];
        self.execute(sql, &values).await.map(drop)
    }

    async fn resolve(&mut self, id: i64, time: ResolvedTime) -> Result<(), QueryError> {
        let sql = "UPDATE frames SET quality = $1, clock_offset_us = $2 WHERE id = $3";
        let quality = i64::from(time.quality as u8);
        let values = [quality.into(), time.offset_us.into(), id.into()];
        self.execute(sql, &values).await.map(drop)
    }

    /// Records a gap. It covers the numbers that were not durable before it arrived, starting after the
    /// previous number in the ledger. It is already recorded, without its reason, if it covers more than one
    /// number.
    async fn add_gap(
        &mut self,
        frame: &QuarantinedFrame,
        first_seq: u64,
        reason: u8,
    ) -> Result<(), QueryError> {
        let of_frame = [frame.stream.0.into(), frame.seq.cast_signed().into()];
        let before = "SELECT coalesce(max(seq), 0) FROM frames WHERE stream_id = $1 AND seq < $2";
        let mut from_seq = first_seq.cast_signed();
        for row in self.rows(before, &of_frame).await? {
            from_seq = from_seq.max(row.integer(0)? + 1);
        }
        let known = "DELETE FROM gaps WHERE stream_id = $1 AND to_seq = $2";
        self.execute(known, &of_frame).await?;
        let sql = "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
            VALUES ($1, $2, $3, $4, $5)";
        let values = [
            frame.stream.0.into(),
            from_seq.into(),
            frame.seq.cast_signed().into(),
            i64::from(reason).into(),
            Argument::Time(frame.received_at_us),
        ];
        self.execute(sql, &values).await.map(drop)
    }
}

/// Cache of the clocks and schemas that decoding needs.
#[derive(Debug, Default)]
pub struct DecodeCache {
    clocks: HashMap<DeviceId, BootClocks>,
    schemas: HashMap<(DeviceId, u16), Option<Schema>>,
}

impl DecodeCache {
    pub async fn clocks(
        &mut self,
        connection: &mut Connection,
        device: DeviceId,
    ) -> Result<BootClocks, QueryError> {
        if let Some(clocks) = self.clocks.get(&device) {
            return Ok(clocks.clone());
        }
        let clocks = connection.clocks(device).await?;
        self.clocks.insert(device, clocks.clone());
        Ok(clocks)
    }

    /// Updates a device's clocks with the time of a stored frame.
    pub fn advance(&mut self, device: DeviceId, stamp: &Stamp) {
        if let Some(clocks) = self.clocks.get_mut(&device) {
            clocks.advance(stamp);
        }
    }

    pub async fn schema(
        &mut self,
        connection: &mut Connection,
        device: DeviceId,
        schema: u16,
    ) -> Result<Option<&Schema>, QueryError> {
        let known = match self.schemas.entry((device, schema)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(connection.schema(device, schema).await?),
        };
        Ok(known.as_ref())
    }
}
