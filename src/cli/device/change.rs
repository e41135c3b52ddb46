//! `fieldgate device add|disable|enable|rotate-key`.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::auth::device_key::DeviceKey;
use crate::auth::fleet_key::FleetKey;
use crate::config::store_url::StoreUrl;
use crate::store::admin::device::{DeviceEdit, DeviceState, StoredKey};
use crate::store::admin::{Access, Connection};
use crate::sys::secret_file::{SecretReaders, open_secret};
use crate::time::SystemClock;
use clap::Args;

use super::device_name;
use crate::cli::fleet_key::FleetKeyFile;
use crate::cli::nearest::unknown_device;
use crate::cli::{Error, output};

#[derive(Args, Debug)]
pub struct NamesArgs {
    /// Names of the devices
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

#[derive(Args, Debug)]
pub struct AddArgs {
    /// Names of the devices
    #[arg(value_name = "NAME", required = true, value_parser = device_name)]
    names: Vec<String>,

    /// Give each device a random individual key instead of one derived from the fleet key
    #[arg(long)]
    own_key: bool,

    /// File with the device's individual key, 64 hexadecimal digits; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "own_key")]
    own_key_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct RotateArgs {
    /// Name of the device
    name: String,

    /// Use a random individual key [default: same kind as before]
    #[arg(long)]
    own_key: bool,

    /// Use the next key derived from the fleet key and the device name
    #[arg(long, conflicts_with = "own_key")]
    derived_key: bool,

    /// Use the individual key in this file, 64 hexadecimal digits; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["own_key", "derived_key"])]
    own_key_file: Option<PathBuf>,
}

/// Registers devices, all or none.
pub async fn add(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &AddArgs,
) -> Result<(), Error> {
    let given = match &args.own_key_file {
        Some(_) if args.names.len() > 1 => {
            let what = "devices with the same key could impersonate each other; give one NAME, or use --own-key";
            return Err(Error::Usage(what.to_owned()));
        }
        Some(path) => Some(read_key(path)?),
        None => None,
    };
    let mut keys = HashMap::new();
    if args.own_key || given.is_some() {
        let fleet = key_file.load(store).await?;
        for name in &args.names {
            let key = given.map_or_else(random_key, Ok)?;
            keys.insert(name.as_str(), seal(&fleet, name, key)?);
        }
    }
    edit(store, &args.names, |name, before| match before {
        Some(_) => Err(Error::Failed(format!(
            "device {name} already exists; see `fieldgate device show {name}`"
        ))),
        None => Ok(Some((
            true,
            StoredKey {
                version: 0,
                sealed: keys.remove(name),
            },
        ))),
    })
    .await?;
    print_each(&args.names, |name| {
        format!("added {name}; `fieldgate device key {name}` prints its key")
    })
}

/// Enables or disables devices, all or none.
pub async fn set_enabled(
    store: &StoreUrl,
    args: &NamesArgs,
    is_enabled: bool,
) -> Result<(), Error> {
    let changed = edit(store, &args.names, |_, before| {
        Ok(before.map(|before| (is_enabled, before.key.clone())))
    })
    .await?;
    let now = if is_enabled { "enabled" } else { "disabled" };
    print_each(&args.names, |name| match changed[name] {
        true => format!("{name} is {now}"),
        false => format!("{name} is already {now}"),
    })
}

pub async fn rotate_key(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &RotateArgs,
) -> Result<(), Error> {
    let given = match &args.own_key_file {
        Some(path) => Some(read_key(path)?),
        None => None,
    };
    let names = std::slice::from_ref(&args.name);
    let mut kind = "";
    // The file may be missing: a new derived key does not need it.
    let mut fleet = Some(key_file.load(store).await);
    let mut fleet = || fleet.take().expect("the key is needed for one device only");
    edit(store, names, |name, before| {
        let Some(before) = before else {
            return Ok(None);
        };
        let has_own = before.key.sealed.is_some() && !args.derived_key;
        let sealed = match given {
            None if !args.own_key && !has_own => None,
            None => Some(seal(&fleet()?, name, random_key()?)?),
            Some(key) => Some(seal(&fleet()?, name, key)?),
        };
        kind = match sealed {
            Some(_) => "individual",
            None => "derived from the fleet key",
        };
        let version = next_version(&before.key).map_err(Error::Failed)?;
        Ok(Some((before.is_enabled, StoredKey { version, sealed })))
    })
    .await?;
    print_each(names, |name| {
        format!("{name} has a new key ({kind}); `fieldgate device key {name}` prints it")
    })
}

/// Returns the version of the next key. The counter never wraps around: that would make a replaced key valid again.
pub fn next_version(key: &StoredKey) -> Result<u32, String> {
    let next = key.version.checked_add(1);
    next.ok_or_else(|| "could not replace the key: its version counter is exhausted".to_owned())
}

/// Whether a device may connect, and its key.
pub type Wanted = (bool, StoredKey);

/// Sets each device to the state that `wanted` returns for its previous state, in one transaction. Returns for each
/// device whether it changed. `wanted` returns `None` for an unknown device that must exist.
pub async fn edit(
    store: &StoreUrl,
    names: &[String],
    wanted: impl FnMut(&str, Option<&DeviceState>) -> Result<Option<Wanted>, Error>,
) -> Result<HashMap<String, bool>, Error> {
    let mut connection = Connection::open(store, Access::Write).await?;
    let now_us = SystemClock::start().now().utc_us;
    let mut edit = DeviceEdit::begin(&mut connection, now_us).await?;
    let set = set_all(&mut edit, names, wanted).await;
    match &set {
        Ok(Set::All(changed)) if changed.values().any(|is_changed| *is_changed) => {
            connection.commit().await?;
        }
        // A failed rollback is harmless: closing the connection rolls back, too.
        _ => drop(connection.rollback().await),
    }
    match set? {
        Set::All(changed) => Ok(changed),
        Set::Unknown(name) => Err(unknown_device(&mut connection, &name).await?),
    }
}

enum Set {
    All(HashMap<String, bool>),
    Unknown(String),
}

async fn set_all(
    edit: &mut DeviceEdit<'_>,
    names: &[String],
    mut wanted: impl FnMut(&str, Option<&DeviceState>) -> Result<Option<Wanted>, Error>,
) -> Result<Set, Error> {
    let found = edit.find(names.iter().map(String::as_str)).await?;
    let mut changed = HashMap::new();
    for name in names {
        if changed.contains_key(name) {
            continue;
        }
        let before = found.get(name);
        let Some((is_enabled, key)) = wanted(name, before)? else {
            return Ok(Set::Unknown(name.clone()));
        };
        let is_changed = edit.set(name, before, is_enabled, &key).await?;
        changed.insert(name.clone(), is_changed);
    }
    Ok(Set::All(changed))
}

/// Encrypts a device's individual key for the store.
pub fn seal(fleet: &FleetKey, device: &str, key: DeviceKey) -> Result<Vec<u8>, Error> {
    key.seal(fleet, device).map_err(no_randomness)
}

fn random_key() -> Result<DeviceKey, Error> {
    DeviceKey::random().map_err(no_randomness)
}

fn no_randomness(error: impl std::fmt::Display) -> Error {
    Error::Failed(format!(
        "could not get random numbers from the system: {error}"
    ))
}

/// Reads a key from a file that only this user can read, or from standard input.
pub fn read_key(path: &Path) -> Result<DeviceKey, Error> {
    let cannot = |error: &dyn std::fmt::Display| {
        Error::Failed(format!(
            "could not read a key from {}: {error}",
            path.display()
        ))
    };
    let mut digits = String::new();
    let read = if path == Path::new("-") {
        io::stdin().read_to_string(&mut digits)
    } else {
        let mut file = open_secret(path, SecretReaders::Owner)
            .map_err(|error| Error::Failed(error.to_string()))?;
        file.read_to_string(&mut digits)
    };
    read.map_err(|error| cannot(&error))?;
    DeviceKey::parse(&digits).map_err(|error| {
        let path = path.display();
        Error::Failed(format!(
            "{path} is not a key: {error}; a key is 64 hexadecimal digits"
        ))
    })
}

fn print_each(names: &[String], line: impl Fn(&str) -> String) -> Result<(), Error> {
    let mut out = output::stdout();
    for name in names {
        writeln!(out, "{}", line(name))?;
    }
    out.flush().map_err(Error::Output)
}
