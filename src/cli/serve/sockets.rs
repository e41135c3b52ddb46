//! Listeners of the gateway, and what they need: certificates, tokens and open files.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cli::Error;
use crate::config::Config;
use crate::http::feed::Feed;
use crate::http::page::Live;
use crate::http::{Guard, Site, Tokens};
use crate::metrics::Metrics;
use crate::net::tls::Tls;
use crate::server::{self, Listeners, TlsListener};
use crate::sys::open_files;
use crate::sys::service::InheritedSockets;

/// Open files reserved for uses other than connections: listeners, the store, the log.
pub const OTHER_FILES: u64 = 64;

/// Loads the TLS files; `None` if TLS is off.
pub fn load_tls(config: &Config) -> Result<Option<Tls>, Error> {
    match config.tls_files() {
        Some(files) if config.listeners.tls_cert.is_none() && !files.cert.exists() => {
            Err(Error::Failed(format!(
                "could not find certificate {}; create a test certificate with `fieldgate tls init`, or set \
                 --tls-cert and --tls-key",
                files.cert.display()
            )))
        }
        Some(files) => Ok(Some(Tls::load(
            files,
            config.listeners.tls_record_bytes_max,
        )?)),
        None => Ok(None),
    }
}

/// Loads the token file; `None` if there is none.
pub fn load_tokens(config: &Config) -> Result<Option<Tokens>, Error> {
    let path = config.http.http_token_file.as_ref();
    let tokens = path.map(|path| Tokens::load(path, config.location.secret_readers()));
    tokens
        .transpose()
        .map_err(|error| Error::Failed(error.to_string()))
}

pub fn bind(
    config: &Config,
    tls: Option<&Arc<Tls>>,
    inherited: &mut InheritedSockets,
) -> Result<Listeners, Error> {
    let mut bind = |flag, listen| {
        let listener = match inherited.find(listen) {
            Ok(Some(listener)) => server::adopt(listener),
            Ok(None) => server::listen(listen),
            Err(error) => Err(error),
        };
        listener.map_err(|error| cannot_listen(flag, listen, &error))
    };
    let plain = bind("--listen", config.listen)?;
    let tls = match (config.tls_listen, tls) {
        (Some(listen), Some(tls)) => Some(TlsListener {
            listener: bind("--tls-listen", listen)?,
            tls: Arc::clone(tls),
        }),
        _ => None,
    };
    Ok(Listeners { plain, tls })
}

/// Opens the HTTP listener, unless it is off.
pub async fn bind_http(
    config: &Config,
    guard: watch::Receiver<Guard>,
    metrics: &Arc<Metrics>,
    feed: &Arc<Feed>,
    live: &Arc<Live>,
    drain: &CancellationToken,
    inherited: &mut InheritedSockets,
) -> Result<Option<(TcpListener, Site)>, Error> {
    let Some(address) = config.http_listen else {
        return Ok(None);
    };
    let listener = match inherited.find(address) {
        Ok(Some(listener)) => TcpListener::from_std(listener),
        Ok(None) => TcpListener::bind(address).await,
        Err(error) => Err(error),
    };
    let listener = listener.map_err(|error| cannot_listen("--http", address, &error))?;
    let (metrics, feed, live) = (Arc::clone(metrics), Arc::clone(feed), Arc::clone(live));
    let site = Site::new(guard, metrics, &config.store, feed, live, drain.clone());
    Ok(Some((listener, site)))
}

/// Fails if the service manager opened a socket that no listener uses: peers would connect to it and wait in vain.
pub fn refuse_unused(inherited: &InheritedSockets) -> Result<(), Error> {
    match inherited.unused().first() {
        None => Ok(()),
        Some(address) => Err(Error::Failed(format!(
            "could not use the socket {address} of the service manager: no listener has this address; set --listen, \
             --tls-listen or --http to it, or remove it from the socket unit"
        ))),
    }
}

/// Limits the number of connections to the number of files that can be open. Beyond the open file limit, any open can
/// fail, even one by the store.
pub fn connections_within_limit(wanted: usize) -> usize {
    let Some(open_files) = open_files::raise() else {
        return wanted;
    };
    let fitting = open_files.saturating_sub(OTHER_FILES).max(1) as usize;
    if fitting < wanted {
        tracing::warn!(
            connections = fitting,
            connections_max = wanted,
            open_files,
            "connection limit lowered to fit the open file limit; raise ulimit -n"
        );
    }
    wanted.min(fitting)
}

/// Returns the error for a listener that cannot be opened.
pub fn cannot_listen(flag: &str, listen: SocketAddr, error: &io::Error) -> Error {
    let fix = match error.kind() {
        io::ErrorKind::AddrInUse => format!("stop what uses that port, or choose another {flag}"),
        io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 need privileges; choose another {flag}")
        }
        _ => format!("use an address of this machine as {flag}"),
    };
    Error::Failed(format!("could not listen on {listen}: {error}; {fix}"))
}
