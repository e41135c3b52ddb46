//! `fieldgate migrate`: the store's tables, made or brought up to date.

use std::io::Write;
use std::path::Path;

use fieldgate::keys;
use fieldgate::store::sqlite::{self, SqliteSettings};

use super::{Error, output};

/// Brings the database at `path` up to date, and says what it was before.
pub async fn migrate(data_dir: &Path, path: &Path) -> Result<(), Error> {
    if path.starts_with(data_dir) {
        keys::create_data_dir(data_dir)?;
    }
    let (before, after) = sqlite::migrate(path, &SqliteSettings::default()).await?;
    let mut out = output::stdout();
    let path = path.display();
    match before {
        0 => writeln!(out, "{path}: created, its schema is at step {after}"),
        _ if before == after => writeln!(out, "{path}: up to date, its schema is at step {after}"),
        _ => writeln!(
            out,
            "{path}: its schema was at step {before} and is at step {after} now"
        ),
    }?;
    out.flush()?;
    Ok(())
}
