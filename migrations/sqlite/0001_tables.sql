-- Times are microseconds since 1970-01-01T00:00:00Z; ids are the gateway's own numbers.

CREATE TABLE devices (
    id            INTEGER PRIMARY KEY,
    name          TEXT    NOT NULL UNIQUE,
    enabled       INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    firmware      TEXT    NOT NULL,
    first_seen_at INTEGER NOT NULL,
    last_seen_at  INTEGER NOT NULL
) STRICT;

-- How far each outgoing queue of a device is stored. durable_seq moves in the transaction that stores
-- what it covers; frames and readings are totals moved along with it, so that nobody needs to count.
-- Rows stay for ever: a device may come back after years and must not store anything twice.
CREATE TABLE streams (
    id          INTEGER PRIMARY KEY,
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    stream      INTEGER NOT NULL,
    durable_seq INTEGER NOT NULL DEFAULT 0,
    frames      INTEGER NOT NULL DEFAULT 0,
    readings    INTEGER NOT NULL DEFAULT 0,
    created_at  INTEGER NOT NULL,
    UNIQUE (device_id, stream)
) STRICT;

-- What devices declared; immutable. declaration is a JSON array of {id, name, unit, kind, exp10}.
CREATE TABLE schemas (
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    schema      INTEGER NOT NULL,
    hash        BLOB    NOT NULL,
    declaration TEXT    NOT NULL,
    PRIMARY KEY (device_id, schema)
) STRICT, WITHOUT ROWID;

-- kind: 0 integer, 1 f32, 2 f64, 3 bool. A series outlives firmware that keeps channel, unit and kind.
CREATE TABLE series (
    id        INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL REFERENCES devices (id),
    channel   TEXT    NOT NULL,
    unit      TEXT    NOT NULL,
    kind      INTEGER NOT NULL,
    UNIQUE (device_id, channel, unit, kind)
) STRICT;

-- The ledger: one row for each number of a stream that was taken, quarantined ones included; a gap has
-- one row, under its last number. type is the wire's: 17 data, 18 gap, 19 result, 20 event.
-- quality: 0 utc, 1 anchored, 2 unanchored, 3 suspect; NULL where the frame has no time.
-- A reading's time on the device's own clock is readings.ts - clock_offset_us.
CREATE TABLE frames (
    id              INTEGER PRIMARY KEY,
    stream_id       INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    type            INTEGER NOT NULL,
    received_at     INTEGER NOT NULL,
    readings        INTEGER NOT NULL,
    quality         INTEGER,
    clock_offset_us INTEGER,
    UNIQUE (stream_id, seq)
) STRICT;

-- value is NULL where the device reported no valid value. Two readings with one time both stay: their
-- frames differ.
CREATE TABLE readings (
    series_id INTEGER NOT NULL,
    ts        INTEGER NOT NULL,
    frame_id  INTEGER NOT NULL,
    value     REAL,
    PRIMARY KEY (series_id, ts, frame_id)
) STRICT, WITHOUT ROWID;

-- What devices lost before it could be sent. reason: 0 overwritten, 1 queue damaged, 2 erased.
CREATE TABLE gaps (
    stream_id   INTEGER NOT NULL,
    from_seq    INTEGER NOT NULL,
    to_seq      INTEGER NOT NULL,
    reason      INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    PRIMARY KEY (stream_id, from_seq)
) STRICT, WITHOUT ROWID;

-- Frames that came whole and could not be understood, as they came.
CREATE TABLE quarantine (
    id          INTEGER PRIMARY KEY,
    device_id   INTEGER NOT NULL,
    stream_id   INTEGER NOT NULL,
    seq         INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    peer        TEXT    NOT NULL,
    code        INTEGER NOT NULL,
    detail      TEXT    NOT NULL,
    bytes       BLOB    NOT NULL,
    UNIQUE (stream_id, seq)
) STRICT;

-- kind: connected, disconnected (code is the BYE's), event (reported by the device; frame_id tells by
-- which frame, level is 0 debug to 4 critical).
CREATE TABLE device_events (
    id        INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    at        INTEGER NOT NULL,
    kind      TEXT    NOT NULL,
    level     INTEGER,
    code      INTEGER NOT NULL,
    detail    TEXT    NOT NULL,
    frame_id  INTEGER
) STRICT;
CREATE INDEX device_events_by_device ON device_events (device_id, at);

-- UTC = time since that boot + offset_us; off by at most half of delay_us.
CREATE TABLE clocks (
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    boot        INTEGER NOT NULL,
    offset_us   INTEGER NOT NULL,
    delay_us    INTEGER NOT NULL,
    measured_at INTEGER NOT NULL,
    PRIMARY KEY (device_id, boot)
) STRICT, WITHOUT ROWID;

-- Tells a Fieldgate database from any other SQLite file ("FGT1").
PRAGMA application_id = 1179079729;
