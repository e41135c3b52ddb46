//! `fieldgate device`: lists and manages devices and their keys.

mod change;
mod key;
mod list;
mod refused;
mod remove;
mod set;
mod show;
mod transfer;

use crate::config::store_url::StoreUrl;
use crate::store::admin::{Access, Connection};
use clap::Subcommand;
use fieldgate_protocol::message::check_name;

pub use self::change::read_key;
pub use self::key::keys_of;
#[cfg(test)]
pub use self::show::queries;
use super::Error;
use super::fleet_key::FleetKeyFile;

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// List devices with their presence, address and last frame
    List(list::ListArgs),
    /// Show what is known about a device, with the newest events of its audit trail
    Show {
        /// Name of the device
        name: String,
    },
    /// Set the expected interval between the frames of devices. A device is late if the gateway has not heard from
    /// it for three intervals
    Set(set::SetArgs),
    /// List refused connections: address, claimed name, reason and count. The 1,000 latest are kept
    Refused(refused::RefusedArgs),
    /// Register devices before they first connect, for `serve --registration closed` or to give them individual
    /// keys
    Add(change::AddArgs),
    /// Disable devices: sessions end within a second; unsent data stays on the device
    Disable(change::NamesArgs),
    /// Let disabled devices connect again
    Enable(change::NamesArgs),
    /// Show what is stored for a device; with --yes, delete the device with all of its readings, frames, events
    /// and its key. Works while gateways run (the device's sessions end within a second), but not on a database
    /// that a spool feeds. Repeat the command to resume an interrupted removal
    Remove(remove::RemoveArgs),
    /// Replace a device's key: its session ends within a second, and the old key no longer works
    RotateKey(change::RotateArgs),
    /// Print device keys for installation, as 64 hexadecimal digits; with several names, one `NAME KEY` line
    /// each. Also works for unknown devices and without a database
    Key(key::KeyArgs),
    /// Export all devices as CSV, for `device import` into another store
    Export(transfer::ExportArgs),
    /// Add devices, enable or disable them, and set keys from a CSV file. Devices that are not in the file, or
    /// already match it, are not changed
    Import(transfer::ImportArgs),
}

pub async fn device(
    key: FleetKeyFile<'_>,
    store: &StoreUrl,
    command: &DeviceCommand,
) -> Result<(), Error> {
    match command {
        DeviceCommand::List(args) => {
            list::list(&mut Connection::open(store, Access::Read).await?, args).await
        }
        DeviceCommand::Show { name } => {
            show::show(&mut Connection::open(store, Access::Read).await?, name).await
        }
        DeviceCommand::Set(args) => set::set(store, args).await,
        DeviceCommand::Refused(args) => refused::refused(store, args).await,
        DeviceCommand::Add(args) => change::add(key, store, args).await,
        DeviceCommand::Disable(args) => change::set_enabled(store, args, false).await,
        DeviceCommand::Enable(args) => change::set_enabled(store, args, true).await,
        DeviceCommand::Remove(args) => remove::remove(store, args).await,
        DeviceCommand::RotateKey(args) => change::rotate_key(key, store, args).await,
        DeviceCommand::Key(args) => key::key(key, store, args).await,
        DeviceCommand::Export(args) => transfer::export(key, store, args).await,
        DeviceCommand::Import(args) => transfer::import(key, store, args).await,
    }
}

/// Validates a device name.
pub fn device_name(name: &str) -> Result<String, String> {
    match check_name(name) {
        Ok(()) => Ok(name.to_owned()),
        Err(_) => {
            Err("invalid device name: use 1 to 32 characters from A-Z a-z 0-9 . _ : -".to_owned())
        }
    }
}
