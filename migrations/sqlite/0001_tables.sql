-- The store of a Fieldgate gateway.
--
-- Times are integer microseconds since 1970-01-01T00:00:00Z; the views show them as UTC text as well.
-- A frame is stored in one transaction with the move of its stream's durable_seq: what is in here
-- is exactly what was acknowledged, or is about to be.

-- "FGat": tells a store from any other SQLite file before anything is written to it.
PRAGMA application_id = 1179083124;

-- Ids of devices, streams and series are not given out again (AUTOINCREMENT): a gateway knows them by heart.
CREATE TABLE devices (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    name          TEXT NOT NULL UNIQUE,
    enabled       INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    firmware      TEXT,
    first_seen_at INTEGER,
    last_seen_at  INTEGER,
    -- The device's key is derived from the fleet key, its name and key_version, which is 0 until the key is
    -- replaced; or it is the device's own, stored here encrypted under a key derived from the fleet key.
    key_version   INTEGER NOT NULL DEFAULT 0,
    sealed_key    BLOB,
    -- The number of the last change by an operator (see device_revision), and of the one that set the key.
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

-- Devices that `fieldgate device remove` took out: a gateway that knows one finds the change here. While rows of one
-- are left, its row in `devices` is named '#', its id, a space and its former name, which no device can have.
CREATE TABLE removed_devices (
    device_id  INTEGER PRIMARY KEY,
    name       TEXT NOT NULL,
    revision   INTEGER NOT NULL,
    removed_at INTEGER NOT NULL
) STRICT;
CREATE INDEX removed_devices_by_revision ON removed_devices (revision);

-- At most one row: which fleet key the devices' keys derive from. It is derived from the key itself, which
-- cannot be had from it.
CREATE TABLE fleet_key (
    is_only     INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    fingerprint TEXT NOT NULL
) STRICT;

-- A device numbers its frames in a stream, and starts a new stream when it has lost count.
CREATE TABLE streams (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    stream      INTEGER NOT NULL,
    durable_seq INTEGER NOT NULL DEFAULT 0,
    -- Running totals, moved together with durable_seq: no query has to count a large table.
    frames      INTEGER NOT NULL DEFAULT 0,
    readings    INTEGER NOT NULL DEFAULT 0,
    created_at  INTEGER NOT NULL,
    UNIQUE (device_id, stream)
) STRICT;

-- What a device declared, as it declared it; never changed.
CREATE TABLE schemas (
    device_id   INTEGER NOT NULL REFERENCES devices (id),
    schema      INTEGER NOT NULL,
    hash        BLOB NOT NULL,
    declaration TEXT NOT NULL,
    PRIMARY KEY (device_id, schema)
) STRICT, WITHOUT ROWID;

-- Outlives a change of schema that keeps channel, unit and kind.
CREATE TABLE series (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id INTEGER NOT NULL REFERENCES devices (id),
    channel   TEXT NOT NULL,
    unit      TEXT NOT NULL,
    kind      TEXT NOT NULL,
    UNIQUE (device_id, channel, unit, kind)
) STRICT;

-- The ledger: one row for each numbered frame that was stored, of whatever type; a gap has the
-- number of its last frame. No foreign keys here and in the tables of readings: this is the hot path, and only
-- the gateway writes it.
CREATE TABLE frames (
    id              INTEGER PRIMARY KEY,
    stream_id       INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    type            INTEGER NOT NULL,
    received_at     INTEGER NOT NULL,
    readings        INTEGER NOT NULL,
    -- How device time became UTC: 0 utc, 1 anchored, 2 unanchored, 3 suspect; NULL for a frame that
    -- carries no time. readings.ts - clock_offset_us is the device's own time.
    quality         INTEGER,
    clock_offset_us INTEGER,
    -- CRC-32C of the frame: a number that comes again with another one was given out twice.
    crc             INTEGER,
    UNIQUE (stream_id, seq)
) STRICT;

-- Frames that the device lost before it could send them, from_seq to to_seq inclusive.
CREATE TABLE gaps (
    stream_id   INTEGER NOT NULL REFERENCES streams (id),
    from_seq    INTEGER NOT NULL,
    to_seq      INTEGER NOT NULL,
    reason      INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    PRIMARY KEY (stream_id, from_seq)
) STRICT, WITHOUT ROWID;

-- Frames that arrived whole and could not be understood.
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

-- kind: connected, disconnected (code is the BYE code of the reason), refused (a proof of identity failed, or the
-- device may not connect; code is the BYE code), added, enabled, disabled, key_changed (by an operator), event
-- (level and code are the device's own, frame_id is the frame that carried it), number_reused (a number came
-- again with other content). session is
-- the number of the session that began or ended.
CREATE TABLE device_events (
    id        INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL REFERENCES devices (id),
    at        INTEGER NOT NULL,
    kind      TEXT NOT NULL CHECK (kind IN ('connected', 'disconnected', 'refused', 'added', 'enabled',
        'disabled', 'key_changed', 'event', 'number_reused')),
    level     INTEGER,
    code      INTEGER NOT NULL,
    detail    TEXT NOT NULL,
    frame_id  INTEGER,
    session   INTEGER
) STRICT;
CREATE INDEX device_events_by_device ON device_events (device_id, at);
-- For pruning, which leaves what devices reported and what operators did.
CREATE INDEX device_events_of_sessions ON device_events (device_id, id)
    WHERE kind IN ('connected', 'disconnected', 'refused');

-- Who was refused before a session began: by address, the name that was claimed ('' if none was) and the BYE code
-- (0 where none was said). The 1,000 that were refused last.
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

-- One row for each session that is open: whose it is, in which gateway, and from which address. A gateway
-- that starts closes what its last run has left open. `gateway` is what stands in the file gateway.id of its
-- data directory; it is empty where there is only one gateway.
CREATE TABLE sessions (
    id           INTEGER PRIMARY KEY,
    device_id    INTEGER NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
    gateway      TEXT NOT NULL,
    peer         TEXT NOT NULL,
    connected_at INTEGER NOT NULL
) STRICT;
CREATE INDEX sessions_by_device ON sessions (device_id);

-- A boot's clock against UTC, which is device time since boot + offset_us, off by half of delay_us
-- at most when it was measured. A delay_us of 9223372036854775807 says that it was not measured but
-- chosen (SPEC R74). timeline and origin_us are the gateway's clock at that moment: measured_at less
-- the time since that start of the machine. When they lie behind the newest row of `clock_steps`, what
-- was set since then has to be added to offset_us. Times since boot below valid_from_us are from before
-- a counter of the device wrapped, or from an earlier boot of the same number.
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

-- Each time the system clock of a gateway was set by a tenth of a second or more: it was set forward by
-- step_us (back if that is negative) when it showed before_at, and showed after_at then. What was received
-- between since_at and before_at was received by the clock as it stood before; after a step back, the same
-- range also holds what the new clock received until it showed before_at again (README has SQL for both).
-- timeline differs for each start of a machine; origin_us is UTC at that start, by the clock as it stands since.
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

-- One row: a random mark, drawn when the file is made; one of the gateway that uses it; and a count of its
-- transactions: by these a gateway sees that the content was put back to an earlier state under it.
CREATE TABLE store_identity (
    is_only      INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    mark         TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    owner        TEXT NOT NULL DEFAULT '',
    transactions INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO store_identity DEFAULT VALUES;
