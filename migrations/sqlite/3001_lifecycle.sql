-- A device's life in an operator's hands: its key, and when something about it last changed.
--
-- The key is derived from the fleet's, by the device's name and key_version, which is 0 until it is
-- replaced; or it is the device's own, which is kept here encrypted under a key that derives from the fleet's.
-- Each change by an operator takes the next number of device_revision: gateways look for numbers that
-- are higher than what they have seen. key_revision is that of the change that gave the present key.
ALTER TABLE devices ADD COLUMN key_version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN sealed_key BLOB;
ALTER TABLE devices ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN key_revision INTEGER NOT NULL DEFAULT 0;
CREATE INDEX devices_by_revision ON devices (revision) WHERE revision > 0;

CREATE TABLE device_revision (
    is_only INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    latest  INTEGER NOT NULL
) STRICT;
INSERT INTO device_revision (latest) VALUES (0);

-- More kinds of events. SQLite cannot change a constraint, so the table is made anew.
DROP VIEW device_status;
-- kind: connected, disconnected (code is the reason's BYE code), refused (a proof of identity failed, or
-- the device may not connect; code is the BYE code), added, enabled, disabled, key_changed (by an operator),
-- event (level and code are the device's own, frame_id is the frame that told it).
CREATE TABLE new_device_events (
    id        INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL REFERENCES devices (id),
    at        INTEGER NOT NULL,
    kind      TEXT NOT NULL CHECK (kind IN ('connected', 'disconnected', 'refused', 'added', 'enabled',
        'disabled', 'key_changed', 'event')),
    level     INTEGER,
    code      INTEGER NOT NULL,
    detail    TEXT NOT NULL,
    frame_id  INTEGER
) STRICT;
INSERT INTO new_device_events
    SELECT id, device_id, at, kind, level, code, detail, frame_id FROM device_events;
DROP TABLE device_events;
ALTER TABLE new_device_events RENAME TO device_events;
CREATE INDEX device_events_by_device ON device_events (device_id, at);
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
