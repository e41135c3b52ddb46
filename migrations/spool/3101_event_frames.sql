-- The table was made anew.
CREATE INDEX device_events_by_frame ON device_events (frame_id);
