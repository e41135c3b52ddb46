//! What people read on stdout and stderr: a reader who is gone is never a reason to panic.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to stdout. A reader who is gone has seen enough.
///
/// # Errors
/// It cannot be written, as on a full disk.
pub fn out(line: impl Display) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes a line to stderr, if anything can be written there.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
