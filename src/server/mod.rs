//! The running gateway: its listeners, a task for each connection, the ingest task, and draining at
//! shutdown.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{AdmissionLimits, IngestSettings};
use crate::ingest::registry::Registry;
use crate::ingest::{self, IngestQueue};
use crate::net::socket::Socket;
use crate::net::tls::Tls;
use crate::server::admission::AdmissionControl;
use crate::server::connection::{Connection, Shared};
use crate::session::{SessionSettings, Submission};
use crate::store::{Refusal, Store, StoreError};
use crate::time::{self, SystemClock};

pub mod admission;
mod connection;
pub mod device_watch;
pub mod disk_watch;
pub mod supervisor;

/// Kernel send buffer per connection, in bytes. The kernel doubles it for its own overhead.
const SEND_BUFFER_BYTES: u32 = 32 * 1024;
/// Maximum number of connections waiting for `accept`, as far as the system allows it.
const BACKLOG: u32 = 1024;
const REFUSALS_INTERVAL: Duration = Duration::from_secs(1);
/// Delay after a failed accept, usually for lack of file descriptors: long enough for some to be
/// closed.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

pub struct ServerSettings {
    /// Of new sessions.
    pub session: watch::Receiver<Arc<SessionSettings>>,
    pub ingest: IngestSettings,
    /// The maximum number of connections is read once.
    pub admission: watch::Receiver<AdmissionLimits>,
    pub drain_timeout_s: u64,
}

/// Why the gateway stopped without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store cannot be trusted any more. Frames after the last ACK may not be stored.
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    /// A bug: the ingest task panicked.
    #[error("the ingest task failed: {0}")]
    Ingest(#[from] JoinError),
    /// Frames that were not acknowledged; devices resend them.
    #[error("could not store the last frames within the drain timeout; devices will resend them")]
    DrainTimeout,
}

#[derive(Debug)]
pub struct Listeners {
    pub plain: TcpListener,
    pub tls: Option<TlsListener>,
}

/// Listens on `addr`, with a small kernel send buffer for each connection. Replies are a few
/// hundred bytes, and a peer that does not read could otherwise hold megabytes of kernel memory.
///
/// # Errors
/// The address does not belong to this machine, or is in use.
pub fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A gateway may restart while connections of its predecessor time out.
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit the buffer size from their listener.
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Takes over a listener that the service manager opened, with the same send buffer as [`listen`].
///
/// # Errors
/// The listener cannot be used without blocking.
pub fn adopt(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    rustix::net::sockopt::set_socket_send_buffer_size(&listener, SEND_BUFFER_BYTES as usize)?;
    TcpListener::from_std(listener)
}

/// A listener for TLS connections.
#[derive(Debug)]
pub struct TlsListener {
    pub listener: TcpListener,
    pub tls: Arc<Tls>,
}

/// Serves `listeners` until `drain` is cancelled, then stores the accepted frames and returns.
/// `stores` are handles to one store that can be used concurrently; `registry` keeps track of live
/// sessions.
pub async fn serve<S: Store>(
    listeners: Listeners,
    stores: Vec<S>,
    settings: ServerSettings,
    registry: Arc<Registry>,
    drain: CancellationToken,
) -> Result<(), ServeError> {
    let clock = SystemClock::start();
    let metrics = Arc::clone(&settings.session.borrow().metrics);
    let (queue, receivers) = ingest::queue(&settings.ingest, stores.len(), &metrics);
    let mut ingest = JoinSet::new();
    for (receiver, store) in receivers.into_iter().zip(stores) {
        ingest.spawn(receiver.run(store, Arc::clone(&registry), clock));
    }
    // The task holds the queue, which keeps the shards running, so it ends with the listeners.
    let watching = watch_clock(clock, queue.clone());
    let shared = Arc::new(Shared {
        settings: settings.session,
        registry,
        clock,
        drain: drain.clone(),
    });
    let connections = TaskTracker::new();
    let admission = Arc::new(AdmissionControl::new(settings.admission, metrics));
    tokio::select! {
        () = accept(&listeners, &admission, &connections, &shared, &queue) => {}
        never = write_refusals(&admission, &queue) => never,
        () = watching => {}
        () = drain.cancelled() => {}
        // While the queue exists, a shard ends only by failing.
        ended = all_ended(&mut ingest) => return ended,
    }
    drop(listeners);
    connections.close();
    let drained = async {
        connections.wait().await;
        submit_refusals(&admission, &queue).await;
        // Closes the queue, and then the store.
        drop(queue);
        all_ended(&mut ingest).await
    };
    match timeout(Duration::from_secs(settings.drain_timeout_s), drained).await {
        Ok(ended) => ended,
        Err(_) => Err(ServeError::DrainTimeout),
    }
}

async fn watch_clock(clock: SystemClock, queue: IngestQueue) {
    time::watch(clock, async |step| {
        queue
            .clone()
            .submit(Submission::Step(step), Arc::default())
            .await;
    })
    .await
}

/// Waits until all shards have ended or one has failed.
async fn all_ended(ingest: &mut JoinSet<Result<(), StoreError>>) -> Result<(), ServeError> {
    while let Some(ended) = ingest.join_next().await {
        ended??;
    }
    Ok(())
}

async fn write_refusals<T>(admission: &AdmissionControl, queue: &IngestQueue) -> T {
    loop {
        sleep(REFUSALS_INTERVAL).await;
        submit_refusals(admission, queue).await;
    }
}

async fn submit_refusals(admission: &AdmissionControl, queue: &IngestQueue) {
    for refusal in admission.take_refusals() {
        let submission = Submission::Refusal(refusal);
        queue.clone().submit(submission, Arc::default()).await;
    }
}

/// Accepts connections indefinitely, as admission control permits.
async fn accept(
    listeners: &Listeners,
    admission: &Arc<AdmissionControl>,
    connections: &TaskTracker,
    shared: &Arc<Shared>,
    queue: &IngestQueue,
) {
    loop {
        admission.has_room(&shared.clock).await;
        let (tcp, peer, tls) = accept_one(listeners).await;
        let mailbox = Arc::default();
        let Some(permit) = admission.enter(peer.ip(), &mailbox, &shared.clock).await else {
            let now = shared.clock.now();
            if let Some(not_logged) = admission.may_log(peer.ip(), now.mono_us) {
                tracing::info!(%peer, not_logged, "connection closed: too many from this address");
            }
            admission.note(Refusal {
                peer: peer.ip().to_canonical(),
                device: String::new(),
                code: 0,
                detail: "too many connections from this address".to_owned(),
                count: 1,
                first_at_us: now.utc_us,
                at_us: now.utc_us,
                is_audited: false,
            });
            continue;
        };
        let connection = socket(tcp, tls).and_then(|socket| {
            Connection::new(
                socket,
                peer,
                permit,
                mailbox,
                Arc::clone(shared),
                queue.clone(),
            )
        });
        match connection {
            Ok(connection) => {
                connections.spawn(connection.serve());
            }
            Err(error) => tracing::debug!(%peer, %error, "could not set up connection"),
        }
    }
}

fn socket(tcp: TcpStream, tls: Option<&Tls>) -> io::Result<Socket> {
    // ACKs are small and must not be delayed.
    tcp.set_nodelay(true)?;
    Ok(match tls {
        Some(tls) => Socket::tls(tcp, tls.connection()?),
        None => Socket::plain(tcp),
    })
}

/// Accepts the next connection from any listener; returns its TLS configuration unless it is plain
/// TCP.
async fn accept_one(listeners: &Listeners) -> (TcpStream, SocketAddr, Option<&Tls>) {
    let mut is_failing = false;
    loop {
        let (accepted, tls) = tokio::select! {
            accepted = listeners.plain.accept() => (accepted, None),
            (accepted, tls) = accept_tls(listeners.tls.as_ref()) => (accepted, Some(tls)),
        };
        match accepted {
            Ok((tcp, mut peer)) => {
                // An IPv6 socket bound to all addresses reports IPv4 peers as IPv6 addresses.
                peer.set_ip(peer.ip().to_canonical());
                return (tcp, peer, tls);
            }
            Err(error) => {
                if !is_failing {
                    tracing::warn!(%error, "could not accept connection, retrying");
                    is_failing = true;
                }
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Accepts the next TLS connection; pending forever without a TLS listener.
async fn accept_tls(listener: Option<&TlsListener>) -> (io::Result<(TcpStream, SocketAddr)>, &Tls) {
    match listener {
        Some(TlsListener { listener, tls }) => (listener.accept().await, tls),
        None => std::future::pending().await,
    }
}
