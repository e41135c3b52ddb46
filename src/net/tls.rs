//! What the TLS listener serves with: certificate, key, and whose client certificates count; loaded from
//! files, and again when they change.
//!
//! Invariants
//! - A gateway never serves with files that do not fit each other, nor with an expired certificate while it has
//!   one that is not: what cannot be used is told and tried again, and what was loaded before stays.
//! - A session keeps what it began with, whatever is loaded later.

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
use tokio::signal::unix::Signal;
use tokio::time::{MissedTickBehavior, interval};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::sys::secret_file::{SecretError, SecretReaders, open_secret};
use crate::time::utc_now;

#[cfg(test)]
mod tests;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const DAY: SignedDuration = SignedDuration::from_hours(24);
/// Where `fieldgate tls init` puts its authority's certificate, beside the gateway's.
const TLS_CA_FILE: &str = "ca.pem";
/// A certificate that expires sooner is warned of, each day.
const EXPIRES_SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// The files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The gateway's certificate, and those that lead to one that devices know.
    pub cert: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// Who signs the certificates that devices must show; `None` if they need none.
    pub client_ca: Option<PathBuf>,
    /// Who may read the key besides its owner.
    pub key_readers: SecretReaders,
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
    /// The certificate is of no use any more.
    #[error("the certificate in {} has expired, on {expires}", path.display())]
    Expired {
        /// Which.
        path: PathBuf,
        /// Since when.
        expires: Timestamp,
    },
}

/// What new TLS connections begin with.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    record_bytes_max: usize,
    current: RwLock<Loaded>,
    /// How the files were before they were loaded for the first time.
    first: Stamps,
}

/// What the files said.
#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    /// When the gateway's certificate does; `None` if nobody can tell.
    expires: Option<Timestamp>,
    /// What will keep devices from connecting, as far as the files show.
    faults: Vec<String>,
}

impl Loaded {
    fn has_expired(&self, now: Timestamp) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

impl Tls {
    /// Loads the files. Records that are sent hold at most `record_bytes_max` bytes.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub fn load(files: TlsFiles, record_bytes_max: usize) -> Result<Tls, TlsError> {
        let first = stamps(&files);
        let tls = Tls {
            current: RwLock::new(load(&files, record_bytes_max)?),
            files,
            record_bytes_max,
            first,
        };
        tls.warn_of_expiry(utc_now());
        tls.warn_of_faults();
        Ok(tls)
    }

    /// Returns when the certificate in use expired, if it has.
    pub fn expired(&self) -> Option<Timestamp> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.expires.filter(|_| current.has_expired(utc_now()))
    }

    /// The server's side of a new connection.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn connection(&self) -> io::Result<ServerConnection> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        ServerConnection::new(Arc::clone(&current.config)).map_err(io::Error::other)
    }

    /// Loads the files again whenever they changed or `hangup` came, and now and then if that failed; warns each
    /// day of a certificate that expires. For ever.
    pub async fn keep_current(&self, mut hangup: Signal) {
        let mut watch = Watch::new(self, utc_now());
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_asked = tokio::select! {
                _ = look.tick() => false,
                Some(()) = hangup.recv() => true,
            };
            watch.look(is_asked, utc_now());
        }
    }

    fn reload(&self, now: Timestamp) -> Result<(), TlsError> {
        let loaded = load(&self.files, self.record_bytes_max)?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        match loaded.expires {
            Some(expires) if expires <= now && !current.has_expired(now) => {
                let path = self.files.cert.clone();
                Err(TlsError::Expired { path, expires })
            }
            _ => {
                *current = loaded;
                Ok(())
            }
        }
    }

    fn warn_of_faults(&self) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let path = self.files.cert.display();
        for fault in &current.faults {
            tracing::warn!(%path, %fault, "devices may not take the certificate");
        }
    }

    fn warn_of_expiry(&self, now: Timestamp) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let Some(expires) = current.expires else {
            return;
        };
        let path = self.files.cert.display();
        if current.has_expired(now) {
            tracing::warn!(%path, %expires, "the certificate has expired: devices will not connect");
        } else if expires.duration_since(now) < EXPIRES_SOON {
            tracing::warn!(%path, %expires, "the certificate expires soon");
        }
    }
}

/// Looks at the files again and again.
struct Watch<'a> {
    tls: &'a Tls,
    seen: Stamps,
    /// Why what was seen is not in use.
    failure: Option<String>,
    /// When the certificate's expiry was looked at.
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

    /// `is_asked`: whether an operator wants the files to be loaded, changed or not.
    fn look(&mut self, is_asked: bool, now: Timestamp) {
        let stamps = stamps(&self.tls.files);
        if is_asked || stamps != self.seen {
            self.seen = stamps;
            // Whoever did something about it is told what came of it.
            self.failure = None;
            self.load(now);
        } else if self.failure.is_some() {
            // What was in the way need not be in the files.
            self.load(now);
        }
        // In both directions, because clocks are set.
        if now.duration_since(self.reminded).abs() >= DAY {
            self.remind(now);
        }
    }

    fn load(&mut self, now: Timestamp) {
        match self.tls.reload(now) {
            Ok(()) => {
                self.failure = None;
                tracing::info!("new connections are served with the certificate that is there now");
                self.tls.warn_of_faults();
                self.remind(now);
            }
            Err(error) => {
                let failure = Some(error.to_string());
                if self.failure == failure {
                    tracing::debug!(%error, "the certificate still cannot be loaded");
                } else {
                    tracing::warn!(%error, "the certificate that was loaded before stays in use");
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

/// Of each file that there is.
type Stamps = Vec<Option<Stamp>>;

/// What tells a file from the one that was there before, whichever way it was replaced, and from itself before its
/// mode changed.
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

fn load(files: &TlsFiles, record_bytes_max: usize) -> Result<Loaded, TlsError> {
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
    let faults = faults(&chain, &authorities(files), utc_now());
    let is_authoritys = { X509Certificate::from_der(&chain[0]) }
        .is_ok_and(|(_, first)| first.is_ca() && chain.len() > 1);
    let mut config = builder
        .with_single_cert(chain, private_key(&files.key, files.key_readers)?)
        .map_err(|error| match is_authoritys {
            true => pair(format!(
                "{error}; the first certificate in the file is an authority's: put the gateway's own first"
            )),
            false => pair(error.to_string()),
        })?;
    config.max_fragment_size = Some(record_bytes_max);
    // A device that comes back need not go through the whole handshake again.
    config.ticketer = ring::Ticketer::new().map_err(|error| pair(error.to_string()))?;
    // Without it the exporter of TLS 1.2 is not bound to this connection alone (RFC 9266).
    config.require_ems = true;
    let config = Arc::new(config);
    Ok(Loaded {
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

/// At least one.
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

/// What is wrong, without anything of what is there: it may be a key.
fn pem_fault(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } => "a section in it has no end".to_owned(),
        pem::Error::IllegalSectionStart { .. } => "a section in it begins wrongly".to_owned(),
        pem::Error::Base64Decode(_) => "a section in it is not base64".to_owned(),
        pem::Error::NoItemsFound => "there is none in it".to_owned(),
        error => error.to_string(),
    }
}

fn expiry(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()
}

/// Certificates beside the gateway's that devices may know: the authority that `fieldgate tls init` made, and
/// those who sign the devices'.
fn authorities(files: &TlsFiles) -> Vec<CertificateDer<'static>> {
    let made = files.cert.with_file_name(TLS_CA_FILE);
    let paths = [Some(&made), files.client_ca.as_ref()];
    let read = |path: &PathBuf| certificates(path).unwrap_or_default();
    paths.into_iter().flatten().flat_map(read).collect()
}

/// What in a chain will keep devices from connecting.
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
            faults.push(format!("certificate {n} is not valid yet, from {from} on"));
        }
        // That of the first is told with those that expire soon.
        if n > 1 && validity.not_after.timestamp() <= now.as_second() {
            let expired = validity.not_after;
            faults.push(format!("certificate {n} expired on {expired}"));
        }
    }
    for (n, pair) in (1..).zip(parsed.windows(2)) {
        if pair[0].issuer() != pair[1].subject() {
            faults.push(format!(
                "certificate {n} was issued by {:?} and the next one in the file is {:?}: put each behind \
                 the one that it issued, the gateway's own first",
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
            "the certificate of its issuer {:?} is not in the file: devices that do not have it themselves will \
             not connect; append the intermediate certificates",
            own.issuer().to_string()
        ));
    }
    faults
}

/// Why TLS failed, if that is what `error` is about.
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
            // Its issuer has the name of one that the peer knows, and another key.
            | AlertDescription::DecryptError => {
                format!("the peer refuses the gateway's certificate ({alert:?})")
            }
            alert => format!("the peer gave up ({alert:?})"),
        },
        rustls::Error::NoCertificatesPresented => "the peer showed no certificate".to_owned(),
        rustls::Error::InvalidCertificate(error) => {
            format!("the peer's certificate is not valid ({error})")
        }
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            "what came is not TLS: plain text at the TLS port?".to_owned()
        }
        rustls::Error::PeerIncompatible(error) => {
            format!("no version or cipher in common ({error:?})")
        }
        error => error.to_string(),
    })
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
