//! `fieldgate quarantine`: frames that arrived whole and could not be understood.

use std::io::Write;

use clap::Subcommand;
use fieldgate::store::reader::Reader;
use fieldgate::store::url::StoreUrl;
use fieldgate_protocol::error::Code;

use super::Error;
use super::output::{self, Grid, show_utc};
use super::value::{Value, hex};

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
pub async fn quarantine(store: &StoreUrl, command: &QuarantineCommand) -> Result<(), Error> {
    let QuarantineCommand::List { limit } = command;
    let mut reader = Reader::open(store).await?;
    let total = reader.rows("SELECT count(*) FROM quarantine", &[]).await?;
    // 16 bytes are enough to see a frame's header.
    let rows = reader
        .rows(
            "SELECT q.id, q.received_at, d.name, q.seq, q.code, q.detail, length(q.bytes),
                 substr(q.bytes, 1, 16)
             FROM quarantine AS q LEFT JOIN devices AS d ON d.id = q.device_id
             ORDER BY q.id DESC LIMIT $1",
            &[i64::from(*limit).into()],
        )
        .await?;
    let shown = rows.len();
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
    for row in rows {
        let code = code_text(row.integer(4)?);
        let mut values = row.0;
        show_utc(&mut values, 1);
        values[4] = code.into();
        if let Value::Blob(bytes) = &values[7] {
            values[7] = hex(bytes).into();
        }
        grid.push(values);
    }
    let mut out = output::stdout();
    match total.first().map_or(Ok(0), |row| row.integer(0))? {
        0 => writeln!(out, "no frames in quarantine")?,
        total => {
            grid.write(&mut out)?;
            writeln!(out, "({shown} of {total}, newest first)")?;
        }
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
