//! Connects sockets to sessions: one task with one select loop for each connection.
//!
//! The task carries bytes, mail and time to the session's inbox, its submissions to the ingest queue,
//! and its replies to the socket. While it waits for space in the queue, the inbox wants no input.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use fieldgate_protocol::auth::NONCE_BYTES;
use fieldgate_protocol::error::Code;
use tokio::io::{Interest, Ready};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::ingest::mailbox::Mailbox;
use crate::ingest::registry::Registry;
use crate::ingest::{IngestQueue, Space};
use crate::net::socket::Socket;
use crate::net::tls;
use crate::server::admission::ConnectionPermit;
use crate::session::handshake::Secured;
use crate::session::inbox::Inbox;
use crate::session::{Close, Session, SessionSettings, Submission};
use crate::time::SystemClock;

const READ_BYTES: usize = 16 * 1024;
const PREAUTH_READ_BYTES: usize = 1024;
/// Maximum TLS bytes from an unauthenticated peer: its handshake with a certificate chain, and the
/// records of two short frames.
const PREAUTH_TLS_BYTES_MAX: usize = 64 * 1024;
/// How long a peer may take to read the last reply and close.
const LINGER: Duration = Duration::from_secs(1);
/// Timer interval when there is no deadline.
const NO_DEADLINE: Duration = Duration::from_secs(3600);

pub struct Shared {
    pub settings: watch::Receiver<Arc<SessionSettings>>,
    pub registry: Arc<Registry>,
    pub clock: SystemClock,
    /// Cancelled when the gateway shuts down.
    pub drain: CancellationToken,
}

/// One connection: its socket, and its session in its inbox.
pub struct Connection {
    socket: Socket,
    permit: ConnectionPermit,
    inbox: Inbox,
    mailbox: Arc<Mailbox>,
    /// Whether the peer has sent anything. Port probes send nothing.
    has_spoken: bool,
    /// A submission waiting for space in the ingest queue.
    waiting: Option<Pin<Box<dyn Future<Output = Space> + Send>>>,
    queue: IngestQueue,
    shared: Arc<Shared>,
}

impl Connection {
    /// # Errors
    /// The system provides no random numbers.
    pub fn new(
        socket: Socket,
        peer: SocketAddr,
        permit: ConnectionPermit,
        mailbox: Arc<Mailbox>,
        shared: Arc<Shared>,
        queue: IngestQueue,
    ) -> std::io::Result<Connection> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(std::io::Error::other)?;
        let settings = Arc::clone(&shared.settings.borrow());
        let session = Session::new(settings, peer, nonce, shared.clock.now());
        Ok(Connection {
            socket,
            permit,
            inbox: Inbox::new(session),
            mailbox,
            has_spoken: false,
            waiting: None,
            queue,
            shared,
        })
    }

    /// Serves the connection until it ends.
    ///
    /// The size of the future is the memory cost of an idle connection. It therefore contains the
    /// connection only once, and boxes what is needed only at the end.
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
        while self.inbox.session.closed().is_none() {
            self.rearm(timer.as_mut());
            let interest = self.interest();
            let grant = tokio::select! {
                // Mail has priority over peer input, so that a session that is being ended accepts
                // no more frames.
                biased;
                mail = self.mailbox.take() => {
                    self.inbox.handle_mail(mail, self.shared.clock.now());
                    None
                }
                () = self.shared.drain.cancelled(), if !self.inbox.session.is_leaving() => {
                    self.inbox.session.handle_drain();
                    None
                }
                () = timer.as_mut() => {
                    self.inbox.session.handle_timeout(self.shared.clock.now());
                    None
                }
                grant = async { self.waiting.as_mut().expect("checked").await },
                    if self.waiting.is_some() => {
                    self.waiting = None;
                    self.inbox.handle_queued();
                    Some(grant)
                }
                ready = self.socket.ready(interest.unwrap_or(Interest::READABLE)),
                    if interest.is_some() => {
                    self.handle_ready(ready);
                    None
                }
            };
            self.submit_all(grant);
            if !self.has_failed() {
                self.write();
            }
        }
    }

    /// Returns whether the peer failed authentication and its reply is delayed.
    fn has_failed(&self) -> bool {
        let code = self.inbox.session.closed().and_then(|close| close.code);
        code == Some(Code::Authentication) && self.inbox.session.device().is_none()
    }

    fn interest(&mut self) -> Option<Interest> {
        let reads = self.inbox.wants_input();
        let writes = self.socket.wants_write() || !self.inbox.session.outbound().bytes().is_empty();
        match (reads, writes) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        }
    }

    fn deadline(&self) -> Instant {
        match self.inbox.session.poll_deadline() {
            Some(deadline_us) => self.shared.clock.instant(deadline_us).into(),
            None => Instant::now() + NO_DEADLINE,
        }
    }

    /// Resets the timer only if it would fire too late or has fired, because every frame postpones
    /// the deadline.
    fn rearm(&self, timer: Pin<&mut Sleep>) {
        let deadline = self.deadline();
        if timer.is_elapsed() || deadline < timer.deadline() {
            timer.reset(deadline);
        }
    }

    fn handle_ready(&mut self, ready: std::io::Result<Ready>) {
        match ready {
            Ok(ready) if ready.is_readable() => self.read(),
            Ok(_) => {}
            Err(error) => self.lose(&error),
        }
    }

    fn read(&mut self) {
        let Connection { socket, inbox, .. } = self;
        let bytes_max = match inbox.session.device() {
            Some(_) => READ_BYTES,
            None => PREAUTH_READ_BYTES,
        };
        let result = socket.try_read(inbox.input(), bytes_max);
        self.has_spoken |= !inbox.input().is_empty() || socket.tls_bytes() > 0;
        if let Some(channel) = socket.take_channel() {
            inbox.session.handle_secured(Secured {
                binding: channel.binding,
                names: channel.certificate.as_ref().map(tls::names),
            });
        }
        if inbox.session.device().is_none() && socket.tls_bytes() > PREAUTH_TLS_BYTES_MAX {
            inbox.session.handle_loss("too many TLS bytes before AUTH");
        }
        match result {
            Ok(0) if socket.is_handshaking() => {
                let detail = "peer closed the connection during the TLS handshake";
                inbox.session.handle_loss(detail);
            }
            Ok(0) => inbox.session.handle_end_of_input(),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => self.lose(&error),
        }
    }

    /// Queues submissions until there is none or one must wait for space.
    fn submit_all(&mut self, mut grant: Option<Space>) {
        while let Some(submission) = self.inbox.poll_submission(self.shared.clock.now()) {
            if let Submission::Login(login) = &submission {
                self.permit.prove(self.shared.clock.now().mono_us);
                self.queue.pin_to_shard_of(&login.device);
            }
            let queue = &self.queue;
            match queue.try_submit(submission, &self.mailbox, grant.as_mut()) {
                None => self.inbox.handle_queued(),
                Some(submission) => {
                    let submit = queue.clone().submit(submission, Arc::clone(&self.mailbox));
                    self.waiting = Some(Box::pin(submit));
                }
            }
        }
    }

    /// Writes as much output as the socket accepts now.
    fn write(&mut self) {
        let outbound = self.inbox.session.outbound();
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
        if self.inbox.session.has_too_much_outbound() {
            self.inbox.session.handle_loss("peer does not read replies");
        }
    }

    fn lose(&mut self, error: &std::io::Error) {
        let detail = match tls::failure(error) {
            Some(failure) => format!("TLS failed: {failure}"),
            None => format!("connection lost: {error}"),
        };
        self.inbox.session.handle_loss(detail);
    }

    /// Sends the last reply, frees the device's session, and completes the audit record.
    async fn finish(mut self) {
        // A waiting submission has no acknowledgement, so the device resends it.
        self.waiting = None;
        if let Some(device) = self.inbox.session.device() {
            self.shared.registry.leave(device, &self.mailbox);
        }
        let is_logged = self
            .inbox
            .session
            .closed()
            .is_some_and(|close| self.log(close));
        let is_refused = self.is_refused();
        let mut is_gone = false;
        if self.has_failed() {
            let now = self.shared.clock.now();
            tokio::select! {
                () = sleep(self.permit.fail(now.mono_us)) => {}
                // A failed peer holds up neither connections that wait for a slot nor the shutdown.
                _ = self.mailbox.take() => {}
                () = self.shared.drain.cancelled() => {}
                // A peer that leaves early does not shorten the delay.
                _ = self.socket.wait_for_end() => is_gone = true,
            }
        }
        match self.inbox.session.closed().and_then(|close| close.code) {
            Some(_) if is_gone => {}
            Some(_) => drop(timeout(LINGER, self.linger()).await),
            None => self.socket.try_end(),
        }
        drop(self.socket);
        let now = self.shared.clock.now();
        match self
            .inbox
            .session
            .handle_disconnect(is_refused, is_logged, now)
        {
            Some(Submission::Refusal(refusal)) => self.permit.admission().note(refusal),
            Some(event) => drop(self.queue.submit(event, self.mailbox).await),
            None => {}
        }
    }

    /// Sends the remaining output, then waits for the peer to close. Closing with unread input
    /// would reset the connection, and the last reply could be lost.
    async fn linger(&mut self) -> std::io::Result<()> {
        self.socket
            .write_all(self.inbox.session.outbound().bytes())
            .await?;
        self.socket.shutdown().await?;
        self.socket.wait_for_end().await
    }

    /// Returns whether the end of the connection is logged for the operator: it was refused, or the
    /// peer sent data and ended before it proved a key.
    fn is_refused(&self) -> bool {
        let Some(close) = self.inbox.session.closed() else {
            return false;
        };
        match close.code {
            Some(code) if code >= Code::Protocol => true,
            None | Some(Code::Idle) => self.has_spoken && self.permit.is_preauth(),
            Some(_) => false,
        }
    }

    /// Logs the end of the connection; returns whether it was logged as a refusal. A vanished
    /// client is logged at debug level, a refused one at info level within the limits of admission
    /// control.
    fn log(&self, close: &Close) -> bool {
        let (peer, detail) = (self.inbox.session.peer(), &close.detail);
        let code = close.code.map_or(0, |code| code as u8);
        if !self.is_refused() {
            tracing::debug!(%peer, code, %detail, "connection closed");
            return false;
        }
        let now = self.shared.clock.now();
        let Some(not_logged) = self.permit.admission().may_log(peer.ip(), now.mono_us) else {
            return false;
        };
        match self.inbox.session.claimed() {
            "" => tracing::info!(%peer, code, %detail, not_logged, "connection refused"),
            claimed => {
                tracing::info!(%peer, code, %detail, claimed, not_logged, "connection refused");
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokio adds 112 bytes to the future and rounds up to a multiple of 128.
    #[test]
    fn the_task_of_a_connection_takes_1024_bytes() {
        fn size<F>(_: fn(Connection) -> F) -> usize {
            size_of::<F>()
        }
        assert!(size(Connection::serve) <= 1024 - 112);
    }
}
