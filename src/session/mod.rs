//! One device's connection as a state machine: frames and receipts in, replies and submissions out.
//!
//! It leaves sockets, clocks and the queue to `connection`, and durability to `store`. A session awaits
//! HELLO, then AUTH, then the store's word on the login, then serves the stream until it is closed:
//! [`handshake`] holds what comes before WELCOME, [`stream`] what comes after.
//!
//! Invariants
//! - At most one [`Submission`] comes out of a call, and `connection` takes in nothing more from the
//!   peer until it is queued.
//! - While the store's word on a login or a DECLARE is awaited, no frame is taken in.
//! - What is acknowledged comes from a `Receipt` (see [`reply`]).

pub mod handshake;
pub mod reply;
pub(crate) mod retry;
pub mod stream;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate_protocol::auth::{KEY_BYTES, NO_CHANNEL_BINDING, NONCE_BYTES};
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{
    DEFAULT_FRAME_BYTES_MAX, Frame, FrameError, HANDSHAKE_FRAME_BYTES_MAX, types,
};

use self::handshake::{AwaitAdmission, AwaitAuth, AwaitHello, Secured};
use self::reply::Outbound;
use self::stream::Stream;
use crate::auth::credentials::Credentials;
use crate::auth::fleet_key::FleetKey;
use crate::quota::device::Allowances;
use crate::quota::quarantine::{Gauge, Reservation};
use crate::store::reuse::Repeat;
use crate::store::{
    Declare, DeclareOutcome, DeviceEvent, DeviceEventKind, DeviceId, Entry, Login, LoginOutcome,
    Receipt, Refusal, SessionId,
};
use crate::time::{BootClock, ClockStep, Now};

/// What a session needs to know of the configuration.
#[derive(Clone)]
pub struct SessionSettings {
    /// What devices have to prove.
    pub credentials: Arc<Credentials>,
    /// Whether devices may come in that the store does not know yet.
    pub may_register: bool,
    /// Longest frame after authentication.
    pub frame_bytes_max: u16,
    /// Frames a device may have in flight.
    pub window_frames: u64,
    /// From the first byte to WELCOME.
    pub handshake_timeout_us: u64,
    /// From a frame's first byte to its last.
    pub frame_timeout_us: u64,
    /// Without a whole frame.
    pub idle_timeout_us: u64,
    /// Told to devices.
    pub keepalive_s: u16,
    /// Told to devices.
    pub ack_timeout_s: u16,
    /// Bytes that a peer may send before it has proved its key.
    pub stranger_bytes_max: usize,
    /// What each device may send; more is not refused, but read later.
    pub allowances: Arc<Allowances>,
    /// Bytes that may wait for a peer to read them.
    pub outbound_bytes_max: usize,
    /// Whether there is room for frames that cannot be understood.
    pub quarantine: Arc<Gauge>,
}

impl Default for SessionSettings {
    fn default() -> Self {
        SessionSettings {
            credentials: Arc::new(Credentials::new(FleetKey::from_bytes([0; KEY_BYTES]))),
            may_register: true,
            frame_bytes_max: DEFAULT_FRAME_BYTES_MAX as u16,
            window_frames: 64,
            handshake_timeout_us: 10_000_000,
            frame_timeout_us: 30_000_000,
            idle_timeout_us: 120_000_000,
            keepalive_s: 40,
            ack_timeout_s: 30,
            stranger_bytes_max: 4096,
            allowances: Arc::default(),
            outbound_bytes_max: 16 * 1024,
            quarantine: Arc::default(),
        }
    }
}

/// What a session hands to the ingest queue.
#[derive(Debug)]
pub enum Submission {
    /// Where does this device's stream stand? Answered by [`Session::handle_login_outcome`].
    Login(Login),
    /// Keep this schema. Answered by [`Session::handle_declare_outcome`].
    Declare(Declare),
    /// Store this. Answered by [`Session::handle_receipt`].
    Entry(Entry),
    /// Put this into quarantine, in the room that was reserved for it. Answered as an entry.
    Quarantine(Entry, Reservation),
    /// A number came again; not answered.
    Repeat(Repeat),
    /// Keep this measurement; not answered.
    Clock(DeviceId, BootClock),
    /// Keep this line of the audit trail; not answered.
    Event(DeviceEvent),
    /// Keep this line of the audit trail, if there is such a device; not answered.
    Refusal(Refusal),
    /// Keep that the gateway's clock was set; not answered. Not of a session.
    Step(ClockStep),
}

/// Why and how a connection ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// Sent in a BYE; `None` where nothing is said (the peer does not speak FWP, or left).
    pub code: Option<Code>,
    /// The peer shall not come back sooner.
    pub retry_after_ms: u32,
    /// For the log, the audit trail and the peer.
    pub detail: String,
}

impl Close {
    fn bye(code: Code, detail: impl Into<String>) -> Close {
        Close {
            code: Some(code),
            retry_after_ms: 0,
            detail: detail.into(),
        }
    }

    fn silent(detail: impl Into<String>) -> Close {
        Close {
            code: None,
            retry_after_ms: 0,
            detail: detail.into(),
        }
    }
}

/// What a state makes of an input: perhaps a submission, or the end.
type Step = Result<Option<Submission>, Close>;

enum State {
    AwaitHello(AwaitHello),
    AwaitAuth(Box<AwaitAuth>),
    AwaitAdmission(Box<AwaitAdmission>),
    Serving(Box<Stream>),
    Closed(Box<Closed>),
}

struct Closed {
    whose: Whose,
    close: Close,
}

/// Whose session it was.
enum Whose {
    Nobodys,
    /// Of whoever said that this was its name.
    Claimed(String),
    Admitted(DeviceId),
}

/// The state machine; see the module's documentation.
pub struct Session {
    id: SessionId,
    settings: Arc<SessionSettings>,
    peer: SocketAddr,
    /// What TLS says; in a box, since it is gone after the handshake.
    secured: Option<Box<Secured>>,
    state: State,
    outbound: Outbound,
    opened_at_us: u64,
    /// What has come before the device proved its key.
    stranger_bytes: usize,
    /// When the latest whole frame came.
    heard_at_us: u64,
    /// When the first byte of a frame came whose last is still missing.
    frame_begun_at_us: Option<u64>,
    /// No more input; to be closed so as soon as what was taken in is acknowledged.
    leaving: Option<Close>,
}

impl Session {
    /// A session for a peer that has just connected. `nonce` is random.
    pub fn new(
        settings: Arc<SessionSettings>,
        peer: SocketAddr,
        nonce: [u8; NONCE_BYTES],
        now: Now,
    ) -> Session {
        let [a, b, c, d, e, f, g, h, ..] = nonce;
        Session {
            // SQL's integers are signed.
            id: SessionId((u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 1).cast_signed()),
            settings,
            peer,
            secured: None,
            state: State::AwaitHello(AwaitHello {
                nonce,
                device: String::new(),
            }),
            outbound: Outbound::default(),
            opened_at_us: now.mono_us,
            stranger_bytes: 0,
            heard_at_us: now.mono_us,
            frame_begun_at_us: None,
            leaving: None,
        }
    }

    /// The connection is one through TLS, whose handshake has ended.
    pub fn handle_secured(&mut self, secured: Secured) {
        self.secured = Some(Box::new(secured));
    }

    /// Longest frame that is taken in now; a longer one is refused by its header alone.
    pub fn frame_bytes_max(&self) -> usize {
        match self.state {
            State::Serving(_) => usize::from(self.settings.frame_bytes_max),
            _ => HANDSHAKE_FRAME_BYTES_MAX,
        }
    }

    /// Whether frames are taken in now.
    pub fn wants_input(&self) -> bool {
        match &self.state {
            State::AwaitHello(_) | State::AwaitAuth(_) => true,
            State::Serving(stream) => {
                let is_paced = stream.paced_until_us().is_some();
                self.leaving.is_none() && !stream.awaits_declare() && !is_paced
            }
            State::AwaitAdmission(_) | State::Closed(_) => false,
        }
    }

    /// Takes in a frame from the device. Called only while [`Session::wants_input`].
    pub fn handle_frame(&mut self, frame: &Frame<'_>, now: Now) -> Option<Submission> {
        self.heard_at_us = now.mono_us;
        self.frame_begun_at_us = None;
        let step = self.count_strangers_bytes(frame.bytes.len());
        let step = match step {
            Ok(()) if types::is_skippable(frame.header.frame_type) && frame.intact => Ok(None),
            Ok(()) => self.route(frame, now),
            Err(close) => Err(close),
        };
        if let State::Serving(stream) = &mut self.state {
            let taken = step.as_ref().ok().and_then(Option::as_ref);
            stream.pace(taken, now);
        }
        self.finish_step(step)
    }

    /// What comes before WELCOME is two frames, and such as may be passed over.
    fn count_strangers_bytes(&mut self, frame_bytes: usize) -> Result<(), Close> {
        if !matches!(self.state, State::AwaitHello(_) | State::AwaitAuth(_)) {
            return Ok(());
        }
        self.stranger_bytes = self.stranger_bytes.saturating_add(frame_bytes);
        match self.stranger_bytes > self.settings.stranger_bytes_max {
            true => Err(Close::bye(Code::Authentication, "too much before AUTH")),
            false => Ok(()),
        }
    }

    fn route(&mut self, frame: &Frame<'_>, now: Now) -> Step {
        match &mut self.state {
            State::AwaitHello(state) => {
                let next = state.handle_frame(frame, &self.settings, now, &mut self.outbound)?;
                self.state = State::AwaitAuth(Box::new(next));
                Ok(None)
            }
            State::AwaitAuth(state) => {
                let (next, login) =
                    state.handle_frame(frame, self.peer, self.secured.as_deref(), now)?;
                self.state = State::AwaitAdmission(Box::new(next));
                Ok(Some(Submission::Login(login)))
            }
            State::Serving(stream) => stream.handle_frame(frame, now, &mut self.outbound),
            State::AwaitAdmission(_) | State::Closed(_) => Ok(None),
        }
    }

    /// The bytes from the peer hold no further frame.
    pub fn handle_frame_error(&mut self, error: FrameError) {
        let detail = error.to_string();
        self.close(match error {
            FrameError::Magic(byte) => Close::silent(format!("{detail}{}", guess(byte))),
            FrameError::HeaderCrc => Close::bye(Code::Header, detail),
            FrameError::TooLarge { .. } => Close::bye(Code::TooLarge, detail),
        });
    }

    /// Tells whether bytes of an unfinished frame are left after all whole ones were taken in.
    pub fn handle_partial_frame(&mut self, is_partial: bool, now: Now) {
        if !is_partial {
            self.frame_begun_at_us = None;
        } else if self.frame_begun_at_us.is_none() {
            self.frame_begun_at_us = Some(now.mono_us);
        }
    }

    /// The store's word on this session's login.
    pub fn handle_login_outcome(&mut self, outcome: LoginOutcome, now: Now) -> Option<Submission> {
        let State::AwaitAdmission(state) = &mut self.state else {
            return None;
        };
        let secured = self.secured.take();
        let binding = secured.map_or(NO_CHANNEL_BINDING, |secured| secured.binding);
        let outbound = &mut self.outbound;
        let step = match state.handle_outcome(outcome, &self.settings, &binding, now, outbound) {
            Ok(mut stream) => {
                stream.pace(None, now);
                let device = stream.device();
                let peer = self.peer.to_string();
                self.heard_at_us = now.mono_us;
                self.state = State::Serving(Box::new(stream));
                Ok(Some(audit(
                    device,
                    Some(self.id),
                    DeviceEventKind::Connected,
                    0,
                    peer,
                    now,
                )))
            }
            Err(close) => Err(close),
        };
        self.finish_step(step)
    }

    /// The store's word on this session's DECLARE.
    pub fn handle_declare_outcome(
        &mut self,
        outcome: DeclareOutcome,
        now: Now,
    ) -> Option<Submission> {
        let mut told = None;
        if let State::Serving(stream) = &mut self.state {
            // It was not listened to, so it was not silent.
            self.heard_at_us = now.mono_us;
            let refused = stream.handle_declare_outcome(outcome, now, &mut self.outbound);
            if let Some((code, detail)) = refused {
                let (device, kind) = (stream.device(), DeviceEventKind::Refused);
                told = Some(audit(device, None, kind, code as u8, detail, now));
            }
        }
        self.close_if_settled();
        told
    }

    /// A commit covered entries of this session, the last of them `through_seq`.
    pub fn handle_receipt(&mut self, receipt: Receipt, through_seq: u64) {
        if let State::Serving(stream) = &mut self.state {
            stream.handle_receipt(receipt, through_seq, &mut self.outbound);
        }
        self.close_if_settled();
    }

    /// The store does not answer, or does again.
    pub fn handle_store_down(&mut self, is_down: bool, now: Now) {
        match &mut self.state {
            State::Serving(stream) if is_down => {
                stream.handle_store_down(now, &mut self.outbound);
            }
            State::Serving(stream) => stream.handle_store_up(),
            _ => {}
        }
    }

    /// The store that admitted the session is not there any more: ends it without acknowledging anything,
    /// not even what was committed, so that the device sends again what it still has.
    pub fn handle_store_replaced(&mut self) {
        if let State::Serving(stream) = &mut self.state {
            stream.forget_due_ack();
        }
        self.close(store_replaced());
    }

    /// The gateway goes down: no more input; closed as soon as what was taken in is acknowledged.
    pub fn handle_drain(&mut self) {
        self.leave(Close::bye(Code::Shutdown, "gateway shuts down"));
    }

    /// The peer sends no more; it may still read.
    pub fn handle_end_of_input(&mut self) {
        let detail = match self.state {
            State::AwaitHello(_) => "peer closed the connection before HELLO",
            _ => "peer closed the connection",
        };
        self.leave(Close::silent(detail));
    }

    /// Whether only what was taken in is still awaited.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    fn leave(&mut self, close: Close) {
        self.leaving = Some(close);
        self.close_if_settled();
    }

    fn close_if_settled(&mut self) {
        let is_settled = match &self.state {
            State::Serving(stream) => stream.is_settled(),
            _ => true,
        };
        if is_settled && let Some(close) = self.leaving.take() {
            self.close(close);
        }
    }

    /// Ends the session; what is to be said is in [`Session::outbound`].
    pub fn close(&mut self, close: Close) {
        let whose = match &mut self.state {
            State::Closed(_) => return,
            State::AwaitHello(state) if state.device.is_empty() => Whose::Nobodys,
            State::AwaitHello(state) => Whose::Claimed(std::mem::take(&mut state.device)),
            State::AwaitAuth(state) => Whose::Claimed(std::mem::take(&mut state.device)),
            State::AwaitAdmission(state) => Whose::Claimed(std::mem::take(&mut state.device)),
            State::Serving(stream) => {
                stream.write_due_ack(&mut self.outbound);
                Whose::Admitted(stream.device())
            }
        };
        if let Some(code) = close.code {
            self.outbound.bye(code, close.retry_after_ms, &close.detail);
        }
        self.state = State::Closed(Box::new(Closed { whose, close }));
    }

    /// The connection failed, or is given up without a word.
    pub fn handle_loss(&mut self, detail: impl Into<String>) {
        self.close(Close::silent(detail));
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Now) {
        if let State::Serving(stream) = &mut self.state
            && stream.end_pace(now)
        {
            // It was not listened to, so it was not silent.
            self.heard_at_us = now.mono_us;
            return;
        }
        if self
            .poll_deadline()
            .is_some_and(|deadline_us| now.mono_us >= deadline_us)
        {
            let detail = match self.state {
                State::Serving(_) if self.frame_begun_at_us.is_some() => "stalled within a frame",
                State::Serving(_) => "silent",
                _ => "handshake not finished in time",
            };
            self.close(Close::bye(Code::Idle, detail));
        }
    }

    /// The moment, on the monotonic clock, at which [`Session::handle_timeout`] ends the session if
    /// nothing happens before.
    pub fn poll_deadline(&self) -> Option<u64> {
        let idle_us = self.heard_at_us + self.settings.idle_timeout_us;
        match &self.state {
            State::Closed(_) => None,
            State::Serving(stream) if stream.paced_until_us().is_some() => stream.paced_until_us(),
            // Silence is the peer's fault only while it is listened to.
            State::Serving(_) if !self.wants_input() => None,
            State::Serving(_) => Some(match self.frame_begun_at_us {
                Some(begun_at_us) => idle_us.min(begun_at_us + self.settings.frame_timeout_us),
                None => idle_us,
            }),
            _ => Some(self.opened_at_us + self.settings.handshake_timeout_us),
        }
    }

    /// What is to be sent now; an ACK that is due is written first.
    pub fn outbound(&mut self) -> &mut Outbound {
        if let State::Serving(stream) = &mut self.state {
            stream.write_due_ack(&mut self.outbound);
        }
        &mut self.outbound
    }

    /// Whose connection it is.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The device, once it is admitted.
    pub fn device(&self) -> Option<DeviceId> {
        match &self.state {
            State::Serving(stream) => Some(stream.device()),
            State::Closed(closed) => match closed.whose {
                Whose::Admitted(device) => Some(device),
                _ => None,
            },
            _ => None,
        }
    }

    /// How the session was closed; `None` while it is open.
    pub fn closed(&self) -> Option<&Close> {
        match &self.state {
            State::Closed(closed) => Some(&closed.close),
            _ => None,
        }
    }

    /// The name that the peer claimed and the session did not admit; empty if it claimed none.
    pub fn claimed(&self) -> &str {
        match &self.state {
            State::AwaitHello(state) => &state.device,
            State::AwaitAuth(state) => &state.device,
            State::AwaitAdmission(state) => &state.device,
            State::Closed(closed) => match &closed.whose {
                Whose::Claimed(device) => device,
                Whose::Nobodys | Whose::Admitted(_) => "",
            },
            State::Serving(_) => "",
        }
    }

    /// The connection is gone: a line of the audit trail for a device that was admitted; for another peer a
    /// refusal if it `is_refused`, which is for the audit trail, too, if it `is_told`.
    pub fn handle_disconnect(
        &mut self,
        is_refused: bool,
        is_told: bool,
        now: Now,
    ) -> Option<Submission> {
        self.handle_loss("connection lost");
        let State::Closed(closed) = &self.state else {
            return None;
        };
        let Close { code, detail, .. } = &closed.close;
        let code = code.map_or(0, |code| code as u8);
        if let Whose::Admitted(device) = &closed.whose {
            let kind = DeviceEventKind::Disconnected;
            return Some(audit(
                *device,
                Some(self.id),
                kind,
                code,
                detail.clone(),
                now,
            ));
        }
        is_refused.then(|| {
            Submission::Refusal(Refusal {
                peer: self.peer.ip().to_canonical(),
                device: self.claimed().to_owned(),
                code,
                detail: detail.clone(),
                count: 1,
                first_at_us: now.utc_us,
                at_us: now.utc_us,
                is_told,
            })
        })
    }

    fn finish_step(&mut self, step: Step) -> Option<Submission> {
        match step {
            Ok(submission) => submission,
            Err(close) => {
                self.close(close);
                None
            }
        }
    }
}

/// How a session ends whose store is not there any more; the device connects again.
fn store_replaced() -> Close {
    Close::bye(Code::Shutdown, "the store was put back to an earlier state")
}

/// What speaks, by its first byte.
fn guess(byte: u8) -> &'static str {
    match byte {
        0x16 => ": TLS at the port for plain text?",
        b'G' | b'H' | b'P' | b'O' | b'D' => ": HTTP or a PROXY header?",
        0x0d => ": a PROXY header?",
        0x10 => ": MQTT?",
        _ => "",
    }
}

/// A line for the audit trail.
fn audit(
    device: DeviceId,
    session: Option<SessionId>,
    kind: DeviceEventKind,
    code: u8,
    detail: String,
    now: Now,
) -> Submission {
    Submission::Event(DeviceEvent {
        device,
        session,
        at_us: now.utc_us,
        kind,
        code,
        detail,
    })
}
