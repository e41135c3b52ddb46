//! The fleet key, from which every device's own key derives, and the directory it lives in.
//!
//! Deriving is the protocol's business.
//!
//! Invariants
//! - The key is in no message of this module, nor in anything's `Debug`.
//! - A key that is there is never written over.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use fieldgate_protocol::auth::KEY_BYTES;
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};

use crate::sys::secret_file::{
    Exposed, SecretError, SecretReaders, create_private_dir, create_secret, open_secret, user_hint,
};

/// Name of the key's file within the data directory.
pub const KEY_FILE: &str = "fleet.key";

const KEY_DIGITS: usize = 2 * KEY_BYTES;

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

fn nibble(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::sys::secret_file::is_own_group;

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
