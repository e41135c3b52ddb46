//! Statements that falsify a store, each with the difference that the verifier must report.

/// A change to a store, and the difference that the verifier must report.
pub struct Falsification {
    pub what: &'static str,
    sql: &'static str,
    pub said: &'static str,
}

/// Id of the first readable frame with readings; falsifications of one reading use the first one of its first series.
const ONE: &str = "(SELECT min(id) FROM frames WHERE readings > 0)";

const fn of(what: &'static str, sql: &'static str, said: &'static str) -> Falsification {
    Falsification { what, sql, said }
}

/// Falsifications for both stores. `{one}` is the id of a frame with readings, `READINGS` the table of readings, `DAY`
/// and `MICROSECOND` are time spans.
pub const FALSIFICATIONS: &[Falsification] = &[
    // Readings.
    of(
        "a reading deleted",
        "DELETE FROM READINGS WHERE frame_id = {one} AND (series_id, ts) =
             (SELECT series_id, ts FROM READINGS WHERE frame_id = {one} ORDER BY series_id, ts LIMIT 1)",
        "1 of 5 readings were sent but not stored",
    ),
    of(
        "all readings of a series deleted",
        "DELETE FROM READINGS WHERE series_id = (SELECT min(id) FROM series)",
        "5 of 5 readings were sent but not stored",
    ),
    of(
        "a thousand readings added, of a frame that does not exist",
        "INSERT INTO READINGS (series_id, ts, frame_id, value)
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
             SELECT s.series_id, s.ts, 1000000 + i, s.value FROM n
             CROSS JOIN (SELECT * FROM READINGS ORDER BY series_id, ts LIMIT 1) AS s",
        "stored but not sent: the device has no frame with id 1000001",
    ),
    of(
        "a reading added, of a frame that exists",
        "INSERT INTO READINGS (series_id, ts, frame_id, value)
             SELECT series_id, ts + MICROSECOND, frame_id, value FROM READINGS
             WHERE frame_id = {one} ORDER BY series_id, ts LIMIT 1",
        "the frame has no reading at that time",
    ),
    of(
        "a reading added, of another device's frame",
        "INSERT INTO READINGS (series_id, ts, frame_id, value)
             SELECT series_id, ts, (SELECT max(id) FROM frames WHERE readings > 0 AND stream_id <>
                 (SELECT stream_id FROM frames WHERE id = {one})), value FROM READINGS
             WHERE frame_id = {one} ORDER BY series_id, ts LIMIT 1",
        "the device has no frame with id",
    ),
    of(
        "a value changed by one bit",
        "UPDATE READINGS SET value = value * 1.0000000000000002 WHERE frame_id = {one}",
        "differs from the value sent",
    ),
    of(
        "a value replaced by NULL",
        "UPDATE READINGS SET value = NULL WHERE frame_id = {one}",
        "no valid value differs from the value sent",
    ),
    of(
        "a time off by a microsecond",
        "UPDATE READINGS SET ts = ts + MICROSECOND WHERE frame_id = {one}",
        "the frame has no reading at that time",
    ),
    of(
        "all times a day off",
        "UPDATE READINGS SET ts = ts + DAY",
        "the frame has no reading at that time",
    ),
    of(
        "a frame's times and its clock offset a day off",
        "UPDATE READINGS SET ts = ts + DAY WHERE frame_id = {one};
         UPDATE frames SET clock_offset_us = clock_offset_us + 86400000000 WHERE id = {one}",
        "more than its clock can be off",
    ),
    of(
        "a series' times a day off",
        "UPDATE READINGS SET ts = ts + DAY WHERE series_id = (SELECT max(id) FROM series)",
        "the frame has no reading at that time",
    ),
    of(
        "readings moved to another series",
        "DELETE FROM READINGS WHERE frame_id = {one} AND series_id =
             (SELECT max(series_id) FROM READINGS WHERE frame_id = {one});
         UPDATE READINGS SET series_id = (SELECT max(id) FROM series WHERE device_id =
                 (SELECT device_id FROM series WHERE id = READINGS.series_id))
             WHERE frame_id = {one} AND series_id =
                 (SELECT min(series_id) FROM READINGS WHERE frame_id = {one})",
        "differs from the value sent",
    ),
    of(
        "readings moved to another device",
        "UPDATE READINGS SET series_id = (SELECT max(id) FROM series) WHERE series_id = (SELECT min(id) FROM series)",
        "readings were sent but not stored",
    ),
    of(
        "readings moved to another frame of the device",
        "UPDATE READINGS SET frame_id = (SELECT max(id) FROM frames WHERE readings > 0 AND stream_id =
             (SELECT stream_id FROM frames WHERE id = {one})) WHERE frame_id = {one}",
        "the frame has no reading at that time",
    ),
    of(
        "readings moved to a series that does not exist",
        "UPDATE READINGS SET series_id = 1000000 WHERE series_id = (SELECT min(id) FROM series)",
        "readings whose series does not exist",
    ),
    // Devices, streams, series, schemas.
    of(
        "a ghost device",
        "INSERT INTO devices (name, firmware) VALUES ('ghost', 'none')",
        "ghost: a device with 0 streams, 0 series and 0 readings: stored but not sent",
    ),
    of(
        "a ghost device from before the run",
        "INSERT INTO devices (name, first_seen_at) SELECT 'ghost', first_seen_at - DAY FROM devices LIMIT 1;
         INSERT INTO streams (device_id, stream, created_at, frames, readings, durable_seq)
             SELECT (SELECT max(id) FROM devices), 77, created_at - DAY, 1, 20, 1 FROM streams LIMIT 1",
        "ghost: a device with 1 streams, 0 series and 0 readings: stored but not sent",
    ),
    of(
        "a device with the fleet's prefix, but beyond its size",
        "INSERT INTO devices (name) VALUES ('sim-00077')",
        "sim-00077: a device",
    ),
    of(
        "a ghost device with readings",
        "INSERT INTO devices (name) VALUES ('ghost');
         INSERT INTO series (device_id, channel, unit, kind)
             SELECT id, 'temperature', 'Cel', 'f64' FROM devices WHERE name = 'ghost';
         INSERT INTO READINGS (series_id, ts, frame_id, value)
             SELECT (SELECT max(id) FROM series), ts, frame_id, value FROM READINGS
             WHERE series_id = (SELECT min(id) FROM series)",
        "ghost: a device with 0 streams, 1 series and",
    ),
    of(
        "a device renamed",
        "UPDATE devices SET name = 'sim-0000' WHERE name = 'sim-00000'",
        "sim-00000: not in the store",
    ),
    of(
        "two devices that swapped names",
        "UPDATE devices SET name = 'x' WHERE name = 'sim-00000';
         UPDATE devices SET name = 'sim-00000' WHERE name = 'sim-00001';
         UPDATE devices SET name = 'sim-00001' WHERE name = 'x'",
        "stored but not sent",
    ),
    of(
        "another firmware",
        "UPDATE devices SET firmware = 'x' WHERE name = 'sim-00000'",
        "firmware \"x\"",
    ),
    of(
        "a device disabled",
        "UPDATE devices SET enabled = 0 WHERE name = 'sim-00000'",
        "without an operator's change",
    ),
    of(
        "a device's key replaced",
        "UPDATE devices SET key_version = 1 WHERE name = 'sim-00000'",
        "without an operator's change",
    ),
    of(
        "a clock step that no device observed",
        "INSERT INTO clock_steps (timeline, origin_us, since_at, before_at, after_at, step_us)
             SELECT 7, 0, first_seen_at, first_seen_at, first_seen_at + DAY, 86400000000 FROM devices LIMIT 1",
        "clock step of 86400000000 us",
    ),
    of(
        "an empty stream",
        "INSERT INTO streams (device_id, stream, created_at) SELECT device_id, 77, (SELECT max(received_at) FROM frames)
             FROM streams ORDER BY id LIMIT 1",
        "stream 77 with ",
    ),
    of(
        "a stream under another number",
        "UPDATE streams SET stream = 77 WHERE id = (SELECT min(id) FROM streams)",
        "stream 77 with ",
    ),
    of(
        "durable_seq lowered",
        "UPDATE streams SET durable_seq = durable_seq - 1 WHERE id = (SELECT min(id) FROM streams)",
        "durable_seq 11, last frame 12",
    ),
    of(
        "durable_seq raised",
        "UPDATE streams SET durable_seq = durable_seq + 1 WHERE id = (SELECT min(id) FROM streams)",
        "durable_seq 13, last frame 12",
    ),
    of(
        "a stream's total of readings",
        "UPDATE streams SET readings = readings + 1 WHERE id = (SELECT min(id) FROM streams)",
        "stream totals are",
    ),
    of(
        "an empty series",
        "INSERT INTO series (device_id, channel, unit, kind)
             SELECT min(device_id), 'ghost', '', 'f64' FROM series",
        "series ghost [] f64 with 0 readings: stored but not sent",
    ),
    of(
        "a series with another unit",
        "UPDATE series SET unit = 'K' WHERE id = (SELECT min(id) FROM series)",
        "[K]",
    ),
    of(
        "a channel renamed",
        "UPDATE series SET channel = channel || 'x' WHERE id IN (SELECT min(id) FROM series)",
        "the series for that channel, unit and kind is missing",
    ),
    of(
        "a schema that was not declared",
        "INSERT INTO schemas (device_id, schema, hash, declaration)
             SELECT device_id, 7, hash, declaration FROM schemas ORDER BY device_id LIMIT 1",
        "schema 7: stored but not declared",
    ),
    of(
        "a schema with another kind",
        "UPDATE schemas SET declaration = replace(declaration, 'integer', 'f64')",
        "stored but not declared",
    ),
    // Frames.
    of(
        "the last frame deleted, and the durable number lowered",
        "DELETE FROM READINGS WHERE frame_id = (SELECT max(id) FROM frames WHERE stream_id = (SELECT min(id) FROM streams));
         UPDATE streams SET durable_seq = durable_seq - 1, frames = frames - 1, readings = readings - 20
             WHERE id = (SELECT min(id) FROM streams);
         DELETE FROM frames WHERE stream_id = (SELECT min(id) FROM streams) AND seq = 12",
        "frames 12 to 12 were acknowledged but are not stored",
    ),
    of(
        "a frame deleted, its readings kept",
        "DELETE FROM frames WHERE id = {one}",
        "expected",
    ),
    of(
        "a frame added",
        "INSERT INTO frames (id, stream_id, seq, type, received_at, readings, quality, clock_offset_us)
             SELECT 1000000, stream_id, 13, type, received_at, 0, quality, clock_offset_us FROM frames
             WHERE stream_id = (SELECT min(id) FROM streams) AND seq = 12",
        "frame 13 is stored but was not sent",
    ),
    of(
        "a frame without a stream",
        "INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
             SELECT 1000000, 1000000, 1, type, received_at, 0 FROM frames WHERE id = {one}",
        "1 frames without a stream",
    ),
    of(
        "a frame with another number",
        "UPDATE frames SET seq = 99 WHERE id = {one}",
        "expected",
    ),
    of(
        "two frames that swapped numbers",
        "UPDATE frames SET seq = 99 WHERE seq = 1 AND stream_id = (SELECT min(id) FROM streams);
         UPDATE frames SET seq = 1 WHERE seq = 2 AND stream_id = (SELECT min(id) FROM streams);
         UPDATE frames SET seq = 2 WHERE seq = 99 AND stream_id = (SELECT min(id) FROM streams)",
        "not sent",
    ),
    of(
        "a frame's type",
        "UPDATE frames SET type = 20 WHERE id = {one}",
        "has type 0x14",
    ),
    of(
        "a frame's number of readings",
        "UPDATE frames SET readings = readings + 1 WHERE id = {one}",
        "and 21 readings",
    ),
    of(
        "a frame's quality",
        "UPDATE frames SET quality = 2 WHERE id = {one}",
        "has quality Some(2)",
    ),
    of(
        "a frame's clock offset",
        "UPDATE frames SET clock_offset_us = clock_offset_us + 3600000000 WHERE id = {one}",
        "more than its clock can be off",
    ),
    of(
        "a frame received a day ago",
        "UPDATE frames SET received_at = received_at - DAY WHERE id = {one}",
        "outside the time it was sent",
    ),
    of(
        "a frame received tomorrow",
        "UPDATE frames SET received_at = received_at + DAY WHERE id = {one}",
        "outside the time it was sent",
    ),
    // Gaps and quarantine.
    of(
        "a gap added",
        "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
             SELECT stream_id, 2, 3, 0, received_at FROM frames WHERE id = {one}",
        "gap 2 to 3, reason 0: stored but not sent",
    ),
    of(
        "a frame replaced by a gap",
        "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
             SELECT stream_id, seq, seq, 0, received_at FROM frames WHERE id = {one};
         DELETE FROM READINGS WHERE frame_id = {one};
         UPDATE streams SET readings = readings - 20 WHERE id = (SELECT stream_id FROM frames WHERE id = {one});
         UPDATE frames SET type = 18, readings = 0, quality = NULL, clock_offset_us = NULL WHERE id = {one}",
        "were acknowledged but are not stored",
    ),
    of(
        "quarantine usage",
        "UPDATE quarantine_usage SET bytes = bytes - 1",
        "quarantine_usage is not the sum",
    ),
    of(
        "bytes of a quarantined frame",
        "UPDATE quarantine SET bytes = BYTES WHERE id = (SELECT min(id) FROM quarantine WHERE code <> 35)",
        "bytes differ from those sent",
    ),
    of(
        "bytes of a quarantined frame that was damaged in transit",
        "UPDATE quarantine SET bytes = BYTES WHERE id = (SELECT min(id) FROM quarantine WHERE code = 35)",
        "bytes differ from those sent",
    ),
    of(
        "a quarantined frame with another code",
        "UPDATE quarantine SET code = 33 WHERE id = (SELECT min(id) FROM quarantine WHERE code <> 35)",
        "is quarantined as Some(33)",
    ),
    of(
        "a readable frame quarantined as damaged",
        "INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail, bytes)
             SELECT q.device_id, f.stream_id, f.seq, f.received_at, q.peer, 35, q.detail, q.bytes
             FROM frames AS f JOIN streams AS s ON s.id = f.stream_id
             JOIN quarantine AS q ON q.device_id = s.device_id
             WHERE f.readings > 0 AND q.code = 35 ORDER BY f.id LIMIT 1",
        "bytes differ from those sent",
    ),
    of(
        "a quarantined frame deleted",
        "DELETE FROM quarantine WHERE id = (SELECT min(id) FROM quarantine WHERE code <> 35)",
        "is quarantined as None",
    ),
    of(
        "a quarantined frame added",
        "INSERT INTO quarantine (device_id, stream_id, seq, received_at, peer, code, detail, bytes)
             SELECT device_id, stream_id, 99, received_at, peer, code, detail, bytes FROM quarantine
             ORDER BY id LIMIT 1",
        "no such frame is stored",
    ),
    of(
        "a quarantined frame of another device",
        "UPDATE quarantine SET device_id = (SELECT max(id) FROM devices) WHERE id = (SELECT min(id) FROM quarantine WHERE device_id <> (SELECT max(id) FROM devices))",
        "whose device is not their stream's",
    ),
    of(
        "a quarantined frame from another address",
        "UPDATE quarantine SET peer = '192.0.2.1:9' WHERE id = (SELECT min(id) FROM quarantine)",
        "from \"192.0.2.1:9\", an address the device never used",
    ),
    of(
        "a quarantined frame with another time",
        "UPDATE quarantine SET received_at = received_at + MICROSECOND WHERE id = (SELECT min(id) FROM quarantine)",
        "receive time differs from that of the frame",
    ),
    // Clocks and events.
    of(
        "a clock an hour off",
        "UPDATE clocks SET offset_us = offset_us + 3600000000",
        "the device had no such clock",
    ),
    of(
        "a clock of another boot",
        "UPDATE clocks SET boot = boot + 1",
        "the device had no such clock",
    ),
    of(
        "an event's text",
        "UPDATE device_events SET detail = '192.0.2.1:9' WHERE id =
             (SELECT min(id) FROM device_events WHERE kind = 'connected')",
        " never ",
    ),
    of(
        "all events' texts",
        "UPDATE device_events SET detail = 'x' WHERE device_id =
             (SELECT min(device_id) FROM device_events)",
        "event connected from \"x\", an address the device never used",
    ),
    of(
        "a login added",
        "INSERT INTO device_events (device_id, at, kind, code, detail)
             SELECT device_id, at, kind, code, detail FROM device_events WHERE kind = 'connected'
             ORDER BY id LIMIT 1",
        "an address the device never used",
    ),
    of(
        "an event of a device that reports none",
        "INSERT INTO device_events (device_id, at, kind, level, code, detail, frame_id)
             SELECT device_id, at, 'event', 1, 7, 'valve stuck', {one} FROM device_events ORDER BY id LIMIT 1",
        "event event \"valve stuck\"",
    ),
    of(
        "an operator's change that never happened",
        "INSERT INTO device_events (device_id, at, kind, code, detail)
             SELECT device_id, at, 'disabled', 0, 'x' FROM device_events ORDER BY id LIMIT 1",
        "event disabled \"x\"",
    ),
    of(
        "an event of another day",
        "UPDATE device_events SET at = at + DAY WHERE kind = 'connected'",
        "event connected",
    ),
];

/// Falsifications that only SQLite allows: Postgres enforces foreign keys and types.
pub const SQLITE_ONLY: &[Falsification] = &[
    of(
        "a device deleted, its data kept",
        "DELETE FROM devices WHERE name = 'sim-00000'",
        "streams without a device",
    ),
    of(
        "a gap without a stream",
        "INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
             SELECT 1000000, 2, 3, 0, received_at FROM frames WHERE id = {one}",
        "1 gaps without a stream",
    ),
    of(
        "a value that is not a double",
        "UPDATE READINGS SET value = 5 WHERE frame_id = {one}",
        "not a double",
    ),
    of(
        "recent readings that are never compacted",
        "INSERT INTO readings_recent (series_id, frame_id, ts, samples)
             SELECT 1000000, {one}, 0, '{\"0\": 1.5}'",
        "recent readings whose series does not exist",
    ),
    of(
        "recent readings of a series",
        "INSERT INTO readings_recent (id, series_id, frame_id, ts, samples)
             SELECT 1000000000, min(series_id), {one}, 0, '{\"0\": 1.5}' FROM READINGS WHERE frame_id = {one}",
        "the frame has no reading at that time",
    ),
];

/// Falsifications that only Postgres allows: in SQLite a reading has a primary key.
pub const POSTGRES_ONLY: &[Falsification] = &[
    of(
        "a reading stored twice",
        "INSERT INTO readings SELECT * FROM readings WHERE frame_id = {one} ORDER BY series_id, ts LIMIT 1",
        "stored twice",
    ),
    of(
        "a reading stored twice, and another deleted",
        "INSERT INTO readings SELECT * FROM readings WHERE frame_id = {one} ORDER BY series_id, ts LIMIT 1;
         DELETE FROM readings WHERE (series_id, ts, frame_id) = (SELECT series_id, ts, frame_id FROM readings
             WHERE frame_id = {one} AND series_id = (SELECT min(series_id) FROM readings WHERE frame_id = {one}) ORDER BY ts DESC LIMIT 1)",
        "stored twice",
    ),
];

impl Falsification {
    /// Returns the statements for one kind of store.
    pub fn sql(&self, is_sqlite: bool) -> String {
        let words = match is_sqlite {
            true => [
                ("READINGS", "readings_sorted"),
                ("DAY", "86400000000"),
                ("MICROSECOND", "1"),
                (
                    "BYTES",
                    "CAST(substr(bytes, 1, length(bytes) - 1)
                        || CASE substr(bytes, -1) WHEN x'00' THEN x'01' ELSE x'00' END AS BLOB)",
                ),
            ],
            false => [
                ("READINGS", "readings"),
                ("DAY", "interval '1 day'"),
                ("MICROSECOND", "interval '1 microsecond'"),
                (
                    "BYTES",
                    "set_byte(bytes, length(bytes) - 1, get_byte(bytes, length(bytes) - 1) # 1)",
                ),
            ],
        };
        let words = words.into_iter();
        words.fold(self.sql.replace("{one}", ONE), |sql, (word, by)| {
            sql.replace(word, by)
        })
    }
}
