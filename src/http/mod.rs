//! The HTTP listener: health checks, metrics, and the feed of committed readings.
//!
//! Invariant: a request never delays ingest. Requests run in their own tasks, whose number is bounded, and read the
//! store through connections of their own.

pub mod feed;
pub mod gauges;
mod guard;
mod health;
mod token;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::feed::Feed;
use self::guard::Guard;
pub use self::token::Tokens;
use crate::metrics::{self, Metrics};

/// Maximum number of open connections; further ones wait.
const CONNECTIONS_MAX: usize = 128;
/// Maximum time to receive the header of a request, and maximum idle time between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of a request's header, in bytes.
const HEADER_BYTES_MAX: usize = 16 << 10;
/// Pause after a failed accept, usually for lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// State that all requests share.
pub(super) type Shared = Arc<Site>;

/// Data that requests read, and the guard that admits requests.
#[derive(Debug)]
pub struct Site {
    guard: Guard,
    metrics: Arc<Metrics>,
    feed: Arc<Feed>,
    drain: CancellationToken,
}

/// Closes the connection of a request once it is cancelled, even if the peer does not read.
#[derive(Clone)]
pub(super) struct Close(CancellationToken);

impl Site {
    /// Creates a site that answers requests to IP addresses, to `localhost` and to `hosts`; with `tokens`, only
    /// requests that have one of them. `/readyz` reports not ready once `drain` is cancelled.
    pub fn new(
        hosts: impl IntoIterator<Item = String>,
        tokens: Option<Tokens>,
        metrics: Arc<Metrics>,
        feed: Arc<Feed>,
        drain: CancellationToken,
    ) -> Site {
        let hosts: HashSet<_> = hosts
            .into_iter()
            .map(|host| host.to_ascii_lowercase())
            .collect();
        Site {
            guard: Guard { hosts, tokens },
            metrics,
            feed,
            drain,
        }
    }
}

fn router(site: Site) -> Router {
    let shared = Arc::new(site);
    let guard = axum::middleware::from_fn_with_state(Arc::clone(&shared), guard::guard);
    Router::new()
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics))
        .route("/v1/feed", get(feed::feed))
        .layer(guard)
        .with_state(shared)
}

async fn metrics(State(site): State<Shared>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], site.metrics.text())
}

/// Answers requests, even while the gateway shuts down. Never returns.
pub async fn serve(listener: TcpListener, site: Site) {
    let router = router(site);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = Arc::clone(&slots)
            .acquire_owned()
            .await
            .expect("never closed");
        match listener.accept().await {
            Ok((socket, _)) => {
                let answering = answer(socket, router.clone());
                tokio::spawn(async move {
                    answering.await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "could not accept HTTP connection, retrying");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn answer(socket: TcpStream, router: Router) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX);
    let close = Close(CancellationToken::new());
    let service = TowerToHyperService::new(router.layer(Extension(close.clone())));
    let answering = http
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    tokio::select! {
        answered = answering => if let Err(error) = answered {
            tracing::debug!(%error, "HTTP connection failed");
        },
        () = close.0.cancelled() => {}
    }
}
