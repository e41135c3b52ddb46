//! `fieldgate query`: runs one read-only statement and writes a table, CSV or JSON.
//!
//! CSV and JSON are streamed, so results can have any size. No signal is handled: Ctrl-C ends the process
//! immediately.

use std::io::{self, Write};
use std::ops::ControlFlow;

use crate::config::store_url::StoreUrl;
use crate::store::admin::rows_json::RowsJson;
use crate::store::admin::statement::{self, Dialect};
use crate::store::admin::{Access, Connection, QueryError, Row};
use crate::store::sqlite::readers;
use clap::{Args, ValueEnum};

use super::Error;
use super::output::{self, Grid};
use super::value::{Value, Written, csv_text};

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
        () = readers::log_is_needed(store) => Err(Error::Failed(
            "query aborted: it kept the gateway from checkpointing its write-ahead log; query less data at a time, \
             or write the output to a file"
                .to_owned(),
        )),
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
    rows: RowsJson,
}

impl<W: Write> Json<W> {
    fn new(out: W, headers: &[String]) -> Json<W> {
        let rows = RowsJson::new(headers);
        Json { out, rows }
    }

    fn end(&mut self) -> io::Result<()> {
        self.out.write_all(self.rows.end().as_bytes())
    }
}

impl<W: Write> Sink for Json<W> {
    fn row(&mut self, row: Vec<Value>) -> io::Result<bool> {
        self.out.write_all(self.rows.row(&row).as_bytes())?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
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
