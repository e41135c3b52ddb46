//! `fieldgate quarantine purge`: frames that nobody will need any more.

use std::io::Write;

use clap::Args;
use fieldgate::store::editor::Editor;
use fieldgate::store::url::StoreUrl;

use super::select::Selection;
use crate::cli::Error;
use crate::cli::output::{self, bytes_text, count};

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
    // The rows of one statement are not changed by anybody else.
    let purge = format!(
        "DELETE FROM quarantine AS q WHERE {} RETURNING length(bytes)",
        condition.sql()
    );
    editor.begin().await?;
    let rows = editor.rows(&purge, &condition.arguments()).await?;
    editor.commit().await?;
    let mut bytes = 0;
    for row in &rows {
        bytes += row.integer(0)?.unsigned_abs();
    }
    let mut out = output::stdout();
    let frames = count(rows.len() as u64, "frame");
    writeln!(out, "purged {frames}, {}", bytes_text(bytes))?;
    out.flush()?;
    Ok(())
}
