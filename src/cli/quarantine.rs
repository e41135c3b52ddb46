//! `fieldgate quarantine`: frames that arrived whole and could not be understood.

use std::io::Write;
use std::path::Path;

use clap::Subcommand;
use fieldgate::store::sqlite::open_reader;
use fieldgate_protocol::error::Code;
use sqlx::Row;

use super::Error;
use super::output::{self, Grid, utc};
use super::value::{Value, hex};

/// Enough to see a frame's header.
const BYTES_SHOWN: i64 = 16;

#[derive(Debug, Subcommand)]
pub enum QuarantineCommand {
    /// List the newest frames; `query` gives whole frames, from the table quarantine
    List {
        /// Most frames to list. Raise it to see further back
        #[arg(long, value_name = "FRAMES", default_value_t = 50)]
        limit: u32,
    },
}

/// Does what was asked for.
pub async fn quarantine(path: &Path, command: &QuarantineCommand) -> Result<(), Error> {
    let QuarantineCommand::List { limit } = command;
    let mut connection = open_reader(path).await?;
    let total: i64 = sqlx::query_scalar("SELECT count(*) FROM quarantine")
        .fetch_one(&mut connection)
        .await?;
    let rows = sqlx::query(
        "SELECT q.id, q.received_at, d.name, q.seq, q.code, q.detail, length(q.bytes),
             substr(q.bytes, 1, ?1)
         FROM quarantine AS q LEFT JOIN devices AS d ON d.id = q.device_id
         ORDER BY q.id DESC LIMIT ?2",
    )
    .bind(BYTES_SHOWN)
    .bind(limit)
    .fetch_all(&mut connection)
    .await?;
    let mut grid = Grid::new([
        "id",
        "received",
        "device",
        "seq",
        "code",
        "detail",
        "bytes",
        "first bytes",
    ]);
    for row in &rows {
        let mut values = Value::row(row)?;
        let received_at = std::mem::replace(&mut values[1], Value::Null);
        values[1] = utc(received_at);
        values[4] = code_text(row.try_get(4)?).into();
        if let Value::Blob(bytes) = &values[7] {
            values[7] = hex(bytes).into();
        }
        grid.push(values);
    }
    let mut out = output::stdout();
    if total == 0 {
        writeln!(out, "no frames in quarantine")?;
    } else {
        grid.write(&mut out)?;
        writeln!(out, "({} of {total}, newest first)", rows.len())?;
    }
    out.flush()?;
    Ok(())
}

/// A code with its name, if this version knows it.
pub fn code_text(code: i64) -> String {
    let known = u8::try_from(code).ok().and_then(Code::from_wire);
    match known {
        Some(known) => format!("{code} {}", known.name()),
        None => code.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_names() {
        assert_eq!(code_text(30), "30 malformed");
        assert_eq!(code_text(99), "99");
        assert_eq!(code_text(30 + 256), "286");
    }
}
