//! Every setting and limit of the gateway, each once: [`groups`] holds its flag, default, range and help. Their values
//! come from the command line, which reads flags, environment and settings file.
//!
//! Invariant: only [`Config::new`] creates a [`Config`], so its values need no further checks.

use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;

use clap::Args;
use fieldgate_protocol::column::READINGS_MAX;

use self::address::{HttpAddress, ListenAddress};
pub use self::groups::*;
use self::store_url::StoreUrl;
use crate::sys::secret_file::SecretReaders;

pub mod address;
mod groups;
mod number;
pub mod retention;
pub mod store_url;
pub mod units;

/// Name of the database in the data directory, unless `store` is set.
pub const DATABASE_FILE: &str = "fieldgate.db";
/// Name of the spool in the data directory.
pub const SPOOL_FILE: &str = "spool.db";
/// Directory of the TLS files in the data directory.
pub const TLS_DIR: &str = "tls";
/// Name of the gateway's certificate in [`TLS_DIR`].
pub const TLS_CERT_FILE: &str = "server.pem";
/// Name of the certificate's private key in [`TLS_DIR`].
pub const TLS_KEY_FILE: &str = "server.key";

/// Implements `Default` for groups of settings, from the defaults of their flags.
macro_rules! defaults {
    ($($group:ty),* $(,)?) => {$(
        impl Default for $group {
            fn default() -> Self {
                let command = clap::Command::new("defaults").no_binary_name(true);
                let matches = <$group as clap::Args>::augment_args(command).get_matches_from([""; 0]);
                <$group as clap::FromArgMatches>::from_arg_matches(&matches).expect("every flag has a default")
            }
        }
    )*};
}
use defaults;

/// Where the gateway's files and its store are.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// Directory of the fleet key and the database. Set it to the service's data directory, such as
    /// /var/lib/fieldgate
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "./fieldgate-data"
    )]
    pub data_dir: PathBuf,

    /// Database URL: sqlite://PATH or postgres://USER@HOST/DATABASE [default: fieldgate.db in the data
    /// directory]. Put the password in PGPASSWORD or ~/.pgpass instead
    #[arg(long, global = true, value_name = "URL")]
    pub store: Option<StoreUrl>,

    /// Accept a fleet key and a TLS key that the file's group may read (mode 0640), if this process belongs to
    /// that group, as with Kubernetes' fsGroup or Debian's ssl-cert
    #[arg(long, global = true)]
    pub allow_group_read: bool,
}

defaults!(Location);

impl Location {
    /// Returns the URL of the database: `store`, or the default file in the data directory.
    pub fn store(&self) -> StoreUrl {
        match &self.store {
            Some(url) => url.clone(),
            None => StoreUrl::Sqlite(self.data_dir.join(DATABASE_FILE)),
        }
    }

    /// Returns the path of the spool, even if the spool is off.
    pub fn spool(&self) -> PathBuf {
        self.data_dir.join(SPOOL_FILE)
    }

    /// Returns who may read the files of the fleet key and the TLS key.
    pub fn secret_readers(&self) -> SecretReaders {
        match self.allow_group_read {
            true => SecretReaders::Group,
            false => SecretReaders::Owner,
        }
    }
}

/// Paths of the TLS files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The gateway's certificate, followed by intermediate certificates up to a CA known to
    /// devices.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// CA certificates that sign client certificates; `None` if devices need none.
    pub client_ca: Option<PathBuf>,
    /// Users other than the owner who may read the key.
    pub key_readers: SecretReaders,
}

/// Reason why [`Settings`] are invalid. Names settings as on the command line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The host name of a listener cannot be resolved.
    #[error("could not resolve {flag} {address}: {error}; use an IP address, or check the name")]
    Unresolved {
        /// Flag of the listener.
        flag: &'static str,
        /// Its value.
        address: ListenAddress,
        /// Error of the system.
        error: io::Error,
    },
    /// Two settings contradict each other.
    #[error("{larger} ({larger_value}) must be {relation} {smaller} ({smaller_value}): {why}")]
    Relation {
        /// Name of the setting that must be larger.
        larger: &'static str,
        /// Its value.
        larger_value: u64,
        /// Required relation: `more than` or `at least`.
        relation: &'static str,
        /// Name of the setting that must be smaller.
        smaller: &'static str,
        /// Its value.
        smaller_value: u64,
        /// Consequence of the contradiction.
        why: &'static str,
    },
    /// A TLS file without a TLS listener: the operator may believe that connections are encrypted.
    #[error("{0} requires TLS: set --tls-listen, or omit {0}")]
    TlsWithoutListener(&'static str),
    /// A certificate without its key, or a key without its certificate.
    #[error("--tls-cert and --tls-key belong together: set both or neither")]
    HalfATlsPair,
    /// The ledger may not lose frames whose readings are in the store.
    #[error(
        "frames-days ({frames}) must be at least as long as every reading is kept ({readings}); raise it, or lower \
         --readings-days and --retention-rule"
    )]
    LedgerBeforeReadings {
        /// Days of the ledger.
        frames: u32,
        /// Days of the readings that are kept longest.
        readings: String,
    },
    /// A spool in front of SQLite, which is a local file itself.
    #[error("--spool requires Postgres: set --store postgres://…, or omit --spool")]
    SpoolWithoutPostgres,
    /// Anyone on the network could read readings and device names.
    #[error(
        "http {http} is reachable from other machines without a token; use 127.0.0.1, set --http-token-file, or \
         --http off"
    )]
    HttpWithoutToken {
        /// Address of the HTTP listener.
        http: SocketAddr,
    },
    /// Readings and device names would cross a network unencrypted.
    #[error(
        "listen {listen} is reachable from other machines without encryption; use 127.0.0.1 and \
         --tls-listen, or set --allow-plaintext if the network is trusted"
    )]
    PlaintextBeyondLoopback {
        /// Address of the plain TCP listener.
        listen: SocketAddr,
    },
}

/// Valid [`Settings`], with the addresses of the listeners.
#[derive(Clone, Debug)]
pub struct Config {
    settings: Settings,
    /// Where the gateway's files and its store are.
    pub location: Location,
    /// URL of the database.
    pub store: StoreUrl,
    /// Address of the plain TCP listener.
    pub listen: SocketAddr,
    /// Address of the TLS listener; `None` for no TLS.
    pub tls_listen: Option<SocketAddr>,
    /// Address of the HTTP listener; `None` for no HTTP.
    pub http_listen: Option<SocketAddr>,
}

impl Deref for Config {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.settings
    }
}

impl Config {
    /// Compares the settings with each other, and resolves the host names of the listeners.
    ///
    /// # Errors
    /// Returns every fault.
    pub fn new(settings: Settings, location: Location) -> Result<Config, Vec<ConfigError>> {
        let listeners = &settings.listeners;
        let mut faults = Vec::new();
        let mut resolved = |flag, address: &ListenAddress| match address.resolve() {
            Ok(resolved) => Some(resolved),
            Err(error) => {
                let address = address.clone();
                faults.push(ConfigError::Unresolved {
                    flag,
                    address,
                    error,
                });
                None
            }
        };
        let listen = resolved("--listen", &listeners.listen);
        let tls_listen = listeners.tls_listen.as_ref();
        let tls_listen = tls_listen.and_then(|address| resolved("--tls-listen", address));
        let http_listen = match &settings.http.http {
            HttpAddress::On(address) => resolved("--http", address),
            HttpAddress::Off => None,
        };
        let is_reachable = |listen: &SocketAddr| !listen.ip().to_canonical().is_loopback();
        if let Some(listen) = listen.filter(is_reachable)
            && !listeners.allow_plaintext
        {
            faults.push(ConfigError::PlaintextBeyondLoopback { listen });
        }
        if let Some(http) = http_listen.filter(is_reachable)
            && settings.http.http_token_file.is_none()
        {
            faults.push(ConfigError::HttpWithoutToken { http });
        }
        if matches!(location.store(), StoreUrl::Sqlite(_)) && settings.spool.spool {
            faults.push(ConfigError::SpoolWithoutPostgres);
        }
        faults.extend(tls_faults(listeners));
        faults.extend(retention_fault(&settings.retention));
        faults.extend(contradictions(&settings));
        match listen {
            Some(listen) if faults.is_empty() => Ok(Config {
                store: location.store(),
                settings,
                location,
                listen,
                tls_listen,
                http_listen,
            }),
            _ => Err(faults),
        }
    }

    /// Returns the path of the spool, or `None` if it is off.
    pub fn spool(&self) -> Option<PathBuf> {
        self.settings.spool.spool.then(|| self.location.spool())
    }

    /// Returns the TLS files, or `None` if TLS is off.
    pub fn tls_files(&self) -> Option<TlsFiles> {
        let within = |file| self.location.data_dir.join(TLS_DIR).join(file);
        let ListenSettings {
            tls_cert,
            tls_key,
            tls_client_ca,
            ..
        } = self.settings.listeners.clone();
        self.tls_listen.map(|_| TlsFiles {
            cert: tls_cert.unwrap_or_else(|| within(TLS_CERT_FILE)),
            key: tls_key.unwrap_or_else(|| within(TLS_KEY_FILE)),
            client_ca: tls_client_ca,
            key_readers: self.location.secret_readers(),
        })
    }
}

fn retention_fault(retention: &RetentionSettings) -> Option<ConfigError> {
    let frames = retention.frames_days?;
    let readings = match retention.readings().longest() {
        Some(days) if days <= frames => return None,
        Some(days) => days.to_string(),
        None => "forever".to_owned(),
    };
    Some(ConfigError::LedgerBeforeReadings { frames, readings })
}

fn tls_faults(listeners: &ListenSettings) -> Vec<ConfigError> {
    let mut faults = Vec::new();
    if listeners.tls_cert.is_some() != listeners.tls_key.is_some() {
        faults.push(ConfigError::HalfATlsPair);
    }
    if listeners.tls_listen.is_none() {
        let files = [
            ("--tls-cert", &listeners.tls_cert),
            ("--tls-client-ca", &listeners.tls_client_ca),
        ];
        let given = files.into_iter().filter(|(_, path)| path.is_some());
        faults.extend(given.map(|(flag, _)| ConfigError::TlsWithoutListener(flag)));
    }
    faults
}

/// Returns the pairs of settings that contradict each other.
fn contradictions(settings: &Settings) -> impl Iterator<Item = ConfigError> {
    let Settings {
        session, ingest, ..
    } = settings;
    let writers = settings.postgres.postgres_writers as u64;
    // Compared in milliseconds, the unit of the smaller setting.
    let ack_timeout = (
        "ack-timeout-s in ms",
        u64::from(session.ack_timeout_s) * 1000,
    );
    let queue_readings = ("queue-readings-max", ingest.queue_readings_max as u64);
    let early = "devices would reconnect before their readings are committed";
    let small = "each writer has an equal part of the queue, which must hold the largest frame";
    let required = [
        (
            ("idle-timeout-s", session.idle_timeout_s),
            "more than",
            ("keepalive-s", session.keepalive_s.into()),
            "idle devices would be disconnected repeatedly",
        ),
        (
            queue_readings,
            "at least",
            ("batch-readings-max", ingest.batch_readings_max as u64),
            "a batch could never fill up",
        ),
        (
            queue_readings,
            "at least",
            ("postgres-writers times 8192", writers * READINGS_MAX as u64),
            small,
        ),
        (
            ("queue-bytes-max", ingest.queue_bytes_max as u64),
            "at least",
            ("postgres-writers times 512 KiB", writers * (512 << 10)),
            small,
        ),
        (
            ack_timeout,
            "more than",
            ("commit-interval-min-ms", ingest.commit_interval_min_ms),
            early,
        ),
        (
            ack_timeout,
            "more than",
            ("commit-interval-quiet-ms", ingest.commit_interval_quiet_ms),
            early,
        ),
    ];
    let disks = &settings.disks;
    let levels = (
        ("disk-warn-percent", u64::from(disks.disk_warn_percent)),
        "at least",
        ("disk-stop-percent", u64::from(disks.disk_stop_percent)),
        "the gateway would stop storing without a warning",
    );
    let levels = Some(levels).filter(|_| disks.disk_warn_percent > 0);
    required.into_iter().chain(levels).filter_map(
        |((larger, larger_value), relation, (smaller, smaller_value), why)| {
            let holds = match relation {
                "more than" => larger_value > smaller_value,
                _ => larger_value >= smaller_value,
            };
            (!holds).then_some(ConfigError::Relation {
                larger,
                larger_value,
                relation,
                smaller,
                smaller_value,
                why,
            })
        },
    )
}

#[cfg(test)]
mod tests;
