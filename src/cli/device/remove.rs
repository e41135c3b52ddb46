//! `fieldgate device remove`.

use std::io::{self, Write};

use crate::config::store_url::StoreUrl;
use crate::store::admin::device::{self, DeviceEdit};
use crate::store::admin::removal::{self, Belongings};
use crate::store::admin::{Access, Connection};
use crate::store::sqlite;
use clap::Args;
use jiff::Timestamp;

use crate::cli::Error;
use crate::cli::nearest::unknown_device;
use crate::cli::output::{self, write_facts};

#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Name of the device
    name: String,

    /// Remove the device. Without it, the command only shows what would be deleted
    #[arg(long)]
    yes: bool,
}

/// Shows what is stored for a device, or deletes the device with all of it.
pub async fn remove(store: &StoreUrl, args: &RemoveArgs) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Write).await?;
    refuse_spooled(&mut connection, store).await?;
    let name = &args.name;
    let begun = begun(&mut connection, name).await?;
    let device = device::find(&mut connection, name).await?;
    let mut rows = begun.clone();
    rows.extend(device.as_ref().map(|device| device.device.0));
    if rows.is_empty() {
        return Err(unknown_device(&mut connection, name).await?);
    }
    let mut goes = Belongings::default();
    for device in &rows {
        goes.add(removal::belongings(&mut connection, *device).await?);
    }
    let mut out = output::stdout();
    let counts = { goes.counts.iter() }
        .map(|(what, count)| (*what, count.to_string()))
        .collect::<Vec<_>>();
    write_facts(&counts, &mut out)?;
    if !args.yes {
        writeln!(
            out,
            "nothing removed; run `fieldgate device remove {name} --yes` to delete {name} and this data"
        )?;
        return out.flush().map_err(Error::Output);
    }
    out.flush()?;
    if device.is_some() {
        give_up_name(&mut connection, name).await?;
    }
    // Held until the end: a gateway that starts meanwhile would cache the rows that are being deleted.
    let mut alone = keep_alone(store)?;
    if alone.is_none() && matches!(store, StoreUrl::Sqlite(_)) {
        let mut err = io::stderr();
        let _ = writeln!(
            err,
            "waiting up to two minutes for the gateway to compact recent readings"
        );
    }
    let mut is_alone = || {
        if alone.is_none() {
            alone = keep_alone(store).unwrap_or_default();
        }
        alone.is_some()
    };
    for device in rows {
        removal::take_out(&mut connection, device, &mut is_alone).await?;
    }
    writeln!(out, "removed {name}")?;
    out.flush().map_err(Error::Output)
}

/// Keeps gateways from opening a file until the result is dropped; `None` if a gateway uses it.
fn keep_alone(store: &StoreUrl) -> Result<Option<impl Sized + use<>>, Error> {
    match store {
        StoreUrl::Sqlite(path) => {
            sqlite::keep_alone(path).map_err(|error| Error::Failed(error.to_string()))
        }
        StoreUrl::Postgres(_) => Ok(None),
    }
}

/// Returns the devices of this name whose removal was interrupted.
async fn begun(connection: &mut Connection, name: &str) -> Result<Vec<i64>, Error> {
    let sql = "SELECT d.id FROM devices AS d JOIN removed_devices AS r ON r.device_id = d.id
        WHERE r.name = $1 ORDER BY d.id";
    let rows = connection.rows(sql, &[name.into()]).await?;
    Ok(rows
        .iter()
        .map(|row| row.integer(0))
        .collect::<Result<_, _>>()?)
}

async fn give_up_name(connection: &mut Connection, name: &str) -> Result<(), Error> {
    let now_us = Timestamp::now().as_microsecond();
    let mut edit = DeviceEdit::begin(connection, now_us).await?;
    let found = edit.find([name].into_iter()).await?;
    let removed = match found.get(name) {
        Some(device) => edit.remove(device).await,
        // Another command has removed the device meanwhile.
        None => Ok(()),
    };
    Ok(connection.end(removed).await?)
}

/// Fails if the database has a spool: it may hold frames of the device and would restore the device with them.
async fn refuse_spooled(connection: &mut Connection, store: &StoreUrl) -> Result<(), Error> {
    if let StoreUrl::Sqlite(_) = store {
        return Ok(());
    }
    let spools = connection.rows("SELECT host FROM spool", &[]).await?;
    let Some(spool) = spools.first() else {
        return Ok(());
    };
    let host = spool.text(0)?;
    Err(Error::Failed(format!(
        "could not remove devices: the gateway on {host} has a spool, which would restore them; start that \
         gateway once without --spool, then retry"
    )))
}
