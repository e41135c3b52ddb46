//! `fieldgate doctor` and `fieldgate config check`: both check everything that the gateway needs. `doctor` shows each
//! check with its result, `config check` only the problems.
//!
//! The checks accept no connections and write nothing except the files that SQLite keeps next to a database that it
//! reads.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::config::store_url::StoreUrl;
use crate::config::{Config, Location, Settings};
use crate::server::disk_watch;
use crate::store::admin::{self, Connection, OpenError};
use crate::store::{postgres, spool, sqlite};
use crate::sys::disk::{Level, Levels, Place, Space};
use crate::sys::{log, open_files};
use crate::time::{doubt_at_start, utc_now};
use clap::{Args, Subcommand};
use rustix::fs::{Access, access};
use tokio::net::TcpSocket;

use super::serve::sockets::{OTHER_FILES, cannot_listen, load_tls, load_tokens};
use super::{Error, LogFormat, fleet_key, output};

/// Permission of others to replace files of a directory.
const FOREIGN_WRITE: u32 = 0o022;

/// Commands about settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check settings, files, ports, certificates and the store without starting the gateway, even while it runs, and
    /// print one line per problem. If settings are invalid, nothing else is checked. Writes nothing except the files
    /// that SQLite keeps next to a database that is read
    Check(Box<CheckArgs>),
}

#[derive(Args, Debug)]
pub struct CheckArgs {
    /// All settings of the gateway.
    #[command(flatten)]
    pub settings: Settings,
}

/// A check and its result.
struct Checked {
    name: &'static str,
    result: Result<Finding, Error>,
}

/// Result of a check that finds nothing that would keep the gateway from serving.
enum Finding {
    Ok(String),
    /// A problem with which the gateway serves, and what to do.
    Warning(String),
}

/// Checks everything and prints a line for each check. The exit code is that of the first failure.
pub async fn doctor(settings: Settings, location: Location) -> Result<(), Error> {
    let checks = all_checks(settings, location).await;
    let mut out = output::stdout();
    for Checked { name, result } in &checks {
        let (level, text) = match result {
            Ok(Finding::Ok(text)) => ("ok", text.clone()),
            Ok(Finding::Warning(text)) => ("warn", text.clone()),
            Err(error) => ("fail", error.to_string()),
        };
        writeln!(out, "{level:<5} {name:<15} {text}")?;
    }
    out.flush()?;
    match first_failure(&checks) {
        Some(error) => Err(Error::Shown(error.exit_code())),
        None => Ok(()),
    }
}

/// Prints a line for each problem. The exit code is that of the first problem. If settings are invalid, checks
/// nothing else.
pub async fn check(settings: Settings, location: Location, format: LogFormat) -> Result<(), Error> {
    let checks = all_checks(settings, location).await;
    let Some(first) = first_failure(&checks) else {
        let mut out = output::stdout();
        writeln!(out, "configuration and store are ready for serve")?;
        return out.flush().map_err(Error::Output);
    };
    let problems = checks
        .iter()
        .filter_map(|check| check.result.as_ref().err());
    for line in problems.filter_map(|problem| problem.line(format)) {
        log::urgent(&line);
    }
    Err(Error::Shown(first.exit_code()))
}

fn first_failure(checks: &[Checked]) -> Option<&Error> {
    checks.iter().find_map(|check| check.result.as_ref().err())
}

async fn all_checks(settings: Settings, location: Location) -> Vec<Checked> {
    match Config::new(settings, location) {
        Ok(config) => checks_of(&config).await,
        Err(faults) => {
            let failed = |fault| Checked {
                name: "settings",
                result: Err(Error::Config(fault)),
            };
            faults.into_iter().map(failed).collect()
        }
    }
}

async fn checks_of(config: &Config) -> Vec<Checked> {
    let is_running = is_running(config);
    let mut checks = Vec::new();
    let mut note = |name, result| checks.push(Checked { name, result });
    note("settings", Ok(Finding::Ok("valid".to_owned())));
    note("data directory", data_dir(&config.location.data_dir));
    note("listener", listen("--listen", config.listen, is_running));
    if let Some(address) = config.tls_listen {
        note("TLS listener", listen("--tls-listen", address, is_running));
    }
    if let Some(address) = config.http_listen {
        note("HTTP listener", listen("--http", address, is_running));
    }
    note("certificate", certificate(config));
    note("HTTP tokens", tokens(config));
    note("spool", waiting_frames(config).await);
    let store = store(config).await;
    let has_store = matches!(store, Ok(Finding::Ok(_)));
    // Without a store, the key cannot be compared.
    let key = match &store {
        Err(_) => fleet_key::find(config).await.map(|key| key.is_some()),
        Ok(_) => fleet_key::compare_all(config).await,
    };
    note("fleet key", key.map(|found| key_found(config, found)));
    note("store", store);
    if has_store {
        note("durability", durability(config).await);
    }
    for (place, path) in disk_watch::places(config) {
        note("disk", disk(config.disks.levels(), place, &path));
    }
    note("clock", clock(config, has_store).await);
    note("open files", descriptors(config));
    checks
}

/// Returns whether a gateway uses the database file, or the spool.
fn is_running(config: &Config) -> bool {
    let file = match &config.store {
        StoreUrl::Sqlite(path) => path.clone(),
        StoreUrl::Postgres(_) => config.location.spool(),
    };
    sqlite::is_in_use(&file)
}

/// Checks that the directory is writable or can be created, and that others cannot replace its files.
fn data_dir(dir: &Path) -> Result<Finding, Error> {
    let mut nearest = dir;
    while !nearest.exists() {
        nearest = match nearest.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
    }
    let writable = match nearest.is_dir() {
        true => access(nearest, Access::WRITE_OK | Access::EXEC_OK).map_err(io::Error::from),
        false => Err(io::ErrorKind::NotADirectory.into()),
    };
    let shown = dir.display();
    writable.map_err(|error| {
        let nearest = nearest.display();
        Error::Failed(format!(
            "could not write the data directory {shown}: {nearest}: {error}; give this user access to it, or choose \
             another --data-dir"
        ))
    })?;
    if nearest != dir {
        return Ok(Finding::Ok(format!(
            "{shown} does not exist yet; serve creates it"
        )));
    }
    let mode = dir.metadata()?.permissions().mode() & 0o7777;
    Ok(match mode & FOREIGN_WRITE {
        0 => Finding::Ok(format!("{shown} is writable, mode {mode:04o}")),
        _ => Finding::Warning(format!(
            "{shown} has mode {mode:04o}: other users can replace its files; run chmod 700 {shown}"
        )),
    })
}

/// Checks that the address belongs to this machine. A port in use is not a problem, because a running gateway may use
/// it.
fn listen(flag: &str, address: SocketAddr, is_running: bool) -> Result<Finding, Error> {
    let bind = |address| {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)
    };
    let any_port = SocketAddr::new(address.ip(), 0);
    bind(any_port).map_err(|error| cannot_listen(flag, address, &error))?;
    Ok(match bind(address) {
        Ok(()) => Finding::Ok(format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_running => {
            Finding::Ok(format!("{address} is in use, and a gateway is running"))
        }
        // The service may have privileges that this user lacks.
        Err(error) => Finding::Warning(cannot_listen(flag, address, &error).to_string()),
    })
}

fn certificate(config: &Config) -> Result<Finding, Error> {
    let Some(tls) = load_tls(config)? else {
        return Ok(Finding::Ok("not needed without --tls-listen".to_owned()));
    };
    if let Some(expires) = tls.expired() {
        return Err(Error::Failed(format!(
            "certificate expired on {expires}, devices cannot connect; renew it"
        )));
    }
    if let Some(fault) = tls.faults().first() {
        return Ok(Finding::Warning(format!(
            "devices may reject the certificate: {fault}"
        )));
    }
    Ok(match tls.expires() {
        Some(expires) if tls.expires_soon() => {
            Finding::Warning(format!("expires on {expires}; renew it"))
        }
        Some(expires) => Finding::Ok(format!("valid until {expires}")),
        None => Finding::Ok("in use; its expiry cannot be read".to_owned()),
    })
}

fn tokens(config: &Config) -> Result<Finding, Error> {
    Ok(Finding::Ok(match load_tokens(config)? {
        Some(_) => "the file is private and valid".to_owned(),
        None => "none: requests need no token".to_owned(),
    }))
}

async fn waiting_frames(config: &Config) -> Result<Finding, Error> {
    let path = config.location.spool();
    if !config.spool.spool {
        spool::refuse_undrained(&path).await?;
        return Ok(Finding::Ok("off".to_owned()));
    }
    let waiting = spool::waiting(&path).await?;
    let frames = waiting.map_or(0, |waiting| waiting.frames);
    let frames = output::count(frames, "frame");
    Ok(Finding::Ok(format!("{frames} waiting for Postgres")))
}

fn key_found(config: &Config, is_found: bool) -> Finding {
    let path = fleet_key::path_of(config);
    let path = path.display();
    Finding::Ok(match is_found {
        true => format!("{path} is private, and the store has no other key"),
        false => format!("{path} does not exist yet; serve creates it"),
    })
}

/// Checks that the store can be opened or created.
async fn store(config: &Config) -> Result<Finding, Error> {
    match &config.store {
        StoreUrl::Sqlite(path) => {
            let shown = path.display();
            match Connection::open(&config.store, admin::Access::Read).await {
                Err(OpenError::Sqlite(sqlite::OpenError::Missing(_))) => {
                    let dir = directory_of(path);
                    match dir == config.location.data_dir || dir.is_dir() {
                        true => Ok(Finding::Warning(format!(
                            "{shown} does not exist; serve creates it; if there should be one, set --data-dir or \
                             --store"
                        ))),
                        false => Err(sqlite::OpenError::NoDirectory(dir.to_owned()).into()),
                    }
                }
                Err(OpenError::Sqlite(sqlite::OpenError::Older(_))) => {
                    Ok(Finding::Warning(format!(
                        "{shown} has the schema of an older Fieldgate; serve upgrades it at startup"
                    )))
                }
                opened => {
                    opened?;
                    Ok(Finding::Ok(format!("{shown} can be read")))
                }
            }
        }
        StoreUrl::Postgres(url) => {
            postgres::check(url, config.postgres.allow_postgres_data_loss).await?;
            Ok(Finding::Ok(format!("{url} is reachable")))
        }
    }
}

/// Checks that what the store acknowledges survives a power failure.
async fn durability(config: &Config) -> Result<Finding, Error> {
    let file = match &config.store {
        StoreUrl::Postgres(url) => {
            let off = postgres::settings_that_lose_data(url).await?;
            if !off.is_empty() {
                return Ok(Finding::Warning(format!(
                    "Postgres can lose acknowledged frames: {} off; turn it on, and omit --allow-postgres-data-loss",
                    off.join(", ")
                )));
            }
            if !config.spool.spool {
                return Ok(Finding::Ok("Postgres syncs commits".to_owned()));
            }
            config.location.spool()
        }
        StoreUrl::Sqlite(path) => {
            let mut connection = Connection::open(&config.store, admin::Access::Read).await?;
            let rows = connection
                .rows("SELECT journal_mode FROM pragma_journal_mode", &[])
                .await?;
            let mode = rows.first().map(|row| row.text_or_null(0)).transpose()?;
            if mode.flatten().is_some_and(|mode| mode != "wal") {
                return Ok(Finding::Warning(
                    "the database was copied or changed by another program: it has no write-ahead log; serve \
                     restores it at startup"
                        .to_owned(),
                ));
            }
            path.clone()
        }
    };
    Ok(match sqlite::file_system_fault(directory_of(&file)) {
        Some(fault) => Finding::Warning(format!("{} is on {fault}", file.display())),
        None => Finding::Ok("every commit is synced to a local disk".to_owned()),
    })
}

/// Checks the free space with the levels of the gateway. It counts no free space inside the file of a spool.
fn disk(levels: Levels, place: Place, path: &Path) -> Result<Finding, Error> {
    let shown = path.display();
    let space = Space::of(path).map_err(|error| {
        Error::Failed(format!("could not read the free space of {shown}: {error}"))
    })?;
    let text = format!(
        "{} of {} ({} %) free at {shown}",
        crate::text::bytes_text(space.free_bytes),
        crate::text::bytes_text(space.total_bytes),
        space.free_percent()
    );
    match levels.level(space, Level::Enough) {
        Level::Enough => Ok(Finding::Ok(text)),
        Level::Full if place.holds_readings() => Err(Error::Failed(format!(
            "only {text}, less than --disk-stop-percent ({}): no readings are stored; make space",
            levels.stop_percent
        ))),
        Level::Full | Level::Low => Ok(Finding::Warning(format!("only {text}; make space soon"))),
    }
}

async fn clock(config: &Config, has_store: bool) -> Result<Finding, Error> {
    let now = utc_now();
    let stored_us = match has_store {
        true => newest_receipt_us(config).await,
        false => None,
    };
    Ok(match doubt_at_start(now.as_microsecond(), stored_us) {
        Some(doubt) => Finding::Warning(format!(
            "the system clock looks wrong, {doubt}: {now}; set it, or receive times will be wrong"
        )),
        None => Finding::Ok(now.strftime("%Y-%m-%dT%H:%M:%SZ is plausible").to_string()),
    })
}

/// Returns the newest time of receipt of the store; `None` if it has none or cannot be read.
async fn newest_receipt_us(config: &Config) -> Option<i64> {
    let mut connection = Connection::open(&config.store, admin::Access::Read).await;
    let connection = connection.as_mut().ok()?;
    let sql = "SELECT max(received_at) FROM (
        SELECT received_at FROM frames ORDER BY id DESC LIMIT 100) AS newest";
    let rows = connection.rows(sql, &[]).await.ok()?;
    rows.first()?.integer_or_null(0).ok()?
}

/// Checks that all connections fit into the limit on open files.
fn descriptors(config: &Config) -> Result<Finding, Error> {
    let wanted = config.admission.connections_max as u64 + OTHER_FILES;
    Ok(match open_files::maximum() {
        Some(limit) if limit < wanted => Finding::Warning(format!(
            "the limit of {limit} allows {} connections, fewer than --connections-max ({}); raise ulimit -Hn, or \
             LimitNOFILE= of the service, to {wanted}",
            limit.saturating_sub(OTHER_FILES),
            config.admission.connections_max
        )),
        Some(limit) => Finding::Ok(format!("the limit of {limit} fits all connections")),
        None => Finding::Ok("no limit".to_owned()),
    })
}

fn directory_of(path: &Path) -> &Path {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    dir.unwrap_or(Path::new("."))
}
