//! `fieldgate device set`.

use std::io::Write;

use clap::Args;

use crate::cli::nearest::unknown_device;
use crate::cli::{Error, output};
use crate::config::store_url::StoreUrl;
use crate::config::units::Unit;
use crate::store::admin::presence::set_interval;
use crate::store::admin::{Access, Connection};
use crate::time::SystemClock;

/// Longest interval that can be set, in seconds.
const INTERVAL_S_MAX: u64 = 366 * 86_400;

#[derive(Args, Debug)]
pub struct SetArgs {
    /// Names of the devices
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,

    /// Expected time between two frames, such as 15min or 1h (in seconds if no unit is given), or `learned` to use the
    /// interval that gateways learn from the device's last frames
    #[arg(long, value_name = "DURATION", value_parser = interval)]
    interval: Interval,
}

#[derive(Clone, Copy, Debug)]
enum Interval {
    Learned,
    Seconds(i64),
}

fn interval(text: &str) -> Result<Interval, String> {
    if text == "learned" {
        return Ok(Interval::Learned);
    }
    match Unit::Seconds.parse(text) {
        Ok(seconds @ 1..=INTERVAL_S_MAX) => Ok(Interval::Seconds(seconds as i64)),
        Ok(_) => Err("must be from 1 s to 366 days, or `learned`".to_owned()),
        Err(error) => Err(format!("{error}, or `learned`")),
    }
}

/// Sets the intervals of devices, all or none.
pub async fn set(store: &StoreUrl, args: &SetArgs) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Write).await?;
    let now_us = SystemClock::start().now().utc_us;
    let interval_s = match args.interval {
        Interval::Learned => None,
        Interval::Seconds(seconds) => Some(seconds),
    };
    connection.begin().await?;
    for name in &args.names {
        match set_interval(&mut connection, name, interval_s, now_us).await {
            Ok(true) => {}
            failed => {
                // A failed rollback is harmless: closing the connection rolls back, too.
                drop(connection.rollback().await);
                failed?;
                return Err(unknown_device(&mut connection, name).await?);
            }
        }
    }
    connection.commit().await?;
    let mut out = output::stdout();
    for name in &args.names {
        match interval_s {
            Some(interval_s) => writeln!(out, "{name} is expected every {interval_s} s")?,
            None => writeln!(out, "the interval of {name} is learned")?,
        }
    }
    out.flush().map_err(Error::Output)
}
