//! The only place where sockets meet sessions: one task for each connection, one select in it.
//!
//! It carries bytes to the session and from it, finds room in the ingest queue for what the session
//! submits before it reads on, and empties the session's mailbox. What any of it means is the
//! session's business.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use fieldgate_protocol::auth::NONCE_BYTES;
use fieldgate_protocol::error::Code;
use tokio::io::Interest;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_util::codec::Decoder;
use tokio_util::sync::CancellationToken;

use crate::ingest::mailbox::{Mail, Mailbox};
use crate::ingest::registry::Registry;
use crate::ingest::{IngestQueue, Turn};
use crate::net::codec::{CodecError, FrameCodec};
use crate::net::socket::Socket;
use crate::net::tls;
use crate::server::admission::Visit;
use crate::session::handshake::Secured;
use crate::session::{Close, Session, SessionSettings, Submission};
use crate::time::SystemClock;

/// What is read at once from a device.
const READ_BYTES: usize = 16 * 1024;
/// What is read at once from a peer that has not proved yet that it is one.
const STRANGER_READ_BYTES: usize = 1024;
/// Of TLS from such a peer: its handshake, with a chain of certificates, and what carries two short frames.
const STRANGER_TLS_BYTES_MAX: usize = 64 * 1024;
/// How long a peer may take to read the last words and close.
const FAREWELL: Duration = Duration::from_secs(1);
/// When there is no deadline: far enough to never matter.
const NO_DEADLINE: Duration = Duration::from_secs(3600);

/// What all connections of a gateway share.
pub struct Shared {
    /// For sessions.
    pub settings: Arc<SessionSettings>,
    /// Which sessions are live.
    pub registry: Arc<Registry>,
    /// The gateway's clocks.
    pub clock: SystemClock,
    /// Cancelled when the gateway goes down.
    pub drain: CancellationToken,
}

/// A connection.
pub struct Connection {
    socket: Socket,
    visit: Visit,
    session: Session,
    mailbox: Arc<Mailbox>,
    /// Received and not taken in yet; holds no memory while the peer is idle.
    input: BytesMut,
    /// Whether anything came from the peer: those who look whether somebody listens say nothing.
    has_spoken: bool,
    /// A submission for which there was no room at once.
    waiting: Option<Pin<Box<dyn Future<Output = Turn> + Send>>>,
    queue: IngestQueue,
    shared: Arc<Shared>,
}

impl Connection {
    /// One that has just been accepted.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn new(
        socket: Socket,
        peer: SocketAddr,
        visit: Visit,
        mailbox: Arc<Mailbox>,
        shared: Arc<Shared>,
        queue: IngestQueue,
    ) -> std::io::Result<Connection> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(std::io::Error::other)?;
        let settings = Arc::clone(&shared.settings);
        Ok(Connection {
            socket,
            visit,
            session: Session::new(settings, peer, nonce, shared.clock.now()),
            mailbox,
            input: BytesMut::new(),
            has_spoken: false,
            waiting: None,
            queue,
            shared,
        })
    }

    /// Serves it until it ends.
    ///
    /// The future is what a connection costs while nothing happens. It holds the connection once, and
    /// what is needed only at the end gets a box of its own.
    #[expect(
        clippy::manual_async_fn,
        reason = "an async fn would hold `self` twice"
    )]
    pub fn serve(mut self) -> impl Future<Output = ()> + Send + 'static {
        async move {
            self.run().await;
            Box::pin(self.finish()).await;
        }
    }

    async fn run(&mut self) {
        let timer = sleep_until(self.deadline());
        tokio::pin!(timer);
        let drain = self.shared.drain.clone();
        while self.session.closed().is_none() {
            self.rearm(timer.as_mut());
            let interest = self.interest();
            tokio::select! {
                // What the gateway has decided comes before what the peer says next: a session that was told
                // to end takes nothing more in.
                biased;
                mail = self.mailbox.take() => self.handle_mail(mail),
                () = drain.cancelled(), if !self.session.is_leaving() => self.session.handle_drain(),
                () = timer.as_mut() => {
                    self.session.handle_timeout(self.shared.clock.now());
                    // It may have had to wait for its rate.
                    self.take_frames(None);
                }
                turn = async { self.waiting.as_mut().expect("checked").await },
                    if self.waiting.is_some() => {
                    self.waiting = None;
                    self.take_frames(Some(turn));
                }
                ready = self.socket.ready(interest.unwrap_or(Interest::READABLE)),
                    if interest.is_some() => match ready {
                    Ok(ready) if ready.is_readable() => self.read(),
                    Ok(_) => {}
                    Err(error) => self.lose(&error),
                },
            }
            if !self.has_failed() {
                self.write();
            }
        }
    }

    /// Whether it is closed to a stranger who did not prove a key, and who is to wait for the answer.
    fn has_failed(&self) -> bool {
        let code = self.session.closed().and_then(|close| close.code);
        code == Some(Code::Authentication) && self.session.device().is_none()
    }

    /// What of the socket is waited for.
    fn interest(&mut self) -> Option<Interest> {
        let reads = self.waiting.is_none() && self.session.wants_input();
        let writes = self.socket.wants_write() || !self.session.outbound().bytes().is_empty();
        match (reads, writes) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        }
    }

    /// When the session wants to hear of the time.
    fn deadline(&self) -> Instant {
        match self.session.poll_deadline() {
            Some(deadline_us) => self.shared.clock.instant(deadline_us).into(),
            None => Instant::now() + NO_DEADLINE,
        }
    }

    /// Moves the timer only where it would go off too late or has gone off: frames push the deadline
    /// back all the time.
    fn rearm(&self, timer: Pin<&mut Sleep>) {
        let deadline = self.deadline();
        if timer.is_elapsed() || deadline < timer.deadline() {
            timer.reset(deadline);
        }
    }

    fn read(&mut self) {
        let bytes_max = match self.session.device() {
            Some(_) => READ_BYTES,
            None => STRANGER_READ_BYTES,
        };
        let result = self.socket.try_read(&mut self.input, bytes_max);
        self.has_spoken |= !self.input.is_empty() || self.socket.tls_bytes() > 0;
        if let Some(channel) = self.socket.take_channel() {
            self.session.handle_secured(Secured {
                binding: channel.binding,
                names: channel.certificate.as_ref().map(tls::names),
            });
        }
        match result {
            Ok(0) if self.socket.is_handshaking() => {
                let detail = "peer closed the connection during the TLS handshake";
                self.session.handle_loss(detail);
            }
            Ok(0) => self.session.handle_end_of_input(),
            Ok(_) => self.take_frames(None),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => self.lose(&error),
        }
        if self.session.device().is_none() && self.socket.tls_bytes() > STRANGER_TLS_BYTES_MAX {
            self.session.handle_loss("too much of TLS before AUTH");
        }
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
    }

    /// Hands frames to the session, until they are used up or one must wait for room.
    fn take_frames(&mut self, mut turn: Option<Turn>) {
        while self.waiting.is_none() && self.session.wants_input() {
            let mut codec = FrameCodec {
                frame_bytes_max: self.session.frame_bytes_max(),
            };
            match codec.decode(&mut self.input) {
                Ok(Some(frame)) => {
                    let now = self.shared.clock.now();
                    if let Some(submission) = self.session.handle_frame(&frame.frame(), now) {
                        self.submit(submission, turn.as_mut());
                    }
                }
                Ok(None) => {
                    let is_partial = !self.input.is_empty();
                    self.session
                        .handle_partial_frame(is_partial, self.shared.clock.now());
                    break;
                }
                Err(CodecError::Frame(error)) => self.session.handle_frame_error(error),
                Err(CodecError::Io(error)) => self.lose(&error),
            }
        }
    }

    fn submit(&mut self, submission: Submission, turn: Option<&mut Turn>) {
        if let Submission::Login(login) = &submission {
            self.visit.prove();
            self.queue.take_lane_of(&login.device);
        }
        if let Some(submission) = self.queue.try_submit(submission, &self.mailbox, turn) {
            let queue = self.queue.clone();
            let mailbox = Arc::clone(&self.mailbox);
            self.waiting = Some(Box::pin(queue.submit(submission, mailbox)));
        }
    }

    fn handle_mail(&mut self, mail: Mail) {
        let now = self.shared.clock.now();
        if mail.store_is_replaced {
            return self.session.handle_store_replaced();
        }
        if let Some(outcome) = mail.login
            && let Some(submission) = self.session.handle_login_outcome(outcome, now)
        {
            self.submit(submission, None);
        }
        if let Some(outcome) = mail.declare
            && let Some(submission) = self.session.handle_declare_outcome(outcome, now)
        {
            self.submit(submission, None);
        }
        if let Some((receipt, through_seq)) = mail.receipt {
            self.session.handle_receipt(receipt, through_seq);
        }
        if let Some(is_down) = mail.store_is_down {
            self.session.handle_store_down(is_down, now);
        }
        if let Some(close) = mail.close {
            self.session.close(close);
        }
        // Frames that came in while an answer was awaited.
        self.take_frames(None);
    }

    /// Sends what the socket takes now.
    fn write(&mut self) {
        let outbound = self.session.outbound();
        while !outbound.bytes().is_empty() {
            match self.socket.try_write(outbound.bytes()) {
                Ok(count) => outbound.consume(count),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return self.lose(&error),
            }
        }
        if let Err(error) = self.socket.try_flush() {
            return self.lose(&error);
        }
        if outbound.bytes().len() > self.shared.settings.outbound_bytes_max {
            self.session
                .handle_loss("peer does not read what it is told");
        }
    }

    fn lose(&mut self, error: &std::io::Error) {
        let detail = match tls::failure(error) {
            Some(failure) => format!("TLS failed: {failure}"),
            None => format!("connection lost: {error}"),
        };
        self.session.handle_loss(detail);
    }

    /// Says the last words, leaves the device's place to the next session, and writes the last line of
    /// the audit trail.
    async fn finish(mut self) {
        // A submission that found no room was not answered, so the device sends it again.
        self.waiting = None;
        if let Some(device) = self.session.device() {
            self.shared.registry.leave(device, &self.mailbox);
        }
        let is_told = self.session.closed().is_some_and(|close| self.log(close));
        let is_refused = self.is_refused();
        let mut is_gone = false;
        if self.has_failed() {
            let now = self.shared.clock.now();
            tokio::select! {
                () = sleep(self.visit.fail(now.mono_us)) => {}
                // Nobody waits for a failure: neither those for whom there is no room, nor the end.
                _ = self.mailbox.take() => {}
                () = self.shared.drain.cancelled() => {}
                // And nobody hears sooner by leaving.
                _ = self.socket.wait_for_end() => is_gone = true,
            }
        }
        match self.session.closed().and_then(|close| close.code) {
            Some(_) if is_gone => {}
            Some(_) => drop(timeout(FAREWELL, self.say_farewell()).await),
            None => self.socket.try_end(),
        }
        drop(self.socket);
        let now = self.shared.clock.now();
        match self.session.handle_disconnect(is_refused, is_told, now) {
            Some(Submission::Refusal(refusal)) => self.visit.entrance().note(refusal),
            Some(event) => drop(self.queue.submit(event, self.mailbox).await),
            None => {}
        }
    }

    /// Sends what is left, then waits for the peer to close: closing over unread input would reset the
    /// connection, and the last words could be lost with it.
    async fn say_farewell(&mut self) -> std::io::Result<()> {
        self.socket
            .write_all(self.session.outbound().bytes())
            .await?;
        self.socket.shutdown().await?;
        self.socket.wait_for_end().await
    }

    /// Whether the operator should know how it ended: it was refused, or it spoke and ended before it had proved
    /// a key, with or without a word.
    fn is_refused(&self) -> bool {
        let Some(close) = self.session.closed() else {
            return false;
        };
        match close.code {
            Some(code) if code >= Code::Protocol => true,
            None | Some(Code::Idle) => self.has_spoken && self.visit.is_stranger(),
            Some(_) => false,
        }
    }

    /// A client that vanishes is nothing to worry about; one that is refused is for the operator to see,
    /// but not as often as it likes. Tells whether it was written.
    fn log(&self, close: &Close) -> bool {
        let (peer, detail) = (self.session.peer(), &close.detail);
        let code = close.code.map_or(0, |code| code as u8);
        if !self.is_refused() {
            tracing::debug!(%peer, code, %detail, "connection closed");
            return false;
        }
        let now = self.shared.clock.now();
        let Some(not_logged) = self.visit.entrance().may_log(peer.ip(), now.mono_us) else {
            return false;
        };
        match self.session.claimed() {
            "" => tracing::info!(%peer, code, %detail, not_logged, "connection refused"),
            claimed => {
                tracing::info!(%peer, code, %detail, claimed, not_logged, "connection refused");
            }
        }
        true
    }
}
