//! Determines from all dates of a file whether the day or the month is first.

use csv::StringRecord;

use super::Source;
use super::cell::{DateText, Order, parse};
use crate::recording::ReadError;
use crate::recording::layout::Layout;
use crate::recording::records::Records;
use crate::recording::text::line_of;

/// Properties of all dates of a file, read in one order.
struct Reading {
    order: Order,
    before: Option<i64>,
    /// Number of changes of direction.
    turns: u64,
    is_forwards: Option<bool>,
    /// Longest step, in days.
    gap: i64,
    /// Byte offset of the first date that does not exist in this order.
    impossible: Option<usize>,
}

impl Reading {
    fn new(order: Order) -> Reading {
        Reading {
            order,
            before: None,
            turns: 0,
            is_forwards: None,
            gap: 0,
            impossible: None,
        }
    }

    fn add(&mut self, date: DateText, at: usize) {
        let Some(date) = date.date(self.order) else {
            self.impossible.get_or_insert(at);
            return;
        };
        let day = i64::from(date.year()) * 366 + i64::from(date.day_of_year());
        let step = day - self.before.unwrap_or(day);
        self.before = Some(day);
        if step == 0 {
            return;
        }
        self.gap = self.gap.max(step.abs());
        let is_forwards = *self.is_forwards.get_or_insert(step > 0);
        self.turns += u64::from(is_forwards != (step > 0));
    }
}

/// Returns the order of day and month in a column, and whether it was inferred from the order of
/// rows.
///
/// # Errors
/// Both orders are possible, or neither is.
pub fn find(
    text: &str,
    layout: &Layout,
    source: &Source,
) -> Result<(Option<Order>, bool), ReadError> {
    let Source::Text { date: column, .. } = *source else {
        return Ok((None, false));
    };
    let mut readings = [
        Reading::new(Order::DayFirst),
        Reading::new(Order::MonthFirst),
    ];
    let mut records = Records::new(text, layout.data_at, layout.separator);
    let mut record = StringRecord::new();
    let (mut open, mut mark) = (0_u64, ' ');
    while let Some(at) = records.read(&mut record)? {
        let cell = record.get(column).unwrap_or_default();
        let Some(date) = parse(cell).and_then(|cell| cell.date) else {
            continue;
        };
        if matches!(date, DateText::Open(..)) {
            open += 1;
            mark = cell
                .chars()
                .find(|char| "/.-".contains(*char))
                .unwrap_or(' ');
        }
        readings
            .iter_mut()
            .for_each(|reading| reading.add(date, at));
    }
    if open == 0 {
        return Ok((None, false));
    }
    let [day_first, month_first] = readings;
    match (day_first.impossible, month_first.impossible) {
        (None, Some(_)) => Ok((Some(Order::DayFirst), false)),
        (Some(_), None) => Ok((Some(Order::MonthFirst), false)),
        (Some(day_first), Some(month_first)) => Err(ReadError::line(
            line_of(text, day_first),
            format!(
                "dates use both DD/MM (line {}) and MM/DD; set --time-format DD/MM/YYYY or MM/DD/YYYY",
                line_of(text, month_first)
            ),
        )),
        (None, None) => by_sequence(&day_first, &month_first, mark)
            .map(|order| (Some(order), true))
            .ok_or_else(|| {
                ReadError::line(
                    line_of(text, layout.data_at),
                    "day and month cannot be distinguished in this file; set --time-format DD/MM/YYYY or MM/DD/YYYY"
                        .to_owned(),
                )
            }),
    }
}

/// Returns the order in which rows are consecutive: with fewer changes of direction, then with
/// shorter steps. In dates with points the day is first.
fn by_sequence(day_first: &Reading, month_first: &Reading, mark: char) -> Option<Order> {
    if mark == '.' {
        return Some(Order::DayFirst);
    }
    let rank = |reading: &Reading| (reading.turns, reading.gap);
    match rank(day_first).cmp(&rank(month_first)) {
        std::cmp::Ordering::Less => Some(Order::DayFirst),
        std::cmp::Ordering::Greater => Some(Order::MonthFirst),
        std::cmp::Ordering::Equal => None,
    }
}
