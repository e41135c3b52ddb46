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
use fieldgate::config::{Config, Registration, Settings};
use fieldgate::ingest::QueueLimits;
use fieldgate::ingest::batcher::BatchLimits;
use fieldgate::ingest::registry::Registry;
use fieldgate::net::tls::Tls;
use fieldgate::quota::device::Allowances;
use fieldgate::quota::quarantine::{self, Gauge};
use fieldgate::quota::rate::Rate;
use fieldgate::server::admission::EntranceLimits;
use fieldgate::server::device_watch;
use fieldgate::server::supervisor::Supervisor;
use fieldgate::server::{self, Listeners, ServerSettings, TlsListener};
use fieldgate::session::SessionSettings;
use fieldgate::store::Store;
use fieldgate::store::bounds::DeviceBounds;
use fieldgate::store::kept::KeptFrames;
use fieldgate::store::lifecycle::ChangeReader;
use fieldgate::store::postgres::{PostgresSettings, PostgresStore};
use fieldgate::store::prune::{Pruner, Retention};
use fieldgate::store::spool::mirror::Mirror;
use fieldgate::store::spool::{self, SpoolError, SpoolStore};
use fieldgate::store::sqlite::files::HeldFiles;
use fieldgate::store::sqlite::{SqliteSettings, SqliteStore};
use fieldgate::store::steady::SteadyReader;
use fieldgate::store::url::{PostgresUrl, StoreUrl};
use fieldgate::sys::gateway_id;
use fieldgate::sys::log;
use fieldgate::sys::open_files;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::address::ListenAddress;
use super::{Error, GlobalArgs, LogFormat, fleet_key, output};

/// A file would grow beyond what the process may write.
#[cfg(target_os = "linux")]
const SIGXFSZ: i32 = 25;
const SECOND_US: u64 = 1_000_000;
/// Open files besides those of connections: listeners, the store, the log.
const OTHER_FILES: u64 = 64;
/// How long the start waits for Postgres to say what operators have changed, where there is a spool.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(5);
/// From one try to reach Postgres to the next at the start, and from one line of the log to the next.
const UP_INTERVAL: Duration = Duration::from_millis(500);
const UP_LOG_INTERVAL: Duration = Duration::from_secs(30);
/// This part of the time to leave may go by until Postgres has what is in the spool.
const SPOOL_DRAIN_SHARE: u32 = 2;
/// How long the start waits for a stdout that takes nothing.
const PRINT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an end without a drain waits for a stderr that takes nothing.
const LAST_FLUSH: Duration = Duration::from_millis(200);

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Look at settings, files, certificates and the store, print a line for each problem, and end; of wrong settings
    /// the first of each kind, and then nothing else. Nothing is written but what SQLite keeps beside a database that
    /// is read, and nothing listens
    #[arg(long)]
    pub check: bool,

    /// Where devices connect in plain text: IP:PORT, HOST:PORT, or :PORT for every address of this machine.
    /// Change it to be reached from other machines, which takes --allow-plaintext, too
    #[arg(long, value_name = "ADDRESS", default_value_t = Settings::default().listen.into())]
    listen: ListenAddress,

    /// Let other machines connect although nothing is encrypted. Only for a network that you trust,
    /// such as a VPN
    #[arg(long)]
    allow_plaintext: bool,

    /// Where devices connect through TLS, also from other machines, written as for --listen [default: none].
    /// `fieldgate tls init` makes a certificate to try it with
    #[arg(long, value_name = "ADDRESS")]
    tls_listen: Option<ListenAddress>,

    /// PEM file with the gateway's certificate and those that lead to one that devices know [default:
    /// tls/server.pem in the data directory]. It is loaded again when it changes, and on SIGHUP
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// PEM file with the certificate's key, of mode 0600 [default: tls/server.key in the data directory]
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// PEM file with the certificates of those who sign the devices'. With it a device must show a
    /// certificate with its own name, besides knowing its key [default: no certificate is asked for]
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,

    /// Bytes that a TLS record from the gateway holds at most, 64 to 16384. Lower it for devices with
    /// less room to receive; few of the gateway's frames are longer than 100 bytes
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().tls_record_bytes_max)]
    tls_record_bytes_max: usize,

    /// Which devices may connect: `open`, every one that proves a key derived from the fleet's; `closed`,
    /// only those that `fieldgate device add` or `import` made known before
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Settings::default().registration)]
    registration: Registration,

    /// Connections at once; further ones wait, or the oldest that has not proved its key ends. Raise it for a
    /// larger fleet, together with the limit of open files (ulimit -n)
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().connections_max)]
    connections_max: usize,

    /// Of those, from one IPv4 address or IPv6 network (/64); further ones are closed. Raise it if more
    /// devices share one, such as behind NAT or a proxy
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().connections_per_address_max)]
    connections_per_address_max: usize,

    /// Connections at once that have not proved a key yet. When there are more, new ones wait for a second
    /// at most, and then the oldest is closed
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().handshakes_max)]
    handshakes_max: usize,

    /// Connections accepted in a second; further ones wait. Lower it on a slow machine, where a whole
    /// fleet that comes back would take all of it
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().accepts_per_s_max)]
    accepts_per_s_max: u64,

    /// Milliseconds that the answer to a failed authentication may wait. It waits longer with each failure
    /// from one address; whoever proves a key waits for nothing
    #[arg(long, value_name = "MS", default_value_t = Settings::default().failure_delay_max_ms)]
    failure_delay_max_ms: u64,

    /// Bytes that a peer may send before it has proved its key, at least 1024; not counted is what TLS adds,
    /// which may be 64 KiB
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().stranger_bytes_max)]
    stranger_bytes_max: usize,

    /// Bytes that may wait for a peer that does not read them; beyond that it is cut off
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().outbound_bytes_max)]
    outbound_bytes_max: usize,

    /// Lines of the log that tell of refused connections from one address in a minute
    #[arg(long, value_name = "LINES", default_value_t = Settings::default().log_lines_per_address_max)]
    log_lines_per_address_max: u32,

    /// Frames of any kind that a device may send in a second, in the long run. More are not refused: they
    /// are read later. Lower it so that a single device cannot take the time that others need
    #[arg(long, value_name = "FRAMES", default_value_t = Settings::default().device_frames_per_s)]
    device_frames_per_s: u64,

    /// Frames that a device may send at once after a pause, beyond that rate
    #[arg(long, value_name = "FRAMES", default_value_t = Settings::default().device_frames_burst)]
    device_frames_burst: u64,

    /// Readings that a device may send in a second, in the long run. More are not refused: they are read
    /// later. Lower it so that a single device cannot take what others need
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().device_readings_per_s)]
    device_readings_per_s: u64,

    /// Readings that a device may send at once after a pause, beyond that rate. Raise it for devices that
    /// bring a large backlog
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().device_readings_burst)]
    device_readings_burst: u64,

    /// Series that a device may have, over all its schemas. A schema that would bring more is refused; the
    /// device goes on with those it has
    #[arg(long, value_name = "SERIES", default_value_t = Settings::default().device_series_max)]
    device_series_max: u32,

    /// Schemas that a device may have. One more is refused; the device goes on with those it has
    #[arg(long, value_name = "SCHEMAS", default_value_t = Settings::default().device_schemas_max)]
    device_schemas_max: u32,

    /// Streams that a device may have. One more is refused; streams it has go on. Raise it for devices that
    /// draw a new stream at each boot and boot often
    #[arg(long, value_name = "STREAMS", default_value_t = Settings::default().device_streams_max)]
    device_streams_max: u32,

    /// Lines about a device's sessions that device_events keeps at most: connects, disconnects and refusals. What
    /// devices reported and what operators did stays
    #[arg(long, value_name = "LINES", default_value_t = Settings::default().device_events_max)]
    device_events_max: u32,

    /// Days after which such a line goes as well, and the clock of a boot, but for the newest 100 lines
    /// and 8 clocks of each device
    #[arg(long, value_name = "DAYS", default_value_t = Settings::default().device_events_days)]
    device_events_days: u32,

    /// Seconds from a connection's beginning to the end of its handshake. Raise it for links of many
    /// seconds' delay
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().handshake_timeout_s)]
    handshake_timeout_s: u64,

    /// Seconds within which a frame that began must end. Raise it for links below 1 kbit/s
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().frame_timeout_s)]
    frame_timeout_s: u64,

    /// Seconds without a whole frame after which a silent peer is cut off; more than --keepalive-s.
    /// Lower it to notice sooner that a device is gone
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().idle_timeout_s)]
    idle_timeout_s: u64,

    /// Seconds after which a device with nothing to send says that it is there. Raise it to save
    /// traffic, as far as NAT on the way lets you
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().keepalive_s)]
    keepalive_s: u16,

    /// Seconds that a device waits for an acknowledgement before it connects anew. Raise it if the
    /// store may be away or slow for longer
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().ack_timeout_s)]
    ack_timeout_s: u16,

    /// Frames that a device may have in flight without an acknowledgement. Raise it for fast links of
    /// long delay, lower it to hold each device to less
    #[arg(long, value_name = "FRAMES", default_value_t = Settings::default().window_frames)]
    window_frames: u64,

    /// Bytes of the longest frame, 4096 to 16384. Raise it for devices that send large batches; each
    /// connection may hold a frame in memory
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().frame_bytes_max)]
    frame_bytes_max: u16,

    /// Readings of a full batch, which is one transaction. Lower it for shorter commits, raise it for
    /// more readings a second
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().batch_readings_max)]
    batch_readings_max: usize,

    /// Milliseconds from one commit to the next, at least. Raise it to spare flash storage: fewer and
    /// larger writes, later acknowledgements
    #[arg(long, value_name = "MS", default_value_t = Settings::default().commit_interval_min_ms)]
    commit_interval_min_ms: u64,

    /// The same while fewer than 200 frames come in a second, to each of the --postgres-writers on Postgres, so that
    /// devices share commits. A device that waits for an acknowledgement before it sends on is not made to wait.
    /// Raise it to spare flash storage, 0 for the soonest acknowledgements
    #[arg(long, value_name = "MS", default_value_t = Settings::default().commit_interval_quiet_ms)]
    commit_interval_quiet_ms: u64,

    /// Readings that may wait for the store, at least a full batch; each of the `--postgres-writers` has an equal
    /// part. Raise it to absorb longer bursts
    #[arg(long, value_name = "READINGS", default_value_t = Settings::default().queue_readings_max)]
    queue_readings_max: usize,

    /// Bytes of memory that may wait for the store. Lower it on small machines, raise it to absorb
    /// longer bursts
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().queue_bytes_max)]
    queue_bytes_max: usize,

    /// Seconds to answer what was taken in before leaving on Ctrl-C or SIGTERM. Keep it below what
    /// your service manager waits before it kills
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().drain_timeout_s)]
    drain_timeout_s: u64,

    /// Connections that write to Postgres, each with its own share of the devices. Raise it if the
    /// server has more cores than two and is not busy otherwise
    #[arg(long, value_name = "CONNECTIONS", default_value_t = Settings::default().postgres_writers)]
    postgres_writers: usize,

    /// Seconds that the start waits for a Postgres that is not up yet, such as one that boots with this
    /// machine; 0 ends at once. A wrong password or name of a database always ends at once
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().postgres_wait_s)]
    postgres_wait_s: u64,

    /// Take a Postgres that runs with fsync or full_page_writes off, and may lose acknowledged readings
    /// when it crashes, and leave synchronous_commit as it is configured. For tests
    #[arg(long)]
    allow_postgres_data_loss: bool,

    /// Acknowledge readings when they are in spool.db in the data directory, and bring them to Postgres
    /// from there: devices go on while Postgres is away. No other gateway may write to that database
    #[arg(long)]
    spool: bool,

    /// Bytes of the spool at which nothing more is taken until Postgres is back. Raise it to bridge
    /// longer outages; a reading takes about 30 bytes
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().spool_bytes_max)]
    spool_bytes_max: u64,

    /// Bytes of frames in quarantine, beyond which devices keep such frames and wait; each may use an
    /// eighth. Raise it if there is no time to look after quarantine
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().quarantine_bytes_max)]
    quarantine_bytes_max: u64,

    /// Bytes of SQLite's page cache. Raise it for many series on a machine with memory to spare, lower
    /// it on small machines
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().cache_bytes)]
    cache_bytes: u64,

    /// Bytes of SQLite's write-ahead log at which commits wait for readers that hold it. Lower it on
    /// small disks
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().wal_bytes_max)]
    wal_bytes_max: u64,
}

impl ServeArgs {
    /// Returns all settings of the gateway, not checked yet.
    ///
    /// # Errors
    /// The name of a host to listen on cannot be resolved.
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
            stranger_bytes_max: self.stranger_bytes_max,
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
            "could not resolve {flag} {address}: {error}; give an IP address, or check the name"
        ))
    })
}

/// Runs the gateway until it is told to leave. `changed` shows the settings that differ from their defaults.
pub async fn serve(settings: Settings, changed: &str, format: LogFormat) -> Result<(), Error> {
    // Unheard it would end the process. Until there are certificates to load again it waits.
    let hangup = listen_to(SignalKind::hangup())?;
    // Nor shall a limit on the size of files end it: a write that meets one fails as on a full disk.
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

/// Opens a store in Postgres, and waits for a server that is not up yet.
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
            tracing::warn!(%error, left_s, "Postgres is not up yet, waiting");
            log_at = Instant::now() + UP_LOG_INTERVAL;
        }
        tokio::time::sleep(UP_INTERVAL).await;
    }
}

/// Loads what TLS needs, if there is to be any.
pub fn load_tls(config: &Config) -> Result<Option<Tls>, Error> {
    match config.tls_files() {
        Some(files) if config.tls_cert.is_none() && !files.cert.exists() => {
            Err(Error::Failed(format!(
                "there is no certificate {}; make one to try TLS with by `fieldgate tls init`, or give \
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
    loaded.map_err(|error| Error::Failed(format!("cannot read who may connect: {error}")))?;
    let listeners = bind(config, tls.as_ref())?;
    // Before anybody is told that the gateway is there, and may tell it to leave.
    let drain = CancellationToken::new();
    let mut tasks = Supervisor::default();
    tasks.spawn("signals", leave_when_told(drain.clone())?);
    match tls {
        Some(tls) => tasks.spawn("certificates", async move {
            tls.keep_current(hangup).await;
        }),
        None => tasks.spawn("hangup", load_nothing(hangup)),
    }
    announce(config, origin, &listeners).await?;
    if config.allow_plaintext {
        let listen = config.listen;
        tracing::warn!(%listen, "what devices send to this address is not encrypted");
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
    let mut kept = KeptFrames::new(config.store().clone(), spool);
    quarantine::read(&gauge, &mut kept).await;
    let mut settings = server_settings(config, Arc::clone(&credentials), Arc::clone(&gauge));
    settings.entrance.connections_max = connections_within_limit(config.connections_max);
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
            tracing::info!("shutting down: a task has ended; draining the queue");
            drain.cancel();
            // What ended comes first: it is why there is anything to say.
            let drained = serving.await.err().map(|error| format!("; {error}"));
            Err(failed(&format_args!("{ended}{}", drained.unwrap_or_default())))
        }
        reason = held.watch() => end_without_closing(&reason, format),
    }
}

/// Ends the process as it is: to close a database that is not where it was would write to whatever is there.
fn end_without_closing(reason: &str, format: LogFormat) -> Result<(), Error> {
    let error = Error::Failed(format!("the store failed: {reason}"));
    if let Some(line) = error.line(format) {
        log::urgent(&line);
    }
    log::flush(LAST_FLUSH);
    std::process::exit(1);
}

/// What brings to the spool what operators change in the database, with all that they have changed so far, if
/// the database answers.
async fn filled_mirror(database: &StoreUrl, spool: &Path) -> Mirror {
    let mut mirror = Mirror::new(database.clone(), spool.to_owned());
    match timeout(MIRROR_TIMEOUT, mirror.copy()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, "who may connect is as it was when Postgres was last there");
        }
        Err(_) => tracing::warn!("Postgres is slow; who may connect is as it was last"),
    }
    mirror
}

/// As many connections as there can be open files: one too many would be refused at random, and the store
/// might be the one.
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
            "fewer connections at once than --connections-max, because of the limit of open files; see ulimit -n"
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
            stranger_bytes_max: config.stranger_bytes_max,
            allowances: Arc::new(Allowances::new(
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
        entrance: EntranceLimits {
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
    let mend = match error.kind() {
        io::ErrorKind::AddrInUse => format!("stop what uses that port, or give another {flag}"),
        io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 take privileges; give another {flag}")
        }
        _ => format!("give an address of this machine as {flag}"),
    };
    Error::Failed(format!("cannot listen on {listen}: {error}; {mend}"))
}

/// Says where the gateway is to be found, on stdout and in the log.
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
        true => " (made now; devices need it, or keys derived from it)",
        false => "",
    };
    let mut lines = format!("data directory  {}\n", config.data_dir.display());
    lines += &format!("database        {database}\n");
    if let Some(spool) = spool {
        lines += &format!("spool           {spool}\n");
    }
    lines += &format!("fleet key       {}{made}\n", key_file.display());
    if is_closed {
        lines += "registration    closed: only devices that were added may connect\n";
    }
    lines += &format!("listening on    {listen}\n");
    if let Some(tls_listen) = tls_listen {
        lines += &format!("TLS on          {tls_listen}\n");
    }
    // A service may have closed its output, or nothing reads it; that is no reason not to serve.
    let printed = tokio::task::spawn_blocking(move || {
        let mut out = output::stdout();
        out.write_all(lines.as_bytes())?;
        out.flush()
    });
    let _ = timeout(PRINT_TIMEOUT, printed).await;
    Ok(())
}

/// Starts the drain at the first Ctrl-C or SIGTERM, and ends the process at the second.
fn leave_when_told(drain: CancellationToken) -> Result<impl Future<Output = ()>, Error> {
    let mut interrupt = listen_to(SignalKind::interrupt())?;
    let mut terminate = listen_to(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        tracing::info!("shutting down: draining the queue; send the signal again to exit now");
        drain.cancel();
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        tracing::warn!("exiting without draining; devices send again what was not acknowledged");
        log::flush(LAST_FLUSH);
        std::process::exit(1);
    })
}

/// Without TLS there is nothing that SIGHUP could mean.
async fn load_nothing(mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        tracing::info!("SIGHUP: there are no certificates to load again");
    }
}

fn listen_to(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|error| Error::Failed(format!("cannot listen to signals: {error}")))
}
