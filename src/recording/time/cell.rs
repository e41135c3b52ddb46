//! Parses times as people write them: the fields are known, but the order of day and month may be
//! ambiguous.
//!
//! A cell is split into runs of digits, words and separators. A clock time such as `9:05:00.25 PM`
//! and an offset such as `+02:00` are extracted first, and the rest is the date.

use jiff::civil::{Date, DateTime, Time};

/// Parts of a time in a cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// The date, if present.
    pub date: Option<DateText>,
    /// The time of day, if present, and whether it belongs to the next day (24:00).
    pub clock: Option<(Time, bool)>,
    /// Offset from UTC in seconds, if present.
    pub offset_s: Option<i32>,
}

/// A date whose order may be ambiguous.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DateText {
    /// An unambiguous date.
    Day(Date),
    /// Day and month in an ambiguous order, and the year.
    Open(i8, i8, i16),
}

/// The order of day and month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// 31/12/2024.
    DayFirst,
    /// 12/31/2024.
    MonthFirst,
}

impl DateText {
    /// Returns the date, or `None` if it does not exist.
    pub fn date(self, order: Order) -> Option<Date> {
        match (self, order) {
            (DateText::Day(date), _) => Some(date),
            (DateText::Open(day, month, year), Order::DayFirst)
            | (DateText::Open(month, day, year), Order::MonthFirst) => {
                Date::new(year, month, day).ok()
            }
        }
    }
}

impl Cell {
    /// Returns the local time; midnight if the cell has no time of day.
    pub fn moment(self, order: Order) -> Option<DateTime> {
        let date = self.date?.date(order)?;
        let (time, is_next_day) = self.clock.unwrap_or((Time::midnight(), false));
        let date = if is_next_day {
            date.tomorrow().ok()?
        } else {
            date
        };
        Some(date.to_datetime(time))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    Digits(&'a str),
    Word(&'a str),
    Mark(u8),
}

/// Parses a cell; returns `None` if it is not a time. Plain numbers are times only with 8, 10, 12
/// or 14 digits (`20240131`, `20240131235959`).
pub fn parse(cell: &str) -> Option<Cell> {
    if cell.len() < 4 || cell.len() > 48 || !cell.bytes().any(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // A zone name after the offset, as in RFC 9557.
    let cell = match cell.split_once('[') {
        Some((cell, zone)) if zone.ends_with(']') => cell,
        _ => cell,
    };
    let mut tokens = Vec::with_capacity(16);
    tokenize(cell.trim(), &mut tokens)?;
    if let [Token::Digits(digits)] = tokens[..] {
        return compact(digits, None);
    }
    let offset_s = take_offset(&mut tokens)?;
    let clock = match take_clock(&mut tokens) {
        Found::Clock(clock) => Some(clock),
        Found::Nothing => None,
        Found::Wrong => return None,
    };
    tokens.retain(|token| !is_filler(token));
    if tokens.is_empty() {
        return clock.map(|clock| Cell {
            date: None,
            clock: Some(clock),
            offset_s,
        });
    }
    if let [Token::Digits(date), Token::Digits(time)] = tokens[..]
        && clock.is_none()
        && date.len() == 8
    {
        let cell = compact(&format!("{date}{time}"), offset_s)?;
        return cell.clock.is_some().then_some(cell);
    }
    let date = date(&tokens)?;
    Some(Cell {
        date: Some(date),
        clock,
        offset_s,
    })
}

fn tokenize<'a>(cell: &'a str, tokens: &mut Vec<Token<'a>>) -> Option<()> {
    let mut rest = cell;
    while let Some(first) = rest.bytes().next() {
        let run = |is: fn(&u8) -> bool| rest.bytes().take_while(&is).count();
        let len = match first {
            b'0'..=b'9' => run(u8::is_ascii_digit),
            b'a'..=b'z' | b'A'..=b'Z' => run(u8::is_ascii_alphabetic),
            b' ' | b'-' | b'/' | b'.' | b',' | b':' | b'+' | b'_' => 1,
            _ => return None,
        };
        let (text, after) = rest.split_at(len);
        tokens.push(match first {
            b'0'..=b'9' => Token::Digits(text),
            b'a'..=b'z' | b'A'..=b'Z' => Token::Word(text),
            mark => Token::Mark(mark),
        });
        if tokens.len() > 24 {
            return None;
        }
        rest = after;
    }
    Some(())
}

/// Zone abbreviations that mean the same offset in all sensor files, and that offset in hours.
const ZONES: [(&str, i32); 17] = [
    ("Z", 0),
    ("UTC", 0),
    ("GMT", 0),
    ("WET", 0),
    ("CET", 1),
    ("MEZ", 1),
    ("CEST", 2),
    ("MESZ", 2),
    ("EET", 2),
    ("EEST", 3),
    ("EST", -5),
    ("EDT", -4),
    ("CDT", -5),
    ("MST", -7),
    ("MDT", -6),
    ("PST", -8),
    ("PDT", -7),
];

/// Extracts a zone abbreviation, or an offset after the time of day; `None` if it is invalid.
fn take_offset(tokens: &mut Vec<Token<'_>>) -> Option<Option<i32>> {
    let zone = |token: &Token<'_>| match token {
        Token::Word(word) => ZONES.iter().find(|(name, _)| name == word),
        _ => None,
    };
    let mut offset_s = None;
    if let Some(at) = tokens.iter().position(|token| zone(token).is_some()) {
        offset_s = zone(&tokens[at]).map(|(_, hours)| hours * 3_600);
        tokens.remove(at);
    }
    // Accept a sign after a time of day or a compact time, but not between the parts of a date.
    let clock = tokens.iter().position(|token| *token == Token::Mark(b':'));
    let clock = clock.or_else(|| tokens.iter().position(|token| *token == Token::Word("T")));
    let sign = |token: &Token<'_>| matches!(token, Token::Mark(b'+' | b'-'));
    let Some(at) = clock.and_then(|clock| {
        let found = tokens[clock..].iter().position(sign);
        found.map(|found| clock + found)
    }) else {
        return Some(offset_s);
    };
    let is_east = tokens[at] == Token::Mark(b'+');
    let (hours, minutes, len) = match tokens[at + 1..] {
        [
            Token::Digits(hours),
            Token::Mark(b':'),
            Token::Digits(minutes),
            ..,
        ] => (hours, minutes, 4),
        [Token::Digits(both), ..] if both.len() == 4 => (&both[..2], &both[2..], 2),
        [Token::Digits(hours), ..] if hours.len() <= 2 => (hours, "0", 2),
        _ => return None,
    };
    let (hours, minutes): (i32, i32) = (hours.parse().ok()?, minutes.parse().ok()?);
    if hours > 18 || minutes > 59 {
        return None;
    }
    let seconds = hours * 3_600 + minutes * 60;
    tokens.drain(at..at + len);
    Some(Some(if is_east { seconds } else { -seconds }))
}

enum Found {
    Clock((Time, bool)),
    Nothing,
    Wrong,
}

/// Extracts `H:MM`, `H:MM:SS`, `H:MM:SS.ffffff`, each with optional AM or PM, or `H AM`.
fn take_clock(tokens: &mut Vec<Token<'_>>) -> Found {
    let half = tokens.iter().position(|token| {
        matches!(token, Token::Word(word) if ["am", "pm"].contains(&word.to_ascii_lowercase().as_str()))
    });
    let is_pm = half
        .map(|at| matches!(tokens.remove(at), Token::Word(word) if word.starts_with(['p', 'P'])));
    let Some(colon) = tokens.iter().position(|token| *token == Token::Mark(b':')) else {
        return if is_pm.is_some() {
            Found::Wrong
        } else {
            Found::Nothing
        };
    };
    let Some(start) = colon.checked_sub(1) else {
        return Found::Wrong;
    };
    let (hour, minute) = (tokens[start], tokens.get(colon + 1).copied());
    let (second, fraction, len) = match tokens[colon + 1..] {
        [
            _,
            Token::Mark(b':'),
            Token::Digits(second),
            Token::Mark(b'.' | b','),
            Token::Digits(fraction),
            ..,
        ] => (second, fraction, 7),
        [_, Token::Mark(b':'), Token::Digits(second), ..] => (second, "", 5),
        _ => ("0", "", 3),
    };
    tokens.drain(start..(start + len).min(tokens.len()));
    let (Token::Digits(hour), Some(Token::Digits(minute))) = (hour, minute) else {
        return Found::Wrong;
    };
    match clock(hour, minute, second, fraction, is_pm) {
        Some(clock) => Found::Clock(clock),
        None => Found::Wrong,
    }
}

/// Creates a time of day from its parts; the flag marks 24:00, midnight of the next day.
fn clock(
    hour: &str,
    minute: &str,
    second: &str,
    fraction: &str,
    is_pm: Option<bool>,
) -> Option<(Time, bool)> {
    if hour.len() > 2 || minute.len() != 2 || second.len() > 2 {
        return None;
    }
    let hour: i8 = hour.parse().ok()?;
    let (minute, second): (i8, i8) = (minute.parse().ok()?, second.parse().ok()?);
    let hour = match is_pm {
        None => hour,
        Some(_) if !(1..=12).contains(&hour) => return None,
        Some(is_pm) => hour % 12 + if is_pm { 12 } else { 0 },
    };
    let digits = &fraction[..fraction.len().min(9)];
    let nanos = match digits {
        "" => 0,
        digits => digits.parse::<i32>().ok()? * 10_i32.pow(9 - digits.len() as u32),
    };
    if (hour, minute, second, nanos) == (24, 0, 0, 0) {
        return Some((Time::midnight(), true));
    }
    // A leap second becomes the second before it.
    let second = if second == 60 { 59 } else { second };
    Time::new(hour, minute, second, nanos)
        .ok()
        .map(|time| (time, false))
}

/// Parses a cell that must be a time of day, including `HH.MM.SS`, `HHMM`, `HHMMSS` and a single
/// hour.
pub fn parse_clock(cell: &str) -> Option<(Time, bool)> {
    if let Some(Cell {
        date: None,
        clock: Some(clock),
        ..
    }) = parse(cell)
    {
        return Some(clock);
    }
    let parts: Vec<&str> = cell.split(['.', 'h', '-']).collect();
    if let [hour, minute, second] = parts[..] {
        return clock(hour, minute, second, "", None);
    }
    // An hour written as a number: 7 or 7.0.
    let digits = cell.strip_suffix(".0").unwrap_or(cell);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    match digits.len() {
        1 | 2 => clock(digits, "00", "0", "", None),
        3 | 4 => {
            let (hour, minute) = digits.split_at(digits.len() - 2);
            clock(hour, minute, "0", "", None)
        }
        5 | 6 => {
            let (rest, second) = digits.split_at(digits.len() - 2);
            let (hour, minute) = rest.split_at(rest.len() - 2);
            clock(hour, minute, second, "", None)
        }
        _ => None,
    }
}

/// Returns whether a word only separates the parts of a time or names the day of the week.
fn is_filler(token: &Token<'_>) -> bool {
    const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    match token {
        Token::Mark(b' ' | b',' | b'_') => true,
        Token::Word("T" | "t") => true,
        Token::Word(word) => {
            let start = word.get(..3).unwrap_or_default().to_ascii_lowercase();
            DAYS.contains(&start.as_str()) && (word.len() == 3 || word.ends_with("day"))
        }
        _ => false,
    }
}

/// Parses `YYYYMMDD`, optionally followed by `HH`, `HHMM` or `HHMMSS`.
fn compact(digits: &str, offset_s: Option<i32>) -> Option<Cell> {
    if !matches!(digits.len(), 8 | 10 | 12 | 14) {
        return None;
    }
    let date = ymd(&digits[..4], &digits[4..6], &digits[6..8])?;
    // Seconds since 1970 also have ten digits.
    if !(1900..=2099).contains(&date.year()) {
        return None;
    }
    let clock = match &digits[8..] {
        "" => None,
        time => {
            let part = |at: usize| time.get(at..at + 2).unwrap_or("00");
            Some(clock(part(0), part(2), part(4), "", None)?)
        }
    };
    Some(Cell {
        date: Some(DateText::Day(date)),
        clock,
        offset_s,
    })
}

fn ymd(year: &str, month: &str, day: &str) -> Option<Date> {
    let year: i16 = year.parse().ok()?;
    if !(1000..=2999).contains(&year) {
        return None;
    }
    Date::new(year, month.parse().ok()?, day.parse().ok()?).ok()
}

fn date(tokens: &[Token<'_>]) -> Option<DateText> {
    use Token::{Digits, Mark, Word};
    let is_sign = |mark: u8| matches!(mark, b'-' | b'/' | b'.');
    let full = |year: &str| year.len() == 4;
    match *tokens {
        [Digits(year), Mark(a), Digits(month), Mark(b), Digits(day)]
            if full(year) && a == b && is_sign(a) && month.len() <= 2 && day.len() <= 2 =>
        {
            ymd(year, month, day).map(DateText::Day)
        }
        [
            Digits(first),
            Mark(a),
            Digits(second),
            Mark(b),
            Digits(year),
        ] if a == b && is_sign(a) && first.len() <= 2 && second.len() <= 2 => {
            open(first, second, year)
        }
        // With a point, numbers would be parsed as dates.
        [Digits(year), Mark(b'-' | b'/'), Digits(month)] if full(year) && month.len() <= 2 => {
            ymd(year, month, "1").map(DateText::Day)
        }
        [Digits(month), Mark(b'-' | b'/'), Digits(year)] if full(year) && month.len() <= 2 => {
            ymd(year, month, "1").map(DateText::Day)
        }
        [Digits(date)] if date.len() == 8 => compact(date, None)?.date,
        [Digits(year), Word(quarter), Digits(number)]
        | [Word(quarter), Digits(number), Digits(year)]
        | [Digits(year), Mark(b'-'), Word(quarter), Digits(number)]
        | [
            Word(quarter),
            Digits(number),
            Mark(b'-' | b'/'),
            Digits(year),
        ] if full(year) && quarter.eq_ignore_ascii_case("q") && number.len() == 1 => {
            let number: u8 = number.parse().ok()?;
            let month = (1..=4).contains(&number).then(|| number * 3 - 2)?;
            ymd(year, &month.to_string(), "1").map(DateText::Day)
        }
        _ => with_name(tokens),
    }
}

fn open(first: &str, second: &str, year: &str) -> Option<DateText> {
    let number: i16 = year.parse().ok()?;
    let year = match year.len() {
        4 if (1000..=2999).contains(&number) => number,
        2 if number < 70 => 2000 + number,
        2 => 1900 + number,
        _ => return None,
    };
    let (first, second): (i8, i8) = (first.parse().ok()?, second.parse().ok()?);
    let is_day = |number: i8| (1..=31).contains(&number);
    let is_open = is_day(first) && is_day(second) && (first <= 12 || second <= 12);
    let open = DateText::Open(first, second, year);
    let exists = open.date(Order::DayFirst).or(open.date(Order::MonthFirst));
    (is_open && exists.is_some()).then_some(open)
}

const MONTHS: [&str; 12] = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
];

/// Parses a date with a month name in any order, such as `1 Jan 2024`, `Jan 1, 2024` or `2024 Jan`.
fn with_name(tokens: &[Token<'_>]) -> Option<DateText> {
    let (mut month, mut numbers) = (None, Vec::with_capacity(2));
    for token in tokens {
        match *token {
            Token::Word(word) if month.is_none() => month = Some(month_of(word)?),
            Token::Digits(digits) => numbers.push(digits),
            Token::Mark(b'-' | b'/' | b'.') => {}
            _ => return None,
        }
    }
    let month = month?.to_string();
    let is_year = |digits: &str| digits.len() == 4;
    let (year, day) = match numbers[..] {
        [year] if is_year(year) => (year.to_owned(), "1"),
        [year, day] | [day, year] if is_year(year) && day.len() <= 2 => (year.to_owned(), day),
        [day, year] if year.len() == 2 => {
            let century = if year.parse::<u8>().ok()? < 70 {
                "20"
            } else {
                "19"
            };
            (format!("{century}{year}"), day)
        }
        [year] if year.len() == 2 => {
            let century = if year.parse::<u8>().ok()? < 70 {
                "20"
            } else {
                "19"
            };
            (format!("{century}{year}"), "1")
        }
        _ => return None,
    };
    ymd(&year, &month, day).map(DateText::Day)
}

/// Returns the number of a month from its English name, or from at least its first three letters.
pub fn month_of(word: &str) -> Option<usize> {
    let word = word.to_ascii_lowercase();
    let is_short = word.len() >= 3;
    let at = MONTHS
        .iter()
        .position(|month| is_short && month.starts_with(&word))?;
    Some(at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(cell: &str, order: Order) -> Option<String> {
        let cell = parse(cell)?;
        let moment = cell.moment(order)?;
        Some(match cell.offset_s {
            None => moment.to_string(),
            Some(offset_s) => format!("{moment} {offset_s}"),
        })
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        for (cell, expected) in [
            ("2024-03-05T06:07:08Z", "2024-03-05T06:07:08 0"),
            (
                "2024-03-05 06:07:08.25+02:00",
                "2024-03-05T06:07:08.25 7200",
            ),
            ("2024-03-05 06:07:08 -0330", "2024-03-05T06:07:08 -12600"),
            (
                "2024-03-05T06:07:08+02:00[Europe/Berlin]",
                "2024-03-05T06:07:08 7200",
            ),
            ("2024/3/5 6:07", "2024-03-05T06:07:00"),
            ("2024-03-05 06:07:08,123", "2024-03-05T06:07:08.123"),
            ("2024-03-05 24:00", "2024-03-06T00:00:00"),
            ("2024-03-05 06:07:08 CET", "2024-03-05T06:07:08 3600"),
            ("20240305", "2024-03-05T00:00:00"),
            ("20240305T060708Z", "2024-03-05T06:07:08 0"),
            ("20240305 0607", "2024-03-05T06:07:00"),
            ("202403050607", "2024-03-05T06:07:00"),
            ("5.3.2024 06:07", "2024-03-05T06:07:00"),
            ("05/03/24 6:07 PM", "2024-03-05T18:07:00"),
            ("05/03/2024 12:07:08 AM", "2024-03-05T00:07:08"),
            ("5 Mar 2024", "2024-03-05T00:00:00"),
            ("05-MAR-2024 06:07", "2024-03-05T06:07:00"),
            ("March 5, 2024 6:07 am", "2024-03-05T06:07:00"),
            ("Tue, 05 Mar 2024 06:07:08 GMT", "2024-03-05T06:07:08 0"),
            ("Tue Mar  5 06:07:08 2024", "2024-03-05T06:07:08"),
            ("Tue Mar 05 06:07:08 +0000 2024", "2024-03-05T06:07:08 0"),
            ("2024 Mar", "2024-03-01T00:00:00"),
            ("Mar-24", "2024-03-01T00:00:00"),
            ("2024-03", "2024-03-01T00:00:00"),
            ("03/2024", "2024-03-01T00:00:00"),
            ("2024 Q2", "2024-04-01T00:00:00"),
            ("2024Q2", "2024-04-01T00:00:00"),
            ("Q2 2024", "2024-04-01T00:00:00"),
        ] {
            assert_eq!(
                shown(cell, Order::DayFirst).as_deref(),
                Some(expected),
                "{cell}"
            );
        }
        let american = shown("3/5/2024 6:07", Order::MonthFirst);
        assert_eq!(american.as_deref(), Some("2024-03-05T06:07:00"));
    }

    #[test]
    fn text_other_than_times_is_none() {
        for cell in [
            "",
            "12",
            "12.5",
            "2024",
            "1.2024",
            "-5",
            "1e5",
            "10.0.0.1",
            "abc",
            "1-2",
            "12345",
            "2024-13-01",
            "31/31/2024",
            "25:00",
            "2024-01-01 10:61",
            "NA",
            "3 days 02:00:00",
            "99999999",
            "1.2.3.4",
            "Mar 5",
        ] {
            let date = parse(cell).and_then(|cell| cell.date);
            assert_eq!(date, None, "{cell}");
        }
    }

    #[test]
    fn a_time_of_day_alone_has_more_formats() {
        let shown = |cell: &str| {
            parse_clock(cell).map(|(time, next)| format!("{time}{}", if next { "+" } else { "" }))
        };
        for (cell, expected) in [
            ("6:07", "06:07:00"),
            ("06:07:08.5", "06:07:08.5"),
            ("18.00.00", "18:00:00"),
            ("6:07 PM", "18:07:00"),
            ("7", "07:00:00"),
            ("24", "00:00:00+"),
            ("607", "06:07:00"),
            ("0607", "06:07:00"),
            ("060708", "06:07:08"),
        ] {
            assert_eq!(shown(cell).as_deref(), Some(expected), "{cell}");
        }
        for cell in ["", "25", "2460", "x", "1.5"] {
            assert_eq!(shown(cell), None, "{cell}");
        }
    }
}
