//! A device's queue, regenerated from the script whenever it is needed, so that it uses no memory.

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
    /// Buffers for generating a frame; a device needs them only briefly.
    static WORKBENCH: std::cell::RefCell<Workbench> = std::cell::RefCell::default();
}

/// The queue of one device.
pub(super) struct Outbox {
    pub(super) fleet: Arc<Fleet>,
    pub(super) script: DeviceScript,
    /// The last durable frame according to the gateway's latest message.
    pub(super) durable_seq: u64,
    /// The last frame that was ever acknowledged: the device has deleted its frames up to this one.
    pub(super) deleted_seq: u64,
    /// The last frame that is due.
    due_seq: u64,
    /// The last frame that was sent, on any connection.
    sent_seq: u64,
    /// For each unacknowledged frame: its number, the start of its wait, and its number of readings.
    in_flight: VecDeque<(u64, u64, u64)>,
    /// Counts that are added to the fleet's at the end, because that takes a lock and there are many frames.
    sent: Sent,
}

/// Counts of what a device has sent.
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

    /// Advances `due_seq`; returns when the next frame will be due.
    pub(super) fn advance(&mut self, now_us: u64) -> Option<u64> {
        if self.fleet.terms.is_silent {
            return None;
        }
        let last = self.script.frames().unwrap_or(u64::MAX);
        // A device in a burst always has more frames than its window allows.
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

    /// Returns whether everything that will ever be due is acknowledged.
    pub(super) fn is_done(&self) -> bool {
        let last = self.script.frames().unwrap_or(u64::MAX);
        let end = if self.fleet.stop.is_cancelled() {
            self.sent_seq
        } else {
            last
        };
        self.durable_seq >= end
    }

    /// Returns whether everything sent is acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.durable_seq >= self.sent_seq
    }

    /// Counts the bytes sent.
    pub(super) fn note_bytes(&mut self, bytes: usize) {
        self.sent.bytes += bytes as u64;
    }

    /// Writes frame `seq`; returns its length and its number of readings to be stored.
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
            // A frame's wait starts when it is due, not when the device gets to it. In a burst
            // everything is due from the start, and the gateway's time alone is measured.
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
