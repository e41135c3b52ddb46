//! `fieldgate device add|disable|enable|rotate-key`.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use fieldgate::auth::device_key::DeviceKey;
use fieldgate::auth::fleet_key::FleetKey;
use fieldgate::store::editor::Editor;
use fieldgate::store::lifecycle::{DeviceEdit, DeviceState, StoredKey};
use fieldgate::store::url::StoreUrl;
use fieldgate::sys::secret_file::{SecretReaders, open_secret};
use fieldgate::time::SystemClock;

use super::{device_name, unknown};
use crate::cli::fleet_key::FleetKeyFile;
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

    /// Give each a random key of its own, instead of one that derives from the fleet's
    #[arg(long)]
    own_key: bool,

    /// Give the device the key in this file, 64 hexadecimal digits; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "own_key")]
    own_key_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct RotateArgs {
    /// Name of the device
    name: String,

    /// A random key of its own [default: of the kind it had]
    #[arg(long)]
    own_key: bool,

    /// The next key that derives from the fleet's and the device's name
    #[arg(long, conflicts_with = "own_key")]
    derived_key: bool,

    /// The key in this file, 64 hexadecimal digits; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["own_key", "derived_key"])]
    own_key_file: Option<PathBuf>,
}

/// Makes devices known, all or none.
pub async fn add(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &AddArgs,
) -> Result<(), Error> {
    let given = match &args.own_key_file {
        Some(_) if args.names.len() > 1 => {
            let what = "two devices with one key could stand in for each other: give one NAME, or --own-key";
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
            "a device is named {name} already; `fieldgate device show {name}` tells of it"
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
    tell(&args.names, |name| {
        format!("added {name}; `fieldgate device key {name}` prints its key")
    })
}

/// Lets devices in or keeps them out, all or none.
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
    tell(&args.names, |name| match changed[name] {
        true => format!("{name} is {now}"),
        false => format!("{name} is {now} already"),
    })
}

/// Gives a device another key.
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
    // It need not be there for a key that derives from it.
    let mut fleet = Some(key_file.load(store).await);
    let mut fleet = || fleet.take().expect("one device is looked at once");
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
            Some(_) => "one of its own",
            None => "derived from the fleet key",
        };
        let version = next_version(&before.key).map_err(Error::Failed)?;
        Ok(Some((before.is_enabled, StoredKey { version, sealed })))
    })
    .await?;
    tell(names, |name| {
        format!("{name} has another key, {kind}; `fieldgate device key {name}` prints it")
    })
}

/// The number of the key after this one: a number that came round again would bring back a key that was
/// replaced.
pub fn next_version(key: &StoredKey) -> Result<u32, String> {
    let next = key.version.checked_add(1);
    next.ok_or_else(|| "the device's key was replaced as often as can be counted".to_owned())
}

/// Whether a device may connect, and its key.
pub type Wanted = (bool, StoredKey);

/// Makes devices what `wanted` says of each, given what it was before, in one transaction; tells which of them
/// changed. `None` stands for a device that should be known and is not.
pub async fn edit(
    store: &StoreUrl,
    names: &[String],
    wanted: impl FnMut(&str, Option<&DeviceState>) -> Result<Option<Wanted>, Error>,
) -> Result<HashMap<String, bool>, Error> {
    let mut editor = Editor::open(store).await?;
    let now_us = SystemClock::start().now().utc_us;
    let mut edit = DeviceEdit::begin(&mut editor, now_us).await?;
    match set_all(&mut edit, names, wanted).await {
        Ok(Set::All(changed)) if changed.values().any(|is_changed| *is_changed) => {
            edit.commit().await?;
            Ok(changed)
        }
        Ok(Set::All(changed)) => {
            edit.rollback().await?;
            Ok(changed)
        }
        Ok(Set::Unknown(name)) => {
            edit.rollback().await?;
            Err(unknown(&mut editor, &name).await?)
        }
        Err(error) => {
            // What went wrong is the error; the transaction is undone when the connection ends, too.
            let _ = edit.rollback().await;
            Err(error)
        }
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

/// A device's own key, as the store keeps it.
pub fn seal(fleet: &FleetKey, device: &str, key: DeviceKey) -> Result<Vec<u8>, Error> {
    key.seal(fleet, device).map_err(no_randomness)
}

fn random_key() -> Result<DeviceKey, Error> {
    DeviceKey::random().map_err(no_randomness)
}

fn no_randomness(error: impl std::fmt::Display) -> Error {
    Error::Failed(format!("the system gives no random numbers: {error}"))
}

/// The key in a file that nobody else can read, or on standard input.
pub fn read_key(path: &Path) -> Result<DeviceKey, Error> {
    let cannot = |error: &dyn std::fmt::Display| {
        Error::Failed(format!(
            "cannot read a key from {}: {error}",
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
            "{path} holds {error}; a key is 64 hexadecimal digits"
        ))
    })
}

fn tell(names: &[String], line: impl Fn(&str) -> String) -> Result<(), Error> {
    let mut out = output::stdout();
    for name in names {
        writeln!(out, "{}", line(name))?;
    }
    out.flush().map_err(Error::Output)
}
