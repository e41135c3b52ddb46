//! The only path of bytes and mail to a session. It always processes them in the same order.
//!
//! The caller appends received bytes to [`Inbox::input`], passes mail to [`Inbox::handle_mail`] and
//! time to the session, and then polls for submissions until there is none.
//!
//! Invariants
//! - Until a submission is queued, nothing more is processed and no input is read: this is the back
//!   pressure.
//! - Bytes wait while the session accepts no frames. They are processed by the first poll after the
//!   mail or the timeout that lets it accept them.
//! - An empty input buffer holds no memory.

use bytes::{Buf, BytesMut};
use fieldgate_protocol::frame;

use super::{Close, Session, Submission};
use crate::store::{DeclareOutcome, LoginOutcome, Receipt};
use crate::time::Now;

/// Messages to a session from outside its connection, the newest of each kind.
#[derive(Debug, Default)]
pub struct Mail {
    /// Outcome of the session's login.
    pub login: Option<LoginOutcome>,
    /// Outcome of the session's DECLARE.
    pub declare: Option<DeclareOutcome>,
    /// The latest commit, and the last number of this session that it covered.
    pub receipt: Option<(Receipt, u64)>,
    /// Change of the store's availability.
    pub store_is_down: Option<bool>,
    /// Whether the store that the session logged in to was replaced.
    pub store_is_replaced: bool,
    /// Request to end the session.
    pub close: Option<Close>,
}

/// A session with its unprocessed input; see the module documentation.
pub struct Inbox {
    /// The session. Frames and mail reach it only through the inbox.
    pub session: Session,
    /// Bytes received but not processed.
    input: BytesMut,
    /// A submission that mail has caused; boxed, because it is rare.
    event: Option<Box<Submission>>,
    /// Whether the latest submission is not queued yet.
    is_queuing: bool,
}

impl Inbox {
    /// Creates an empty inbox.
    pub fn new(session: Session) -> Inbox {
        Inbox {
            session,
            input: BytesMut::new(),
            event: None,
            is_queuing: false,
        }
    }

    /// Returns whether bytes from the peer are wanted now.
    pub fn wants_input(&self) -> bool {
        !self.is_queuing && self.session.wants_input()
    }

    /// Returns the buffer to which the caller appends received bytes.
    pub fn input(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// Handles mail. When the store was replaced, all other mail is about the former store.
    pub fn handle_mail(&mut self, mail: Mail, now: Now) {
        let session = &mut self.session;
        if mail.store_is_replaced {
            return session.handle_store_replaced();
        }
        // A session awaits at most one outcome, and submits nothing until it arrives.
        let outcome = mail.login;
        let mut event = outcome.and_then(|outcome| session.handle_login_outcome(outcome, now));
        if let Some(outcome) = mail.declare {
            event = event.or(session.handle_declare_outcome(outcome, now));
        }
        if let Some(event) = event {
            self.event = Some(Box::new(event));
        }
        if let Some((receipt, through_seq)) = mail.receipt {
            session.handle_receipt(receipt, through_seq);
        }
        if let Some(is_down) = mail.store_is_down {
            session.handle_store_down(is_down, now);
        }
        if let Some(close) = mail.close {
            session.close(close);
        }
    }

    /// Returns the next submission, processing input as far as needed. Returns `None` until
    /// [`Inbox::handle_queued`] is called for the previous one.
    pub fn poll_submission(&mut self, now: Now) -> Option<Submission> {
        if self.is_queuing {
            return None;
        }
        let event = self.event.take().map(|event| *event);
        let submission = event.or_else(|| self.process_input(now));
        self.is_queuing = submission.is_some();
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        submission
    }

    /// Records that the latest submission is queued.
    pub fn handle_queued(&mut self) {
        self.is_queuing = false;
    }

    /// Passes frames to the session until one causes a submission or no whole frame is left.
    fn process_input(&mut self, now: Now) -> Option<Submission> {
        while self.session.wants_input() {
            match frame::decode(&self.input, self.session.frame_bytes_max()) {
                Ok(Some(frame)) => {
                    let frame_bytes = frame.bytes.len();
                    let submission = self.session.handle_frame(&frame, now);
                    self.input.advance(frame_bytes);
                    if submission.is_some() {
                        return submission;
                    }
                }
                Ok(None) => {
                    let is_partial = !self.input.is_empty();
                    self.session.handle_partial_frame(is_partial, now);
                    break;
                }
                Err(error) => self.session.handle_frame_error(error),
            }
        }
        None
    }
}
