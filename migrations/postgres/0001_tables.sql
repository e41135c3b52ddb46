-- The store of Fieldgate gateways, any number of them.
--
-- The same tables as in SQLite; times are timestamptz here. A frame is stored in one transaction with
-- the move of its stream's durable_seq: what is in here is exactly what was acknowledged, or is about
-- to be.

CREATE TABLE devices (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name          text NOT NULL UNIQUE,
    -- A number, not a boolean, so that a query is written alike for both stores.
    enabled       integer NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    firmware      text,
    first_seen_at timestamptz,
    last_seen_at  timestamptz,
    -- The device's key is derived from the fleet key, its name and key_version, which is 0 until the key is
    -- replaced; or it is the device's own, stored here encrypted under a key derived from the fleet key.
    key_version   bigint NOT NULL DEFAULT 0,
    sealed_key    bytea,
    -- The number of the last change by an operator (see device_revision), and of the one that set the key.
    revision      bigint NOT NULL DEFAULT 0,
    key_revision  bigint NOT NULL DEFAULT 0
);
CREATE INDEX devices_by_revision ON devices (revision) WHERE revision > 0;

-- One row. Each change by an operator takes the next number; gateways poll for numbers above the last they saw.
-- A row and not a sequence: a change holds it until it commits, so that numbers become visible in order.
CREATE TABLE device_revision (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    latest  bigint NOT NULL
);
INSERT INTO device_revision (latest) VALUES (0);

-- Devices that `fieldgate device remove` took out: a gateway that knows one finds the change here. While rows of one
-- are left, its row in `devices` is named '#', its id, a space and its former name, which no device can have.
CREATE TABLE removed_devices (
    device_id  bigint PRIMARY KEY,
    name       text NOT NULL,
    revision   bigint NOT NULL,
    removed_at timestamptz NOT NULL
);
CREATE INDEX removed_devices_by_revision ON removed_devices (revision);

-- At most one row: which fleet key the devices' keys derive from. It is derived from the key itself, which
-- cannot be had from it.
CREATE TABLE fleet_key (
    is_only     boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    fingerprint text NOT NULL
);

-- A device numbers its frames in a stream, and starts a new stream when it has lost count. Its row is
-- what two gateways lock: whoever stores frames of a stream holds it until they are committed. Every
-- commit updates it, so pages keep room for the new version beside the old one.
CREATE TABLE streams (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id   bigint NOT NULL REFERENCES devices (id),
    stream      bigint NOT NULL,
    durable_seq bigint NOT NULL DEFAULT 0,
    -- Running totals, moved together with durable_seq: no query has to count a large table.
    frames      bigint NOT NULL DEFAULT 0,
    readings    bigint NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL,
    UNIQUE (device_id, stream)
) WITH (fillfactor = 50);

-- What a device declared, as it declared it; never changed.
CREATE TABLE schemas (
    device_id   bigint NOT NULL REFERENCES devices (id),
    schema      integer NOT NULL,
    hash        bytea NOT NULL,
    declaration text NOT NULL,
    PRIMARY KEY (device_id, schema)
);

-- Outlives a change of schema that keeps channel, unit and kind.
CREATE TABLE series (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id bigint NOT NULL REFERENCES devices (id),
    channel   text NOT NULL,
    unit      text NOT NULL,
    kind      text NOT NULL,
    UNIQUE (device_id, channel, unit, kind)
);

-- A writer takes the ids of its frames from here, 1024 at a time: n stands for n * 1024 and the 1023
-- numbers after it.
CREATE SEQUENCE frame_id_blocks;

-- The ledger: one row for each numbered frame that was stored, of whatever type; a gap has the
-- number of its last frame. No foreign keys here and in `readings`: this is the hot path, and only
-- the gateway writes it.
CREATE TABLE frames (
    id              bigint PRIMARY KEY,
    stream_id       bigint NOT NULL,
    seq             bigint NOT NULL,
    type            smallint NOT NULL,
    received_at     timestamptz NOT NULL,
    readings        integer NOT NULL,
    -- How device time became UTC: 0 utc, 1 anchored, 2 unanchored, 3 suspect; NULL for a frame that
    -- carries no time. readings.ts less clock_offset_us is the device's own time.
    quality         smallint,
    clock_offset_us bigint,
    -- CRC-32C of the frame: a number that comes again with another one was given out twice.
    crc             bigint,
    UNIQUE (stream_id, seq)
);

-- One partition for each UTC month of this year and the last, and for each year before, made by the gateway; times
-- far off the present are in `readings_default`. `frame_id` keeps two readings of one instant apart. `value` is NULL where the
-- device said: sampled, no valid value.
--
-- The gateway looks whether this table is partitioned, and makes partitions only then. So another
-- scheme may hold it, such as a hypertable of TimescaleDB, as long as the columns stay.
CREATE TABLE readings (
    series_id bigint NOT NULL,
    ts        timestamptz NOT NULL,
    frame_id  bigint NOT NULL,
    value     double precision
) PARTITION BY RANGE (ts);
CREATE INDEX readings_by_series ON readings (series_id, ts);
-- For "all devices, last five minutes": readings of one time lie close together, in the order in which
-- they came. A few kilobytes for millions of rows.
CREATE INDEX readings_by_time ON readings USING brin (ts) WITH (pages_per_range = 32, autosummarize = on);
CREATE TABLE readings_default PARTITION OF readings DEFAULT;

-- Hours that hold readings, each as its begin: `telemetry_hourly` finds its readings by them. A commit adds
-- the hours of its readings that are missing here. A row that no reading belongs to does no harm.
CREATE TABLE reading_hours (
    hour timestamptz PRIMARY KEY
);

-- Of each series the time of its first reading and the newest plausible reading (see the view `latest`). Written
-- with the readings, or a second or two later by a busy gateway; so `latest` looks into no partition.
CREATE TABLE newest (
    series_id bigint PRIMARY KEY,
    first_ts  timestamptz NOT NULL,
    ts        timestamptz,
    frame_id  bigint,
    value     double precision
) WITH (fillfactor = 50);

-- Frames that the device lost before it could send them, from_seq to to_seq inclusive.
CREATE TABLE gaps (
    stream_id   bigint NOT NULL REFERENCES streams (id),
    from_seq    bigint NOT NULL,
    to_seq      bigint NOT NULL,
    reason      smallint NOT NULL,
    received_at timestamptz NOT NULL,
    PRIMARY KEY (stream_id, from_seq)
);

-- Frames that arrived whole and could not be understood.
CREATE TABLE quarantine (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id   bigint NOT NULL REFERENCES devices (id),
    stream_id   bigint NOT NULL REFERENCES streams (id),
    seq         bigint NOT NULL,
    received_at timestamptz NOT NULL,
    peer        text NOT NULL,
    code        smallint NOT NULL,
    detail      text NOT NULL,
    bytes       bytea NOT NULL,
    UNIQUE (stream_id, seq)
);
CREATE INDEX quarantine_by_device ON quarantine (device_id, id);

-- kind: connected, disconnected (code is the BYE code of the reason), refused (a proof of identity failed, or the
-- device may not connect; code is the BYE code), added, enabled, disabled, key_changed (by an operator), event
-- (level and code are the device's own, frame_id is the frame that carried it), number_reused (a number came
-- again with other content). session is the number of the session that began or ended.
CREATE TABLE device_events (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id bigint NOT NULL REFERENCES devices (id),
    at        timestamptz NOT NULL,
    kind      text NOT NULL CHECK (kind IN ('connected', 'disconnected', 'refused', 'added', 'enabled',
        'disabled', 'key_changed', 'event', 'number_reused')),
    level     smallint,
    code      integer NOT NULL,
    detail    text NOT NULL,
    frame_id  bigint,
    session   bigint
);
CREATE INDEX device_events_by_device ON device_events (device_id, at);
-- For pruning, which leaves what devices reported and what operators did.
CREATE INDEX device_events_of_sessions ON device_events (device_id, id)
    WHERE kind IN ('connected', 'disconnected', 'refused');

-- Who was refused before a session began: by address, the name that was claimed ('' if none was) and the BYE code
-- (0 where none was said). The 1,000 that were refused last.
CREATE TABLE refusals (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    peer     text NOT NULL,
    device   text NOT NULL,
    code     smallint NOT NULL,
    reason   text NOT NULL,
    count    bigint NOT NULL,
    first_at timestamptz NOT NULL,
    last_at  timestamptz NOT NULL,
    UNIQUE (peer, device, code)
);

-- One row for each session that is open: whose it is, in which gateway, and from which address. A gateway
-- that starts closes what its last run has left open. `gateway` is what stands in the file gateway.id of its
-- data directory; it is empty where there is only one gateway.
CREATE TABLE sessions (
    id           bigint PRIMARY KEY,
    device_id    bigint NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
    gateway      text NOT NULL,
    peer         text NOT NULL,
    connected_at timestamptz NOT NULL
);
CREATE INDEX sessions_by_device ON sessions (device_id);

-- A boot's clock against UTC, which is device time since boot + offset_us, off by half of delay_us
-- at most when it was measured. A delay_us of 9223372036854775807 says that it was not measured but
-- chosen (SPEC R74). timeline and origin_us are the gateway's clock at that moment: measured_at less
-- the time since that start of the machine. When they lie behind the newest row of `clock_steps`, what
-- was set since then has to be added to offset_us. Times since boot below valid_from_us are from before
-- a counter of the device wrapped, or from an earlier boot of the same number.
CREATE TABLE clocks (
    device_id   bigint NOT NULL REFERENCES devices (id),
    boot        bigint NOT NULL,
    offset_us   bigint NOT NULL,
    delay_us    bigint NOT NULL,
    measured_at timestamptz NOT NULL,
    timeline bigint NOT NULL DEFAULT 0,
    origin_us bigint NOT NULL DEFAULT 0,
    valid_from_us bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (device_id, boot)
);
CREATE INDEX clocks_by_time ON clocks (device_id, measured_at);

-- Each time the system clock of a gateway was set by a tenth of a second or more: it was set forward by
-- step_us (back if that is negative) when it showed before_at, and showed after_at then. What was received
-- between since_at and before_at was received by the clock as it stood before; after a step back, the same
-- range also holds what the new clock received until it showed before_at again (README has SQL for both).
-- timeline differs for each start of a machine; origin_us is UTC at that start, by the clock as it stands since.
CREATE TABLE clock_steps (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    timeline  bigint NOT NULL,
    origin_us bigint NOT NULL,
    since_at  timestamptz NOT NULL,
    before_at timestamptz NOT NULL,
    after_at  timestamptz NOT NULL,
    step_us   bigint NOT NULL,
    UNIQUE (timeline, origin_us)
);

-- At most one row: the gateway that acknowledges from its own spool. While it is here, no other
-- gateway writes to this database, for only that one knows what it has acknowledged.
CREATE TABLE spool (
    is_only       boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    id            text NOT NULL,
    host          text NOT NULL,
    -- Drawn by each gateway that begins with the spool, with the connection of its that was last seen: of
    -- copies of one spool, only one may feed this database.
    instance      text NOT NULL DEFAULT '',
    backend_pid   integer,
    backend_start timestamptz,
    -- How many commits of the spool's content it has forgotten since.
    drained       bigint NOT NULL DEFAULT 0,
    registered_at timestamptz NOT NULL DEFAULT now()
);

-- One row: a random mark, drawn when the store is made and whenever a gateway finds that the store was put
-- back to an earlier state.
CREATE TABLE store_identity (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    mark    text NOT NULL DEFAULT gen_random_uuid()::text
);
INSERT INTO store_identity DEFAULT VALUES;

-- One row for each connection of a gateway that writes: how many transactions of it are in here, moved in
-- each of them. A gateway that remembers more has to do with a database that was put back to an earlier
-- state, and with it the ids of devices, streams and series. Rows of gateways that are gone are deleted
-- later.
CREATE TABLE store_writers (
    id           text PRIMARY KEY,
    commits      bigint NOT NULL,
    committed_at timestamptz NOT NULL
) WITH (fillfactor = 50);
