//! Formats output: tables that fit the terminal, and counts.
//!
//! Output to a pipe is not wrapped or truncated, so that `grep` and `awk` find whole lines.

use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};

use super::value::{Value, Written};
use crate::text::utc_text;
use comfy_table::{Cell, CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

/// Minimum average column width, in characters. In a narrower terminal, each row becomes a block of lines.
const COLUMN_WIDTH_MIN: usize = 10;

/// Returns buffered standard output. Flush it at the end to see write errors.
pub fn stdout() -> BufWriter<StdoutLock<'static>> {
    BufWriter::new(io::stdout().lock())
}

/// A table with headers, held in memory.
#[derive(Debug)]
pub struct Grid {
    headers: Vec<String>,
    rows: Vec<Vec<Value>>,
}

impl Grid {
    pub fn new<H: Into<String>>(headers: impl IntoIterator<Item = H>) -> Grid {
        Grid {
            headers: headers.into_iter().map(Into::into).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, with one value per header.
    pub fn push(&mut self, row: Vec<Value>) {
        self.rows.push(row);
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Writes the table, arranged to fit the terminal if stdout is one.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.write_within(terminal_width(), out)
    }

    /// Writes the table for a terminal of `width` characters; `None` for a pipe.
    fn write_within(&self, width: Option<u16>, out: &mut impl Write) -> io::Result<()> {
        let table = self.table();
        let text = match width {
            None => table.trim_fmt(),
            Some(width) if self.fits(&table, width) => arranged(table, width),
            Some(width) => self.blocks(width),
        };
        writeln!(out, "{text}")
    }

    fn table(&self) -> Table {
        let mut table = blank_table(true);
        table.set_header(&self.headers);
        for row in &self.rows {
            table.add_row(row.iter().map(cell));
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            let mut values = self.rows.iter().map(|row| &row[index]);
            if values.clone().any(Value::is_number)
                && values.all(|value| value.is_number() || *value == Value::Null)
            {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    fn fits(&self, table: &Table, width: u16) -> bool {
        let natural: usize = table
            .column_max_content_widths()
            .iter()
            .map(|width| usize::from(*width) + 2)
            .sum();
        let width = usize::from(width);
        natural <= width || width / self.headers.len().max(1) >= COLUMN_WIDTH_MIN
    }

    fn blocks(&self, width: u16) -> String {
        let blocks: Vec<String> = self
            .rows
            .iter()
            .map(|row| {
                let mut block = blank_table(false);
                for (header, value) in self.headers.iter().zip(row) {
                    block.add_row([Cell::new(header), Cell::new(value.shown())]);
                }
                arranged(block, width)
            })
            .collect();
        if blocks.is_empty() {
            return self.headers.join(", ");
        }
        blocks.join("\n\n")
    }
}

/// Writes names and values, one line each.
pub fn write_facts(facts: &[(&str, String)], out: &mut impl Write) -> io::Result<()> {
    let mut table = blank_table(false);
    for (name, value) in facts {
        let value = Value::from(value.as_str()).shown();
        table.add_row([Cell::new(name), Cell::new(value)]);
    }
    match terminal_width() {
        None => writeln!(out, "{}", table.trim_fmt()),
        Some(width) => writeln!(out, "{}", arranged(table, width)),
    }
}

fn arranged(mut table: Table, width: u16) -> String {
    table
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(width);
    table.trim_fmt()
}

fn blank_table(has_header: bool) -> Table {
    let style = if has_header {
        let rule = LineStyle::none().fill('─').junction('─');
        TableStyle::new().header_separator(rule)
    } else {
        TableStyle::new()
    };
    let mut table = Table::new();
    table.load_style(style);
    table
}

fn cell(value: &Value) -> Cell {
    let cell = Cell::new(value.shown());
    if value.is_number() {
        cell.set_alignment(CellAlignment::Right)
    } else {
        cell
    }
}

fn terminal_width() -> Option<u16> {
    if io::stdout().is_terminal() {
        Table::new().width()
    } else {
        None
    }
}

/// Formats a count with its noun: `1 frame`, `2 frames`.
pub fn count(n: u64, noun: &str) -> String {
    if n == 1 {
        format!("1 {noun}")
    } else {
        format!("{n} {noun}s")
    }
}

/// Replaces a time in a row with its text, in UTC to the second. Other values are unchanged.
pub fn show_utc(row: &mut [Value], column: usize) {
    if let Value::Integer(us) = row[column] {
        row[column] = Value::Text(utc_text(us));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let mut grid = Grid::new(["name", "last seen", "frames", "readings", "firmware"]);
        grid.push(vec![
            "pump-1".into(),
            utc_text(1_772_000_000_000_000).into(),
            7.into(),
            Value::Null,
            "1.0".into(),
        ]);
        grid.push(vec![
            "pump-2".into(),
            Value::Null,
            12345.into(),
            1.into(),
            "".into(),
        ]);
        grid
    }

    fn written(grid: &Grid, width: Option<u16>) -> String {
        let mut out = Vec::new();
        grid.write_within(width, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_are_right_aligned() {
        let text = written(&grid(), None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        let end_of = |line: &str, word: &str| {
            line.split(word).next().unwrap().chars().count() + word.chars().count()
        };
        assert_eq!(end_of(lines[0], "frames"), end_of(lines[2], " 7"));
        assert_eq!(end_of(lines[0], "frames"), end_of(lines[3], "12345"));
    }

    #[test]
    fn tables_fit_narrow_terminals() {
        for width in [20, 30, 40, 60, 80] {
            let text = written(&grid(), Some(width));
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= usize::from(width), "{width}:\n{text}");
        }
        let text = written(&grid(), Some(40));
        assert!(text.contains("2026-02-25T06:13:20Z"), "{text}");
    }

    #[test]
    fn a_pipe_gets_one_line_per_row() {
        let mut grid = Grid::new(["text"]);
        grid.push(vec!["word ".repeat(200).trim().into()]);
        assert_eq!(written(&grid, None).lines().count(), 3);
    }
}
