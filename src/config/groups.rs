//! Groups of settings: each setting once, with its flag, default, range and help.
//!
//! A field is the flag of `fieldgate serve` with the same name, and its documentation is the flag's help. Each part of
//! the gateway takes its group as a whole. The name of a number ends with its unit.

use std::path::PathBuf;

use clap::Args;
use fieldgate_protocol::column::READINGS_MAX;
use fieldgate_protocol::frame::{
    DEFAULT_FRAME_BYTES_MAX, FRAME_BYTES_MAX, HANDSHAKE_FRAME_BYTES_MAX,
};

use super::address::{HttpAddress, ListenAddress};
use super::defaults;
use super::number::number;
use super::retention::{ReadingRetention, RetentionRule};
use crate::sys::disk::Levels;

const DAY_S: u64 = 86_400;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const CONNECTIONS: u64 = 1_000_000;
const FRAMES_PER_S: u64 = 1_000_000;
const READINGS_PER_S: u64 = 1_000_000_000;
/// Above this, a disk might never have the one point more that ends a level.
const PERCENT_MAX: u64 = 90;
const U16: u64 = u16::MAX as u64;
const U32: u64 = u32::MAX as u64;
/// The largest frame must fit into an empty queue and into a burst, or its device would wait indefinitely.
const FRAME_READINGS: u64 = READINGS_MAX as u64;

/// Listeners and their certificates.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Listeners")]
pub struct ListenSettings {
    /// Address of the plain TCP listener: IP:PORT, HOST:PORT, or :PORT for all addresses of this machine. An
    /// address that other machines can reach also requires --allow-plaintext
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7300")]
    pub listen: ListenAddress,

    /// Allow unencrypted connections from other machines. Only for a trusted network, such as a VPN
    #[arg(long)]
    pub allow_plaintext: bool,

    /// Address of the TLS listener, in the format of --listen; other machines may reach it [default: none].
    /// Create a test certificate with `fieldgate tls init`
    #[arg(long, value_name = "ADDRESS")]
    pub tls_listen: Option<ListenAddress>,

    /// PEM file with the gateway's certificate chain, up to a CA that devices trust [default: tls/server.pem in
    /// the data directory]. Reloaded when it changes and on SIGHUP
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with the certificate's private key, mode 0600 [default: tls/server.key in the data directory]
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// PEM file with the CA certificates that sign device certificates. If set, a device must present a
    /// certificate with its own name in addition to proving its key [default: no client certificates]
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,

    // The minimum of rustls and the maximum of TLS.
    /// Maximum size of a TLS record from the gateway in bytes. Lower it for devices with small receive buffers;
    /// few of the gateway's frames are longer than 100 bytes
    #[arg(long, value_name = "BYTES", default_value = "1024", value_parser = number::<usize>(64, 16_384))]
    pub tls_record_bytes_max: usize,
}

/// The HTTP listener.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "HTTP")]
pub struct HttpSettings {
    /// Address of the HTTP listener for health checks, metrics and the feed, in the format of --listen, or `off`. An
    /// address that other machines can reach also requires --http-token-file
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7380")]
    pub http: HttpAddress,

    /// File with one line `read TOKEN` for each token, mode 0600. All HTTP requests except /livez and /readyz then need
    /// one of the tokens [default: no token]
    #[arg(long, value_name = "FILE")]
    pub http_token_file: Option<PathBuf>,

    /// Host names under which clients may reach the HTTP listener, separated by commas, such as gate.example.com. IP
    /// addresses and localhost are always accepted [default: none]
    #[arg(long, value_name = "HOSTS", value_delimiter = ',')]
    pub http_host: Vec<String>,
}

/// Limits for peers that connect.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Connections")]
pub struct AdmissionLimits {
    /// Maximum number of connections. Beyond it, new ones wait, or the oldest unauthenticated one is closed.
    /// Raise it for a larger fleet, together with the open file limit (ulimit -n)
    #[arg(long, value_name = "CONNECTIONS", default_value = "16384", value_parser = number::<usize>(1, CONNECTIONS))]
    pub connections_max: usize,

    /// Maximum number of connections from one IPv4 address or IPv6 network (/64); further ones are closed. Raise
    /// it if more devices share an address, for example behind NAT or a proxy
    #[arg(long, value_name = "CONNECTIONS", default_value = "8192", value_parser = number::<usize>(1, CONNECTIONS))]
    pub connections_per_address_max: usize,

    /// Maximum number of unauthenticated connections. Beyond it, new ones wait for up to a second, then the
    /// oldest is closed
    #[arg(long, value_name = "CONNECTIONS", default_value = "2048", value_parser = number::<usize>(1, CONNECTIONS))]
    pub handshakes_max: usize,

    /// Maximum number of connections accepted per second; further ones wait. Lower it on slow machines, where
    /// the reconnect of a whole fleet would saturate the CPU
    #[arg(long, value_name = "CONNECTIONS", default_value = "5000", value_parser = number::<u64>(1, CONNECTIONS))]
    pub accepts_per_s_max: u64,

    /// Maximum delay of the reply to a failed authentication, in milliseconds. The delay grows with each failure
    /// from one address; successful logins are not delayed
    #[arg(long, value_name = "MS", default_value = "5000", value_parser = number::<u64>(0, 600_000))]
    pub failure_delay_max_ms: u64,

    /// Maximum number of log lines per minute about refused connections from one address
    #[arg(long, value_name = "LINES", default_value = "20", value_parser = number::<u32>(0, U32))]
    pub log_lines_per_address_max: u32,
}

/// Limits of a connection, and what WELCOME announces to devices.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Sessions")]
pub struct SessionLimits {
    // HELLO and AUTH together may have this size.
    /// Maximum number of bytes that a peer may send before authentication. TLS overhead (up to 64 KiB) is not
    /// counted
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "4096",
        value_parser = number::<usize>(2 * HANDSHAKE_FRAME_BYTES_MAX as u64, MIB)
    )]
    pub preauth_bytes_max: usize,

    /// Maximum number of unsent bytes for a peer that does not read; beyond it, the connection is closed
    #[arg(long, value_name = "BYTES", default_value = "16384", value_parser = number::<usize>(1024, MIB))]
    pub outbound_bytes_max: usize,

    /// Maximum duration of a handshake in seconds, from when the connection is accepted. Raise it for links
    /// with several seconds of latency
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = number::<u64>(1, DAY_S))]
    pub handshake_timeout_s: u64,

    /// Maximum time to receive a frame in seconds, from its first byte. Raise it for links below 1 kbit/s
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = number::<u64>(1, DAY_S))]
    pub frame_timeout_s: u64,

    /// Idle timeout: seconds without a complete frame before the connection is closed; must exceed
    /// --keepalive-s. Lower it to detect dead devices sooner
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = number::<u64>(1, 7 * DAY_S))]
    pub idle_timeout_s: u64,

    /// Keepalive interval announced to devices, in seconds. Raise it to save traffic, but keep it below the NAT
    /// timeouts on the path
    #[arg(long, value_name = "SECONDS", default_value = "40", value_parser = number::<u16>(1, U16))]
    pub keepalive_s: u16,

    /// Seconds that a device waits for an acknowledgement before it reconnects, announced to devices; must
    /// exceed both commit intervals. Raise it if the store may be unavailable or slow for longer
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = number::<u16>(1, U16))]
    pub ack_timeout_s: u16,

    /// Maximum number of unacknowledged frames per device. Raise it for fast links with high latency; lower it
    /// to limit each device's share
    #[arg(long, value_name = "FRAMES", default_value = "64", value_parser = number::<u64>(1, 65_536))]
    pub window_frames: u64,

    // Devices may rely on the default (SPEC R8).
    /// Maximum size of a frame in bytes. Raise it for devices that send large frames; every connection may
    /// buffer one frame
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "4096",
        value_parser = number::<u16>(DEFAULT_FRAME_BYTES_MAX as u64, FRAME_BYTES_MAX as u64)
    )]
    pub frame_bytes_max: u16,
}

/// Which devices may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Registration {
    /// Any device with a key derived from the fleet key; it is registered at its first login
    Open,
    /// Only devices registered with `fieldgate device add` or `import`
    Closed,
}

/// Which devices may connect, and what each may use.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Devices")]
pub struct DeviceSettings {
    /// Which devices may connect
    #[arg(long, value_enum, value_name = "WHICH", default_value = "open")]
    pub registration: Registration,

    /// Rates of frames and readings.
    #[command(flatten)]
    pub rates: DeviceRates,

    /// Number of series, schemas and streams.
    #[command(flatten)]
    pub bounds: DeviceBounds,

    /// Session events.
    #[command(flatten)]
    pub events: EventRetention,

    /// Maximum size of quarantined frames in bytes, an eighth of it per device; beyond it, devices keep such
    /// frames and wait. Raise it if quarantine is checked only rarely
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = number::<u64>(MIB, TIB))]
    pub quarantine_bytes_max: u64,
}

/// Rates of each device.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct DeviceRates {
    /// Maximum sustained rate of frames of any type per device, per second. Frames above it are not rejected but
    /// read later. Lower it so that one device cannot starve the others
    #[arg(long, value_name = "FRAMES", default_value = "20000", value_parser = number::<u64>(1, FRAMES_PER_S))]
    pub device_frames_per_s: u64,

    /// Maximum number of frames that a device may send in one burst after a pause, above --device-frames-per-s
    #[arg(long, value_name = "FRAMES", default_value = "200000", value_parser = number::<u64>(1, 1000 * FRAMES_PER_S))]
    pub device_frames_burst: u64,

    /// Maximum sustained rate of readings per device, per second. Readings above it are not rejected but read
    /// later. Lower it so that one device cannot starve the others
    #[arg(long, value_name = "READINGS", default_value = "250000", value_parser = number::<u64>(1, READINGS_PER_S))]
    pub device_readings_per_s: u64,

    /// Maximum number of readings that a device may send in one burst after a pause, above
    /// --device-readings-per-s. Raise it for devices with large backlogs
    #[arg(
        long,
        value_name = "READINGS",
        default_value = "2000000",
        value_parser = number::<u64>(FRAME_READINGS, 1000 * READINGS_PER_S)
    )]
    pub device_readings_burst: u64,
}

/// Limits of each device in the store. The defaults suffice for a device with 100 channels that renames all of them 40
/// times, and for one that starts a new stream at each boot and boots each hour for two years.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBounds {
    /// Maximum number of series per device, over all its schemas. A schema that would exceed it is rejected; the
    /// device continues with its existing series
    #[arg(long, value_name = "SERIES", default_value = "4096", value_parser = number::<u32>(1, U32))]
    pub device_series_max: u32,

    // Schema numbers in SPEC have 16 bits.
    /// Maximum number of schemas per device. A further one is rejected; the device continues with its existing
    /// schemas
    #[arg(long, value_name = "SCHEMAS", default_value = "1024", value_parser = number::<u32>(1, U16))]
    pub device_schemas_max: u32,

    /// Maximum number of streams per device. A further one is rejected; existing streams continue. Raise it for
    /// devices that start a new stream at each boot and boot often
    #[arg(long, value_name = "STREAMS", default_value = "16384", value_parser = number::<u32>(1, U32))]
    pub device_streams_max: u32,
}

/// Retention of each device's session events.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventRetention {
    /// Maximum number of session events per device in device_events: connects, disconnects, refusals, changes of
    /// presence and twins. Events reported by devices and operator actions are always kept
    #[arg(long, value_name = "EVENTS", default_value = "1000", value_parser = number::<u32>(10, U32))]
    pub device_events_max: u32,

    /// Days after which session events and boot clocks are deleted, except the newest 100 events and 8 clocks
    /// of each device
    #[arg(long, value_name = "DAYS", default_value = "90", value_parser = number::<u32>(1, 36_500))]
    pub device_events_days: u32,
}

/// What is deleted after some time. Without these settings, everything is kept.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Retention")]
pub struct RetentionSettings {
    /// Days after which readings are deleted, by their time [default: never]. The newest reading of each series stays.
    /// Postgres deletes readings by the month, so up to a month later. Readings that are older when they arrive are not
    /// stored, except for the last row of a frame
    #[arg(long, value_name = "DAYS", value_parser = number::<u32>(1, 36_500))]
    pub readings_days: Option<u32>,

    /// Other days for some readings, such as device=pump-*,channel=vib*,unit=mm/s,days=7 or unit=Cel,days=forever. The
    /// first matching rule applies. Separate several rules by semicolons [default: none]
    #[arg(long, value_name = "RULES", value_delimiter = ';')]
    pub retention_rule: Vec<RetentionRule>,

    /// Days after which rows of the ledger are deleted: `frames` and `gaps`, by receipt [default: never]. Not below the
    /// days of the readings. A frame that is sent again is recognized without its row
    #[arg(long, value_name = "DAYS", value_parser = number::<u32>(1, 36_500))]
    pub frames_days: Option<u32>,

    /// Days after which frames in quarantine are deleted, by receipt [default: never]
    #[arg(long, value_name = "DAYS", value_parser = number::<u32>(1, 36_500))]
    pub quarantine_days: Option<u32>,

    /// Days after which events that devices reported and changes by operators are deleted [default: never]. For
    /// session events see --device-events-days
    #[arg(long, value_name = "DAYS", value_parser = number::<u32>(1, 36_500))]
    pub reported_events_days: Option<u32>,
}

impl RetentionSettings {
    /// Returns the retention of readings.
    pub fn readings(&self) -> ReadingRetention {
        ReadingRetention {
            days: self.readings_days,
            rules: self.retention_rule.clone(),
        }
    }
}

/// The queue for the store, and its batches.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Commits")]
pub struct IngestSettings {
    /// Maximum number of readings in a batch, which is one transaction. Lower it for shorter commits, raise it
    /// for higher throughput
    #[arg(long, value_name = "READINGS", default_value = "200000", value_parser = number::<usize>(1, 10_000_000))]
    pub batch_readings_max: usize,

    // Without it, 15,000 devices that send frames at long intervals cost half as much CPU again in small
    // successive commits, and ACKs under load are no faster.
    /// Minimum interval between commits, in milliseconds. Raise it to reduce flash wear: writes become fewer and
    /// larger, acknowledgements later
    #[arg(long, value_name = "MS", default_value = "3", value_parser = number::<u64>(0, 600_000))]
    pub commit_interval_min_ms: u64,

    /// Minimum interval between commits below 200 frames per second (on Postgres, for each of the
    /// --postgres-writers), in milliseconds, so that devices share commits. It does not delay a device that
    /// waits for an acknowledgement before it sends more. Raise it to reduce flash wear; 0 gives the fastest
    /// acknowledgements
    #[arg(long, value_name = "MS", default_value = "200", value_parser = number::<u64>(0, 600_000))]
    pub commit_interval_quiet_ms: u64,

    /// Maximum number of readings queued for the store; must hold a full batch. Each of the --postgres-writers
    /// has an equal part. Raise it to absorb longer bursts
    #[arg(long, value_name = "READINGS", default_value = "1000000", value_parser = number::<usize>(FRAME_READINGS, U32))]
    pub queue_readings_max: usize,

    /// Maximum memory for readings queued for the store, in bytes; at least 512 KiB for each of the
    /// --postgres-writers. Lower it on small machines, raise it to absorb longer bursts
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = number::<usize>(MIB, TIB))]
    pub queue_bytes_max: usize,
}

/// Memory and disk space of SQLite.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "SQLite")]
pub struct SqliteOptions {
    /// Size of SQLite's page cache in bytes. Raise it for many series if memory is free, lower it on small
    /// machines
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = number::<u64>(MIB, TIB))]
    pub cache_bytes: u64,

    /// Size of SQLite's write-ahead log, in bytes, at which commits wait for readers that block its checkpoint.
    /// Lower it on small disks
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = number::<u64>(16 * MIB, TIB))]
    pub wal_bytes_max: u64,
}

/// Free space of the disks that the gateway writes to.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Disks")]
pub struct DiskSettings {
    /// Free space, in percent of a disk that the gateway writes to, below which it warns and retention deletes at once; 0
    /// turns this off
    #[arg(long, value_name = "PERCENT", default_value = "15", value_parser = number::<u8>(0, PERCENT_MAX))]
    pub disk_warn_percent: u8,

    /// Free space, in percent of the disk of the store or the spool, below which no more readings are accepted: devices
    /// keep them and wait until one percentage point more is free. Retention continues. 0 turns this off. Lower it on
    /// large disks
    #[arg(long, value_name = "PERCENT", default_value = "5", value_parser = number::<u8>(0, PERCENT_MAX))]
    pub disk_stop_percent: u8,
}

impl DiskSettings {
    /// Returns the levels of all disks.
    pub fn levels(self) -> Levels {
        Levels {
            warn_percent: self.disk_warn_percent,
            stop_percent: self.disk_stop_percent,
        }
    }
}

/// Connections to Postgres, and what is required of it.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Postgres")]
pub struct PostgresOptions {
    /// Number of connections that write to Postgres; each serves a share of the devices. Raise it if the server
    /// has more than two cores and little other load
    #[arg(long, value_name = "CONNECTIONS", default_value = "2", value_parser = number::<usize>(1, 64))]
    pub postgres_writers: usize,

    /// Seconds to wait at startup for a Postgres that is not up yet, for example while the machine boots; 0
    /// fails immediately. A wrong password or database name always fails immediately
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = number::<u64>(0, DAY_S))]
    pub postgres_wait_s: u64,

    /// Accept a Postgres with fsync or full_page_writes off, which may lose acknowledged readings in a crash, and
    /// leave synchronous_commit as configured. For tests
    #[arg(long)]
    pub allow_postgres_data_loss: bool,
}

/// The local file in front of Postgres.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct SpoolSettings {
    /// Acknowledge readings once they are in spool.db in the data directory, and drain them into Postgres from
    /// there: devices continue while Postgres is unavailable. No other gateway may write to the database
    #[arg(long)]
    pub spool: bool,

    /// Maximum size of the spool in bytes; when it is full, the gateway accepts no frames until Postgres is back.
    /// Raise it to bridge longer outages; a reading takes about 30 bytes
    #[arg(long, value_name = "BYTES", default_value = "4GiB", value_parser = number::<u64>(16 * MIB, TIB))]
    pub spool_bytes_max: u64,
}

/// Every setting of `fieldgate serve`, each in the range of its flag, but not yet compared with the others.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Listeners.
    #[command(flatten)]
    pub listeners: ListenSettings,

    /// The HTTP listener.
    #[command(flatten)]
    pub http: HttpSettings,

    /// Limits for peers that connect.
    #[command(flatten)]
    pub admission: AdmissionLimits,

    /// Limits of a connection.
    #[command(flatten)]
    pub session: SessionLimits,

    /// Devices.
    #[command(flatten)]
    pub devices: DeviceSettings,

    /// Retention.
    #[command(flatten)]
    pub retention: RetentionSettings,

    /// The queue for the store.
    #[command(flatten)]
    pub ingest: IngestSettings,

    /// Maximum time to store and acknowledge accepted frames on Ctrl-C or SIGTERM, in seconds. Keep it below
    /// your service manager's kill timeout
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = number::<u64>(0, DAY_S))]
    pub drain_timeout_s: u64,

    /// Disks.
    #[command(flatten)]
    pub disks: DiskSettings,

    /// SQLite.
    #[command(flatten)]
    pub sqlite: SqliteOptions,

    /// Postgres.
    #[command(flatten)]
    pub postgres: PostgresOptions,

    /// The spool.
    #[command(flatten)]
    pub spool: SpoolSettings,
}

/// Settings that a running gateway can change: see [`Settings::reloaded`]. The limits of sessions apply to new
/// connections.
pub const RELOADABLE: [&str; 29] = [
    "log-level",
    "tls-cert",
    "tls-key",
    "tls-client-ca",
    "tls-record-bytes-max",
    "http-token-file",
    "http-host",
    "connections-per-address-max",
    "handshakes-max",
    "accepts-per-s-max",
    "failure-delay-max-ms",
    "log-lines-per-address-max",
    "preauth-bytes-max",
    "outbound-bytes-max",
    "handshake-timeout-s",
    "frame-timeout-s",
    "idle-timeout-s",
    "keepalive-s",
    "ack-timeout-s",
    "window-frames",
    "frame-bytes-max",
    "registration",
    "device-frames-per-s",
    "device-frames-burst",
    "device-readings-per-s",
    "device-readings-burst",
    "quarantine-bytes-max",
    "disk-warn-percent",
    "disk-stop-percent",
];

impl Settings {
    /// Returns these settings with the values of `new` that a running gateway can change.
    pub fn reloaded(&self, new: Settings) -> Settings {
        let old = self.clone();
        Settings {
            listeners: ListenSettings {
                tls_cert: new.listeners.tls_cert,
                tls_key: new.listeners.tls_key,
                tls_client_ca: new.listeners.tls_client_ca,
                tls_record_bytes_max: new.listeners.tls_record_bytes_max,
                ..old.listeners
            },
            http: HttpSettings {
                http: old.http.http,
                ..new.http
            },
            admission: AdmissionLimits {
                connections_max: old.admission.connections_max,
                ..new.admission
            },
            session: new.session,
            devices: DeviceSettings {
                bounds: old.devices.bounds,
                events: old.devices.events,
                ..new.devices
            },
            disks: new.disks,
            ..old
        }
    }
}

defaults!(
    Settings,
    AdmissionLimits,
    SessionLimits,
    DeviceRates,
    DeviceBounds,
    RetentionSettings,
    IngestSettings,
    SqliteOptions,
    PostgresOptions,
);
