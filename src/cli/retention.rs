//! `fieldgate retention`: shows what the gateway's settings delete from the store, or deletes it now.

use std::io::Write;

use clap::{Args, ValueEnum};

use crate::config::{Location, Settings};
use crate::store::admin::retention::{Action, Deleted, round};
use crate::store::admin::{Access, Connection};
use crate::time::SystemClock;

use super::{Error, output, valid_config};

#[derive(Args, Debug)]
pub struct RetentionArgs {
    /// What to do
    #[arg(value_enum, default_value = "show")]
    action: Choice,

    /// All settings of the gateway.
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// Count what would be deleted
    Show,
    /// Delete it now, even while the gateway runs, which deletes it every ten minutes
    Run,
}

/// Prints the number of rows by table.
pub async fn retention(args: RetentionArgs, location: Location) -> Result<(), Error> {
    let config = valid_config(args.settings, location)?;
    let (access, action) = match args.action {
        Choice::Show => (Access::Read, Action::Count),
        Choice::Run => (Access::Write, Action::Delete),
    };
    let mut connection = Connection::open(&config.store, access).await?;
    let now_us = SystemClock::start().now().utc_us;
    let Deleted {
        readings,
        partitions,
        frames,
        gaps,
        quarantined,
        events,
    } = round(&mut connection, &config.retention, now_us, action).await?;
    let mut out = output::stdout();
    let done = match args.action {
        Choice::Show => "to delete",
        Choice::Run => "deleted",
    };
    for (table, rows) in [
        ("readings", readings),
        ("partitions", partitions),
        ("frames", frames),
        ("gaps", gaps),
        ("quarantine", quarantined),
        ("device_events", events),
    ] {
        writeln!(out, "{table:<15} {rows:>12} {done}")?;
    }
    out.flush()?;
    Ok(())
}
