//! TLS configuration of a fleet: the CA that devices trust, and the certificates that they present.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// TLS could not be configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The gateway's address contains no valid server name.
    #[error("{0} is not a valid server name for TLS")]
    Host(String),
    /// A file is unusable.
    #[error("could not load {what} from {}: {reason}", path.display())]
    File {
        /// Expected content.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Description of the problem.
        reason: String,
    },
    /// A device's certificate or key is unusable.
    #[error("cannot use certificate and key of device {device}: {reason}")]
    Identity {
        /// Name of the device.
        device: String,
        /// Description of the problem.
        reason: String,
    },
}

/// TLS configuration of the fleet.
#[derive(Debug)]
pub struct FleetTls {
    host: ServerName<'static>,
    roots: Arc<RootCertStore>,
    /// Directory with a NAME.pem and a NAME.key for each device.
    identities: Option<PathBuf>,
    /// Configuration of devices without a certificate.
    anonymous: Arc<ClientConfig>,
}

impl FleetTls {
    /// Creates the configuration for a gateway with the name `host`, whose certificate is signed by a CA in `ca`.
    ///
    /// # Errors
    /// The name or the file is unusable.
    pub fn new(host: &str, ca: &Path, identities: Option<&Path>) -> Result<FleetTls, TlsError> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca)? {
            let added = roots.add(certificate);
            added.map_err(|error| refused("certificates", ca, error))?;
        }
        let roots = Arc::new(roots);
        let mut anonymous = builder(&roots).with_no_client_auth();
        // Every device is different, and none has connected before.
        anonymous.resumption = Resumption::disabled();
        Ok(FleetTls {
            host: name.map_err(|_| TlsError::Host(bare.to_owned()))?,
            roots,
            identities: identities.map(Path::to_owned),
            anonymous: Arc::new(anonymous),
        })
    }

    /// Returns the device's side of a new connection.
    ///
    /// # Errors
    /// The device's certificate is unusable.
    pub(super) fn connection(&self, device: &str) -> Result<ClientConnection, TlsError> {
        let config = match &self.identities {
            None => Arc::clone(&self.anonymous),
            Some(dir) => Arc::new(self.identified(dir, device)?),
        };
        let connection = ClientConnection::new(config, self.host.clone());
        connection.map_err(|error| identity(device, error))
    }

    fn identified(&self, dir: &Path, device: &str) -> Result<ClientConfig, TlsError> {
        let key = dir.join(format!("{device}.key"));
        let key = PrivateKeyDer::from_pem_file(&key).map_err(|error| refused("a key", &key, error));
        let chain = certificates(&dir.join(format!("{device}.pem")))?;
        let config = builder(&self.roots).with_client_auth_cert(chain, key?);
        let mut config = config.map_err(|error| identity(device, error))?;
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

fn builder(
    roots: &Arc<RootCertStore>,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has what TLS needs")
        .with_root_certificates(Arc::clone(roots))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(found) if found.is_empty() => Err(refused("certificates", path, "file contains none")),
        found => found.map_err(|error| refused("certificates", path, error)),
    }
}

fn refused(what: &'static str, path: &Path, reason: impl ToString) -> TlsError {
    TlsError::File {
        what,
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn identity(device: &str, error: rustls::Error) -> TlsError {
    TlsError::Identity {
        device: device.to_owned(),
        reason: error.to_string(),
    }
}
