//! Identity of this gateway among all gateways of a database: a random name in the data directory,
//! which outlives the process. It is not a secret.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Name of the file in the data directory.
pub const ID_FILE: &str = "gateway.id";
const ID_DIGITS: usize = 32;

/// Returns the gateway's name; the first call for a data directory creates and stores it.
///
/// # Errors
/// The file cannot be read or written.
pub fn load_or_create(data_dir: &Path) -> io::Result<String> {
    let path = data_dir.join(ID_FILE);
    match fs::read_to_string(&path) {
        Ok(text) if is_id(text.trim()) => return Ok(text.trim().to_owned()),
        // A crash may have left the file empty.
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = random_id()?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    writeln!(file, "{id}")?;
    file.sync_all()?;
    Ok(id)
}

fn random_id() -> io::Result<String> {
    let draw = || getrandom::u64().map_err(io::Error::other);
    Ok(format!("{:016x}{:016x}", draw()?, draw()?))
}

fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_keeps_its_name_and_replaces_a_damaged_one() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = load_or_create(one.path()).unwrap();
        assert_eq!(load_or_create(one.path()).unwrap(), id);
        assert_ne!(load_or_create(other.path()).unwrap(), id);
        fs::write(one.path().join(ID_FILE), "").unwrap();
        let drawn = load_or_create(one.path()).unwrap();
        assert!(is_id(&drawn) && drawn != id);
    }
}
