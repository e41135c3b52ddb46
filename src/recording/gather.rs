//! Data collected from each row: columns of numbers, device names, and numbers that change when
//! stored.

use std::collections::HashMap;

use super::decimal::{ColumnBuilder, Loss};
use super::notes::Tally;
use super::number::SENTINELS;
use super::readings::{Nulls, Values};

/// Maximum number of devices in a guessed device column.
const DEVICES_GUESSED_MAX: usize = 100;

/// A column while the file is read.
#[derive(Debug, Default)]
pub struct Column {
    pub builder: ColumnBuilder,
    pub numbers: u64,
    pub texts: Tally,
    /// Whether each value is one more than the previous one.
    is_count: bool,
    first: Option<f64>,
    last: Option<f64>,
}

/// Device of each row according to one column.
#[derive(Debug)]
pub struct Ids {
    pub column: usize,
    pub numbers: HashMap<String, u32>,
    pub names: Vec<String>,
    pub rows: Vec<u32>,
}

/// Numbers that change when they are stored.
#[derive(Default)]
pub struct Losses {
    pub minus_zero: Tally,
    pub rounded: Tally,
    pub too_large: Tally,
    pub too_small: Tally,
}

/// Returns the lowest value of a column if it is a known sentinel, occurs at least twice, and is
/// far below the next value.
pub fn sentinel(column: &ColumnBuilder) -> Option<f64> {
    let (mut lowest, mut next, mut count) = (f64::INFINITY, f64::INFINITY, 0);
    for value in column.values() {
        if value < lowest {
            (next, lowest, count) = (lowest, value, 1);
        } else if value == lowest {
            count += 1;
        } else if value < next {
            next = value;
        }
    }
    let stands_out = next > lowest / 2.0 && next.is_finite();
    (SENTINELS.contains(&lowest) && count > 1 && stands_out).then_some(lowest)
}

pub fn permuted(values: &Values, nulls: &Nulls, order: &[usize]) -> (Values, Nulls) {
    let values = match values {
        Values::Integer(values) => Values::Integer(order.iter().map(|row| values[*row]).collect()),
        Values::F64(values) => Values::F64(order.iter().map(|row| values[*row]).collect()),
        _ => unreachable!("a column of a file has integers or doubles"),
    };
    let mut moved = Nulls::default();
    for (row, place) in order.iter().enumerate() {
        if nulls.contains(*place) {
            moved.insert(row);
        }
    }
    (values, moved)
}

impl Column {
    /// Creates an empty column.
    pub fn new() -> Column {
        Column {
            is_count: true,
            ..Column::default()
        }
    }

    /// Appends a missing value.
    pub fn missing(&mut self) {
        self.is_count = false;
        self.builder.push(None);
    }

    pub fn number(&mut self, value: f64) {
        self.numbers += 1;
        self.is_count &= self.last.is_none_or(|last| value == last + 1.0);
        self.first.get_or_insert(value);
        self.last = Some(value);
    }

    pub fn is_row_number(&self, header: &str) -> bool {
        const NAMES: [&str; 10] = [
            "",
            "rownames",
            "row",
            "index",
            "unnamed: 0",
            "instant",
            "x",
            "row_id",
            "no",
            "no.",
        ];
        let is_start = self.first.is_some_and(|first| first == 0.0 || first == 1.0);
        self.is_count
            && is_start
            && self.numbers > 1
            && NAMES.contains(&header.trim().to_lowercase().as_str())
    }
}

impl Losses {
    pub fn add(&mut self, loss: Option<Loss>, at: usize, cell: &str) {
        match loss {
            None => {}
            Some(Loss::MinusZero) => self.minus_zero.add(at, cell),
            Some(Loss::Rounded) => self.rounded.add(at, cell),
            Some(Loss::TooLarge) => self.too_large.add(at, cell),
            Some(Loss::TooSmall) => self.too_small.add(at, cell),
        }
    }
}

impl Ids {
    pub fn new(column: usize) -> Ids {
        Ids {
            column,
            numbers: HashMap::new(),
            names: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Adds the cell of a row; returns false if a guessed column has too many names.
    pub fn push(&mut self, cell: &str, is_given: bool) -> bool {
        let number = match self.numbers.get(cell) {
            Some(number) => *number,
            None => {
                let number = self.names.len() as u32;
                self.numbers.insert(cell.to_owned(), number);
                self.names.push(cell.to_owned());
                number
            }
        };
        self.rows.push(number);
        is_given || self.names.len() <= DEVICES_GUESSED_MAX
    }
}
