//! Decimal numbers as people write them, kept exactly where a scaled integer can.
//!
//! Knows nothing of files; [`replay`](crate::replay) feeds it cells and tells where a fault was.
//!
//! Invariants: a column becomes integers only if every value is then exactly what was written, and
//! the division a gateway does (`raw / 10^places`) gives the double nearest to it.

use crate::readings::{Nulls, Values};
use fieldgate_protocol::column::Kind;

/// Most places behind the point of a scaled integer.
pub const PLACES_MAX: u8 = 9;
/// Scaled integers stay below this size, so that a double holds each of them exactly.
pub const RAW_END: i64 = 1 << 53;

/// One number as written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decimal {
    /// The nearest double.
    nearest: f64,
    /// `(digits, places)` for `digits / 10^places` without trailing zeros, where that fits.
    exact: Option<(i64, u8)>,
}

impl Decimal {
    /// Parses digits with an optional sign, point and exponent, or an infinity. Anything else is
    /// `None`, not-a-number included: the caller knows that as "no valid value".
    pub fn parse(text: &str) -> Option<Self> {
        let nearest: f64 = text.parse().ok()?;
        (!nearest.is_nan()).then(|| Self {
            nearest,
            exact: exact(text),
        })
    }

    /// The number times `10^places`, if that is a whole number below [`RAW_END`].
    fn raw(self, places: u8) -> Option<i64> {
        let (digits, own) = self.exact?;
        let raw = digits.checked_mul(10_i64.checked_pow(u32::from(places.checked_sub(own)?))?)?;
        (raw.abs() < RAW_END).then_some(raw)
    }
}

/// Collects a column and decides in the end what it is made of.
#[derive(Debug, Default)]
pub struct ColumnBuilder {
    cells: Vec<Decimal>,
    nulls: Nulls,
}

impl ColumnBuilder {
    /// Appends a number, or that there is no valid value.
    pub fn push(&mut self, cell: Option<Decimal>) {
        if cell.is_none() {
            self.nulls.insert(self.cells.len());
        }
        self.cells.push(cell.unwrap_or(Decimal {
            nearest: 0.0,
            exact: Some((0, 0)),
        }));
    }

    /// The kind, the power of ten and the values: integers if all of them are exact that way, with no
    /// more places than needed; else doubles.
    pub fn finish(self) -> (Kind, i8, Values, Nulls) {
        let places = self
            .cells
            .iter()
            .filter_map(|cell| cell.exact)
            .map(|(_, places)| places)
            .max();
        let places = places.unwrap_or(0);
        let raws = self
            .cells
            .iter()
            .map(|cell| cell.raw(places))
            .collect::<Option<Vec<i64>>>();
        match raws {
            Some(raws) => (
                Kind::Integer,
                -(places as i8),
                Values::Integer(raws),
                self.nulls,
            ),
            None => {
                let values = self.cells.iter().map(|cell| cell.nearest).collect();
                (Kind::F64, 0, Values::F64(values), self.nulls)
            }
        }
    }
}

/// `(digits, places)` of a decimal number, both as small as can be.
fn exact(text: &str) -> Option<(i64, u8)> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (sign, mantissa) = match mantissa.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, mantissa.strip_prefix('+').unwrap_or(mantissa)),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let fraction = fraction.trim_end_matches('0');
    let mut digits = 0_i64;
    for digit in whole.bytes().chain(fraction.bytes()) {
        let value = digit.is_ascii_digit().then(|| i64::from(digit - b'0'))?;
        digits = digits.checked_mul(10)?.checked_add(value)?;
    }
    if digits == 0 {
        return Some((0, 0));
    }
    let mut places = i32::try_from(fraction.len()).ok()?.checked_sub(exponent)?;
    while places > 0 && digits % 10 == 0 {
        (digits, places) = (digits / 10, places - 1);
    }
    if places < 0 {
        digits = digits.checked_mul(10_i64.checked_pow(places.unsigned_abs())?)?;
    }
    let places = u8::try_from(places.max(0))
        .ok()
        .filter(|&places| places <= PLACES_MAX)?;
    Some((sign * digits, places))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn column(cells: &[&str]) -> (Kind, i8, Values) {
        let mut builder = ColumnBuilder::default();
        for cell in cells {
            builder.push(Some(Decimal::parse(cell).expect(cell)));
        }
        let (kind, exp10, values, _) = builder.finish();
        (kind, exp10, values)
    }

    #[test]
    fn a_column_takes_as_many_places_as_its_finest_value() {
        let integers =
            |exp10, values: &[i64]| (Kind::Integer, exp10, Values::Integer(values.into()));
        assert_eq!(
            column(&["100.59", "104.1", "-7"]),
            integers(-2, &[10_059, 10_410, -700])
        );
        assert_eq!(column(&["1.500", "+2"]), integers(-1, &[15, 20]));
        assert_eq!(
            column(&["1e3", "2.5E-2", "0.000", "-0"]),
            integers(-3, &[1_000_000, 25, 0, 0])
        );
        assert_eq!(column(&["12e-1", "120e-1"]), integers(-1, &[12, 120]));
        assert_eq!(column(&[".5", "5."]), integers(-1, &[5, 50]));
        assert_eq!(column(&[]), integers(0, &[]));
        assert_eq!(column(&["0.000000001"]), integers(-9, &[1]));
        assert_eq!(column(&["9007199254740991"]), integers(0, &[RAW_END - 1]));
    }

    #[test]
    fn what_no_scaled_integer_holds_becomes_doubles() {
        let inexact = [
            "9007199254740992",
            "0.0000000001",
            "1e300",
            "inf",
            "123456789012345678901",
        ];
        for cell in inexact {
            assert_eq!(column(&[cell]).0, Kind::F64, "{cell}");
            let expected = vec![0.5, cell.parse().unwrap()];
            assert_eq!(
                column(&["0.5", cell]),
                (Kind::F64, 0, Values::F64(expected)),
                "{cell}"
            );
        }
        // Each fits alone, but not both with the same number of places.
        assert_eq!(column(&["9007199254740991", "0.1"]).0, Kind::F64);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for text in ["", "abc", "1,5", "1.2.3", "0x10", "--1", "1e", "NaN", "1 "] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_missing_value_is_null_and_changes_no_scale() {
        let mut builder = ColumnBuilder::default();
        builder.push(Decimal::parse("1.25"));
        builder.push(None);
        let (kind, exp10, _, nulls) = builder.finish();
        assert_eq!(
            (kind, exp10, nulls.contains(0), nulls.contains(1)),
            (Kind::Integer, -2, false, true)
        );
    }

    proptest! {
        #[test]
        fn scaled_integers_divide_back_to_the_double_that_was_written(
            digits in -RAW_END + 1..RAW_END, places in 0_usize..=9,
        ) {
            let width = places + 1;
            let padded = format!("{:0width$}", digits.unsigned_abs());
            let (whole, fraction) = padded.split_at(padded.len() - places);
            let sign = if digits < 0 { "-" } else { "" };
            let text = format!("{sign}{whole}.{fraction}");
            let (kind, exp10, values) = column(&[&text]);
            prop_assert_eq!(kind, Kind::Integer);
            let Values::Integer(raws) = values else { unreachable!() };
            let value = raws[0] as f64 / 10_f64.powi(-i32::from(exp10));
            prop_assert_eq!(value, text.parse::<f64>().unwrap());
        }
    }
}
