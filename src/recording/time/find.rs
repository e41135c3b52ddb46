//! Finds the columns that contain the time.

use super::cell::{parse, parse_clock};
use super::{Source, TimePlan, Unit, order};
use crate::recording::ReadError;
use crate::recording::columns::index_of;
use crate::recording::layout::Layout;
use crate::recording::notes::Notes;
use crate::recording::options::ReadOptions;
use crate::recording::text::line_of;
use crate::recording::time::cell::Order;

const TIME_WORDS: [&str; 33] = [
    "time",
    "date",
    "datetime",
    "timestamp",
    "ts",
    "dt",
    "day",
    "epoch",
    "unix",
    "utc",
    "measured",
    "period",
    "datum",
    "zeit",
    "zeitstempel",
    "uhrzeit",
    "fecha",
    "hora",
    "heure",
    "jour",
    "data",
    "ora",
    "tid",
    "dato",
    "when",
    "dteday",
    "dates",
    "month",
    "week",
    "quarter",
    "observation",
    "time_hour",
    "localtime",
];
const CLOCK_WORDS: [&str; 15] = [
    "time", "hour", "hours", "hr", "hrs", "hh", "clock", "hhmm", "uhrzeit", "stunde", "hora",
    "heure", "tid", "zeit", "hod",
];
/// Names of columns with a part of the time: year, month, day, hour, minute, second.
const PARTS: [&[&str]; 6] = [
    &["year", "yr", "yyyy", "yy", "jahr", "year_"],
    &["month", "mon", "mo", "mnth", "mm", "monat"],
    &["day", "dy", "dd", "mday", "dom", "day_of_month", "tag"],
    &["hour", "hr", "hours", "hh", "hhmm", "hrmn", "stunde"],
    &["minute", "min", "mn", "mi", "minutes"],
    &["second", "sec", "ss", "seconds"],
];
const QUARTERS: [&str; 4] = ["quarter", "qtr", "qtr_", "q"];
const DAYS_OF_YEAR: [&str; 7] = [
    "doy",
    "jday",
    "yday",
    "day_of_year",
    "dayofyear",
    "julian_day",
    "jd",
];

/// Finds the time columns and their format.
///
/// # Errors
/// There is no time; the message states the likely reason.
pub fn find(
    text: &str,
    layout: &Layout,
    options: &ReadOptions,
    notes: &mut Notes,
) -> Result<TimePlan, ReadError> {
    let sample = Sample { layout };
    let format = options
        .time_format
        .as_deref()
        .map(|given| Format::parse(given, options));
    let format = format.transpose()?;
    let columns = options
        .time_column
        .iter()
        .map(|name| index_of(name, &layout.header, "--time-column"))
        .collect::<Result<Vec<usize>, ReadError>>()?;
    let source = match &format {
        Some(format) => sample.in_format(format, &columns),
        None if columns.is_empty() => sample.guess(),
        None => sample.in_columns(&columns),
    };
    let mut source = source.ok_or_else(|| sample.nothing(text, &columns))?;
    let given = match format {
        Some(Format::Order(order)) => Some(order),
        _ => None,
    };
    let mut is_inferred = false;
    if let Source::Text { .. } = source {
        let found = match given {
            Some(order) => Some(order),
            None => {
                let (found, inferred) = order::find(text, layout, &source)?;
                is_inferred = inferred;
                found
            }
        };
        if let Source::Text { order, .. } = &mut source {
            *order = found;
        }
    }
    let plan = TimePlan {
        is_utc: options.time_zone.is_none() && sample.says_utc(&source),
        source,
    };
    sample.report(&plan, options, is_inferred, notes);
    Ok(plan)
}

/// Parsed form of `--time-format`.
enum Format {
    Order(Order),
    Unit(Unit),
    Pattern(String),
}

impl Format {
    fn parse(given: &str, options: &ReadOptions) -> Result<Format, ReadError> {
        let since = |per_s| Ok(Format::Unit(Unit::Since { per_s, start_us: 0 }));
        let elapsed = |per_s| {
            let start = options.start.as_deref().ok_or_else(|| {
                ReadError::file(format!(
                    "--time-format {given} needs --start, such as 2024-05-01T12:00:00Z"
                ))
            })?;
            let start: jiff::Timestamp = start.parse().map_err(|_| {
                ReadError::file(format!(
                    "--start {start:?} is not a UTC time such as 2024-05-01T12:00:00Z"
                ))
            })?;
            Ok(Format::Unit(Unit::Since {
                per_s,
                start_us: start.as_microsecond(),
            }))
        };
        match given {
            "epoch-s" => since(1),
            "epoch-ms" => since(1_000),
            "epoch-us" => since(1_000_000),
            "epoch-ns" => since(1_000_000_000),
            "elapsed-s" => elapsed(1),
            "elapsed-ms" => elapsed(1_000),
            "year" => Ok(Format::Unit(Unit::Year)),
            "excel" => Ok(Format::Unit(Unit::Excel)),
            pattern if pattern.contains('%') => Ok(Format::Pattern(pattern.to_owned())),
            order => match (order.find(['D', 'd']), order.find('M')) {
                (Some(day), Some(month)) if day < month => Ok(Format::Order(Order::DayFirst)),
                (Some(_), Some(_)) => Ok(Format::Order(Order::MonthFirst)),
                _ => Err(ReadError::file(format!(
                    "--time-format {given:?} is unknown; use DD/MM/YYYY, MM/DD/YYYY, epoch-s, epoch-ms, \
                     epoch-us, epoch-ns, year, excel, elapsed-s, elapsed-ms or a pattern such as \"%d.%m.%Y %H:%M\""
                ))),
            },
        }
    }
}

struct Sample<'a> {
    layout: &'a Layout,
}

impl Sample<'_> {
    fn cells(&self, column: usize) -> impl Iterator<Item = &str> + Clone {
        let rows = self.layout.sample.iter();
        let cells = rows
            .filter_map(move |row| row.get(column))
            .map(String::as_str);
        cells.filter(|cell| !cell.is_empty() && *cell != "NA")
    }

    /// Returns whether at least half of the rows have a cell in this column, and `is` holds for at
    /// least four fifths of these cells.
    fn mostly(&self, column: usize, is: impl Fn(&str) -> bool) -> bool {
        let all = self.cells(column).count();
        let fit = self.cells(column).filter(|cell| is(cell)).count();
        all > 0 && 2 * all >= self.layout.sample.len() && 5 * fit >= 4 * all
    }

    fn name(&self, column: usize) -> String {
        let header = self.layout.header[column].trim().to_lowercase();
        let name = header.split(['(', '[']).next().unwrap_or_default();
        name.trim().replace([' ', '-', '.'], "_")
    }

    fn is_called(&self, column: usize, words: &[&str]) -> bool {
        let name = self.name(column);
        words.contains(&name.as_str()) || name.split('_').any(|part| words.contains(&part))
    }

    fn in_format(&self, format: &Format, columns: &[usize]) -> Option<Source> {
        match format {
            Format::Order(_) if columns.is_empty() => self.text(),
            Format::Order(_) => self.in_columns(columns),
            Format::Unit(unit) => {
                let fits =
                    |column: &usize| self.mostly(*column, |cell| unit.moment(cell).is_some());
                let found = || {
                    let called = (0..self.layout.width)
                        .filter(|column| self.is_called(*column, &TIME_WORDS));
                    called.chain(0..self.layout.width).find(fits)
                };
                let column = columns.first().copied().or_else(found)?;
                Some(Source::Number {
                    column,
                    unit: *unit,
                })
            }
            Format::Pattern(pattern) => {
                let source = |columns: Vec<usize>| Source::Pattern {
                    columns,
                    pattern: pattern.clone(),
                };
                if !columns.is_empty() {
                    return Some(source(columns.to_vec()));
                }
                let fits = |column: &usize| {
                    self.mostly(*column, |cell| super::by_pattern(pattern, cell).is_some())
                };
                (0..self.layout.width)
                    .find(fits)
                    .map(|column| source(vec![column]))
            }
        }
    }

    fn in_columns(&self, columns: &[usize]) -> Option<Source> {
        let has_date = |column: usize| {
            self.mostly(column, |cell| {
                parse(cell).is_some_and(|cell| cell.date.is_some())
            })
        };
        match *columns {
            [column] if has_date(column) => Some(Source::Text {
                date: column,
                clock: None,
                order: None,
            }),
            [column] => self.number(column, true),
            [date, clock] if has_date(date) => Some(Source::Text {
                date,
                clock: Some(clock),
                order: None,
            }),
            _ if columns.len() <= 6 => {
                let mut parts = [None; 6];
                for (part, column) in parts.iter_mut().zip(columns) {
                    *part = Some(*column);
                }
                Some(Source::Parts {
                    columns: parts,
                    day_of_year: None,
                    quarter: None,
                })
            }
            _ => None,
        }
    }

    fn guess(&self) -> Option<Source> {
        let numbered = || {
            let columns = 0..self.layout.width;
            let called = columns
                .clone()
                .filter(|column| self.is_called(*column, &TIME_WORDS));
            called
                .chain(columns.take(1))
                .find_map(|column| self.number(column, false))
        };
        self.text()
            .or_else(|| self.parts())
            .or_else(|| self.first_columns())
            .or_else(numbered)
    }

    /// Returns a column of dates, and a column of times of day if the dates have none.
    fn text(&self) -> Option<Source> {
        let dated = |column: &usize| {
            let is_plain = self.mostly(*column, |cell| {
                cell.bytes().all(|byte| byte.is_ascii_digit())
            });
            let may_be = !is_plain || self.is_called(*column, &TIME_WORDS) || *column == 0;
            may_be
                && self.mostly(*column, |cell| {
                    parse(cell).is_some_and(|cell| cell.date.is_some())
                })
        };
        let has_clock = |column: usize| {
            self.mostly(column, |cell| {
                parse(cell).is_some_and(|cell| cell.clock.is_some())
            })
        };
        let rank = |column: &usize| {
            let is_called = self.is_called(*column, &TIME_WORDS) || self.name(*column).is_empty();
            (has_clock(*column), is_called, std::cmp::Reverse(*column))
        };
        let date = (0..self.layout.width).filter(dated).max_by_key(rank)?;
        let has_none = self
            .cells(date)
            .all(|cell| parse(cell).is_none_or(|cell| cell.clock.is_none()));
        let clock = has_none.then(|| self.clock(date)).flatten();
        Some(Source::Text {
            date,
            clock,
            order: None,
        })
    }

    fn clock(&self, date: usize) -> Option<usize> {
        let others = || (0..self.layout.width).filter(|column| *column != date);
        let is_clock = |column: &usize| {
            self.mostly(*column, |cell| {
                cell.contains(':') && parse_clock(cell).is_some()
            })
        };
        let called = |column: &usize| {
            self.is_called(*column, &CLOCK_WORDS)
                && self.mostly(*column, |cell| parse_clock(cell).is_some())
        };
        others().find(is_clock).or_else(|| others().find(called))
    }

    /// Returns separate columns of year, month, day and so on.
    fn parts(&self) -> Option<Source> {
        // A header may have two names, such as MON/MMM.
        let is_named = |column: usize, words: &[&str]| {
            self.name(column)
                .split('/')
                .any(|name| words.contains(&name))
        };
        let find = |words: &[&str]| (0..self.layout.width).find(|column| is_named(*column, words));
        let is_within = |column, low, high| self.is_within(column, low, high);
        let year = find(PARTS[0]).filter(|column| is_within(*column, 1000.0, 2999.0))?;
        let mut columns = PARTS.map(find);
        columns[0] = Some(year);
        // NOAA buoy files use MM for both month and minute.
        let after_hour = columns[3].map(|hour| hour + 1);
        let is_minute = |column: &usize| *column < self.layout.width && self.name(*column) == "mm";
        columns[4] = columns[4].or(after_hour.filter(is_minute));
        let is_month = |column: &usize| {
            is_within(*column, 1.0, 12.0)
                || self.mostly(*column, |cell| super::month_of(cell).is_some())
        };
        columns[1] = columns[1].filter(is_month);
        columns[2] = columns[2].filter(|column| is_within(*column, 1.0, 31.0));
        columns[3] =
            columns[3].filter(|column| self.mostly(*column, |cell| parse_clock(cell).is_some()));
        columns[4] = columns[4].filter(|column| is_within(*column, 0.0, 59.0));
        columns[5] = columns[5].filter(|column| is_within(*column, 0.0, 59.0));
        // A part counts only together with the next larger one.
        for part in 1..6 {
            if columns[part - 1].is_none() {
                columns[part] = None;
            }
        }
        let mut day_of_year = None;
        let quarter =
            find(&QUARTERS).filter(|column| columns[1].is_none() && is_within(*column, 1.0, 4.0));
        if columns[1].is_none() && quarter.is_none() {
            day_of_year = find(&DAYS_OF_YEAR).filter(|column| is_within(*column, 1.0, 366.0));
        }
        if day_of_year.is_some() {
            columns[3] = find(PARTS[3])
                .filter(|column| self.mostly(*column, |cell| parse_clock(cell).is_some()));
        }
        Some(Source::Parts {
            columns,
            day_of_year,
            quarter,
        })
    }

    /// Returns year, month, day and perhaps hour from the first columns of a file without a header.
    fn first_columns(&self) -> Option<Source> {
        let is_named = self.layout.header.iter().any(|name| !name.is_empty());
        let is_date = !is_named
            && self.layout.width > 3
            && self.is_within(0, 1900.0, 2100.0)
            && self.is_within(1, 1.0, 12.0)
            && self.is_within(2, 1.0, 31.0);
        let mut days = self.layout.sample.windows(2);
        let has_hour =
            self.is_within(3, 0.0, 24.0) && days.any(|pair| pair[0][..3] == pair[1][..3]);
        let columns = [Some(0), Some(1), Some(2), has_hour.then_some(3), None, None];
        is_date.then_some(Source::Parts {
            columns,
            day_of_year: None,
            quarter: None,
        })
    }

    /// Returns whether the cells are mostly whole numbers in a range.
    fn is_within(&self, column: usize, low: f64, high: f64) -> bool {
        let fits = |number: f64| number.fract() == 0.0 && (low..=high).contains(&number);
        self.mostly(column, |cell| cell.parse().is_ok_and(fits))
    }

    /// Returns the column as a source of times written as single numbers; their magnitude
    /// determines the unit.
    fn number(&self, column: usize, is_given: bool) -> Option<Source> {
        let is_called =
            is_given || self.is_called(column, &TIME_WORDS) || self.is_called(column, PARTS[0]);
        let is_year_column = self.is_called(column, PARTS[0]);
        let is_within = |low: f64, high: f64| {
            self.mostly(column, |cell| {
                cell.replace(',', ".")
                    .parse()
                    .is_ok_and(|number: f64| (low..high).contains(&number))
            })
        };
        let since = |per_s| Unit::Since { per_s, start_us: 0 };
        // From 1990 to 2100, in seconds.
        let (low, high) = (6.3e8, 4.1e9);
        let fits = |unit: Unit| self.mostly(column, |cell| unit.moment(cell).is_some());
        let unit = match () {
            () if is_within(low, high) && self.is_sequence(column) => since(1),
            () if is_within(low * 1e3, high * 1e3) && self.is_sequence(column) => since(1_000),
            () if is_within(low * 1e6, high * 1e6) && self.is_sequence(column) => since(1_000_000),
            () if is_within(low * 1e9, high * 1e9) && self.is_sequence(column) => {
                since(1_000_000_000)
            }
            () if column == 0 && self.is_years() => Unit::Year,
            () if !is_called => return None,
            () if fits(Unit::YearMonth) && is_within(1e5, 3e5) => Unit::YearMonth,
            // Numbers such as 930 and 2350 in a column of times are hours and minutes.
            () if fits(Unit::Year) && (is_given || is_year_column || is_within(1500.0, 2200.0)) => {
                Unit::Year
            }
            () if is_within(20_000.0, 80_000.0) => Unit::Excel,
            () => return None,
        };
        Some(Source::Number { column, unit })
    }

    /// Returns whether the first column contains consecutive years. If its header is empty or `t`,
    /// increasing years are enough.
    fn is_years(&self) -> bool {
        let years: Vec<f64> = self.cells(0).filter_map(|cell| cell.parse().ok()).collect();
        let is_year = |cell: &str| {
            cell.parse()
                .is_ok_and(|year: f64| (1500.0..=2200.0).contains(&year))
        };
        let may_skip = ["", "t"].contains(&self.name(0).as_str());
        let follows = |pair: &[f64]| pair[1] == pair[0] + 1.0 || may_skip && pair[1] > pair[0];
        self.mostly(0, is_year) && years.len() > 2 && years.windows(2).all(follows)
    }

    /// Returns whether numbers mostly change in one direction or stay the same.
    fn is_sequence(&self, column: usize) -> bool {
        let numbers: Vec<f64> = self
            .cells(column)
            .filter_map(|cell| cell.parse().ok())
            .collect();
        let up = numbers.windows(2).filter(|pair| pair[1] >= pair[0]).count();
        let down = numbers.windows(2).filter(|pair| pair[1] <= pair[0]).count();
        let steps = numbers.len().saturating_sub(1);
        10 * up.max(down) >= 9 * steps || self.is_called(column, &TIME_WORDS)
    }

    fn says_utc(&self, source: &Source) -> bool {
        let columns = TimePlan {
            source: source.clone(),
            is_utc: false,
        }
        .columns();
        columns.iter().any(|column| {
            let header = self.layout.header[*column].to_lowercase();
            let unit = self
                .layout
                .units
                .as_ref()
                .map(|units| units[*column].to_lowercase());
            let is_utc = |text: &str| {
                text.split(|char: char| !char.is_alphanumeric())
                    .any(|word| ["utc", "gmt"].contains(&word))
            };
            is_utc(&header) || unit.is_some_and(|unit| is_utc(&unit))
        })
    }

    fn report(&self, plan: &TimePlan, options: &ReadOptions, is_inferred: bool, notes: &mut Notes) {
        let names = |columns: &[usize]| {
            let shown: Vec<String> = columns
                .iter()
                .map(|column| self.layout.title(*column))
                .collect();
            shown.join(" and ")
        };
        let order_text = |order: Option<Order>| match order {
            None => "",
            Some(Order::DayFirst) => ", day first",
            Some(Order::MonthFirst) => ", month first",
        };
        let (columns, how) = match &plan.source {
            Source::Text { date, clock, order } => {
                let columns: Vec<usize> = [Some(*date), *clock].into_iter().flatten().collect();
                (names(&columns), order_text(*order).to_owned())
            }
            Source::Parts {
                columns,
                day_of_year,
                quarter,
            } => {
                let columns: Vec<usize> = columns
                    .iter()
                    .chain([day_of_year, quarter])
                    .flatten()
                    .copied()
                    .collect();
                (names(&columns), String::new())
            }
            Source::Number { column, unit } => (names(&[*column]), format!(", {}", unit.name())),
            Source::Pattern { columns, pattern } => (names(columns), format!(", {pattern}")),
        };
        let reason = if is_inferred {
            ", inferred from the order of rows"
        } else {
            ""
        };
        if options.time_column.is_empty() || options.time_format.is_none() {
            notes.guess(
                format!("time in {columns}{how}{reason}"),
                "--time-column, --time-format",
            );
        }
    }

    fn nothing(&self, text: &str, columns: &[usize]) -> ReadError {
        let line = line_of(text, self.layout.data_at);
        if let Some(column) = columns.first() {
            let cell = self.cells(*column).next().unwrap_or_default();
            let reason = format!(
                "{cell:?} in {} is not a recognized time; use --time-format",
                self.layout.title(*column)
            );
            return ReadError::line(line, reason);
        }
        let first = self.layout.sample.first();
        let counts = |column: &usize| {
            let numbers: Vec<f64> = self
                .cells(*column)
                .filter_map(|cell| cell.parse().ok())
                .collect();
            numbers.len() > 1 && numbers.windows(2).all(|pair| pair[1] > pair[0])
        };
        let cause = match (0..self.layout.width).find(counts) {
            Some(column) if self.layout.width > 1 => format!(
                "if {} is elapsed time, try --time-column {} --time-format elapsed-s --start 2024-01-01T00:00:00Z",
                self.layout.title(column),
                column + 1
            ),
            _ => "if there is a time column, set --time-column and --time-format".to_owned(),
        };
        let shown = first
            .map(|row| row.join(&self.layout.separator.to_string()))
            .unwrap_or_default();
        let shown: String = shown.chars().take(40).collect();
        ReadError::line(
            line,
            format!("no column contains a time ({shown}); {cause}"),
        )
    }
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Since { start_us, .. } if start_us != 0 => "elapsed since --start",
            Unit::Since { per_s: 1, .. } => "epoch seconds",
            Unit::Since { per_s: 1_000, .. } => "epoch milliseconds",
            Unit::Since {
                per_s: 1_000_000, ..
            } => "epoch microseconds",
            Unit::Since { .. } => "epoch nanoseconds",
            Unit::Year => "years",
            Unit::Excel => "spreadsheet days",
            Unit::YearMonth => "YYYYMM",
        }
    }
}
