//! The fleet key, from which every device's own key derives, and the directory it lives in; and how any
//! file is opened that only this user may touch.
//!
//! Deriving is the protocol's business. Unix only: the secrecy of the file rests on its mode.
//!
//! Invariants
//! - The key is in no message of this module, nor in anything's `Debug`.
//! - `fleet.key` is there whole or not at all, whatever moment the power fails: it is written and
//!   synced under another name, and gets its own only then, also on file systems without hard links.
//! - A key that is there is never written over.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fieldgate_protocol::auth::KEY_BYTES;
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::process::{getegid, getgroups};

/// Name of the key's file within the data directory.
pub const KEY_FILE: &str = "fleet.key";

const KEY_DIGITS: usize = 2 * KEY_BYTES;
/// Reading and writing, by the group and by others.
const FOREIGN_ACCESS: u32 = 0o066;
/// Reading, by the group.
const GROUP_READ: u32 = 0o040;
/// Name of the key's fingerprint in HKDF; no device's key is derived under it (SPEC R32).
const FINGERPRINT_LABEL: &[&[u8]] = &[b"fieldgate fleet key fingerprint v1"];
/// Bytes of a fingerprint.
const FINGERPRINT_BYTES: usize = 16;

/// The key of a whole fleet.
#[derive(Clone, PartialEq, Eq)]
pub struct FleetKey([u8; KEY_BYTES]);

/// Where a key came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Made just now, of the system's randomness.
    Created,
    /// It was there.
    Loaded,
}

/// Why there is no fleet key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The data directory cannot be made or written.
    #[error(
        "cannot write the data directory {}: {source}; give this user access to it, or another \
         --data-dir",
        path.display()
    )]
    DataDir {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The key's file cannot be read.
    #[error("could not read the fleet key {}: {source}{}", path.display(), user_hint(source))]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The key's file cannot be made.
    #[error("cannot write the fleet key {}: {source}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Whoever could read the key may have it.
    #[error(transparent)]
    Exposed(Exposed),
    /// It is no key.
    #[error("{} holds {source}; a fleet key is {KEY_DIGITS} hexadecimal digits", path.display())]
    Digits {
        /// Which.
        path: PathBuf,
        /// What is there instead.
        source: DigitsError,
    },
    /// The system gives no randomness.
    #[error("the system gives no random numbers to make a fleet key of: {0}")]
    Random(#[from] getrandom::Error),
}

/// What is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigitsError {
    /// Not 64 digits.
    #[error("{0} characters")]
    Length(usize),
    /// Other characters than digits.
    #[error("other characters than hexadecimal digits")]
    NotHex,
}

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
fn user_hint(error: &io::Error) -> &'static str {
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
fn is_own_group(gid: u32) -> bool {
    let others = getgroups().unwrap_or_default();
    getegid().as_raw() == gid || others.iter().any(|group| group.as_raw() == gid)
}

impl FleetKey {
    /// Loads the key in the data directory `dir`; `None` if there is none.
    ///
    /// # Errors
    /// The key that is there is not fit for use.
    pub fn find(dir: &Path, readers: SecretReaders) -> Result<Option<FleetKey>, KeyError> {
        let path = dir.join(KEY_FILE);
        // An exposed or damaged key must be seen, not replaced.
        match fs::symlink_metadata(&path) {
            Ok(_) => FleetKey::load(&path, readers).map(Some),
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory]
                    .contains(&error.kind()) =>
            {
                Ok(None)
            }
            Err(source) => Err(KeyError::Read { path, source }),
        }
    }

    /// Makes a key in the data directory `dir`, or loads the one that another process has made meanwhile.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn create(dir: &Path, readers: SecretReaders) -> Result<(FleetKey, Origin), KeyError> {
        let path = dir.join(KEY_FILE);
        let key = FleetKey::generate()?;
        match key.store(dir) {
            Ok(()) => Ok((key, Origin::Created)),
            // Another process was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok((FleetKey::load(&path, readers)?, Origin::Loaded))
            }
            Err(source) => Err(KeyError::Write { path, source }),
        }
    }

    /// Returns what a store knows the key by: a value derived from the key, from which the key cannot be had.
    pub fn fingerprint(&self) -> String {
        let mut bytes = [0; FINGERPRINT_BYTES];
        let derived = Salt::new(HKDF_SHA256, &[]).extract(&self.0);
        derived
            .expand(FINGERPRINT_LABEL, FingerprintLength)
            .and_then(|derived| derived.fill(&mut bytes))
            .expect("HKDF-SHA256 gives 16 bytes");
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The key in the file `path`.
    ///
    /// # Errors
    /// There is none, others can read or write it, or it holds something else.
    pub fn load(path: &Path, readers: SecretReaders) -> Result<FleetKey, KeyError> {
        let read = |source| KeyError::Read {
            path: path.to_owned(),
            source,
        };
        let file = open_secret(path, readers).map_err(|error| match error {
            SecretError::Read { source, .. } => read(source),
            SecretError::Exposed(exposed) => KeyError::Exposed(exposed),
        })?;
        let mut text = Vec::new();
        // More than a key, so that too long a file is seen, and not whatever the file holds.
        file.take(4 * KEY_DIGITS as u64)
            .read_to_end(&mut text)
            .map_err(read)?;
        FleetKey::parse(path, text.trim_ascii())
    }

    /// A key from elsewhere.
    pub fn from_bytes(key: [u8; KEY_BYTES]) -> FleetKey {
        FleetKey(key)
    }

    /// The key itself.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    fn generate() -> Result<FleetKey, KeyError> {
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)?;
        Ok(FleetKey(key))
    }

    fn parse(path: &Path, digits: &[u8]) -> Result<FleetKey, KeyError> {
        let path = path.to_owned();
        let key = key_of_digits(digits).map_err(|source| KeyError::Digits { path, source });
        Ok(FleetKey(key?))
    }

    fn store(&self, dir: &Path) -> io::Result<()> {
        let mut text = String::with_capacity(KEY_DIGITS + 1);
        for byte in self.0 {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push('\n');
        create_secret(&dir.join(KEY_FILE), &text)
    }
}

/// The key that 64 hexadecimal digits stand for.
pub(crate) fn key_of_digits(digits: &[u8]) -> Result<[u8; KEY_BYTES], DigitsError> {
    if digits.len() != KEY_DIGITS {
        return Err(DigitsError::Length(digits.len()));
    }
    let mut key = [0; KEY_BYTES];
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let (Some(high), Some(low)) = (nibble(pair[0]), nibble(pair[1])) else {
            return Err(DigitsError::NotHex);
        };
        *byte = high << 4 | low;
    }
    Ok(key)
}

/// The length of a fingerprint, as ring asks for it.
struct FingerprintLength;

impl KeyType for FingerprintLength {
    fn len(&self) -> usize {
        FINGERPRINT_BYTES
    }
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

impl fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetKey(secret)")
    }
}

/// Makes the data directory, for this user only, unless it is there; then it must be writable.
///
/// # Errors
/// It cannot be made or written.
pub fn create_data_dir(dir: &Path) -> Result<(), KeyError> {
    create_private_dir(dir).map_err(|source| KeyError::DataDir {
        path: dir.to_owned(),
        source,
    })
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

fn nibble(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
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

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn create_or_load(dir: &Path) -> Result<(FleetKey, Origin), KeyError> {
        create_data_dir(dir)?;
        match FleetKey::find(dir, SecretReaders::Owner)? {
            Some(key) => Ok((key, Origin::Loaded)),
            None => FleetKey::create(dir, SecretReaders::Owner),
        }
    }

    fn load(path: &Path) -> Result<FleetKey, KeyError> {
        FleetKey::load(path, SecretReaders::Owner)
    }

    /// A file that nobody else can read, with this text.
    fn key_file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        fs::write(&path, text).unwrap();
        chmod(&path, 0o600);
        (dir, path)
    }

    #[test]
    fn a_key_is_created_once_and_loaded_after() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("a/data");
        let (created, origin) = create_or_load(&dir).unwrap();
        assert_eq!(origin, Origin::Created);
        assert_eq!(mode(&dir), 0o700);
        let path = dir.join(KEY_FILE);
        assert_eq!(mode(&path), 0o600);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.len(), 65);
        assert!(
            text.ends_with('\n')
                && text
                    .trim()
                    .bytes()
                    .all(|b| b"0123456789abcdef".contains(&b))
        );
        // Nothing else is left behind: neither a draft nor a probe.
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);

        let (loaded, origin) = create_or_load(&dir).unwrap();
        assert_eq!(origin, Origin::Loaded);
        assert_eq!(loaded, created);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        assert_eq!(load(&path).unwrap(), created);
        assert_ne!(create_or_load(&tmp.path().join("b")).unwrap().0, created);
    }

    #[test]
    fn bytes_are_those_of_the_digits() {
        let text: String = (0..32).map(|byte| format!("{:02X}", byte * 7)).collect();
        let (_dir, path) = key_file(&text);
        let key = load(&path).unwrap();
        assert_eq!(key.as_bytes()[..3], [0, 7, 14]);
        assert_eq!(key.as_bytes()[31], 217);
    }

    #[test]
    fn a_key_that_others_can_touch_is_refused() {
        let (dir, path) = key_file(&"ab".repeat(32));
        for (mode, says) in [
            (0o644, "has mode 0644: others can read it"),
            (0o640, "has mode 0640: its group can read it"),
            (0o602, "has mode 0602: others can write it"),
            (0o620, "has mode 0620: its group can write it"),
            (0o666, "has mode 0666: others can read and write it"),
        ] {
            chmod(&path, mode);
            for refused in [
                load(&path).unwrap_err(),
                create_or_load(dir.path()).unwrap_err(),
            ] {
                let refused = refused.to_string();
                assert!(refused.contains(says), "{refused}");
                assert!(
                    refused.ends_with(&format!("run chmod 600 {}", path.display())),
                    "{refused}"
                );
            }
        }
        for mode in [0o600, 0o400] {
            chmod(&path, mode);
            assert!(load(&path).is_ok(), "{mode:o}");
        }
    }

    #[test]
    fn the_group_may_read_a_key_if_the_operator_says_so() {
        let (_dir, path) = key_file(&"ab".repeat(32));
        let load = || FleetKey::load(&path, SecretReaders::Group);
        for mode in [0o640, 0o440, 0o600] {
            chmod(&path, mode);
            assert!(load().is_ok(), "{mode:o}");
        }
        for mode in [0o660, 0o620, 0o644, 0o641 | 0o004] {
            chmod(&path, mode);
            assert!(load().is_err(), "{mode:o}");
        }
        // A group that this process is not in; only a privileged user can give the file to it.
        chmod(&path, 0o640);
        let foreign = (50_000..).find(|gid| !is_own_group(*gid));
        if std::os::unix::fs::chown(&path, None, foreign).is_ok() {
            let refused = load().unwrap_err().to_string();
            assert!(refused.contains("not in that group"), "{refused}");
        }
    }

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

    #[test]
    fn a_fingerprint_is_the_key_s_own_and_not_the_key() {
        let keys = [[7; KEY_BYTES], [8; KEY_BYTES]].map(FleetKey::from_bytes);
        let prints = keys.each_ref().map(FleetKey::fingerprint);
        assert_eq!(prints[0].len(), 2 * FINGERPRINT_BYTES);
        assert_ne!(prints[0], prints[1]);
        assert_eq!(
            prints[0],
            FleetKey::from_bytes([7; KEY_BYTES]).fingerprint()
        );
        assert!(!prints[0].contains("0707"));
    }

    #[test]
    fn what_is_no_key_is_refused_and_kept() {
        for (text, says) in [
            ("", "holds 0 characters"),
            (&*"ab".repeat(31), "holds 62 characters"),
            (&*"ab".repeat(33), "holds 66 characters"),
            (&*"xy".repeat(32), "other characters than hexadecimal"),
            (&*"+1".repeat(32), "other characters than hexadecimal"),
        ] {
            let (dir, path) = key_file(text);
            let refused = create_or_load(dir.path()).unwrap_err().to_string();
            assert!(refused.contains(says), "{text}: {refused}");
            assert_eq!(fs::read_to_string(path).unwrap(), text);
        }
    }

    #[test]
    fn no_message_tells_the_key() {
        let (_dir, path) = key_file(&"ab".repeat(32));
        let shown = format!("{:?}", load(&path).unwrap());
        assert_eq!(shown, "FleetKey(secret)");
        let (_dir, path) = key_file(&"q1".repeat(32));
        let error = load(&path).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("q1"));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_one_line() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = create_or_load(&file.join("data")).unwrap_err().to_string();
        assert!(
            refused.starts_with("cannot write the data directory"),
            "{refused}"
        );
        assert_eq!(refused.lines().count(), 1);
    }
}
