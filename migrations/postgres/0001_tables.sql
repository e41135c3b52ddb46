-- The store of any number of Fieldgate gateways.
--
-- The same tables as in SQLite, with timestamptz for times. A frame is stored in the transaction that moves its
-- stream's durable_seq, so the store contains exactly what was acknowledged or is about to be.

CREATE TABLE devices (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name          text NOT NULL UNIQUE,
    -- A number instead of a boolean, so that a query has the same syntax for both stores.
    enabled       integer NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    firmware      text,
    first_seen_at timestamptz,
    last_seen_at  timestamptz,
    -- The device's key is derived from the fleet key, its name and key_version, which is 0 until the key is
    -- replaced. If sealed_key is not NULL, it holds an individual key instead, encrypted with a key derived
    -- from the fleet key.
    key_version   bigint NOT NULL DEFAULT 0,
    sealed_key    bytea,
    -- Numbers of the last change by an operator (see device_revision) and of the change that set the key.
    revision      bigint NOT NULL DEFAULT 0,
    key_revision  bigint NOT NULL DEFAULT 0
);
CREATE INDEX devices_by_revision ON devices (revision) WHERE revision > 0;

-- One row. Each change by an operator takes the next number; gateways poll for numbers above the last they saw.
-- It is a row, not a sequence, because a change locks it until it commits, so that numbers become visible in
-- order.
CREATE TABLE device_revision (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    latest  bigint NOT NULL
);
INSERT INTO device_revision (latest) VALUES (0);

-- Devices removed with `fieldgate device remove`, so that a gateway that has cached one finds the change. While
-- rows of a removed device remain, its row in `devices` has the name '#<id> <former name>', which is not a
-- valid device name.
CREATE TABLE removed_devices (
    device_id  bigint PRIMARY KEY,
    name       text NOT NULL,
    revision   bigint NOT NULL,
    removed_at timestamptz NOT NULL
);
CREATE INDEX removed_devices_by_revision ON removed_devices (revision);

-- At most one row: identifies the fleet key of the devices' derived keys. It is computed from the fleet key,
-- which cannot be recovered from it.
CREATE TABLE fleet_key (
    is_only     boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    fingerprint text NOT NULL
);

-- A device numbers its frames in a stream, and starts a new stream when it has lost its count. Gateways lock
-- this row: a transaction that stores frames of a stream holds it until it commits. Every commit updates it, so
-- pages reserve space for the new version next to the old one.
CREATE TABLE streams (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id   bigint NOT NULL REFERENCES devices (id),
    stream      bigint NOT NULL,
    durable_seq bigint NOT NULL DEFAULT 0,
    -- Running totals, moved together with durable_seq, so that no query has to count a large table.
    frames      bigint NOT NULL DEFAULT 0,
    readings    bigint NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL,
    UNIQUE (device_id, stream)
) WITH (fillfactor = 50);

-- Schemas as devices declared them; never changed.
CREATE TABLE schemas (
    device_id   bigint NOT NULL REFERENCES devices (id),
    schema      integer NOT NULL,
    hash        bytea NOT NULL,
    declaration text NOT NULL,
    PRIMARY KEY (device_id, schema)
);

-- A series continues after a change of schema that keeps channel, unit and kind.
CREATE TABLE series (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id bigint NOT NULL REFERENCES devices (id),
    channel   text NOT NULL,
    unit      text NOT NULL,
    kind      text NOT NULL,
    UNIQUE (device_id, channel, unit, kind)
);

-- A transaction takes frame ids from here, 1024 at a time: the value n is the block of n * 1024 and the 1023
-- numbers after it. It takes them with take_frame_id_blocks.
CREATE SEQUENCE frame_id_blocks;

-- Takes blocks for the current transaction. Until the transaction ends, its advisory lock shows every reader a
-- block lower than all those that it took: the previous value of the sequence. Other keys have other upper 16
-- bits.
CREATE FUNCTION take_frame_id_blocks(blocks bigint) RETURNS SETOF bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(
        (17991::bigint << 48) | (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM frame_id_blocks));
    RETURN QUERY SELECT nextval('frame_id_blocks') FROM generate_series(1, blocks);
END $$;

-- Returns an id up to which no new frame will appear: each id up to it that was ever taken is committed and
-- visible to the next statement, or will never be used. The sequence is read before the locks: a transaction that
-- took an id by then has its lock, or has ended. Locks are released after a commit has become visible.
CREATE FUNCTION settled_frame_id() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    taken bigint;
    in_flight bigint;
BEGIN
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END INTO taken FROM frame_id_blocks;
    SELECT min(((classid::bigint & 65535) << 32) | objid::bigint) INTO in_flight
    FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND classid::bigint >> 16 = 17991
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    RETURN (least(taken, in_flight) + 1) * 1024 - 1;
END $$;

-- The ledger: one row for each stored numbered frame of any type; a gap has the number of its last frame. This
-- table and `readings` have no foreign keys, because they are on the hot path and only the gateway writes them.
CREATE TABLE frames (
    id              bigint PRIMARY KEY,
    stream_id       bigint NOT NULL,
    seq             bigint NOT NULL,
    type            smallint NOT NULL,
    received_at     timestamptz NOT NULL,
    readings        integer NOT NULL,
    -- How device time was converted to UTC: 0 utc, 1 anchored, 2 unanchored, 3 suspect; NULL for a frame
    -- without a time. readings.ts minus clock_offset_us is the device's own time.
    quality         smallint,
    clock_offset_us bigint,
    -- Times of the first and the last reading of the frame, so that its readings are found by index.
    first_ts        timestamptz,
    last_ts         timestamptz,
    -- CRC-32C of the frame. A repeated number with a different checksum was assigned twice.
    crc             bigint,
    UNIQUE (stream_id, seq)
);

-- One partition for each UTC month of this year and the last, and for each year before, created by the gateway;
-- times far from the present are in `readings_default`. `frame_id` distinguishes two readings of the same time.
-- `value` is NULL if the device sent "sampled, no valid value".
--
-- The gateway creates partitions only if this table is partitioned. The table may therefore use another scheme,
-- such as a hypertable of TimescaleDB, as long as the columns stay.
CREATE TABLE readings (
    series_id bigint NOT NULL,
    ts        timestamptz NOT NULL,
    frame_id  bigint NOT NULL,
    value     double precision
) PARTITION BY RANGE (ts);
CREATE INDEX readings_by_series ON readings (series_id, ts);
-- For "all devices, last five minutes": rows are in order of arrival, so readings of one time are close
-- together. The index takes a few kilobytes for millions of rows.
CREATE INDEX readings_by_time ON readings USING brin (ts) WITH (pages_per_range = 32, autosummarize = on);
CREATE TABLE readings_default PARTITION OF readings DEFAULT;

-- Hours that contain readings, by start time; `telemetry_hourly` uses them to find its readings. A commit adds
-- the missing hours of its readings. A row without readings is harmless.
CREATE TABLE reading_hours (
    hour timestamptz PRIMARY KEY
);

-- For each series, the time of its first reading and its newest plausible reading (see the view `latest`).
-- Written with the readings, or a second or two later by a busy gateway, so that `latest` reads no partition.
CREATE TABLE newest (
    series_id bigint PRIMARY KEY,
    first_ts  timestamptz NOT NULL,
    ts        timestamptz,
    frame_id  bigint,
    value     double precision
) WITH (fillfactor = 50);

-- Frames that the device lost before it could send them, or that the store lost (reason 254), from_seq to
-- to_seq inclusive.
CREATE TABLE gaps (
    stream_id   bigint NOT NULL REFERENCES streams (id),
    from_seq    bigint NOT NULL,
    to_seq      bigint NOT NULL,
    reason      smallint NOT NULL,
    received_at timestamptz NOT NULL,
    PRIMARY KEY (stream_id, from_seq)
);
CREATE INDEX gaps_by_time ON gaps (received_at);

-- Intact frames that could not be decoded.
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

-- Bytes of a device's frames in quarantine, for devices that have any. Triggers keep it equal to the sum. They
-- lock its rows in the order of device_id, like a writer, so that no two transactions wait for each other.
CREATE TABLE quarantine_usage (
    device_id bigint PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
    bytes     bigint NOT NULL
);
CREATE FUNCTION move_quarantine_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO quarantine_usage AS u (device_id, bytes)
    SELECT m.device_id, sum(length(m.bytes) * CASE TG_OP WHEN 'DELETE' THEN -1 ELSE 1 END)
    FROM moved AS m GROUP BY m.device_id ORDER BY m.device_id
    ON CONFLICT (device_id) DO UPDATE SET bytes = u.bytes + excluded.bytes;
    DELETE FROM quarantine_usage AS u USING moved AS m WHERE u.device_id = m.device_id AND u.bytes = 0;
    RETURN NULL;
END $$;
CREATE TRIGGER quarantine_inserted AFTER INSERT ON quarantine
    REFERENCING NEW TABLE AS moved FOR EACH STATEMENT EXECUTE FUNCTION move_quarantine_usage();
CREATE TRIGGER quarantine_deleted AFTER DELETE ON quarantine
    REFERENCING OLD TABLE AS moved FOR EACH STATEMENT EXECUTE FUNCTION move_quarantine_usage();

-- kind: connected, disconnected (code is the BYE code of the reason), refused (authentication failed, or the
-- device may not connect; code is the BYE code), added, enabled, disabled, key_changed (by an operator), event
-- (level and code are the device's own, frame_id is the frame that carried it), number_reused (a number was
-- reused with different content), presence (detail has the states before and after), twin (two devices use one
-- name), interval_set (by an operator). session is the number of the session that began or ended.
CREATE TABLE device_events (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id bigint NOT NULL REFERENCES devices (id),
    at        timestamptz NOT NULL,
    kind      text NOT NULL CHECK (kind IN ('connected', 'disconnected', 'refused', 'added', 'enabled',
        'disabled', 'key_changed', 'event', 'number_reused', 'presence', 'twin', 'interval_set')),
    level     smallint,
    code      integer NOT NULL,
    detail    text NOT NULL,
    frame_id  bigint,
    session   bigint
);
CREATE INDEX device_events_by_device ON device_events (device_id, at);
-- For presence: the end of the last session, however many events the device reported since.
CREATE INDEX device_events_of_ends ON device_events (device_id, at) WHERE kind = 'disconnected';
-- For pruning, which keeps events that devices reported and changes by operators.
CREATE INDEX device_events_of_sessions ON device_events (device_id, id)
    WHERE kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin');

-- Presence of devices as gateways last recorded it, with the expected interval between two arrivals. learned_s
-- is the median of the latest ones, set_s the value of an operator, which takes precedence. twin_at is when two
-- devices were last found to use the name. A device without a row counts as 'never'.
CREATE TABLE presence (
    device_id bigint PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
    state     text NOT NULL DEFAULT 'never' CHECK (state IN ('online', 'late', 'silent', 'never', 'disabled')),
    learned_s bigint,
    set_s     bigint,
    twin_at   timestamptz
);

-- Refusals before a session began: by address, claimed name ('' if none) and BYE code (0 if none was sent). The
-- latest 1,000 are kept.
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

-- One row for each open session: its device, gateway and address. A gateway that starts closes the sessions
-- that its last run left open. `gateway` is the content of the file gateway.id in its data directory; it is
-- empty if there is only one gateway.
CREATE TABLE sessions (
    id           bigint PRIMARY KEY,
    device_id    bigint NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
    gateway      text NOT NULL,
    peer         text NOT NULL,
    connected_at timestamptz NOT NULL
);
CREATE INDEX sessions_by_device ON sessions (device_id);

-- One row for each gateway: when it last wrote here, which it does every ten seconds, and since when it has done so
-- without a pause of two minutes. The sessions of a gateway that stopped without closing them do not count as open.
CREATE TABLE gateways (
    id          text PRIMARY KEY,
    alive_at    timestamptz NOT NULL,
    alive_since timestamptz NOT NULL
) WITH (fillfactor = 50);

-- A boot's clock: UTC is device time since boot + offset_us, with an error of at most half of delay_us when it
-- was measured. A delay_us of 9223372036854775807 means that the clock was not measured but chosen (SPEC R74).
-- timeline and origin_us describe the gateway's clock at that moment: origin_us is measured_at minus the time
-- since the machine started. If they are older than the newest row of `clock_steps`, the steps since then must
-- be added to offset_us. Times since boot below valid_from_us are from before a counter of the device wrapped,
-- or from an earlier boot with the same number.
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

-- Steps of a gateway's system clock by a tenth of a second or more. The clock was stepped by step_us (back if
-- negative) from before_at to after_at. Data received between since_at and before_at has times of the clock before
-- the step. After a step back, the same range also holds data received by the new clock until it reached before_at
-- again (docs/sql.md has SQL for both). timeline differs for each start of a machine; origin_us is UTC at that
-- start, by the clock after the step.
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

-- At most one row: the gateway that acknowledges from its own spool. While the row exists, no other gateway
-- writes to this database, because only that gateway knows what it has acknowledged.
CREATE TABLE spool (
    is_only       boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    id            text NOT NULL,
    host          text NOT NULL,
    -- Generated at each start of a gateway with the spool. The backend columns name its latest known
    -- connection. Of several copies of one spool, only one may drain into this database.
    instance      text NOT NULL DEFAULT '',
    backend_pid   integer,
    backend_start timestamptz,
    -- Number of commits whose content the spool has since deleted.
    drained       bigint NOT NULL DEFAULT 0,
    registered_at timestamptz NOT NULL DEFAULT now()
);

-- One row: a random mark, generated when the store is created and whenever a gateway finds that the store was
-- restored to an earlier state.
CREATE TABLE store_identity (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    mark    text NOT NULL DEFAULT gen_random_uuid()::text
);
INSERT INTO store_identity DEFAULT VALUES;

-- One row for each gateway connection that writes: the number of its transactions, incremented by each of them.
-- If a gateway remembers a higher number, the database was restored to an earlier state, together with its ids
-- of devices, streams and series. Rows of gateways that no longer run are deleted later.
CREATE TABLE store_writers (
    id           text PRIMARY KEY,
    commits      bigint NOT NULL,
    committed_at timestamptz NOT NULL
) WITH (fillfactor = 50);
