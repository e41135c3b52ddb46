//! Every setting and limit of the gateway, with its unit in its name, validated once.
//!
//! The command line reads the values from flags, environment and settings file. This module does no I/O.
//!
//! Invariant: only [`Config::new`] creates a [`Config`], so its values need no further checks.

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use fieldgate_protocol::column::READINGS_MAX;
use fieldgate_protocol::frame::{
    DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX, HANDSHAKE_FRAME_BYTES_MAX,
};

use self::store_url::StoreUrl;
use crate::sys::secret_file::SecretReaders;

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

const DAY_S: u64 = 86_400;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const CONNECTIONS: u64 = 1_000_000;
const FRAMES_PER_S: u64 = 1_000_000;
const READINGS_PER_S: u64 = 1_000_000_000;

/// Which devices may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Registration {
    /// Any device that proves its key; unknown devices are registered at their first login.
    Open,
    /// Only devices that were registered before.
    Closed,
}

/// Limits for each device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBounds {
    /// Maximum number of series, over all schemas.
    pub series_max: u32,
    /// Maximum number of schemas.
    pub schemas_max: u32,
    /// Maximum number of streams.
    pub streams_max: u32,
}

impl DeviceBounds {
    /// Suffices for a device with 100 channels that renames all of them 40 times, and for one that starts a new
    /// stream at each boot and boots each hour for two years.
    pub const DEFAULT: DeviceBounds = DeviceBounds {
        series_max: 4096,
        schemas_max: 1024,
        streams_max: 16_384,
    };
}

impl Default for DeviceBounds {
    fn default() -> Self {
        DeviceBounds::DEFAULT
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

/// Settings of the gateway, not yet validated; see [`Config::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Directory of the fleet key, and of the database unless `store` is set.
    pub data_dir: PathBuf,
    /// URL of the database; `None` for [`DATABASE_FILE`] in `data_dir`.
    pub store: Option<StoreUrl>,
    /// Who may read the files of the fleet key and the TLS key.
    pub secret_readers: SecretReaders,
    /// Address of the plain TCP listener.
    pub listen: SocketAddr,
    /// Whether `listen` may be reachable from other machines.
    pub allow_plaintext: bool,
    /// Address of the TLS listener; `None` for no TLS.
    pub tls_listen: Option<SocketAddr>,
    /// File of the gateway's certificate; `None` for [`TLS_CERT_FILE`] in the data directory.
    pub tls_cert: Option<PathBuf>,
    /// File of the certificate's private key; `None` for [`TLS_KEY_FILE`] in the data directory.
    pub tls_key: Option<PathBuf>,
    /// File of the CA certificates that sign device certificates; `None` if devices need no certificates.
    pub tls_client_ca: Option<PathBuf>,
    /// Maximum size of a TLS record from the gateway, in bytes.
    pub tls_record_bytes_max: usize,
    /// Which devices may connect.
    pub registration: Registration,
    /// Maximum number of connections; further ones wait to be accepted.
    pub connections_max: usize,
    /// Maximum number of connections from one address; further ones are closed.
    pub connections_per_address_max: usize,
    /// Maximum number of unauthenticated connections; further ones wait, or the oldest is closed.
    pub handshakes_max: usize,
    /// Maximum number of connections accepted per second.
    pub accepts_per_s_max: u64,
    /// Maximum delay of the reply to a failed authentication, in milliseconds.
    pub failure_delay_max_ms: u64,
    /// Maximum number of bytes that a peer may send before authentication.
    pub preauth_bytes_max: usize,
    /// Maximum number of unsent bytes for one peer.
    pub outbound_bytes_max: usize,
    /// Maximum number of log lines per minute about one address.
    pub log_lines_per_address_max: u32,
    /// Sustained rate of frames per device and second; frames above it are read later.
    pub device_frames_per_s: u64,
    /// Frames that a device may send in one burst, after a pause.
    pub device_frames_burst: u64,
    /// Sustained rate of readings per device and second; readings above it are read later.
    pub device_readings_per_s: u64,
    /// Readings that a device may send in one burst, after a pause.
    pub device_readings_burst: u64,
    /// Maximum number of series per device.
    pub device_series_max: u32,
    /// Maximum number of schemas per device.
    pub device_schemas_max: u32,
    /// Maximum number of streams per device.
    pub device_streams_max: u32,
    /// Maximum number of session events per device in the audit trail.
    pub device_events_max: u32,
    /// Days after which session events and boot clocks are deleted, except the newest of each device.
    pub device_events_days: u32,
    /// Maximum time from the accept of a connection to the end of its handshake, in seconds.
    pub handshake_timeout_s: u64,
    /// Maximum time from a frame's first byte to its last, in seconds.
    pub frame_timeout_s: u64,
    /// Seconds without a complete frame before the connection is closed.
    pub idle_timeout_s: u64,
    /// Keepalive interval announced to devices, in seconds.
    pub keepalive_s: u16,
    /// Seconds that a device waits for an ACK before it reconnects, announced to devices.
    pub ack_timeout_s: u16,
    /// Maximum number of unacknowledged frames per device.
    pub window_frames: u64,
    /// Maximum size of a frame after the handshake, in bytes.
    pub frame_bytes_max: u16,
    /// Maximum number of readings in a batch, which is one transaction.
    pub batch_readings_max: usize,
    /// Minimum interval between the starts of two commits, in milliseconds, unless a batch is full. Without it,
    /// 15,000 devices that send frames at long intervals cost half as much CPU again in small successive commits,
    /// and ACKs under load are no faster.
    pub commit_interval_min_ms: u64,
    /// The same interval at a low frame rate, so that devices share commits. It does not delay a device that waits
    /// for an ACK before it sends more.
    pub commit_interval_quiet_ms: u64,
    /// Maximum number of readings queued for the store.
    pub queue_readings_max: usize,
    /// Maximum memory for readings queued for the store, in bytes.
    pub queue_bytes_max: usize,
    /// Maximum duration of a shutdown, in seconds.
    pub drain_timeout_s: u64,
    /// Number of connections that write to Postgres.
    pub postgres_writers: usize,
    /// Seconds to wait at startup for a Postgres that is not up yet.
    pub postgres_wait_s: u64,
    /// Whether to accept a Postgres that may lose committed data in a crash.
    pub allow_postgres_data_loss: bool,
    /// Whether to acknowledge from a local spool, which is drained into Postgres.
    pub spool: bool,
    /// Size of the spool's file, in bytes, at which the gateway accepts no more frames.
    pub spool_bytes_max: u64,
    /// Maximum size of all quarantined frames, in bytes.
    pub quarantine_bytes_max: u64,
    /// Size of SQLite's page cache, in bytes.
    pub cache_bytes: u64,
    /// Size of the write-ahead log, in bytes, at which commits wait for readers that keep it from being
    /// checkpointed.
    pub wal_bytes_max: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let bounds = DeviceBounds::default();
        Settings {
            data_dir: PathBuf::from("./fieldgate-data"),
            store: None,
            secret_readers: SecretReaders::Owner,
            listen: SocketAddr::from(([127, 0, 0, 1], 7300)),
            allow_plaintext: false,
            tls_listen: None,
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
            tls_record_bytes_max: 1024,
            registration: Registration::Open,
            connections_max: 16_384,
            connections_per_address_max: 8_192,
            handshakes_max: 2_048,
            accepts_per_s_max: 5_000,
            failure_delay_max_ms: 5_000,
            preauth_bytes_max: 4_096,
            outbound_bytes_max: 16 * 1024,
            log_lines_per_address_max: 20,
            device_frames_per_s: 20_000,
            device_frames_burst: 200_000,
            device_readings_per_s: 250_000,
            device_readings_burst: 2_000_000,
            device_series_max: bounds.series_max,
            device_schemas_max: bounds.schemas_max,
            device_streams_max: bounds.streams_max,
            device_events_max: 1000,
            device_events_days: 90,
            handshake_timeout_s: 10,
            frame_timeout_s: 30,
            idle_timeout_s: 120,
            keepalive_s: 40,
            ack_timeout_s: 30,
            window_frames: 64,
            frame_bytes_max: DEFAULT_FRAME_BYTES_MAX as u16,
            batch_readings_max: 200_000,
            commit_interval_min_ms: 3,
            commit_interval_quiet_ms: 200,
            queue_readings_max: 1_000_000,
            queue_bytes_max: 256 * MIB as usize,
            drain_timeout_s: 10,
            postgres_writers: 2,
            postgres_wait_s: 60,
            allow_postgres_data_loss: false,
            spool: false,
            spool_bytes_max: 4096 * MIB,
            quarantine_bytes_max: 64 * MIB,
            cache_bytes: 256 * MIB,
            wal_bytes_max: 1024 * MIB,
        }
    }
}

/// Reason why [`Settings`] are invalid. Names settings as on the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A value is outside the setting's range.
    #[error("{name} must be from {min} to {max}, but is {value}")]
    OutOfRange {
        /// Name of the setting.
        name: &'static str,
        /// Value of the setting.
        value: u64,
        /// Smallest valid value.
        min: u64,
        /// Largest valid value.
        max: u64,
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
    /// A spool in front of SQLite, which is a local file itself.
    #[error("--spool requires Postgres: set --store postgres://…, or omit --spool")]
    SpoolWithoutPostgres,
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

/// Valid [`Settings`].
#[derive(Clone, Debug)]
pub struct Config {
    settings: Settings,
    store: StoreUrl,
}

impl Deref for Config {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.settings
    }
}

impl Config {
    /// Validates every setting by itself and against the others.
    ///
    /// # Errors
    /// Returns the first fault.
    pub fn new(settings: Settings) -> Result<Config, ConfigError> {
        match Config::faults(&settings).into_iter().next() {
            Some(fault) => Err(fault),
            None => {
                let store = store_url(&settings.data_dir, settings.store.as_ref());
                Ok(Config { settings, store })
            }
        }
    }

    /// Returns the faults of `settings`: the first of each kind.
    pub fn faults(settings: &Settings) -> Vec<ConfigError> {
        let store = store_url(&settings.data_dir, settings.store.as_ref());
        let spool = match settings.spool && !matches!(store, StoreUrl::Postgres(_)) {
            true => Err(ConfigError::SpoolWithoutPostgres),
            false => Ok(()),
        };
        let checks = [
            check_listen(settings),
            check_tls(settings),
            check_ranges(settings),
            check_relations(settings),
            spool,
        ];
        checks.into_iter().filter_map(Result::err).collect()
    }

    /// Returns the store's URL.
    pub fn store(&self) -> &StoreUrl {
        &self.store
    }

    /// Returns the TLS files, or `None` if TLS is off.
    pub fn tls_files(&self) -> Option<TlsFiles> {
        let within = |file| self.settings.data_dir.join(TLS_DIR).join(file);
        let (cert, key) = (
            self.settings.tls_cert.clone(),
            self.settings.tls_key.clone(),
        );
        self.settings.tls_listen.map(|_| TlsFiles {
            cert: cert.unwrap_or_else(|| within(TLS_CERT_FILE)),
            key: key.unwrap_or_else(|| within(TLS_KEY_FILE)),
            client_ca: self.settings.tls_client_ca.clone(),
            key_readers: self.settings.secret_readers,
        })
    }

    /// Returns the path of the spool, even if the spool is off.
    pub fn spool_path(&self) -> PathBuf {
        self.settings.data_dir.join(SPOOL_FILE)
    }
}

/// Returns the URL of the database: `store`, or the default file in the data directory.
pub fn store_url(data_dir: &Path, store: Option<&StoreUrl>) -> StoreUrl {
    match store {
        Some(url) => url.clone(),
        None => StoreUrl::Sqlite(data_dir.join(DATABASE_FILE)),
    }
}

fn check_listen(settings: &Settings) -> Result<(), ConfigError> {
    // 127.0.0.1 can also be written as an IPv6 address.
    let is_loopback = settings.listen.ip().to_canonical().is_loopback();
    if is_loopback || settings.allow_plaintext {
        return Ok(());
    }
    Err(ConfigError::PlaintextBeyondLoopback {
        listen: settings.listen,
    })
}

fn check_tls(settings: &Settings) -> Result<(), ConfigError> {
    if settings.tls_cert.is_some() != settings.tls_key.is_some() {
        return Err(ConfigError::HalfATlsPair);
    }
    let given = [
        ("--tls-cert", &settings.tls_cert),
        ("--tls-client-ca", &settings.tls_client_ca),
    ];
    match given.into_iter().find(|(_, path)| path.is_some()) {
        Some((flag, _)) if settings.tls_listen.is_none() => {
            Err(ConfigError::TlsWithoutListener(flag))
        }
        _ => Ok(()),
    }
}

fn check_ranges(s: &Settings) -> Result<(), ConfigError> {
    // Devices may rely on the default (SPEC R8).
    let frame_bytes = (DEFAULT_FRAME_BYTES_MAX as u64, FRAME_BYTES_MAX as u64);
    // The largest frame must fit into an empty queue, or its device would wait indefinitely.
    let frame_readings = READINGS_MAX as u64;
    let u16_max = u64::from(u16::MAX);
    let u32_max = u64::from(u32::MAX);
    let ranges = [
        ("connections-max", s.connections_max as u64, 1, CONNECTIONS),
        (
            "connections-per-address-max",
            s.connections_per_address_max as u64,
            1,
            CONNECTIONS,
        ),
        ("handshakes-max", s.handshakes_max as u64, 1, CONNECTIONS),
        ("accepts-per-s-max", s.accepts_per_s_max, 1, CONNECTIONS),
        ("failure-delay-max-ms", s.failure_delay_max_ms, 0, 600_000),
        // HELLO and AUTH together may have this size.
        (
            "preauth-bytes-max",
            s.preauth_bytes_max as u64,
            2 * HANDSHAKE_FRAME_BYTES_MAX as u64,
            MIB,
        ),
        ("outbound-bytes-max", s.outbound_bytes_max as u64, 1024, MIB),
        (
            "log-lines-per-address-max",
            s.log_lines_per_address_max.into(),
            0,
            u32_max,
        ),
        (
            "device-frames-per-s",
            s.device_frames_per_s,
            1,
            FRAMES_PER_S,
        ),
        (
            "device-frames-burst",
            s.device_frames_burst,
            1,
            1000 * FRAMES_PER_S,
        ),
        (
            "device-readings-per-s",
            s.device_readings_per_s,
            1,
            READINGS_PER_S,
        ),
        (
            "device-readings-burst",
            s.device_readings_burst,
            frame_readings,
            1000 * READINGS_PER_S,
        ),
        ("device-series-max", s.device_series_max.into(), 1, u32_max),
        // Schema numbers in SPEC have 16 bits.
        (
            "device-schemas-max",
            s.device_schemas_max.into(),
            1,
            u64::from(u16::MAX),
        ),
        (
            "device-streams-max",
            s.device_streams_max.into(),
            1,
            u32_max,
        ),
        ("device-events-max", s.device_events_max.into(), 10, u32_max),
        ("device-events-days", s.device_events_days.into(), 1, 36_500),
        // The minimum of rustls and the maximum of TLS.
        (
            "tls-record-bytes-max",
            s.tls_record_bytes_max as u64,
            64,
            16_384,
        ),
        ("handshake-timeout-s", s.handshake_timeout_s, 1, DAY_S),
        ("frame-timeout-s", s.frame_timeout_s, 1, DAY_S),
        ("idle-timeout-s", s.idle_timeout_s, 1, 7 * DAY_S),
        ("keepalive-s", s.keepalive_s.into(), 1, u16_max),
        ("ack-timeout-s", s.ack_timeout_s.into(), 1, u16_max),
        ("window-frames", s.window_frames, 1, 65_536),
        (
            "frame-bytes-max",
            s.frame_bytes_max.into(),
            frame_bytes.0,
            frame_bytes.1,
        ),
        (
            "batch-readings-max",
            s.batch_readings_max as u64,
            1,
            10_000_000,
        ),
        (
            "commit-interval-min-ms",
            s.commit_interval_min_ms,
            0,
            600_000,
        ),
        (
            "commit-interval-quiet-ms",
            s.commit_interval_quiet_ms,
            0,
            600_000,
        ),
        (
            "queue-readings-max",
            s.queue_readings_max as u64,
            frame_readings,
            u32_max,
        ),
        ("queue-bytes-max", s.queue_bytes_max as u64, MIB, TIB),
        ("drain-timeout-s", s.drain_timeout_s, 0, DAY_S),
        ("postgres-writers", s.postgres_writers as u64, 1, 64),
        ("postgres-wait-s", s.postgres_wait_s, 0, DAY_S),
        ("spool-bytes-max", s.spool_bytes_max, 16 * MIB, TIB),
        // A device's share, an eighth, holds several of the longest frames.
        ("quarantine-bytes-max", s.quarantine_bytes_max, MIB, TIB),
        ("cache-bytes", s.cache_bytes, MIB, TIB),
        ("wal-bytes-max", s.wal_bytes_max, 16 * MIB, TIB),
    ];
    for (name, value, min, max) in ranges {
        if !(min..=max).contains(&value) {
            return Err(ConfigError::OutOfRange {
                name,
                value,
                min,
                max,
            });
        }
    }
    Ok(())
}

fn check_relations(s: &Settings) -> Result<(), ConfigError> {
    more_than(
        ("idle-timeout-s", s.idle_timeout_s),
        ("keepalive-s", s.keepalive_s.into()),
        "idle devices would be disconnected repeatedly",
    )?;
    at_least(
        ("queue-readings-max", s.queue_readings_max as u64),
        ("batch-readings-max", s.batch_readings_max as u64),
        "a batch could never fill up",
    )?;
    let writers = s.postgres_writers as u64;
    at_least(
        ("queue-readings-max", s.queue_readings_max as u64),
        ("postgres-writers times 8192", writers * READINGS_MAX as u64),
        "each writer has an equal part of the queue, which must hold the largest frame",
    )?;
    at_least(
        ("queue-bytes-max", s.queue_bytes_max as u64),
        ("postgres-writers times 512 KiB", writers * (MIB / 2)),
        "each writer has an equal part of the queue, which must hold the largest frame",
    )?;
    // Compared in milliseconds, the unit of the smaller setting.
    more_than(
        (
            "ack-timeout-s in ms",
            u64::from(s.ack_timeout_s).saturating_mul(1000),
        ),
        ("commit-interval-min-ms", s.commit_interval_min_ms),
        "devices would reconnect before their readings are committed",
    )?;
    more_than(
        (
            "ack-timeout-s in ms",
            u64::from(s.ack_timeout_s).saturating_mul(1000),
        ),
        ("commit-interval-quiet-ms", s.commit_interval_quiet_ms),
        "devices would reconnect before their readings are committed",
    )
}

type Named = (&'static str, u64);

fn more_than(larger: Named, smaller: Named, why: &'static str) -> Result<(), ConfigError> {
    if larger.1 > smaller.1 {
        return Ok(());
    }
    Err(relation(larger, "more than", smaller, why))
}

fn at_least(larger: Named, smaller: Named, why: &'static str) -> Result<(), ConfigError> {
    if larger.1 >= smaller.1 {
        return Ok(());
    }
    Err(relation(larger, "at least", smaller, why))
}

fn relation(
    (larger, larger_value): Named,
    relation: &'static str,
    (smaller, smaller_value): Named,
    why: &'static str,
) -> ConfigError {
    ConfigError::Relation {
        larger,
        larger_value,
        relation,
        smaller,
        smaller_value,
        why,
    }
}

#[cfg(test)]
mod tests;
