//! Private files, such as keys, and their directories.
//!
//! Unix only: the secrecy of a file depends on its mode.
//!
//! Invariants
//! - A file exists completely or not at all, even after a power failure: it is written and synced
//!   under another name, and then renamed. This also holds on file systems without hard links.
//! - [`create_secret`] never overwrites a file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::process::{getegid, getgroups};

/// Read and write permission for the group and others.
const FOREIGN_ACCESS: u32 = 0o066;

/// Read permission for the group.
const GROUP_READ: u32 = 0o040;

/// Users other than the owner who may read a secret.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecretReaders {
    /// No other user.
    #[default]
    Owner,
    /// The file's group, if this process belongs to it.
    Group,
}

/// A secret that other users can access.
#[derive(Debug, thiserror::Error)]
#[error("{0} has mode {mode:04o}: {1} can {2} it{way_out}; run chmod 600 {0}", path.display(), whom(*mode), what(*mode))]
pub struct Exposed {
    /// Path of the file.
    path: PathBuf,
    /// Mode of the file.
    mode: u32,
    /// Further advice, or empty.
    way_out: String,
}

/// Reason why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("could not read {}: {source}{}", path.display(), user_hint(source))]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The I/O error from the system.
        source: io::Error,
    },
    /// Other users could have read the file.
    #[error(transparent)]
    Exposed(Exposed),
}

/// Returns advice about a secret that this user may not read.
pub(crate) fn user_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run this as the gateway's user",
        _ => "",
    }
}

/// Opens a file for reading. Only its owner and `readers` may read it, and only its owner may write
/// it.
///
/// # Errors
/// The file cannot be read, or other users can access it.
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
            "; use --allow-group-read if that is this service's group".to_owned()
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

/// Returns whether this process belongs to a group.
pub(crate) fn is_own_group(gid: u32) -> bool {
    let others = getgroups().unwrap_or_default();
    getegid().as_raw() == gid || others.iter().any(|group| group.as_raw() == gid)
}

/// Creates a file with mode 0600 atomically: it exists completely or not at all.
///
/// # Errors
/// The file exists already, or cannot be written.
pub fn create_secret(path: &Path, text: &str) -> io::Result<()> {
    let draft = draft_of(path)?;
    let written = write_secret(&draft, text).and_then(|()| publish_new(&draft, path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

/// Renames a synced file durably, unless `path` exists.
///
/// # Errors
/// `path` exists, or the file system refuses.
pub fn publish_new(draft: &Path, path: &Path) -> io::Result<()> {
    publish(draft, path, &WAYS)?;
    sync_dir(dir_of(path))
}

/// Renames a synced file durably, replacing an existing file.
///
/// # Errors
/// The file system refuses.
pub fn publish_over(draft: &Path, path: &Path) -> io::Result<()> {
    fs::rename(draft, path)?;
    sync_dir(dir_of(path))
}

/// A method to give a file its name unless a file with that name exists.
type Way = fn(&Path, &Path) -> io::Result<()>;

/// In order of preference. FAT, exFAT and many network mounts have no hard links; some have no
/// rename that fails if the target exists.
const WAYS: [Way; 3] = [rename_new, link_new, rename_checked];

/// Renames `draft` to `path` with the first method that the file system supports.
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

/// Returns whether an error may mean that the file system, or the system, does not support an
/// operation.
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

/// Checks that the file does not exist, then renames. A lock keeps other processes of this program
/// from doing the same meanwhile.
fn rename_checked(draft: &Path, path: &Path) -> io::Result<()> {
    let dir = File::open(dir_of(path))?;
    // Some file systems do not support locks either.
    let _ = dir.lock();
    match fs::symlink_metadata(path) {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::rename(draft, path),
        Err(error) => Err(error),
    }
}

/// Syncs a directory, if the file system supports it, so that a new name is durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        synced => synced,
    }
}

/// Creates a file like [`create_secret`], replacing an existing one.
///
/// # Errors
/// The file cannot be written; an existing one stays.
pub fn replace_secret(path: &Path, text: &str) -> io::Result<()> {
    let draft = draft_of(path)?;
    let written = write_secret(&draft, text).and_then(|()| publish_over(&draft, path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

/// Writes a new file with mode 0600, and syncs it.
fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & FOREIGN_ACCESS != 0 {
        return Err(io::Error::other(format!(
            "this file system does not preserve file modes (a new file has mode {:04o} instead of 0600), so others \
             could read secrets; mount it with umask=0077 and this user's uid, or choose another directory",
            mode & 0o7777
        )));
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Creates a directory with mode 0700 if it does not exist, and checks that it is writable.
///
/// # Errors
/// The directory cannot be created or written.
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

/// Returns the path at which a file is written before it is renamed.
fn draft_of(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(dir_of(path).join(format!(".{name}.{:08x}", nonce()?)))
}

/// Checks that files can be created. Modes are not enough: the file system may be read-only or have
/// other restrictions.
fn probe(dir: &Path) -> io::Result<()> {
    let path = dir.join(format!(".probe.{:08x}", nonce()?));
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    fs::remove_file(path)
}

/// Returns a random number that separates the files of concurrent processes.
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
    fn on_any_file_system_a_file_appears_whole_and_replaces_none() {
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
