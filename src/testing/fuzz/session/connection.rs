//! A connection: its inbox and session next to the model, with its own independent observations.

use std::sync::Arc;

use fieldgate_protocol::auth::schema_hash;
use fieldgate_protocol::error::{Class, Code};
use fieldgate_protocol::frame::{self, Frame, FrameError, VERSION, types};
use fieldgate_protocol::message::{self, Ack, Bye, Message, Nack, Pong, Welcome};

use super::device::{BOOT, CHALLENGE, KNOWN, NONCE};
use super::model::{Model, Reply, Submits};
use super::store::StoreSide;
use crate::ingest::mailbox::Mailbox;
use crate::quota::device::DeviceQuotas;
use crate::session::inbox::{Inbox, Mail};
use crate::session::{Close, Session, SessionSettings, Submission};
use crate::store::{
    self, Content, DeclareOutcome, DeviceEventKind, Login, LoginOutcome, Receipt, StreamId,
};
use crate::time::Now;

/// Maximum output of a call: an ACK, a NACK or PONG, and a BYE.
pub(super) const CALL_BYTES_MAX: usize = 350;
/// A NACK with the longest detail.
pub(super) const NACK_BYTES_MAX: usize = 150;

pub(super) struct Line {
    pub inbox: Inbox,
    pub model: Model,
    pub mailbox: Arc<Mailbox>,
    /// Bytes that the model has not processed.
    unread: Vec<u8>,
    /// The event that mail must cause.
    expected_event: Option<Submits>,
    /// Bytes of an incomplete frame.
    pub held_back: Vec<u8>,
    /// Whether the peer reads the session's output.
    pub reads: bool,
    /// The next number that the device sends.
    pub next_seq: u64,
    /// Time at which the latest PONG was sent.
    pub pong_sent_us: i64,
    settings: Arc<SessionSettings>,
    /// The device that logged in.
    known: Option<usize>,
    stream: Option<StreamId>,
    /// Number of outbound bytes that were checked; the next field counts the calls since.
    heard_bytes: usize,
    calls: usize,
    /// The highest number reported to the session as durable.
    answered_seq: u64,
    first_receipt: Option<Receipt>,
    had_conflict: bool,
    latest_receipt: Option<(Receipt, u64)>,
    acked_seq: u64,
    /// Number of ACKs and class 3 NACKs that the session may still send.
    acks_left: usize,
    refusals_left: usize,
}

impl Line {
    pub(super) fn new(settings: Arc<SessionSettings>, quotas: Arc<DeviceQuotas>, now: Now) -> Line {
        let peer = ([127, 0, 0, 1], 1000).into();
        let session = Session::new(Arc::clone(&settings), peer, NONCE, now);
        Line {
            inbox: Inbox::new(session),
            model: Model::new(Arc::clone(&settings), quotas, now),
            mailbox: Arc::default(),
            unread: Vec::new(),
            expected_event: None,
            held_back: Vec::new(),
            reads: true,
            next_seq: 1,
            pong_sent_us: 0,
            settings,
            known: None,
            stream: None,
            heard_bytes: 0,
            calls: 0,
            answered_seq: 0,
            first_receipt: None,
            had_conflict: false,
            latest_receipt: None,
            acked_seq: 0,
            acks_left: 0,
            refusals_left: 0,
        }
    }

    pub(super) fn receive(&mut self, bytes: &[u8]) {
        self.inbox.input().extend_from_slice(bytes);
        self.unread.extend_from_slice(bytes);
    }

    /// Processes everything that may be processed now, and checks it.
    pub(super) fn process(&mut self, now: Now, store: &mut StoreSide) {
        loop {
            let submission = self.inbox.poll_submission(now);
            let is_roomy = store.expected.is_roomy();
            let submits = self.next_expected(submission.as_ref(), is_roomy, now);
            let Some(submission) = submission else {
                assert!(matches!(submits, Submits::Nothing), "expected {submits:?}");
                break;
            };
            self.check_submission(submits, &submission, now, store);
            // Nothing is processed until it is queued.
            assert!(!self.inbox.wants_input() && self.inbox.poll_submission(now).is_none());
            store.backend.submit(submission, &self.mailbox);
            self.inbox.handle_queued();
        }
        self.hear(store, now);
    }

    /// Returns the next submission that the model expects; it processes its own copy of the bytes up to there. The
    /// session submitted `found`: the model does not know whether a PING improves a clock, nor the rest of a
    /// quarantine that is not roomy.
    fn next_expected(&mut self, found: Option<&Submission>, is_roomy: bool, now: Now) -> Submits {
        if let Some(event) = self.expected_event.take() {
            return event;
        }
        let unread = std::mem::take(&mut self.unread);
        let (mut rest, mut submits) = (unread.as_slice(), Submits::Nothing);
        while matches!(submits, Submits::Nothing) && self.model.wants_input() {
            let frame_bytes_max = if self.stream.is_some() { 4096 } else { 512 };
            self.calls += 1;
            match frame::decode(rest, frame_bytes_max) {
                Ok(Some(frame)) => {
                    rest = &rest[frame.bytes.len()..];
                    submits = self.expect(&frame, found, is_roomy, now);
                }
                Ok(None) => {
                    self.model.partial(!rest.is_empty(), now);
                    break;
                }
                Err(FrameError::Magic(_)) => self.model.close(None, 0),
                Err(FrameError::HeaderCrc) => self.model.close(Some(Code::Header), 0),
                Err(FrameError::TooLarge { .. }) => self.model.close(Some(Code::TooLarge), 0),
            }
        }
        self.unread = rest.to_vec();
        submits
    }

    fn expect(
        &mut self,
        frame: &Frame<'_>,
        found: Option<&Submission>,
        is_roomy: bool,
        now: Now,
    ) -> Submits {
        let header = frame.header;
        let is_sequenced = types::is_sequenced(header.frame_type);
        self.acks_left += usize::from(is_sequenced && header.seq <= self.answered_seq);
        let has_room = is_roomy || found.is_some_and(|found| is_quarantined(frame, found));
        match self.model.frame(frame, now, has_room) {
            Submits::Nothing
                if header.frame_type == types::PING
                    && matches!(found, Some(Submission::Clock(..))) =>
            {
                Submits::Clock
            }
            submits => submits,
        }
    }

    fn check_submission(
        &mut self,
        submits: Submits,
        submission: &Submission,
        now: Now,
        store: &mut StoreSide,
    ) {
        match (&submits, submission) {
            (Submits::Clock, Submission::Clock(_, clock)) => {
                assert_eq!((clock.boot, clock.measured_at_us), (BOOT, now.utc_us));
            }
            (Submits::Repeat { seq, crc }, Submission::Repeat(repeat)) => {
                assert_eq!(self.stream, Some(repeat.stream));
                let found = (repeat.seq, repeat.crc, repeat.at_us);
                assert_eq!(found, (*seq, *crc, now.utc_us));
            }
            (Submits::Login, Submission::Login(login)) => self.check_login(login, now),
            (Submits::Declare(bytes), Submission::Declare(declare)) => {
                check_declare(declare, bytes);
            }
            (Submits::Event(kind, code), Submission::Event(event)) => {
                let found = (event.kind, event.code, event.at_us);
                assert_eq!(found, (*kind, *code, now.utc_us));
            }
            (Submits::Accepted(taken), Submission::Entry(entry))
            | (Submits::Refused(taken), Submission::Quarantine(entry, _)) => {
                assert!(taken.is(entry), "{taken:?} {entry:?}");
                assert_eq!(self.stream, Some(entry.stream));
                self.refusals_left += usize::from(taken.refusal().is_some());
                store.expected.accept(entry.stream, taken.clone());
            }
            (expected, found) => panic!("expected {expected:?}, but {found:?} was submitted"),
        }
    }

    fn check_login(&mut self, login: &Login, now: Now) {
        self.known = self.model.known();
        let known = &KNOWN[self.known.expect("proved")];
        assert_eq!(login.device, known.name);
        assert_eq!(
            (login.stream, login.next_seq),
            (known.stream, known.next_seq)
        );
        assert_eq!((login.schema, login.at_us), (known.schema, now.utc_us));
    }

    /// Delivers mail, of which the model gets each kind by itself.
    pub(super) fn handle_mail(&mut self, mail: Mail, now: Now) {
        if let Some(outcome) = &mail.login {
            self.calls += 1;
            self.expect_login(outcome, now);
        }
        if let Some(outcome) = &mail.declare {
            self.calls += 1;
            self.expect_declared(outcome, now);
        }
        if let Some((receipt, through_seq)) = mail.receipt {
            self.answered_seq = self.answered_seq.max(receipt.durable_seq());
            self.latest_receipt = Some((receipt, through_seq));
            (self.calls, self.acks_left) = (self.calls + 1, self.acks_left + 1);
            self.model.receipt(receipt.durable_seq(), through_seq);
        }
        if let Some(is_down) = mail.store_is_down {
            self.calls += 1;
            let resumes = self.model.store_down(is_down, now);
            self.acks_left += usize::from(resumes);
        }
        if let Some(close) = &mail.close {
            self.calls += 1;
            self.model.close(close.code, close.retry_after_ms);
        }
        self.inbox.handle_mail(mail, now);
    }

    fn expect_login(&mut self, outcome: &LoginOutcome, now: Now) {
        match outcome {
            LoginOutcome::Admitted(admission) if self.model.closed().is_none() => {
                let receipt = admission.receipt;
                (self.stream, self.answered_seq) = (Some(receipt.stream()), receipt.durable_seq());
                self.first_receipt = Some(receipt);
                self.model.welcome(admission, now);
                self.expected_event = Some(Submits::Event(DeviceEventKind::Connected, 0));
            }
            LoginOutcome::Admitted(_) => {}
            LoginOutcome::Unregistered | LoginOutcome::KeyReplaced => {
                self.model.close(Some(Code::Authentication), 0);
            }
            LoginOutcome::Disabled => self.model.close(Some(Code::Disabled), 0),
            LoginOutcome::StreamConflict => self.model.close(Some(Code::StreamConflict), 0),
            LoginOutcome::OverBound(_) => {
                unreachable!("the number of streams stays below the limit")
            }
        }
    }

    fn expect_declared(&mut self, outcome: &DeclareOutcome, now: Now) {
        // Operators get an event for the first conflict only.
        let is_conflict = matches!(outcome, DeclareOutcome::Conflict);
        let is_first = is_conflict && self.model.closed().is_none() && !self.had_conflict;
        self.had_conflict |= is_first;
        if is_first && self.model.may_report(now) {
            let code = Code::SchemaConflict as u8;
            self.expected_event = Some(Submits::Event(DeviceEventKind::Refused, code));
        }
        self.model.declared(outcome, now);
    }

    pub(super) fn handle_drain(&mut self) {
        self.calls += 1;
        self.model.leave(Some(Code::Shutdown));
        self.inbox.session.handle_drain();
    }

    pub(super) fn handle_end_of_input(&mut self) {
        self.calls += 1;
        self.model.leave(None);
        self.inbox.session.handle_end_of_input();
    }

    /// Delivers a receipt that is older than one delivered before, which must change nothing.
    pub(super) fn handle_old_receipt(&mut self, now: Now) {
        if let Some(receipt) = self.first_receipt {
            let mail = Mail {
                receipt: Some((receipt, receipt.durable_seq())),
                ..Mail::default()
            };
            self.handle_mail(mail, now);
        }
    }

    pub(super) fn handle_time(&mut self, now: Now) {
        self.calls += 1;
        let deadline_us = self.inbox.session.poll_deadline();
        let was_open = self.inbox.session.closed().is_none();
        self.inbox.session.handle_timeout(now);
        self.model.timeout(now);
        let is_open = self.inbox.session.closed().is_none();
        if deadline_us.is_some_and(|at_us| at_us <= now.mono_us) {
            let next_us = self.inbox.session.poll_deadline();
            assert!(!is_open || next_us.is_none_or(|at_us| at_us > now.mono_us));
        } else {
            assert_eq!(is_open, was_open, "closed too early");
        }
    }

    pub(super) fn lose(&mut self) {
        self.inbox.session.handle_loss("reset");
        self.model.close(None, 0);
    }

    /// The peer reads some of the session's output.
    pub(super) fn read(&mut self, bytes: usize) {
        let outbound = self.inbox.session.outbound();
        let count = bytes.min(self.heard_bytes);
        let rest = outbound.bytes()[count..].to_vec();
        outbound.consume(count);
        assert_eq!(outbound.bytes(), rest);
        self.heard_bytes -= count;
    }

    /// Checks the session's output and requests.
    fn hear(&mut self, store: &StoreSide, now: Now) {
        let all = self.inbox.session.outbound().bytes().to_vec();
        let mut rest = &all[self.heard_bytes..];
        let (mut said, mut answers_bytes) = (Vec::new(), 0);
        while !rest.is_empty() {
            let frame = frame::decode(rest, frame::HANDSHAKE_FRAME_BYTES_MAX);
            let frame = frame.expect("valid frames").expect("complete frames");
            rest = &rest[frame.bytes.len()..];
            let words = self.understand(&frame, store, now);
            if is_refusal(&words) {
                assert!(frame.bytes.len() <= NACK_BYTES_MAX);
            } else {
                answers_bytes += frame.bytes.len();
            }
            said.push(words);
        }
        assert!(answers_bytes <= std::mem::take(&mut self.calls) * CALL_BYTES_MAX);
        assert_eq!(said, self.model.take_said());
        self.heard_bytes = all.len();
        self.check_wants();
        if self.reads {
            self.read(all.len());
        }
        // As `server::connection` does.
        if self.heard_bytes > self.settings.limits.outbound_bytes_max
            && self.model.closed().is_none()
        {
            self.lose();
            self.check_wants();
        }
    }

    fn check_wants(&self) {
        let (session, model) = (&self.inbox.session, &self.model);
        assert_eq!(self.inbox.wants_input(), model.wants_input());
        assert_eq!(session.poll_deadline(), model.deadline_us());
        let closed = session
            .closed()
            .map(|close| close.code.map(|code| code as u8));
        assert_eq!(closed, model.closed());
        if closed.is_none() {
            assert_eq!(session.is_leaving(), model.is_leaving());
        }
    }

    /// Checks a frame of the gateway against the store.
    fn understand(&mut self, frame: &Frame<'_>, store: &StoreSide, now: Now) -> Reply {
        let header = frame.header;
        assert!(frame.intact && header.version == VERSION && header.flags == 0);
        let is_numbered = matches!(header.frame_type, types::ACK | types::NACK);
        assert!(is_numbered || header.seq == 0);
        let window_frames = self.settings.limits.window_frames;
        match header.frame_type {
            types::CHALLENGE => {
                assert_eq!(frame.bytes, *CHALLENGE);
                Reply::Challenge
            }
            types::WELCOME => {
                let welcome: Welcome<'_> = read(frame);
                let stream = self.stream.expect("admitted");
                assert_eq!(welcome.durable_seq, self.answered_seq);
                assert!(welcome.durable_seq <= store.expected.durable_seq(stream));
                assert_eq!(welcome.limit_seq, welcome.durable_seq + window_frames);
                assert_eq!(welcome.utc_us, now.utc_us);
                let known = &KNOWN[self.known.expect("proved")];
                assert!(known.believes(frame.payload(), &welcome.mac));
                self.next_seq = welcome.durable_seq + 1;
                Reply::Welcome {
                    durable_seq: welcome.durable_seq,
                    schema_known: welcome.schema_known == 1,
                }
            }
            types::ACK => {
                let ack: Ack<'_> = read(frame);
                let seq = header.seq;
                assert!((self.acked_seq..=self.answered_seq).contains(&seq));
                assert!(seq <= store.expected.durable_seq(self.stream.expect("admitted")));
                assert_eq!(ack.limit_seq, seq + window_frames);
                self.acks_left = self.acks_left.checked_sub(1).expect("a reason");
                self.acked_seq = seq;
                Reply::Ack { seq }
            }
            types::NACK => self.understand_nack(&read(frame), header.seq, store),
            types::PONG => {
                let pong: Pong<'_> = read(frame);
                assert_eq!((pong.received_us, pong.sent_us), (now.utc_us, now.utc_us));
                self.pong_sent_us = pong.sent_us;
                Reply::Pong {
                    mono_us: pong.mono_us,
                }
            }
            types::BYE => {
                let bye: Bye<'_> = read(frame);
                Reply::Bye {
                    code: bye.code,
                    retry_after_ms: bye.retry_after_ms,
                }
            }
            other => panic!("a gateway does not send {other:#04x}"),
        }
    }

    fn understand_nack(&mut self, nack: &Nack<'_>, seq: u64, store: &StoreSide) -> Reply {
        let stream = self.stream.expect("admitted");
        assert!(nack.expected_seq > self.acked_seq);
        if Class::of(nack.code) == Class::Refused {
            assert!(seq <= self.answered_seq);
            assert!(store.expected.durable_seq(stream) >= seq);
            let is_kept = store.expected.refusal(stream, seq) == Some(nack.code);
            assert!(is_kept || store.expected.is_taken_twice(stream, seq));
            self.refusals_left = self.refusals_left.checked_sub(1).expect("a refusal");
        } else if seq > 0 {
            self.next_seq = nack.expected_seq;
        }
        Reply::Nack {
            code: nack.code,
            seq,
            expected_seq: nack.expected_seq,
            retry_after_ms: nack.retry_after_ms,
        }
    }

    /// Calls a closed session, which must not change.
    pub(super) fn poke(&mut self, now: Now) {
        let session = &mut self.inbox.session;
        let said = session.outbound().bytes().to_vec();
        let closed = session.closed().cloned();
        let later = Now {
            mono_us: now.mono_us + (1 << 40),
            ..now
        };
        session.handle_timeout(later);
        session.handle_drain();
        session.handle_end_of_input();
        let mail = Mail {
            receipt: self.latest_receipt,
            store_is_down: Some(true),
            close: Some(Close {
                code: Some(Code::TakenOver),
                retry_after_ms: 1,
                detail: String::new(),
            }),
            ..Mail::default()
        };
        self.inbox.handle_mail(mail, now);
        self.inbox.input().extend_from_slice(&KNOWN[0].hello);
        assert!(self.inbox.poll_submission(now).is_none() && !self.inbox.wants_input());
        let session = &mut self.inbox.session;
        assert_eq!(session.outbound().bytes(), said);
        assert_eq!(session.closed().cloned(), closed);
        assert_eq!(session.poll_deadline(), None);
    }

    /// Ends the connection.
    pub(super) fn part(mut self, now: Now, store: &mut StoreSide) {
        assert_eq!(self.inbox.session.device().is_some(), self.stream.is_some());
        if let Some(device) = self.inbox.session.device() {
            store.backend.registry.leave(device, &self.mailbox);
        }
        let code = self.model.closed().expect("it is closed").unwrap_or(0);
        match self.inbox.session.handle_disconnect(true, true, now) {
            Some(Submission::Event(event)) => {
                assert!(self.stream.is_some());
                assert_eq!(
                    (event.kind, event.code),
                    (DeviceEventKind::Disconnected, code)
                );
                store
                    .backend
                    .submit(Submission::Event(event), &self.mailbox);
            }
            Some(Submission::Refusal(refusal)) => {
                assert!(self.stream.is_none());
                assert_eq!((refusal.code, refusal.at_us), (code, now.utc_us));
                store
                    .backend
                    .submit(Submission::Refusal(refusal), &self.mailbox);
            }
            found => assert!(found.is_none() && self.stream.is_none()),
        }
    }
}

fn is_refusal(said: &Reply) -> bool {
    matches!(said, Reply::Nack { code, .. } if Class::of(*code) == Class::Refused)
}

fn read<'a, M: Message<'a>>(frame: &Frame<'a>) -> M {
    message::decode(frame.payload()).expect("a gateway's message is valid")
}

/// Returns whether `found` puts this frame into quarantine.
fn is_quarantined(frame: &Frame<'_>, found: &Submission) -> bool {
    match found {
        Submission::Quarantine(entry, _) => match &entry.content {
            Content::Quarantined { bytes, .. } => bytes == frame.bytes,
            _ => false,
        },
        _ => false,
    }
}

fn check_declare(submitted: &store::Declare, payload: &[u8]) {
    let declare: message::Declare<'_> = message::decode(payload).expect("checked by the model");
    assert_eq!(submitted.schema, declare.schema);
    assert_eq!(submitted.hash, schema_hash(payload));
    let submitted = submitted.channels.iter().map(|channel| {
        let (name, unit) = (channel.name.as_str(), channel.unit.as_str());
        (channel.id, name, unit, channel.kind, channel.exp10)
    });
    let declared = declare.channels.iter();
    assert!(submitted.eq(declared.map(|channel| {
        (
            channel.id,
            channel.name,
            channel.unit,
            channel.kind,
            channel.exp10,
        )
    })));
}
