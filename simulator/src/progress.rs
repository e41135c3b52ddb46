//! How far a run is, for someone who watches.
//!
//! A bar on a terminal, on stderr; nothing at all in a pipe, so that logs stay readable. When to
//! update it is left to the fleet; once a second is enough.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// A bar from nothing to the end of a run.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar that ends at `length`, which is whatever the caller counts: frames, or milliseconds.
    pub fn new(length: u64) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        Self::on(target, length)
    }

    fn on(target: ProgressDrawTarget, length: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(length), target);
        let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {percent}%  {msg}");
        bar.set_style(style.expect("the template is right, as a test shows"));
        Self { bar }
    }

    /// Shows how far the run is, and beside it a few words, such as the rate.
    pub fn show(&self, position: u64, words: String) {
        self.bar.set_position(position);
        self.bar.set_message(words);
    }

    /// Takes the bar away, so that the report stands alone.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// `readings acked` within a time, in words for [`Progress::show`].
pub fn rate(readings_acked: u64, within: Duration) -> String {
    let rate = readings_acked as f64 / within.as_secs_f64().max(0.001);
    format!("{rate:.0} readings/s acked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_follows_and_its_template_is_right() {
        let progress = Progress::on(ProgressDrawTarget::hidden(), 100);
        progress.show(40, rate(500, Duration::from_secs(2)));
        assert_eq!(
            (progress.bar.position(), progress.bar.message()),
            (40, "250 readings/s acked".into())
        );
        progress.clear();
        assert!(progress.bar.is_finished());
    }
}
