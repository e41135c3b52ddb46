//! The state after WELCOME: serves a device's stream, frame by frame (SPEC R44 to R76).
//!
//! A frame in order is decoded and submitted. A duplicate is acknowledged again. A frame that
//! cannot be decoded is submitted to quarantine under its number, so that one bad frame never
//! blocks a stream.
//!
//! Invariants
//! - `expected_seq` is one more than the last submitted or durable number, whichever is greater.
//!   When the store becomes unavailable, it falls to one more than the durable number, below
//!   `taken_through`. When a receipt shows that submitted frames were not stored, both fall.
//! - An accepted frame is submitted once: a frame is not checked again while its number may still
//!   be committed.
//! - A NACK of class 3 is sent only after a receipt covers the number, because the device deletes
//!   the frame when it receives the NACK.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate_protocol::auth::schema_hash;
use fieldgate_protocol::error::{Code, Violation};
use fieldgate_protocol::frame::{Frame, SEQ_MAX, VERSION, types};
use fieldgate_protocol::message::{Bye, Declare, Ping, Pong, decode, first_seq};

use super::reply::Outbound;
use super::retry::retry_after_ms;
use super::{Close, Step, Submission};
use crate::decode::{Context, Read};
use crate::quota::device::DeviceQuota;
use crate::quota::quarantine::Gauge;
use crate::store::reuse::Repeat;
use crate::store::{
    self, Admission, Content, DeclareOutcome, DeclaredChannel, DeviceId, Entry, Receipt, Schema,
};
use crate::time::{BootClock, BootClocks, Now};

/// Maximum number of schemas kept per session. For DATA with an older one, the device is asked to
/// declare it again (R47).
const SCHEMAS_MAX: usize = 8;
/// Maximum number of class 3 NACKs per connection within [`REFUSALS_WINDOW_US`] (R64).
const REFUSALS_MAX: usize = 8;
const REFUSALS_WINDOW_US: u64 = 60_000_000;
const REFUSALS_RETRY_AFTER_MS: u32 = 60_000;

/// State of a stream.
pub(super) struct Stream {
    boot: u32,
    peer: SocketAddr,
    device: DeviceId,
    durable: Receipt,
    window_frames: u64,
    quarantine: Arc<Gauge>,
    expected_seq: u64,
    /// The highest number submitted.
    taken_through: u64,
    /// After a NACK of class 1 or 2: frames are dropped until `expected_seq` arrives (R62).
    awaits_resend: bool,
    awaits_declare: bool,
    /// Whether a DECLARE was refused in this session.
    had_conflict: bool,
    /// Since when the store is unavailable.
    store_down_since_us: Option<u64>,
    /// Whether the device was asked to wait for the store.
    waits_for_store: bool,
    /// Since when quarantine is full for the expected frame.
    quarantine_full_since_us: Option<u64>,
    ack_is_due: bool,
    /// The latest number that had one wrong payload checksum on this connection.
    crc_failed_seq: Option<u64>,
    /// Refusals to be sent once their numbers are durable.
    refusals: VecDeque<Refusal>,
    /// Times of the latest refusals, on the monotonic clock.
    refused_at_us: VecDeque<u64>,
    schemas: VecDeque<Arc<Schema>>,
    clocks: BootClocks,
    /// The latest PONG: its UTC, and the time it was sent on the monotonic clock.
    pong: Option<(i64, u64)>,
    quota: Arc<DeviceQuota>,
    paced_until_us: Option<u64>,
}

impl Stream {
    pub(super) fn new(
        boot: u32,
        peer: SocketAddr,
        admission: Admission,
        window_frames: u64,
        quarantine: Arc<Gauge>,
        quota: Arc<DeviceQuota>,
    ) -> Stream {
        Stream {
            boot,
            peer,
            device: admission.device,
            durable: admission.receipt,
            window_frames,
            quarantine,
            expected_seq: admission.receipt.durable_seq() + 1,
            taken_through: 0,
            awaits_resend: false,
            awaits_declare: false,
            had_conflict: false,
            store_down_since_us: None,
            waits_for_store: false,
            quarantine_full_since_us: None,
            ack_is_due: false,
            crc_failed_seq: None,
            refusals: VecDeque::new(),
            refused_at_us: VecDeque::new(),
            schemas: admission.schema.into_iter().collect(),
            clocks: BootClocks::new(admission.clocks).of_session(boot),
            pong: None,
            quota,
            paced_until_us: None,
        }
    }

    /// Counts a login or a frame, and the readings of an accepted submission. Over either rate, the
    /// session pauses input for a while.
    pub(super) fn pace(&mut self, taken: Option<&Submission>, now: Now) {
        let readings = match taken {
            Some(Submission::Entry(Entry {
                content: Content::Readings(readings),
                ..
            })) => readings.values.len() as u64,
            _ => 0,
        };
        let next_us = self.quota.consume(1, readings, now.mono_us);
        self.paced_until_us = (next_us > now.mono_us).then_some(next_us);
    }

    /// Returns the time when input resumes if the device is over its rate.
    pub(super) fn paced_until_us(&self) -> Option<u64> {
        self.paced_until_us
    }

    /// Resumes input if it is time; returns whether it did.
    pub(super) fn end_pace(&mut self, now: Now) -> bool {
        let is_over = self
            .paced_until_us
            .is_some_and(|until_us| now.mono_us >= until_us);
        if is_over {
            self.paced_until_us = None;
        }
        is_over
    }

    pub(super) fn device(&self) -> DeviceId {
        self.device
    }

    pub(super) fn awaits_declare(&self) -> bool {
        self.awaits_declare
    }

    /// Returns whether all accepted frames are durable.
    pub(super) fn is_settled(&self) -> bool {
        !self.awaits_declare && self.durable.durable_seq() + 1 >= self.expected_seq
    }

    pub(super) fn handle_frame(
        &mut self,
        frame: &Frame<'_>,
        now: Now,
        outbound: &mut Outbound,
    ) -> Step {
        let header = frame.header;
        // Skip an intact frame. If it is damaged, no header field counts (R101).
        if types::is_skippable(header.frame_type) {
            self.refuse_damaged_unsequenced(outbound);
            return Ok(None);
        }
        if !(1..=VERSION).contains(&header.version) {
            return Err(Close::bye(
                Code::Version,
                "frame version was not negotiated",
            ));
        }
        if types::is_sequenced(header.frame_type) {
            return self.handle_sequenced(frame, now, outbound);
        }
        if header.seq != 0 {
            return Err(Close::bye(
                Code::Protocol,
                "nonzero seq in an unsequenced frame (R12)",
            ));
        }
        if !frame.intact {
            self.refuse_damaged_unsequenced(outbound);
            return Ok(None);
        }
        if header.flags != 0 {
            return Err(protocol(Violation::Flags(header.flags)));
        }
        match header.frame_type {
            types::DECLARE => self.handle_declare(frame),
            types::PING => self.handle_ping(frame, now, outbound),
            types::BYE => {
                let bye: Bye<'_> = decode(frame.payload()).map_err(protocol)?;
                Err(Close::silent(format!(
                    "device disconnected: {} {}",
                    bye.code, bye.detail
                )))
            }
            other => {
                let detail = format!("type {other:#04x} is not allowed here");
                Err(Close::bye(Code::Protocol, detail))
            }
        }
    }

    /// Rejects a damaged unsequenced frame with NACK 22, without other effects (R108).
    fn refuse_damaged_unsequenced(&mut self, outbound: &mut Outbound) {
        self.write_due_ack(outbound);
        let detail = "payload checksum wrong";
        outbound.nack(Code::PayloadCrc, 0, self.expected_seq, 0, detail);
    }

    fn handle_declare(&mut self, frame: &Frame<'_>) -> Step {
        let declare: Declare<'_> = decode(frame.payload()).map_err(protocol)?;
        self.awaits_declare = true;
        Ok(Some(Submission::Declare(store::Declare {
            device: self.device,
            schema: declare.schema,
            hash: schema_hash(frame.payload()),
            channels: declare.channels.iter().map(declared).collect(),
        })))
    }

    /// Handles the outcome of a DECLARE. Returns an event for the operator on the first refusal of
    /// a session, unless the device had many recently: the device cannot fix it by itself.
    pub(super) fn handle_declare_outcome(
        &mut self,
        outcome: DeclareOutcome,
        now: Now,
        outbound: &mut Outbound,
    ) -> Option<(Code, String)> {
        self.awaits_declare = false;
        let (code, detail) = match outcome {
            DeclareOutcome::Accepted(schema) => {
                self.schemas.retain(|known| known.schema != schema.schema);
                if self.schemas.len() == SCHEMAS_MAX {
                    self.schemas.pop_front();
                }
                self.schemas.push_back(schema);
                return None;
            }
            DeclareOutcome::Conflict => {
                let detail = "schema number is used for different content; the firmware must use another number";
                (Code::SchemaConflict, detail.to_owned())
            }
            DeclareOutcome::OverBound(reached) => (Code::SchemaBound, reached.to_string()),
        };
        outbound.nack(code, 0, self.expected_seq, 0, &detail);
        let is_first = !std::mem::replace(&mut self.had_conflict, true);
        let is_notified = is_first && self.quota.may_report(now.mono_us);
        if is_notified {
            let code = code as u8;
            tracing::info!(device = self.device.0, code, %detail, "DECLARE refused");
        }
        is_notified.then_some((code, detail))
    }

    fn handle_ping(&mut self, frame: &Frame<'_>, now: Now, outbound: &mut Outbound) -> Step {
        let ping: Ping<'_> = decode(frame.payload()).map_err(protocol)?;
        outbound.pong(&Pong {
            mono_us: ping.mono_us,
            received_us: now.utc_us,
            sent_us: now.utc_us,
            ext: &[],
        });
        let pong = self.pong.replace((now.utc_us, now.mono_us));
        if ping.pong_sent_us == 0 {
            return Ok(None);
        }
        // The wall clock may have been set during the round trip.
        let elapsed_us = match pong {
            Some((utc_us, mono_us)) if utc_us == ping.pong_sent_us => {
                now.mono_us.saturating_sub(mono_us) as i64
            }
            _ => now.utc_us.saturating_sub(ping.pong_sent_us),
        };
        let (pong_mono_us, mono_us) = (ping.pong_mono_us, ping.mono_us);
        let measured = BootClock::measure(self.boot, elapsed_us, pong_mono_us, mono_us, now);
        let better = measured.and_then(|measured| self.clocks.improve(measured));
        Ok(better.map(|better| Submission::Clock(self.device, better)))
    }

    /// Checks in the order of R44: number, credit, order, then content.
    fn handle_sequenced(&mut self, frame: &Frame<'_>, now: Now, outbound: &mut Outbound) -> Step {
        let seq = frame.header.seq;
        if !(1..=SEQ_MAX).contains(&seq) {
            return Err(Close::bye(
                Code::Protocol,
                "sequence number out of range (R12)",
            ));
        }
        let first_seq = first_seq(frame);
        if first_seq > self.durable.durable_seq() + self.window_frames {
            return Err(Close::bye(Code::Credit, "frame beyond limit_seq"));
        }
        if seq < self.expected_seq {
            self.ack_is_due |= seq <= self.durable.durable_seq();
            return Ok(self.repeat(frame, now));
        }
        if first_seq > self.expected_seq {
            self.ask_for(
                Code::SeqGap,
                seq,
                0,
                "frames before this one are missing",
                outbound,
            );
            return Ok(None);
        }
        if let Some(since_us) = self.store_down_since_us {
            self.awaits_resend = false;
            self.wait_for_store(seq, since_us, now, outbound);
            return Ok(None);
        }
        if seq <= self.taken_through {
            // A duplicate that was in flight when the store became unavailable (R65).
            self.awaits_resend = false;
            self.expected_seq = seq + 1;
            return Ok(None);
        }
        if !frame.intact {
            return self.handle_damaged(frame, now, outbound);
        }
        self.awaits_resend = false;
        match self.read_content(frame, now) {
            Ok(Some((content, stamp))) => {
                let mut entry = self.entry(frame, first_seq, content, now);
                if let Some(stamp) = stamp {
                    self.clocks.advance(&stamp);
                    entry.clock = stamp.chosen;
                }
                Ok(Some(Submission::Entry(entry)))
            }
            Ok(None) => {
                self.ask_for(Code::UnknownSchema, seq, 0, "declare the schema", outbound);
                Ok(None)
            }
            Err(violation) => {
                let (code, detail) = (violation.code(), violation.to_string());
                self.refuse(frame, code, detail, now, outbound)
            }
        }
    }

    /// Returns a submission to compare a frame with the content accepted or stored under its number
    /// before.
    fn repeat(&self, frame: &Frame<'_>, now: Now) -> Option<Submission> {
        // A gap is reduced to numbers that were not durable.
        if !frame.intact || frame.header.frame_type == types::GAP {
            return None;
        }
        Some(Submission::Repeat(Repeat {
            device: self.device,
            stream: self.durable.stream(),
            seq: frame.header.seq,
            crc: frame.crc(),
            at_us: now.utc_us,
        }))
    }

    /// Asks for `expected_seq` once; frames in flight are dropped until it arrives.
    fn ask_for(
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

    fn wait_for_store(&mut self, seq: u64, since_us: u64, now: Now, outbound: &mut Outbound) {
        self.waits_for_store = true;
        let retry_after_ms = retry_after_ms(since_us, now.mono_us, self.device.0);
        let detail = "the store is unavailable";
        self.ask_for(Code::StoreDown, seq, retry_after_ms, detail, outbound);
    }

    /// Asks for a damaged payload again. If it is damaged twice, the link is not the cause (R63).
    fn handle_damaged(&mut self, frame: &Frame<'_>, now: Now, outbound: &mut Outbound) -> Step {
        let seq = frame.header.seq;
        self.awaits_resend = false;
        if self.crc_failed_seq == Some(seq) {
            let detail = "payload checksum wrong twice".to_owned();
            return self.refuse(frame, Code::PayloadCrcTwice, detail, now, outbound);
        }
        self.crc_failed_seq = Some(seq);
        self.ask_for(Code::PayloadCrc, seq, 0, "payload checksum wrong", outbound);
        Ok(None)
    }

    /// Submits the frame to quarantine under its number; the device receives a NACK once it is
    /// durable. If quarantine is full, the frame stays on the device, which resends it later.
    fn refuse(
        &mut self,
        frame: &Frame<'_>,
        code: Code,
        detail: String,
        now: Now,
        outbound: &mut Outbound,
    ) -> Step {
        let since_us = now.mono_us.saturating_sub(REFUSALS_WINDOW_US);
        self.refused_at_us.retain(|at_us| *at_us >= since_us);
        if self.refused_at_us.len() == REFUSALS_MAX {
            return Err(Close {
                code: Some(Code::Protocol),
                retry_after_ms: REFUSALS_RETRY_AFTER_MS,
                detail: format!("too many refused frames, the latest: {detail}"),
            });
        }
        let seq = frame.header.seq;
        let Some(reservation) = self.quarantine.reserve(self.device, frame.bytes.len()) else {
            let since_us = *self.quarantine_full_since_us.get_or_insert(now.mono_us);
            let retry_after_ms = retry_after_ms(since_us, now.mono_us, self.device.0);
            self.ask_for(Code::QuarantineFull, seq, retry_after_ms, &detail, outbound);
            return Ok(None);
        };
        self.refused_at_us.push_back(now.mono_us);
        tracing::info!(device = self.device.0, seq, code = code as u8, %detail, "frame quarantined");
        self.refusals.push_back(Refusal {
            seq,
            code,
            detail: detail.clone(),
        });
        let content = Content::Quarantined {
            code: code as u8,
            detail,
            bytes: frame.bytes.to_vec(),
            peer: self.peer.to_string(),
        };
        let entry = self.entry(frame, self.expected_seq, content, now);
        Ok(Some(Submission::Quarantine(entry, reservation)))
    }

    /// Returns the submission for an accepted frame.
    fn entry(&mut self, frame: &Frame<'_>, first_seq: u64, content: Content, now: Now) -> Entry {
        self.expected_seq = frame.header.seq + 1;
        self.taken_through = frame.header.seq;
        self.quarantine_full_since_us = None;
        Entry {
            device: self.device,
            stream: self.durable.stream(),
            first_seq,
            seq: frame.header.seq,
            frame_type: frame.header.frame_type,
            crc: Some(frame.crc()),
            received_at_us: now.utc_us,
            content,
            clock: None,
        }
    }

    /// Decodes an intact frame; returns `None` if its schema is unknown.
    fn read_content(&self, frame: &Frame<'_>, now: Now) -> Result<Option<Read>, Violation> {
        let context = Context {
            clocks: &self.clocks,
            received_at_us: now.utc_us,
            origin: now.origin,
        };
        context.read(frame, |schema| {
            let known = self.schemas.iter().find(|known| known.schema == schema);
            known.map(Arc::as_ref)
        })
    }

    pub(super) fn handle_receipt(
        &mut self,
        receipt: Receipt,
        through_seq: u64,
        outbound: &mut Outbound,
    ) {
        if receipt.durable_seq() > self.durable.durable_seq() {
            self.durable = receipt;
        }
        let durable_seq = self.durable.durable_seq();
        // Entries of an earlier session may have advanced the stream further than this session
        // knows.
        self.expected_seq = self.expected_seq.max(durable_seq + 1);
        while let Some(refusal) = self
            .refusals
            .pop_front_if(|refusal| refusal.seq <= durable_seq)
        {
            let Refusal { seq, code, detail } = refusal;
            outbound.nack(code, seq, self.expected_seq, 0, &detail);
        }
        self.ack_is_due = true;
        if receipt.durable_seq() < through_seq {
            self.expected_seq = durable_seq + 1;
            self.taken_through = durable_seq;
            // Any earlier request concerned a number after this one.
            self.awaits_resend = false;
            self.ask_for(
                Code::SeqGap,
                through_seq,
                0,
                "frames before this one are missing",
                outbound,
            );
        }
    }

    /// Handles an outage of the store: accepted frames may still be committed, but the device
    /// resends them anyway (R65).
    pub(super) fn handle_store_down(&mut self, now: Now, outbound: &mut Outbound) {
        let since_us = *self.store_down_since_us.get_or_insert(now.mono_us);
        if !self.is_settled() {
            self.expected_seq = self.durable.durable_seq() + 1;
            self.awaits_resend = false;
            self.wait_for_store(self.expected_seq, since_us, now, outbound);
        }
    }

    /// Ends the wait of a device that was asked to wait for the store: sends an ACK, even without a
    /// new number (R88).
    pub(super) fn handle_store_up(&mut self) {
        self.store_down_since_us = None;
        self.ack_is_due |= std::mem::take(&mut self.waits_for_store);
    }

    /// Cancels a due ACK: durable frames may be lost, so nothing more is acknowledged.
    pub(super) fn forget_due_ack(&mut self) {
        self.ack_is_due = false;
    }

    /// Writes one ACK per commit, however many frames it covers.
    pub(super) fn write_due_ack(&mut self, outbound: &mut Outbound) {
        if std::mem::take(&mut self.ack_is_due) {
            outbound.ack(self.durable, self.window_frames);
        }
    }
}

/// A class 3 NACK whose number is not durable yet.
struct Refusal {
    seq: u64,
    code: Code,
    detail: String,
}

fn declared(channel: &fieldgate_protocol::message::Channel<'_>) -> DeclaredChannel {
    DeclaredChannel {
        id: channel.id,
        name: channel.name.to_owned(),
        unit: channel.unit.to_owned(),
        kind: channel.kind,
        exp10: channel.exp10,
    }
}

fn protocol(violation: Violation) -> Close {
    Close::bye(Code::Protocol, violation.to_string())
}
