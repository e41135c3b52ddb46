//! Files that only this user may touch, such as keys, and the directories they live in.
//!
//! Unix only: the secrecy of a file rests on its mode.
//!
//! Invariants
//! - A file is there whole or not at all, whatever moment the power fails: it is written and synced under
//!   another name, and gets its own only then, also on file systems without hard links.
//! - [`create_secret`] writes over no file that is there.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::process::{getegid, getgroups};

/// Reading and writing, by the group and by others.
const FOREIGN_ACCESS: u32 = 0o066;

/// Reading, by the group.
const GROUP_READ: u32 = 0o040;

/// Who may read a secret besides its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecretReaders {
    /// No other user.
    #[default]
    Owner,
    /// The file's group, if this process belongs to it.
    Group,
}

/// A secret that others than its user can touch.
#[derive(Debug, thiserror::Error)]
#[error("{0} has mode {mode:04o}: {1} can {2} it{way_out}; run chmod 600 {0}", path.display(), whom(*mode), what(*mode))]
pub struct Exposed {
    /// Which file.
    path: PathBuf,
    /// Its mode.
    mode: u32,
    /// What else may be done.
    way_out: String,
}

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("could not read {}: {source}{}", path.display(), user_hint(source))]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Whoever could read it may have it.
    #[error(transparent)]
    Exposed(Exposed),
}

/// Returns what to do about a secret that this user may not read.
pub(crate) fn user_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run this as the user that the gateway runs as",
        _ => "",
    }
}

/// Opens a file for reading that only its user, and `readers`, may read, and only its user may write.
///
/// # Errors
/// It cannot be read, or others could, too.
pub fn open_secret(path: &Path, readers: SecretReaders) -> Result<File, SecretError> {
    let read = |source| SecretError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    let mode = metadata.permissions().mode() & 0o7777;
    let foreign = mode & FOREIGN_ACCESS;
    let way_out = match (foreign, readers) {
        (0, _) => return Ok(file),
        (GROUP_READ, SecretReaders::Group) if is_own_group(metadata.gid()) => return Ok(file),
        (GROUP_READ, SecretReaders::Group) => {
            let gid = metadata.gid();
            format!(" and this process is not in that group, {gid}")
        }
        (GROUP_READ, SecretReaders::Owner) => {
            "; give --allow-group-read if that is this service's group".to_owned()
        }
        _ => String::new(),
    };
    let path = path.to_owned();
    Err(SecretError::Exposed(Exposed {
        path,
        mode,
        way_out,
    }))
}

/// Whether this process belongs to a group.
pub(crate) fn is_own_group(gid: u32) -> bool {
    let others = getgroups().unwrap_or_default();
    getegid().as_raw() == gid || others.iter().any(|group| group.as_raw() == gid)
}

/// Makes a file that nobody but this user may read or write; it is there whole or not at all.
///
/// # Errors
/// It is there already, or cannot be written.
pub fn create_secret(path: &Path, text: &str) -> io::Result<()> {
    let draft = draft_of(path)?;
    let written = write_secret(&draft, text).and_then(|()| publish(&draft, path, &WAYS));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written?;
    sync_dir(dir_of(path))
}

/// A way to give a file its name unless a file has it.
type Way = fn(&Path, &Path) -> io::Result<()>;

/// The best first. FAT, exFAT and many mounts of other machines have no hard links; some have no rename that
/// replaces nothing.
const WAYS: [Way; 3] = [rename_new, link_new, rename_checked];

/// Renames `draft` to `path` by the first way that the file system has.
fn publish(draft: &Path, path: &Path, ways: &[Way]) -> io::Result<()> {
    let mut refused = io::Error::from(io::ErrorKind::Unsupported);
    for way in ways {
        match way(draft, path) {
            Err(error) if is_unsupported(&error) => refused = error,
            done => return done,
        }
    }
    Err(refused)
}

/// Whether an error may say that the file system, or the system, cannot do such a thing at all.
fn is_unsupported(error: &io::Error) -> bool {
    let unsupported = [
        Errno::INVAL,
        Errno::PERM,
        Errno::NOSYS,
        Errno::OPNOTSUPP,
        Errno::MLINK,
        Errno::ACCESS,
    ];
    Errno::from_io_error(error).is_some_and(|errno| unsupported.contains(&errno))
}

fn rename_new(draft: &Path, path: &Path) -> io::Result<()> {
    Ok(renameat_with(
        CWD,
        draft,
        CWD,
        path,
        RenameFlags::NOREPLACE,
    )?)
}

fn link_new(draft: &Path, path: &Path) -> io::Result<()> {
    fs::hard_link(draft, path)?;
    fs::remove_file(draft)
}

/// Looks whether there is a file, and renames, while no other process of this program does the same.
fn rename_checked(draft: &Path, path: &Path) -> io::Result<()> {
    let dir = File::open(dir_of(path))?;
    // Some file systems have no locks, either.
    let _ = dir.lock();
    match fs::symlink_metadata(path) {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::rename(draft, path),
        Err(error) => Err(error),
    }
}

/// Makes a name durable, where directories can be synced.
fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        synced => synced,
    }
}

/// The same, in the place of a file that may be there.
///
/// # Errors
/// It cannot be written; what was there stays.
pub fn replace_secret(path: &Path, text: &str) -> io::Result<()> {
    let draft = draft_of(path)?;
    let written = write_secret(&draft, text).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written?;
    sync_dir(dir_of(path))
}

/// Writes a new file that nobody but this user may read or write, and syncs it.
fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & FOREIGN_ACCESS != 0 {
        return Err(io::Error::other(format!(
            "this file system does not keep modes (a new file has mode {:04o} instead of 0600), so others can read \
             secrets in it; mount it with umask=0077 and this user's uid, or give another directory",
            mode & 0o7777
        )));
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Makes any directory in the same way.
///
/// # Errors
/// It cannot be made or written.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() { probe(dir) } else { make(dir) }
}

fn make(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    sync_dir(dir_of(dir))
}

fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Where a file is written before it gets its name.
fn draft_of(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(dir_of(path).join(format!(".{name}.{:08x}", nonce()?)))
}

/// Modes alone do not tell: the file system may be read-only, or have rules of its own.
fn probe(dir: &Path) -> io::Result<()> {
    let path = dir.join(format!(".probe.{:08x}", nonce()?));
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    fs::remove_file(path)
}

/// Keeps the names of files apart that several processes may make at once.
fn nonce() -> io::Result<u32> {
    getrandom::u32().map_err(|error| io::Error::other(error.to_string()))
}

fn whom(mode: u32) -> &'static str {
    match (mode & 0o060 != 0, mode & 0o006 != 0) {
        (true, false) => "its group",
        _ => "others",
    }
}

fn what(mode: u32) -> &'static str {
    match (mode & 0o044 != 0, mode & 0o022 != 0) {
        (true, true) => "read and write",
        (false, _) => "write",
        _ => "read",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_its_name_whole_and_replaces_none_on_any_file_system() {
        let unsupported: Way = |_, _| Err(Errno::PERM.into());
        let no_rename: Way = |_, _| Err(Errno::INVAL.into());
        let file_systems: [&[Way]; 4] = [
            &WAYS,
            &[no_rename, link_new],
            &[rename_new, unsupported],
            &[no_rename, unsupported, rename_checked],
        ];
        for (at, ways) in file_systems.into_iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let [draft, path] = ["draft", "name"].map(|name| dir.path().join(name));
            fs::write(&draft, "new").unwrap();
            publish(&draft, &path, ways).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "new", "{at}");
            assert!(!draft.exists(), "{at}");

            fs::write(&draft, "newer").unwrap();
            let refused = publish(&draft, &path, ways).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists, "{at}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "new", "{at}");
        }
    }
}
