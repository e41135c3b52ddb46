//! Whether this process may have as many sockets open at once as a fleet needs.

use fieldgate::sys::open_files::raise;

/// What a process needs besides the sockets of its devices.
const OTHERS: u64 = 64;

/// The system grants too few.
#[derive(Debug, thiserror::Error)]
#[error(
    "{devices} devices need {needed} open files, and the system lets this user have {limit}: raise the \
     hard limit (see `ulimit -Hn`), or take fewer devices"
)]
pub struct TooFew {
    devices: u32,
    needed: u64,
    limit: u64,
}

/// Asks for as many as there can be, which must suffice for this many devices.
pub fn raise_for(devices: u32) -> Result<(), TooFew> {
    check(devices, raise())
}

/// `None` is no limit.
fn check(devices: u32, limit: Option<u64>) -> Result<(), TooFew> {
    let needed = u64::from(devices) + OTHERS;
    match limit {
        Some(limit) if limit < needed => Err(TooFew {
            devices,
            needed,
            limit,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_does_not_suffice_is_told_with_its_mend() {
        assert!(check(10, None).is_ok());
        assert!(check(10, Some(10 + OTHERS)).is_ok());
        let told = check(10, Some(9 + OTHERS)).unwrap_err().to_string();
        assert!(
            told.contains("ulimit -Hn") && told.contains("10 devices need 74"),
            "{told}"
        );
    }
}
