//! `fieldgate serve --check`: finds problems that would keep the gateway from serving, without opening ports or
//! writing anything except the files that SQLite keeps next to a database that is read.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;

use crate::config::store_url::StoreUrl;
use crate::config::{Config, Location, Settings};
use crate::store::admin::{self, Connection, OpenError};
use crate::store::{postgres, spool, sqlite};
use crate::sys::log;
use rustix::fs::{Access, access};
use tokio::net::TcpSocket;

use super::serve::{load_tls, load_tokens};
use super::{Error, LogFormat, fleet_key, output};

/// Prints a line for each problem. The exit code is that of the first problem. If settings are invalid, checks
/// nothing else.
pub async fn check(settings: Settings, location: Location, format: LogFormat) -> Result<(), Error> {
    let problems = match Config::new(settings, location) {
        Ok(config) => problems(&config).await,
        Err(faults) => faults.into_iter().map(Error::Config).collect(),
    };
    let Some(first) = problems.first() else {
        let mut out = output::stdout();
        writeln!(out, "configuration and store are ready for serve")?;
        return out.flush().map_err(Error::Output);
    };
    for line in problems.iter().filter_map(|problem| problem.line(format)) {
        log::urgent(&line);
    }
    Err(Error::Shown(first.exit_code()))
}

async fn problems(config: &Config) -> Vec<Error> {
    let mut problems = Vec::new();
    let mut note = |checked: Result<(), Error>| problems.extend(checked.err());
    note(data_dir(&config.location.data_dir));
    note(listen("--listen", config.listen));
    if let Some(address) = config.tls_listen {
        note(listen("--tls-listen", address));
    }
    if let Some(address) = config.http_listen {
        note(listen("--http", address));
    }
    note(tls(config));
    note(load_tokens(config).map(drop));
    note(waiting_frames(config).await);
    match store(config).await {
        // Without a store, the key cannot be compared.
        Err(error) => {
            note(fleet_key::find(config).await.map(drop));
            note(Err(error));
        }
        Ok(()) => note(fleet_key::compare_all(config).await),
    }
    problems
}

/// Checks that the directory is writable or can be created.
fn data_dir(dir: &Path) -> Result<(), Error> {
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
    writable.map_err(|error| {
        let (dir, nearest) = (dir.display(), nearest.display());
        Error::Failed(format!(
            "could not write the data directory {dir}: {nearest}: {error}; give this user access to it, or choose \
             another --data-dir"
        ))
    })
}

/// Checks that the address belongs to this machine. Does not check the port, which a running gateway may use.
fn listen(flag: &str, address: SocketAddr) -> Result<(), Error> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let any_port = SocketAddr::new(address.ip(), 0);
    let bound = socket.and_then(|socket| socket.bind(any_port));
    bound.map_err(|error| {
        Error::Failed(format!(
            "could not listen on {address}: {error}; use an address of this machine as {flag}"
        ))
    })
}

fn tls(config: &Config) -> Result<(), Error> {
    let Some(tls) = load_tls(config)? else {
        return Ok(());
    };
    match tls.expired() {
        None => Ok(()),
        Some(expires) => Err(Error::Failed(format!(
            "certificate expired on {expires}, devices cannot connect; renew it"
        ))),
    }
}

async fn waiting_frames(config: &Config) -> Result<(), Error> {
    match config.spool.spool {
        true => spool::waiting(&config.location.spool()).await.map(drop)?,
        false => spool::refuse_undrained(&config.location.spool()).await?,
    }
    Ok(())
}

/// Checks that the store can be opened or created.
async fn store(config: &Config) -> Result<(), Error> {
    match &config.store {
        StoreUrl::Sqlite(path) => {
            match Connection::open(&config.store, admin::Access::Read).await {
                Err(OpenError::Sqlite(sqlite::OpenError::Missing(_))) => {
                    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
                    let dir = dir.unwrap_or(Path::new("."));
                    match dir == config.location.data_dir || dir.is_dir() {
                        true => Ok(()),
                        false => Err(sqlite::OpenError::NoDirectory(dir.to_owned()).into()),
                    }
                }
                // `serve` upgrades it at startup.
                Err(OpenError::Sqlite(sqlite::OpenError::Older(_))) => Ok(()),
                opened => opened.map(drop).map_err(Error::Open),
            }
        }
        StoreUrl::Postgres(url) => {
            postgres::check(url, config.postgres.allow_postgres_data_loss).await?;
            Ok(())
        }
    }
}
