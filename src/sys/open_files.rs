//! How many files and sockets this process may have open at once.
//!
//! A shell usually lets a program have 1,024, and lets it ask for more. Programs that are started
//! afterwards inherit what was asked for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Asks for as many as there can be, and tells how many there are; `None` is no limit.
pub fn raise() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let is_raised = current == maximum || setrlimit(Resource::Nofile, raised).is_ok();
    if is_raised { maximum } else { current }
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
