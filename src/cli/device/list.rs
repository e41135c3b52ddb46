//! `fieldgate device list`.

use std::io::Write;

use crate::config::units::Unit;
use crate::store::admin::presence::Presence;
use crate::store::admin::{Argument, Connection, Row};
use crate::time::SystemClock;
use clap::Args;

use crate::cli::Error;
use crate::cli::output::{self, count, show_utc};
use crate::cli::query::{Format, write_all};
use crate::cli::value::Value;

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Output format
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Table)]
    format: Format,

    /// List only enabled devices that have sent no frame for this long, such as 1h or 30min (in seconds if no unit is
    /// given), or have never sent one
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    silent: Option<i64>,

    /// List only devices with this presence
    #[arg(long, value_enum, value_name = "STATE")]
    state: Option<Presence>,
}

fn seconds(text: &str) -> Result<i64, String> {
    let seconds = Unit::Seconds.parse(text)?;
    i64::try_from(seconds).map_err(|_| format!("must be at most {}", i64::MAX))
}

/// Finds a device's last frame through its streams, so that no large table is scanned. Shows one of several
/// concurrent sessions.
pub(super) const DEVICES: &str = "SELECT name, enabled, state, last_frame_at, peer, key, firmware, streams, frames, readings, presence, interval_s
    FROM (
        SELECT d.id, d.name, CASE d.enabled WHEN 0 THEN 'no' ELSE 'yes' END AS enabled,
            CASE WHEN max(se.peer) IS NOT NULL THEN 'connected' WHEN d.first_seen_at IS NOT NULL
                THEN 'disconnected' ELSE 'new' END AS state,
            max((SELECT f.received_at FROM frames AS f WHERE f.stream_id = s.id
                ORDER BY f.seq DESC LIMIT 1)) AS last_frame_at,
            max(se.peer) AS peer,
            CASE WHEN d.sealed_key IS NOT NULL THEN 'own' WHEN d.key_version = 0 THEN 'derived'
                ELSE 'derived ' || d.key_version END AS key,
            d.firmware, count(s.id) AS streams, CAST(coalesce(sum(s.frames), 0) AS BIGINT) AS frames,
            CAST(coalesce(sum(s.readings), 0) AS BIGINT) AS readings
        FROM devices AS d
        LEFT JOIN streams AS s ON s.device_id = d.id
        LEFT JOIN (SELECT device_id, max(peer) AS peer FROM sessions GROUP BY device_id) AS se
            ON se.device_id = d.id
        GROUP BY d.id
    ) AS listed
    JOIN device_presence AS p ON p.device_id = listed.id";
const LAST_FRAME: usize = 3;
const HEADERS: [&str; 12] = [
    "name",
    "enabled",
    "state",
    "last frame",
    "address",
    "key",
    "firmware",
    "streams",
    "frames",
    "readings",
    "presence",
    "interval s",
];

pub async fn list(connection: &mut Connection, args: &ListArgs) -> Result<(), Error> {
    let mut sql = DEVICES.to_owned();
    let mut arguments = Vec::new();
    if let Some(silent_s) = args.silent {
        let now_us = SystemClock::start().now().utc_us;
        let since_us = now_us.saturating_sub(silent_s.saturating_mul(1_000_000));
        sql += " WHERE enabled = 'yes' AND (last_frame_at IS NULL OR last_frame_at < $1)";
        arguments.push(Argument::Time(since_us));
    }
    if let Some(state) = args.state {
        sql += if arguments.is_empty() {
            " WHERE"
        } else {
            " AND"
        };
        sql += &format!(" presence = '{}'", state.name());
    }
    sql += " ORDER BY name COLLATE \"C\"";
    let rows = connection.rows(&sql, &arguments).await?;
    let rows: Vec<Vec<Value>> = { rows.into_iter() }
        .map(|Row(mut values)| {
            show_utc(&mut values, LAST_FRAME);
            for value in &mut values {
                if args.format == Format::Table && *value == Value::Null {
                    *value = "".into();
                }
            }
            values
        })
        .collect();
    let devices = rows.len() as u64;
    let mut out = output::stdout();
    match (args.format, devices) {
        (Format::Table, 0) if args.silent.is_some() => writeln!(out, "no device is silent")?,
        (Format::Table, 0) if args.state.is_some() => writeln!(out, "no device in this state")?,
        (Format::Table, 0) => writeln!(out, "no devices yet")?,
        (Format::Table, _) => {
            write_all(args.format, &HEADERS, rows, &mut out)?;
            writeln!(out, "({})", count(devices, "device"))?;
        }
        _ => {
            let keys = HEADERS.map(|header| header.replace(' ', "_"));
            let keys = keys.each_ref().map(String::as_str);
            write_all(args.format, &keys, rows, &mut out)?;
        }
    }
    out.flush()?;
    Ok(())
}
