//! Output on stdout and stderr that never panics when the reader has closed its end.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to stdout. A closed pipe is not an error.
///
/// # Errors
/// The line could not be written, for example because the disk is full.
pub fn out(line: impl Display) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes a line to stderr and ignores errors.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
