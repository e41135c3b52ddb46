//! `fieldgate quarantine`: intact frames that the gateway could not decode.

mod purge;
mod replay;
mod select;
mod show;

use std::io::Write;

use crate::config::store_url::StoreUrl;
#[cfg(test)]
use crate::store::admin::replay::quarantined_frames_sql;
use crate::store::admin::{Access, Connection};
use clap::{Args, Subcommand};

use self::purge::PurgeArgs;
use self::select::Selection;
use self::show::ShowArgs;
use super::Error;
use super::output::{self, Grid, show_utc};
use super::value::Value;
use crate::text::{bytes_text, code_text};

#[derive(Debug, Subcommand)]
pub enum QuarantineCommand {
    /// List the newest frames
    List(ListArgs),
    /// Decode a frame with this version, show each field with its bytes, and mark the byte that breaks a rule
    Show(ShowArgs),
    /// Store the quarantined frames that this version can decode, exactly once and with their original receive time:
    /// all of them, or those selected. Frames that it cannot decode stay and are listed; the exit code is then 1.
    /// Works while the gateway runs
    Replay(Selection),
    /// Delete frames permanently; their sequence numbers stay in the ledger. Works while the gateway runs, which
    /// can quarantine new frames within seconds
    Purge(PurgeArgs),
}

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Only frames of this device
    #[arg(long, value_name = "NAME")]
    device: Option<String>,

    /// Maximum number of frames to list. Raise it to list older frames
    #[arg(long, value_name = "FRAMES", default_value_t = 50)]
    limit: u32,
}

pub async fn quarantine(store: &StoreUrl, command: &QuarantineCommand) -> Result<(), Error> {
    match command {
        QuarantineCommand::List(args) => list(store, args).await,
        QuarantineCommand::Show(args) => show::show(store, args).await,
        QuarantineCommand::Replay(selection) => replay::replay(store, selection).await,
        QuarantineCommand::Purge(args) => purge::purge(store, args).await,
    }
}

async fn list(store: &StoreUrl, args: &ListArgs) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Read).await?;
    let selection = Selection {
        device: args.device.clone(),
        ..Selection::default()
    };
    let condition = selection.condition(&mut connection).await?;
    let arguments = condition.arguments();
    let total = connection
        .rows(&total_sql(condition.sql()), &arguments)
        .await?;
    let newest = newest_sql(condition.sql(), args.limit);
    let rows = connection.rows(&newest, &arguments).await?;
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
            values[7] = hex::encode(bytes).into();
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
                writeln!(out, "({shown} of {total}, newest first; {bytes} in total)")?;
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

/// Returns the query for the newest frames. It selects 16 bytes of each, enough to show the header.
fn newest_sql(condition: &str, limit: u32) -> String {
    format!(
        "SELECT q.id, q.received_at, d.name, q.seq, q.code, q.detail, length(q.bytes),
             substr(q.bytes, 1, 16)
         FROM quarantine AS q LEFT JOIN devices AS d ON d.id = q.device_id
         WHERE {condition} ORDER BY q.id DESC LIMIT {limit}"
    )
}

/// Returns the queries for the frames of one device, `$1`. Each must find them through the index, in id order.
#[cfg(test)]
pub fn queries() -> [String; 4] {
    let of_device = "1 = 1 AND q.device_id = $1";
    [
        total_sql(of_device),
        newest_sql(of_device, 50),
        quarantined_frames_sql(of_device, 7, 64),
        purge::purge_sql(of_device, 7, 1000),
    ]
}

/// Returns the query for one step of a purge of all frames.
#[cfg(test)]
pub fn all_in_steps() -> String {
    purge::purge_sql("1 = 1", 7, 1000)
}
