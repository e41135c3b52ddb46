-- The tables that a store adds to those that it shares with a spool. Recent readings are kept at level 0, in
-- order of arrival, and compacted later, many at a time. If they were sorted immediately, each of the few
-- readings of a small commit would rewrite a separate page. Measurements showed up to five times the time and
-- six times the bytes written to the disk.

-- Clustered by series and time, the order of reading. `frame_id` distinguishes two readings of the same time.
-- `value` is a REAL, or NULL for "sampled, no valid value". It is declared ANY because SQLite stores whole
-- numbers of a REAL column as integers and so loses the sign of -0.0.
CREATE TABLE readings_sorted (
    series_id INTEGER NOT NULL,
    ts        INTEGER NOT NULL,
    frame_id  INTEGER NOT NULL,
    value     ANY,
    PRIMARY KEY (series_id, ts, frame_id)
) STRICT, WITHOUT ROWID;

-- One row for each series in a frame. `samples` is a JSON object: microseconds since `ts`, and the value or
-- null. Each number in it is written so that SQLite reads back the same bits.
CREATE TABLE readings_recent (
    id        INTEGER PRIMARY KEY,
    series_id INTEGER NOT NULL,
    frame_id  INTEGER NOT NULL,
    ts        INTEGER NOT NULL,
    samples   TEXT NOT NULL
) STRICT;

-- One row: the progress of compaction. Rows of `readings_recent` up to sorted_id are in `readings_sorted` and
-- wait to be deleted. Rows up to sorting_id are being compacted, in the order of series, ts and frame, and are
-- in `readings_sorted` up to and including the one named here.
CREATE TABLE readings_sorting (
    is_only    INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    sorted_id  INTEGER NOT NULL,
    sorting_id INTEGER NOT NULL,
    series_id  INTEGER NOT NULL,
    ts         INTEGER NOT NULL,
    frame_id   INTEGER NOT NULL
) STRICT;
INSERT INTO readings_sorting VALUES (1, 0, 0, 0, 0, 0);

-- Rows of `readings_recent` that are not in `readings_sorted`.
CREATE VIEW readings_unsorted AS
SELECT u.series_id, u.ts, u.frame_id, u.samples
FROM readings_sorting AS m
CROSS JOIN readings_recent AS u ON u.id > m.sorted_id
    AND (u.id > m.sorting_id OR (u.series_id, u.ts, u.frame_id) > (m.series_id, m.ts, m.frame_id));

-- All readings. `value` is a REAL, or NULL for "sampled, no valid value".
CREATE VIEW readings AS
SELECT series_id, ts, frame_id, value FROM readings_sorted
UNION ALL
SELECT u.series_id, u.ts + CAST(v.key AS INTEGER), u.frame_id, v.value
FROM readings_unsorted AS u
CROSS JOIN json_each(u.samples) AS v;

-- Hours that contain readings, each as its first microsecond; `telemetry_hourly` uses them to find its
-- readings. A commit adds the missing hours of its readings. A row without readings is harmless.
CREATE TABLE reading_hours (
    hour INTEGER PRIMARY KEY
) STRICT;

-- A gateway that starts gives out ids above all that it finds, so it must also know of removed frames.
CREATE TRIGGER frames_removed AFTER DELETE ON frames WHEN old.id > (SELECT last_removed FROM store_identity)
BEGIN
    UPDATE store_identity SET last_removed = old.id;
END;

-- Presence of devices as gateways last recorded it, with the expected interval between two arrivals. learned_s
-- is the median of the latest ones, set_s the value of an operator, which takes precedence. twin_at is when two
-- devices were last found to use the name. A device without a row counts as 'never'.
CREATE TABLE presence (
    device_id INTEGER PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
    state     TEXT NOT NULL DEFAULT 'never' CHECK (state IN ('online', 'late', 'silent', 'never', 'disabled')),
    learned_s INTEGER,
    set_s     INTEGER,
    twin_at   INTEGER
) STRICT;

-- Views for people, with the same names and columns as in Postgres.
--
-- A time is integer microseconds UTC. The column with the suffix `_text` is the same time as text, for display
-- only: a filter on it computes the text of every row. Filter by `ts`, and in `telemetry_hourly` by `hour`,
-- which use the index. To filter by a date:
--     ... WHERE ts >= unixepoch('2026-11-22 10:00') * 1000000
--     ... WHERE ts >= unixepoch('now', '-5 minutes') * 1000000
-- A time outside the years 0 to 9999 has no text: `ts_text` is NULL, but `ts` is not.
--
-- `kind` is the device's encoding of a channel. A channel whose kind changes becomes a new series.
--
-- CROSS JOIN makes SQLite join in the written order: device, its series, then (series_id, ts) in `readings`.
-- Without it and without statistics, SQLite may read all of `readings` instead. LEFT JOIN lets it skip `frames`
-- if no column of it is selected.
--
-- Each view has one half for compacted readings and one for level 0, so that a filter on device or time uses
-- the index of the first.

CREATE VIEW telemetry AS
SELECT
    device,
    channel,
    unit,
    kind,
    ts,
    strftime('%Y-%m-%dT%H:%M:%S', (ts - (ts % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (ts % 1000000 + 1000000) % 1000000) AS ts_text,
    value,
    received_at,
    strftime('%Y-%m-%dT%H:%M:%S', received_at / 1000000, 'unixepoch')
        || printf('.%06dZ', received_at % 1000000) AS received_at_text,
    CASE quality
        WHEN 0 THEN 'utc'
        WHEN 1 THEN 'anchored'
        WHEN 2 THEN 'unanchored'
        WHEN 3 THEN 'suspect'
    END AS quality
FROM (
    SELECT d.name AS device, s.channel, s.unit, s.kind, r.ts, r.value, f.received_at, f.quality
    FROM devices AS d
    CROSS JOIN series AS s ON s.device_id = d.id
    CROSS JOIN readings_sorted AS r ON r.series_id = s.id
    LEFT JOIN frames AS f ON f.id = r.frame_id
    UNION ALL
    SELECT d.name, s.channel, s.unit, s.kind, u.ts + CAST(v.key AS INTEGER), v.value, f.received_at, f.quality
    FROM readings_unsorted AS u
    CROSS JOIN series AS s ON s.id = u.series_id
    CROSS JOIN devices AS d ON d.id = s.device_id
    CROSS JOIN json_each(u.samples) AS v
    LEFT JOIN frames AS f ON f.id = u.frame_id
);

-- The newest reading of each series. A reading whose time is more than a day after its receipt is skipped, so
-- that a device whose clock was once in the future does not freeze the view. A series without any other reading
-- shows NULL. (The condition on the present time excludes most such rows and can use the index.)
CREATE VIEW newest_readings AS
WITH unsorted AS MATERIALIZED (
    SELECT series_id, ts, frame_id, value
    FROM (
        SELECT
            u.series_id,
            u.ts + CAST(v.key AS INTEGER) AS ts,
            u.frame_id,
            v.value,
            row_number() OVER (
                PARTITION BY u.series_id
                ORDER BY u.ts + CAST(v.key AS INTEGER) DESC, u.frame_id DESC
            ) AS place
        FROM readings_unsorted AS u
        CROSS JOIN frames AS cf ON cf.id = u.frame_id
        CROSS JOIN json_each(u.samples) AS v
        WHERE u.ts + CAST(v.key AS INTEGER) <= cf.received_at + 86400000000
            AND u.ts + CAST(v.key AS INTEGER) <= (unixepoch('now') + 86400) * 1000000
    )
    WHERE place = 1
)
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    s.kind,
    s.id AS series_id,
    iif(r.ts IS NULL OR (n.ts, n.frame_id) > (r.ts, r.frame_id), n.ts, r.ts) AS ts,
    iif(r.ts IS NULL OR (n.ts, n.frame_id) > (r.ts, r.frame_id), n.value, r.value) AS value,
    iif(r.ts IS NULL OR (n.ts, n.frame_id) > (r.ts, r.frame_id), n.frame_id, r.frame_id) AS frame_id
FROM devices AS d
CROSS JOIN series AS s ON s.device_id = d.id
LEFT JOIN readings_sorted AS r
    ON r.series_id = s.id
    AND (r.ts, r.frame_id) = (
        SELECT c.ts, c.frame_id
        FROM readings_sorted AS c
        CROSS JOIN frames AS cf ON cf.id = c.frame_id
        WHERE c.series_id = s.id
            AND c.ts <= (unixepoch('now') + 86400) * 1000000
            AND c.ts <= cf.received_at + 86400000000
        ORDER BY c.ts DESC, c.frame_id DESC
        LIMIT 1
    )
LEFT JOIN unsorted AS n ON n.series_id = s.id;

-- One row for each series: its newest reading.
CREATE VIEW latest AS
SELECT
    device,
    channel,
    unit,
    kind,
    ts,
    strftime('%Y-%m-%dT%H:%M:%S', (ts - (ts % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (ts % 1000000 + 1000000) % 1000000) AS ts_text,
    value,
    f.received_at,
    strftime('%Y-%m-%dT%H:%M:%S', f.received_at / 1000000, 'unixepoch')
        || printf('.%06dZ', f.received_at % 1000000) AS received_at_text,
    CASE f.quality
        WHEN 0 THEN 'utc'
        WHEN 1 THEN 'anchored'
        WHEN 2 THEN 'unanchored'
        WHEN 3 THEN 'suspect'
    END AS quality
FROM newest_readings
LEFT JOIN frames AS f ON f.id = frame_id;

-- One row for each series: its first reading, its newest one as in `latest`, and `in_future`, the number of
-- readings whose time is more than a day from now, counted up to 1000.
CREATE VIEW channels AS
WITH unsorted AS MATERIALIZED (
    SELECT
        u.series_id,
        min(u.ts + CAST(v.key AS INTEGER)) AS first_ts,
        count(*) FILTER (WHERE u.ts + CAST(v.key AS INTEGER) > (unixepoch('now') + 86400) * 1000000) AS in_future
    FROM readings_unsorted AS u
    CROSS JOIN json_each(u.samples) AS v
    GROUP BY u.series_id
)
SELECT
    device,
    channel,
    unit,
    kind,
    first_ts,
    strftime('%Y-%m-%dT%H:%M:%S', (first_ts - (first_ts % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (first_ts % 1000000 + 1000000) % 1000000) AS first_ts_text,
    last_ts,
    strftime('%Y-%m-%dT%H:%M:%S', (last_ts - (last_ts % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (last_ts % 1000000 + 1000000) % 1000000) AS last_ts_text,
    last_value,
    in_future
FROM (
    SELECT
        n.device,
        n.channel,
        n.unit,
        n.kind,
        coalesce(min(r.ts, u.first_ts), r.ts, u.first_ts) AS first_ts,
        n.ts AS last_ts,
        n.value AS last_value,
        min(coalesce(u.in_future, 0) + (
            SELECT count(*) FROM (
                SELECT 1 FROM readings_sorted AS c
                WHERE c.series_id = n.series_id AND c.ts > (unixepoch('now') + 86400) * 1000000
                LIMIT 1000
            )
        ), 1000) AS in_future
    FROM newest_readings AS n
    LEFT JOIN readings_sorted AS r
        ON r.series_id = n.series_id
        AND (r.ts, r.frame_id) = (
            SELECT c.ts, c.frame_id FROM readings_sorted AS c
            WHERE c.series_id = n.series_id ORDER BY c.ts, c.frame_id LIMIT 1
        )
    LEFT JOIN unsorted AS u ON u.series_id = n.series_id
);

-- Valid values by UTC hour; `n` is their number. Filter by device, by hour, or by both: without a filter, every
-- reading in the store is read.
--
-- `total` excludes values beyond 1e288, because their sum may not be finite; `huge` is their sum times 2^-64.
-- `mean` is NULL if both infinities are among the values.
CREATE VIEW telemetry_hourly AS
WITH unsorted AS MATERIALIZED (
    -- Values beyond 1e15 bypass level 0, so they never occur here.
    SELECT series_id, hour, count(value) AS n, min(value) AS min, total(value) AS total, max(value) AS max
    FROM (
        SELECT
            u.series_id,
            u.ts + CAST(v.key AS INTEGER) - ((u.ts + CAST(v.key AS INTEGER)) % 3600000000 + 3600000000) % 3600000000
                AS hour,
            v.value
        FROM readings_unsorted AS u
        CROSS JOIN json_each(u.samples) AS v
    )
    GROUP BY series_id, hour
)
SELECT
    device,
    channel,
    unit,
    kind,
    hour,
    strftime('%Y-%m-%dT%H:00Z', hour / 1000000, 'unixepoch') AS hour_text,
    n,
    min,
    max(min(
        total / n + iif(abs(huge) >= 1e308, huge, huge / n * 4294967296.0 * 4294967296.0),
        max
    ), min) AS mean,
    max
FROM (
    SELECT
        o.device,
        o.channel,
        o.unit,
        o.kind,
        o.hour,
        o.n + coalesce(u.n, 0) AS n,
        coalesce(min(o.min, u.min), o.min, u.min) AS min,
        o.total + coalesce(u.total, 0) AS total,
        o.huge,
        coalesce(max(o.max, u.max), o.max, u.max) AS max
    FROM (
        SELECT
            d.name AS device,
            s.channel,
            s.unit,
            s.kind,
            h.hour,
            s.id AS series_id,
            count(r.value) AS n,
            min(r.value) AS min,
            total(iif(abs(r.value) < 1e288, r.value, NULL)) AS total,
            total(iif(abs(r.value) < 1e288, NULL, r.value / 4294967296.0 / 4294967296.0)) AS huge,
            max(r.value) AS max
        FROM devices AS d
        CROSS JOIN series AS s ON s.device_id = d.id
        CROSS JOIN reading_hours AS h
        CROSS JOIN readings_sorted AS r
            ON r.series_id = s.id AND r.ts >= h.hour AND r.ts <= h.hour + 3599999999
        GROUP BY 1, 2, 3, 4, 5, 6
    ) AS o
    LEFT JOIN unsorted AS u ON u.series_id = o.series_id AND u.hour = o.hour
    UNION ALL
    SELECT d.name, s.channel, s.unit, s.kind, u.hour, u.n, u.min, u.total, 0.0, u.max
    FROM unsorted AS u
    CROSS JOIN series AS s ON s.id = u.series_id
    CROSS JOIN devices AS d ON d.id = s.device_id
    WHERE NOT EXISTS (
        SELECT 1
        FROM readings_sorted AS r
        WHERE r.series_id = u.series_id AND r.ts >= u.hour AND r.ts <= u.hour + 3599999999
    )
);

-- Presence of each device, for `device_status` and for gateways. `heard_at` is the time of its last frame, login
-- or end of a session, whichever is the latest; `recorded` is the last state in the table `presence`. A device is
-- 'online' during a session and for three intervals after it was heard; then 'late', and 'silent' after a day.
CREATE VIEW device_presence AS
SELECT
    device_id,
    recorded,
    interval_s,
    is_interval_set,
    learned_s,
    heard_at,
    CASE
        WHEN enabled = 0 THEN 'disabled'
        WHEN last_frame_at IS NULL THEN 'never'
        WHEN is_connected OR heard_at >= (unixepoch('now') - 3 * interval_s) * 1000000 THEN 'online'
        WHEN heard_at >= (unixepoch('now') - 86400) * 1000000 THEN 'late'
        ELSE 'silent'
    END AS presence
FROM (
    SELECT
        device_id,
        enabled,
        recorded,
        interval_s,
        is_interval_set,
        learned_s,
        is_connected,
        last_frame_at,
        max(last_frame_at, coalesce(last_login_at, last_frame_at), coalesce(last_end_at, last_frame_at)) AS heard_at
    FROM (
        SELECT
            d.id AS device_id,
            d.enabled,
            p.state AS recorded,
            coalesce(p.set_s, p.learned_s, 40) AS interval_s,
            p.set_s IS NOT NULL AS is_interval_set,
            p.learned_s,
            EXISTS (SELECT 1 FROM sessions AS se WHERE se.device_id = d.id) AS is_connected,
            d.last_seen_at AS last_login_at,
            (
                SELECT max((
                    SELECT f.received_at FROM frames AS f
                    WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1
                ))
                FROM streams AS st WHERE st.device_id = d.id
            ) AS last_frame_at,
            (
                SELECT e.at FROM device_events AS e
                WHERE e.device_id = d.id AND e.kind = 'disconnected'
                ORDER BY e.at DESC LIMIT 1
            ) AS last_end_at
        FROM devices AS d
        LEFT JOIN presence AS p ON p.device_id = d.id
    )
);

-- One row for each device. `missing` is the number of lost frames, `quarantined` that of frames that could not
-- be decoded. `state` is 'connected' during a session, and 'new' before the first login. `last_seen_at` is the
-- later of its last login and its last frame. `presence` is described at `device_presence`; `interval_s` is the
-- expected interval, learned unless `is_interval_set`.
CREATE VIEW device_status AS
SELECT
    device,
    enabled,
    state,
    presence,
    interval_s,
    is_interval_set,
    firmware,
    first_seen_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', first_seen_at / 1000000, 'unixepoch') AS first_seen_at_text,
    coalesce(max(last_login_at, last_frame_at), last_login_at, last_frame_at) AS last_seen_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', coalesce(max(last_login_at, last_frame_at), last_login_at, last_frame_at)
        / 1000000, 'unixepoch') AS last_seen_at_text,
    last_frame_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', last_frame_at / 1000000, 'unixepoch') AS last_frame_at_text,
    frames,
    readings,
    missing,
    quarantined
FROM (
    SELECT
        d.name AS device,
        d.enabled,
        CASE
            WHEN EXISTS (SELECT 1 FROM sessions AS se WHERE se.device_id = d.id) THEN 'connected'
            WHEN d.first_seen_at IS NOT NULL THEN 'disconnected'
            ELSE 'new'
        END AS state,
        p.presence,
        p.interval_s,
        p.is_interval_set,
        d.firmware,
        d.first_seen_at,
        d.last_seen_at AS last_login_at,
        (
            SELECT max((
                SELECT f.received_at FROM frames AS f
                WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1
            ))
            FROM streams AS st WHERE st.device_id = d.id
        ) AS last_frame_at,
        (SELECT coalesce(sum(st.frames), 0) FROM streams AS st WHERE st.device_id = d.id) AS frames,
        (SELECT coalesce(sum(st.readings), 0) FROM streams AS st WHERE st.device_id = d.id) AS readings,
        (
            -- total(), not sum(): a device may report a gap so long that a sum would overflow.
            SELECT CAST(total(g.to_seq - g.from_seq + 1) AS INTEGER)
            FROM streams AS st CROSS JOIN gaps AS g ON g.stream_id = st.id
            WHERE st.device_id = d.id
        ) AS missing,
        (SELECT count(*) FROM quarantine AS q WHERE q.device_id = d.id) AS quarantined
    FROM devices AS d
    CROSS JOIN device_presence AS p ON p.device_id = d.id
);

-- Enabled devices that sent no frame in the last hour, or none at all; `silent_s` is the time since the last
-- one, in seconds.
CREATE VIEW silent_devices AS
SELECT
    device,
    state,
    last_frame_at,
    last_frame_at_text,
    unixepoch('now') - last_frame_at / 1000000 AS silent_s
FROM device_status
WHERE enabled = 1 AND (last_frame_at IS NULL OR last_frame_at < (unixepoch('now') - 3600) * 1000000);

-- Audit events and events that devices reported (kind 'event'). For the end of a session, `code` is a BYE code.
CREATE VIEW events AS
SELECT
    d.name AS device,
    e.at,
    strftime('%Y-%m-%dT%H:%M:%S', (e.at - (e.at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (e.at % 1000000 + 1000000) % 1000000) AS at_text,
    e.kind,
    CASE e.level
        WHEN 0 THEN 'debug'
        WHEN 1 THEN 'info'
        WHEN 2 THEN 'warning'
        WHEN 3 THEN 'error'
        WHEN 4 THEN 'critical'
    END AS level,
    e.code,
    e.detail AS text
FROM devices AS d
CROSS JOIN device_events AS e ON e.device_id = d.id;

-- Frames that devices lost before they could send them, or that the store lost.
CREATE VIEW missing_frames AS
SELECT
    d.name AS device,
    st.stream,
    g.from_seq,
    g.to_seq,
    g.to_seq - g.from_seq + 1 AS frames,
    CASE g.reason
        WHEN 0 THEN 'overwritten'
        WHEN 1 THEN 'queue damaged'
        WHEN 2 THEN 'erased'
        -- Reported by a frame that is, or was, in quarantine.
        WHEN 253 THEN 'reported by a refused frame'
        WHEN 254 THEN 'lost by the store'
        ELSE 'reason ' || g.reason
    END AS reason,
    g.received_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', g.received_at / 1000000, 'unixepoch') AS received_at_text
FROM devices AS d
CROSS JOIN streams AS st ON st.device_id = d.id
CROSS JOIN gaps AS g ON g.stream_id = st.id;
