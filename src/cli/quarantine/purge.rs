//! `fieldgate quarantine purge`: deletes frames.

use std::io::Write;

use crate::config::store_url::StoreUrl;
use crate::store::admin::{Access, Connection};
use clap::Args;

use super::select::{Condition, Selection};
use crate::cli::Error;
use crate::cli::output::{self, count};
use crate::text::bytes_text;

/// Maximum number of frames per transaction.
const FRAMES_AT_ONCE: u32 = 500;
/// Newest frame at the start of the purge; later frames stay.
const NEWEST: &str = "SELECT coalesce(max(id), 0) FROM quarantine";

#[derive(Args, Debug)]
pub struct PurgeArgs {
    #[command(flatten)]
    selection: Selection,

    /// Delete all frames in quarantine
    #[arg(long, conflicts_with_all = ["ids", "device", "before"])]
    all: bool,
}

/// Deletes the selected frames; their entries in the ledger stay.
pub async fn purge(store: &StoreUrl, args: &PurgeArgs) -> Result<(), Error> {
    if args.selection.is_open() && !args.all {
        let what = "select what to purge: IDs, --device NAME, --before TIME, or --all";
        return Err(Error::Usage(what.to_owned()));
    }
    let mut connection = Connection::open(store, Access::Write).await?;
    let condition = args.selection.condition(&mut connection).await?;
    let newest = connection.integer(NEWEST, &[]).await?;
    let (mut after, mut frames, mut bytes) = (i64::MIN, 0, 0);
    loop {
        let purged = step(&mut connection, &condition, after, newest).await?;
        let Some(last) = purged.last else {
            break;
        };
        after = last;
        frames += purged.frames;
        bytes += purged.bytes;
    }
    let mut out = output::stdout();
    let frames = count(frames, "frame");
    writeln!(out, "purged {frames}, {}", bytes_text(bytes))?;
    out.flush()?;
    Ok(())
}

/// Frames purged in one transaction.
#[derive(Default)]
struct Purged {
    frames: u64,
    bytes: u64,
    /// Id of the newest purged frame.
    last: Option<i64>,
}

/// Deletes the oldest frames after `after` and up to `newest` in a separate transaction. While a transaction is
/// open, a gateway on SQLite acknowledges nothing.
async fn step(
    connection: &mut Connection,
    condition: &Condition,
    after: i64,
    newest: i64,
) -> Result<Purged, Error> {
    let purge = purge_sql(condition.sql(), after, newest);
    connection.begin().await?;
    let deleted = connection.rows(&purge, &condition.arguments()).await;
    let rows = connection.end(deleted).await?;
    let mut purged = Purged::default();
    for row in &rows {
        purged.frames += 1;
        purged.bytes += row.integer(1)?.unsigned_abs();
        purged.last = purged.last.max(Some(row.integer(0)?));
    }
    Ok(purged)
}

pub(super) fn purge_sql(condition: &str, after: i64, newest: i64) -> String {
    format!(
        "DELETE FROM quarantine WHERE id IN (
             SELECT q.id FROM quarantine AS q
             WHERE q.id > {after} AND q.id <= {newest} AND {condition} ORDER BY q.id LIMIT {FRAMES_AT_ONCE}
         ) RETURNING id, CAST(length(bytes) AS BIGINT)"
    )
}
