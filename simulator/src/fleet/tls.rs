//! TLS as the devices of a fleet speak it: whom they trust, and which certificates they show.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The gateway's address has no name that a certificate could hold.
    #[error("{0} is no name that a gateway's certificate could hold")]
    Host(String),
    /// A file that cannot be used.
    #[error("cannot take {what} from {}: {reason}", path.display())]
    File {
        /// What should be in it.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key of a device are not fit for use.
    #[error("certificate and key of device {device} do not serve: {reason}")]
    Identity {
        /// Which device.
        device: String,
        /// What is wrong.
        reason: String,
    },
}

/// The fleet's side of TLS.
#[derive(Debug)]
pub struct FleetTls {
    host: ServerName<'static>,
    roots: Arc<RootCertStore>,
    /// Where there is a NAME.pem and a NAME.key for each device.
    identities: Option<PathBuf>,
    /// Of devices that show no certificate.
    anonymous: Arc<ClientConfig>,
}

impl FleetTls {
    /// For a gateway that is reached by the name `host`, and whose certificate leads to one in `ca`.
    ///
    /// # Errors
    /// The name or the file cannot be used.
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
        // Each device is another one, and none has been here before.
        anonymous.resumption = Resumption::disabled();
        Ok(FleetTls {
            host: name.map_err(|_| TlsError::Host(bare.to_owned()))?,
            roots,
            identities: identities.map(Path::to_owned),
            anonymous: Arc::new(anonymous),
        })
    }

    /// A device's side of a new connection.
    ///
    /// # Errors
    /// The device's certificate cannot be used.
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
        Ok(found) if found.is_empty() => Err(refused("certificates", path, "there is none in it")),
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
