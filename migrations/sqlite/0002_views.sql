-- Views for people. Filter telemetry by ts, which is indexed; `unixepoch('2026-03-01') * 1000000` makes
-- one of a text.
--
-- CROSS JOIN is SQLite's word for "in this order": series first, then the readings of each by their
-- primary key. Without it the planner may read every reading there is when asked for the last five
-- minutes of all devices.

CREATE VIEW telemetry AS
SELECT
    devices.name AS device,
    series.channel AS channel,
    series.unit AS unit,
    readings.ts AS ts,
    strftime('%Y-%m-%dT%H:%M:%S', readings.ts / 1000000 - (readings.ts % 1000000 < 0), 'unixepoch')
        || printf('.%06dZ', (readings.ts % 1000000 + 1000000) % 1000000) AS time,
    readings.value AS value,
    strftime('%Y-%m-%dT%H:%M:%SZ', frames.received_at / 1000000, 'unixepoch') AS received_at,
    CASE frames.quality
        WHEN 0 THEN 'utc' WHEN 1 THEN 'anchored' WHEN 2 THEN 'unanchored' WHEN 3 THEN 'suspect'
    END AS quality
FROM devices
CROSS JOIN series ON series.device_id = devices.id
CROSS JOIN readings ON readings.series_id = series.id
CROSS JOIN frames ON frames.id = readings.frame_id;

-- One row for each series. A time more than a day ahead of the machine's does not count, so that one
-- wrong clock does not freeze the value for years.
CREATE VIEW latest AS
SELECT
    devices.name AS device,
    series.channel AS channel,
    series.unit AS unit,
    readings.ts AS ts,
    strftime('%Y-%m-%dT%H:%M:%S', readings.ts / 1000000 - (readings.ts % 1000000 < 0), 'unixepoch')
        || printf('.%06dZ', (readings.ts % 1000000 + 1000000) % 1000000) AS time,
    readings.value AS value
FROM devices
CROSS JOIN series ON series.device_id = devices.id
CROSS JOIN readings ON readings.series_id = series.id
WHERE (readings.ts, readings.frame_id) = (
    SELECT newest.ts, newest.frame_id
    FROM readings AS newest
    WHERE newest.series_id = series.id AND newest.ts <= (unixepoch() + 86400) * 1000000
    ORDER BY newest.ts DESC, newest.frame_id DESC
    LIMIT 1
);

CREATE VIEW telemetry_hourly AS
SELECT
    devices.name AS device,
    series.channel AS channel,
    series.unit AS unit,
    strftime('%Y-%m-%dT%H:00:00Z', readings.ts / 1000000 - (readings.ts % 1000000 < 0), 'unixepoch')
        AS hour,
    count(*) AS readings,
    count(readings.value) AS valid,
    min(readings.value) AS min,
    avg(readings.value) AS mean,
    max(readings.value) AS max
FROM devices
CROSS JOIN series ON series.device_id = devices.id
CROSS JOIN readings ON readings.series_id = series.id
GROUP BY series.id, hour;

CREATE VIEW device_status AS
SELECT
    devices.name AS device,
    devices.enabled AS enabled,
    devices.firmware AS firmware,
    strftime('%Y-%m-%dT%H:%M:%SZ', devices.first_seen_at / 1000000, 'unixepoch') AS first_seen,
    strftime('%Y-%m-%dT%H:%M:%SZ', devices.last_seen_at / 1000000, 'unixepoch') AS last_seen,
    (SELECT count(*) FROM streams WHERE streams.device_id = devices.id) AS streams,
    (SELECT total(frames) FROM streams WHERE streams.device_id = devices.id) AS frames,
    (SELECT total(readings) FROM streams WHERE streams.device_id = devices.id) AS readings
FROM devices;

CREATE VIEW missing_frames AS
SELECT
    devices.name AS device,
    streams.stream AS stream,
    gaps.from_seq AS from_seq,
    gaps.to_seq AS to_seq,
    gaps.to_seq - gaps.from_seq + 1 AS frames,
    CASE gaps.reason
        WHEN 0 THEN 'overwritten' WHEN 1 THEN 'queue damaged' WHEN 2 THEN 'erased'
        ELSE 'reason ' || gaps.reason
    END AS reason,
    strftime('%Y-%m-%dT%H:%M:%SZ', gaps.received_at / 1000000, 'unixepoch') AS received_at
FROM gaps
JOIN streams ON streams.id = gaps.stream_id
JOIN devices ON devices.id = streams.device_id;
