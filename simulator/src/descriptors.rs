//! Raises the limit on open files to what a fleet needs.

use fieldgate::sys::open_files::raise;

/// Open files that the process needs in addition to the devices' sockets.
const OTHERS: u64 = 64;

/// The limit on open files is too low.
#[derive(Debug, thiserror::Error)]
#[error(
    "{devices} devices need {needed} open files, but the limit is {limit}; raise the hard limit \
    (`ulimit -Hn`) or use fewer devices"
)]
pub struct TooFew {
    devices: u32,
    needed: u64,
    limit: u64,
}

/// Raises the limit as far as possible and fails if that is too low for this many devices.
pub fn raise_for(devices: u32) -> Result<(), TooFew> {
    check(devices, raise())
}

/// Checks a limit; `None` means unlimited.
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
    fn the_error_for_a_low_limit_says_how_to_raise_it() {
        assert!(check(10, None).is_ok());
        assert!(check(10, Some(10 + OTHERS)).is_ok());
        let error = check(10, Some(9 + OTHERS)).unwrap_err().to_string();
        assert!(
            error.contains("ulimit -Hn") && error.contains("10 devices need 74"),
            "{error}"
        );
    }
}
