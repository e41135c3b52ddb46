-- What a frame in quarantine says was lost has a name, too.
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
