//! A device queue in memory, for tests.

use std::collections::BTreeMap;

use fieldgate_protocol::device::Queue;
use fieldgate_protocol::frame::NoRoom;

use super::{data, declare, message_frame};

/// Frames by number; records deletions.
#[derive(Clone, Debug)]
pub struct MemoryQueue {
    frames: BTreeMap<u64, Vec<u8>>,
    next_seq: u64,
    /// Highest number of a deletion.
    pub deleted_through: u64,
}

impl MemoryQueue {
    /// Creates a queue with DATA of these numbers.
    pub fn holding(oldest_seq: u64, next_seq: u64) -> MemoryQueue {
        MemoryQueue {
            frames: (oldest_seq..next_seq)
                .map(|seq| (seq, message_frame(&data(), seq)))
                .collect(),
            next_seq,
            deleted_through: 0,
        }
    }

    pub fn push(&mut self) {
        self.frames
            .insert(self.next_seq, message_frame(&data(), self.next_seq));
        self.next_seq += 1;
    }

    /// Simulates a full ring: numbers below `seq` are lost.
    pub fn overwrite_below(&mut self, seq: u64) {
        self.frames = self.frames.split_off(&seq);
    }

    pub fn held(&self) -> Vec<u64> {
        self.frames.keys().copied().collect()
    }
}

fn put(frame: &[u8], out: &mut [u8]) -> Result<usize, NoRoom> {
    out.get_mut(..frame.len())
        .ok_or(NoRoom)?
        .copy_from_slice(frame);
    Ok(frame.len())
}

impl Queue for MemoryQueue {
    fn oldest_seq(&self) -> u64 {
        self.frames.keys().next().copied().unwrap_or(self.next_seq)
    }

    fn next_seq(&self) -> u64 {
        self.next_seq
    }

    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        put(&self.frames[&seq], out)
    }

    fn write_declare(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        assert!(
            self.frames.contains_key(&seq),
            "requested the schema of a frame that is not in the queue"
        );
        put(&message_frame(&declare(), 0), out)
    }

    fn delete_through(&mut self, seq: u64) {
        self.deleted_through = self.deleted_through.max(seq);
        self.frames = self.frames.split_off(&(seq + 1));
    }
}
