//! `fieldgate quarantine`: frames that arrived whole and could not be understood.

mod purge;
mod replay;
mod select;
mod show;

use std::io::Write;

use clap::{Args, Subcommand};
use fieldgate::store::reader::Reader;
#[cfg(test)]
use fieldgate::store::replay::kept_frames_sql;
use fieldgate::store::url::StoreUrl;
use fieldgate_protocol::error::Code;

use self::purge::PurgeArgs;
use self::select::Selection;
use self::show::ShowArgs;
use super::Error;
use super::output::{self, Grid, bytes_text, show_utc};
use super::value::{Value, hex};

#[derive(Debug, Subcommand)]
pub enum QuarantineCommand {
    /// List the newest frames
    List(ListArgs),
    /// Show a frame: each field with its bytes, and the byte that breaks a rule, as this version sees it
    Show(ShowArgs),
    /// Store what this version understands of them, once, with the time at which they first came; all,
    /// or those that are named. What is not understood stays and is listed, and the exit code is 1.
    /// Works beside a running gateway
    Replay(Selection),
    /// Delete frames for good; their numbers stay in the ledger. Works beside a running gateway, which
    /// has room for others within seconds
    Purge(PurgeArgs),
}

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Frames of this device only
    #[arg(long, value_name = "NAME")]
    device: Option<String>,

    /// Most frames to list. Raise it to see further back
    #[arg(long, value_name = "FRAMES", default_value_t = 50)]
    limit: u32,
}

/// Does what was asked for.
pub async fn quarantine(store: &StoreUrl, command: &QuarantineCommand) -> Result<(), Error> {
    match command {
        QuarantineCommand::List(args) => list(store, args).await,
        QuarantineCommand::Show(args) => show::show(store, args).await,
        QuarantineCommand::Replay(selection) => replay::replay(store, selection).await,
        QuarantineCommand::Purge(args) => purge::purge(store, args).await,
    }
}

async fn list(store: &StoreUrl, args: &ListArgs) -> Result<(), Error> {
    let mut reader = Reader::open(store).await?;
    let selection = Selection {
        device: args.device.clone(),
        ..Selection::default()
    };
    let condition = selection.condition(&mut reader).await?;
    let arguments = condition.arguments();
    let total = reader.rows(&total_sql(condition.sql()), &arguments).await?;
    let newest = newest_sql(condition.sql(), args.limit);
    let rows = reader.rows(&newest, &arguments).await?;
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
    for row in &total {
        let bytes = bytes_text(row.integer(1)?.unsigned_abs());
        match row.integer(0)? {
            0 => writeln!(out, "no frames in quarantine")?,
            total => {
                grid.write(&mut out)?;
                writeln!(out, "({shown} of {total}, newest first; {bytes} in all)")?;
            }
        }
    }
    out.flush()?;
    Ok(())
}

fn total_sql(condition: &str) -> String {
    format!(
        "SELECT count(*), CAST(coalesce(sum(length(q.bytes)), 0) AS BIGINT)
         FROM quarantine AS q WHERE {condition}"
    )
}

/// 16 bytes are enough to see a frame's header.
fn newest_sql(condition: &str, limit: u32) -> String {
    format!(
        "SELECT q.id, q.received_at, d.name, q.seq, q.code, q.detail, length(q.bytes),
             substr(q.bytes, 1, 16)
         FROM quarantine AS q LEFT JOIN devices AS d ON d.id = q.device_id
         WHERE {condition} ORDER BY q.id DESC LIMIT {limit}"
    )
}

/// Returns the queries for the frames of one device, `$1`: each must find them by the index, in the order of ids.
#[cfg(test)]
pub fn queries() -> [String; 4] {
    let of_device = "1 = 1 AND q.device_id = $1";
    [
        total_sql(of_device),
        newest_sql(of_device, 50),
        kept_frames_sql(of_device, 7, 64),
        purge::purge_sql(of_device, 7, 1000),
    ]
}

/// Returns a step of a purge of all.
#[cfg(test)]
pub fn all_in_steps() -> String {
    purge::purge_sql("1 = 1", 7, 1000)
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
