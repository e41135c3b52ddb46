-- The frame that told an event; NULL for what the gateway itself saw, and for events from before.
ALTER TABLE device_events ADD COLUMN frame_id INTEGER;
