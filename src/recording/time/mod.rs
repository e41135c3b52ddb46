//! Time of a row: its columns, their format and the resulting time.

pub mod cell;
mod find;
mod order;
pub mod zone;

use std::collections::HashSet;

use csv::StringRecord;
use fieldgate_protocol::value::check_utc;
use jiff::civil::{Date, DateTime, Time};
use jiff::fmt::strtime::BrokenDownTime;
use jiff::tz::Offset;

pub use find::find;

use cell::{Order, month_of, parse, parse_clock};

/// Columns and format of the time of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct TimePlan {
    /// Columns and format.
    pub source: Source,
    /// Whether the header states that times without an offset are UTC.
    pub is_utc: bool,
}

/// Columns and format of times.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Text in one column, or the date in one and the time of day in another.
    Text {
        date: usize,
        /// Column of the time of day.
        clock: Option<usize>,
        /// Order of day and month; `None` if no date is ambiguous.
        order: Option<Order>,
    },
    /// Numbers in separate columns.
    Parts {
        /// Columns of year, month, day, hour, minute and second.
        columns: [Option<usize>; 6],
        /// Column of the day of the year, used instead of month and day.
        day_of_year: Option<usize>,
        /// Column of the quarter, used instead of the month.
        quarter: Option<usize>,
    },
    /// A single number.
    Number { column: usize, unit: Unit },
    /// Text in the format of a strptime pattern.
    Pattern {
        /// Columns of the text, joined by blanks.
        columns: Vec<usize>,
        pattern: String,
    },
}

/// Unit of a number that represents a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// Number of units of 1/`per_s` seconds since `start_us`.
    Since {
        /// Units per second: 1, 1,000, 1,000,000 or 1,000,000,000.
        per_s: i64,
        /// Start in microseconds since 1970.
        start_us: i64,
    },
    /// Years, such as 1958.21.
    Year,
    /// Days since the end of 1899, as in spreadsheets.
    Excel,
    /// YYYYMM.
    YearMonth,
}

/// Time of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    /// Microseconds since 1970.
    Utc(i64),
    /// A time without an offset.
    Local(DateTime),
}

impl TimePlan {
    /// Returns the columns that contain the time.
    pub fn columns(&self) -> HashSet<usize> {
        match &self.source {
            Source::Text { date, clock, .. } => {
                [Some(*date), *clock].into_iter().flatten().collect()
            }
            Source::Parts {
                columns,
                day_of_year,
                quarter,
            } => columns
                .iter()
                .chain([day_of_year, quarter])
                .flatten()
                .copied()
                .collect(),
            Source::Number { column, .. } => HashSet::from([*column]),
            Source::Pattern { columns, .. } => columns.iter().copied().collect(),
        }
    }

    /// Returns the time column that error messages name.
    pub fn column(&self) -> usize {
        match &self.source {
            Source::Text { date, .. } => *date,
            Source::Parts { columns, .. } => columns[0].unwrap_or(0),
            Source::Number { column, .. } => *column,
            Source::Pattern { columns, .. } => columns[0],
        }
    }

    /// Returns the time of a row; `None` if its cells do not match the plan.
    pub fn moment(&self, record: &StringRecord) -> Option<Moment> {
        let cell = |column: usize| record.get(column).unwrap_or_default();
        let moment = match &self.source {
            Source::Text { date, clock, order } => text(cell(*date), clock.map(cell), *order)?,
            Source::Parts {
                columns,
                day_of_year,
                quarter,
            } => {
                let mut cells = columns.map(|column| column.map(cell));
                let month = quarter.map(|quarter| month_of_quarter(cell(quarter)));
                if let Some(month) = month {
                    cells[1] = Some(month?);
                }
                Moment::Local(parts(cells, day_of_year.map(cell))?)
            }
            Source::Number { column, unit } => unit.moment(cell(*column))?,
            Source::Pattern { columns, pattern } => {
                let cells: Vec<&str> = columns.iter().map(|column| cell(*column)).collect();
                by_pattern(pattern, &cells.join(" "))?
            }
        };
        match moment {
            Moment::Utc(us) => check_utc(us).ok().map(|()| moment),
            Moment::Local(_) if self.is_utc => Some(Moment::Utc(utc_us(moment)?)),
            Moment::Local(_) => Some(moment),
        }
    }
}

/// Returns a time in microseconds, treating a local time as UTC.
pub fn utc_us(moment: Moment) -> Option<i64> {
    match moment {
        Moment::Utc(us) => Some(us),
        Moment::Local(time) => Some(Offset::UTC.to_timestamp(time).ok()?.as_microsecond()),
    }
}

fn text(date: &str, clock: Option<&str>, order: Option<Order>) -> Option<Moment> {
    let mut cell = parse(date)?;
    if let Some(clock) = clock {
        cell.clock = Some(parse_clock(clock)?);
    }
    if order.is_none() && matches!(cell.date, Some(cell::DateText::Open(..))) {
        return None;
    }
    let local = cell.moment(order.unwrap_or(Order::DayFirst))?;
    let Some(offset_s) = cell.offset_s else {
        return Some(Moment::Local(local));
    };
    let offset = Offset::from_seconds(offset_s).ok()?;
    Some(Moment::Utc(
        offset.to_timestamp(local).ok()?.as_microsecond(),
    ))
}

fn parts(cells: [Option<&str>; 6], day_of_year: Option<&str>) -> Option<DateTime> {
    let [year, month, day, hour, minute, second] = cells;
    let year = i16::try_from(whole(year?)?).ok()?;
    let year = if (0..70).contains(&year) {
        2000 + year
    } else {
        year
    };
    let year = if (70..100).contains(&year) {
        1900 + year
    } else {
        year
    };
    let mut date = match day_of_year {
        Some(day) => Date::new(year, 1, 1)
            .ok()?
            .checked_add(jiff::Span::new().try_days(whole(day)? - 1).ok()?)
            .ok()
            .filter(|date| date.year() == year)?,
        None => {
            let month = match month {
                None => 1,
                Some(month) => {
                    whole(month).or_else(|| month_of(month).map(|month| month as i64))?
                }
            };
            let day = day.map_or(Some(1), whole)?;
            Date::new(year, i8::try_from(month).ok()?, i8::try_from(day).ok()?).ok()?
        }
    };
    let mut time = Time::midnight();
    if let Some(hour) = hour {
        let (clock, is_next_day) = parse_clock(hour)?;
        time = clock;
        if is_next_day {
            date = date.tomorrow().ok()?;
        }
    }
    let minute = minute.map_or(Some(time.minute().into()), whole)?;
    let second = second.map_or(Some(0.0), |second| second.parse::<f64>().ok())?;
    if !(0.0..60.0).contains(&second) {
        return None;
    }
    let nanos = ((second.fract()) * 1e9).round().min(999_999_999.0) as i32;
    let time = Time::new(time.hour(), i8::try_from(minute).ok()?, second as i8, nanos).ok()?;
    Some(date.to_datetime(time))
}

fn month_of_quarter(cell: &str) -> Option<&'static str> {
    let quarter = usize::try_from(whole(cell)?).ok()?;
    ["1", "4", "7", "10"].get(quarter.checked_sub(1)?).copied()
}

/// Parses a whole number, including the form `7.0`.
fn whole(cell: &str) -> Option<i64> {
    let digits = cell.split_once('.').map_or(cell, |(whole, zeros)| {
        if zeros.bytes().all(|byte| byte == b'0') {
            whole
        } else {
            ""
        }
    });
    digits.parse().ok()
}

impl Unit {
    /// Returns the time that a number represents.
    pub fn moment(self, cell: &str) -> Option<Moment> {
        match self {
            Unit::Since { per_s, start_us } => {
                let us = scaled_us(cell, per_s)?;
                Some(Moment::Utc(start_us.checked_add(us)?))
            }
            Unit::Year => {
                let years: f64 = cell.replace(',', ".").parse().ok()?;
                if !(1000.0..3000.0).contains(&years) {
                    return None;
                }
                let year = years.floor() as i16;
                let start = utc_us(Moment::Local(
                    Date::new(year, 1, 1).ok()?.to_datetime(Time::midnight()),
                ))?;
                let end = utc_us(Moment::Local(
                    Date::new(year + 1, 1, 1)
                        .ok()?
                        .to_datetime(Time::midnight()),
                ))?;
                // Rounded to seconds: the text is not more precise.
                let seconds = ((end - start) as f64 * years.fract() / 1e6).round() as i64;
                local(start + seconds * 1_000_000)
            }
            Unit::Excel => {
                let days: f64 = cell.replace(',', ".").parse().ok()?;
                let seconds = (days - 25_569.0) * 86_400.0;
                if !(1.0..200_000.0).contains(&days) {
                    return None;
                }
                local((seconds * 1_000.0).round() as i64 * 1_000)
            }
            Unit::YearMonth => {
                let digits = Some(cell).filter(|cell| cell.len() == 6)?;
                let (year, month) = (
                    digits.get(..4)?.parse().ok()?,
                    digits.get(4..)?.parse().ok()?,
                );
                Some(Moment::Local(
                    Date::new(year, month, 1)
                        .ok()?
                        .to_datetime(Time::midnight()),
                ))
            }
        }
    }
}

fn local(us: i64) -> Option<Moment> {
    let time = jiff::Timestamp::from_microsecond(us).ok()?;
    Some(Moment::Local(Offset::UTC.to_datetime(time)))
}

/// Converts a decimal number of units of 1/`per_s` seconds to microseconds, exactly as far as
/// possible.
fn scaled_us(cell: &str, per_s: i64) -> Option<i64> {
    let (mantissa, exponent) = match cell.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (cell, 0),
    };
    if exponent != 0 {
        let number: f64 = format!("{mantissa}e{exponent}").parse().ok()?;
        let us = number * (1_000_000.0 / per_s as f64);
        return (us.abs() < 9e18).then_some(us as i64);
    }
    let (whole, fraction) = mantissa.split_once(['.', ',']).unwrap_or((mantissa, ""));
    let is_negative = whole.starts_with('-');
    let whole: i128 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = &fraction[..fraction.len().min(12)];
    let parts: i128 = if digits.is_empty() {
        0
    } else {
        digits.parse().ok()?
    };
    let scale = 10_i128.pow(digits.len() as u32);
    let parts = if is_negative { -parts } else { parts };
    let us = (whole * scale + parts) * 1_000_000;
    i64::try_from(us.div_euclid(scale * i128::from(per_s))).ok()
}

fn by_pattern(pattern: &str, cell: &str) -> Option<Moment> {
    let parsed = BrokenDownTime::parse(pattern, cell).ok()?;
    if let Ok(time) = parsed.to_timestamp() {
        return Some(Moment::Utc(time.as_microsecond()));
    }
    if let Ok(time) = parsed.to_datetime() {
        return Some(Moment::Local(time));
    }
    let date = parsed.to_date().ok();
    let date = date.or_else(|| {
        let (year, month) = (parsed.year()?, parsed.month().unwrap_or(1));
        Date::new(year, month, parsed.day().unwrap_or(1)).ok()
    })?;
    Some(Moment::Local(date.to_datetime(Time::midnight())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(moment: Option<Moment>) -> Option<String> {
        Some(match moment? {
            Moment::Utc(us) => jiff::Timestamp::from_microsecond(us).unwrap().to_string(),
            Moment::Local(time) => time.to_string(),
        })
    }

    #[test]
    fn numbers_are_times_by_their_unit() {
        let since = |per_s| Unit::Since { per_s, start_us: 0 };
        for (unit, cell, expected) in [
            (since(1), "1700000000", "2023-11-14T22:13:20Z"),
            (since(1), "1700000000.25", "2023-11-14T22:13:20.25Z"),
            (since(1), "1.7e9", "2023-11-14T22:13:20Z"),
            (since(1), "-0.5", "1969-12-31T23:59:59.5Z"),
            (since(1_000), "1700000000123", "2023-11-14T22:13:20.123Z"),
            (
                since(1_000_000_000),
                "1700000000123456789",
                "2023-11-14T22:13:20.123456Z",
            ),
            (Unit::Year, "1958.5", "1958-07-02T12:00:00"),
            (Unit::Excel, "45366.25", "2024-03-15T06:00:00"),
            (Unit::YearMonth, "202403", "2024-03-01T00:00:00"),
        ] {
            assert_eq!(
                shown(unit.moment(cell)).as_deref(),
                Some(expected),
                "{cell}"
            );
        }
        assert_eq!(since(1).moment("x"), None);
        assert_eq!(Unit::Year.moment("12"), None);
    }

    #[test]
    fn parts_make_a_time() {
        let time = |cells: [Option<&str>; 6]| parts(cells, None).map(|time| time.to_string());
        let all = [Some("2024"), Some("3"), Some("5.0"), Some("24"), None, None];
        assert_eq!(time(all).as_deref(), Some("2024-03-06T00:00:00"));
        let named = [Some("2024"), Some("Mar"), None, None, None, None];
        assert_eq!(time(named).as_deref(), Some("2024-03-01T00:00:00"));
        let fine = [
            Some("24"),
            Some("3"),
            Some("5"),
            Some("6"),
            Some("7"),
            Some("8.5"),
        ];
        assert_eq!(time(fine).as_deref(), Some("2024-03-05T06:07:08.5"));
        let day = parts(
            [Some("2024"), None, None, Some("1230"), None, None],
            Some("60"),
        );
        assert_eq!(day.unwrap().to_string(), "2024-02-29T12:30:00");
        assert_eq!(
            parts([Some("2023"), None, None, None, None, None], Some("366")),
            None
        );
    }

    #[test]
    fn a_pattern_is_followed() {
        for (pattern, cell, expected) in [
            ("%d.%m.%Y %H:%M", "05.03.2024 06:07", "2024-03-05T06:07:00"),
            ("%Y-%j", "2024-060", "2024-02-29T00:00:00"),
            (
                "%Y-%m-%dT%H:%M:%S%z",
                "2024-03-05T06:07:08+0100",
                "2024-03-05T05:07:08Z",
            ),
        ] {
            assert_eq!(
                shown(by_pattern(pattern, cell)).as_deref(),
                Some(expected),
                "{cell}"
            );
        }
        assert_eq!(by_pattern("%d.%m.%Y", "2024-03-05"), None);
    }
}
