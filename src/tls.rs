//! What the TLS listener serves with: certificate, key, and whose client certificates count; loaded from
//! files, and again when they change.
//!
//! Invariants
//! - A gateway never serves with files that do not fit each other: what cannot be loaded is told, and what
//!   was loaded before stays.
//! - A session keeps what it began with, whatever is loaded later.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio::signal::unix::Signal;
use tokio::time::{MissedTickBehavior, interval};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::keys::{SecretError, open_secret};

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A certificate that expires sooner is warned of.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 86_400);

/// The files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The gateway's certificate, and those that lead to one that devices know.
    pub cert: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// Who signs the certificates that devices must show; `None` if they need none.
    pub client_ca: Option<PathBuf>,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of certificates.
    #[error("cannot take certificates from {}: {reason}", path.display())]
    Certificates {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The key's file.
    #[error("cannot take a private key from {}: {reason}", path.display())]
    Key {
        /// Which.
        path: PathBuf,
        /// What is wrong; nothing of its content.
        reason: String,
    },
    /// Whoever could read the key may have it.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Certificate and key are not fit for use.
    #[error("{} and {} do not serve: {reason}", cert.display(), key.display())]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What new TLS connections begin with.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    record_bytes_max: usize,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Loads the files. Records that are sent hold at most `record_bytes_max` bytes.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub fn load(files: TlsFiles, record_bytes_max: usize) -> Result<Tls, TlsError> {
        let config = load(&files, record_bytes_max)?;
        Ok(Tls {
            files,
            record_bytes_max,
            current: RwLock::new(Arc::new(config)),
        })
    }

    /// The server's side of a new connection.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn connection(&self) -> io::Result<ServerConnection> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        ServerConnection::new(Arc::clone(&current)).map_err(io::Error::other)
    }

    /// Loads the files again, now and then and whenever they changed or `hangup` came; for ever.
    pub async fn keep_current(&self, mut hangup: Signal) {
        let mut seen = self.stamps();
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {
                    let stamps = self.stamps();
                    if stamps == seen {
                        continue;
                    }
                    seen = stamps;
                }
                Some(()) = hangup.recv() => seen = self.stamps(),
            }
            self.reload();
        }
    }

    fn reload(&self) {
        match load(&self.files, self.record_bytes_max) {
            Ok(config) => {
                let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
                *current = Arc::new(config);
                tracing::info!("new connections are served with the certificate that is there now");
            }
            Err(error) => {
                tracing::warn!(%error, "the certificate that was loaded before stays in use");
            }
        }
    }

    /// What tells a file from the one that was there before, whichever way it was replaced.
    fn stamps(&self) -> Vec<Option<(u64, u64, i64, i64)>> {
        let TlsFiles {
            cert,
            key,
            client_ca,
        } = &self.files;
        let stamp = |path: &PathBuf| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
        };
        [cert, key]
            .into_iter()
            .chain(client_ca)
            .map(stamp)
            .collect()
    }
}

fn load(files: &TlsFiles, record_bytes_max: usize) -> Result<ServerConfig, TlsError> {
    let pair = |reason: String| TlsError::Pair {
        cert: files.cert.clone(),
        key: files.key.clone(),
        reason,
    };
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| pair(error.to_string()))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => builder.with_client_cert_verifier(client_verifier(path, provider)?),
    };
    let chain = certificates(&files.cert)?;
    warn_of_expiry(&files.cert, &chain[0]);
    let mut config = builder
        .with_single_cert(chain, private_key(&files.key)?)
        .map_err(|error| pair(error.to_string()))?;
    config.max_fragment_size = Some(record_bytes_max);
    // A device that comes back need not go through the whole handshake again.
    config.ticketer = ring::Ticketer::new().map_err(|error| pair(error.to_string()))?;
    // Without it the exporter of TLS 1.2 is not bound to this connection alone (RFC 9266).
    config.require_ems = true;
    Ok(config)
}

fn client_verifier(
    path: &Path,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, TlsError> {
    let refused = |reason: String| TlsError::Certificates {
        path: path.to_owned(),
        reason,
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        let added = roots.add(certificate);
        added.map_err(|error| refused(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| refused(error.to_string()))
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refused = |reason: String| TlsError::Certificates {
        path: path.to_owned(),
        reason,
    };
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = found.map_err(|error: pem::Error| refused(error.to_string()))?;
    match found.is_empty() {
        true => Err(refused("there is none in it".into())),
        false => Ok(found),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let refused = |reason: String| TlsError::Key {
        path: path.to_owned(),
        reason,
    };
    let mut text = Vec::new();
    let mut file = open_secret(path)?;
    file.read_to_end(&mut text)
        .map_err(|error| refused(error.to_string()))?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| refused(error.to_string()))
}

fn warn_of_expiry(path: &Path, certificate: &CertificateDer<'_>) {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return;
    };
    let expires_s = certificate.validity().not_after.timestamp();
    let Ok(expires) = Timestamp::from_second(expires_s) else {
        return;
    };
    let left_s = expires_s - Timestamp::now().as_second();
    let path = path.display();
    if left_s <= 0 {
        tracing::warn!(%path, %expires, "the certificate has expired: devices will not connect");
    } else if left_s < EXPIRES_SOON.as_secs() as i64 {
        tracing::warn!(%path, %expires, "the certificate expires soon");
    }
}

/// Whom a certificate that was verified names: its common name and its DNS names.
pub fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let common = certificate.subject().iter_common_name();
    let common = common.filter_map(|name| name.as_str().ok());
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let alternatives = alternatives
        .iter()
        .flat_map(|names| &names.value.general_names);
    let alternatives = alternatives.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    common.chain(alternatives).map(str::to_owned).collect()
}
