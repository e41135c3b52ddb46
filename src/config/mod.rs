//! Every setting and limit of the gateway, with its unit in its name, validated once.
//!
//! Where the values come from (flags, environment, a file) is the command line's business, and so is
//! every file: nothing here touches the system.
//!
//! Invariant: a [`Config`] can be had only from [`Config::new`], so whoever holds one need not check
//! anything again.

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use fieldgate_protocol::column::READINGS_MAX;
use fieldgate_protocol::frame::{
    DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX, HANDSHAKE_FRAME_BYTES_MAX,
};

use crate::net::tls::TlsFiles;
use crate::store::bounds::DeviceBounds;
use crate::store::url::StoreUrl;
use crate::sys::secret_file::SecretReaders;

pub mod units;

/// Name of the database within the data directory, where `store` does not say otherwise.
pub const DATABASE_FILE: &str = "fieldgate.db";
/// Name of the spool within the data directory.
pub const SPOOL_FILE: &str = "spool.db";
/// Directory of what TLS needs within the data directory.
pub const TLS_DIR: &str = "tls";
/// The gateway's certificate within [`TLS_DIR`].
pub const TLS_CERT_FILE: &str = "server.pem";
/// Its key within [`TLS_DIR`].
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
    /// Every one that proves its key; those that were not known are from then on.
    Open,
    /// Those that were added beforehand.
    Closed,
}

/// What the gateway is asked to run with; [`Config::new`] says whether it can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Holds the fleet key, and the database unless `store` names another.
    pub data_dir: PathBuf,
    /// The database; `None` for [`DATABASE_FILE`] in `data_dir`.
    pub store: Option<StoreUrl>,
    /// Who may read the fleet key and the TLS key besides their owner.
    pub secret_readers: SecretReaders,
    /// Where devices connect, in plain text.
    pub listen: SocketAddr,
    /// Whether `listen` may be reachable from other machines.
    pub allow_plaintext: bool,
    /// Where devices connect through TLS; `None` for nowhere.
    pub tls_listen: Option<SocketAddr>,
    /// The certificate for it; `None` for [`TLS_CERT_FILE`] in the data directory.
    pub tls_cert: Option<PathBuf>,
    /// The certificate's key; `None` for [`TLS_KEY_FILE`] in the data directory.
    pub tls_key: Option<PathBuf>,
    /// Who signs the certificates that devices must show; `None` if they need none.
    pub tls_client_ca: Option<PathBuf>,
    /// Bytes that a TLS record from the gateway holds at most.
    pub tls_record_bytes_max: usize,
    /// Which devices may connect.
    pub registration: Registration,
    /// Connections at once; further ones wait to be accepted.
    pub connections_max: usize,
    /// Of those, from one address; further ones are closed.
    pub connections_per_address_max: usize,
    /// Connections at once that have not proved a key yet; further ones wait, or the oldest ends.
    pub handshakes_max: usize,
    /// Connections that are accepted in a second.
    pub accepts_per_s_max: u64,
    /// Longest wait for the answer to a failed authentication.
    pub failure_delay_max_ms: u64,
    /// Bytes that a peer may send before it has proved its key.
    pub stranger_bytes_max: usize,
    /// Bytes that may wait for a peer to read them.
    pub outbound_bytes_max: usize,
    /// Lines of the log that tell of one address in a minute.
    pub log_lines_per_address_max: u32,
    /// Frames that a device may send in a second; more wait.
    pub device_frames_per_s: u64,
    /// Frames that a device may send at once, after a pause.
    pub device_frames_burst: u64,
    /// Readings that a device may send in a second; more wait.
    pub device_readings_per_s: u64,
    /// Readings that a device may send at once, after a pause.
    pub device_readings_burst: u64,
    /// Series that a device may have.
    pub device_series_max: u32,
    /// Schemas that a device may have.
    pub device_schemas_max: u32,
    /// Streams that a device may have.
    pub device_streams_max: u32,
    /// Lines about a device's sessions that the audit trail keeps.
    pub device_events_max: u32,
    /// Days after which such a line goes, and the clock of a boot, but for the newest.
    pub device_events_days: u32,
    /// From the first byte of a connection to the end of its handshake.
    pub handshake_timeout_s: u64,
    /// From a frame's first byte to its last.
    pub frame_timeout_s: u64,
    /// Without a whole frame: the peer is gone.
    pub idle_timeout_s: u64,
    /// How often a device that has nothing to send says so; told to devices.
    pub keepalive_s: u16,
    /// How long a device waits for an ACK before it connects anew; told to devices.
    pub ack_timeout_s: u16,
    /// Frames that a device may have sent and not yet seen acknowledged.
    pub window_frames: u64,
    /// Longest frame after the handshake.
    pub frame_bytes_max: u16,
    /// Readings of a full batch, which is one transaction.
    pub batch_readings_max: usize,
    /// Least time from the begin of one commit to that of the next, unless a batch is full. Without it
    /// 15,000 devices that send a frame now and then cost half as much CPU again, for small commits one
    /// after the other, and ACKs under load come no sooner.
    pub commit_interval_min_ms: u64,
    /// The same while few frames come, so that devices share commits; no device is made to wait with its next
    /// frame.
    pub commit_interval_quiet_ms: u64,
    /// Readings that may wait for the store.
    pub queue_readings_max: usize,
    /// Bytes of memory that may wait for the store.
    pub queue_bytes_max: usize,
    /// How long the gateway takes to leave after it was asked to.
    pub drain_timeout_s: u64,
    /// Connections that write to Postgres.
    pub postgres_writers: usize,
    /// How long a start waits for a Postgres that is not up yet.
    pub postgres_wait_s: u64,
    /// Whether a Postgres that may lose what it says is committed will do.
    pub allow_postgres_data_loss: bool,
    /// Whether to acknowledge from a local spool, which is drained into Postgres.
    pub spool: bool,
    /// Bytes of the spool's file at which nothing more is taken.
    pub spool_bytes_max: u64,
    /// Bytes of frames in quarantine, beyond which none is taken.
    pub quarantine_bytes_max: u64,
    /// Bytes of SQLite's page cache.
    pub cache_bytes: u64,
    /// Bytes of write-ahead log at which commits wait for readers to let go of it.
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
            stranger_bytes_max: 4_096,
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

/// Why the gateway cannot run with some [`Settings`]; names them as the command line does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Outside of what the setting can be.
    #[error("{name} must be from {min} to {max}, and is {value}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// What it is.
        value: u64,
        /// The least it may be.
        min: u64,
        /// The most it may be.
        max: u64,
    },
    /// Two settings that contradict each other.
    #[error("{larger} ({larger_value}) must be {relation} {smaller} ({smaller_value}): {why}")]
    Relation {
        /// The setting that must be larger.
        larger: &'static str,
        /// What it is.
        larger_value: u64,
        /// How much larger.
        relation: &'static str,
        /// The setting that must be smaller.
        smaller: &'static str,
        /// What it is.
        smaller_value: u64,
        /// What would go wrong.
        why: &'static str,
    },
    /// A certificate that nobody would be served with, and whoever gave it thinks that all is encrypted.
    #[error("{0} is for TLS: give --tls-listen, or leave {0} out")]
    TlsWithoutListener(&'static str),
    /// A certificate without the key that belongs to it, or the other way round.
    #[error("--tls-cert and --tls-key belong together: give both, or neither")]
    HalfATlsPair,
    /// A spool in front of a file that is as local as itself.
    #[error("--spool is for a store in Postgres: give --store postgres://…, or leave --spool out")]
    SpoolWithoutPostgres,
    /// Readings and names of devices would cross a network for anybody to see.
    #[error(
        "listen {listen} can be reached from other machines, and what devices send there is not \
         encrypted; listen on 127.0.0.1 and give --tls-listen, or give --allow-plaintext if the network is \
         trusted"
    )]
    PlaintextBeyondLoopback {
        /// The address.
        listen: SocketAddr,
    },
}

/// [`Settings`] that the gateway can run with.
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
    /// Checks every setting by itself and against the others.
    ///
    /// # Errors
    /// The first setting that is wrong.
    pub fn new(settings: Settings) -> Result<Config, ConfigError> {
        match Config::faults(&settings).into_iter().next() {
            Some(fault) => Err(fault),
            None => {
                let store = store_url(&settings.data_dir, settings.store.as_ref());
                Ok(Config { settings, store })
            }
        }
    }

    /// Returns what is wrong with settings: the first fault of each kind.
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

    /// The database.
    pub fn store(&self) -> &StoreUrl {
        &self.store
    }

    /// The files that TLS needs, if there is to be any.
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

    /// The file of the spool, whether it is used or not.
    pub fn spool_path(&self) -> PathBuf {
        self.settings.data_dir.join(SPOOL_FILE)
    }
}

/// The database: what `store` says, or the usual file in the data directory.
pub fn store_url(data_dir: &Path, store: Option<&StoreUrl>) -> StoreUrl {
    match store {
        Some(url) => url.clone(),
        None => StoreUrl::Sqlite(data_dir.join(DATABASE_FILE)),
    }
}

fn check_listen(settings: &Settings) -> Result<(), ConfigError> {
    // 127.0.0.1 may be written as an IPv6 address, too.
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
    // The largest frame must fit into an empty queue, or its device would wait for ever.
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
        // HELLO and AUTH may take as much.
        (
            "stranger-bytes-max",
            s.stranger_bytes_max as u64,
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
        // SPEC has no more numbers.
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
        // What rustls can, and TLS allows.
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
        // An eighth, which is what a device may use, holds several of the longest frames.
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
        "a device with nothing to send would be cut off again and again",
    )?;
    at_least(
        ("queue-readings-max", s.queue_readings_max as u64),
        ("batch-readings-max", s.batch_readings_max as u64),
        "a full batch would never come together",
    )?;
    let writers = s.postgres_writers as u64;
    at_least(
        ("queue-readings-max", s.queue_readings_max as u64),
        ("postgres-writers times 8192", writers * READINGS_MAX as u64),
        "each writer has its part of the queue, and the largest frame must fit into it",
    )?;
    at_least(
        ("queue-bytes-max", s.queue_bytes_max as u64),
        ("postgres-writers times 512 KiB", writers * (MIB / 2)),
        "each writer has its part of the queue, and the largest frame must fit into it",
    )?;
    // In milliseconds, since that is how the smaller is given.
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
