//! One device's connection as a state machine: frames and receipts in, replies and submissions out.
//!
//! `connection` owns the socket, the clocks and the queue, and `store` makes data durable. Bytes and mail
//! reach a session through its [`inbox`]. A session waits for HELLO, then AUTH, then the store's login
//! outcome, then serves the stream until it is closed. [`handshake`] contains the states before WELCOME,
//! `stream` the state after it, with a module for each concern: `order` judges the numbers of frames,
//! `refusals` limits permanent refusals, `schemas` keeps declared schemas, `clock` measures the device's
//! clocks, and `pacing` holds the device to its quota.
//!
//! Invariants
//! - A call returns at most one [`Submission`], and nothing more is processed until it is queued.
//! - While the outcome of a login or DECLARE is pending, no frame is accepted.
//! - Only numbers from a `Receipt` are acknowledged (see [`reply`]).

mod clock;
pub mod handshake;
pub mod inbox;
mod order;
mod pacing;
mod refusals;
pub mod reply;
pub(crate) mod retry;
mod schemas;
mod settings;
mod stream;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use fieldgate_protocol::auth::{NO_CHANNEL_BINDING, NONCE_BYTES};
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{Frame, FrameError, HANDSHAKE_FRAME_BYTES_MAX, types};

use self::handshake::{AwaitAdmission, AwaitAuth, AwaitHello, Secured};
use self::reply::Outbound;
pub use self::settings::SessionSettings;
use self::stream::Stream;
use crate::quota::quarantine::Reservation;
use crate::store::reuse::Repeat;
use crate::store::{
    Declare, DeclareOutcome, DeviceEvent, DeviceEventKind, DeviceId, Entry, Login, LoginOutcome,
    Receipt, Refusal, SessionId,
};
use crate::time::{BootClock, ClockStep, Now};

/// A request from a session to the ingest queue.
#[derive(Debug)]
pub enum Submission {
    /// Look up the device's stream. Answered by [`inbox::Mail::login`].
    Login(Login),
    /// Store this schema. Answered by [`inbox::Mail::declare`].
    Declare(Declare),
    /// Store this entry. Answered by [`inbox::Mail::receipt`].
    Entry(Entry),
    /// Put this entry into quarantine, using the reserved space. Answered like an entry.
    Quarantine(Entry, Reservation),
    /// Compare a repeated number with its stored content; not answered.
    Repeat(Repeat),
    /// Store this clock measurement; not answered.
    Clock(DeviceId, BootClock),
    /// Store this audit event; not answered.
    Event(DeviceEvent),
    /// Store this audit event if the device exists; not answered.
    Refusal(Refusal),
    /// Record a step of the gateway's clock; not answered. Not from a session.
    Step(ClockStep),
}

/// Reason and details of the end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// Code of the BYE; `None` if no BYE is sent (the peer does not speak FWP, or has
    /// disconnected).
    pub code: Option<Code>,
    /// Earliest time for the peer to reconnect, in milliseconds from now.
    pub retry_after_ms: u32,
    /// Details for the log, the audit trail and the peer.
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

/// Result of an input in a state: perhaps a submission, or the end of the session.
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

/// Owner of a session, for the audit trail.
enum Whose {
    /// An unauthenticated peer that claimed this name; empty if it claimed none.
    Claimed(String),
    Admitted(DeviceId),
}

/// The session state machine; see the module documentation.
pub struct Session {
    id: SessionId,
    settings: Arc<SessionSettings>,
    peer: SocketAddr,
    /// Properties of the TLS connection; boxed, because the handshake discards them.
    secured: Option<Box<Secured>>,
    state: State,
    outbound: Outbound,
    opened_at_us: u64,
    /// Number of bytes received before the device proved its key.
    preauth_bytes: usize,
    /// When the latest whole frame arrived.
    heard_at_us: u64,
    /// When the first byte of an incomplete frame arrived.
    frame_begun_at_us: Option<u64>,
    /// Set when no more input is accepted: the session closes for this reason once all accepted frames are
    /// acknowledged. Boxed, because an idle connection has none.
    leaving: Option<Box<Close>>,
}

impl Session {
    /// Creates a session for a new connection. `nonce` is random.
    pub fn new(
        settings: Arc<SessionSettings>,
        peer: SocketAddr,
        nonce: [u8; NONCE_BYTES],
        now: Now,
    ) -> Session {
        let [a, b, c, d, e, f, g, h, ..] = nonce;
        Session {
            // SQL integers are signed.
            id: SessionId((u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 1).cast_signed()),
            outbound: Outbound::new(Arc::clone(&settings.metrics)),
            settings,
            peer,
            secured: None,
            state: State::AwaitHello(AwaitHello {
                nonce,
                device: String::new(),
            }),
            opened_at_us: now.mono_us,
            preauth_bytes: 0,
            heard_at_us: now.mono_us,
            frame_begun_at_us: None,
            leaving: None,
        }
    }

    /// Handles the end of the TLS handshake.
    pub fn handle_secured(&mut self, secured: Secured) {
        self.secured = Some(Box::new(secured));
    }

    /// Returns the longest frame accepted now, in bytes; a longer one is refused by its header.
    fn frame_bytes_max(&self) -> usize {
        match self.state {
            State::Serving(_) => usize::from(self.settings.limits.frame_bytes_max),
            _ => HANDSHAKE_FRAME_BYTES_MAX,
        }
    }

    /// Returns whether frames are accepted now.
    fn wants_input(&self) -> bool {
        match &self.state {
            State::AwaitHello(_) | State::AwaitAuth(_) => true,
            State::Serving(stream) => self.leaving.is_none() && stream.wants_input(),
            State::AwaitAdmission(_) | State::Closed(_) => false,
        }
    }

    /// Handles a frame from the device. Called only while [`Session::wants_input`] returns true.
    fn handle_frame(&mut self, frame: &Frame<'_>, now: Now) -> Option<Submission> {
        self.heard_at_us = now.mono_us;
        self.frame_begun_at_us = None;
        let step = self.count_preauth_bytes(frame.bytes.len());
        let step = match step {
            Ok(()) if types::is_skippable(frame.header.frame_type) && frame.intact => Ok(None),
            Ok(()) => self.route(frame, now),
            Err(close) => Err(close),
        };
        if let State::Serving(stream) = &mut self.state {
            let taken = step.as_ref().ok().and_then(Option::as_ref);
            stream.pacing.count(taken, now.mono_us);
        }
        self.finish_step(step)
    }

    /// Before WELCOME the peer sends two frames, and possibly types that may be skipped.
    fn count_preauth_bytes(&mut self, frame_bytes: usize) -> Result<(), Close> {
        if !matches!(self.state, State::AwaitHello(_) | State::AwaitAuth(_)) {
            return Ok(());
        }
        self.preauth_bytes = self.preauth_bytes.saturating_add(frame_bytes);
        match self.preauth_bytes > self.settings.limits.preauth_bytes_max {
            true => Err(Close::bye(
                Code::Authentication,
                "too many bytes before AUTH",
            )),
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

    /// Handles bytes that do not start a valid frame.
    fn handle_frame_error(&mut self, error: FrameError) {
        let detail = error.to_string();
        self.close(match error {
            FrameError::Magic(byte) => Close::silent(format!("{detail}{}", guess(byte))),
            FrameError::HeaderCrc => Close::bye(Code::Header, detail),
            FrameError::TooLarge { .. } => Close::bye(Code::TooLarge, detail),
        });
    }

    /// Updates the frame timeout: `is_partial` says whether an incomplete frame is left after all
    /// whole ones were handled.
    fn handle_partial_frame(&mut self, is_partial: bool, now: Now) {
        if !is_partial {
            self.frame_begun_at_us = None;
        } else if self.frame_begun_at_us.is_none() {
            self.frame_begun_at_us = Some(now.mono_us);
        }
    }

    /// Handles the store's outcome of this session's login.
    fn handle_login_outcome(&mut self, outcome: LoginOutcome, now: Now) -> Option<Submission> {
        let State::AwaitAdmission(state) = &mut self.state else {
            return None;
        };
        let secured = self.secured.take();
        let binding = secured.map_or(NO_CHANNEL_BINDING, |secured| secured.binding);
        let outbound = &mut self.outbound;
        let step = match state.handle_outcome(outcome, &self.settings, &binding, now, outbound) {
            Ok(mut stream) => {
                stream.pacing.count(None, now.mono_us);
                let (device, kind) = (stream.device, DeviceEventKind::Connected);
                let peer = self.peer.to_string();
                self.heard_at_us = now.mono_us;
                self.state = State::Serving(Box::new(stream));
                Ok(Some(audit(device, Some(self.id), kind, 0, peer, now)))
            }
            Err(close) => Err(close),
        };
        self.finish_step(step)
    }

    /// Handles the store's outcome of this session's DECLARE.
    fn handle_declare_outcome(&mut self, outcome: DeclareOutcome, now: Now) -> Option<Submission> {
        let mut event = None;
        if let State::Serving(stream) = &mut self.state {
            // Input was paused, so the device was not silent.
            self.heard_at_us = now.mono_us;
            let refused = stream.handle_declare_outcome(outcome, now, &mut self.outbound);
            if let Some((code, detail)) = refused {
                let (device, kind) = (stream.device, DeviceEventKind::Refused);
                event = Some(audit(device, None, kind, code as u8, detail, now));
            }
        }
        self.close_if_settled();
        event
    }

    /// Handles a commit of entries of this session, the last of them `through_seq`.
    fn handle_receipt(&mut self, receipt: Receipt, through_seq: u64) {
        if let State::Serving(stream) = &mut self.state {
            stream.handle_receipt(receipt, through_seq, &mut self.outbound);
        }
        self.close_if_settled();
    }

    /// Handles a change of the store's availability.
    fn handle_store_down(&mut self, is_down: bool, now: Now) {
        match &mut self.state {
            State::Serving(stream) if is_down => {
                stream.handle_store_down(now, &mut self.outbound);
            }
            State::Serving(stream) => stream.handle_store_up(),
            _ => {}
        }
    }

    /// Handles the loss of the store that the session logged in to: ends the session without
    /// acknowledging anything, even if committed, so that the device reconnects and resends the
    /// frames it still has.
    fn handle_store_replaced(&mut self) {
        if let State::Serving(stream) = &mut self.state {
            // Durable frames may be lost.
            stream.order.ack_is_due = false;
        }
        let detail = "the store was restored to an earlier state";
        self.close(Close::bye(Code::Shutdown, detail));
    }

    /// Handles shutdown: accepts no more input and closes once all accepted frames are
    /// acknowledged.
    pub fn handle_drain(&mut self) {
        self.leave(Close::bye(Code::Shutdown, "gateway is shutting down"));
    }

    /// Handles the end of the peer's output; the peer may still read.
    pub fn handle_end_of_input(&mut self) {
        let detail = match self.state {
            State::AwaitHello(_) => "peer closed the connection before HELLO",
            _ => "peer closed the connection",
        };
        self.leave(Close::silent(detail));
    }

    /// Returns whether the session accepts no more input and waits for accepted frames.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    fn leave(&mut self, close: Close) {
        self.leaving = Some(Box::new(close));
        self.close_if_settled();
    }

    fn close_if_settled(&mut self) {
        let is_settled = match &self.state {
            State::Serving(stream) => stream.is_settled(),
            _ => true,
        };
        if is_settled && let Some(close) = self.leaving.take() {
            self.close(*close);
        }
    }

    /// Ends the session; [`Session::outbound`] holds the last reply.
    fn close(&mut self, close: Close) {
        let whose = match &mut self.state {
            State::Closed(_) => return,
            State::AwaitHello(state) => Whose::Claimed(std::mem::take(&mut state.device)),
            State::AwaitAuth(state) => Whose::Claimed(std::mem::take(&mut state.device)),
            State::AwaitAdmission(state) => Whose::Claimed(std::mem::take(&mut state.device)),
            State::Serving(stream) => {
                stream.order.write_due_ack(&mut self.outbound);
                Whose::Admitted(stream.device)
            }
        };
        if let Some(code) = close.code {
            self.outbound.bye(code, close.retry_after_ms, &close.detail);
        }
        self.state = State::Closed(Box::new(Closed { whose, close }));
    }

    /// Handles a failed or abandoned connection, without a BYE.
    pub fn handle_loss(&mut self, detail: impl Into<String>) {
        self.close(Close::silent(detail));
    }

    /// Handles the passing of time.
    pub fn handle_timeout(&mut self, now: Now) {
        if let State::Serving(stream) = &mut self.state
            && stream.pacing.resume(now.mono_us)
        {
            // Input was paused, so the device was not silent.
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
                _ => "handshake timed out",
            };
            self.close(Close::bye(Code::Idle, detail));
        }
    }

    /// Returns the deadline, on the monotonic clock, at which [`Session::handle_timeout`] ends the
    /// session unless something else happens first.
    pub fn poll_deadline(&self) -> Option<u64> {
        let idle_us = self.heard_at_us + self.settings.limits.idle_timeout_us();
        match &self.state {
            State::Closed(_) => None,
            // Silence counts against the peer only while input is accepted.
            State::Serving(stream) if !self.wants_input() => stream.pacing.until_us(),
            State::Serving(_) => Some(match self.frame_begun_at_us {
                Some(begun_at_us) => {
                    idle_us.min(begun_at_us + self.settings.limits.frame_timeout_us())
                }
                None => idle_us,
            }),
            _ => Some(self.opened_at_us + self.settings.limits.handshake_timeout_us()),
        }
    }

    /// Returns whether the peer leaves more unread than it may.
    pub fn has_too_much_outbound(&mut self) -> bool {
        self.outbound().bytes().len() > self.settings.limits.outbound_bytes_max
    }

    /// Returns the outbound buffer, after writing any due ACK.
    pub fn outbound(&mut self) -> &mut Outbound {
        if let State::Serving(stream) = &mut self.state {
            stream.order.write_due_ack(&mut self.outbound);
        }
        &mut self.outbound
    }

    /// Returns the peer's address.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Returns the device after login.
    pub fn device(&self) -> Option<DeviceId> {
        match &self.state {
            State::Serving(stream) => Some(stream.device),
            State::Closed(closed) => match closed.whose {
                Whose::Admitted(device) => Some(device),
                _ => None,
            },
            _ => None,
        }
    }

    /// Returns how the session was closed; `None` while it is open.
    pub fn closed(&self) -> Option<&Close> {
        match &self.state {
            State::Closed(closed) => Some(&closed.close),
            _ => None,
        }
    }

    /// Returns the name claimed by the peer of a closed session that did not log in; empty if it
    /// claimed none.
    pub fn claimed(&self) -> &str {
        match &self.state {
            State::Closed(closed) => match &closed.whose {
                Whose::Claimed(device) => device,
                Whose::Admitted(_) => "",
            },
            _ => "",
        }
    }

    /// Handles the end of the connection. Returns an audit event for a device after login. For another
    /// peer, returns a refusal if it `is_refused`; if `is_audited`, the refusal also goes to the audit trail.
    pub fn handle_disconnect(
        &mut self,
        is_refused: bool,
        is_audited: bool,
        now: Now,
    ) -> Option<Submission> {
        self.handle_loss("connection lost");
        let State::Closed(closed) = &self.state else {
            return None;
        };
        let Close { code, detail, .. } = &closed.close;
        let (code, detail) = (code.map_or(0, |code| code as u8), detail.clone());
        match &closed.whose {
            Whose::Admitted(device) => {
                let (session, kind) = (Some(self.id), DeviceEventKind::Disconnected);
                Some(audit(*device, session, kind, code, detail, now))
            }
            Whose::Claimed(device) => is_refused.then(|| {
                Submission::Refusal(Refusal {
                    peer: self.peer.ip().to_canonical(),
                    device: device.clone(),
                    code,
                    detail,
                    count: 1,
                    first_at_us: now.utc_us,
                    at_us: now.utc_us,
                    is_audited,
                })
            }),
        }
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

/// Guesses the peer's protocol from its first byte.
fn guess(byte: u8) -> &'static str {
    match byte {
        0x16 => ": TLS on the plain TCP port?",
        b'G' | b'H' | b'P' | b'O' | b'D' => ": HTTP or a PROXY header?",
        0x0d => ": a PROXY header?",
        0x10 => ": MQTT?",
        _ => "",
    }
}

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
