//! Logs of the processes of a test run, and the secrets that must not occur in them: with `FIELDGATE_TEST_LOGS`, a
//! directory, both are written there for `tests/quiet_logs`; without it they are discarded.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Output;
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;

use crate::support::PATIENCE;

/// Files with the logs, and with a line of hexadecimal digits for each secret. Both grow by whole lines, because
/// many tests write to them at the same time.
struct Kept {
    logs: File,
    secrets: File,
}

static KEPT: LazyLock<Option<Kept>> = LazyLock::new(|| {
    let dir = std::env::var_os("FIELDGATE_TEST_LOGS")?;
    let open = |name| {
        let path = std::path::Path::new(&dir).join(name);
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.expect("FIELDGATE_TEST_LOGS is a directory")
    };
    Some(Kept {
        logs: open("logs"),
        secrets: open("secrets"),
    })
});

/// Longer frames are filler with which a test reaches a limit.
const FRAME_BYTES_MAX: usize = 4096;

/// Keeps lines that a process wrote to stderr.
pub fn keep(log: &[u8]) {
    if let Some(kept) = &*KEPT {
        (&kept.logs).write_all(log).expect("writes");
    }
}

/// Keeps the stderr of a process that has exited.
pub fn keep_of(output: Output) -> Output {
    keep(&output.stderr);
    output
}

/// Returns the part of a log that is written without `RUST_LOG`, except the lines of each start and end.
pub fn by_default(log: &str) -> String {
    let lines = log.split_inclusive('\n');
    let is_usual = |line: &str| {
        let usual = ["cli::serve: ", "schema updated"];
        line.contains("Z  INFO ") && usual.iter().any(|usual| line.contains(usual))
    };
    lines
        .filter(|line| !line.contains(" DEBUG ") && !is_usual(line))
        .collect()
}

/// Keeps the key of a fleet or of a device.
pub fn keep_key(key: &[u8]) {
    keep_secret("key", key);
}

/// Keeps a frame that a device sends.
pub fn keep_frame(frame: &[u8]) {
    if frame.len() <= FRAME_BYTES_MAX {
        keep_secret("frame", frame);
    }
}

fn keep_secret(kind: &str, bytes: &[u8]) {
    if let Some(kept) = &*KEPT {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = format!("{kind} {digits}\n");
        (&kept.secrets).write_all(line.as_bytes()).expect("writes");
    }
}

#[derive(Debug)]
pub struct Stderr {
    lines: Receiver<String>,
    /// All text received.
    text: String,
}

impl Stderr {
    /// Returns all of it, once the process has closed it.
    pub fn read_to_end(&mut self) -> Option<String> {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.text.push_str(&line),
                Err(RecvTimeoutError::Disconnected) => return Some(self.text.clone()),
                Err(RecvTimeoutError::Timeout) => return None,
            }
        }
    }

    pub fn wait_for(&mut self, what: &str) {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.text.push_str(&line);
            if line.contains(what) {
                return;
            }
        }
        panic!("no line with {what:?}: {}", self.text);
    }
}

/// Reads stderr to its end, so that the process never waits for a reader.
pub fn collect(pipe: impl Read + Send + 'static) -> Stderr {
    let (sender, lines) = channel();
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe
            .read_until(b'\n', &mut line)
            .is_ok_and(|count| count > 0)
        {
            keep(&line);
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
            line.clear();
        }
    });
    Stderr {
        lines,
        text: String::new(),
    }
}
