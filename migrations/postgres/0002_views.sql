-- Views for people, with the same names and columns as in SQLite.
--
-- A time is a timestamptz. The column with the suffix `_text` is the same time as UTC text, for display only.
-- Filter by `ts`, which the partitions and the index support: WHERE ts >= now() - interval '5 minutes'; in
-- `telemetry_hourly` filter by `hour`.
--
-- `kind` is the device's encoding of a channel. A channel whose kind changes becomes a new series.
--
-- This file may be run again by hand after `readings` has been replaced by a table with another scheme.

CREATE OR REPLACE FUNCTION utc_text(at timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');

CREATE OR REPLACE FUNCTION utc_text_s(at timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');

CREATE OR REPLACE FUNCTION utc_text_h(at timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24":00Z"');

-- Returns the mean of n values and never fails. `total` is the sum of those below 1e288, `huge` that of the
-- others times 2^-64, so both sums are finite. (avg() fails from 1e154 on, sum() near 1e308, and a quotient
-- fails if it is too small for a double.) Returns NULL if both infinities are among the values.
CREATE OR REPLACE FUNCTION mean_of(
    n bigint, total double precision, huge double precision, min double precision, max double precision
) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN huge IS NULL THEN
        CASE WHEN abs(total) * 2 <= n * 4.9406564584124654e-324::double precision THEN 0 ELSE total / n END
    WHEN huge = 'NaN' THEN NULL
    WHEN abs(huge) = 'Infinity' THEN huge
    ELSE least(greatest(
        least(greatest(huge / n, -9.745314011399998e288), 9.745314011399998e288) * 18446744073709551616.0
            + CASE
                WHEN total IS NULL OR abs(total) * 2 <= n * 4.9406564584124654e-324::double precision THEN 0
                ELSE total / n
            END,
        min), max)
END;

CREATE OR REPLACE FUNCTION quality_text(quality smallint) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE quality
    WHEN 0 THEN 'utc'
    WHEN 1 THEN 'anchored'
    WHEN 2 THEN 'unanchored'
    WHEN 3 THEN 'suspect'
END;

CREATE OR REPLACE VIEW telemetry AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    s.kind,
    r.ts,
    utc_text(r.ts) AS ts_text,
    r.value,
    f.received_at,
    utc_text(f.received_at) AS received_at_text,
    quality_text(f.quality) AS quality
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
JOIN readings AS r ON r.series_id = s.id
LEFT JOIN frames AS f ON f.id = r.frame_id;

-- One row for each series: its newest reading. A reading whose time is more than a day after its receipt is
-- skipped, so that a device whose clock was once in the future does not freeze the view. A series without any
-- other reading shows NULL. Readings of a busy gateway appear a second or two after they are stored.
CREATE OR REPLACE VIEW latest AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    s.kind,
    n.ts,
    utc_text(n.ts) AS ts_text,
    n.value,
    f.received_at,
    utc_text(f.received_at) AS received_at_text,
    quality_text(f.quality) AS quality
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
LEFT JOIN newest AS n ON n.series_id = s.id AND n.ts <= now() + interval '1 day'
LEFT JOIN frames AS f ON f.id = n.frame_id;

-- One row for each series: its first reading, its newest one as in `latest`, and `in_future`, the number of
-- readings whose time is more than a day from now, counted up to 1000.
CREATE OR REPLACE VIEW channels AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    s.kind,
    o.first_ts,
    utc_text(o.first_ts) AS first_ts_text,
    n.ts AS last_ts,
    utc_text(n.ts) AS last_ts_text,
    n.value AS last_value,
    (
        SELECT count(*) FROM (
            SELECT FROM readings AS c
            WHERE c.series_id = s.id AND c.ts > now() + interval '1 day'
            LIMIT 1000
        ) AS ahead
    ) AS in_future
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
LEFT JOIN newest AS o ON o.series_id = s.id
LEFT JOIN newest AS n ON n.series_id = s.id AND n.ts <= now() + interval '1 day';

-- Valid values by UTC hour; `n` is their number. Filter by device, by hour, or by both: without a filter, every
-- reading in the store is read.
CREATE OR REPLACE VIEW telemetry_hourly AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    s.kind,
    h.hour,
    utc_text_h(h.hour) AS hour_text,
    r.n,
    r.min,
    mean_of(r.n, r.total, r.huge, r.min, r.max) AS mean,
    r.max
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
CROSS JOIN reading_hours AS h
CROSS JOIN LATERAL (
    SELECT
        count(*) AS readings,
        count(c.value) AS n,
        min(c.value) AS min,
        sum(c.value) FILTER (WHERE abs(c.value) < 1e288) AS total,
        sum(c.value * 5.421010862427522e-20) FILTER (WHERE abs(c.value) >= 1e288) AS huge,
        max(c.value) AS max
    FROM readings AS c
    WHERE c.series_id = s.id AND c.ts >= h.hour AND c.ts < h.hour + interval '1 hour'
) AS r
WHERE r.readings > 0;

-- For the case that a table with existing readings has replaced `readings`.
INSERT INTO reading_hours
SELECT DISTINCT date_trunc('hour', ts, 'UTC') FROM readings
ON CONFLICT DO NOTHING;

-- Gateways that stopped without closing their sessions: they wrote nothing for two minutes, although others did. After
-- an outage of the database, all have two minutes to write again.
CREATE OR REPLACE VIEW dead_gateways AS
SELECT id, alive_at
FROM gateways
WHERE alive_at < now() - interval '2 minutes' AND NOT EXISTS (
    SELECT FROM gateways AS other
    WHERE other.alive_at >= now() - interval '2 minutes' AND other.alive_since > now() - interval '2 minutes'
);

-- Presence of each device, for `device_status` and for gateways. `heard_at` is the time of its last frame, login
-- or end of a session, or the time when the gateway of its session was last alive, whichever is the latest; `recorded`
-- is the last state in the table `presence`. A device is 'online' during a session and for three intervals after it was
-- heard; then 'late', and 'silent' after a day.
CREATE OR REPLACE VIEW device_presence AS
SELECT
    device_id,
    recorded,
    interval_s,
    is_interval_set,
    learned_s,
    heard_at,
    is_connected,
    CASE
        WHEN enabled = 0 THEN 'disabled'
        WHEN last_frame_at IS NULL THEN 'never'
        WHEN is_connected OR heard_at >= now() - 3 * interval_s * interval '1 second' THEN 'online'
        WHEN heard_at >= now() - interval '1 day' THEN 'late'
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
        greatest(last_frame_at, last_login_at, last_end_at, last_alive_at) AS heard_at
    FROM (
        SELECT
            d.id AS device_id,
            d.enabled,
            p.state AS recorded,
            coalesce(p.set_s, p.learned_s, 40) AS interval_s,
            (p.set_s IS NOT NULL)::integer AS is_interval_set,
            p.learned_s,
            EXISTS (
                SELECT FROM sessions AS se
                WHERE se.device_id = d.id AND se.gateway NOT IN (SELECT dead.id FROM dead_gateways AS dead)
            ) AS is_connected,
            (
                SELECT max(g.alive_at) FROM sessions AS se JOIN gateways AS g ON g.id = se.gateway
                WHERE se.device_id = d.id
            ) AS last_alive_at,
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
    ) AS found
) AS heard;

-- One row for each device. `missing` is the number of lost frames, `quarantined` that of frames that could not
-- be decoded. `state` is 'connected' during a session, and 'new' before the first login. `last_seen_at` is the
-- later of its last login and its last frame. `presence` is described at `device_presence`; `interval_s` is the
-- expected interval, learned unless `is_interval_set`.
CREATE OR REPLACE VIEW device_status AS
SELECT
    device,
    enabled,
    state,
    presence,
    interval_s,
    is_interval_set,
    firmware,
    first_seen_at,
    utc_text_s(first_seen_at) AS first_seen_at_text,
    greatest(last_login_at, last_frame_at) AS last_seen_at,
    utc_text_s(greatest(last_login_at, last_frame_at)) AS last_seen_at_text,
    last_frame_at,
    utc_text_s(last_frame_at) AS last_frame_at_text,
    frames,
    readings,
    missing,
    quarantined
FROM (
    SELECT
        d.name AS device,
        d.enabled,
        CASE
            WHEN p.is_connected THEN 'connected'
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
        (SELECT coalesce(sum(st.frames), 0) FROM streams AS st WHERE st.device_id = d.id)::bigint AS frames,
        (SELECT coalesce(sum(st.readings), 0) FROM streams AS st WHERE st.device_id = d.id)::bigint
            AS readings,
        (
            -- The sum is numeric and may exceed bigint: a device may report gaps that long.
            SELECT least(coalesce(sum(g.to_seq - g.from_seq + 1), 0), 9223372036854775807)
            FROM streams AS st JOIN gaps AS g ON g.stream_id = st.id
            WHERE st.device_id = d.id
        )::bigint AS missing,
        (SELECT count(*) FROM quarantine AS q WHERE q.device_id = d.id) AS quarantined
    FROM devices AS d
    JOIN device_presence AS p ON p.device_id = d.id
) AS status;

-- Enabled devices that sent no frame in the last hour, or none at all; `silent_s` is the time since the last
-- one, in seconds.
CREATE OR REPLACE VIEW silent_devices AS
SELECT
    device,
    state,
    last_frame_at,
    last_frame_at_text,
    extract(epoch FROM now() - last_frame_at)::bigint AS silent_s
FROM device_status
WHERE enabled = 1 AND (last_frame_at IS NULL OR last_frame_at < now() - interval '1 hour');

-- Audit events and events that devices reported (kind 'event'). For the end of a session, `code` is a BYE code.
CREATE OR REPLACE VIEW events AS
SELECT
    d.name AS device,
    e.at,
    utc_text(e.at) AS at_text,
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
JOIN device_events AS e ON e.device_id = d.id;

-- Frames that devices lost before they could send them, or that the store lost.
CREATE OR REPLACE VIEW missing_frames AS
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
    utc_text_s(g.received_at) AS received_at_text
FROM devices AS d
JOIN streams AS st ON st.device_id = d.id
JOIN gaps AS g ON g.stream_id = st.id;
