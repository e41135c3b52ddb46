//! One batch, one transaction.
//!
//! Rows go in by INSERTs of a few fixed row counts, so that each is prepared once; readings go in
//! sorted by their primary key, so that pages are touched once.
//!
//! Invariant: a commit that failed left nothing behind, neither in the database nor in memory, so the
//! same batch can be committed again.

use std::collections::BTreeMap;
use std::sync::Arc;

use fieldgate_protocol::column::Kind;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, AssertSqlSafe, Row, SqliteConnection};

use crate::clock::BootClock;
use crate::store::ledger::Watermarks;
use crate::store::{
    Admission, Batch, Committed, Content, Declare, DeclareOutcome, DeclaredChannel, DeviceEvent,
    DeviceEventKind, DeviceId, Entry, Login, LoginOutcome, Receipt, Schema, SchemaChannel,
    SeriesId, StoreError, StreamId,
};

/// Rows of an INSERT; the last must be 1. SQLite takes 32,766 variables at most.
const ROW_COUNTS: [usize; 4] = [1000, 100, 10, 1];
/// Clocks that a login brings back.
const BOOTS_MAX: i64 = 8;

/// What a commit did, and the ledger's highest id after it.
pub(super) struct Written {
    pub committed: Committed,
    pub last_frame_id: i64,
}

/// Commits a batch whole, or nothing of it.
pub(super) async fn commit(
    connection: &mut SqliteConnection,
    statements: &Statements,
    last_frame_id: i64,
    batch: &Batch,
) -> Result<Written, StoreError> {
    execute(connection, "BEGIN IMMEDIATE")
        .await
        .map_err(classify)?;
    let mut transaction = Transaction {
        connection,
        statements,
        last_frame_id,
    };
    let written = match transaction.write(batch).await {
        Ok(committed) => execute(transaction.connection, "COMMIT")
            .await
            .map(|()| committed),
        Err(error) => Err(error),
    };
    match written {
        Ok(committed) => Ok(Written {
            committed,
            last_frame_id: transaction.last_frame_id,
        }),
        Err(error) => {
            let verdict = classify(error);
            // Fails where SQLite has rolled back by itself, which is as good.
            let _ = execute(transaction.connection, "ROLLBACK").await;
            Err(verdict)
        }
    }
}

async fn execute(connection: &mut SqliteConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::query(sql).execute(connection).await.map(drop)
}

/// Whether an error may pass. After an I/O error the page cache and the file may disagree, and a second
/// sync can succeed without having written anything: so that is the end.
pub(super) fn classify(error: sqlx::Error) -> StoreError {
    const BUSY: i32 = 5;
    const LOCKED: i32 = 6;
    const NOMEM: i32 = 7;
    const FULL: i32 = 13;
    let code = error
        .as_database_error()
        .and_then(|error| error.code())
        .and_then(|code| code.parse::<i32>().ok())
        // The low byte is the kind of the error; the rest tells where it happened.
        .map(|extended| extended & 0xFF);
    match code {
        Some(BUSY | LOCKED | NOMEM | FULL) => StoreError::Transient(error.to_string()),
        _ => StoreError::Fatal(error.to_string()),
    }
}

/// An INSERT in each of [`ROW_COUNTS`].
#[derive(Debug)]
struct RowInsert {
    sql: [Arc<str>; ROW_COUNTS.len()],
    columns: usize,
}

impl RowInsert {
    fn new(into: &str, columns: usize) -> RowInsert {
        RowInsert::around(&format!("INSERT INTO {into} VALUES "), columns, "")
    }

    fn around(before: &str, columns: usize, after: &str) -> RowInsert {
        let row = format!("({})", vec!["?"; columns].join(","));
        let sql = ROW_COUNTS.map(|rows| {
            Arc::from(format!(
                "{before}{}{after}",
                vec![row.as_str(); rows].join(",")
            ))
        });
        RowInsert { sql, columns }
    }

    /// Runs the statement over all rows, in as few pieces as the row counts allow.
    async fn run<T>(
        &self,
        connection: &mut SqliteConnection,
        mut rows: &[T],
        bind: impl Fn(&T, &mut SqliteArguments) -> Result<(), sqlx::error::BoxDynError>,
    ) -> sqlx::Result<()> {
        for (sql, count) in self.sql.iter().zip(ROW_COUNTS) {
            while rows.len() >= count {
                let (now, later) = rows.split_at(count);
                let mut arguments = SqliteArguments::default();
                arguments.reserve(count * self.columns, 0);
                for row in now {
                    bind(row, &mut arguments).map_err(sqlx::Error::Encode)?;
                }
                let query = sqlx::query_with(AssertSqlSafe(Arc::clone(sql)), arguments);
                query.execute(&mut *connection).await?;
                rows = later;
            }
        }
        Ok(())
    }
}

/// The statements whose number of rows varies.
#[derive(Debug)]
pub(super) struct Statements {
    readings: RowInsert,
    frames: RowInsert,
    streams: RowInsert,
    events: RowInsert,
}

impl Statements {
    pub(super) fn new() -> Statements {
        Statements {
            readings: RowInsert::new("readings (series_id, ts, frame_id, value)", 4),
            frames: RowInsert::new(
                "frames (id, stream_id, seq, type, received_at, readings, quality, clock_offset_us)",
                8,
            ),
            streams: RowInsert::around(
                "WITH moved (id, durable_seq, frames, readings) AS (VALUES ",
                4,
                ") UPDATE streams SET durable_seq = moved.durable_seq, \
                 frames = streams.frames + moved.frames, \
                 readings = streams.readings + moved.readings \
                 FROM moved WHERE streams.id = moved.id",
            ),
            events: RowInsert::new(
                "device_events (device_id, at, kind, level, code, detail, frame_id)",
                7,
            ),
        }
    }
}

struct ReadingRow {
    series: SeriesId,
    ts_us: i64,
    frame_id: i64,
    value: f64,
}

struct FrameRow<'b> {
    id: i64,
    entry: &'b Entry,
    readings: usize,
}

struct EventRow<'b> {
    device: DeviceId,
    at_us: i64,
    kind: &'static str,
    level: Option<u8>,
    code: u16,
    detail: &'b str,
    frame_id: Option<i64>,
}

/// What is added to a stream's totals.
#[derive(Default)]
struct Totals {
    frames: i64,
    readings: i64,
}

struct Transaction<'c> {
    connection: &'c mut SqliteConnection,
    statements: &'c Statements,
    last_frame_id: i64,
}

impl Transaction<'_> {
    async fn write(&mut self, batch: &Batch) -> sqlx::Result<Committed> {
        let mut committed = Committed::default();
        for declare in &batch.declares {
            committed.declares.push(self.declare(declare).await?);
        }
        committed.receipts = self.entries(&batch.entries).await?;
        for login in &batch.logins {
            committed.logins.push(self.login(login).await?);
        }
        for (device, clock) in &batch.clocks {
            self.clock(*device, clock).await?;
        }
        let events: Vec<EventRow<'_>> = batch.events.iter().map(event_row).collect();
        self.events(&events).await?;
        Ok(committed)
    }

    async fn entries(&mut self, entries: &[Entry]) -> sqlx::Result<Vec<Receipt>> {
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let mut watermarks = self.watermarks(entries).await?;
        let admitted = watermarks.admit(entries);
        let mut totals: BTreeMap<StreamId, Totals> = BTreeMap::new();
        let mut frames = Vec::with_capacity(admitted.len());
        let mut readings = Vec::new();
        let mut events = Vec::new();
        for (entry, first_seq) in admitted {
            self.last_frame_id += 1;
            let id = self.last_frame_id;
            let before = readings.len();
            match &entry.content {
                Content::Readings(content) => push_readings(content, id, &mut readings),
                Content::Gap { reason } => self.gap(entry, first_seq, *reason).await?,
                Content::Event {
                    at_us,
                    level,
                    code,
                    text,
                    ..
                } => events.push(EventRow {
                    device: entry.device,
                    at_us: *at_us,
                    kind: "event",
                    level: Some(*level),
                    code: *code,
                    detail: text,
                    frame_id: Some(id),
                }),
                Content::Quarantined {
                    code,
                    detail,
                    bytes,
                    peer,
                } => {
                    self.quarantine(entry, *code, detail, bytes, peer).await?;
                }
            }
            let count = readings.len() - before;
            frames.push(FrameRow {
                id,
                entry,
                readings: count,
            });
            let total = totals.entry(entry.stream).or_default();
            total.frames += 1;
            total.readings += count as i64;
        }
        readings.sort_unstable_by_key(|row: &ReadingRow| (row.series, row.ts_us, row.frame_id));
        self.frames(&frames).await?;
        self.readings(&readings).await?;
        self.events(&events).await?;
        let receipts = watermarks.receipts();
        self.streams(&receipts, &totals).await?;
        Ok(receipts)
    }

    /// How far the batch's streams are durable, read inside the transaction: whatever a session
    /// believed, this is what holds.
    async fn watermarks(&mut self, entries: &[Entry]) -> sqlx::Result<Watermarks> {
        const STREAMS: usize = 200;
        let mut streams: Vec<StreamId> = entries.iter().map(|entry| entry.stream).collect();
        streams.sort_unstable();
        streams.dedup();
        let mut stored = Vec::with_capacity(streams.len());
        for chunk in streams.chunks(STREAMS) {
            // One statement for every length: a short chunk names its last stream again and again.
            let mut sql = String::from("SELECT id, durable_seq FROM streams WHERE id IN (?");
            sql.push_str(&",?".repeat(STREAMS - 1));
            sql.push(')');
            let mut query = sqlx::query(AssertSqlSafe(sql));
            for i in 0..STREAMS {
                query = query.bind(chunk[i.min(chunk.len() - 1)].0);
            }
            for row in query.fetch_all(&mut *self.connection).await? {
                stored.push((StreamId(row.try_get(0)?), row.try_get::<i64, _>(1)? as u64));
            }
        }
        Ok(Watermarks::new(stored))
    }

    async fn frames(&mut self, rows: &[FrameRow<'_>]) -> sqlx::Result<()> {
        let bind = |row: &FrameRow<'_>, arguments: &mut SqliteArguments| {
            let entry = row.entry;
            let time = match &entry.content {
                Content::Readings(readings) => Some(readings.time),
                Content::Event { time, .. } => Some(*time),
                Content::Gap { .. } | Content::Quarantined { .. } => None,
            };
            arguments.add(row.id)?;
            arguments.add(entry.stream.0)?;
            arguments.add(entry.seq as i64)?;
            arguments.add(entry.frame_type)?;
            arguments.add(entry.received_at_us)?;
            arguments.add(row.readings as i64)?;
            arguments.add(time.map(|time| time.quality as i64))?;
            arguments.add(time.map(|time| time.offset_us))
        };
        self.statements
            .frames
            .run(self.connection, rows, bind)
            .await
    }

    async fn readings(&mut self, rows: &[ReadingRow]) -> sqlx::Result<()> {
        let bind = |row: &ReadingRow, arguments: &mut SqliteArguments| {
            arguments.add(row.series.0)?;
            arguments.add(row.ts_us)?;
            arguments.add(row.frame_id)?;
            arguments.add((!row.value.is_nan()).then_some(row.value))
        };
        self.statements
            .readings
            .run(self.connection, rows, bind)
            .await
    }

    async fn events(&mut self, rows: &[EventRow<'_>]) -> sqlx::Result<()> {
        let bind = |row: &EventRow<'_>, arguments: &mut SqliteArguments| {
            arguments.add(row.device.0)?;
            arguments.add(row.at_us)?;
            arguments.add(row.kind)?;
            arguments.add(row.level)?;
            arguments.add(row.code)?;
            arguments.add(row.detail)?;
            arguments.add(row.frame_id)
        };
        self.statements
            .events
            .run(self.connection, rows, bind)
            .await
    }

    async fn streams(
        &mut self,
        receipts: &[Receipt],
        totals: &BTreeMap<StreamId, Totals>,
    ) -> sqlx::Result<()> {
        let moved: Vec<(&Receipt, &Totals)> = receipts
            .iter()
            .filter_map(|receipt| Some((receipt, totals.get(&receipt.stream)?)))
            .collect();
        let bind = |(receipt, total): &(&Receipt, &Totals), arguments: &mut SqliteArguments| {
            arguments.add(receipt.stream.0)?;
            arguments.add(receipt.durable_seq as i64)?;
            arguments.add(total.frames)?;
            arguments.add(total.readings)
        };
        self.statements
            .streams
            .run(self.connection, &moved, bind)
            .await
    }

    async fn gap(&mut self, entry: &Entry, first_seq: u64, reason: u8) -> sqlx::Result<()> {
        sqlx::query(
            "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at) \
             VALUES (?, ?, ?, ?, ?)",
        )
        .bind(entry.stream.0)
        .bind(first_seq as i64)
        .bind(entry.seq as i64)
        .bind(reason)
        .bind(entry.received_at_us)
        .execute(&mut *self.connection)
        .await
        .map(drop)
    }

    async fn quarantine(
        &mut self,
        entry: &Entry,
        code: u8,
        detail: &str,
        bytes: &[u8],
        peer: &str,
    ) -> sqlx::Result<()> {
        sqlx::query(
            "INSERT INTO quarantine \
             (device_id, stream_id, seq, received_at, peer, code, detail, bytes) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(entry.device.0)
        .bind(entry.stream.0)
        .bind(entry.seq as i64)
        .bind(entry.received_at_us)
        .bind(peer)
        .bind(code)
        .bind(detail)
        .bind(bytes)
        .execute(&mut *self.connection)
        .await
        .map(drop)
    }

    async fn login(&mut self, login: &Login) -> sqlx::Result<LoginOutcome> {
        let (device, enabled): (i64, bool) = sqlx::query_as(
            "INSERT INTO devices (name, firmware, first_seen_at, last_seen_at) \
             VALUES (?, ?, ?3, ?3) ON CONFLICT (name) DO UPDATE \
             SET firmware = excluded.firmware, last_seen_at = excluded.last_seen_at \
             RETURNING id, enabled",
        )
        .bind(&login.device)
        .bind(&login.firmware)
        .bind(login.at_us)
        .fetch_one(&mut *self.connection)
        .await?;
        if !enabled {
            return Ok(LoginOutcome::Disabled);
        }
        let device = DeviceId(device);
        let (stream, durable_seq): (i64, i64) = sqlx::query_as(
            "INSERT INTO streams (device_id, stream, created_at) VALUES (?, ?, ?) \
             ON CONFLICT (device_id, stream) DO UPDATE SET stream = excluded.stream \
             RETURNING id, durable_seq",
        )
        .bind(device.0)
        .bind(login.stream as i64)
        .bind(login.at_us)
        .fetch_one(&mut *self.connection)
        .await?;
        let receipt = Receipt {
            stream: StreamId(stream),
            durable_seq: durable_seq as u64,
        };
        if login.next_seq <= receipt.durable_seq {
            return Ok(LoginOutcome::StreamConflict);
        }
        let schema = match login.schema {
            Some((schema, hash)) => self.schema(device, schema, &hash).await?,
            None => None,
        };
        let clocks = self.clocks(device).await?;
        let connected = EventRow {
            device,
            at_us: login.at_us,
            kind: "connected",
            level: None,
            code: 0,
            detail: &login.peer,
            frame_id: None,
        };
        self.events(&[connected]).await?;
        Ok(LoginOutcome::Admitted(Box::new(Admission {
            device,
            receipt,
            schema,
            clocks,
        })))
    }

    /// A stored schema, if it has this hash.
    async fn schema(
        &mut self,
        device: DeviceId,
        schema: u16,
        hash: &[u8],
    ) -> sqlx::Result<Option<Arc<Schema>>> {
        let stored: Option<(String,)> = sqlx::query_as(
            "SELECT declaration FROM schemas \
             WHERE device_id = ? AND schema = ? AND hash = ?",
        )
        .bind(device.0)
        .bind(schema)
        .bind(hash)
        .fetch_optional(&mut *self.connection)
        .await?;
        let Some((declaration,)) = stored else {
            return Ok(None);
        };
        let declaration: Vec<Declaration> = serde_json::from_str(&declaration)
            .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let mut channels = Vec::with_capacity(declaration.len());
        for channel in declaration {
            channels.push(self.channel(device, &channel.into()).await?);
        }
        Ok(Some(Arc::new(Schema { schema, channels })))
    }

    async fn declare(&mut self, declare: &Declare) -> sqlx::Result<DeclareOutcome> {
        let taken: Option<(Vec<u8>,)> =
            sqlx::query_as("SELECT hash FROM schemas WHERE device_id = ? AND schema = ?")
                .bind(declare.device.0)
                .bind(declare.schema)
                .fetch_optional(&mut *self.connection)
                .await?;
        match taken {
            Some((hash,)) if hash != declare.hash => return Ok(DeclareOutcome::Conflict),
            Some(_) => {}
            None => self.keep_schema(declare).await?,
        }
        let mut channels = Vec::with_capacity(declare.channels.len());
        for channel in &declare.channels {
            channels.push(self.channel(declare.device, channel).await?);
        }
        Ok(DeclareOutcome::Accepted(Arc::new(Schema {
            schema: declare.schema,
            channels,
        })))
    }

    async fn keep_schema(&mut self, declare: &Declare) -> sqlx::Result<()> {
        let declaration: Vec<Declaration> = declare
            .channels
            .iter()
            .cloned()
            .map(Declaration::from)
            .collect();
        let declaration = serde_json::to_string(&declaration)
            .map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
        sqlx::query(
            "INSERT INTO schemas (device_id, schema, hash, declaration) VALUES (?, ?, ?, ?)",
        )
        .bind(declare.device.0)
        .bind(declare.schema)
        .bind(declare.hash.as_slice())
        .bind(declaration)
        .execute(&mut *self.connection)
        .await
        .map(drop)
    }

    /// A declared channel with its series, which is made if it is the first of its kind.
    async fn channel(
        &mut self,
        device: DeviceId,
        channel: &DeclaredChannel,
    ) -> sqlx::Result<SchemaChannel> {
        let series: (i64,) = sqlx::query_as(
            "INSERT INTO series (device_id, channel, unit, kind) VALUES (?, ?, ?, ?) \
             ON CONFLICT DO UPDATE SET kind = excluded.kind RETURNING id",
        )
        .bind(device.0)
        .bind(&channel.name)
        .bind(&channel.unit)
        .bind(channel.kind as u8)
        .fetch_one(&mut *self.connection)
        .await?;
        let (id, kind, exp10) = (channel.id, channel.kind, channel.exp10);
        Ok(SchemaChannel {
            id,
            kind,
            exp10,
            series: SeriesId(series.0),
        })
    }

    async fn clocks(&mut self, device: DeviceId) -> sqlx::Result<Vec<BootClock>> {
        sqlx::query(
            "SELECT boot, offset_us, delay_us, measured_at FROM clocks \
             WHERE device_id = ? ORDER BY measured_at DESC LIMIT ?",
        )
        .bind(device.0)
        .bind(BOOTS_MAX)
        .fetch_all(&mut *self.connection)
        .await?
        .iter()
        .map(boot_clock)
        .collect()
    }

    async fn clock(&mut self, device: DeviceId, clock: &BootClock) -> sqlx::Result<()> {
        sqlx::query(
            "INSERT OR REPLACE INTO clocks (device_id, boot, offset_us, delay_us, measured_at) \
             VALUES (?, ?, ?, ?, ?)",
        )
        .bind(device.0)
        .bind(clock.boot)
        .bind(clock.offset_us)
        .bind(clock.delay_us as i64)
        .bind(clock.measured_at_us)
        .execute(&mut *self.connection)
        .await
        .map(drop)
    }
}

fn push_readings(content: &crate::store::Readings, frame_id: i64, rows: &mut Vec<ReadingRow>) {
    let columns = content.values.chunks_exact(content.times_us.len());
    for (series, values) in content.series.iter().zip(columns) {
        rows.extend(
            content
                .times_us
                .iter()
                .zip(values)
                .map(|(ts_us, value)| ReadingRow {
                    series: *series,
                    ts_us: *ts_us,
                    frame_id,
                    value: *value,
                }),
        );
    }
}

fn event_row(event: &DeviceEvent) -> EventRow<'_> {
    EventRow {
        device: event.device,
        at_us: event.at_us,
        kind: match event.kind {
            DeviceEventKind::Disconnected => "disconnected",
        },
        level: None,
        code: u16::from(event.code),
        detail: &event.detail,
        frame_id: None,
    }
}

fn boot_clock(row: &SqliteRow) -> sqlx::Result<BootClock> {
    Ok(BootClock {
        boot: row.try_get(0)?,
        offset_us: row.try_get(1)?,
        delay_us: row.try_get::<i64, _>(2)? as u64,
        measured_at_us: row.try_get(3)?,
    })
}

/// A channel as it stands in `schemas.declaration`.
#[derive(Serialize, Deserialize)]
struct Declaration {
    id: u8,
    name: String,
    unit: String,
    kind: u8,
    exp10: i8,
}

impl From<DeclaredChannel> for Declaration {
    fn from(channel: DeclaredChannel) -> Declaration {
        let DeclaredChannel {
            id,
            name,
            unit,
            kind,
            exp10,
        } = channel;
        Declaration {
            id,
            name,
            unit,
            kind: kind as u8,
            exp10,
        }
    }
}

impl From<Declaration> for DeclaredChannel {
    fn from(stored: Declaration) -> DeclaredChannel {
        let Declaration {
            id,
            name,
            unit,
            kind,
            exp10,
        } = stored;
        let kind = Kind::from_wire(kind).unwrap_or(Kind::F64);
        DeclaredChannel {
            id,
            name,
            unit,
            kind,
            exp10,
        }
    }
}
