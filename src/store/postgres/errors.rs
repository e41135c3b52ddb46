//! Readable texts of server errors.

use std::io;

/// Returns the server's message without the library's prefix.
pub(super) fn reason(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => error.message().to_owned(),
        sqlx::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the server closed the connection".to_owned()
        }
        sqlx::Error::Io(error) => error.to_string(),
        // The driver reads a 0 byte when the connection closes.
        sqlx::Error::Protocol(text) if text.contains("SSLRequest: 0x00") => {
            "the server closed the connection".to_owned()
        }
        error => error.to_string(),
    }
}
