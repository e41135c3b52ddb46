//! Reads a spool in order of arrival.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use fieldgate_protocol::frame::types;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row, SqliteConnection};

use super::{
    Change, Chunk, Cursor, DeviceRow, SchemaRow, SeriesRow, StreamRow, USED_BYTES, Usage, Waiting,
};
use crate::store::admin::Access;
use crate::store::sqlite::open::{OpenError, Purpose, open_existing};
use crate::store::{
    Content, DeviceEvent, DeviceEventKind, DeviceId, Entry, Readings, Refusal, SeriesId, SessionId,
    StreamId,
};
use crate::time::{BootClock, ClockStep, Origin, Quality, ResolvedTime};

/// Maximum number of readings in a chunk (unless one frame has more), and of frames.
const CHUNK_READINGS: i64 = 50_000;
const CHUNK_FRAMES: i64 = 4096;
/// Maximum number of audit events in a chunk; also of refusals, and of changes.
const CHUNK_EVENTS: i64 = 1000;

/// Queries of a chunk. Their cost depends only on the chunk, not on how much waits.
const LEDGER: &str =
    "SELECT f.id, s.device_id, f.stream_id, f.seq, f.type, f.received_at, f.readings,
         f.quality, f.clock_offset_us, f.crc
     FROM frames AS f CROSS JOIN streams AS s ON s.id = f.stream_id
     WHERE f.id > ? ORDER BY f.id LIMIT ?";
const READINGS: &str = "SELECT frame_id, series_id, ts, value FROM readings
     WHERE frame_id BETWEEN ? AND ? ORDER BY frame_id, series_id, ts";
const GAPS: &str = "SELECT f.id, g.from_seq, g.reason FROM frames AS f
     CROSS JOIN gaps AS g INDEXED BY gaps_by_frame
         ON g.stream_id = f.stream_id AND g.to_seq = f.seq
     WHERE f.id BETWEEN ? AND ?";
const QUARANTINE: &str = "SELECT f.id, q.code, q.detail, q.bytes, q.peer FROM frames AS f
     CROSS JOIN quarantine AS q ON q.stream_id = f.stream_id AND q.seq = f.seq
     WHERE f.id BETWEEN ? AND ?";
const EVENTS: &str = "SELECT frame_id, at, level, code, detail FROM device_events
     WHERE frame_id BETWEEN ? AND ?";
const AUDIT: &str = "SELECT id, device_id, at, kind, code, detail, session FROM device_events
     WHERE id > ? AND frame_id IS NULL ORDER BY id LIMIT ?";
#[cfg(test)]
pub(super) const OF_A_CHUNK: [&str; 6] = [LEDGER, READINGS, GAPS, QUARANTINE, EVENTS, AUDIT];

/// A connection that reads a spool while its store writes.
pub(in crate::store) struct SpoolReader {
    conn: SqliteConnection,
}

/// A row of the ledger, without the content of its frame.
struct Ledger {
    id: i64,
    entry: Entry,
    time: Option<ResolvedTime>,
}

impl SpoolReader {
    pub(in crate::store) async fn open(path: &Path) -> Result<Self, OpenError> {
        let conn = open_existing(path, Purpose::Spool, Access::Read).await?;
        Ok(Self { conn })
    }

    /// Returns the totals of the waiting content; `None` if the spool is not in use.
    pub(in crate::store) async fn waiting(&mut self) -> Result<Option<Waiting>, sqlx::Error> {
        let (is_registered, frames, readings, oldest_us): (bool, i64, i64, Option<i64>) =
            sqlx::query_as(
                "SELECT (SELECT is_registered FROM spool), count(*), coalesce(sum(readings), 0),
                     (SELECT received_at FROM frames ORDER BY id LIMIT 1)
                 FROM frames",
            )
            .fetch_one(&mut self.conn)
            .await?;
        Ok(is_registered.then_some(Waiting {
            frames: frames.unsigned_abs(),
            readings: readings.unsigned_abs(),
            oldest_received_us: oldest_us,
        }))
    }

    pub(in crate::store) async fn usage(&mut self) -> Result<Usage, sqlx::Error> {
        let used_bytes: i64 = sqlx::query_scalar(USED_BYTES)
            .fetch_one(&mut self.conn)
            .await?;
        let oldest = sqlx::query_scalar("SELECT received_at FROM frames ORDER BY id LIMIT 1");
        Ok(Usage {
            used_bytes: used_bytes.unsigned_abs(),
            oldest_received_us: oldest.fetch_optional(&mut self.conn).await?,
        })
    }

    /// Returns the size of the free pages in the file, in bytes.
    pub(in crate::store) async fn reusable_bytes(&mut self) -> Result<u64, sqlx::Error> {
        let free = "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size";
        let bytes: i64 = sqlx::query_scalar(free).fetch_one(&mut self.conn).await?;
        Ok(bytes.unsigned_abs())
    }

    /// Returns a gap for each stream that covers everything drained from it.
    pub(in crate::store) async fn drained(
        &mut self,
        reason: u8,
        at_us: i64,
    ) -> Result<Vec<Entry>, sqlx::Error> {
        // A waiting gap covers numbers before its own.
        let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
            "SELECT id, device_id, coalesce(
                 (SELECT coalesce(g.from_seq, f.seq) - 1 FROM frames AS f
                  LEFT JOIN gaps AS g ON g.stream_id = f.stream_id AND g.to_seq = f.seq
                  WHERE f.stream_id = s.id ORDER BY f.seq LIMIT 1),
                 durable_seq)
             FROM streams AS s",
        )
        .fetch_all(&mut self.conn)
        .await?;
        let drained = rows.into_iter().filter(|(.., seq)| *seq > 0);
        let gap = |(stream, device, seq): (i64, i64, i64)| Entry {
            device: DeviceId(device),
            stream: StreamId(stream),
            first_seq: 1,
            seq: seq.cast_unsigned(),
            frame_type: types::GAP,
            crc: None,
            received_at_us: at_us,
            content: Content::Gap { reason },
            clock: None,
        };
        Ok(drained.map(gap).collect())
    }

    /// Returns the oldest content after `after`.
    pub(in crate::store) async fn chunk(&mut self, after: Cursor) -> Result<Chunk, sqlx::Error> {
        // In one snapshot, which has the device and the schema of every entry.
        sqlx::query("BEGIN").execute(&mut self.conn).await?;
        let chunk = self.read_chunk(after).await;
        sqlx::query("COMMIT").execute(&mut self.conn).await?;
        chunk
    }

    async fn read_chunk(&mut self, after: Cursor) -> Result<Chunk, sqlx::Error> {
        let mut chunk = Chunk {
            end: after,
            ..Chunk::default()
        };
        self.read_changes(&mut chunk).await?;
        self.read_events(&mut chunk).await?;
        self.read_refusals(&mut chunk).await?;
        let ledger = self.read_ledger(after.frame).await?;
        if let (Some(first), Some(last)) = (ledger.first(), ledger.last()) {
            let span = (first.id, last.id);
            chunk.end.frame = last.id;
            chunk.entries = self.read_contents(ledger, span).await?;
        }
        Ok(chunk)
    }

    async fn read_ledger(&mut self, after: i64) -> Result<Vec<Ledger>, sqlx::Error> {
        let rows = sqlx::query(LEDGER)
            .bind(after)
            .bind(CHUNK_FRAMES)
            .fetch_all(&mut self.conn)
            .await?;
        let mut ledger = Vec::new();
        let mut readings = 0;
        for row in &rows {
            readings += row.try_get::<i64, _>(6)?;
            if readings > CHUNK_READINGS && !ledger.is_empty() {
                break;
            }
            let seq = row.try_get::<i64, _>(3)?.cast_unsigned();
            let time = match row.try_get::<Option<u8>, _>(7)? {
                Some(quality) => Some(ResolvedTime {
                    offset_us: row.try_get(8)?,
                    quality: quality_of(quality)?,
                }),
                None => None,
            };
            ledger.push(Ledger {
                id: row.try_get(0)?,
                entry: Entry {
                    device: DeviceId(row.try_get(1)?),
                    stream: StreamId(row.try_get(2)?),
                    first_seq: seq,
                    seq,
                    frame_type: row.try_get(4)?,
                    crc: row.try_get(9)?,
                    received_at_us: row.try_get(5)?,
                    content: Content::Gap { reason: 0 },
                    clock: None,
                },
                time,
            });
        }
        Ok(ledger)
    }

    async fn read_contents(
        &mut self,
        ledger: Vec<Ledger>,
        span: (i64, i64),
    ) -> Result<Vec<Entry>, sqlx::Error> {
        let mut readings = self.read_readings(span).await?;
        let mut others = self.read_others(span).await?;
        let mut entries = Vec::with_capacity(ledger.len());
        for Ledger {
            id,
            mut entry,
            time,
        } in ledger
        {
            entry.content = match (others.remove(&id), time) {
                (Some(Other::Content { content, from_seq }), None) => {
                    entry.first_seq = from_seq.unwrap_or(entry.seq);
                    content
                }
                (Some(Other::Event(event)), Some(time)) => Content::Event {
                    time,
                    at_us: event.at_us,
                    level: event.level,
                    code: event.code,
                    text: event.text,
                },
                (None, Some(time)) => {
                    let columns = readings.remove(&id).unwrap_or_default();
                    Content::Readings(columns.into_readings(time)?)
                }
                _ => return Err(damaged("content of a frame missing")),
            };
            entries.push(entry);
        }
        Ok(entries)
    }

    async fn read_readings(
        &mut self,
        span: (i64, i64),
    ) -> Result<HashMap<i64, Columns>, sqlx::Error> {
        let rows: Vec<(i64, i64, i64, Option<f64>)> = sqlx::query_as(READINGS)
            .bind(span.0)
            .bind(span.1)
            .fetch_all(&mut self.conn)
            .await?;
        let mut frames: HashMap<i64, Columns> = HashMap::new();
        for (frame, series, ts_us, value) in rows {
            frames.entry(frame).or_default().push(series, ts_us, value);
        }
        Ok(frames)
    }

    /// Returns the content of frames without readings.
    async fn read_others(&mut self, span: (i64, i64)) -> Result<HashMap<i64, Other>, sqlx::Error> {
        let mut others = HashMap::new();
        let gaps: Vec<(i64, i64, u8)> = sqlx::query_as(GAPS)
            .bind(span.0)
            .bind(span.1)
            .fetch_all(&mut self.conn)
            .await?;
        for (frame, from_seq, reason) in gaps {
            let gap = Other::Content {
                content: Content::Gap { reason },
                from_seq: Some(from_seq.cast_unsigned()),
            };
            others.insert(frame, gap);
        }
        let quarantined: Vec<(i64, u8, String, Vec<u8>, String)> = sqlx::query_as(QUARANTINE)
            .bind(span.0)
            .bind(span.1)
            .fetch_all(&mut self.conn)
            .await?;
        for (frame, code, detail, bytes, peer) in quarantined {
            // A quarantined GAP is in both tables.
            let from_seq = match others.remove(&frame) {
                Some(Other::Content { from_seq, .. }) => from_seq,
                _ => None,
            };
            let content = Content::Quarantined {
                code,
                detail,
                bytes,
                peer,
            };
            others.insert(frame, Other::Content { content, from_seq });
        }
        let events: Vec<(i64, i64, u8, u16, String)> = sqlx::query_as(EVENTS)
            .bind(span.0)
            .bind(span.1)
            .fetch_all(&mut self.conn)
            .await?;
        for (frame, at_us, level, code, text) in events {
            let event = ReportedEvent {
                at_us,
                level,
                code,
                text,
            };
            others.insert(frame, Other::Event(event));
        }
        Ok(others)
    }

    async fn read_events(&mut self, chunk: &mut Chunk) -> Result<(), sqlx::Error> {
        let rows = sqlx::query(AUDIT)
            .bind(chunk.end.event)
            .bind(CHUNK_EVENTS)
            .fetch_all(&mut self.conn)
            .await?;
        for row in &rows {
            let id = row.try_get(0)?;
            let kind: String = row.try_get(3)?;
            chunk.end.event = id;
            chunk.event_ids.push(id);
            chunk.events.push(DeviceEvent {
                device: DeviceId(row.try_get(1)?),
                session: row.try_get::<Option<i64>, _>(6)?.map(SessionId),
                at_us: row.try_get(2)?,
                kind: DeviceEventKind::of_name(&kind)
                    .ok_or_else(|| damaged("unknown kind of event"))?,
                code: row.try_get(4)?,
                detail: row.try_get(5)?,
            });
        }
        Ok(())
    }

    /// Reads refusals. Those of known devices are in the audit trail already.
    async fn read_refusals(&mut self, chunk: &mut Chunk) -> Result<(), sqlx::Error> {
        let rows = sqlx::query(
            "SELECT id, peer, device, code, reason, count, first_at, last_at FROM refusals
             WHERE id > ? ORDER BY id LIMIT ?",
        )
        .bind(chunk.end.refusal)
        .bind(CHUNK_EVENTS)
        .fetch_all(&mut self.conn)
        .await?;
        for row in &rows {
            let (id, count): (i64, i64) = (row.try_get(0)?, row.try_get(5)?);
            let peer: String = row.try_get(1)?;
            chunk.end.refusal = id;
            chunk.refusal_counts.push((id, count));
            chunk.refusals.push(Refusal {
                peer: peer
                    .parse()
                    .map_err(|_| damaged("refusal without an address"))?,
                device: row.try_get(2)?,
                code: row.try_get(3)?,
                detail: row.try_get(4)?,
                count: count.unsigned_abs(),
                first_at_us: row.try_get(6)?,
                at_us: row.try_get(7)?,
                is_audited: false,
            });
        }
        Ok(())
    }

    async fn read_changes(&mut self, chunk: &mut Chunk) -> Result<(), sqlx::Error> {
        let rows: Vec<(i64, String, i64, i64)> = sqlx::query_as(
            "SELECT id, what, device_id, key FROM changes WHERE id > ? ORDER BY id LIMIT ?",
        )
        .bind(chunk.end.change)
        .bind(CHUNK_EVENTS)
        .fetch_all(&mut self.conn)
        .await?;
        for (id, what, device, key) in rows {
            chunk.end.change = id;
            chunk.change_ids.push(id);
            let device = DeviceId(device);
            chunk.changes.push(match what.as_str() {
                "device" => Change::Device(device, self.device(device).await?),
                "schema" => Change::Schema(self.schema(device, key).await?),
                "clock" => Change::Clock(device, self.clock(device, key).await?),
                "clock_step" => Change::Step(self.clock_step(key).await?),
                _ => return Err(damaged("unknown kind of change")),
            });
        }
        Ok(())
    }

    async fn device(&mut self, device: DeviceId) -> Result<DeviceRow, sqlx::Error> {
        let row = sqlx::query(
            "SELECT name, enabled, firmware, first_seen_at, last_seen_at FROM devices WHERE id = ?",
        )
        .bind(device.0)
        .fetch_one(&mut self.conn)
        .await?;
        Ok(DeviceRow {
            name: row.try_get(0)?,
            is_enabled: row.try_get(1)?,
            firmware: row.try_get(2)?,
            first_seen_us: row.try_get(3)?,
            last_seen_us: row.try_get(4)?,
        })
    }

    async fn schema(&mut self, device: DeviceId, key: i64) -> Result<SchemaRow, sqlx::Error> {
        let row = sqlx::query(
            "SELECT schema, hash, declaration FROM schemas WHERE device_id = ? AND schema = ?",
        )
        .bind(device.0)
        .bind(key)
        .fetch_one(&mut self.conn)
        .await?;
        Ok(SchemaRow {
            device,
            schema: row.try_get(0)?,
            hash: row.try_get(1)?,
            declaration: row.try_get(2)?,
        })
    }

    async fn clock(&mut self, device: DeviceId, key: i64) -> Result<BootClock, sqlx::Error> {
        let row = sqlx::query(
            "SELECT boot, offset_us, delay_us, measured_at, timeline, origin_us, valid_from_us
             FROM clocks WHERE device_id = ? AND boot = ?",
        )
        .bind(device.0)
        .bind(key)
        .fetch_one(&mut self.conn)
        .await?;
        Ok(BootClock {
            boot: row.try_get(0)?,
            offset_us: row.try_get(1)?,
            delay_us: row.try_get::<i64, _>(2)?.cast_unsigned(),
            measured_at_us: row.try_get(3)?,
            origin: Origin {
                timeline: row.try_get(4)?,
                at_us: row.try_get(5)?,
            },
            valid_from_us: row.try_get(6)?,
        })
    }

    async fn clock_step(&mut self, id: i64) -> Result<ClockStep, sqlx::Error> {
        let row = sqlx::query(
            "SELECT timeline, origin_us, since_at, before_at, after_at FROM clock_steps WHERE id = ?",
        )
        .bind(id)
        .fetch_one(&mut self.conn)
        .await?;
        Ok(ClockStep {
            origin: Origin {
                timeline: row.try_get(0)?,
                at_us: row.try_get(1)?,
            },
            since_us: row.try_get(2)?,
            before_us: row.try_get(3)?,
            after_us: row.try_get(4)?,
        })
    }

    pub(in crate::store) async fn devices(
        &mut self,
        ids: BTreeSet<DeviceId>,
    ) -> Result<Vec<(DeviceId, DeviceRow)>, sqlx::Error> {
        let mut devices = Vec::with_capacity(ids.len());
        for id in ids {
            devices.push((id, self.device(id).await?));
        }
        Ok(devices)
    }

    pub(in crate::store) async fn streams(
        &mut self,
        ids: BTreeSet<StreamId>,
    ) -> Result<Vec<(StreamId, StreamRow)>, sqlx::Error> {
        let rows = self
            .rows_with_ids(
                "SELECT id, device_id, stream, durable_seq, created_at FROM streams",
                ids.iter().map(|id| id.0),
            )
            .await?;
        let stream = |row: &SqliteRow| {
            let stream = StreamRow {
                device: DeviceId(row.try_get(1)?),
                number: row.try_get(2)?,
                durable_seq: row.try_get(3)?,
                created_us: row.try_get(4)?,
            };
            Ok((StreamId(row.try_get(0)?), stream))
        };
        rows.iter().map(stream).collect()
    }

    pub(in crate::store) async fn series(
        &mut self,
        ids: BTreeSet<SeriesId>,
    ) -> Result<Vec<(SeriesId, SeriesRow)>, sqlx::Error> {
        let rows = self
            .rows_with_ids(
                "SELECT id, device_id, channel, unit, kind FROM series",
                ids.iter().map(|id| id.0),
            )
            .await?;
        let series = |row: &SqliteRow| {
            let series = SeriesRow {
                device: DeviceId(row.try_get(1)?),
                channel: row.try_get(2)?,
                unit: row.try_get(3)?,
                kind: row.try_get(4)?,
            };
            Ok((SeriesId(row.try_get(0)?), series))
        };
        rows.iter().map(series).collect()
    }

    async fn rows_with_ids(
        &mut self,
        select: &'static str,
        ids: impl Iterator<Item = i64>,
    ) -> Result<Vec<SqliteRow>, sqlx::Error> {
        // One parameter for any number of ids, so that there is one statement.
        let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
        let sql = format!("{select} WHERE id IN (SELECT value FROM json_each(?))");
        sqlx::query(AssertSqlSafe(sql))
            .bind(format!("[{}]", ids.join(",")))
            .fetch_all(&mut self.conn)
            .await
    }
}

/// Content of a frame without readings.
enum Other {
    /// Content without a time, and the first number that it covers, if that is not its own.
    Content {
        content: Content,
        from_seq: Option<u64>,
    },
    Event(ReportedEvent),
}

struct ReportedEvent {
    at_us: i64,
    level: u8,
    code: u16,
    text: String,
}

/// Readings of a frame in the order of the query: series after series, each with the same times.
#[derive(Default)]
struct Columns {
    times_us: Vec<i64>,
    series: Vec<SeriesId>,
    values: Vec<f64>,
}

impl Columns {
    fn push(&mut self, series: i64, ts_us: i64, value: Option<f64>) {
        if self.series.last() != Some(&SeriesId(series)) {
            self.series.push(SeriesId(series));
        }
        if self.series.len() == 1 {
            self.times_us.push(ts_us);
        }
        self.values.push(value.unwrap_or(f64::NAN));
    }

    fn into_readings(self, time: ResolvedTime) -> Result<Readings, sqlx::Error> {
        if self.values.len() != self.times_us.len() * self.series.len() {
            return Err(damaged("readings of a frame missing"));
        }
        Ok(Readings {
            time,
            times_us: self.times_us,
            series: self.series,
            values: self.values,
            too_old: 0,
        })
    }
}

fn quality_of(number: u8) -> Result<Quality, sqlx::Error> {
    let known = [
        Quality::Utc,
        Quality::Anchored,
        Quality::Unanchored,
        Quality::Suspect,
    ];
    let quality = known.into_iter().find(|known| *known as u8 == number);
    quality.ok_or_else(|| damaged("unknown quality of time"))
}

fn damaged(what: &str) -> sqlx::Error {
    sqlx::Error::Protocol(format!("spool damaged: {what}"))
}
