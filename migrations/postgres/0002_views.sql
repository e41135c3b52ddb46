-- Views for people; the same names and columns as in SQLite.
--
-- Filter by `ts`, which the partitions and the index carry: WHERE ts >= now() - interval '5 minutes'.
-- `time` is the same as UTC text, for reading only.
--
-- May be run again by hand, after `readings` was replaced by a table of another scheme.

CREATE OR REPLACE FUNCTION utc_text(at timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');

CREATE OR REPLACE FUNCTION utc_text_s(at timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');

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
    r.ts,
    utc_text(r.ts) AS time,
    r.value,
    utc_text(f.received_at) AS received_at,
    quality_text(f.quality) AS quality
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
JOIN readings AS r ON r.series_id = s.id
LEFT JOIN frames AS f ON f.id = r.frame_id;

-- One row for each series: its newest reading. A reading that claims a time more than a day after
-- its receipt is passed over, so that a device whose clock once stood in the future does not freeze
-- here; a series without any other reading shows NULL. (The bound by the present time says the same
-- of most such rows in a way the index can carry out.)
CREATE OR REPLACE VIEW latest AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    r.ts,
    utc_text(r.ts) AS time,
    r.value,
    utc_text(r.received_at) AS received_at,
    quality_text(r.quality) AS quality
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
LEFT JOIN LATERAL (
    SELECT c.ts, c.value, f.received_at, f.quality
    FROM readings AS c
    JOIN frames AS f ON f.id = c.frame_id
    WHERE c.series_id = s.id
        AND c.ts <= now() + interval '1 day'
        AND c.ts <= f.received_at + interval '1 day'
    ORDER BY c.ts DESC, c.frame_id DESC
    LIMIT 1
) AS r ON true;

-- By UTC hour, of the valid values; `n` counts them. Name a device: without one, every reading in
-- the store is read. For hours of one short range in a large store, group `telemetry` by
-- `date_trunc('hour', ts)` with a filter on `ts`.
CREATE OR REPLACE VIEW telemetry_hourly AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    to_char(date_trunc('hour', r.ts, 'UTC') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24":00Z"') AS hour,
    count(r.value) AS n,
    min(r.value) AS min,
    avg(r.value) AS mean,
    max(r.value) AS max
FROM devices AS d
JOIN series AS s ON s.device_id = d.id
JOIN readings AS r ON r.series_id = s.id
GROUP BY d.name, s.channel, s.unit, date_trunc('hour', r.ts, 'UTC');

-- One row for each device. `missing` are frames that the device lost, `quarantined` those that could
-- not be understood; `state` is the last thing its sessions told, 'new' before the first.
CREATE OR REPLACE VIEW device_status AS
SELECT
    d.name AS device,
    d.enabled,
    coalesce((
        SELECT e.kind FROM device_events AS e
        WHERE e.device_id = d.id AND e.kind IN ('connected', 'disconnected')
        ORDER BY e.at DESC, e.id DESC LIMIT 1
    ), 'new') AS state,
    d.firmware,
    utc_text_s(d.first_seen_at) AS first_seen_at,
    utc_text_s(d.last_seen_at) AS last_seen_at,
    utc_text_s((
        SELECT max((
            SELECT f.received_at FROM frames AS f
            WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1
        ))
        FROM streams AS st WHERE st.device_id = d.id
    )) AS last_frame_at,
    (SELECT coalesce(sum(st.frames), 0) FROM streams AS st WHERE st.device_id = d.id)::bigint AS frames,
    (SELECT coalesce(sum(st.readings), 0) FROM streams AS st WHERE st.device_id = d.id)::bigint
        AS readings,
    (
        -- The sum is numeric, and may be more than any bigint: a device may claim gaps that long.
        SELECT least(coalesce(sum(g.to_seq - g.from_seq + 1), 0), 9223372036854775807)
        FROM streams AS st JOIN gaps AS g ON g.stream_id = st.id
        WHERE st.device_id = d.id
    )::bigint AS missing,
    (SELECT count(*) FROM quarantine AS q WHERE q.device_id = d.id) AS quarantined
FROM devices AS d;

-- What devices lost before they could send it.
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
        -- Told by a frame that is, or was, in quarantine.
        WHEN 253 THEN 'told by a refused frame'
        WHEN 254 THEN 'lost by the store'
        ELSE 'reason ' || g.reason
    END AS reason,
    utc_text_s(g.received_at) AS received_at
FROM devices AS d
JOIN streams AS st ON st.device_id = d.id
JOIN gaps AS g ON g.stream_id = st.id;
