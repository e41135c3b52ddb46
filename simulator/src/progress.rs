//! Progress of a run on stderr: a bar on a terminal, otherwise a line every few seconds.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::say;

/// Time of the first line without a terminal, and interval between further lines.
const FIRST_LINE: Duration = Duration::from_secs(2);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A progress bar, or progress lines without a terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    next_line: Duration,
}

impl Progress {
    /// Creates a progress display that ends at `length`, in the caller's unit: frames or milliseconds.
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
        bar.set_style(style.expect("the template is valid, as a test shows"));
        Self {
            bar,
            started: Instant::now(),
            next_line: FIRST_LINE,
        }
    }

    /// Shows the position and a short text, such as the rate.
    pub fn show(&mut self, position: u64, words: String) {
        let elapsed = self.started.elapsed();
        if self.bar.is_hidden() && elapsed >= self.next_line {
            self.next_line = elapsed + LINE_EVERY;
            say::note(format_args!("{:4} s: {words}", elapsed.as_secs()));
        }
        self.bar.set_position(position);
        self.bar.set_message(words);
    }

    /// Writes a separate line without disturbing the bar.
    pub fn say(&self, line: &str) {
        match self.bar.is_hidden() {
            true => say::note(line),
            false => self.bar.println(line),
        }
    }
}

/// Removes the bar, so that only the report remains.
impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Returns the rate of `readings acked` within a time, as text for [`Progress::show`].
pub fn rate(readings_acked: u64, within: Duration) -> String {
    let rate = readings_acked as f64 / within.as_secs_f64().max(0.001);
    format!("{rate:.0} readings/s acked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_progress_and_its_template_is_valid() {
        let mut progress = Progress::on(ProgressDrawTarget::hidden(), 100);
        progress.show(40, rate(500, Duration::from_secs(2)));
        assert_eq!(
            (progress.bar.position(), progress.bar.message()),
            (40, "250 readings/s acked".into())
        );
        let bar = progress.bar.clone();
        drop(progress);
        assert!(bar.is_finished());
    }
}
