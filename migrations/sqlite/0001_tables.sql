-- The store of a Fieldgate gateway.
--
-- Times are integer microseconds since 1970-01-01T00:00:00Z; the views also show them as UTC text. A frame is
-- stored in the transaction that moves its stream's durable_seq, so the store contains exactly what was
-- acknowledged or is about to be.

-- "FGat": distinguishes a store from any other SQLite file before anything is written to it.
PRAGMA application_id = 1179083124;

-- Ids of devices, streams and series are never reused (AUTOINCREMENT), because gateways cache them.
CREATE TABLE devices (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    name          TEXT NOT NULL UNIQUE,
    enabled       INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    firmware      TEXT,
    first_seen_at INTEGER,
    last_seen_at  INTEGER,
    -- The device's key is derived from the fleet key, its name and key_version, which is 0 until the key is
    -- replaced. If sealed_key is not NULL, it holds an individual key instead, encrypted with a key derived
    -- from the fleet key.
    key_version   INTEGER NOT NULL DEFAULT 0,
    sealed_key    BLOB,
    -- Numbers of the last change by an operator (see device_revision) and of the change that set the key.
    revision      INTEGER NOT NULL DEFAULT 0,
    key_revision  INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX devices_by_revision ON devices (revision) WHERE revision > 0;

-- One row. Each change by an operator takes the next number; gateways poll for numbers above the last they saw.
CREATE TABLE device_revision (
    is_only INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    latest  INTEGER NOT NULL
) STRICT;
INSERT INTO device_revision (latest) VALUES (0);

-- Devices removed with `fieldgate device remove`, so that a gateway that has cached one finds the change. While
-- rows of a removed device remain, its row in `devices` has the name '#<id> <former name>', which is not a
-- valid device name.
CREATE TABLE removed_devices (
    device_id  INTEGER PRIMARY KEY,
    name       TEXT NOT NULL,
    revision   INTEGER NOT NULL,
    removed_at INTEGER NOT NULL
) STRICT;
CREATE INDEX removed_devices_by_revision ON removed_devices (revision);

-- At most one row: identifies the fleet key of the devices' derived keys. It is computed from the fleet key,
-- which cannot be recovered from it.
CREATE TABLE fleet_key (
    is_only     INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    fingerprint TEXT NOT NULL
) STRICT;

-- A device numbers its frames in a stream, and starts a new stream when it has lost its count.
CREATE TABLE streams (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    stream      INTEGER NOT NULL,
    durable_seq INTEGER NOT NULL DEFAULT 0,
    -- Running totals, moved together with durable_seq, so that no query has to count a large table.
    frames      INTEGER NOT NULL DEFAULT 0,
    readings    INTEGER NOT NULL DEFAULT 0,
    created_at  INTEGER NOT NULL,
    UNIQUE (device_id, stream)
) STRICT;

-- Schemas as devices declared them; never changed.
CREATE TABLE schemas (
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    schema      INTEGER NOT NULL,
    hash        BLOB NOT NULL,
    declaration TEXT NOT NULL,
    PRIMARY KEY (device_id, schema)
) STRICT, WITHOUT ROWID;

-- A series continues after a change of schema that keeps channel, unit and kind.
CREATE TABLE series (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id INTEGER NOT NULL REFERENCES devices (id),
    channel   TEXT NOT NULL,
    unit      TEXT NOT NULL,
    kind      TEXT NOT NULL,
    UNIQUE (device_id, channel, unit, kind)
) STRICT;

-- The ledger: one row for each stored numbered frame of any type; a gap has the number of its last frame. This
-- table and the tables of readings have no foreign keys, because they are on the hot path and only the gateway
-- writes them.
CREATE TABLE frames (
    id              INTEGER PRIMARY KEY,
    stream_id       INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    type            INTEGER NOT NULL,
    received_at     INTEGER NOT NULL,
    readings        INTEGER NOT NULL,
    -- How device time was converted to UTC: 0 utc, 1 anchored, 2 unanchored, 3 suspect; NULL for a frame
    -- without a time. readings.ts - clock_offset_us is the device's own time.
    quality         INTEGER,
    clock_offset_us INTEGER,
    -- Times of the first and the last reading of the frame, so that its readings are found by index. first_ts may be
    -- NULL if it equals last_ts: a frame with one reading then takes 8 bytes less.
    first_ts        INTEGER,
    last_ts         INTEGER,
    -- CRC-32C of the frame. A repeated number with a different checksum was assigned twice.
    crc             INTEGER,
    UNIQUE (stream_id, seq)
) STRICT;

-- Frames that the device lost before it could send them, or that the store lost (reason 254), from_seq to
-- to_seq inclusive.
CREATE TABLE gaps (
    stream_id   INTEGER NOT NULL REFERENCES streams (id),
    from_seq    INTEGER NOT NULL,
    to_seq      INTEGER NOT NULL,
    reason      INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    PRIMARY KEY (stream_id, from_seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX gaps_by_time ON gaps (received_at);

-- Intact frames that could not be decoded.
CREATE TABLE quarantine (
    id          INTEGER PRIMARY KEY,
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    stream_id   INTEGER NOT NULL REFERENCES streams (id),
    seq         INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    peer        TEXT NOT NULL,
    code        INTEGER NOT NULL,
    detail      TEXT NOT NULL,
    bytes       BLOB NOT NULL,
    UNIQUE (stream_id, seq)
) STRICT;
CREATE INDEX quarantine_by_device ON quarantine (device_id);

-- Bytes of a device's frames in quarantine, for devices that have any. Triggers keep it equal to the sum.
CREATE TABLE quarantine_usage (
    device_id INTEGER PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
    bytes     INTEGER NOT NULL
) STRICT;
CREATE TRIGGER quarantine_inserted AFTER INSERT ON quarantine BEGIN
    INSERT INTO quarantine_usage (device_id, bytes) VALUES (new.device_id, length(new.bytes))
    ON CONFLICT (device_id) DO UPDATE SET bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER quarantine_deleted AFTER DELETE ON quarantine BEGIN
    UPDATE quarantine_usage SET bytes = bytes - length(old.bytes) WHERE device_id = old.device_id;
    DELETE FROM quarantine_usage WHERE device_id = old.device_id AND bytes = 0;
END;

-- kind: connected, disconnected (code is the BYE code of the reason), refused (authentication failed, or the
-- device may not connect; code is the BYE code), added, enabled, disabled, key_changed (by an operator), event
-- (level and code are the device's own, frame_id is the frame that carried it), number_reused (a number was
-- reused with different content), presence (detail has the states before and after), twin (two devices use one
-- name), interval_set (by an operator). session is the number of the session that began or ended.
CREATE TABLE device_events (
    id        INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL REFERENCES devices (id),
    at        INTEGER NOT NULL,
    kind      TEXT NOT NULL CHECK (kind IN ('connected', 'disconnected', 'refused', 'added', 'enabled',
        'disabled', 'key_changed', 'event', 'number_reused', 'presence', 'twin', 'interval_set')),
    level     INTEGER,
    code      INTEGER NOT NULL,
    detail    TEXT NOT NULL,
    frame_id  INTEGER,
    session   INTEGER
) STRICT;
CREATE INDEX device_events_by_device ON device_events (device_id, at);
-- For presence: the end of the last session, however many events the device reported since.
CREATE INDEX device_events_of_ends ON device_events (device_id, at) WHERE kind = 'disconnected';
-- For pruning, which keeps events that devices reported and changes by operators.
CREATE INDEX device_events_of_sessions ON device_events (device_id, id)
    WHERE kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin');

-- Refusals before a session began: by address, claimed name ('' if none) and BYE code (0 if none was sent). The
-- latest 1,000 are kept.
CREATE TABLE refusals (
    id       INTEGER PRIMARY KEY,
    peer     TEXT NOT NULL,
    device   TEXT NOT NULL,
    code     INTEGER NOT NULL,
    reason   TEXT NOT NULL,
    count    INTEGER NOT NULL,
    first_at INTEGER NOT NULL,
    last_at  INTEGER NOT NULL,
    UNIQUE (peer, device, code)
) STRICT;

-- One row for each open session: its device, gateway and address. A gateway that starts closes the sessions
-- that its last run left open. `gateway` is the content of the file gateway.id in its data directory; it is
-- empty if there is only one gateway.
CREATE TABLE sessions (
    id           INTEGER PRIMARY KEY,
    device_id    INTEGER NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
    gateway      TEXT NOT NULL,
    peer         TEXT NOT NULL,
    connected_at INTEGER NOT NULL
) STRICT;
CREATE INDEX sessions_by_device ON sessions (device_id);

-- A boot's clock: UTC is device time since boot + offset_us, with an error of at most half of delay_us when it
-- was measured. A delay_us of 9223372036854775807 means that the clock was not measured but chosen (SPEC R74).
-- timeline and origin_us describe the gateway's clock at that moment: origin_us is measured_at minus the time
-- since the machine started. If they are older than the newest row of `clock_steps`, the steps since then must
-- be added to offset_us. Times since boot below valid_from_us are from before a counter of the device wrapped,
-- or from an earlier boot with the same number.
CREATE TABLE clocks (
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    boot        INTEGER NOT NULL,
    offset_us   INTEGER NOT NULL,
    delay_us    INTEGER NOT NULL,
    measured_at INTEGER NOT NULL,
    timeline INTEGER NOT NULL DEFAULT 0,
    origin_us INTEGER NOT NULL DEFAULT 0,
    valid_from_us INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device_id, boot)
) STRICT, WITHOUT ROWID;
CREATE INDEX clocks_by_time ON clocks (device_id, measured_at);

-- Steps of a gateway's system clock by a tenth of a second or more. The clock was stepped by step_us (back if
-- negative) from before_at to after_at. Data received between since_at and before_at has times of the clock before
-- the step. After a step back, the same range also holds data received by the new clock until it reached before_at
-- again (docs/sql.md has SQL for both). timeline differs for each start of a machine; origin_us is UTC at that
-- start, by the clock after the step.
CREATE TABLE clock_steps (
    id        INTEGER PRIMARY KEY,
    timeline  INTEGER NOT NULL,
    origin_us INTEGER NOT NULL,
    since_at  INTEGER NOT NULL,
    before_at INTEGER NOT NULL,
    after_at  INTEGER NOT NULL,
    step_us   INTEGER NOT NULL,
    UNIQUE (timeline, origin_us)
) STRICT;

-- One row: a random mark, generated when the file is created; the mark of the gateway that uses it; and a count
-- of its transactions. With these a gateway detects that the content was restored to an earlier state while it
-- was running. last_removed is the highest id of a frame that an operator removed: ids are never reused, because
-- they are the cursor of the feed.
CREATE TABLE store_identity (
    is_only      INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    mark         TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    owner        TEXT NOT NULL DEFAULT '',
    transactions INTEGER NOT NULL DEFAULT 0,
    last_removed INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO store_identity DEFAULT VALUES;
