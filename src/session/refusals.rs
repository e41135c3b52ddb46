//! Permanently refused frames: their space in quarantine, their rate, and their NACKs of class 3.
//!
//! Invariant: such a NACK is sent only after a receipt covers the number, because the device deletes
//! the frame when it receives the NACK.

use std::collections::VecDeque;
use std::sync::Arc;

use fieldgate_protocol::error::Code;

use super::Close;
use super::retry::retry_after_ms;
use crate::quota::quarantine::{Gauge, Reservation};
use crate::store::DeviceId;

/// Maximum number of refusals per connection within [`WINDOW_US`] (R64).
const MAX: usize = 8;
const WINDOW_US: u64 = 60_000_000;
const RETRY_AFTER_MS: u32 = 60_000;

pub(super) struct Refusals {
    quarantine: Arc<Gauge>,
    /// Since when quarantine is full for the expected frame.
    full_since_us: Option<u64>,
    /// Refusals to be sent once their numbers are durable.
    unsent: VecDeque<Refusal>,
    /// Times of the latest refusals, on the monotonic clock.
    recent_us: VecDeque<u64>,
    /// The latest number that had one wrong payload checksum on this connection.
    damaged_seq: Option<u64>,
}

/// A refused frame.
pub(super) struct Refusal {
    pub seq: u64,
    pub code: Code,
    pub detail: String,
}

impl Refusals {
    pub(super) fn new(quarantine: Arc<Gauge>) -> Refusals {
        Refusals {
            quarantine,
            full_since_us: None,
            unsent: VecDeque::new(),
            recent_us: VecDeque::new(),
            damaged_seq: None,
        }
    }

    /// Returns whether the expected frame is damaged for the second time, so that the link is not
    /// the cause (R63).
    pub(super) fn is_damaged_twice(&mut self, seq: u64) -> bool {
        self.damaged_seq.replace(seq) == Some(seq)
    }

    /// Counts a refusal and reserves its space. If quarantine is full, returns the time after which
    /// the device may resend the frame, in milliseconds.
    ///
    /// # Errors
    /// The connection had too many refusals.
    pub(super) fn reserve(
        &mut self,
        device: DeviceId,
        frame_bytes: usize,
        detail: &str,
        now_us: u64,
    ) -> Result<Result<Reservation, u32>, Close> {
        let since_us = now_us.saturating_sub(WINDOW_US);
        self.recent_us.retain(|at_us| *at_us >= since_us);
        if self.recent_us.len() == MAX {
            return Err(Close {
                code: Some(Code::Protocol),
                retry_after_ms: RETRY_AFTER_MS,
                detail: format!("too many refused frames, the latest: {detail}"),
            });
        }
        let Some(reservation) = self.quarantine.reserve(device, frame_bytes) else {
            let since_us = *self.full_since_us.get_or_insert(now_us);
            return Ok(Err(retry_after_ms(since_us, now_us, device.0)));
        };
        self.recent_us.push_back(now_us);
        Ok(Ok(reservation))
    }

    /// Records that the expected frame was accepted or refused.
    pub(super) fn end_wait(&mut self) {
        self.full_since_us = None;
    }

    /// Keeps a refusal until its number is durable.
    pub(super) fn push(&mut self, refusal: Refusal) {
        self.unsent.push_back(refusal);
    }

    /// Removes and returns the oldest refusal if its number is durable.
    pub(super) fn pop_durable(&mut self, durable_seq: u64) -> Option<Refusal> {
        self.unsent
            .pop_front_if(|refusal| refusal.seq <= durable_seq)
    }
}
