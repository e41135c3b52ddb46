//! `fieldgate backup`: copies a SQLite store into a file while the gateway runs.
//!
//! The copy has the state of one moment. It is written as `FILE.part`, checked, synced and then renamed, so that `FILE`
//! is complete or does not exist, even after a power failure. A lock on the draft refuses a second backup to the same file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::auth::fleet_key::KEY_FILE;
use crate::config::store_url::StoreUrl;
use crate::store::sqlite;
use crate::sys::secret_file::{publish_new, publish_over};
use clap::Args;
use rustix::fs::OFlags;

use super::{Error, output};

#[derive(Args, Debug)]
pub struct BackupArgs {
    /// File to create, with mode 0600. It is complete or does not exist
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Replace FILE if it exists. The old file stays until the new one is complete
    #[arg(long)]
    replace: bool,
}

/// Backs up the store, and prints what the backup does not contain.
pub async fn backup(data_dir: &Path, store: &StoreUrl, args: &BackupArgs) -> Result<(), Error> {
    let StoreUrl::Sqlite(database) = store else {
        return Err(Error::Failed(format!(
            "could not back up {store}: it is a Postgres database; use pg_dump or another backup tool of Postgres"
        )));
    };
    let file = &args.file;
    let failed = |error: &dyn std::fmt::Display| {
        let (database, file) = (database.display(), file.display());
        Error::Failed(format!("could not back up {database} to {file}: {error}"))
    };
    refuse_in_use(database, args).map_err(|reason| failed(&reason))?;
    let draft = Draft::create(file).map_err(|error| failed(&error))?;
    sqlite::copy(database, &draft.path).await?;
    sqlite::check(&draft.path).await.map_err(|error| {
        let database = database.display();
        Error::Failed(format!(
            "could not back up {database}: {error}; check the disks and the database itself, and keep older backups"
        ))
    })?;
    let bytes = draft
        .publish(args.replace)
        .map_err(|error| failed(&error))?;
    let mut out = output::stdout();
    let (database, file) = (database.display(), file.display());
    writeln!(
        out,
        "{database} backed up to {file}, {}",
        crate::text::bytes_text(bytes)
    )?;
    let key = data_dir.join(KEY_FILE);
    writeln!(
        out,
        "the fleet key is not in it: back up {} as well, or no device can log in after a restore",
        key.display()
    )?;
    out.flush().map_err(Error::Output)
}

/// Refuses to write to a file that exists, or to one that a gateway uses.
fn refuse_in_use(database: &Path, args: &BackupArgs) -> Result<(), String> {
    let file = &args.file;
    let found = match fs::symlink_metadata(file) {
        Err(_) => return Ok(()),
        Ok(_) if !args.replace => {
            return Err("the file exists; choose another, or use --replace".to_owned());
        }
        Ok(found) => found,
    };
    if !found.is_file() {
        return Err("it is not a regular file; choose another".to_owned());
    }
    let same = fs::metadata(database)
        .is_ok_and(|other| (other.dev(), other.ino()) == (found.dev(), found.ino()));
    match same || sqlite::is_in_use(file) {
        true => Err("it is the database of a gateway; choose another file".to_owned()),
        false => Ok(()),
    }
}

/// The file in which a backup is written. Removed on drop, unless it is published.
struct Draft {
    path: PathBuf,
    target: PathBuf,
    /// Locked.
    file: File,
    is_published: bool,
}

impl Draft {
    /// Creates an empty draft next to `target`, or takes over that of an interrupted backup.
    fn create(target: &Path) -> io::Result<Draft> {
        let path = with_suffix(target, ".part");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&path)?;
        let found = file.metadata()?;
        if !found.is_file() || found.nlink() != 1 {
            return Err(io::Error::other(
                "the draft is a link or not a file; remove it",
            ));
        }
        file.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => {
                io::Error::other("another backup to this file is running; wait for its end")
            }
            fs::TryLockError::Error(error) => error,
        })?;
        // One that ended meanwhile has given the file its name.
        if !fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == found.ino()) {
            return Err(io::Error::other(
                "another backup to this file has just ended; try again",
            ));
        }
        file.set_permissions(Permissions::from_mode(0o600))?;
        // A journal of an interrupted backup would be applied to the new one.
        match fs::remove_file(with_suffix(&path, "-journal")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        file.set_len(0)?;
        Ok(Draft {
            path,
            target: target.to_owned(),
            file,
            is_published: false,
        })
    }

    /// Gives the file its name; returns its size in bytes.
    fn publish(mut self, replaces: bool) -> io::Result<u64> {
        self.file.sync_all()?;
        let bytes = self.file.metadata()?.len();
        match replaces {
            true => publish_over(&self.path, &self.target)?,
            false => publish_new(&self.path, &self.target)?,
        }
        self.is_published = true;
        Ok(bytes)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_published {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
