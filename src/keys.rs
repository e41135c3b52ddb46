//! The fleet key and its file: 64 hexadecimal digits that nobody but the owner may read.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fieldgate_protocol::auth::KEY_BYTES;

/// The key's file in the data directory.
pub const KEY_FILE: &str = "fleet.key";

/// The secret from which every device's key derives.
#[derive(Clone)]
pub struct FleetKey([u8; KEY_BYTES]);

/// Shows no secret.
impl std::fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FleetKey(..)")
    }
}

/// Whether a key was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOrigin {
    /// Made now.
    Created,
    /// Found.
    Loaded,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// No such file.
    #[error("no key file at {0}; `fieldgate serve` makes one in its data directory")]
    Missing(PathBuf),
    /// Others may read it, so it is no secret any more.
    #[error("{path} has mode {mode:04o}: others can read it; run `chmod 600 {path}`", path = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a key.
    #[error("{0} is not a key file: it must hold 64 hexadecimal digits")]
    Malformed(PathBuf),
    /// The system refuses.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

impl FleetKey {
    /// Loads the key of a data directory; makes directory (mode 0700) and key (0600) where there are
    /// none.
    pub fn create_or_load(data_dir: &Path) -> Result<(FleetKey, KeyOrigin), KeyError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| KeyError::Io {
                action,
                path,
                source,
            }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir)
            .map_err(io("create the data directory", data_dir))?;
        let path = data_dir.join(KEY_FILE);
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let mut file = match created {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Ok((FleetKey::load(&path)?, KeyOrigin::Loaded));
            }
            Err(source) => return Err(io("write", &path)(source)),
        };
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)
            .map_err(|error| io("draw a key for", &path)(io::Error::other(error)))?;
        let mut text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        text.push('\n');
        // A key that devices were flashed with must not be lost with the power.
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(data_dir)?.sync_all())
            .map_err(io("write", &path))?;
        Ok((FleetKey(key), KeyOrigin::Created))
    }

    /// Loads the key at `path`.
    pub fn load(path: &Path) -> Result<FleetKey, KeyError> {
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => KeyError::Missing(path.to_owned()),
            _ => KeyError::Io {
                action: "read",
                path: path.to_owned(),
                source,
            },
        };
        let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let mut text = String::new();
        // A file of any length may be named by mistake.
        let read = File::open(path)
            .map_err(io)?
            .take(200)
            .read_to_string(&mut text);
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => return Err(io(error)),
        }
        parse(text.trim_end())
            .map(FleetKey)
            .ok_or_else(|| KeyError::Malformed(path.to_owned()))
    }

    /// The secret itself.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

fn parse(text: &str) -> Option<[u8; KEY_BYTES]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * KEY_BYTES || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut key = [0; KEY_BYTES];
    for (byte, pair) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("a/b");
        let (made, origin) = FleetKey::create_or_load(&data_dir).unwrap();
        assert_eq!(origin, KeyOrigin::Created);
        let (found, origin) = FleetKey::create_or_load(&data_dir).unwrap();
        assert_eq!(origin, KeyOrigin::Loaded);
        assert_eq!(made.as_bytes(), found.as_bytes());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            (mode(&data_dir), mode(&data_dir.join(KEY_FILE))),
            (0o700, 0o600)
        );
        assert_eq!(format!("{made:?}"), "FleetKey(..)");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        FleetKey::create_or_load(dir.path()).unwrap();
        let path = dir.path().join(KEY_FILE);
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(
                matches!(FleetKey::load(&path), Err(KeyError::Exposed { .. })),
                "{mode:o}"
            );
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        assert!(matches!(FleetKey::load(&path), Err(KeyError::Missing(_))));
        let long = "0".repeat(65);
        let foreign = "x".repeat(64);
        for text in ["", "abc", long.as_str(), foreign.as_str(), "\u{fffd}\u{0}"] {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(
                matches!(FleetKey::load(&path), Err(KeyError::Malformed(_))),
                "{text}"
            );
        }
    }
}
