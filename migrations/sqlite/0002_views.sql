-- Views for people.
--
-- Filter by `ts`, integer microseconds UTC, which the index carries; `time` is for reading only, and
-- a filter on it computes a text for every row. From a text:
--     ... WHERE ts >= unixepoch('2026-11-22 10:00') * 1000000
--     ... WHERE ts >= unixepoch('now', '-5 minutes') * 1000000
-- A time outside the years 0 to 9999 has no text: `time` is NULL, `ts` is still there.
--
-- CROSS JOIN keeps SQLite to the order written: device, its series, then (series_id, ts) in
-- `readings`. Left to itself and without statistics, it may read all of `readings` instead. LEFT JOIN
-- lets it leave `frames` alone where no column of it is asked for.

CREATE VIEW telemetry AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    r.ts,
    strftime('%Y-%m-%dT%H:%M:%S', (r.ts - (r.ts % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (r.ts % 1000000 + 1000000) % 1000000) AS time,
    r.value,
    strftime('%Y-%m-%dT%H:%M:%S', f.received_at / 1000000, 'unixepoch')
        || printf('.%06dZ', f.received_at % 1000000) AS received_at,
    CASE f.quality
        WHEN 0 THEN 'utc'
        WHEN 1 THEN 'anchored'
        WHEN 2 THEN 'unanchored'
        WHEN 3 THEN 'suspect'
    END AS quality
FROM devices AS d
CROSS JOIN series AS s ON s.device_id = d.id
CROSS JOIN readings AS r ON r.series_id = s.id
LEFT JOIN frames AS f ON f.id = r.frame_id;

-- One row for each series: its newest reading. A reading that claims a time more than a day after
-- its receipt is passed over, so that a device whose clock once stood in the future does not freeze
-- here; a series without any other reading shows NULL. (The bound by the present time says the same
-- of most such rows in a way the index can carry out.)
CREATE VIEW latest AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    r.ts,
    strftime('%Y-%m-%dT%H:%M:%S', (r.ts - (r.ts % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (r.ts % 1000000 + 1000000) % 1000000) AS time,
    r.value,
    strftime('%Y-%m-%dT%H:%M:%S', f.received_at / 1000000, 'unixepoch')
        || printf('.%06dZ', f.received_at % 1000000) AS received_at,
    CASE f.quality
        WHEN 0 THEN 'utc'
        WHEN 1 THEN 'anchored'
        WHEN 2 THEN 'unanchored'
        WHEN 3 THEN 'suspect'
    END AS quality
FROM devices AS d
CROSS JOIN series AS s ON s.device_id = d.id
LEFT JOIN readings AS r
    ON r.series_id = s.id
    AND (r.ts, r.frame_id) = (
        SELECT c.ts, c.frame_id
        FROM readings AS c
        CROSS JOIN frames AS cf ON cf.id = c.frame_id
        WHERE c.series_id = s.id
            AND c.ts <= (unixepoch('now') + 86400) * 1000000
            AND c.ts <= cf.received_at + 86400000000
        ORDER BY c.ts DESC, c.frame_id DESC
        LIMIT 1
    )
LEFT JOIN frames AS f ON f.id = r.frame_id;

-- By UTC hour, of the valid values; `n` counts them. Name a device: without one, every reading in
-- the store is read. For hours of one short range in a large store, group `telemetry` by
-- `ts / 3600000000` with a filter on `ts`.
CREATE VIEW telemetry_hourly AS
SELECT
    d.name AS device,
    s.channel,
    s.unit,
    strftime('%Y-%m-%dT%H:00Z', (r.ts - (r.ts % 3600000000 + 3600000000) % 3600000000) / 1000000,
        'unixepoch') AS hour,
    count(r.value) AS n,
    min(r.value) AS min,
    avg(r.value) AS mean,
    max(r.value) AS max
FROM devices AS d
CROSS JOIN series AS s ON s.device_id = d.id
CROSS JOIN readings AS r ON r.series_id = s.id
GROUP BY d.name, s.channel, s.unit, r.ts - (r.ts % 3600000000 + 3600000000) % 3600000000;

-- One row for each device. `missing` are frames that the device lost, `quarantined` those that could
-- not be understood; `state` is the last thing its sessions told, 'new' before the first.
CREATE VIEW device_status AS
SELECT
    d.name AS device,
    d.enabled,
    coalesce((
        SELECT e.kind FROM device_events AS e
        WHERE e.device_id = d.id AND e.kind IN ('connected', 'disconnected')
        ORDER BY e.at DESC, e.id DESC LIMIT 1
    ), 'new') AS state,
    d.firmware,
    strftime('%Y-%m-%dT%H:%M:%SZ', d.first_seen_at / 1000000, 'unixepoch') AS first_seen_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', d.last_seen_at / 1000000, 'unixepoch') AS last_seen_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', (
        SELECT max((
            SELECT f.received_at FROM frames AS f
            WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1
        ))
        FROM streams AS st WHERE st.device_id = d.id
    ) / 1000000, 'unixepoch') AS last_frame_at,
    (SELECT coalesce(sum(st.frames), 0) FROM streams AS st WHERE st.device_id = d.id) AS frames,
    (SELECT coalesce(sum(st.readings), 0) FROM streams AS st WHERE st.device_id = d.id) AS readings,
    (
        -- total(), not sum(): a device may claim a gap so long that a sum would overflow.
        SELECT CAST(total(g.to_seq - g.from_seq + 1) AS INTEGER)
        FROM streams AS st CROSS JOIN gaps AS g ON g.stream_id = st.id
        WHERE st.device_id = d.id
    ) AS missing,
    (SELECT count(*) FROM quarantine AS q WHERE q.device_id = d.id) AS quarantined
FROM devices AS d;

-- What devices lost before they could send it.
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
        ELSE 'reason ' || g.reason
    END AS reason,
    strftime('%Y-%m-%dT%H:%M:%SZ', g.received_at / 1000000, 'unixepoch') AS received_at
FROM devices AS d
CROSS JOIN streams AS st ON st.device_id = d.id
CROSS JOIN gaps AS g ON g.stream_id = st.id;
