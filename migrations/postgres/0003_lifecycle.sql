-- A device's life in an operator's hands: its key, and when something about it last changed.
--
-- The key is derived from the fleet's, by the device's name and key_version, which is 0 until it is
-- replaced; or it is the device's own, which is kept here encrypted under a key that derives from the fleet's.
-- Each change by an operator takes the next number of device_revision: gateways look for numbers that
-- are higher than what they have seen. key_revision is that of the change that gave the present key.
ALTER TABLE devices
    ADD COLUMN key_version  bigint NOT NULL DEFAULT 0,
    ADD COLUMN sealed_key   bytea,
    ADD COLUMN revision     bigint NOT NULL DEFAULT 0,
    ADD COLUMN key_revision bigint NOT NULL DEFAULT 0;
CREATE INDEX devices_by_revision ON devices (revision) WHERE revision > 0;

-- A row and not a sequence: whoever takes the next number holds it until the change is committed, so
-- numbers become visible in their order.
CREATE TABLE device_revision (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    latest  bigint NOT NULL
);
INSERT INTO device_revision (latest) VALUES (0);

-- kind: connected, disconnected (code is the reason's BYE code), refused (a proof of identity failed, or
-- the device may not connect; code is the BYE code), added, enabled, disabled, key_changed (by an operator),
-- event (level and code are the device's own, frame_id is the frame that told it).
ALTER TABLE device_events DROP CONSTRAINT device_events_kind_check;
ALTER TABLE device_events ADD CONSTRAINT device_events_kind_check CHECK (kind IN ('connected',
    'disconnected', 'refused', 'added', 'enabled', 'disabled', 'key_changed', 'event'));
