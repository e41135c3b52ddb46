//! Binary COPY: rows into a table with the least work for both sides.
//!
//! Format: "PGCOPY\n\xff\r\n\0", flags, length of an extension; for each row the number of fields, and
//! for each field its length (-1 for NULL) and its value, all big-endian; -1 at the end. See
//! <https://www.postgresql.org/docs/current/sql-copy.html>, "Binary Format".

use std::sync::atomic::{AtomicU64, Ordering};

use sqlx::PgConnection;

use super::timestamp::Timestamp;

const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: [u8; 2] = (-1_i16).to_be_bytes();
/// What is sent at once: the server works on it while the next is put together.
const CHUNK_BYTES: usize = 64 * 1024;

/// Whether the server still takes something: how long a large batch may take is for the server to say.
#[derive(Debug, Default)]
pub(super) struct Progress(AtomicU64);

impl Progress {
    fn make(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Grows as long as there is some.
    pub(super) fn made(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Rows in the making.
pub(super) struct Rows {
    bytes: Vec<u8>,
}

impl Rows {
    /// Begins a row.
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

/// Copies what `write` makes of `items` into `table`, a name with its columns.
///
/// # Cancel safety
/// None: the connection must be given up.
pub(super) async fn copy<T: Sync>(
    conn: &mut PgConnection,
    table: &str,
    items: &[T],
    progress: &Progress,
    write: impl Fn(&mut Rows, &T) + Send,
) -> Result<(), sqlx::Error> {
    let mut copy = conn
        .copy_in_raw(&format!("COPY {table} FROM STDIN (FORMAT binary)"))
        .await?;
    let mut rows = Rows {
        bytes: Vec::with_capacity(CHUNK_BYTES),
    };
    rows.bytes.extend_from_slice(HEADER);
    for item in items {
        write(&mut rows, item);
        if rows.bytes.len() >= CHUNK_BYTES {
            copy.send(rows.bytes.as_slice()).await?;
            progress.make();
            rows.bytes.clear();
        }
    }
    rows.bytes.extend_from_slice(&TRAILER);
    copy.send(rows.bytes.as_slice()).await?;
    copy.finish().await.map(drop)
}
