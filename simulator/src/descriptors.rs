//! How many files and sockets this process may have open at once.
//!
//! A shell usually lets a program have 1,024, and lets it ask for more. Programs that are started
//! afterwards inherit what was asked for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let is_raised = current == maximum || setrlimit(Resource::Nofile, raised).is_ok();
    check(devices, if is_raised { maximum } else { current })
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

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        raise_for(1).unwrap();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
    }
}
