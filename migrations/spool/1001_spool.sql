-- The tables that a spool adds to those that it shares with a store. A spool keeps readings until they are
-- drained into Postgres. They are read by frame, in order of arrival, and deleted in the same order.

-- "FGsp": distinguishes a spool from a store.
PRAGMA application_id = 1179087728;

CREATE TABLE readings (
    frame_id  INTEGER NOT NULL,
    series_id INTEGER NOT NULL,
    ts        INTEGER NOT NULL,
    value     ANY,
    PRIMARY KEY (frame_id, series_id, ts)
) STRICT, WITHOUT ROWID;

CREATE INDEX device_events_by_frame ON device_events (frame_id);
CREATE INDEX gaps_by_frame ON gaps (stream_id, to_seq, reason);

-- One row: the identity of this spool for the store that it drains into.
CREATE TABLE spool (
    is_only       INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    id            TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    -- 1 if the store knows this spool and the spool knows the positions of the store's streams.
    is_registered INTEGER NOT NULL DEFAULT 0,
    -- Marks that identify, in the store, the gateway that last started with this file and the one that is
    -- starting. A copy of the file does not receive later marks.
    instance      TEXT NOT NULL DEFAULT '',
    next_instance TEXT NOT NULL DEFAULT '',
    -- Inode of the file.
    inode         INTEGER NOT NULL DEFAULT 0,
    -- Number of commits whose content this spool has since deleted; the store also counts them.
    drained       INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO spool DEFAULT VALUES;

-- Changed rows to send to the store: of devices, schemas (key is the schema's number), clocks (key is the boot)
-- and clock_steps (key is the row). A row that changes again gets a new id, so a change can be deleted by the id
-- under which it was read. (The triggers delete and insert, because the conflict clause of the statement that
-- fired a trigger would override that of an upsert.)
CREATE TABLE changes (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    what      TEXT NOT NULL,
    device_id INTEGER NOT NULL,
    key       INTEGER NOT NULL,
    UNIQUE (what, device_id, key)
) STRICT;
CREATE TRIGGER device_inserted AFTER INSERT ON devices BEGIN
    DELETE FROM changes WHERE what = 'device' AND device_id = NEW.id AND key = 0;
    INSERT INTO changes (what, device_id, key) VALUES ('device', NEW.id, 0);
END;
CREATE TRIGGER device_updated AFTER UPDATE ON devices BEGIN
    DELETE FROM changes WHERE what = 'device' AND device_id = NEW.id AND key = 0;
    INSERT INTO changes (what, device_id, key) VALUES ('device', NEW.id, 0);
END;
CREATE TRIGGER schema_inserted AFTER INSERT ON schemas BEGIN
    DELETE FROM changes WHERE what = 'schema' AND device_id = NEW.device_id AND key = NEW.schema;
    INSERT INTO changes (what, device_id, key) VALUES ('schema', NEW.device_id, NEW.schema);
END;
CREATE TRIGGER clock_inserted AFTER INSERT ON clocks BEGIN
    DELETE FROM changes WHERE what = 'clock' AND device_id = NEW.device_id AND key = NEW.boot;
    INSERT INTO changes (what, device_id, key) VALUES ('clock', NEW.device_id, NEW.boot);
END;
CREATE TRIGGER clock_updated AFTER UPDATE ON clocks BEGIN
    DELETE FROM changes WHERE what = 'clock' AND device_id = NEW.device_id AND key = NEW.boot;
    INSERT INTO changes (what, device_id, key) VALUES ('clock', NEW.device_id, NEW.boot);
END;
CREATE TRIGGER clock_step_inserted AFTER INSERT ON clock_steps BEGIN
    INSERT INTO changes (what, device_id, key) VALUES ('clock_step', 0, NEW.id);
END;
CREATE TRIGGER clock_deleted AFTER DELETE ON clocks BEGIN
    DELETE FROM changes WHERE what = 'clock' AND device_id = OLD.device_id AND key = OLD.boot;
END;
