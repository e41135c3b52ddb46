//! The position of a session in its stream: judges the numbers of frames, and asks the device to
//! resend missing ones (SPEC R44, R60 to R66).
//!
//! Invariants
//! - `expected_seq` is one more than the last submitted or durable number, whichever is greater.
//!   When the store becomes unavailable, it falls to one more than the durable number, below
//!   `taken_through`. When a receipt shows that submitted frames were not stored, both fall.
//! - An accepted frame is submitted once: a frame is not checked again while its number may still
//!   be committed.

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::SEQ_MAX;

use super::Close;
use super::reply::Outbound;
use crate::store::Receipt;

pub(super) struct Order {
    /// The receipt with the highest number.
    pub durable: Receipt,
    /// The number that the next accepted frame begins with or covers.
    pub expected_seq: u64,
    /// Whether an ACK is sent before the next wait, even without a new number.
    pub ack_is_due: bool,
    window_frames: u64,
    /// The highest number submitted.
    taken_through: u64,
    /// After a NACK of class 1 or 2: frames are dropped until `expected_seq` arrives (R62).
    awaits_resend: bool,
}

/// Meaning of a frame's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was accepted before.
    Repeated,
    /// Frames before it are missing.
    Early,
    /// It is a duplicate that was in flight when the store became unavailable (R65).
    Taken,
    /// It is the expected one.
    Next,
}

impl Order {
    pub(super) fn new(durable: Receipt, window_frames: u64) -> Order {
        Order {
            durable,
            expected_seq: durable.durable_seq() + 1,
            ack_is_due: false,
            window_frames,
            taken_through: 0,
            awaits_resend: false,
        }
    }

    pub(super) fn durable_seq(&self) -> u64 {
        self.durable.durable_seq()
    }

    /// Returns whether all accepted frames are durable.
    pub(super) fn is_settled(&self) -> bool {
        self.durable_seq() + 1 >= self.expected_seq
    }

    /// Judges a frame that covers the numbers from `first_seq` to `seq`: number, then credit, then
    /// order.
    pub(super) fn judge(&self, first_seq: u64, seq: u64) -> Result<Verdict, Close> {
        if !(1..=SEQ_MAX).contains(&seq) {
            let detail = "sequence number out of range (R12)";
            return Err(Close::bye(Code::Protocol, detail));
        }
        if first_seq > self.durable_seq() + self.window_frames {
            return Err(Close::bye(Code::Credit, "frame beyond limit_seq"));
        }
        Ok(if seq < self.expected_seq {
            Verdict::Repeated
        } else if first_seq > self.expected_seq {
            Verdict::Early
        } else if seq <= self.taken_through {
            Verdict::Taken
        } else {
            Verdict::Next
        })
    }

    /// Ends the wait for `expected_seq`: it has arrived.
    pub(super) fn end_wait(&mut self) {
        self.awaits_resend = false;
    }

    /// Accepts the frame that ends with `seq`.
    pub(super) fn accept(&mut self, seq: u64) {
        self.expected_seq = seq + 1;
        self.taken_through = self.taken_through.max(seq);
    }

    /// Handles a commit; the numbers of entries of earlier sessions may be higher than this session
    /// knows.
    pub(super) fn handle_receipt(&mut self, receipt: Receipt) {
        if receipt.durable_seq() > self.durable_seq() {
            self.durable = receipt;
        }
        self.expected_seq = self.expected_seq.max(self.durable_seq() + 1);
        self.ack_is_due = true;
    }

    /// Expects the frames after the durable number again. Submitted ones may still be committed.
    pub(super) fn rewind(&mut self) {
        self.expected_seq = self.durable_seq() + 1;
        // Any earlier request concerned a number after this one.
        self.awaits_resend = false;
    }

    /// Expects the frames after the durable number again: submitted ones were not stored.
    pub(super) fn rewind_lost(&mut self) {
        self.rewind();
        self.taken_through = self.durable_seq();
    }

    /// Asks for `expected_seq` once; frames in flight are dropped until it arrives.
    pub(super) fn ask(
        &mut self,
        code: Code,
        seq: u64,
        retry_after_ms: u32,
        detail: &str,
        outbound: &mut Outbound,
    ) {
        if !self.awaits_resend {
            self.awaits_resend = true;
            // `expected_seq` may depend on a receipt that has not been sent to the device yet.
            self.write_due_ack(outbound);
            outbound.nack(code, seq, self.expected_seq, retry_after_ms, detail);
        }
    }

    pub(super) fn ask_for_missing(&mut self, seq: u64, outbound: &mut Outbound) {
        let detail = "frames before this one are missing";
        self.ask(Code::SeqGap, seq, 0, detail, outbound);
    }

    /// Writes one ACK per commit, however many frames it covers.
    pub(super) fn write_due_ack(&mut self, outbound: &mut Outbound) {
        if std::mem::take(&mut self.ack_is_due) {
            outbound.ack(self.durable, self.window_frames);
        }
    }
}
