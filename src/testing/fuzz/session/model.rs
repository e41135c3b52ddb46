//! Reference model of a session, as specified in sections 5, 6, 11 and 12 of `protocol/SPEC.md`, against which the
//! session is checked.

use std::sync::Arc;

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{Frame, SEQ_MAX, VERSION, types};
use fieldgate_protocol::message::{Bye, Declare, Hello, Ping, decode};

use super::accepted::{Accepted, Made, made, refused};
use super::device::KNOWN;
use crate::quota::device::{DeviceQuota, DeviceQuotas};
use crate::session::SessionSettings;
use crate::session::retry::retry_after_ms;
use crate::store::{Admission, DeclareOutcome, DeviceEventKind, Schema};
use crate::time::Now;

const SCHEMAS_MAX: usize = 8;
const REFUSALS_MAX: usize = 8;
const REFUSALS_WINDOW_US: u64 = 60_000_000;
const REFUSALS_RETRY_AFTER_MS: u32 = 60_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Challenge,
    Welcome {
        durable_seq: u64,
        schema_known: bool,
    },
    Ack {
        seq: u64,
    },
    Nack {
        code: u8,
        seq: u64,
        expected_seq: u64,
        retry_after_ms: u32,
    },
    Pong {
        mono_us: u64,
    },
    Bye {
        code: u8,
        retry_after_ms: u32,
    },
}

/// Required submission.
#[derive(Debug)]
pub(super) enum Submits {
    Nothing,
    Login,
    /// With the payload of the frame.
    Declare(Vec<u8>),
    Clock,
    Repeat {
        seq: u64,
        crc: u32,
    },
    /// With its code.
    Event(DeviceEventKind, u8),
    Accepted(Accepted),
    Refused(Accepted),
}

enum Phase {
    AwaitHello,
    /// With the index in [`KNOWN`] of the device that can prove its key.
    AwaitAuth(Option<usize>),
    AwaitAdmission(usize),
    Serving(Box<Serving>),
    /// With the code of BYE, if one was sent.
    Closed(Option<u8>),
}

struct Serving {
    durable_seq: u64,
    expected_seq: u64,
    taken_through: u64,
    is_dropping: bool,
    is_declaring: bool,
    store_down_since_us: Option<u64>,
    waits_for_store: bool,
    quarantine_full_since_us: Option<u64>,
    device: i64,
    is_ack_due: bool,
    damaged_seq: Option<u64>,
    refusals: Vec<(u64, Code)>,
    refused_at_us: Vec<u64>,
    schemas: Vec<Arc<Schema>>,
    quota: Arc<DeviceQuota>,
    paced_until_us: Option<u64>,
    /// Time of the peer's latest bytes, or when the session began to listen to it.
    heard_at_us: u64,
    begun_at_us: Option<u64>,
}

pub(super) struct Model {
    settings: Arc<SessionSettings>,
    /// What the devices may still send, calculated independently of the sessions.
    quotas: Arc<DeviceQuotas>,
    phase: Phase,
    opened_at_us: u64,
    preauth_bytes: usize,
    leaving: Option<Option<Code>>,
    said: Vec<Reply>,
}

impl Model {
    pub(super) fn new(
        settings: Arc<SessionSettings>,
        quotas: Arc<DeviceQuotas>,
        now: Now,
    ) -> Model {
        Model {
            settings,
            quotas,
            phase: Phase::AwaitHello,
            opened_at_us: now.mono_us,
            preauth_bytes: 0,
            leaving: None,
            said: Vec::new(),
        }
    }

    pub(super) fn closed(&self) -> Option<Option<u8>> {
        match self.phase {
            Phase::Closed(code) => Some(code),
            _ => None,
        }
    }

    /// Returns the device whose login awaits its outcome.
    pub(super) fn known(&self) -> Option<usize> {
        match &self.phase {
            Phase::AwaitAdmission(known) => Some(*known),
            _ => None,
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some() && self.closed().is_none()
    }

    pub(super) fn wants_input(&self) -> bool {
        match &self.phase {
            Phase::AwaitHello | Phase::AwaitAuth(_) => true,
            Phase::Serving(serving) => {
                let is_free = !serving.is_declaring && serving.paced_until_us.is_none();
                is_free && self.leaving.is_none()
            }
            Phase::AwaitAdmission(_) | Phase::Closed(_) => false,
        }
    }

    pub(super) fn deadline_us(&self) -> Option<u64> {
        match &self.phase {
            Phase::Closed(_) => None,
            Phase::Serving(serving) if serving.paced_until_us.is_some() => serving.paced_until_us,
            Phase::Serving(serving) => {
                let idle_us = serving.heard_at_us + self.settings.limits.idle_timeout_us();
                let begun_us = { serving.begun_at_us }.map_or(u64::MAX, |at_us| {
                    at_us + self.settings.limits.frame_timeout_us()
                });
                self.wants_input().then_some(idle_us.min(begun_us))
            }
            _ => Some(self.opened_at_us + self.settings.limits.handshake_timeout_us()),
        }
    }

    /// Returns the required replies since the last call. Due replies are sent before the session waits for the peer.
    pub(super) fn take_said(&mut self) -> Vec<Reply> {
        self.flush_ack();
        std::mem::take(&mut self.said)
    }

    fn flush_ack(&mut self) {
        if let Phase::Serving(serving) = &mut self.phase
            && std::mem::take(&mut serving.is_ack_due)
        {
            let seq = serving.durable_seq;
            self.said.push(Reply::Ack { seq });
        }
    }

    pub(super) fn close(&mut self, code: Option<Code>, retry_after_ms: u32) {
        if self.closed().is_some() {
            return;
        }
        self.flush_ack();
        let code = code.map(|code| code as u8);
        let bye = code.map(|code| Reply::Bye {
            code,
            retry_after_ms,
        });
        self.said.extend(bye);
        self.phase = Phase::Closed(code);
    }

    fn bye(&mut self, code: Code) -> Submits {
        self.close(Some(code), 0);
        Submits::Nothing
    }

    pub(super) fn leave(&mut self, code: Option<Code>) {
        self.leaving = Some(code);
        self.close_if_settled();
    }

    fn close_if_settled(&mut self) {
        if let Phase::Serving(serving) = &self.phase
            && !serving.is_settled()
        {
            return;
        }
        if let Some(code) = self.leaving {
            self.close(code, 0);
        }
    }

    /// Processes a frame. `has_room` states whether quarantine has space for it.
    pub(super) fn frame(&mut self, frame: &Frame<'_>, now: Now, has_room: bool) -> Submits {
        if matches!(self.phase, Phase::AwaitHello | Phase::AwaitAuth(_)) {
            self.preauth_bytes += frame.bytes.len();
            if self.preauth_bytes > self.settings.limits.preauth_bytes_max {
                return self.bye(Code::Authentication);
            }
        }
        if let Phase::Serving(serving) = &mut self.phase {
            (serving.heard_at_us, serving.begun_at_us) = (now.mono_us, None);
            serving.pace(1, 0, now);
        }
        if types::is_skippable(frame.header.frame_type) && frame.intact {
            return Submits::Nothing;
        }
        match self.phase {
            Phase::AwaitHello => self.hello(frame),
            Phase::AwaitAuth(known) => self.auth(frame, known),
            Phase::Serving(_) if types::is_sequenced(frame.header.frame_type) => {
                self.sequenced(frame, now, has_room)
            }
            Phase::Serving(_) => self.unsequenced(frame),
            Phase::AwaitAdmission(_) | Phase::Closed(_) => panic!("no input is wanted"),
        }
    }

    /// Answers any fault before WELCOME with BYE 50 (R102).
    fn hello(&mut self, frame: &Frame<'_>) -> Submits {
        let header = frame.header;
        if header.version != VERSION {
            return self.bye(Code::Version);
        }
        let is_plain = header.seq == 0 && header.flags == 0 && frame.intact;
        match decode::<Hello<'_>>(frame.payload()) {
            Ok(hello) if header.frame_type == types::HELLO && is_plain => {
                if hello.min_version > VERSION || hello.max_version < VERSION {
                    return self.bye(Code::Version);
                }
                self.said.push(Reply::Challenge);
                let known = KNOWN.iter().position(|known| known.hello == frame.bytes);
                self.phase = Phase::AwaitAuth(known);
                Submits::Nothing
            }
            _ => self.bye(Code::Authentication),
        }
    }

    /// Accepts only the bytes made with the key: a random MAC is never valid.
    fn auth(&mut self, frame: &Frame<'_>, known: Option<usize>) -> Submits {
        if frame.header.version != VERSION {
            return self.bye(Code::Version);
        }
        match known.filter(|known| KNOWN[*known].auth == frame.bytes) {
            Some(known) => {
                self.phase = Phase::AwaitAdmission(known);
                Submits::Login
            }
            None => self.bye(Code::Authentication),
        }
    }

    fn unsequenced(&mut self, frame: &Frame<'_>) -> Submits {
        let (header, payload) = (frame.header, frame.payload());
        let is_skippable = types::is_skippable(header.frame_type);
        if !is_skippable && header.version != VERSION {
            return self.bye(Code::Version);
        }
        if !is_skippable && header.seq != 0 {
            return self.bye(Code::Protocol);
        }
        let serving = self.serving();
        if !frame.intact {
            let nack = serving.nack(Code::PayloadCrc, 0, 0);
            self.flush_ack();
            self.said.push(nack);
            return Submits::Nothing;
        }
        match header.frame_type {
            _ if header.flags != 0 => self.bye(Code::Protocol),
            types::DECLARE if decode::<Declare<'_>>(payload).is_ok() => {
                serving.is_declaring = true;
                Submits::Declare(payload.to_vec())
            }
            types::PING if decode::<Ping<'_>>(payload).is_ok() => {
                let mono_us = decode::<Ping<'_>>(payload).map_or(0, |ping| ping.mono_us);
                self.said.push(Reply::Pong { mono_us });
                Submits::Nothing
            }
            types::BYE if decode::<Bye<'_>>(payload).is_ok() => {
                self.close(None, 0);
                Submits::Nothing
            }
            _ => self.bye(Code::Protocol),
        }
    }

    /// Processes a sequenced frame (R44, R62 to R64, R104 to R107, R117).
    fn sequenced(&mut self, frame: &Frame<'_>, now: Now, has_room: bool) -> Submits {
        let window_frames = self.settings.limits.window_frames;
        let seq = frame.header.seq;
        if frame.header.version != VERSION {
            return self.bye(Code::Version);
        }
        if seq == 0 || seq > SEQ_MAX {
            return self.bye(Code::Protocol);
        }
        let serving = self.serving();
        let first_seq = first_seq(frame);
        if first_seq > serving.durable_seq + window_frames {
            return self.bye(Code::Credit);
        }
        if seq < serving.expected_seq {
            serving.is_ack_due |= seq <= serving.durable_seq;
            if !frame.intact || frame.header.frame_type == types::GAP {
                return Submits::Nothing;
            }
            let crc = frame.crc();
            return Submits::Repeat { seq, crc };
        }
        if first_seq > serving.expected_seq {
            return self.ask(Code::SeqGap, seq, 0);
        }
        serving.is_dropping = false;
        if let Some(since_us) = serving.store_down_since_us {
            return self.wait_for_store(seq, since_us, now);
        }
        if seq <= serving.taken_through {
            serving.expected_seq = seq + 1;
            return Submits::Nothing;
        }
        let made = if frame.intact {
            match made(frame, &serving.schemas) {
                Ok(Some(made)) => made,
                Ok(None) => return self.ask(Code::UnknownSchema, seq, 0),
                Err(violation) => refused(violation.code(), frame),
            }
        } else if serving.damaged_seq.replace(seq) == Some(seq) {
            refused(Code::PayloadCrcTwice, frame)
        } else {
            return self.ask(Code::PayloadCrc, seq, 0);
        };
        let taken = Accepted {
            first_seq,
            seq,
            frame_type: frame.header.frame_type,
            received_at_us: now.utc_us,
            made,
        };
        match taken.made {
            Made::Refused { code, .. } => self.refuse(taken, code, now, has_room),
            _ => self.take(taken, now),
        }
    }

    fn take(&mut self, taken: Accepted, now: Now) -> Submits {
        let serving = self.serving();
        (serving.expected_seq, serving.taken_through) = (taken.seq + 1, taken.seq);
        serving.quarantine_full_since_us = None;
        if let Made::Readings { values, .. } = &taken.made {
            serving.pace(0, values.len() as u64, now);
        }
        Submits::Accepted(taken)
    }

    fn refuse(&mut self, mut taken: Accepted, code: Code, now: Now, has_room: bool) -> Submits {
        let serving = self.serving();
        let since_us = now.mono_us.saturating_sub(REFUSALS_WINDOW_US);
        let refused_at_us = serving.refused_at_us.iter();
        if refused_at_us.filter(|at_us| **at_us >= since_us).count() == REFUSALS_MAX {
            self.close(Some(Code::Protocol), REFUSALS_RETRY_AFTER_MS);
            return Submits::Nothing;
        }
        if !has_room {
            let since_us = *{ &mut serving.quarantine_full_since_us }.get_or_insert(now.mono_us);
            let wait_ms = retry_after_ms(since_us, now.mono_us, serving.device);
            return self.ask(Code::QuarantineFull, taken.seq, wait_ms);
        }
        serving.refused_at_us.push(now.mono_us);
        serving.refusals.push((taken.seq, code));
        // A GAP may begin before it; frames that are accepted already are not rejected.
        taken.first_seq = serving.expected_seq;
        (serving.expected_seq, serving.taken_through) = (taken.seq + 1, taken.seq);
        serving.quarantine_full_since_us = None;
        Submits::Refused(taken)
    }

    fn serving(&mut self) -> &mut Serving {
        match &mut self.phase {
            Phase::Serving(serving) => serving,
            _ => panic!("not welcomed"),
        }
    }

    fn ask(&mut self, code: Code, seq: u64, retry_after_ms: u32) -> Submits {
        let serving = self.serving();
        if !std::mem::replace(&mut serving.is_dropping, true) {
            let nack = serving.nack(code, seq, retry_after_ms);
            self.flush_ack();
            self.said.push(nack);
        }
        Submits::Nothing
    }

    pub(super) fn partial(&mut self, is_partial: bool, now: Now) {
        if let Phase::Serving(serving) = &mut self.phase {
            let begun_at_us = serving.begun_at_us.unwrap_or(now.mono_us);
            serving.begun_at_us = is_partial.then_some(begun_at_us);
        }
    }

    pub(super) fn welcome(&mut self, admission: &Admission, now: Now) {
        let durable_seq = admission.receipt.durable_seq();
        self.said.push(Reply::Welcome {
            durable_seq,
            schema_known: admission.schema.is_some(),
        });
        self.phase = Phase::Serving(Box::new(Serving {
            durable_seq,
            expected_seq: durable_seq + 1,
            taken_through: 0,
            is_dropping: false,
            is_declaring: false,
            store_down_since_us: None,
            waits_for_store: false,
            quarantine_full_since_us: None,
            device: admission.device.0,
            is_ack_due: false,
            damaged_seq: None,
            refusals: Vec::new(),
            refused_at_us: Vec::new(),
            schemas: admission.schema.iter().cloned().collect(),
            quota: self.quotas.of(admission.device, now.mono_us),
            paced_until_us: None,
            heard_at_us: now.mono_us,
            begun_at_us: None,
        }));
        self.serving().pace(1, 0, now);
    }

    pub(super) fn declared(&mut self, outcome: &DeclareOutcome, now: Now) {
        let Phase::Serving(serving) = &mut self.phase else {
            return;
        };
        serving.is_declaring = false;
        serving.heard_at_us = now.mono_us;
        match outcome {
            DeclareOutcome::Accepted(schema) => {
                serving
                    .schemas
                    .retain(|known| known.schema != schema.schema);
                serving.schemas.push(Arc::clone(schema));
                let too_many = serving.schemas.len().saturating_sub(SCHEMAS_MAX);
                serving.schemas.drain(..too_many);
            }
            DeclareOutcome::Conflict => {
                let nack = serving.nack(Code::SchemaConflict, 0, 0);
                self.said.push(nack);
            }
            DeclareOutcome::OverBound(_) => {
                unreachable!("the number of schemas stays below the limit")
            }
        }
        self.close_if_settled();
    }

    /// Returns whether a rejected DECLARE is reported to operators.
    pub(super) fn may_report(&self, now: Now) -> bool {
        match &self.phase {
            Phase::Serving(serving) => serving.quota.may_report(now.mono_us),
            _ => false,
        }
    }

    pub(super) fn receipt(&mut self, durable_seq: u64, through_seq: u64) {
        let Phase::Serving(serving) = &mut self.phase else {
            return;
        };
        serving.durable_seq = serving.durable_seq.max(durable_seq);
        serving.expected_seq = serving.expected_seq.max(serving.durable_seq + 1);
        serving.is_ack_due = true;
        let is_durable = |(seq, _): &mut (u64, Code)| *seq <= serving.durable_seq;
        let said: Vec<(u64, Code)> = serving.refusals.extract_if(.., is_durable).collect();
        let nack = |(seq, code)| serving.nack(code, seq, 0);
        self.said.extend(said.into_iter().map(nack));
        // A frame of an older session that no longer continues the stream (R112).
        if durable_seq < through_seq {
            serving.expected_seq = serving.durable_seq + 1;
            serving.taken_through = serving.durable_seq;
            serving.is_dropping = false;
            self.ask(Code::SeqGap, through_seq, 0);
        }
        self.close_if_settled();
    }

    /// Returns whether the device needs a separate ACK to continue.
    pub(super) fn store_down(&mut self, is_down: bool, now: Now) -> bool {
        let Phase::Serving(serving) = &mut self.phase else {
            return false;
        };
        if !is_down {
            serving.store_down_since_us = None;
            let resumes = std::mem::take(&mut serving.waits_for_store);
            serving.is_ack_due |= resumes;
            return resumes;
        }
        let since_us = *serving.store_down_since_us.get_or_insert(now.mono_us);
        if !serving.is_settled() {
            serving.expected_seq = serving.durable_seq + 1;
            serving.is_dropping = false;
            let seq = serving.expected_seq;
            self.wait_for_store(seq, since_us, now);
        }
        false
    }

    fn wait_for_store(&mut self, seq: u64, since_us: u64, now: Now) -> Submits {
        let serving = self.serving();
        serving.waits_for_store = true;
        let wait_ms = retry_after_ms(since_us, now.mono_us, serving.device);
        self.ask(Code::StoreDown, seq, wait_ms)
    }

    pub(super) fn timeout(&mut self, now: Now) {
        let is_due = self.deadline_us().is_some_and(|at_us| at_us <= now.mono_us);
        match &mut self.phase {
            Phase::Serving(serving) if is_due && serving.paced_until_us.is_some() => {
                serving.paced_until_us = None;
                serving.heard_at_us = now.mono_us;
            }
            _ if is_due => self.close(Some(Code::Idle), 0),
            _ => {}
        }
    }
}

impl Serving {
    /// Stops reading while the device has exceeded its quota.
    fn pace(&mut self, frames: u64, readings: u64, now: Now) {
        let next_us = self.quota.consume(frames, readings, now.mono_us);
        if next_us > now.mono_us {
            self.paced_until_us = self.paced_until_us.max(Some(next_us));
        }
    }

    fn is_settled(&self) -> bool {
        !self.is_declaring && self.expected_seq <= self.durable_seq + 1
    }

    fn nack(&self, code: Code, seq: u64, retry_after_ms: u32) -> Reply {
        Reply::Nack {
            code: code as u8,
            seq,
            expected_seq: self.expected_seq,
            retry_after_ms,
        }
    }
}

/// Returns the first number that a frame covers (R45).
fn first_seq(frame: &Frame<'_>) -> u64 {
    let seq = frame.header.seq;
    if frame.header.frame_type != types::GAP || !frame.intact {
        return seq;
    }
    let mut from_seq = 0_u128;
    for (i, byte) in frame.payload().iter().take(10).enumerate() {
        from_seq |= u128::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return match u64::try_from(from_seq) {
                Ok(from_seq) if from_seq <= seq => from_seq,
                _ => seq,
            };
        }
    }
    seq
}
