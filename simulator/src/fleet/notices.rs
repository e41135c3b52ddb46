//! Messages for people about what the fleet is waiting for: one per reason, at a limited rate.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Minimum interval between two lines for the same reason.
const EVERY: Duration = Duration::from_secs(10);
/// Maximum number of reasons that are counted separately.
const REASONS_MAX: usize = 32;

/// Events since the last lines.
#[derive(Debug, Default)]
pub struct Notices {
    reasons: BTreeMap<String, Reason>,
}

#[derive(Debug)]
struct Reason {
    /// Occurrences since the last line.
    new: u64,
    /// Detail of the latest occurrence.
    detail: String,
    next_line_at: Option<Instant>,
}

impl Notices {
    /// Counts an occurrence of a reason.
    pub fn note(&mut self, reason: &str, detail: String) {
        if let Some(known) = self.reasons.get_mut(reason) {
            known.new += 1;
            known.detail = detail;
        } else if self.reasons.len() < REASONS_MAX {
            let first = Reason {
                new: 1,
                detail,
                next_line_at: None,
            };
            self.reasons.insert(reason.to_owned(), first);
        }
    }

    /// Returns the lines that are due.
    pub fn take(&mut self, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        for (reason, state) in &mut self.reasons {
            let is_due = state.next_line_at.is_none_or(|at| now >= at);
            if state.new == 0 || !is_due {
                continue;
            }
            let times = match state.new {
                1 => String::new(),
                times => format!(", {times} times"),
            };
            lines.push(format!("{reason}{times}; {}", state.detail));
            state.new = 0;
            state.next_line_at = Some(now + EVERY);
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_line_immediately_and_then_at_intervals() {
        let (mut notices, start) = (Notices::default(), Instant::now());
        notices.note("waiting: BYE 44", "a".into());
        notices.note("waiting: closed", "b".into());
        let lines = ["waiting: BYE 44; a", "waiting: closed; b"];
        assert_eq!(notices.take(start), lines);
        notices.note("waiting: BYE 44", "c".into());
        notices.note("waiting: BYE 44", "d".into());
        assert!(notices.take(start + EVERY / 2).is_empty());
        assert_eq!(notices.take(start + EVERY), ["waiting: BYE 44, 2 times; d"]);
        assert!(notices.take(start + EVERY * 3).is_empty());
    }

    #[test]
    fn reasons_are_bounded() {
        let mut notices = Notices::default();
        (0..1000).for_each(|n| notices.note(&n.to_string(), String::new()));
        assert_eq!(notices.take(Instant::now()).len(), REASONS_MAX);
    }
}
