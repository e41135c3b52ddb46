//! The fleet key, from which every device's own key derives, and the directory it lives in; and how any
//! file is opened that only this user may touch.
//!
//! Deriving is the protocol's business. Unix only: the secrecy of the file rests on its mode.
//!
//! Invariants
//! - The key is in no message of this module, nor in anything's `Debug`.
//! - `fleet.key` is there whole or not at all, whatever moment the power fails: it is written and
//!   synced under another name, and linked to its own only then.
//! - A key that is there is never written over.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fieldgate_protocol::auth::KEY_BYTES;

/// Name of the key's file within the data directory.
pub const KEY_FILE: &str = "fleet.key";

const KEY_DIGITS: usize = 2 * KEY_BYTES;
/// Reading and writing, by the group and by others.
const FOREIGN_ACCESS: u32 = 0o066;

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

/// A secret that others than its user can touch.
#[derive(Debug, thiserror::Error)]
#[error("{0} has mode {mode:04o}: {1} can {2} it; run chmod 600 {0}", path.display(), whom(*mode), what(*mode))]
pub struct Exposed {
    /// Which file.
    path: PathBuf,
    /// Its mode.
    mode: u32,
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

/// Opens a file for reading that nobody but its user may read or write.
///
/// # Errors
/// It cannot be read, or others could, too.
pub fn open_secret(path: &Path) -> Result<File, SecretError> {
    let read = |source| SecretError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read)?;
    let mode = file.metadata().map_err(read)?.permissions().mode() & 0o7777;
    if mode & FOREIGN_ACCESS != 0 {
        let path = path.to_owned();
        return Err(SecretError::Exposed(Exposed { path, mode }));
    }
    Ok(file)
}

impl FleetKey {
    /// The key in the data directory `dir`; makes both where they are missing.
    ///
    /// # Errors
    /// The directory cannot be written, or the key that is there is not fit for use.
    pub fn create_or_load(dir: &Path) -> Result<(FleetKey, Origin), KeyError> {
        create_data_dir(dir)?;
        let path = dir.join(KEY_FILE);
        // An exposed or damaged key must be seen, not replaced.
        if fs::symlink_metadata(&path).is_ok() {
            return Ok((FleetKey::load(&path)?, Origin::Loaded));
        }
        let key = FleetKey::generate()?;
        match key.store(dir) {
            Ok(()) => Ok((key, Origin::Created)),
            // Another process was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok((FleetKey::load(&path)?, Origin::Loaded))
            }
            Err(source) => Err(KeyError::Write { path, source }),
        }
    }

    /// The key in the file `path`.
    ///
    /// # Errors
    /// There is none, others can read or write it, or it holds something else.
    pub fn load(path: &Path) -> Result<FleetKey, KeyError> {
        let read = |source| KeyError::Read {
            path: path.to_owned(),
            source,
        };
        let file = open_secret(path).map_err(|error| match error {
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

/// Makes a file that nobody but this user may read or write; it is there whole or not at all.
///
/// # Errors
/// It is there already, or cannot be written.
pub fn create_secret(path: &Path, text: &str) -> io::Result<()> {
    let draft = draft_of(path)?;
    // Unlike a rename, a link fails where there is a file already.
    let written = write_secret(&draft, text).and_then(|()| fs::hard_link(&draft, path));
    let removed = fs::remove_file(&draft);
    written?;
    removed?;
    File::open(dir_of(path))?.sync_all()
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
    File::open(dir_of(path))?.sync_all()
}

/// Makes a file that nobody but this user may read or write, durably.
///
/// # Errors
/// It is there already, or cannot be written.
pub fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
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
    File::open(dir_of(dir))?.sync_all()
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
        let (created, origin) = FleetKey::create_or_load(&dir).unwrap();
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

        let (loaded, origin) = FleetKey::create_or_load(&dir).unwrap();
        assert_eq!(origin, Origin::Loaded);
        assert_eq!(loaded, created);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        assert_eq!(FleetKey::load(&path).unwrap(), created);
        assert_ne!(
            FleetKey::create_or_load(&tmp.path().join("b")).unwrap().0,
            created
        );
    }

    #[test]
    fn bytes_are_those_of_the_digits() {
        let text: String = (0..32).map(|byte| format!("{:02X}", byte * 7)).collect();
        let (_dir, path) = key_file(&text);
        let key = FleetKey::load(&path).unwrap();
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
                FleetKey::load(&path).unwrap_err(),
                FleetKey::create_or_load(dir.path()).unwrap_err(),
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
            assert!(FleetKey::load(&path).is_ok(), "{mode:o}");
        }
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
            let refused = FleetKey::create_or_load(dir.path())
                .unwrap_err()
                .to_string();
            assert!(refused.contains(says), "{text}: {refused}");
            assert_eq!(fs::read_to_string(path).unwrap(), text);
        }
    }

    #[test]
    fn no_message_tells_the_key() {
        let (_dir, path) = key_file(&"ab".repeat(32));
        let shown = format!("{:?}", FleetKey::load(&path).unwrap());
        assert_eq!(shown, "FleetKey(secret)");
        let (_dir, path) = key_file(&"q1".repeat(32));
        let error = FleetKey::load(&path).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("q1"));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_one_line() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = FleetKey::create_or_load(&file.join("data"))
            .unwrap_err()
            .to_string();
        assert!(
            refused.starts_with("cannot write the data directory"),
            "{refused}"
        );
        assert_eq!(refused.lines().count(), 1);
    }
}
