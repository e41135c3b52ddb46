//! Limit of open files and sockets of this process.
//!
//! A shell usually allows a program 1,024 open files, and lets it raise the limit. Child processes
//! inherit the raised limit.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit to its maximum and returns it; `None` if there is no limit.
pub fn raise() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let is_raised = current == maximum || setrlimit(Resource::Nofile, raised).is_ok();
    if is_raised { maximum } else { current }
}

/// Returns the maximum to which the limit can be raised; `None` if there is no limit.
pub fn maximum() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        let raised = raise();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!((current, raised), (maximum, maximum));
    }
}
