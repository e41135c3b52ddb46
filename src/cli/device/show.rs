//! `fieldgate device show`.

use std::io::Write;

use crate::store::admin::{Argument, Connection, Row};

use crate::cli::Error;
use crate::cli::nearest::unknown_device;
use crate::cli::output::{self, Grid, show_utc, write_facts};
use crate::cli::value::Value;
use crate::text::{code_text, utc_text};

/// Maximum number of audit trail events in the output.
const EVENTS_SHOWN: i64 = 10;
/// Maximum count of future readings per series in the view `channels`.
const IN_FUTURE_MAX: i64 = 1000;
/// Maximum number of rows per table in the output; `query` shows all.
const LINES_SHOWN: i64 = 20;

const DEVICE: &str =
    "SELECT d.id, d.enabled, d.firmware, d.first_seen_at, d.last_seen_at, d.key_version,
        CASE WHEN d.sealed_key IS NULL THEN 0 ELSE 1 END,
        (SELECT max((SELECT f.received_at FROM frames AS f
            WHERE f.stream_id = st.id ORDER BY f.seq DESC LIMIT 1))
            FROM streams AS st WHERE st.device_id = d.id),
        (SELECT max(se.peer) FROM sessions AS se WHERE se.device_id = d.id),
        p.presence, p.interval_s, p.is_interval_set
    FROM devices AS d JOIN device_presence AS p ON p.device_id = d.id WHERE d.name = $1";

/// Shows what is known about a device, with the newest events of its audit trail.
pub async fn show(connection: &mut Connection, name: &str) -> Result<(), Error> {
    let device = connection.rows(DEVICE, &[name.into()]).await?;
    let Some(device) = device.first() else {
        return Err(unknown_device(connection, name).await?);
    };
    let id = device.integer(0)?;
    let mut out = output::stdout();
    write_facts(&facts(name, device)?, &mut out)?;
    for section in SECTIONS {
        let key = if section.is_by_name {
            name.into()
        } else {
            id.into()
        };
        write_section(connection, key, section, &mut out).await?;
    }
    out.flush()?;
    Ok(())
}

fn facts(name: &str, device: &Row) -> Result<Vec<(&'static str, String)>, Error> {
    let time = |column| -> Result<String, Error> {
        let us = device.integer_or_null(column)?;
        Ok(us.map_or_else(|| "never".to_owned(), utc_text))
    };
    let is_enabled = device.integer(1)? != 0;
    let firmware = device.text_or_null(2)?;
    let key = match (device.integer(6)?, device.integer(5)?) {
        (0, 0) => "derived from the fleet key".to_owned(),
        (0, version) => format!("derived from the fleet key, version {version}"),
        _ => "individual".to_owned(),
    };
    let connected = match device.text_or_null(8)? {
        Some(peer) => format!("from {peer}"),
        None => "no".to_owned(),
    };
    let presence = device.text(9)?;
    let source = match device.integer(11)? {
        0 => "learned",
        _ => "set by an operator",
    };
    Ok(vec![
        ("device", name.to_owned()),
        ("presence", presence.to_owned()),
        ("interval", format!("{} s, {source}", device.integer(10)?)),
        ("enabled", if is_enabled { "yes" } else { "no" }.to_owned()),
        ("key", key),
        ("firmware", firmware.unwrap_or_default().to_owned()),
        ("first seen", time(3)?),
        ("last login", time(4)?),
        ("last frame", time(7)?),
        ("connected", connected),
    ])
}

struct Section {
    title: &'static str,
    /// Query with the device as its first parameter, and optionally a row limit as its second.
    sql: &'static str,
    /// Whether the first parameter is the device's name instead of its id.
    is_by_name: bool,
    headers: &'static [&'static str],
    /// Makes a row's values readable.
    format_row: fn(&mut [Value]),
    /// Maximum number of rows of `sql`, if it limits them.
    limit: Option<i64>,
}

const SECTIONS: [&Section; 6] = [
    &Section {
        title: "channels",
        is_by_name: true,
        sql: "SELECT channel, unit, kind, last_ts, last_value, in_future FROM channels
              WHERE device = $1 ORDER BY channel COLLATE \"C\", unit COLLATE \"C\", kind",
        headers: &[
            "channel",
            "unit",
            "kind",
            "newest reading",
            "value",
            "in the future",
        ],
        format_row: format_channel,
        limit: None,
    },
    &Section {
        title: "schemas",
        is_by_name: false,
        sql: "SELECT schema, hash FROM schemas WHERE device_id = $1 ORDER BY schema",
        headers: &["schema", "hash"],
        format_row: |_| (),
        limit: None,
    },
    &Section {
        title: "streams, newest first",
        is_by_name: false,
        sql: "SELECT stream, durable_seq, frames, readings, created_at FROM streams
              WHERE device_id = $1 ORDER BY id DESC LIMIT $2",
        headers: &["stream", "durable seq", "frames", "readings", "created"],
        format_row: |row| show_utc(row, 4),
        limit: Some(LINES_SHOWN),
    },
    &Section {
        title: "gaps, newest first",
        is_by_name: false,
        sql: "SELECT st.stream, g.from_seq, g.to_seq,
                  CASE g.reason WHEN 0 THEN 'overwritten' WHEN 1 THEN 'queue damaged'
                      WHEN 2 THEN 'erased' ELSE CAST(g.reason AS TEXT) END, g.received_at
              FROM streams AS st JOIN gaps AS g ON g.stream_id = st.id
              WHERE st.device_id = $1 ORDER BY g.received_at DESC, g.from_seq DESC LIMIT $2",
        headers: &["stream", "from seq", "to seq", "reason", "received"],
        format_row: |row| show_utc(row, 4),
        limit: Some(LINES_SHOWN),
    },
    &Section {
        title: "clocks, newest first",
        is_by_name: false,
        sql: "SELECT boot, offset_us, delay_us, measured_at FROM clocks
              WHERE device_id = $1 ORDER BY measured_at DESC LIMIT $2",
        headers: &["boot", "offset us", "delay us", "measured"],
        format_row: |row| show_utc(row, 3),
        limit: Some(LINES_SHOWN),
    },
    &Section {
        title: "events, newest first",
        is_by_name: false,
        sql: "SELECT at, kind, code, detail FROM device_events
              WHERE device_id = $1 ORDER BY id DESC LIMIT $2",
        headers: &["time", "kind", "code", "detail"],
        format_row: format_event,
        limit: Some(EVENTS_SHOWN),
    },
];

async fn write_section(
    connection: &mut Connection,
    device: Argument<'_>,
    section: &Section,
    out: &mut impl Write,
) -> Result<(), Error> {
    let mut arguments = vec![device];
    arguments.extend(section.limit.map(Argument::from));
    let rows = connection.rows(section.sql, &arguments).await?;
    if rows.is_empty() {
        writeln!(
            out,
            "\nno {}",
            section.title.split(',').next().unwrap_or_default()
        )?;
        return Ok(());
    }
    let is_full = section.limit == i64::try_from(rows.len()).ok();
    let cut = if is_full {
        format!(" (only the first {} are shown)", rows.len())
    } else {
        String::new()
    };
    writeln!(out, "\n{}{cut}", section.title)?;
    grid(section.headers.iter().copied(), rows, section.format_row).write(out)?;
    Ok(())
}

fn grid<'a>(
    headers: impl IntoIterator<Item = &'a str>,
    rows: Vec<Row>,
    format_row: fn(&mut [Value]),
) -> Grid {
    let mut grid = Grid::new(headers);
    for Row(mut values) in rows {
        format_row(&mut values);
        grid.push(values);
    }
    grid
}

/// Formats a row of channels. The view stops counting future readings at a bound, to limit the rows it reads.
fn format_channel(row: &mut [Value]) {
    show_utc(row, 3);
    if row[5] == Value::Integer(IN_FUTURE_MAX) {
        row[5] = format!("{IN_FUTURE_MAX} or more").into();
    }
}

/// Formats a row of events. Only the code of a session event is a protocol code; a device defines the codes of the
/// events that it reports.
fn format_event(row: &mut [Value]) {
    show_utc(row, 0);
    match (&row[1], &row[2]) {
        (Value::Text(kind), Value::Integer(code)) if kind != "event" => {
            row[2] = if *code == 0 {
                String::new()
            } else {
                code_text(*code)
            }
            .into();
        }
        _ => {}
    }
}

/// Returns every query of this file, with a device's name or id as parameters.
#[cfg(test)]
pub fn queries(name: &'static str) -> Vec<(&'static str, Vec<Argument<'static>>)> {
    let mut queries = vec![(super::list::DEVICES, vec![]), (DEVICE, vec![name.into()])];
    for section in SECTIONS {
        let key = if section.is_by_name {
            name.into()
        } else {
            1.into()
        };
        let mut arguments = vec![key];
        arguments.extend(section.limit.map(Argument::from));
        queries.push((section.sql, arguments));
    }
    queries
}
