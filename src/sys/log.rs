//! Writes log lines to stderr. Lines wait in memory, and a thread writes them: a reader that
//! stalls, a full disk or a closed terminal blocks nothing else.
//!
//! Invariants
//! - Logging never blocks, fails or panics, whatever happens to stderr.
//! - At most [`WAITING_BYTES_MAX`] bytes wait, plus urgent lines. Further lines are dropped and
//!   counted; the count is logged in one line once all waiting lines are written.
//! - A line that could not be written is retried until it is written or the process ends.

use std::io::{self, ErrorKind, Write};
use std::panic::PanicHookInfo;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Maximum size of waiting lines, in bytes.
pub const WAITING_BYTES_MAX: usize = 1 << 20;
/// Maximum size of one write in bytes, unless a single line is longer: a pipe accepts this much
/// without mixing it with the output of other processes.
const WRITE_BYTES_MAX: usize = 4096;
/// First and longest delay before a failed write is retried.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// How long a panic waits for its line to be written: the process may be about to abort.
const PANIC_FLUSH: Duration = Duration::from_millis(100);

/// The process's log writer.
static STDERR: OnceLock<LogWriter> = OnceLock::new();

/// Returns the process's log writer; the first call starts its thread.
///
/// # Errors
/// The system cannot start a thread.
pub fn stderr() -> io::Result<LogWriter> {
    if let Some(writer) = STDERR.get() {
        return Ok(writer.clone());
    }
    let report = |lines| tracing::warn!(lines, "log lines dropped: stderr was blocked");
    let writer = LogWriter::start(io::stderr(), report)?;
    Ok(STDERR.get_or_init(|| writer).clone())
}

/// Writes a line to stderr even if the log is full: usually the reason why the program ends.
pub fn urgent(line: &str) {
    match STDERR.get() {
        Some(writer) => writer.push_urgent(line),
        None => drop(writeln!(io::stderr(), "{line}")),
    }
}

/// Waits until all lines are written to stderr, a write fails, or `patience` is over.
pub fn flush(patience: Duration) {
    if let Some(writer) = STDERR.get() {
        writer.flush(patience);
    }
}

/// Logs a panic. Replaces the standard hook, which writes to stderr itself and may block.
pub fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let reason = panic.payload_as_str().unwrap_or("no reason given");
    let place = panic.location().map(ToString::to_string);
    let place = place.unwrap_or_default();
    let backtrace = std::backtrace::Backtrace::capture();
    match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => {
            tracing::error!(thread, place, reason, %backtrace, "panicked");
        }
        _ => tracing::error!(thread, place, reason, "panicked"),
    }
    flush(PANIC_FLUSH);
}

/// Queues lines that a thread writes. Clones share both.
#[derive(Clone, Debug)]
pub struct LogWriter(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signals that the thread has work.
    work: Condvar,
    /// Signals that lines were written or a write failed.
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whole lines that the thread has not taken yet.
    waiting: Vec<u8>,
    /// Number of bytes that the thread has taken but not written.
    writing: usize,
    /// Number of lines dropped but not reported.
    lost: u64,
    is_reporting: bool,
    /// Number of calls of `flush`; each one retries a failed write immediately.
    flushes: u64,
    /// Number of failed writes.
    failures: u64,
}

impl State {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.writing == 0 && self.lost == 0 && !self.is_reporting
    }
}

impl LogWriter {
    /// Starts a thread that writes to `out`. `report` is called with the number of lost lines, and
    /// logs it.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start(
        out: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<LogWriter> {
        let shared = Arc::new(Shared::default());
        let writer = LogWriter(Arc::clone(&shared));
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || shared.run(out, report))?;
        Ok(writer)
    }

    /// Queues whole lines, or drops and counts them if too many are waiting.
    fn push(&self, lines: &[u8]) {
        let mut state = self.0.lock();
        if state.waiting.len() + state.writing + lines.len() > WAITING_BYTES_MAX {
            state.lost += 1;
            self.0.work.notify_one();
            return;
        }
        state.waiting.extend_from_slice(lines);
        self.0.work.notify_one();
    }

    /// Queues a line regardless of the limit.
    pub fn push_urgent(&self, line: &str) {
        let mut state = self.0.lock();
        state.waiting.extend_from_slice(line.as_bytes());
        state.waiting.push(b'\n');
        self.0.work.notify_one();
    }

    /// Waits until all is written, a write fails, or `patience` is over.
    pub fn flush(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut state = self.0.lock();
        state.flushes += 1;
        self.0.work.notify_one();
        let failures = state.failures;
        while !state.is_idle() && state.failures == failures {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.0.news.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the thread.
    fn run(&self, mut out: impl Write, report: impl Fn(u64)) {
        let mut lines = Vec::new();
        loop {
            self.take(&mut lines);
            self.write(&mut out, &lines);
            lines.clear();
            lines.shrink_to(WRITE_BYTES_MAX);
            self.report_lost(&report);
        }
    }

    /// Waits for lines, or for lost ones to report, and moves the lines to `lines`, which is empty.
    fn take(&self, lines: &mut Vec<u8>) {
        let mut state = self.lock();
        while state.waiting.is_empty() && state.lost == 0 {
            state = { self.work.wait(state) }.unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.waiting, lines);
        state.writing = lines.len();
    }

    /// Writes all of `lines`, however long that takes.
    fn write(&self, out: &mut impl Write, lines: &[u8]) {
        let mut retry_after = RETRY_MIN;
        let mut rest = lines;
        while !rest.is_empty() {
            match out.write(first_lines(rest)).and_then(not_zero) {
                Ok(count) => {
                    rest = &rest[count..];
                    retry_after = RETRY_MIN;
                    self.lock().writing = rest.len();
                    self.news.notify_all();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.wait_to_retry(retry_after);
                    retry_after = (retry_after * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Waits after a failed write, until the delay is over or a caller flushes.
    fn wait_to_retry(&self, retry_after: Duration) {
        let until = Instant::now() + retry_after;
        let mut state = self.lock();
        state.failures += 1;
        self.news.notify_all();
        let flushes = state.flushes;
        while state.flushes == flushes {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.work.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reports lost lines once no lines are waiting.
    fn report_lost(&self, report: &impl Fn(u64)) {
        let mut state = self.lock();
        if !state.waiting.is_empty() || state.lost == 0 {
            return;
        }
        let lost = std::mem::take(&mut state.lost);
        state.is_reporting = true;
        drop(state);
        report(lost);
        self.lock().is_reporting = false;
        self.news.notify_all();
    }
}

fn not_zero(count: usize) -> io::Result<usize> {
    match count {
        0 => Err(ErrorKind::WriteZero.into()),
        count => Ok(count),
    }
}

/// Returns as many whole lines as fit into one write, or a part of the first.
fn first_lines(lines: &[u8]) -> &[u8] {
    let most = &lines[..lines.len().min(WRITE_BYTES_MAX)];
    match most.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => &most[..=end],
        None => most,
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = &'a LogWriter;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

/// Each call writes the whole text of one event.
impl Write for &LogWriter {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.push(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A stderr whose writes each wait for a result from the test.
    struct Scripted {
        script: Receiver<io::Result<()>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // After the script has ended, all writes succeed.
            self.script.recv().unwrap_or(Ok(()))?;
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Trial {
        writer: LogWriter,
        script: Option<Sender<io::Result<()>>>,
        written: Arc<Mutex<Vec<u8>>>,
        lost: Arc<AtomicU64>,
    }

    impl Trial {
        fn new() -> Trial {
            let (sender, script) = channel();
            let written = Arc::default();
            let out = Scripted {
                script,
                written: Arc::clone(&written),
            };
            let lost = Arc::new(AtomicU64::new(0));
            let sum = Arc::clone(&lost);
            let report = move |lines| {
                sum.fetch_add(lines, Ordering::SeqCst);
            };
            Trial {
                writer: LogWriter::start(out, report).unwrap(),
                script: Some(sender),
                written,
                lost,
            }
        }

        fn say(&self, word: io::Result<()>) {
            self.script.as_ref().unwrap().send(word).unwrap();
        }

        fn line(&self, line: &str) {
            (&self.writer).write_all(line.as_bytes()).unwrap();
        }

        /// Makes all further writes succeed.
        fn recover(&mut self) {
            self.script = None;
        }

        fn written(&self) -> String {
            String::from_utf8(self.written.lock().unwrap().clone()).unwrap()
        }
    }

    #[test]
    fn lines_are_written_in_order_and_flushed() {
        let mut trial = Trial::new();
        trial.recover();
        let lines: Vec<String> = (0..5000).map(|i| format!("line {i}\n")).collect();
        lines.iter().for_each(|line| trial.line(line));
        trial.writer.flush(PATIENCE);
        assert_eq!(trial.written(), lines.concat());
    }

    #[test]
    fn a_stalled_stderr_blocks_nothing_and_all_lost_lines_are_reported() {
        let mut trial = Trial::new();
        let line = format!("{}\n", "x".repeat(1023));
        let pushed = 3 * WAITING_BYTES_MAX / line.len();
        // If a push waited, it would wait for the test itself.
        (0..pushed).for_each(|_| trial.line(&line));
        trial.writer.push_urgent("the end");
        trial.recover();
        trial.writer.flush(PATIENCE);
        let written = trial.written();
        let count = written.matches(&line).count();
        assert_eq!(count, WAITING_BYTES_MAX / line.len());
        assert!(written.ends_with("the end\n"));
        assert_eq!(
            trial.lost.load(Ordering::SeqCst),
            (pushed - count) as u64,
            "lost lines are reported"
        );
    }

    #[test]
    fn a_line_that_cannot_be_written_is_retried() {
        let mut trial = Trial::new();
        trial.line("first\n");
        for kind in [
            ErrorKind::BrokenPipe,
            ErrorKind::StorageFull,
            ErrorKind::WouldBlock,
        ] {
            trial.say(Err(kind.into()));
        }
        trial.line("second\n");
        trial.recover();
        // A flush ends at a failure, so that it ends even if no write succeeds.
        while trial.written().lines().count() < 2 {
            trial.writer.flush(PATIENCE);
        }
        assert_eq!(trial.written(), "first\nsecond\n");
    }

    #[test]
    fn a_flush_ends_even_if_stderr_is_not_read() {
        let trial = Trial::new();
        trial.line("stalled\n");
        trial.writer.flush(Duration::from_millis(1));
        assert_eq!(trial.written(), "");
    }
}
