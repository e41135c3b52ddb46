//! `fieldgate query`: runs one read-only statement and writes a table, CSV or JSON.
//!
//! CSV and JSON are streamed, so results can have any size. No signal is handled: Ctrl-C ends the process
//! immediately.

use std::ffi::OsString;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use crate::config::store_url::StoreUrl;
use crate::store::admin::{Access, Connection, QueryError, Row};
use crate::store::sqlite::readers;
use clap::{Args, ValueEnum};

use super::Error;
use super::output::{self, Grid};
use super::statement::{self, Dialect};
use super::value::{Value, Written, csv_text, json_text};

/// Growth of the write-ahead log during a query, in bytes, at which the query is aborted. A running query keeps the
/// gateway from checkpointing the log, and the gateway stores nothing when the log is full (1 GiB by default).
const LOG_GROWTH_MAX: u64 = 256 << 20;
/// Size of the log, in bytes, at which a query is aborted if the log has grown at all.
const LOG_BYTES_MAX: u64 = 512 << 20;
/// Interval between polls of the log.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// A query is aborted after this many consecutive polls in which the gateway asks it to stop.
const ASKED_MAX: u32 = 4;

/// Maximum number of rows in a table. The layout needs all rows in memory.
const TABLE_ROWS_MAX: usize = 10_000;

#[derive(Args, Clone, Debug)]
pub struct QueryArgs {
    /// One read-only statement. Start with the views: telemetry, latest, telemetry_hourly, channels,
    /// device_status, silent_devices, events, missing_frames
    #[arg(value_name = "SQL")]
    sql: String,

    /// Output format. csv and json stream results of any size; a table shows up to 10000 rows. A query on SQLite
    /// is aborted before it blocks the gateway's commits, even if it only waits for a reader of its output
    /// (`| less`)
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Table)]
    format: Format,
}

/// Output format of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Human-readable; NULL is shown as NULL.
    Table,
    /// Comma-separated with a header line; NULL is an empty field, an empty text is "".
    Csv,
    /// An array of objects.
    Json,
}

/// Runs the statement.
pub async fn query(store: &StoreUrl, args: &QueryArgs) -> Result<(), Error> {
    statement::check(&args.sql, Dialect::of(store))
        .map_err(|refusal| Error::Failed(refusal.to_string()))?;
    let running = tokio::spawn(write_rows(store.clone(), args.clone()));
    let ended = async {
        running
            .await
            .map_err(|error| Error::Failed(error.to_string()))?
    };
    tokio::select! {
        ended = ended => ended,
        // The task may be blocked on its output; it then ends with the process.
        () = log_grows(store) => Err(Error::Failed(
            "query aborted: it kept the gateway from checkpointing its write-ahead log; query less data at a time, \
             or write the output to a file"
                .to_owned(),
        )),
    }
}

/// Waits until the write-ahead log has grown so much that the gateway would soon stop storing.
async fn log_grows(store: &StoreUrl) {
    let StoreUrl::Sqlite(path) = store else {
        return std::future::pending().await;
    };
    let mut log = OsString::from(path);
    log.push("-wal");
    let bytes = || std::fs::metadata(Path::new(&log)).map_or(0, |file| file.len());
    let began = bytes();
    let limit = (began + LOG_GROWTH_MAX).min(LOG_BYTES_MAX).max(began + 1);
    let mut asked = 0;
    while bytes() < limit && asked < ASKED_MAX {
        tokio::time::sleep(LOOK_AGAIN).await;
        asked = if readers::must_end(path) {
            asked + 1
        } else {
            0
        };
    }
}

async fn write_rows(store: StoreUrl, args: QueryArgs) -> Result<(), Error> {
    let mut connection = Connection::open(&store, Access::Read).await?;
    let headers = connection.columns(&args.sql).await.map_err(query_error)?;
    // Stdout is not locked, because a lock could be held for as long as the output's reader pauses.
    let mut out = io::BufWriter::with_capacity(1 << 16, io::stdout());
    match args.format {
        Format::Table => {
            let mut sink = Sheet::new(headers);
            run(&mut connection, &args.sql, &mut sink).await?;
            sink.write(&mut out)?;
        }
        Format::Csv => {
            let mut sink = Csv { out: &mut out };
            sink.headers(&headers)?;
            run(&mut connection, &args.sql, &mut sink).await?;
        }
        Format::Json => {
            let mut sink = Json::new(&mut out, &headers);
            run(&mut connection, &args.sql, &mut sink).await?;
            sink.end()?;
        }
    }
    out.flush()?;
    Ok(())
}

/// Writes rows that are already in memory, with their number below a table.
pub fn write_at_hand(
    format: Format,
    headers: &[&str],
    rows: Vec<Vec<Value>>,
    out: &mut impl Write,
) -> io::Result<()> {
    let headers: Vec<String> = headers.iter().map(|header| (*header).to_owned()).collect();
    match format {
        Format::Table => {
            let mut sink = Sheet::new(headers);
            for row in rows {
                sink.row(row)?;
            }
            sink.write(out)
        }
        Format::Csv => {
            let mut sink = Csv { out };
            sink.headers(&headers)?;
            rows.into_iter().try_for_each(|row| sink.row(row).map(drop))
        }
        Format::Json => {
            let mut sink = Json::new(out, &headers);
            for row in rows {
                sink.row(row)?;
            }
            sink.end()
        }
    }
}

async fn run(connection: &mut Connection, sql: &str, sink: &mut impl Sink) -> Result<(), Error> {
    let on_row = |Row(values)| match sink.row(values) {
        Ok(true) => ControlFlow::Continue(()),
        Ok(false) => ControlFlow::Break(Ok(())),
        Err(error) => ControlFlow::Break(Err(error)),
    };
    let broken_off = connection.run(sql, on_row).await.map_err(query_error)?;
    broken_off.unwrap_or(Ok(())).map_err(Error::Output)
}

fn query_error(error: QueryError) -> Error {
    if error.is_write() {
        return Error::Failed("query is read-only; this statement would write".to_owned());
    }
    let hint = error
        .hint()
        .map(|hint| format!("\n{}", hint.replace('\n', " ")));
    let hint = hint.unwrap_or_default();
    Error::Failed(format!("query failed: {error}{hint}"))
}

/// Writes rows that are already in memory.
pub fn write_all(
    format: Format,
    headers: &[&str],
    rows: Vec<Vec<Value>>,
    out: &mut impl Write,
) -> io::Result<()> {
    let headers: Vec<String> = headers.iter().map(|header| (*header).to_owned()).collect();
    match format {
        Format::Table => {
            let mut grid = Grid::new(headers);
            for row in rows {
                grid.push(row);
            }
            grid.write(out)
        }
        Format::Csv => {
            let mut sink = Csv { out };
            sink.headers(&headers)?;
            rows.into_iter().try_for_each(|row| sink.row(row).map(drop))
        }
        Format::Json => {
            let mut sink = Json::new(out, &headers);
            rows.into_iter()
                .try_for_each(|row| sink.row(row).map(drop))?;
            sink.end()
        }
    }
}

/// Destination of rows.
trait Sink {
    /// Writes or collects one row. Returns whether more rows are accepted.
    fn row(&mut self, row: Vec<Value>) -> io::Result<bool>;
}

struct Sheet {
    grid: Grid,
    is_cut: bool,
}

impl Sheet {
    fn new(headers: Vec<String>) -> Sheet {
        Sheet {
            grid: Grid::new(headers),
            is_cut: false,
        }
    }

    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.grid.write(out)?;
        let rows = output::count(self.grid.len() as u64, "row");
        if self.is_cut {
            writeln!(
                out,
                "({rows}, more omitted: use --format csv or json for all)"
            )
        } else {
            writeln!(out, "({rows})")
        }
    }
}

impl Sink for Sheet {
    fn row(&mut self, row: Vec<Value>) -> io::Result<bool> {
        self.is_cut = self.grid.len() == TABLE_ROWS_MAX;
        if !self.is_cut {
            self.grid.push(row);
        }
        Ok(!self.is_cut)
    }
}

struct Csv<W> {
    out: W,
}

impl<W: Write> Csv<W> {
    fn headers(&mut self, headers: &[String]) -> io::Result<()> {
        self.line(headers.iter().map(|header| csv_text(header)))
    }

    fn line(&mut self, fields: impl Iterator<Item = String>) -> io::Result<()> {
        for (index, field) in fields.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(self.out, "{comma}{field}")?;
        }
        writeln!(self.out)
    }
}

impl<W: Write> Sink for Csv<W> {
    fn row(&mut self, row: Vec<Value>) -> io::Result<bool> {
        self.line(row.iter().map(Value::csv))?;
        Ok(true)
    }
}

struct Json<W> {
    out: W,
    keys: Vec<String>,
    is_first: bool,
}

impl<W: Write> Json<W> {
    fn new(out: W, headers: &[String]) -> Json<W> {
        Json {
            out,
            keys: unique(headers).iter().map(|key| json_text(key)).collect(),
            is_first: true,
        }
    }

    fn end(&mut self) -> io::Result<()> {
        writeln!(self.out, "{}", if self.is_first { "[]" } else { "\n]" })
    }
}

impl<W: Write> Sink for Json<W> {
    fn row(&mut self, row: Vec<Value>) -> io::Result<bool> {
        write!(self.out, "{}", if self.is_first { "[\n{" } else { ",\n{" })?;
        self.is_first = false;
        for (index, (key, value)) in self.keys.iter().zip(&row).enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(self.out, "{comma}{key}:{}", value.json())?;
        }
        write!(self.out, "}}")?;
        Ok(true)
    }
}

/// Makes keys unique: the second `id` becomes `id_2`. JSON parsers keep only one value per key.
fn unique(headers: &[String]) -> Vec<String> {
    let mut keys: Vec<String> = Vec::with_capacity(headers.len());
    for header in headers {
        let mut key = header.clone();
        let mut number = 1;
        while keys.contains(&key) || (number > 1 && headers.contains(&key)) {
            number += 1;
            key = format!("{header}_{number}");
        }
        keys.push(key);
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn keys_are_unique() {
        assert_eq!(unique(&strings(&["a", "b"])), ["a", "b"]);
        assert_eq!(unique(&strings(&["a", "a", "a"])), ["a", "a_2", "a_3"]);
        assert_eq!(unique(&strings(&["a", "a", "a_2"])), ["a", "a_3", "a_2"]);
    }

    #[test]
    fn a_truncated_table_has_a_note() {
        let mut sheet = Sheet::new(strings(&["a"]));
        for n in 0..TABLE_ROWS_MAX {
            assert!(sheet.row(vec![(n as i64).into()]).unwrap());
        }
        let mut out = Vec::new();
        sheet.write(&mut out).unwrap();
        assert!(out.ends_with(b"\n(10000 rows)\n"));
        assert!(!sheet.row(vec![0.into()]).unwrap());
        out.clear();
        sheet.write(&mut out).unwrap();
        assert!(out.ends_with(b"(10000 rows, more omitted: use --format csv or json for all)\n"));
    }
}
