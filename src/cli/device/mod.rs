//! `fieldgate device`: who may connect and with which key, who has connected, and what is known of one of them.

mod change;
mod key;
mod list;
mod refused;
mod remove;
mod show;
mod transfer;

use clap::Subcommand;
use fieldgate::store::reader::Reader;
use fieldgate::store::url::StoreUrl;
use fieldgate_protocol::message::check_name;

pub use self::change::read_key;
pub use self::key::keys_of;
#[cfg(test)]
pub use self::show::queries;
pub use self::show::unknown;
use super::Error;
use super::fleet_key::FleetKeyFile;

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// List devices: whether they are connected and from where, and when their last frame came
    List(list::ListArgs),
    /// Show what is known of a device, with the newest lines of its audit trail
    Show {
        /// The device's name
        name: String,
    },
    /// List who was refused before a session began: address, the name that was claimed, why and how often. The
    /// 1,000 latest are kept
    Refused(refused::RefusedArgs),
    /// Make devices known before they connect for the first time, for `serve --registration closed` or to
    /// give them keys of their own
    Add(change::AddArgs),
    /// Keep devices out: their sessions end within a second, and what they have not sent stays with them
    Disable(change::NamesArgs),
    /// Let devices in again
    Enable(change::NamesArgs),
    /// Show what is stored of a device, and with --yes take it out with all of that: readings, frames, events,
    /// its key. Works next to running gateways, whose sessions of it end within a second, but not on a database
    /// that a spool feeds; a run that was broken off goes on when it is given again
    Remove(remove::RemoveArgs),
    /// Give a device another key: its session ends within a second, and the former key opens no other one
    RotateKey(change::RotateArgs),
    /// Print the keys of devices, to be put into them: 64 hexadecimal digits; with several names, each
    /// behind its name. Also for devices that are not known yet, and without a database
    Key(key::KeyArgs),
    /// Write all devices as CSV, for `device import` elsewhere
    Export(transfer::ExportArgs),
    /// Make devices known, enabled or disabled, and give them keys, as a CSV file says. Devices that are not
    /// in it stay as they are, and a device that is as the file says is not touched
    Import(transfer::ImportArgs),
}

/// Does what was asked for.
pub async fn device(
    key: FleetKeyFile<'_>,
    store: &StoreUrl,
    command: &DeviceCommand,
) -> Result<(), Error> {
    match command {
        DeviceCommand::List(args) => list::list(&mut Reader::open(store).await?, args).await,
        DeviceCommand::Show { name } => show::show(&mut Reader::open(store).await?, name).await,
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

/// A name that a device can have.
pub fn device_name(name: &str) -> Result<String, String> {
    match check_name(name) {
        Ok(()) => Ok(name.to_owned()),
        Err(_) => {
            Err("a device's name is 1 to 32 characters out of A-Z a-z 0-9 . _ : -".to_owned())
        }
    }
}
