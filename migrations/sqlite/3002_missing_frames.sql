-- What a frame in quarantine says was lost has a name, too.
DROP VIEW missing_frames;
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
        -- Told by a frame that is, or was, in quarantine.
        WHEN 253 THEN 'told by a refused frame'
        ELSE 'reason ' || g.reason
    END AS reason,
    strftime('%Y-%m-%dT%H:%M:%SZ', g.received_at / 1000000, 'unixepoch') AS received_at
FROM devices AS d
CROSS JOIN streams AS st ON st.device_id = d.id
CROSS JOIN gaps AS g ON g.stream_id = st.id;
