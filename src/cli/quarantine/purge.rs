//! `fieldgate quarantine purge`: frames that nobody will need any more.

use std::io::Write;

use clap::Args;
use fieldgate::store::editor::Editor;
use fieldgate::store::url::StoreUrl;

use super::select::{Condition, Selection};
use crate::cli::Error;
use crate::cli::output::{self, bytes_text, count};

/// Frames of one transaction.
const FRAMES_AT_ONCE: u32 = 500;
/// Frames that come later stay.
const NEWEST: &str = "SELECT coalesce(max(id), 0) FROM quarantine";

#[derive(Args, Debug)]
pub struct PurgeArgs {
    #[command(flatten)]
    selection: Selection,

    /// All frames in quarantine
    #[arg(long, conflicts_with_all = ["ids", "device", "before"])]
    all: bool,
}

/// Deletes the frames; what the ledger says of them stays.
pub async fn purge(store: &StoreUrl, args: &PurgeArgs) -> Result<(), Error> {
    if args.selection.is_open() && !args.all {
        let what = "say what to purge: IDs, --device NAME, --before TIME, or --all";
        return Err(Error::Usage(what.to_owned()));
    }
    let mut editor = Editor::open(store).await?;
    let condition = args.selection.condition(&mut editor).await?;
    let newest = editor.rows(NEWEST, &[]).await?;
    let newest = newest.first().map_or(Ok(0), |row| row.integer(0))?;
    let (mut after, mut frames, mut bytes) = (i64::MIN, 0, 0);
    loop {
        let purged = step(&mut editor, &condition, after, newest).await?;
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

/// What went in a transaction.
#[derive(Default)]
struct Purged {
    frames: u64,
    bytes: u64,
    /// The newest of them.
    last: Option<i64>,
}

/// Deletes the oldest frames behind `after`, none newer than `newest`, in a transaction of its own: for as long
/// as it is open, a gateway on SQLite acknowledges nothing.
async fn step(
    editor: &mut Editor,
    condition: &Condition,
    after: i64,
    newest: i64,
) -> Result<Purged, Error> {
    let purge = purge_sql(condition.sql(), after, newest);
    editor.begin().await?;
    let rows = match editor.rows(&purge, &condition.arguments()).await {
        Ok(rows) => rows,
        Err(error) => {
            let _ = editor.rollback().await;
            return Err(error.into());
        }
    };
    editor.commit().await?;
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
