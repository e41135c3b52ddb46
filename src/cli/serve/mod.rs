//! `fieldgate serve`: the gateway itself.

mod announce;
mod reload;
pub mod sockets;

use std::ffi::OsString;
use std::fmt::Display;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::auth::credentials::Credentials;
use crate::auth::fleet_key::{FleetKey, KEY_FILE, Origin, create_data_dir};
use crate::config::store_url::{PostgresUrl, StoreUrl};
use crate::config::{AdmissionLimits, Config, Location, Registration, Settings};
use crate::http::feed::{Feed, FeedHead};
use crate::http::gauges::{Database, Gauges};
use crate::http::page::{Live, LiveNumbers, Rates, RatesSampler};
use crate::http::{self, Guard};
use crate::ingest::registry::Registry;
use crate::metrics::Metrics;
use crate::quota::device::DeviceQuotas;
use crate::quota::quarantine::{Gauge, UsageWatch};
use crate::server::device_watch::DeviceWatch;
use crate::server::disk_watch::{self, DiskUsers, DiskWatch};
use crate::server::supervisor::Supervisor;
use crate::server::{self, ServerSettings};
use crate::session::SessionSettings;
use crate::store::Store;
use crate::store::admin::mirror::Mirror;
use crate::store::admin::presence::PresenceWatch;
use crate::store::admin::prune::Pruner;
use crate::store::admin::quarantine_usage::UsageReader;
use crate::store::admin::retention::Retention;
use crate::store::admin::{Poll, Reconnecting, Source, poll_every_or_when, poll_once};
use crate::store::postgres::{PostgresSettings, PostgresStore};
use crate::store::spool::{self, SpoolError, SpoolStore};
use crate::store::sqlite::files::HeldFiles;
use crate::store::sqlite::{LogMover, SqliteSettings, SqliteStore};
use crate::sys::gateway_id;
use crate::sys::log;
use crate::sys::service::{self, InheritedSockets};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use self::announce::announce;
use self::reload::Reload;
use self::sockets::{
    bind, bind_http, connections_within_limit, load_tls, load_tokens, refuse_unused,
};
use super::{Error, LogFormat, SetLevels, SettingValue, fleet_key, valid_config};

/// Signal for a write beyond the file size limit (RLIMIT_FSIZE).
#[cfg(target_os = "linux")]
const SIGXFSZ: i32 = 25;
/// Maximum wait at startup for the device list from Postgres, if there is a spool.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum wait at startup for the free space of a disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between attempts to connect to Postgres at startup.
const UP_INTERVAL: Duration = Duration::from_millis(500);
/// Interval between log lines about these attempts.
const UP_LOG_INTERVAL: Duration = Duration::from_secs(30);
/// Divisor of the drain timeout; the quotient is for draining the spool into Postgres.
const SPOOL_DRAIN_SHARE: u32 = 2;
/// Maximum interval between messages to the service manager.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum wait for a blocked stderr at an exit without a drain.
const LAST_FLUSH: Duration = Duration::from_millis(200);

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// All settings of the gateway.
    #[command(flatten)]
    pub settings: Settings,
}

/// How the gateway was started.
pub struct Start {
    /// Every setting.
    pub values: Vec<SettingValue>,
    /// Sockets from the service manager.
    pub inherited: InheritedSockets,
    /// Format of the log.
    pub format: LogFormat,
    /// Arguments of the process.
    pub args: Vec<OsString>,
    pub set_levels: SetLevels,
}

/// Runs the gateway until it receives a signal to stop.
pub async fn serve(settings: Settings, location: Location, start: Start) -> Result<(), Error> {
    // Without a handler, SIGHUP ends the process. It stays pending until the certificates are loaded.
    let hangup = listen_to(SignalKind::hangup())?;
    // With a handler, a write beyond the file size limit fails as on a full disk and does not end the process.
    #[cfg(target_os = "linux")]
    let _file_size = listen_to(SignalKind::from_raw(SIGXFSZ))?;
    let config = valid_config(settings, location)?;
    let changed = start.values.iter().filter(|setting| !setting.is_default);
    let changed: Vec<_> = changed.map(ToString::to_string).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        settings = changed.join(" "),
        "starting"
    );
    run(&config, hangup, start).await?;
    tracing::info!("stopped");
    Ok(())
}

async fn run(config: &Config, hangup: Signal, start: Start) -> Result<(), Error> {
    create_data_dir(&config.location.data_dir)?;
    let found = fleet_key::find(config).await?;
    match &config.store {
        StoreUrl::Sqlite(path) => {
            spool::refuse_undrained(&config.location.spool()).await?;
            let store = SqliteStore::open(path, &sqlite_settings(config)).await?;
            let log = store.log_mover();
            let key = fleet_key::settle(config, found).await?;
            serve_into(vec![store], config, Some(log), key, hangup, start).await
        }
        StoreUrl::Postgres(url) if config.spool.spool => {
            let postgres = postgres_settings(config, url)?;
            let store = once_up(config, async || {
                SpoolStore::open(
                    &config.location.spool(),
                    &sqlite_settings(config),
                    config.spool.spool_bytes_max,
                    Duration::from_secs(config.drain_timeout_s) / SPOOL_DRAIN_SHARE,
                    postgres.clone(),
                )
                .await
            });
            let store = store.await?;
            let key = fleet_key::settle(config, found).await?;
            serve_into(vec![store], config, None, key, hangup, start).await
        }
        StoreUrl::Postgres(url) => {
            let postgres = postgres_settings(config, url)?;
            let stores = once_up(config, async || {
                spool::leave(
                    &config.location.spool(),
                    &sqlite_settings(config),
                    &postgres,
                )
                .await?;
                Ok(PostgresStore::open(postgres.clone()).await?)
            });
            let stores = stores.await?;
            let key = fleet_key::settle(config, found).await?;
            serve_into(stores, config, None, key, hangup, start).await
        }
    }
}

/// Opens a store in Postgres, retrying while the server is not up yet.
async fn once_up<T>(
    config: &Config,
    mut open: impl AsyncFnMut() -> Result<T, SpoolError>,
) -> Result<T, Error> {
    let began = Instant::now();
    let wait = Duration::from_secs(config.postgres.postgres_wait_s);
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
            service::status("waiting for Postgres");
            log_at = Instant::now() + UP_LOG_INTERVAL;
        }
        tokio::time::sleep(UP_INTERVAL).await;
    }
}

async fn serve_into<S: Store>(
    stores: Vec<S>,
    config: &Config,
    log_mover: Option<LogMover>,
    (key, origin): (FleetKey, Origin),
    hangup: Signal,
    mut start: Start,
) -> Result<(), Error> {
    let tls = load_tls(config)?.map(Arc::new);
    let held = match &config.store {
        StoreUrl::Sqlite(path) => HeldFiles::of_database(path),
        StoreUrl::Postgres(_) if config.spool.spool => {
            HeldFiles::of_database(&config.location.spool())
        }
        StoreUrl::Postgres(_) => HeldFiles::new([]),
    };
    let key_file = HeldFiles::new([config.location.data_dir.join(KEY_FILE)]);
    let spool = config.spool();
    let mirror = match &spool {
        Some(path) => Some(filled_mirror(&config.store, path).await),
        None => None,
    };
    let source = match spool.clone() {
        Some(path) => Source::Spool(path),
        None => (&config.store).into(),
    };
    let credentials = Arc::new(Credentials::new(key));
    let registry = Arc::new(Registry::default());
    let devices = DeviceWatch::load(source, Arc::clone(&credentials), Arc::clone(&registry)).await;
    let devices =
        devices.map_err(|error| Error::Failed(format!("could not read devices: {error}")))?;
    let listeners = bind(config, tls.as_ref(), &mut start.inherited)?;
    // Created before the gateway is announced, because it may be stopped from then on.
    let drain = CancellationToken::new();
    let mut tasks = Supervisor::default();
    let connections_max = connections_within_limit(config.admission.connections_max);
    let metrics = Arc::new(limited_metrics(config, connections_max));
    let feed = Feed::new(&config.store, Arc::clone(&metrics), &config.ingest);
    let feed = Arc::new(feed);
    let rates = Arc::new(Rates::default());
    let live = Arc::new(Live::new(Arc::clone(&metrics), Arc::clone(&rates)));
    let hosts = config.http.http_host.iter().cloned();
    let (guard, admitted) = watch::channel(Guard::new(hosts, load_tokens(config)?));
    let inherited = &mut start.inherited;
    let http = bind_http(config, admitted, &metrics, &feed, &live, &drain, inherited).await?;
    refuse_unused(&start.inherited)?;
    tasks.spawn("signals", drain_on_signal(drain.clone())?);
    if let Some(tls) = tls.clone() {
        tasks.spawn("certificates", async move { tls.keep_current().await });
    }
    announce(config, origin, &listeners, http.as_ref()).await?;
    if config.listeners.allow_plaintext {
        let listen = config.listen;
        tracing::warn!(%listen, "listener accepts unencrypted connections");
    }
    let gauge = Arc::new(Gauge::new(config.devices.quarantine_bytes_max));
    let retention = Retention::new(
        &config.store,
        config.retention.clone(),
        Arc::clone(&metrics),
        log_mover.clone(),
    );
    let pruner = Pruner::new(&config.store, spool.clone(), config.devices.events);
    let mut usage = UsageWatch {
        gauge: Arc::clone(&gauge),
        usage: UsageReader::new(&config.store, spool),
    };
    poll_once(&mut usage).await;
    let mut gauges = Gauges {
        metrics: Arc::clone(&metrics),
        database: Database::new(&config.store),
        store: Reconnecting::new(&config.store),
        spool: config.spool(),
        quarantine: Arc::clone(&gauge),
        tls: tls.clone(),
    };
    poll_once(&mut gauges).await;
    tasks.spawn_poller(gauges);
    let (disk_levels, levels) = watch::channel(config.disks.levels());
    let space_wanted = Arc::new(Notify::new());
    let users = DiskUsers {
        levels,
        registry: Arc::clone(&registry),
        metrics: Arc::clone(&metrics),
        log: log_mover,
        spool: config.spool(),
        retention: Arc::clone(&space_wanted),
        turn: Arc::default(),
    };
    watch_disks(config, &users, &mut tasks).await;
    if let Some((listener, site)) = http {
        tasks.spawn_poller(FeedHead::new(&config.store, feed));
        tasks.spawn_poller(RatesSampler::new(Arc::clone(&metrics), rates));
        tasks.spawn_poller(LiveNumbers::new(&config.store, live));
        tasks.spawn("http", http::serve(listener, site));
    }
    tasks.spawn("service manager", report_health(Arc::clone(&metrics)));
    let gateway = match &config.store {
        StoreUrl::Sqlite(_) => None,
        StoreUrl::Postgres(_) => Some(gateway_name(config)?),
    };
    tasks.spawn_poller(PresenceWatch::new(
        &config.store,
        gateway,
        Arc::clone(&metrics),
        config.session.keepalive_s,
    ));
    let session = session_settings(config, credentials, Arc::clone(&gauge), metrics);
    let (session, of_sessions) = watch::channel(Arc::new(session));
    let (admission, limits) = watch::channel(AdmissionLimits {
        connections_max,
        ..config.admission.clone()
    });
    let settings = ServerSettings {
        session: of_sessions,
        ingest: config.ingest.clone(),
        admission: limits,
        drain_timeout_s: config.drain_timeout_s,
    };
    let values = { start.values.into_iter() }.map(|setting| (setting.flag, setting.value));
    let reload = Reload {
        args: start.args,
        config: config.clone(),
        values: values.collect(),
        set_levels: start.set_levels,
        tls,
        guard,
        session,
        admission,
        quarantine: gauge,
        disk_levels,
    };
    tasks.spawn("reload", reload.run(hangup));
    tasks.spawn_poller(usage);
    tasks.spawn_poller(devices);
    tasks.spawn("fleet key", async move { key_file.watch_only().await });
    tasks.spawn_poller(pruner);
    tasks.spawn(Retention::TASK, async move {
        poll_every_or_when(retention, &space_wanted).await
    });
    if let Some(mirror) = mirror {
        tasks.spawn_poller(mirror);
    }
    let failed = |error: &dyn Display| Error::Failed(error.to_string());
    service::ready("serving");
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
            service::stopping("draining the queue");
            drain.cancel();
            // The task comes first in the error: it is the cause.
            let drained = serving.await.err().map(|error| format!("; {error}"));
            Err(failed(&format_args!("{ended}{}", drained.unwrap_or_default())))
        }
        reason = held.watch() => end_without_closing(&reason, start.format),
    }
}

/// Starts a watch for each disk. Measures each once before, unless it does not answer.
async fn watch_disks(config: &Config, users: &DiskUsers, tasks: &mut Supervisor) {
    for place in disk_watch::places(config) {
        let mut disk = DiskWatch::new(place, users.clone());
        let _ = timeout(DISK_TIMEOUT, disk.measure()).await;
        tasks.spawn("disk space", disk.run());
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
    let mut mirror = Mirror::new(database, spool.to_owned());
    match timeout(MIRROR_TIMEOUT, mirror.poll()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, "Postgres unavailable, using last known device list");
        }
        Err(_) => tracing::warn!("Postgres slow, using last known device list"),
    }
    mirror
}

/// Reports to the service manager that this runtime works, at half the interval that it expects.
async fn report_health(metrics: Arc<Metrics>) {
    let interval = service::watchdog().map_or(STATUS_INTERVAL, |limit| limit / 2);
    let mut tick = tokio::time::interval(interval.min(STATUS_INTERVAL));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let status = metrics.summary();
        // A service manager that reads nothing blocks a thread that no connection needs.
        let _ = tokio::task::spawn_blocking(move || service::alive(&status)).await;
    }
}

fn sqlite_settings(config: &Config) -> SqliteSettings {
    SqliteSettings::new(&config.sqlite, config.devices.bounds)
}

/// Returns the name of this gateway among those of its database.
fn gateway_name(config: &Config) -> Result<String, Error> {
    gateway_id::load_or_create(&config.location.data_dir).map_err(|error| {
        let path = config.location.data_dir.join(gateway_id::ID_FILE);
        let path = path.display();
        Error::Failed(format!(
            "could not read or write {path}: {error}; make the data directory writable"
        ))
    })
}

fn postgres_settings(config: &Config, url: &PostgresUrl) -> Result<PostgresSettings, Error> {
    Ok(PostgresSettings {
        url: url.clone(),
        options: config.postgres.clone(),
        bounds: config.devices.bounds,
        gateway: gateway_name(config)?,
        spool: None,
    })
}

fn session_settings(
    config: &Config,
    credentials: Arc<Credentials>,
    quarantine: Arc<Gauge>,
    metrics: Arc<Metrics>,
) -> SessionSettings {
    SessionSettings {
        credentials,
        may_register: config.devices.registration == Registration::Open,
        limits: config.session.clone(),
        quotas: Arc::new(DeviceQuotas::new(&config.devices.rates)),
        retention: Arc::new(config.retention.readings()),
        quarantine,
        metrics,
    }
}

/// Returns the metrics of the gateway, with `connections_max` and the other limits of `config`.
fn limited_metrics(config: &Config, connections_max: usize) -> Metrics {
    let mut metrics = Metrics::default();
    for (name, help, limit) in [
        (
            "connections_max",
            "Maximum number of connections",
            connections_max as u64,
        ),
        (
            "queue_readings_max",
            "Maximum number of readings that wait for the store",
            config.ingest.queue_readings_max as u64,
        ),
        (
            "queue_bytes_max",
            "Maximum memory of what waits for the store",
            config.ingest.queue_bytes_max as u64,
        ),
        (
            "spool_bytes_max",
            "Maximum size of the spool",
            config.spool.spool_bytes_max,
        ),
    ] {
        metrics.set_limit(name, help, limit);
    }
    metrics
}

/// Starts the drain at the first Ctrl-C or SIGTERM, and exits at the second.
fn drain_on_signal(drain: CancellationToken) -> Result<impl Future<Output = ()>, Error> {
    let mut interrupt = listen_to(SignalKind::interrupt())?;
    let mut terminate = listen_to(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        tracing::info!("shutting down: draining the queue; send the signal again to exit now");
        service::stopping("draining the queue");
        drain.cancel();
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        tracing::warn!("exiting without draining; devices will resend unacknowledged frames");
        log::flush(LAST_FLUSH);
        std::process::exit(1);
    })
}

fn listen_to(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|error| Error::Failed(format!("could not listen for signals: {error}")))
}
