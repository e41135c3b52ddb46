//! Finds the table in a text: its separator, its header and units, and its first row.
//!
//! Tries each separator on the first rows. The best separator gives rows with the same number of
//! fields, containing numbers and times. Rows are records that look like most others; the header is
//! above them.

use csv::StringRecord;

use super::ReadError;
use super::number::{Marks, POINT, Style, Value};
use super::options::{ReadOptions, name_of};
use super::records::{BLANKS, Records};
use super::text::{line_at, line_of, next_line};
use super::time::cell;

/// Number of records examined.
const SAMPLE: usize = 400;
const SEPARATORS: [char; 5] = [',', ';', '\t', '|', BLANKS];
const COMMENTS: [&str; 5] = ["#", "//", "%", "!", "*"];

/// Position and shape of a table in its text.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Separator between fields.
    pub separator: char,
    /// Byte offset of the first row.
    pub data_at: usize,
    /// Number of fields in a row.
    pub width: usize,
    /// Name of each column; empty if the header has none.
    pub header: Vec<String>,
    /// A unit for each column, if a line of units follows the header.
    pub units: Option<Vec<String>>,
    /// Line of the header; `None` without a header.
    pub header_line: Option<u64>,
    /// The first rows.
    pub sample: Vec<Vec<String>>,
}

/// A record of the sample.
#[derive(Clone, Debug)]
struct Row {
    at: usize,
    fields: Vec<String>,
}

/// Kind of most cells in a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Number,
    Time,
    Text,
    /// No cell has a value.
    Empty,
}

impl Layout {
    /// Finds the table in a text.
    ///
    /// # Errors
    /// There is no table; the message states the likely reason.
    pub fn find(text: &str, options: &ReadOptions) -> Result<Layout, ReadError> {
        if text.trim().is_empty() {
            return Err(ReadError::file("the file is empty".to_owned()));
        }
        let separators = match &options.separator {
            Some(separator) => std::slice::from_ref(separator),
            None => &SEPARATORS,
        };
        let mut best: Option<(f64, Layout)> = None;
        let mut fault = None;
        for &separator in separators {
            let mut candidate = Candidate::read(text, separator, options);
            fault = fault.or(candidate.fault.take());
            let Some((score, layout)) = candidate.layout(text) else {
                continue;
            };
            // Blanks also occur in dates and texts.
            let score = if separator == BLANKS {
                score * 0.5
            } else {
                score
            };
            if best.as_ref().is_none_or(|(best, _)| score > *best) {
                best = Some((score, layout));
            }
        }
        best.map(|(_, layout)| layout)
            .ok_or_else(|| fault.unwrap_or_else(|| nothing_found(text, options)))
    }
}

/// Returns an error that explains why there is no table.
fn nothing_found(text: &str, options: &ReadOptions) -> ReadError {
    if let Some(given) = options.separator {
        let mut seen = SEPARATORS
            .into_iter()
            .filter(|separator| *separator != given && *separator != BLANKS)
            .map(|separator| {
                (
                    text.lines()
                        .take(20)
                        .map(|line| line.matches(separator).count())
                        .sum::<usize>(),
                    separator,
                )
            });
        if let Some((1.., separator)) = seen.clone().max().filter(|_| seen.next().is_some()) {
            let (seen, given) = (name_of(separator), name_of(given));
            return ReadError::line(
                1,
                format!(
                    "no rows of fields separated by {given}, but some by {seen}; try --separator {seen}"
                ),
            );
        }
    }
    let rows = text.lines().filter(|line| !line.trim().is_empty()).count();
    match rows {
        1 => ReadError::line(1, "no readings: nothing follows the first line".to_owned()),
        _ => ReadError::line(
            1,
            "no table of times and numbers found; try --separator and --header-line".to_owned(),
        ),
    }
}

/// The sample split by one separator.
struct Candidate {
    separator: char,
    rows: Vec<Row>,
    comments: Vec<usize>,
    header_line: Option<u64>,
    /// Reason why the sample ends early.
    fault: Option<ReadError>,
}

impl Candidate {
    fn read(text: &str, separator: char, options: &ReadOptions) -> Candidate {
        let mut candidate = Candidate {
            separator,
            rows: Vec::new(),
            comments: Vec::new(),
            header_line: options.header_line,
            fault: None,
        };
        let mut record = StringRecord::new();
        let mut start = 0;
        // Comments may contain unterminated quotes: skip each as a whole line.
        while start < text.len() && candidate.rows.is_empty() {
            let line = line_at(text, start);
            let is_comment = is_comment(line);
            let is_before = options
                .header_line
                .is_some_and(|header| header > 0 && line_of(text, start) < header);
            if is_comment {
                candidate.comments.push(start);
            }
            if !is_comment && !is_before && !line.trim().is_empty() {
                break;
            }
            start = next_line(text, start);
        }
        let mut records = Records::new(text, start, separator);
        while candidate.rows.len() < SAMPLE {
            let at = match records.read(&mut record) {
                Ok(Some(at)) => at,
                Ok(None) => break,
                Err(error) => {
                    candidate.fault = Some(error);
                    break;
                }
            };
            if is_comment(line_at(text, at)) {
                candidate.comments.push(at);
                continue;
            }
            let fields = record
                .iter()
                .map(|field| field.trim_matches('"').trim().to_owned());
            candidate.rows.push(Row {
                at,
                fields: fields.collect(),
            });
        }
        candidate
    }

    /// Returns the layout and its score, from 0 up.
    fn layout(self, text: &str) -> Option<(f64, Layout)> {
        let width = self.width()?;
        let kinds = self.kinds(width);
        let count = |is: Kind| kinds.iter().filter(|kind| **kind == is).count();
        let typed = count(Kind::Number) + count(Kind::Time);
        let filled = width - count(Kind::Empty);
        if width < 2 || typed == 0 {
            return None;
        }
        let first = match self.header_line {
            Some(0) => 0,
            Some(_) => {
                1 + self
                    .rows
                    .get(1..)?
                    .iter()
                    .position(|row| is_like(row, &kinds))?
            }
            None => self.rows.iter().position(|row| is_like(row, &kinds))?,
        };
        let rows = &self.rows[first.min(self.rows.len())..];
        let fitting: Vec<&Row> = rows
            .iter()
            .filter(|row| row.fields.len() == width)
            .collect();
        let share = fitting.len() as f64 / rows.len().max(1) as f64;
        let score =
            share * (typed as f64 / filled.max(1) as f64) * (1.0 + (width as f64).ln() / 10.0);
        let above = self.header(text, first, width);
        let layout = Layout {
            separator: self.separator,
            data_at: rows.first()?.at,
            width,
            header: above.header,
            units: above.units,
            header_line: above.line,
            sample: fitting.iter().map(|row| row.fields.clone()).collect(),
        };
        (score > 0.0).then_some((score, layout))
    }

    /// Returns the number of fields in most rows at the end of the sample.
    fn width(&self) -> Option<usize> {
        let from = self.rows.len() / 2;
        let mut widths: Vec<usize> = self.rows[from..]
            .iter()
            .map(|row| row.fields.len())
            .collect();
        widths.sort_unstable();
        widths
            .chunk_by(|a, b| a == b)
            .max_by_key(|run| (run.len(), run[0]))
            .map(|run| run[0])
    }

    fn kinds(&self, width: usize) -> Vec<Kind> {
        // The first rows may be a header; if there are few rows, the last one decides.
        let from = (self.rows.len() / 2).min(self.rows.len().saturating_sub(1));
        let rows: Vec<&Row> = self.rows[from..]
            .iter()
            .filter(|row| row.fields.len() == width)
            .collect();
        (0..width)
            .map(|column| {
                let cells = rows.iter().map(|row| row.fields[column].as_str());
                kind_of(cells)
            })
            .collect()
    }

    fn header(&self, text: &str, first: usize, width: usize) -> Above {
        let is_header = |row: &&Row| {
            let names = row.fields.iter().filter(|field| !field.is_empty()).count();
            (row.fields.len() == width || row.fields.len() + 1 == width)
                && 2 * names >= width.min(4)
        };
        let above: Vec<&Row> = self.rows[..first]
            .iter()
            .rev()
            .take(4)
            .take_while(is_header)
            .collect();
        // Search from the last line up: units and aggregation types are below the names.
        let names = above.iter().position(|row| !is_units(row));
        let Some(names) = names.or(above.len().checked_sub(1)) else {
            return self.commented_header(text, first, width);
        };
        let units = names
            .checked_sub(1)
            .map(|units| above[units].fields.clone());
        Above {
            header: padded(above[names].fields.clone(), width),
            units: units.map(|units| padded(units, width)),
            line: Some(line_of(text, above[names].at)),
        }
    }

    /// Uses the last comments above the rows as header and units if they have as many fields as a
    /// row.
    fn commented_header(&self, text: &str, first: usize, width: usize) -> Above {
        let data_at = self.rows.get(first).map_or(0, |row| row.at);
        let above = self.comments.iter().rev().filter(|at| **at < data_at);
        let fields = |at: &usize| {
            let line = line_at(text, *at).trim_start_matches(['#', '/', '%', '!', '*', ' ', '\t']);
            let mut record = StringRecord::new();
            let mut records = Records::new(line, 0, self.separator);
            records.read(&mut record).ok().flatten()?;
            let is_header =
                record.len() == width && record.iter().all(|field| POINT.number(field).is_none());
            is_header.then(|| Row {
                at: *at,
                fields: record.iter().map(str::to_owned).collect(),
            })
        };
        let above: Vec<Row> = above.take(3).map_while(fields).collect();
        let names = above.iter().position(|row| !is_units(row));
        let names = names.or(above.len().checked_sub(1));
        match names.filter(|_| self.header_line.is_none()) {
            Some(names) => Above {
                header: above[names].fields.clone(),
                units: names
                    .checked_sub(1)
                    .map(|units| above[units].fields.clone()),
                line: Some(line_of(text, above[names].at)),
            },
            None => Above {
                header: vec![String::new(); width],
                units: None,
                line: None,
            },
        }
    }
}

/// The lines above the rows.
struct Above {
    header: Vec<String>,
    units: Option<Vec<String>>,
    line: Option<u64>,
}

/// Adds an empty name for the column of row names, for which R writes no header.
fn padded(mut fields: Vec<String>, width: usize) -> Vec<String> {
    if fields.len() + 1 == width {
        fields.insert(0, String::new());
    }
    fields
}

/// Returns whether a line is a comment.
pub fn is_comment(line: &str) -> bool {
    let line = line.trim_start().trim_start_matches('"');
    COMMENTS.iter().any(|mark| line.starts_with(mark))
}

fn kind_of<'a>(cells: impl Iterator<Item = &'a str>) -> Kind {
    let (mut numbers, mut times, mut all) = (0, 0, 0);
    let marks = Marks::default();
    for cell in cells.filter(|cell| !marks.contain(cell)) {
        all += 1;
        match () {
            () if is_number(cell) => numbers += 1,
            () if cell::parse(cell).is_some() => times += 1,
            () => {}
        }
    }
    match () {
        () if all == 0 => Kind::Empty,
        () if 10 * numbers >= 6 * all => Kind::Number,
        () if 10 * times >= 6 * all => Kind::Time,
        () => Kind::Text,
    }
}

/// Returns whether a cell is a number in any style.
fn is_number(cell: &str) -> bool {
    let comma = Style {
        decimal: ',',
        thousands: Some('.'),
    };
    let point = Style {
        decimal: '.',
        thousands: Some(','),
    };
    let marks = Marks::default();
    [POINT, comma, point]
        .iter()
        .any(|style| matches!(style.read(cell, &marks), Value::Number(_)))
}

/// Returns whether a record is a row: at least half of its cells have the kind of their column.
fn is_like(row: &Row, kinds: &[Kind]) -> bool {
    if row.fields.len() != kinds.len() {
        return false;
    }
    let marks = Marks::default();
    let (mut like, mut unlike) = (0, 0);
    for (field, kind) in row.fields.iter().zip(kinds) {
        let is_like = match kind {
            _ if marks.contain(field) => continue,
            Kind::Number => is_number(field),
            Kind::Time => cell::parse(field).is_some(),
            Kind::Text | Kind::Empty => continue,
        };
        if is_like { like += 1 } else { unlike += 1 }
    }
    like > 0 && like >= unlike
}

/// Returns whether a line below the header contains units or similar descriptions by loggers.
fn is_units(row: &Row) -> bool {
    let fields: Vec<&str> = row.fields.iter().map(String::as_str).collect();
    let filled: Vec<&&str> = fields.iter().filter(|field| !field.is_empty()).collect();
    let units = filled.iter().filter(|field| is_unit(field)).count();
    !filled.is_empty() && 2 * units >= filled.len()
}

fn is_unit(field: &str) -> bool {
    const UNITS: [&str; 83] = [
        "c", "°c", "degc", "deg c", "deg_c", "celsius", "f", "degf", "°f", "k", "kelvin", "%",
        "%rh", "rh", "hpa", "mbar", "bar", "pa", "kpa", "mb", "m", "mm", "cm", "km", "in", "inch",
        "ft", "m/s", "m s-1", "km/h", "mph", "knots", "kt", "deg", "°", "degrees", "w", "kw", "mw",
        "wh", "kwh", "mwh", "v", "mv", "a", "ma", "hz", "w/m2", "w/m²", "w/m^2", "wm-2", "lx",
        "lux", "ppm", "ppb", "ug/m3", "µg/m3", "µg/m³", "mg/m3", "g", "kg", "l", "l/s", "m3/s",
        "m3", "m3/h", "s", "sec", "min", "h", "ms", "avg", "smp", "tot", "std", "utc", "ts", "rn",
        "yr", "mo", "dy", "hr", "mn",
    ];
    let field = field.trim();
    let is_bracketed = (field.starts_with('[') && field.ends_with(']'))
        || (field.starts_with('(') && field.ends_with(')'));
    // Field widths, as hydrological services write them: 5s, 20d, 14n.
    let is_width = field.len() >= 2
        && field.ends_with(['s', 'd', 'n'])
        && field[..field.len() - 1]
            .bytes()
            .all(|byte| byte.is_ascii_digit());
    is_bracketed || is_width || UNITS.contains(&field.to_lowercase().as_str())
}
