//! The state after WELCOME: serves a device's stream, frame by frame (SPEC R44 to R76).
//!
//! A frame in order is decoded and submitted. A duplicate is acknowledged again. A frame that
//! cannot be decoded is submitted to quarantine under its number, so that one bad frame never
//! blocks a stream. [`Order`] judges the numbers.

use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate_protocol::error::{Code, Violation};
use fieldgate_protocol::frame::{Frame, VERSION, types};
use fieldgate_protocol::message::{Bye, Ping, Pong, decode, first_seq};

use super::clock::DeviceClock;
use super::order::{Order, Verdict};
use super::pacing::Pacing;
use super::refusals::{Refusal, Refusals};
use super::reply::Outbound;
use super::retry::retry_after_ms;
use super::schemas::Schemas;
use super::{Close, Step, Submission};
use crate::config::retention::Days;
use crate::decode::{Context, Read};
use crate::quota::device::DeviceQuota;
use crate::quota::quarantine::Gauge;
use crate::store::reuse::Repeat;
use crate::store::{Admission, Content, DeclareOutcome, DeviceId, Entry, Readings, Receipt};
use crate::time::{DAY_US, Now};

/// Time after the start of the gateway in which the machine may not have set its clock yet. With a clock that is far
/// ahead, all readings would be too old.
const CLOCK_UNCERTAIN_US: u64 = 600_000_000;

/// State of a stream.
pub(super) struct Stream {
    pub device: DeviceId,
    pub order: Order,
    pub pacing: Pacing,
    peer: SocketAddr,
    refusals: Refusals,
    schemas: Schemas,
    clock: DeviceClock,
    /// Readings that are older are not stored.
    retention: Days,
    /// Whether such readings were logged.
    has_old_readings: bool,
    /// Since when the store is unavailable.
    store_down_since_us: Option<u64>,
    /// Whether the device was asked to wait for the store.
    waits_for_store: bool,
}

impl Stream {
    pub(super) fn new(
        boot: u32,
        peer: SocketAddr,
        admission: Admission,
        window_frames: u64,
        quarantine: Arc<Gauge>,
        quota: Arc<DeviceQuota>,
        retention: Days,
    ) -> Stream {
        Stream {
            device: admission.device,
            pacing: Pacing::new(quota),
            peer,
            order: Order::new(admission.receipt, window_frames),
            refusals: Refusals::new(quarantine),
            schemas: Schemas::new(admission.schema),
            clock: DeviceClock::new(boot, admission.clocks),
            retention,
            has_old_readings: false,
            store_down_since_us: None,
            waits_for_store: false,
        }
    }

    /// Returns whether frames are accepted now.
    pub(super) fn wants_input(&self) -> bool {
        !self.schemas.awaits_outcome && self.pacing.until_us().is_none()
    }

    /// Returns whether all accepted frames are durable.
    pub(super) fn is_settled(&self) -> bool {
        !self.schemas.awaits_outcome && self.order.is_settled()
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
            let detail = "frame version was not negotiated";
            return Err(Close::bye(Code::Version, detail));
        }
        if types::is_sequenced(header.frame_type) {
            return self.handle_sequenced(frame, now, outbound);
        }
        if header.seq != 0 {
            let detail = "nonzero seq in an unsequenced frame (R12)";
            return Err(Close::bye(Code::Protocol, detail));
        }
        if !frame.intact {
            self.refuse_damaged_unsequenced(outbound);
            return Ok(None);
        }
        if header.flags != 0 {
            return Err(protocol(Violation::Flags(header.flags)));
        }
        match header.frame_type {
            types::DECLARE => {
                let declare = self.schemas.declare(self.device, frame.payload());
                Ok(Some(Submission::Declare(declare.map_err(protocol)?)))
            }
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
        self.order.write_due_ack(outbound);
        let detail = "payload checksum wrong";
        outbound.nack(Code::PayloadCrc, 0, self.order.expected_seq, 0, detail);
    }

    /// Handles the outcome of a DECLARE. Returns an event for the operator on the first refusal of a
    /// session, unless the device had many recently. The device cannot fix the cause by itself.
    pub(super) fn handle_declare_outcome(
        &mut self,
        outcome: DeclareOutcome,
        now: Now,
        outbound: &mut Outbound,
    ) -> Option<(Code, String)> {
        let (code, detail) = self.schemas.handle_outcome(outcome)?;
        outbound.nack(code, 0, self.order.expected_seq, 0, &detail);
        let is_first = !std::mem::replace(&mut self.schemas.had_refusal, true);
        let is_notified = is_first && self.pacing.quota.may_report(now.mono_us);
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
        let better = self.clock.handle_ping(&ping, now);
        Ok(better.map(|better| Submission::Clock(self.device, better)))
    }

    /// Checks in the order of R44: number, credit, order, then content.
    fn handle_sequenced(&mut self, frame: &Frame<'_>, now: Now, outbound: &mut Outbound) -> Step {
        let (first_seq, seq) = (first_seq(frame), frame.header.seq);
        let verdict = self.order.judge(first_seq, seq)?;
        match verdict {
            Verdict::Repeated => {
                self.order.ack_is_due |= seq <= self.order.durable_seq();
                return Ok(self.repeat(frame, now));
            }
            Verdict::Early => self.order.ask_for_missing(seq, outbound),
            Verdict::Taken | Verdict::Next => {
                self.order.end_wait();
                if let Some(since_us) = self.store_down_since_us {
                    self.wait_for_store(seq, since_us, now, outbound);
                } else if verdict == Verdict::Taken {
                    self.order.accept(seq);
                } else {
                    return self.handle_next(frame, first_seq, now, outbound);
                }
            }
        }
        Ok(None)
    }

    /// Returns a submission that compares a frame with the content already accepted or stored under
    /// its number.
    fn repeat(&self, frame: &Frame<'_>, now: Now) -> Option<Submission> {
        // A gap is reduced to numbers that were not durable.
        if !frame.intact || frame.header.frame_type == types::GAP {
            return None;
        }
        Some(Submission::Repeat(Repeat {
            device: self.device,
            stream: self.order.durable.stream(),
            seq: frame.header.seq,
            crc: frame.crc(),
            at_us: now.utc_us,
        }))
    }

    fn wait_for_store(&mut self, seq: u64, since_us: u64, now: Now, outbound: &mut Outbound) {
        self.waits_for_store = true;
        let retry_after_ms = retry_after_ms(since_us, now.mono_us, self.device.0);
        let detail = "the store is unavailable";
        self.order
            .ask(Code::StoreDown, seq, retry_after_ms, detail, outbound);
    }

    /// Handles the expected frame. Asks the device to resend a damaged payload, unless it is damaged
    /// for the second time.
    fn handle_next(
        &mut self,
        frame: &Frame<'_>,
        first_seq: u64,
        now: Now,
        outbound: &mut Outbound,
    ) -> Step {
        let seq = frame.header.seq;
        if !frame.intact {
            if self.refusals.is_damaged_twice(seq) {
                let detail = "payload checksum wrong twice".to_owned();
                return self.refuse(frame, Code::PayloadCrcTwice, detail, now, outbound);
            }
            let detail = "payload checksum wrong";
            self.order.ask(Code::PayloadCrc, seq, 0, detail, outbound);
            return Ok(None);
        }
        match self.read_content(frame, now) {
            Ok(Some((mut content, stamp))) => {
                if let Content::Readings(readings) = &mut content {
                    self.leave_out_old(readings, now);
                }
                let mut entry = self.entry(frame, first_seq, content, now);
                if let Some(stamp) = stamp {
                    self.clock.known.advance(&stamp);
                    entry.clock = stamp.chosen;
                }
                Ok(Some(Submission::Entry(entry)))
            }
            Ok(None) => {
                let detail = "declare the schema";
                self.order
                    .ask(Code::UnknownSchema, seq, 0, detail, outbound);
                Ok(None)
            }
            Err(violation) => {
                let (code, detail) = (violation.code(), violation.to_string());
                self.refuse(frame, code, detail, now, outbound)
            }
        }
    }

    /// Leaves out readings that are older than the longest retention of the device's series. Those of series with a
    /// shorter retention are stored, and deleted later.
    fn leave_out_old(&mut self, readings: &mut Readings, now: Now) {
        let Some(days) = self.retention else {
            return;
        };
        if now.mono_us < CLOCK_UNCERTAIN_US {
            return;
        }
        readings.leave_out_before(now.utc_us.saturating_sub(i64::from(days) * DAY_US));
        if readings.too_old > 0 && !std::mem::replace(&mut self.has_old_readings, true) {
            let device = self.device.0;
            tracing::info!(
                device,
                days,
                "readings older than their retention are not stored"
            );
        }
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
        let (seq, bytes) = (frame.header.seq, frame.bytes);
        let (device, now_us) = (self.device, now.mono_us);
        let reserved = self
            .refusals
            .reserve(device, bytes.len(), &detail, now_us)?;
        let reservation = match reserved {
            Ok(reservation) => reservation,
            Err(retry_after_ms) => {
                let code = Code::QuarantineFull;
                self.order.ask(code, seq, retry_after_ms, &detail, outbound);
                return Ok(None);
            }
        };
        tracing::info!(device = device.0, seq, code = code as u8, %detail, "frame quarantined");
        self.refusals.push(Refusal {
            seq,
            code,
            detail: detail.clone(),
        });
        let content = Content::Quarantined {
            code: code as u8,
            detail,
            bytes: bytes.to_vec(),
            peer: self.peer.to_string(),
        };
        let entry = self.entry(frame, self.order.expected_seq, content, now);
        Ok(Some(Submission::Quarantine(entry, reservation)))
    }

    /// Returns the submission for an accepted frame.
    fn entry(&mut self, frame: &Frame<'_>, first_seq: u64, content: Content, now: Now) -> Entry {
        let seq = frame.header.seq;
        self.order.accept(seq);
        self.refusals.end_wait();
        Entry {
            device: self.device,
            stream: self.order.durable.stream(),
            first_seq,
            seq,
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
            clocks: &self.clock.known,
            received_at_us: now.utc_us,
            origin: now.origin,
        };
        context.read(frame, |schema| self.schemas.find(schema))
    }

    pub(super) fn handle_receipt(
        &mut self,
        receipt: Receipt,
        through_seq: u64,
        outbound: &mut Outbound,
    ) {
        self.order.handle_receipt(receipt);
        let expected_seq = self.order.expected_seq;
        while let Some(refusal) = self.refusals.pop_durable(self.order.durable_seq()) {
            let Refusal { seq, code, detail } = refusal;
            outbound.nack(code, seq, expected_seq, 0, &detail);
        }
        if receipt.durable_seq() < through_seq {
            self.order.rewind_lost();
            self.order.ask_for_missing(through_seq, outbound);
        }
    }

    /// Handles an outage of the store: accepted frames may still be committed, but the device
    /// resends them anyway (R65).
    pub(super) fn handle_store_down(&mut self, now: Now, outbound: &mut Outbound) {
        let since_us = *self.store_down_since_us.get_or_insert(now.mono_us);
        if !self.is_settled() {
            self.order.rewind();
            self.wait_for_store(self.order.expected_seq, since_us, now, outbound);
        }
    }

    /// Ends the wait of a device that was asked to wait for the store: sends an ACK, even without a
    /// new number (R88).
    pub(super) fn handle_store_up(&mut self) {
        self.store_down_since_us = None;
        self.order.ack_is_due |= std::mem::take(&mut self.waits_for_store);
    }
}

fn protocol(violation: Violation) -> Close {
    Close::bye(Code::Protocol, violation.to_string())
}
