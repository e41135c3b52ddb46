//! `fieldgate device key`: prints keys for installation on devices.

use std::io::Write;

use crate::auth::device_key::DeviceKey;
use crate::auth::fleet_key::FleetKey;
use crate::config::store_url::StoreUrl;
use crate::store::admin::device::{self, StoredKey};
use crate::store::admin::{Access, Connection, OpenError};
use crate::store::postgres;
use crate::store::sqlite;
use clap::Args;

use super::device_name;
use crate::cli::fleet_key::FleetKeyFile;
use crate::cli::{Error, output};

#[derive(Args, Debug)]
pub struct KeyArgs {
    /// Names of the devices
    #[arg(value_name = "NAME", required = true, value_parser = device_name)]
    names: Vec<String>,
}

pub async fn key(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &KeyArgs,
) -> Result<(), Error> {
    let keys = keys_of(key_file, store, &args.names).await?;
    let mut out = output::stdout();
    for (name, key) in args.names.iter().zip(keys) {
        let digits = key.to_digits();
        match args.names.len() {
            1 => writeln!(out, "{digits}")?,
            _ => writeln!(out, "{name} {digits}")?,
        }
    }
    out.flush().map_err(Error::Output)
}

/// Returns the keys of known and unknown devices.
pub async fn keys_of(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    names: &[String],
) -> Result<Vec<DeviceKey>, Error> {
    let fleet = key_file.load(store).await?;
    let mut connection = match Connection::open(store, Access::Read).await {
        Ok(connection) => Some(connection),
        // Before the first run of a gateway, every device has its first key. Warn, because --store or --data-dir
        // may be wrong.
        Err(
            missing @ (OpenError::Sqlite(sqlite::OpenError::Missing(_))
            | OpenError::Postgres(postgres::OpenError::Missing { .. })),
        ) => {
            tracing::warn!(reason = %missing, "no store found; printing initial derived keys");
            None
        }
        Err(error) => return Err(error.into()),
    };
    let mut keys = Vec::with_capacity(names.len());
    for name in names {
        let stored = match &mut connection {
            Some(connection) => device::find(connection, name).await?,
            None => None,
        };
        let stored = stored.map_or_else(StoredKey::default, |device| device.key);
        keys.push(open(&fleet, name, &stored)?);
    }
    Ok(keys)
}

/// Returns a device's key.
pub fn open(fleet: &FleetKey, name: &str, stored: &StoredKey) -> Result<DeviceKey, Error> {
    match &stored.sealed {
        None => Ok(DeviceKey::derive(fleet, name, stored.version)),
        Some(sealed) => DeviceKey::unseal(fleet, name, sealed)
            .map_err(|error| Error::Failed(format!("{name}: {error}"))),
    }
}
