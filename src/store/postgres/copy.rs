//! Binary COPY: inserts rows with the least work for both sides.
//!
//! Format: "PGCOPY\n\xff\r\n\0", flags, length of an extension; for each row the number of fields, and for each
//! field its length (-1 for NULL) and its value, all big-endian; -1 at the end. See
//! <https://www.postgresql.org/docs/current/sql-copy.html>, "Binary Format".

use super::link::Link;
use super::timestamp::Timestamp;

const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: [u8; 2] = (-1_i16).to_be_bytes();
/// Chunk size in bytes. The server processes a chunk while the next one is built.
const CHUNK_BYTES: usize = 64 * 1024;

/// Rows under construction.
pub(super) struct Rows {
    bytes: Vec<u8>,
}

impl Rows {
    pub(super) fn row(&mut self, fields: i16) -> &mut Self {
        self.bytes.extend_from_slice(&fields.to_be_bytes());
        self
    }

    pub(super) fn int8(&mut self, value: i64) -> &mut Self {
        self.field(&value.to_be_bytes())
    }

    pub(super) fn float8(&mut self, value: Option<f64>) -> &mut Self {
        match value {
            Some(value) => self.field(&value.to_be_bytes()),
            None => {
                self.bytes.extend_from_slice(&(-1_i32).to_be_bytes());
                self
            }
        }
    }

    pub(super) fn timestamptz(&mut self, at_us: i64) -> &mut Self {
        self.field(&Timestamp(at_us).to_be_bytes())
    }

    fn field(&mut self, value: &[u8]) -> &mut Self {
        // A number's length fits.
        self.bytes
            .extend_from_slice(&(value.len() as i32).to_be_bytes());
        self.bytes.extend_from_slice(value);
        self
    }
}

/// Copies the rows that `write` makes from `items` into `table`, a name with its columns; returns how many rows
/// the server stored.
///
/// # Cancel safety
/// None: the connection must be dropped.
pub(super) async fn copy<T>(
    conn: &mut Link,
    table: &str,
    items: &[T],
    write: impl Fn(&mut Rows, &T),
) -> Result<u64, sqlx::Error> {
    let mut items = items.iter();
    let mut rows = Rows {
        bytes: Vec::with_capacity(2 * CHUNK_BYTES),
    };
    rows.bytes.extend_from_slice(HEADER);
    let mut has_ended = false;
    let mut next = || {
        if has_ended {
            return None;
        }
        while rows.bytes.len() < CHUNK_BYTES {
            let Some(item) = items.next() else {
                rows.bytes.extend_from_slice(&TRAILER);
                has_ended = true;
                break;
            };
            write(&mut rows, item);
        }
        let empty = Vec::with_capacity(2 * CHUNK_BYTES);
        Some(std::mem::replace(&mut rows.bytes, empty))
    };
    let statement = format!("COPY {table} FROM STDIN (FORMAT binary)");
    conn.copy_in(&statement, &mut next).await
}
