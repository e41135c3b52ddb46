//! `fieldgate serve`: the gateway itself.

use std::fmt::Display;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use fieldgate::auth::credentials::Credentials;
use fieldgate::auth::fleet_key::{FleetKey, KEY_FILE, Origin, create_data_dir};
use fieldgate::config::store_url::{PostgresUrl, StoreUrl};
use fieldgate::config::{Config, DeviceBounds, Registration, Settings};
use fieldgate::ingest::QueueLimits;
use fieldgate::ingest::batcher::BatchLimits;
use fieldgate::ingest::registry::Registry;
use fieldgate::net::tls::Tls;
use fieldgate::quota::device::DeviceQuotas;
use fieldgate::quota::quarantine::{self, Gauge};
use fieldgate::quota::rate::Rate;
use fieldgate::server::admission::AdmissionLimits;
use fieldgate::server::device_watch;
use fieldgate::server::supervisor::Supervisor;
use fieldgate::server::{self, Listeners, ServerSettings, TlsListener};
use fieldgate::session::SessionSettings;
use fieldgate::store::Store;
use fieldgate::store::device_admin::ChangeReader;
use fieldgate::store::postgres::{PostgresSettings, PostgresStore};
use fieldgate::store::prune::{Pruner, Retention};
use fieldgate::store::quarantine_usage::UsageReader;
use fieldgate::store::spool::mirror::Mirror;
use fieldgate::store::spool::{self, SpoolError, SpoolStore};
use fieldgate::store::sqlite::files::HeldFiles;
use fieldgate::store::sqlite::{SqliteSettings, SqliteStore};
use fieldgate::store::steady::SteadyReader;
use fieldgate::sys::gateway_id;
use fieldgate::sys::log;
use fieldgate::sys::open_files;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::address::ListenAddress;
use super::{Error, GlobalArgs, LogFormat, fleet_key, output};

/// Signal for a write beyond the file size limit (RLIMIT_FSIZE).
#[cfg(target_os = "linux")]
const SIGXFSZ: i32 = 25;
const SECOND_US: u64 = 1_000_000;
/// Open files reserved for other uses than connections: listeners, the store, the log.
const OTHER_FILES: u64 = 64;
/// Maximum wait at startup for the device list from Postgres, if there is a spool.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between attempts to connect to Postgres at startup.
const UP_INTERVAL: Duration = Duration::from_millis(500);
/// Interval between log lines about these attempts.
const UP_LOG_INTERVAL: Duration = Duration::from_secs(30);
/// Divisor of the drain timeout: this part of it is for draining the spool into Postgres.
const SPOOL_DRAIN_SHARE: u32 = 2;
/// Maximum wait at startup for a blocked stdout.
const PRINT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum wait for a blocked stderr at an exit without a drain.
const LAST_FLUSH: Duration = Duration::from_millis(200);

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Check settings, files, certificates and the store, print one line per problem, and exit. While settings are
    /// invalid, reports the first problem of each kind and checks nothing else. Opens no port, and writes nothing
    /// except the files that SQLite keeps next to a database that is read
    #[arg(long)]
    pub check: bool,

    /// Address of the plain TCP listener: IP:PORT, HOST:PORT, or :PORT for all addresses of this machine. An
    /// address that other machines can reach also requires --allow-plaintext
    #[arg(long, value_name = "ADDRESS", default_value_t = Settings::default().listen.into())]
    listen: ListenAddress,

    /// Allow unencrypted connections from other machines. Only for a trusted network, such as a VPN
    #[arg(long)]
    allow_plaintext: bool,

    /// Address of the TLS listener, in the format of --listen; other machines may reach it [default: none].
    /// Create a test certificate with `fieldgate tls init`
    #[arg(long, value_name = "ADDRESS")]
    tls_listen: Option<ListenAddress>,

    /// PEM file with the gateway's certificate chain, up to a CA that devices trust [default: tls/server.pem in
    /// the data directory]. Reloaded when it changes and on SIGHUP
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// PEM file with the certificate's private key, mode 0600 [default: tls/server.key in the data directory]
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// PEM file with the CA certificates that sign device certificates. If set, a device must present a
    /// certificate with its own name in addition to proving its key [default: no client certificates]
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,

    /// Maximum size of a TLS record from the gateway in bytes, 64 to 16384. Lower it for devices with small
    /// receive buffers; few of the gateway's frames are longer than 100 bytes
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().tls_record_bytes_max)]
    tls_record_bytes_max: usize,

    /// Which devices may connect: `open`, any device with a key derived from the fleet key; `closed`, only
    /// devices registered with `fieldgate device add` or `import`
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Settings::default().registration)]
    registration: Registration,

    /// Maximum number of connections. Beyond it, new ones wait, or the oldest unauthenticated one is closed.
    /// Raise it for a larger fleet, together with the open file limit (ulimit -n)
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().connections_max)]
    connections_max: usize,

    /// Maximum number of connections from one IPv4 address or IPv6 network (/64); further ones are closed. Raise
    /// it if more devices share an address, for example behind NAT or a proxy
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().connections_per_address_max)]
    connections_per_address_max: usize,

    /// Maximum number of unauthenticated connections. Beyond it, new ones wait for up to a second, then the
    /// oldest is closed
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().handshakes_max)]
    handshakes_max: usize,

    /// Maximum number of connections accepted per second; further ones wait. Lower it on slow machines, where
    /// the reconnect of a whole fleet would saturate the CPU
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().accepts_per_s_max)]
    accepts_per_s_max: u64,

    /// Maximum delay of the reply to a failed authentication, in milliseconds. The delay grows with each failure
    /// from one address; successful logins are not delayed
    #[arg(long, value_name = "MS", default_value_t = Settings::default().failure_delay_max_ms)]
    failure_delay_max_ms: u64,

    /// Maximum number of bytes that a peer may send before authentication, at least 1024. TLS overhead (up to
    /// 64 KiB) is not counted
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().preauth_bytes_max)]
    preauth_bytes_max: usize,

    /// Maximum number of unsent bytes for a peer that does not read; beyond it, the connection is closed
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().outbound_bytes_max)]
    outbound_bytes_max: usize,

    /// Maximum number of log lines per minute about refused connections from one address
    #[arg(long, value_name = "LINES", default_value_t = Settings::default().log_lines_per_address_max)]
    log_lines_per_address_max: u32,

    /// Maximum sustained rate of frames of any type per device, per second. Frames above it are not rejected but
    /// read later. Lower it so that one device cannot starve the others
    #[arg(long, value_name = "FRAMES", default_value_t = Settings::default().device_frames_per_s)]
    device_frames_per_s: u64,

    /// Maximum number of frames that a device may send in one burst after a pause, above --device-frames-per-s
    #[arg(long, value_name = "FRAMES", default_value_t = Settings::default().device_frames_burst)]
    device_frames_burst: u64,

    /// Maximum sustained rate of readings per device, per second. Readings above it are not rejected but read
    /// later. Lower it so that one device cannot starve the others
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().device_readings_per_s)]
    device_readings_per_s: u64,

    /// Maximum number of readings that a device may send in one burst after a pause, above
    /// --device-readings-per-s. Raise it for devices with large backlogs
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().device_readings_burst)]
    device_readings_burst: u64,

    /// Maximum number of series per device, over all its schemas. A schema that would exceed it is rejected; the
    /// device continues with its existing series
    #[arg(long, value_name = "SERIES", default_value_t = Settings::default().device_series_max)]
    device_series_max: u32,

    /// Maximum number of schemas per device. A further one is rejected; the device continues with its existing
    /// schemas
    #[arg(long, value_name = "SCHEMAS", default_value_t = Settings::default().device_schemas_max)]
    device_schemas_max: u32,

    /// Maximum number of streams per device. A further one is rejected; existing streams continue. Raise it for
    /// devices that start a new stream at each boot and boot often
    #[arg(long, value_name = "STREAMS", default_value_t = Settings::default().device_streams_max)]
    device_streams_max: u32,

    /// Maximum number of session events per device in device_events: connects, disconnects and refusals. Events
    /// reported by devices and operator actions are always kept
    #[arg(long, value_name = "EVENTS", default_value_t = Settings::default().device_events_max)]
    device_events_max: u32,

    /// Days after which session events and boot clocks are deleted as well, except the newest 100 events and 8
    /// clocks of each device
    #[arg(long, value_name = "DAYS", default_value_t = Settings::default().device_events_days)]
    device_events_days: u32,

    /// Maximum duration of a handshake in seconds, from the accept of the connection. Raise it for links with
    /// several seconds of latency
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().handshake_timeout_s)]
    handshake_timeout_s: u64,

    /// Maximum time to receive a frame in seconds, from its first byte. Raise it for links below 1 kbit/s
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().frame_timeout_s)]
    frame_timeout_s: u64,

    /// Idle timeout: seconds without a complete frame before the connection is closed; must exceed
    /// --keepalive-s. Lower it to detect dead devices sooner
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().idle_timeout_s)]
    idle_timeout_s: u64,

    /// Keepalive interval announced to devices, in seconds. Raise it to save traffic, within the NAT timeouts
    /// on the path
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().keepalive_s)]
    keepalive_s: u16,

    /// Seconds that a device waits for an acknowledgement before it reconnects, announced to devices. Raise it
    /// if the store may be unavailable or slow for longer
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().ack_timeout_s)]
    ack_timeout_s: u16,

    /// Maximum number of unacknowledged frames per device. Raise it for fast links with high latency; lower it
    /// to limit each device's share
    #[arg(long, value_name = "FRAMES", default_value_t = Settings::default().window_frames)]
    window_frames: u64,

    /// Maximum size of a frame in bytes, 4096 to 16384. Raise it for devices that send large frames; every
    /// connection may buffer one frame
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().frame_bytes_max)]
    frame_bytes_max: u16,

    /// Maximum number of readings in a batch, which is one transaction. Lower it for shorter commits, raise it
    /// for higher throughput
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().batch_readings_max)]
    batch_readings_max: usize,

    /// Minimum interval between commits, in milliseconds. Raise it to reduce flash wear: writes become fewer and
    /// larger, acknowledgements later
    #[arg(long, value_name = "MS", default_value_t = Settings::default().commit_interval_min_ms)]
    commit_interval_min_ms: u64,

    /// Minimum interval between commits at less than 200 frames per second (on Postgres, for each of the
    /// --postgres-writers), in milliseconds, so that devices share commits. It does not delay a device that waits
    /// for an acknowledgement before it sends more. Raise it to reduce flash wear; 0 gives the fastest
    /// acknowledgements
    #[arg(long, value_name = "MS", default_value_t = Settings::default().commit_interval_quiet_ms)]
    commit_interval_quiet_ms: u64,

    /// Maximum number of readings queued for the store, at least a full batch; each of the --postgres-writers
    /// has an equal part. Raise it to absorb longer bursts
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().queue_readings_max)]
    queue_readings_max: usize,

    /// Maximum memory for readings queued for the store, in bytes. Lower it on small machines, raise it to
    /// absorb longer bursts
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().queue_bytes_max)]
    queue_bytes_max: usize,

    /// Maximum time to store and acknowledge accepted frames on Ctrl-C or SIGTERM, in seconds. Keep it below
    /// your service manager's kill timeout
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().drain_timeout_s)]
    drain_timeout_s: u64,

    /// Number of connections that write to Postgres; each serves a share of the devices. Raise it if the server
    /// has more than two cores and little other load
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().postgres_writers)]
    postgres_writers: usize,

    /// Seconds to wait at startup for a Postgres that is not up yet, for example while the machine boots; 0
    /// fails immediately. A wrong password or database name always fails immediately
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().postgres_wait_s)]
    postgres_wait_s: u64,

    /// Accept a Postgres with fsync or full_page_writes off, which may lose acknowledged readings in a crash, and
    /// leave synchronous_commit as configured. For tests
    #[arg(long)]
    allow_postgres_data_loss: bool,

    /// Acknowledge readings once they are in spool.db in the data directory, and drain them into Postgres from
    /// there: devices continue while Postgres is down. No other gateway may write to that database
    #[arg(long)]
    spool: bool,

    /// Maximum size of the spool in bytes; when it is full, the gateway accepts no frames until Postgres is back.
    /// Raise it to bridge longer outages; a reading takes about 30 bytes
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().spool_bytes_max)]
    spool_bytes_max: u64,

    /// Maximum size of quarantined frames in bytes, an eighth of it per device; beyond it, devices keep such
    /// frames and wait. Raise it if quarantine is checked only rarely
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().quarantine_bytes_max)]
    quarantine_bytes_max: u64,

    /// Size of SQLite's page cache in bytes. Raise it for many series if memory is free, lower it on small
    /// machines
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().cache_bytes)]
    cache_bytes: u64,

    /// Size of SQLite's write-ahead log, in bytes, at which commits wait for readers that keep it from being
    /// checkpointed. Lower it on small disks
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().wal_bytes_max)]
    wal_bytes_max: u64,
}

impl ServeArgs {
    /// Returns all settings of the gateway, not yet validated.
    ///
    /// # Errors
    /// The host name of a listener cannot be resolved.
    pub fn into_settings(self, global: GlobalArgs) -> Result<Settings, Error> {
        let listen = resolve("--listen", &self.listen)?;
        let tls_listen = self.tls_listen.as_ref();
        let tls_listen = tls_listen.map(|address| resolve("--tls-listen", address));
        Ok(Settings {
            secret_readers: global.secret_readers(),
            data_dir: global.data_dir,
            store: global.store,
            listen,
            allow_plaintext: self.allow_plaintext,
            tls_listen: tls_listen.transpose()?,
            tls_cert: self.tls_cert,
            tls_key: self.tls_key,
            tls_client_ca: self.tls_client_ca,
            tls_record_bytes_max: self.tls_record_bytes_max,
            registration: self.registration,
            connections_max: self.connections_max,
            connections_per_address_max: self.connections_per_address_max,
            handshakes_max: self.handshakes_max,
            accepts_per_s_max: self.accepts_per_s_max,
            failure_delay_max_ms: self.failure_delay_max_ms,
            preauth_bytes_max: self.preauth_bytes_max,
            outbound_bytes_max: self.outbound_bytes_max,
            log_lines_per_address_max: self.log_lines_per_address_max,
            device_frames_per_s: self.device_frames_per_s,
            device_frames_burst: self.device_frames_burst,
            device_readings_per_s: self.device_readings_per_s,
            device_readings_burst: self.device_readings_burst,
            device_series_max: self.device_series_max,
            device_schemas_max: self.device_schemas_max,
            device_streams_max: self.device_streams_max,
            device_events_max: self.device_events_max,
            device_events_days: self.device_events_days,
            handshake_timeout_s: self.handshake_timeout_s,
            frame_timeout_s: self.frame_timeout_s,
            idle_timeout_s: self.idle_timeout_s,
            keepalive_s: self.keepalive_s,
            ack_timeout_s: self.ack_timeout_s,
            window_frames: self.window_frames,
            frame_bytes_max: self.frame_bytes_max,
            batch_readings_max: self.batch_readings_max,
            commit_interval_min_ms: self.commit_interval_min_ms,
            commit_interval_quiet_ms: self.commit_interval_quiet_ms,
            queue_readings_max: self.queue_readings_max,
            queue_bytes_max: self.queue_bytes_max,
            drain_timeout_s: self.drain_timeout_s,
            postgres_writers: self.postgres_writers,
            postgres_wait_s: self.postgres_wait_s,
            allow_postgres_data_loss: self.allow_postgres_data_loss,
            spool: self.spool,
            spool_bytes_max: self.spool_bytes_max,
            quarantine_bytes_max: self.quarantine_bytes_max,
            cache_bytes: self.cache_bytes,
            wal_bytes_max: self.wal_bytes_max,
        })
    }
}

fn resolve(flag: &str, address: &ListenAddress) -> Result<SocketAddr, Error> {
    address.resolve().map_err(|error| {
        Error::Failed(format!(
            "could not resolve {flag} {address}: {error}; use an IP address, or check the name"
        ))
    })
}

/// Runs the gateway until it receives a signal to stop. `changed` shows the settings that differ from their
/// defaults.
pub async fn serve(settings: Settings, changed: &str, format: LogFormat) -> Result<(), Error> {
    // Without a handler, SIGHUP ends the process. It stays pending until the certificates are loaded.
    let hangup = listen_to(SignalKind::hangup())?;
    // With a handler, a write beyond the file size limit fails as on a full disk and does not end the process.
    #[cfg(target_os = "linux")]
    let _file_size = listen_to(SignalKind::from_raw(SIGXFSZ))?;
    let config = Config::new(settings)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        settings = changed,
        "starting"
    );
    run(&config, hangup, format).await?;
    tracing::info!("stopped");
    Ok(())
}

async fn run(config: &Config, hangup: Signal, format: LogFormat) -> Result<(), Error> {
    create_data_dir(&config.data_dir)?;
    let found = fleet_key::find(config).await?;
    match config.store() {
        StoreUrl::Sqlite(path) => {
            spool::refuse_undrained(&config.spool_path()).await?;
            let store = SqliteStore::open(path, &sqlite_settings(config)).await?;
            let key = fleet_key::settle(config, found).await?;
            serve_into(vec![store], config, key, hangup, format).await
        }
        StoreUrl::Postgres(url) if config.spool => {
            let postgres = postgres_settings(config, url)?;
            let store = once_up(config, async || {
                SpoolStore::open(
                    &config.spool_path(),
                    &sqlite_settings(config),
                    config.spool_bytes_max,
                    Duration::from_secs(config.drain_timeout_s) / SPOOL_DRAIN_SHARE,
                    postgres.clone(),
                )
                .await
            });
            let store = store.await?;
            let key = fleet_key::settle(config, found).await?;
            serve_into(vec![store], config, key, hangup, format).await
        }
        StoreUrl::Postgres(url) => {
            let postgres = postgres_settings(config, url)?;
            let stores = once_up(config, async || {
                spool::leave(&config.spool_path(), &sqlite_settings(config), &postgres).await?;
                Ok(PostgresStore::open(postgres.clone()).await?)
            });
            let stores = stores.await?;
            let key = fleet_key::settle(config, found).await?;
            serve_into(stores, config, key, hangup, format).await
        }
    }
}

/// Opens a store in Postgres, retrying while the server is not up yet.
async fn once_up<T>(
    config: &Config,
    mut open: impl AsyncFnMut() -> Result<T, SpoolError>,
) -> Result<T, Error> {
    let began = Instant::now();
    let wait = Duration::from_secs(config.postgres_wait_s);
    let mut log_at = began;
    loop {
        let error = match open().await {
            Ok(opened) => return Ok(opened),
            Err(SpoolError::Database(error)) if error.may_pass() && began.elapsed() < wait => error,
            Err(error) => return Err(error.into()),
        };
        if Instant::now() >= log_at {
            let left_s = wait.saturating_sub(began.elapsed()).as_secs();
            tracing::warn!(%error, left_s, "waiting for Postgres");
            log_at = Instant::now() + UP_LOG_INTERVAL;
        }
        tokio::time::sleep(UP_INTERVAL).await;
    }
}

/// Loads the TLS files; `None` if TLS is off.
pub fn load_tls(config: &Config) -> Result<Option<Tls>, Error> {
    match config.tls_files() {
        Some(files) if config.tls_cert.is_none() && !files.cert.exists() => {
            Err(Error::Failed(format!(
                "could not find certificate {}; create a test certificate with `fieldgate tls init`, or set \
                 --tls-cert and --tls-key",
                files.cert.display()
            )))
        }
        Some(files) => Ok(Some(Tls::load(files, config.tls_record_bytes_max)?)),
        None => Ok(None),
    }
}

async fn serve_into<S: Store>(
    stores: Vec<S>,
    config: &Config,
    (key, origin): (FleetKey, Origin),
    hangup: Signal,
    format: LogFormat,
) -> Result<(), Error> {
    let tls = load_tls(config)?.map(Arc::new);
    let held = match config.store() {
        StoreUrl::Sqlite(path) => HeldFiles::of_database(path),
        StoreUrl::Postgres(_) if config.spool => HeldFiles::of_database(&config.spool_path()),
        StoreUrl::Postgres(_) => HeldFiles::new([]),
    };
    let key_file = HeldFiles::new([config.data_dir.join(KEY_FILE)]);
    let spool = config.spool.then(|| config.spool_path());
    let mirror = match &spool {
        Some(path) => Some(filled_mirror(config.store(), path).await),
        None => None,
    };
    let mut changes = ChangeReader::new(match &spool {
        Some(path) => SteadyReader::of_spool(path.clone()),
        None => SteadyReader::new(config.store().clone()),
    });
    let credentials = Arc::new(Credentials::new(key));
    let loaded = device_watch::load(&credentials, &mut changes).await;
    loaded.map_err(|error| Error::Failed(format!("could not read devices: {error}")))?;
    let listeners = bind(config, tls.as_ref())?;
    // Created before the gateway is announced, since it may be stopped from then on.
    let drain = CancellationToken::new();
    let mut tasks = Supervisor::default();
    tasks.spawn("signals", drain_on_signal(drain.clone())?);
    match tls {
        Some(tls) => tasks.spawn("certificates", async move {
            tls.keep_current(hangup).await;
        }),
        None => tasks.spawn("hangup", load_nothing(hangup)),
    }
    announce(config, origin, &listeners).await?;
    if config.allow_plaintext {
        let listen = config.listen;
        tracing::warn!(%listen, "listener accepts unencrypted connections");
    }
    let gauge = Arc::new(Gauge::new(config.quarantine_bytes_max));
    let pruner = Pruner::new(
        config.store().clone(),
        spool.clone(),
        Retention {
            lines_max: config.device_events_max,
            days: config.device_events_days,
        },
    );
    let mut kept = UsageReader::new(config.store().clone(), spool);
    quarantine::read(&gauge, &mut kept).await;
    let mut settings = server_settings(config, Arc::clone(&credentials), Arc::clone(&gauge));
    settings.admission.connections_max = connections_within_limit(config.connections_max);
    let registry = Arc::new(Registry::default());
    tasks.spawn("quarantine", quarantine::watch(gauge, kept));
    let watch_credentials = device_watch::watch(credentials, Arc::clone(&registry), changes);
    tasks.spawn("device changes", watch_credentials);
    tasks.spawn("fleet key", async move { key_file.watch_only().await });
    tasks.spawn("pruner", pruner.watch());
    if let Some(mirror) = mirror {
        tasks.spawn("mirror", mirror.watch());
    }
    let failed = |error: &dyn Display| Error::Failed(error.to_string());
    let mut serving = pin!(server::serve(
        listeners,
        stores,
        settings,
        registry,
        drain.clone()
    ));
    tokio::select! {
        served = &mut serving => served.map_err(|error| failed(&error)),
        ended = tasks.ended() => {
            tracing::info!("shutting down: a task ended unexpectedly; draining the queue");
            drain.cancel();
            // The task comes first in the error: it is the cause.
            let drained = serving.await.err().map(|error| format!("; {error}"));
            Err(failed(&format_args!("{ended}{}", drained.unwrap_or_default())))
        }
        reason = held.watch() => end_without_closing(&reason, format),
    }
}

/// Exits without closing the database: closing it would write to whatever file now has its path.
fn end_without_closing(reason: &str, format: LogFormat) -> Result<(), Error> {
    let error = Error::Failed(format!("the store failed: {reason}"));
    if let Some(line) = error.line(format) {
        log::urgent(&line);
    }
    log::flush(LAST_FLUSH);
    std::process::exit(1);
}

/// Returns the mirror that copies operator changes from the database to the spool. Copies all changes so far, if
/// the database is available.
async fn filled_mirror(database: &StoreUrl, spool: &Path) -> Mirror {
    let mut mirror = Mirror::new(database.clone(), spool.to_owned());
    match timeout(MIRROR_TIMEOUT, mirror.copy()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, "Postgres unavailable, using last known device list");
        }
        Err(_) => tracing::warn!("Postgres slow, using last known device list"),
    }
    mirror
}

/// Limits the number of connections to the number of files that can be open. Beyond the open file limit, any
/// open can fail, also one of the store.
fn connections_within_limit(wanted: usize) -> usize {
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

fn bind(config: &Config, tls: Option<&Arc<Tls>>) -> Result<Listeners, Error> {
    let bind = |flag, listen| {
        let listener = server::listen(listen);
        listener.map_err(|error| cannot_listen(flag, listen, &error))
    };
    let tls = match (config.tls_listen, tls) {
        (Some(listen), Some(tls)) => Some(TlsListener {
            listener: bind("--tls-listen", listen)?,
            tls: Arc::clone(tls),
        }),
        _ => None,
    };
    Ok(Listeners {
        plain: bind("--listen", config.listen)?,
        tls,
    })
}

fn sqlite_settings(config: &Config) -> SqliteSettings {
    let defaults = SqliteSettings::default();
    SqliteSettings {
        cache_bytes: config.cache_bytes,
        wal_checkpoint_bytes: defaults.wal_checkpoint_bytes.min(config.wal_bytes_max / 4),
        wal_soft_bytes: defaults.wal_soft_bytes.min(config.wal_bytes_max / 2),
        wal_hard_bytes: config.wal_bytes_max,
        bounds: device_bounds(config),
        ..defaults
    }
}

fn device_bounds(config: &Config) -> DeviceBounds {
    DeviceBounds {
        series_max: config.device_series_max,
        schemas_max: config.device_schemas_max,
        streams_max: config.device_streams_max,
    }
}

fn postgres_settings(config: &Config, url: &PostgresUrl) -> Result<PostgresSettings, Error> {
    let gateway = gateway_id::load_or_create(&config.data_dir).map_err(|error| {
        let path = config.data_dir.join(gateway_id::ID_FILE);
        let path = path.display();
        Error::Failed(format!(
            "could not read or write {path}: {error}; make the data directory writable"
        ))
    })?;
    Ok(PostgresSettings {
        url: url.clone(),
        writers: config.postgres_writers,
        allows_data_loss: config.allow_postgres_data_loss,
        bounds: device_bounds(config),
        gateway,
        spool: None,
    })
}

fn server_settings(
    config: &Config,
    credentials: Arc<Credentials>,
    quarantine: Arc<Gauge>,
) -> ServerSettings {
    ServerSettings {
        session: SessionSettings {
            credentials,
            may_register: config.registration == Registration::Open,
            frame_bytes_max: config.frame_bytes_max,
            window_frames: config.window_frames,
            handshake_timeout_us: config.handshake_timeout_s * SECOND_US,
            frame_timeout_us: config.frame_timeout_s * SECOND_US,
            idle_timeout_us: config.idle_timeout_s * SECOND_US,
            keepalive_s: config.keepalive_s,
            ack_timeout_s: config.ack_timeout_s,
            preauth_bytes_max: config.preauth_bytes_max,
            quotas: Arc::new(DeviceQuotas::new(
                Rate {
                    per_s: config.device_frames_per_s,
                    burst: config.device_frames_burst,
                },
                Rate {
                    per_s: config.device_readings_per_s,
                    burst: config.device_readings_burst,
                },
            )),
            outbound_bytes_max: config.outbound_bytes_max,
            quarantine,
        },
        batch: BatchLimits {
            readings_max: config.batch_readings_max,
            bytes_max: config.queue_bytes_max,
            interval_min_us: config.commit_interval_min_ms * 1000,
            interval_quiet_us: config.commit_interval_quiet_ms * 1000,
        },
        queue: QueueLimits {
            readings_max: config.queue_readings_max,
            bytes_max: config.queue_bytes_max,
        },
        admission: AdmissionLimits {
            connections_max: config.connections_max,
            connections_per_address_max: config.connections_per_address_max,
            handshakes_max: config.handshakes_max,
            accepts_per_s_max: config.accepts_per_s_max,
            failure_delay_max: Duration::from_millis(config.failure_delay_max_ms),
            log_lines_per_address_max: config.log_lines_per_address_max,
        },
        drain_timeout: Duration::from_secs(config.drain_timeout_s),
    }
}

fn cannot_listen(flag: &str, listen: SocketAddr, error: &io::Error) -> Error {
    let fix = match error.kind() {
        io::ErrorKind::AddrInUse => format!("stop what uses that port, or choose another {flag}"),
        io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 need privileges; choose another {flag}")
        }
        _ => format!("use an address of this machine as {flag}"),
    };
    Error::Failed(format!("could not listen on {listen}: {error}; {fix}"))
}

/// Prints the gateway's files and addresses on stdout and in the log.
async fn announce(config: &Config, origin: Origin, listeners: &Listeners) -> io::Result<()> {
    let is_new = origin == Origin::Created;
    let key_file = config.data_dir.join(KEY_FILE);
    let database = match config.store() {
        StoreUrl::Sqlite(path) => path.display().to_string(),
        StoreUrl::Postgres(url) => url.to_string(),
    };
    let spool = config.spool.then(|| config.spool_path());
    let spool = spool.map(|path| path.display().to_string());
    let is_closed = config.registration == Registration::Closed;
    let listen = listeners.plain.local_addr()?;
    let tls_listen = match &listeners.tls {
        Some(TlsListener { listener, .. }) => Some(listener.local_addr()?.to_string()),
        None => None,
    };
    tracing::info!(
        data_dir = %config.data_dir.display(),
        database,
        spool,
        fleet_key = %key_file.display(),
        is_new_fleet_key = is_new,
        is_registration_closed = is_closed,
        %listen,
        tls_listen,
        "serving"
    );
    let made = match is_new {
        true => " (newly created; install keys derived from it on the devices)",
        false => "",
    };
    let mut lines = format!("data directory  {}\n", config.data_dir.display());
    lines += &format!("database        {database}\n");
    if let Some(spool) = spool {
        lines += &format!("spool           {spool}\n");
    }
    lines += &format!("fleet key       {}{made}\n", key_file.display());
    if is_closed {
        lines += "registration    closed: only registered devices may connect\n";
    }
    lines += &format!("listening on    {listen}\n");
    if let Some(tls_listen) = tls_listen {
        lines += &format!("TLS on          {tls_listen}\n");
    }
    // A closed or unread stdout, as a service may have, must not keep the gateway from serving.
    let printed = tokio::task::spawn_blocking(move || {
        let mut out = output::stdout();
        out.write_all(lines.as_bytes())?;
        out.flush()
    });
    let _ = timeout(PRINT_TIMEOUT, printed).await;
    Ok(())
}

/// Starts the drain at the first Ctrl-C or SIGTERM, and exits at the second.
fn drain_on_signal(drain: CancellationToken) -> Result<impl Future<Output = ()>, Error> {
    let mut interrupt = listen_to(SignalKind::interrupt())?;
    let mut terminate = listen_to(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        tracing::info!("shutting down: draining the queue; send the signal again to exit now");
        drain.cancel();
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        tracing::warn!("exiting without draining; devices will resend unacknowledged frames");
        log::flush(LAST_FLUSH);
        std::process::exit(1);
    })
}

/// Logs and ignores SIGHUP: without TLS there is nothing to reload.
async fn load_nothing(mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        tracing::info!("SIGHUP ignored: no TLS certificates to reload");
    }
}

fn listen_to(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|error| Error::Failed(format!("could not listen for signals: {error}")))
}
