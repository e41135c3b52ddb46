//! `fieldgate fleet-key`, and loading of the fleet key for all commands. The key must be the store's fleet key.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::auth::claim::{Mismatch, Standing, adopt, claim, standing};
use crate::auth::device_key::DeviceKey;
use crate::auth::fleet_key::{FleetKey, KEY_FILE, Origin, create_data_dir};
use crate::config::store_url::StoreUrl;
use crate::config::{Config, SPOOL_FILE};
use crate::store::admin::device::{self, DeviceState};
use crate::store::admin::{Access, Connection, Source};
use crate::sys::secret_file::SecretReaders;
use clap::{Args, Subcommand};
use tokio::time::timeout;

use super::{Error, output};

/// Maximum wait for the database's fleet key when a gateway with a spool starts.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Subcommand)]
pub enum FleetKeyCommand {
    /// Show the fingerprints of the local fleet key and of the store's fleet key. Fingerprints are not secret
    Show,
    /// Make the fleet key in the data directory the store's fleet key, replacing the previous one. Devices must
    /// then get keys derived from it before they can connect again. Restart gateways afterwards
    Adopt(AdoptArgs),
}

#[derive(Args, Debug)]
pub struct AdoptArgs {
    /// Create a new fleet key if there is none
    #[arg(long)]
    create: bool,
}

/// Location of the fleet key, and who may read it.
#[derive(Clone, Copy, Debug)]
pub struct FleetKeyFile<'a> {
    pub data_dir: &'a Path,
    pub readers: SecretReaders,
}

impl FleetKeyFile<'_> {
    fn path(self) -> PathBuf {
        self.data_dir.join(KEY_FILE)
    }

    /// Loads the key; `None` if the file does not exist.
    pub fn find(self) -> Result<Option<FleetKey>, Error> {
        Ok(FleetKey::find(self.data_dir, self.readers)?)
    }

    /// Loads the key for a command on `store`. Fails if it is not the store's fleet key.
    pub async fn load(self, store: &StoreUrl) -> Result<FleetKey, Error> {
        let Some(key) = self.find()? else {
            return Err(Error::Failed(format!(
                "could not find fleet key {}; run `fieldgate serve` once to create it, or set --data-dir",
                self.path().display()
            )));
        };
        // A command that needs the store reports its errors itself.
        if let Ok(mut connection) = Connection::open(store, Access::Read).await {
            let standing = standing(&mut connection).await?;
            self.compare(&standing, Some(&key), store)?;
        }
        Ok(key)
    }

    fn compare(
        self,
        standing: &Standing,
        key: Option<&FleetKey>,
        store: impl std::fmt::Display,
    ) -> Result<(), Error> {
        let path = self.path();
        let path = path.display();
        let message = match standing.mismatch(key) {
            None => return Ok(()),
            Some(Mismatch::Other(theirs)) => {
                let ours = key.map(FleetKey::fingerprint).unwrap_or_default();
                format!(
                    "fleet key {path} (fingerprint {ours}) does not belong to {store} ({theirs}), so its devices \
                     could not connect; restore the right key, or run `fieldgate fleet-key adopt` and install new \
                     keys on all devices"
                )
            }
            Some(Mismatch::Lost) => format!(
                "could not find fleet key {path}, which the devices of {store} need; restore it from a backup, or \
                 run `fieldgate fleet-key adopt --create` and install new keys on all devices"
            ),
        };
        Err(Error::Failed(message))
    }
}

/// Returns the location of a gateway's fleet key.
fn file_of(config: &Config) -> FleetKeyFile<'_> {
    FleetKeyFile {
        data_dir: &config.location.data_dir,
        readers: config.location.secret_readers(),
    }
}

/// Returns the path of a gateway's fleet key.
pub fn path_of(config: &Config) -> PathBuf {
    file_of(config).path()
}

/// Loads a gateway's key before its store is opened. With a spool, fails if it is not the database's fleet key,
/// provided that the database is available.
pub async fn find(config: &Config) -> Result<Option<FleetKey>, Error> {
    let file = file_of(config);
    let key = file.find()?;
    let url = &config.store;
    if !config.spool.spool {
        return Ok(key);
    }
    let connection = timeout(DATABASE_TIMEOUT, Connection::open(url, Access::Read)).await;
    // The store reports an unavailable database itself.
    if let Ok(Ok(mut connection)) = connection
        && let Ok(standing) = standing(&mut connection).await
    {
        file.compare(&standing, key.as_ref(), url)?;
    }
    Ok(key)
}

/// Checks that `found` is the fleet key of the open store, and creates a key for a store without devices.
pub async fn settle(config: &Config, found: Option<FleetKey>) -> Result<(FleetKey, Origin), Error> {
    let file = file_of(config);
    let spool = config.spool();
    let name = match &spool {
        Some(path) => path.display().to_string(),
        None => config.store.to_string(),
    };
    let source = match spool.clone() {
        Some(path) => Source::Spool(path),
        None => (&config.store).into(),
    };
    let mut connection = Connection::open(source, Access::Write).await?;
    let before = standing(&mut connection).await?;
    file.compare(&before, found.as_ref(), &name)?;
    let (key, origin) = match found {
        Some(key) => (key, Origin::Loaded),
        None => FleetKey::create(file.data_dir, file.readers)?,
    };
    let after = claim(&mut connection, &key).await?;
    file.compare(&after, Some(&key), &name)?;
    if spool.is_some() {
        claim_database(config, &key).await?;
    }
    Ok((key, origin))
}

/// Compares a gateway's key with the keys of its store and its spool. Changes nothing. Returns whether there is a key.
pub async fn compare_all(config: &Config) -> Result<bool, Error> {
    let file = file_of(config);
    let key = file.find()?;
    if let Ok(mut connection) = Connection::open(&config.store, Access::Read).await {
        let standing = standing(&mut connection).await?;
        file.compare(&standing, key.as_ref(), &config.store)?;
    }
    if let Some(spool) = config.spool().filter(|path| path.exists()) {
        let standing =
            standing(&mut Connection::open(Source::Spool(spool.clone()), Access::Read).await?)
                .await?;
        file.compare(&standing, key.as_ref(), spool.display())?;
    }
    Ok(key.is_some())
}

/// Records the key of a gateway with a spool in the database, if the database is available.
async fn claim_database(config: &Config, key: &FleetKey) -> Result<(), Error> {
    let url = &config.store;
    let Ok(Ok(mut connection)) =
        timeout(DATABASE_TIMEOUT, Connection::open(url, Access::Write)).await
    else {
        return Ok(());
    };
    match claim(&mut connection, key).await {
        Ok(standing) => file_of(config).compare(&standing, Some(key), url),
        Err(error) => {
            tracing::warn!(%error, "could not record fleet key fingerprint in database");
            Ok(())
        }
    }
}

pub async fn fleet_key(
    file: FleetKeyFile<'_>,
    store: &StoreUrl,
    command: &FleetKeyCommand,
) -> Result<(), Error> {
    match command {
        FleetKeyCommand::Show => show(file, store).await,
        FleetKeyCommand::Adopt(args) => adopt_key(file, store, args).await,
    }
}

async fn show(file: FleetKeyFile<'_>, store: &StoreUrl) -> Result<(), Error> {
    let key = file.find()?;
    let standing = standing(&mut Connection::open(store, Access::Read).await?).await?;
    let ours = key.map_or_else(|| "none".to_owned(), |key| key.fingerprint());
    let theirs = match standing {
        Standing::Claimed(fingerprint) => fingerprint,
        Standing::Unclaimed { .. } => "none".to_owned(),
    };
    let path = file.path().display().to_string();
    let mut out = output::stdout();
    output::write_facts(
        &[(path.as_str(), ours), (store.to_string().as_str(), theirs)],
        &mut out,
    )?;
    out.flush().map_err(Error::Output)
}

async fn adopt_key(
    file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &AdoptArgs,
) -> Result<(), Error> {
    let path = file.path();
    let path = path.display();
    let mut connection = Connection::open(store, Access::Write).await?;
    let key = match (file.find()?, args.create) {
        (Some(key), false) => key,
        (Some(_), true) => {
            return Err(Error::Failed(format!(
                "fleet key {path} already exists; omit --create to adopt it, or move it away"
            )));
        }
        (None, false) => {
            return Err(Error::Failed(format!(
                "could not find fleet key {path}; restore it, or use --create to create a new one"
            )));
        }
        (None, true) => {
            create_data_dir(file.data_dir)?;
            FleetKey::create(file.data_dir, file.readers)?.0
        }
    };
    let spool = file.data_dir.join(SPOOL_FILE);
    if spool.exists() {
        let spool = Connection::open(Source::Spool(spool), Access::Write).await;
        adopt(&mut spool?, &key).await?;
    }
    adopt(&mut connection, &key).await?;
    let devices = device::all(&mut connection).await?;
    let is_lost = |device: &&DeviceState| {
        let own = device.key.sealed.as_ref();
        own.is_some_and(|own| DeviceKey::unseal(&key, &device.name, own).is_err())
    };
    let sealed = devices.iter().filter(is_lost).count() as u64;
    let mut out = output::stdout();
    writeln!(
        out,
        "{store} now uses fleet key {path}, fingerprint {}",
        key.fingerprint()
    )?;
    writeln!(
        out,
        "devices need new keys derived from it; print them with `fieldgate device key NAME`"
    )?;
    if sealed > 0 {
        let keys = output::count(sealed, "device");
        writeln!(
            out,
            "{keys} had individual keys that only the previous fleet key can decrypt; run `fieldgate device rotate-key`"
        )?;
    }
    out.flush().map_err(Error::Output)
}
