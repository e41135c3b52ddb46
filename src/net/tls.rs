//! Configuration of the TLS listener: certificate, key and client CA; loaded from files, and
//! reloaded when they change.
//!
//! Invariants
//! - A gateway never uses mismatched files, nor an expired certificate while it has a valid one.
//!   Unusable files are logged and retried, and the loaded ones stay in use.
//! - A connection keeps the certificate it started with, whatever is loaded later.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, RootCertStore, ServerConfig, ServerConnection};
use tokio::time::{MissedTickBehavior, interval};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::config::TlsFiles;
use crate::sys::secret_file::{SecretError, SecretReaders, open_secret};
use crate::time::utc_now;

#[cfg(test)]
mod tests;

/// Poll interval of the files.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const DAY: SignedDuration = SignedDuration::from_hours(24);
/// Name of the CA certificate that `fieldgate tls init` creates next to the gateway's.
const TLS_CA_FILE: &str = "ca.pem";
/// A certificate that expires sooner causes a warning each day.
const EXPIRES_SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// Reason why TLS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A certificate file cannot be loaded.
    #[error("could not load certificates from {}: {reason}", path.display())]
    Certificates {
        /// Path of the file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The key file cannot be loaded.
    #[error("could not load private key from {}: {reason}", path.display())]
    Key {
        /// Path of the file.
        path: PathBuf,
        /// The reason, without file content.
        reason: String,
    },
    /// Other users could have read the key.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Certificate and key cannot be used together.
    #[error("cannot use certificate {} with key {}: {reason}", cert.display(), key.display())]
    Pair {
        /// Path of the certificate.
        cert: PathBuf,
        /// Path of the key.
        key: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The certificate has expired.
    #[error("the certificate in {} expired on {expires}", path.display())]
    Expired {
        /// Path of the certificate.
        path: PathBuf,
        /// Time of expiry.
        expires: Timestamp,
    },
}

/// TLS configuration for new connections.
#[derive(Debug)]
pub struct Tls {
    current: RwLock<Loaded>,
    /// State of the files before they were first loaded.
    first: Stamps,
}

/// New files, loaded but not in use.
#[derive(Debug)]
pub struct Prepared(Loaded);

/// Contents of the files.
#[derive(Debug)]
struct Loaded {
    files: TlsFiles,
    record_bytes_max: usize,
    config: Arc<ServerConfig>,
    /// Expiry of the gateway's certificate; `None` if it cannot be parsed.
    expires: Option<Timestamp>,
    /// Faults in the files that will keep devices from connecting.
    faults: Vec<String>,
}

impl Loaded {
    fn has_expired(&self, now: Timestamp) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

impl Tls {
    /// Loads the files. Sent records contain at most `record_bytes_max` bytes.
    ///
    /// # Errors
    /// One of the files cannot be used.
    pub fn load(files: TlsFiles, record_bytes_max: usize) -> Result<Tls, TlsError> {
        let first = stamps(&files);
        let tls = Tls {
            current: RwLock::new(load(files, record_bytes_max)?),
            first,
        };
        tls.warn_of_expiry(utc_now());
        tls.warn_of_faults();
        Ok(tls)
    }

    /// Returns the time at which the certificate in use expired, if it has expired.
    pub fn expired(&self) -> Option<Timestamp> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.expires.filter(|_| current.has_expired(utc_now()))
    }

    /// Returns the time at which the certificate in use expires, if it can be parsed.
    pub fn expires(&self) -> Option<Timestamp> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.expires
    }

    /// Returns whether the certificate in use expires within 14 days.
    pub fn expires_soon(&self) -> bool {
        let soon = |expires: Timestamp| expires.duration_since(utc_now()) < EXPIRES_SOON;
        self.expires().is_some_and(soon)
    }

    /// Returns the faults in the files in use that will keep devices from connecting.
    pub fn faults(&self) -> Vec<String> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.faults.clone()
    }

    /// Creates the server side of a new connection.
    ///
    /// # Errors
    /// The system provides no random numbers.
    pub fn connection(&self) -> io::Result<ServerConnection> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        ServerConnection::new(Arc::clone(&current.config)).map_err(io::Error::other)
    }

    /// Reloads the files whenever they change, and retries after a failure. Warns each day if the certificate expires
    /// soon. Never returns.
    pub async fn keep_current(&self) {
        let mut watch = Watch::new(self, utc_now());
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            watch.look(utc_now());
        }
    }

    /// Loads files to use instead of the current ones.
    ///
    /// # Errors
    /// One of the files cannot be used, or the certificate has expired but the one in use has not.
    pub fn prepare(&self, files: TlsFiles, record_bytes_max: usize) -> Result<Prepared, TlsError> {
        self.prepare_at(files, record_bytes_max, utc_now())
    }

    fn prepare_at(
        &self,
        files: TlsFiles,
        record_bytes_max: usize,
        now: Timestamp,
    ) -> Result<Prepared, TlsError> {
        let loaded = load(files, record_bytes_max)?;
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        match loaded.expires {
            Some(expires) if expires <= now && !current.has_expired(now) => {
                let path = loaded.files.cert;
                Err(TlsError::Expired { path, expires })
            }
            _ => Ok(Prepared(loaded)),
        }
    }

    /// Uses new files for new connections.
    pub fn replace(&self, prepared: Prepared) {
        self.replace_at(prepared, utc_now());
    }

    fn replace_at(&self, prepared: Prepared, now: Timestamp) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = prepared.0;
        tracing::info!("certificate reloaded");
        self.warn_of_faults();
        self.warn_of_expiry(now);
    }

    /// Returns the files in use, and the maximum size of a sent record.
    fn sources(&self) -> (TlsFiles, usize) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        (current.files.clone(), current.record_bytes_max)
    }

    fn reload(&self, now: Timestamp) -> Result<(), TlsError> {
        let (files, record_bytes_max) = self.sources();
        let prepared = self.prepare_at(files, record_bytes_max, now)?;
        self.replace_at(prepared, now);
        Ok(())
    }

    fn warn_of_faults(&self) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let path = current.files.cert.display();
        for fault in &current.faults {
            tracing::warn!(%path, %fault, "devices may reject the certificate");
        }
    }

    fn warn_of_expiry(&self, now: Timestamp) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let Some(expires) = current.expires else {
            return;
        };
        let path = current.files.cert.display();
        if current.has_expired(now) {
            tracing::warn!(%path, %expires, "the certificate has expired; devices will not connect");
        } else if expires.duration_since(now) < EXPIRES_SOON {
            tracing::warn!(%path, %expires, "the certificate expires soon");
        }
    }
}

/// Polls the files for changes.
struct Watch<'a> {
    tls: &'a Tls,
    seen: Stamps,
    /// Reason why the current files are not in use.
    failure: Option<String>,
    /// When the certificate's expiry was last checked.
    reminded: Timestamp,
}

impl Watch<'_> {
    fn new(tls: &Tls, now: Timestamp) -> Watch<'_> {
        Watch {
            tls,
            seen: tls.first.clone(),
            failure: None,
            reminded: now,
        }
    }

    /// Checks the files.
    fn look(&mut self, now: Timestamp) {
        let stamps = stamps(&self.tls.sources().0);
        if stamps != self.seen {
            self.seen = stamps;
            // The result for a new version is always logged.
            self.failure = None;
            self.load(now);
        } else if self.failure.is_some() {
            // Retry even if the files have not changed: the cause may be elsewhere.
            self.load(now);
        }
        // In both directions, because the clock may be set back.
        if now.duration_since(self.reminded).abs() >= DAY {
            self.remind(now);
        }
    }

    fn load(&mut self, now: Timestamp) {
        match self.tls.reload(now) {
            Ok(()) => {
                self.failure = None;
                self.reminded = now;
            }
            Err(error) => {
                let failure = Some(error.to_string());
                if self.failure == failure {
                    tracing::debug!(%error, "could not reload certificate");
                } else {
                    tracing::warn!(%error, "could not load new certificate, keeping the old one");
                }
                self.failure = failure;
            }
        }
    }

    fn remind(&mut self, now: Timestamp) {
        self.reminded = now;
        self.tls.warn_of_expiry(now);
    }
}

/// One for each configured file.
type Stamps = Vec<Option<Stamp>>;

/// Identifies a version of a file: changes if the file is replaced by any method, or its mode
/// changes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    len: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

fn stamps(files: &TlsFiles) -> Stamps {
    let stamp = |path: &PathBuf| {
        let meta = fs::metadata(path).ok()?;
        Some(Stamp {
            dev: meta.dev(),
            ino: meta.ino(),
            len: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        })
    };
    let pair = [&files.cert, &files.key];
    pair.into_iter()
        .chain(&files.client_ca)
        .map(stamp)
        .collect()
}

fn load(files: TlsFiles, record_bytes_max: usize) -> Result<Loaded, TlsError> {
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
    let expires = expiry(&chain[0]);
    let faults = faults(&chain, &authorities(&files), utc_now());
    let is_authoritys = { X509Certificate::from_der(&chain[0]) }
        .is_ok_and(|(_, first)| first.is_ca() && chain.len() > 1);
    let mut config = builder
        .with_single_cert(chain, private_key(&files.key, files.key_readers)?)
        .map_err(|error| match is_authoritys {
            true => pair(format!(
                "{error}; the first certificate in the file is a CA certificate: put the gateway's own \
                 certificate first"
            )),
            false => pair(error.to_string()),
        })?;
    config.max_fragment_size = Some(record_bytes_max);
    // A returning device can resume without a full handshake.
    config.ticketer = ring::Ticketer::new().map_err(|error| pair(error.to_string()))?;
    // Without the extended master secret, the TLS 1.2 exporter is not bound to this connection
    // alone (RFC 9266).
    config.require_ems = true;
    let config = Arc::new(config);
    Ok(Loaded {
        files,
        record_bytes_max,
        config,
        expires,
        faults,
    })
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

/// Loads at least one certificate.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refused = |reason: String| TlsError::Certificates {
        path: path.to_owned(),
        reason,
    };
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = found.map_err(|error| refused(pem_fault(&error)))?;
    match found.is_empty() {
        true => Err(refused(pem_fault(&pem::Error::NoItemsFound))),
        false => Ok(found),
    }
}

fn private_key(path: &Path, readers: SecretReaders) -> Result<PrivateKeyDer<'static>, TlsError> {
    let refused = |reason: String| TlsError::Key {
        path: path.to_owned(),
        reason,
    };
    let mut text = Vec::new();
    let mut file = open_secret(path, readers)?;
    file.read_to_end(&mut text)
        .map_err(|error| refused(error.to_string()))?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| refused(pem_fault(&error)))
}

/// Describes a PEM fault without any file content, which may be a key.
fn pem_fault(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } => "unterminated PEM section".to_owned(),
        pem::Error::IllegalSectionStart { .. } => "PEM section has an invalid header".to_owned(),
        pem::Error::Base64Decode(_) => "PEM section is not valid base64".to_owned(),
        pem::Error::NoItemsFound => "file contains none".to_owned(),
        error => error.to_string(),
    }
}

fn expiry(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()
}

/// Returns further certificates that devices may know: the CA that `fieldgate tls init` created,
/// and the CAs of client certificates.
fn authorities(files: &TlsFiles) -> Vec<CertificateDer<'static>> {
    let made = files.cert.with_file_name(TLS_CA_FILE);
    let paths = [Some(&made), files.client_ca.as_ref()];
    let read = |path: &PathBuf| certificates(path).unwrap_or_default();
    paths.into_iter().flatten().flat_map(read).collect()
}

/// Returns the faults of a chain that will keep devices from connecting.
fn faults(
    chain: &[CertificateDer<'_>],
    authorities: &[CertificateDer<'_>],
    now: Timestamp,
) -> Vec<String> {
    let parse = |der| X509Certificate::from_der(der).map(|(_, certificate)| certificate);
    let Ok(parsed) = chain
        .iter()
        .map(|der| parse(der))
        .collect::<Result<Vec<_>, _>>()
    else {
        return Vec::new();
    };
    let mut faults = Vec::new();
    for (n, certificate) in (1..).zip(&parsed) {
        let validity = certificate.validity();
        if validity.not_before.timestamp() > now.as_second() {
            let from = validity.not_before;
            faults.push(format!("certificate {n} is not valid before {from}"));
        }
        // `warn_of_expiry` reports the expiry of the first certificate.
        if n > 1 && validity.not_after.timestamp() <= now.as_second() {
            let expired = validity.not_after;
            faults.push(format!("certificate {n} expired on {expired}"));
        }
    }
    for (n, pair) in (1..).zip(parsed.windows(2)) {
        if pair[0].issuer() != pair[1].subject() {
            faults.push(format!(
                "certificate {n} was issued by {:?}, but the next one in the file is {:?}; \
                 order the chain from the gateway's certificate to the CA",
                pair[0].issuer().to_string(),
                pair[1].subject().to_string()
            ));
        }
    }
    let is_known = |issuer| {
        let mut known = authorities.iter().filter_map(|der| parse(der).ok());
        known.any(|authority| authority.subject() == issuer)
    };
    if let [own] = parsed.as_slice()
        && own.issuer() != own.subject()
        && !is_known(own.issuer())
    {
        faults.push(format!(
            "the intermediate certificate {:?} is missing; append it to the file, or devices without it cannot \
             connect",
            own.issuer().to_string()
        ));
    }
    faults
}

/// Returns why TLS failed, if `error` is a TLS error.
pub fn failure(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            // The issuer has the same name as one that the peer knows, but another key.
            | AlertDescription::DecryptError => {
                format!("the peer rejected the gateway's certificate ({alert:?})")
            }
            alert => format!("the peer aborted the handshake ({alert:?})"),
        },
        rustls::Error::NoCertificatesPresented => "the peer sent no certificate".to_owned(),
        rustls::Error::InvalidCertificate(error) => {
            format!("the peer's certificate is not valid ({error})")
        }
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            "not TLS: plain text on the TLS port?".to_owned()
        }
        rustls::Error::PeerIncompatible(error) => {
            format!("no version or cipher in common ({error:?})")
        }
        error => error.to_string(),
    })
}

/// Returns the names in a verified certificate: its common name and its DNS names.
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
