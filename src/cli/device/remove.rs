//! `fieldgate device remove`.

use std::io::{self, Write};

use clap::Args;
use fieldgate::store::editor::Editor;
use fieldgate::store::lifecycle::{self, DeviceEdit};
use fieldgate::store::removal::{self, Belongings};
use fieldgate::store::sqlite;
use fieldgate::store::url::StoreUrl;
use jiff::Timestamp;

use super::unknown;
use crate::cli::Error;
use crate::cli::output::{self, write_facts};

#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Name of the device
    name: String,

    /// Remove it. Without this, what would go is shown, and nothing changes
    #[arg(long)]
    yes: bool,
}

/// Shows what is stored of a device, or takes it out with all of that.
pub async fn remove(store: &StoreUrl, args: &RemoveArgs) -> Result<(), Error> {
    let mut editor = Editor::open(store).await?;
    refuse_spooled(&mut editor, store).await?;
    let name = &args.name;
    let begun = begun(&mut editor, name).await?;
    let device = lifecycle::find(&mut editor, name).await?;
    let mut rows = begun.clone();
    rows.extend(device.as_ref().map(|device| device.device.0));
    if rows.is_empty() {
        return Err(unknown(&mut editor, name).await?);
    }
    let mut goes = Belongings::default();
    for device in &rows {
        goes.add(removal::belongings(&mut editor, *device).await?);
    }
    let mut out = output::stdout();
    let counts = { goes.counts.iter() }
        .map(|(what, count)| (*what, count.to_string()))
        .collect::<Vec<_>>();
    write_facts(&counts, &mut out)?;
    if !args.yes {
        writeln!(
            out,
            "nothing was removed; `fieldgate device remove {name} --yes` removes {name} with all of this"
        )?;
        return out.flush().map_err(Error::Output);
    }
    out.flush()?;
    if device.is_some() {
        give_up_name(&mut editor, name).await?;
    }
    // Held until the end: a gateway that begins meanwhile would learn by heart what is about to go.
    let mut alone = keep_alone(store)?;
    if alone.is_none() && matches!(store, StoreUrl::Sqlite(_)) {
        let mut err = io::stderr();
        let _ = writeln!(
            err,
            "waiting until the gateway has sorted in what came last, up to two minutes"
        );
    }
    let mut is_alone = || {
        if alone.is_none() {
            alone = keep_alone(store).unwrap_or_default();
        }
        alone.is_some()
    };
    for device in rows {
        removal::take_out(&mut editor, device, &mut is_alone).await?;
    }
    writeln!(out, "removed {name}")?;
    out.flush().map_err(Error::Output)
}

/// Keeps gateways from a file until it is dropped; `None` if one uses it.
fn keep_alone(store: &StoreUrl) -> Result<Option<impl Sized + use<>>, Error> {
    match store {
        StoreUrl::Sqlite(path) => {
            sqlite::keep_alone(path).map_err(|error| Error::Failed(error.to_string()))
        }
        StoreUrl::Postgres(_) => Ok(None),
    }
}

/// Devices of that name whose removal was broken off.
async fn begun(editor: &mut Editor, name: &str) -> Result<Vec<i64>, Error> {
    let sql = "SELECT d.id FROM devices AS d JOIN removed_devices AS r ON r.device_id = d.id
        WHERE r.name = $1 ORDER BY d.id";
    let rows = editor.rows(sql, &[name.into()]).await?;
    Ok(rows
        .iter()
        .map(|row| row.integer(0))
        .collect::<Result<_, _>>()?)
}

async fn give_up_name(editor: &mut Editor, name: &str) -> Result<(), Error> {
    let now_us = Timestamp::now().as_microsecond();
    let mut edit = DeviceEdit::begin(editor, now_us).await?;
    let found = edit.find([name].into_iter()).await?;
    let removed = match found.get(name) {
        Some(device) => edit.remove(device).await,
        // Another command was faster.
        None => Ok(()),
    };
    match removed {
        Ok(()) => Ok(edit.commit().await?),
        Err(error) => {
            let _ = edit.rollback().await;
            Err(error.into())
        }
    }
}

/// A spool may hold frames of the device, and would bring them and the device back.
async fn refuse_spooled(editor: &mut Editor, store: &StoreUrl) -> Result<(), Error> {
    if let StoreUrl::Sqlite(_) = store {
        return Ok(());
    }
    let spools = editor.rows("SELECT host FROM spool", &[]).await?;
    let Some(spool) = spools.first() else {
        return Ok(());
    };
    let host = spool.text_or_null(0)?.unwrap_or_default();
    Err(Error::Failed(format!(
        "could not remove devices: the gateway on {host} has a spool, which would bring them back; start it \
         once without --spool, then remove them"
    )))
}
