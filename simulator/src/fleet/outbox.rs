//! A device's queue, made again from the script whenever it is looked at, so that it takes no memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use fieldgate_protocol::device::Queue;
use fieldgate_protocol::frame::NoRoom;

use super::Fleet;
use crate::plan::DeviceScript;
use crate::wire::Workbench;

thread_local! {
    /// Buffers for making a frame; a device needs them only for that long.
    static WORKBENCH: std::cell::RefCell<Workbench> = std::cell::RefCell::default();
}

/// The queue of one device.
pub(super) struct Outbox {
    pub(super) fleet: Arc<Fleet>,
    pub(super) script: DeviceScript,
    /// The last frame that is durable by the gateway's latest word.
    pub(super) durable_seq: u64,
    /// The last frame that was ever acked: through it, a device has deleted its frames.
    pub(super) deleted_seq: u64,
    /// The last frame that is due.
    due_seq: u64,
    /// The last frame that was sent, on any connection.
    sent_seq: u64,
    /// For each frame sent and not yet acked: its number, since when it is waited for, its readings.
    in_flight: VecDeque<(u64, u64, u64)>,
    /// Told to the fleet in the end: that takes a lock, and frames are many.
    sent: Sent,
}

/// What a device put on the wire.
#[derive(Default)]
struct Sent {
    frames: u64,
    readings: u64,
    bytes: u64,
}

impl Outbox {
    pub(super) fn new(fleet: Arc<Fleet>, script: DeviceScript) -> Outbox {
        Outbox {
            fleet,
            script,
            durable_seq: 0,
            deleted_seq: 0,
            due_seq: 0,
            sent_seq: 0,
            in_flight: VecDeque::new(),
            sent: Sent::default(),
        }
    }

    /// Moves `due_seq` on; returns when the next frame will be due.
    pub(super) fn advance(&mut self, now_us: u64) -> Option<u64> {
        if self.fleet.terms.is_silent {
            return None;
        }
        let last = self.script.frames().unwrap_or(u64::MAX);
        // A device in a burst always has more than its window lets out.
        let ahead = self.sent_seq + self.fleet.terms.window_frames + 1;
        while self.due_seq < last.min(ahead) && !self.fleet.stop.is_cancelled() {
            let due_us = self
                .fleet
                .pace
                .due_us(self.script.index(), self.due_seq + 1);
            if due_us > now_us {
                return Some(due_us);
            }
            self.due_seq += 1;
        }
        None
    }

    /// Whether all that will ever be due is acked.
    pub(super) fn is_done(&self) -> bool {
        let last = self.script.frames().unwrap_or(u64::MAX);
        let end = if self.fleet.stop.is_cancelled() {
            self.sent_seq
        } else {
            last
        };
        self.durable_seq >= end
    }

    /// Whether all that was sent is acked.
    pub(super) fn is_empty(&self) -> bool {
        self.durable_seq >= self.sent_seq
    }

    /// Notes what was put on the wire.
    pub(super) fn note_bytes(&mut self, bytes: usize) {
        self.sent.bytes += bytes as u64;
    }

    /// Writes frame `seq`; returns its length and how many readings are to be stored of it.
    pub(super) fn make(&self, seq: u64, out: &mut [u8]) -> Result<(usize, u64), NoRoom> {
        WORKBENCH
            .with_borrow_mut(|workbench| workbench.frame(&self.script, seq, self.fleet.schema, out))
    }
}

impl Queue for Outbox {
    fn oldest_seq(&self) -> u64 {
        self.deleted_seq + 1
    }

    fn next_seq(&self) -> u64 {
        self.due_seq + 1
    }

    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let (bytes, readings) = self.make(seq, out)?;
        if seq > self.sent_seq {
            self.sent_seq = seq;
            self.fleet.counters.frames_sent.fetch_add(1, Relaxed);
            let now_us = self.fleet.now_us();
            // A frame waits from when it was due, not from when the device got round to it; in a burst
            // everything is due from the start, and what counts is how long the gateway takes.
            let due_us = self.fleet.pace.due_us(self.script.index(), seq);
            let since_us = if self.fleet.pace.is_open_loop() {
                due_us
            } else {
                now_us
            };
            self.in_flight
                .push_back((seq, since_us.min(now_us), readings));
        }
        self.sent.frames += 1;
        self.sent.readings += readings;
        self.note_bytes(bytes);
        Ok(bytes)
    }

    fn write_declare(&mut self, _seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let declare = &self.fleet.declare;
        out.get_mut(..declare.len())
            .ok_or(NoRoom)?
            .copy_from_slice(declare);
        self.note_bytes(self.fleet.declare.len());
        Ok(self.fleet.declare.len())
    }

    fn delete_through(&mut self, seq: u64) {
        self.durable_seq = seq;
        self.deleted_seq = self.deleted_seq.max(seq);
        let now_us = self.fleet.now_us();
        let is_measured = !self.fleet.counters.is_warming_up.load(Relaxed);
        let (mut frames, mut acked) = (0, 0);
        let mut report = self.fleet.report();
        while let Some((_, since_us, readings)) = self
            .in_flight
            .pop_front_if(|(in_flight, ..)| *in_flight <= seq)
        {
            if is_measured {
                report.waited(Duration::from_micros(now_us.saturating_sub(since_us)));
            }
            frames += 1;
            acked += readings;
        }
        report.frames_acked += frames;
        report.readings_acked += acked;
        drop(report);
        self.fleet.counters.frames_acked.fetch_add(frames, Relaxed);
        self.fleet.counters.readings_acked.fetch_add(acked, Relaxed);
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        let mut report = self.fleet.report();
        report.frames_sent += self.sent.frames;
        report.readings_sent += self.sent.readings;
        report.bytes_sent += self.sent.bytes;
        report.frames_unacked += self.sent_seq.saturating_sub(self.deleted_seq);
    }
}
