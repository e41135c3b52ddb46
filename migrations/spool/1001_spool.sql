-- What makes a spool of a store: here readings are kept until they are in another store. They are
-- looked for by frame, in the order in which they came, and forgotten in the same order.

-- "FGsp": nobody shall take this for a store.
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

-- One row: who this spool is to the store it feeds.
CREATE TABLE spool (
    is_only       INTEGER PRIMARY KEY DEFAULT 1 CHECK (is_only = 1),
    id            TEXT NOT NULL DEFAULT (lower(hex(randomblob(16)))),
    -- 1 when the store knows of this spool and the spool knows where the store's streams stand.
    is_registered INTEGER NOT NULL DEFAULT 0,
    -- By which the store knows the gateway that began with this file last, and the one that begins: a copy of
    -- the file does not know what comes after.
    instance      TEXT NOT NULL DEFAULT '',
    next_instance TEXT NOT NULL DEFAULT '',
    -- The file itself, by its number in its file system.
    inode         INTEGER NOT NULL DEFAULT 0,
    -- How many commits of what was here were forgotten since; the store counts them as well.
    drained       INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO spool DEFAULT VALUES;

-- Rows that changed and have to be sent to the store: of devices, schemas (key is the schema's number),
-- clocks (key is the boot) and clock_steps (key is the row). A row that changes again gets a new id, so what was read under an old
-- one can be forgotten by it. (Deleted and inserted, because in a trigger the conflict clause of the
-- statement that fired it would hold.)
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
