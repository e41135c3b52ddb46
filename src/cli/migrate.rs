//! `fieldgate migrate`: creates or upgrades the store's schema.

use std::io::Write;
use std::path::Path;

use crate::auth::fleet_key;
use crate::config::store_url::StoreUrl;
use crate::store::postgres;
use crate::store::sqlite::{self, SqliteSettings};

use super::{Error, output};

/// Upgrades the store's schema, and prints the versions before and after.
pub async fn migrate(data_dir: &Path, store: &StoreUrl) -> Result<(), Error> {
    let (name, (before, after)) = match store {
        StoreUrl::Sqlite(path) => {
            if path.starts_with(data_dir) {
                fleet_key::create_data_dir(data_dir)?;
            }
            let migrated = sqlite::migrate(path, &SqliteSettings::default()).await?;
            (path.display().to_string(), migrated)
        }
        StoreUrl::Postgres(url) => (url.to_string(), postgres::migrate(url).await?),
    };
    let mut out = output::stdout();
    match before {
        0 => writeln!(out, "{name}: created, schema version {after}"),
        _ if before == after => writeln!(out, "{name}: up to date, schema version {after}"),
        _ => writeln!(
            out,
            "{name}: migrated from schema version {before} to {after}"
        ),
    }?;
    out.flush()?;
    Ok(())
}
