//! Decimal numbers as people write them, kept exactly if a scaled integer can hold them.
//!
//! This module knows nothing about files: the [reader](super) passes in cells and reports the
//! location of faults.
//!
//! Invariant: a column is stored as integers only if they represent every value exactly as written,
//! and if the gateway's division (`raw / 10^places`) yields the nearest double.

use fieldgate_protocol::value::Kind;

use super::readings::{Nulls, Values};

/// Maximum number of decimal places of a scaled integer.
pub const PLACES_MAX: u8 = 9;
/// Scaled integers stay below this limit, so that a double holds each of them exactly.
pub const RAW_END: i64 = 1 << 53;
/// Marks a cell of [`ColumnBuilder`] that contains the bits of a double.
const DOUBLE: u8 = u8::MAX;

/// One number as written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decimal {
    nearest: f64,
    /// `(digits, places)` for `digits / 10^places` without trailing zeros, if that fits.
    exact: Option<(i64, u8)>,
}

/// Difference between a stored number and its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// A negative zero, stored as 0.
    MinusZero,
    /// A whole number beyond 2^53 that is not exact as a double, stored as the nearest one.
    Rounded,
    /// Too large for a double; stored without a valid value.
    TooLarge,
    /// Too small for a double, stored as 0.
    TooSmall,
}

impl Decimal {
    /// Parses digits with an optional sign, point and exponent, or an infinity. Returns `None` for
    /// anything else, including not-a-number, which the caller recognizes as a missing value.
    pub fn parse(text: &str) -> Option<Self> {
        let nearest: f64 = text.parse().ok()?;
        (!nearest.is_nan()).then(|| Self {
            nearest,
            exact: exact(text),
        })
    }

    /// Returns the nearest double.
    pub fn nearest(self) -> f64 {
        self.nearest
    }

    /// Returns the loss caused by storing the number, if any; `text` is the number as written.
    pub fn loss(self, text: &str) -> Option<Loss> {
        if self.nearest.is_infinite() {
            let is_written = text.bytes().any(|byte| byte.is_ascii_digit());
            return is_written.then_some(Loss::TooLarge);
        }
        if self.nearest == 0.0 {
            let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
            let has_digit = mantissa.bytes().any(|byte| matches!(byte, b'1'..=b'9'));
            return match has_digit {
                true => Some(Loss::TooSmall),
                false => self.nearest.is_sign_negative().then_some(Loss::MinusZero),
            };
        }
        let is_whole = text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b"+-".contains(&byte));
        let is_large = self.nearest.abs() >= RAW_END as f64;
        let digits = text.trim_start_matches(['+', '-']).trim_start_matches('0');
        let is_rounded = || format!("{:.0}", self.nearest.abs()) != digits;
        (is_whole && is_large && is_rounded()).then_some(Loss::Rounded)
    }
}

/// Collects a column, using 9 bytes per cell, and chooses its kind at the end.
#[derive(Debug, Default)]
pub struct ColumnBuilder {
    /// Digits, or the bits of a double.
    cells: Vec<i64>,
    places: Vec<u8>,
    nulls: Nulls,
}

impl ColumnBuilder {
    /// Appends a number, or `None` for a missing value.
    pub fn push(&mut self, cell: Option<Decimal>) {
        let (digits, places) = match cell {
            None => {
                self.nulls.insert(self.cells.len());
                (0, 0)
            }
            Some(Decimal {
                exact: Some(exact), ..
            }) => exact,
            Some(Decimal { nearest, .. }) => (nearest.to_bits() as i64, DOUBLE),
        };
        self.cells.push(digits);
        self.places.push(places);
    }

    /// Returns the double nearest to each valid value.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        (0..self.cells.len())
            .filter(|row| !self.nulls.contains(*row))
            .map(|row| self.nearest(row))
    }

    /// Replaces every cell that is equal to `mark` with a missing value; returns the number of
    /// these cells.
    pub fn clear(&mut self, mark: f64) -> u64 {
        let mut cleared = 0;
        for row in 0..self.cells.len() {
            if !self.nulls.contains(row) && self.nearest(row) == mark {
                self.nulls.insert(row);
                (self.cells[row], self.places[row]) = (0, 0);
                cleared += 1;
            }
        }
        cleared
    }

    /// Returns the kind, the power of ten and the values. The values are integers with as few
    /// decimal places as possible if that is exact for all of them, otherwise doubles.
    pub fn finish(self) -> (Kind, i8, Values, Nulls) {
        let exact = self.places.iter().filter(|places| **places != DOUBLE);
        let places = exact.max().copied().unwrap_or(0);
        let raws = (0..self.cells.len()).map(|row| self.raw(row, places));
        match raws.collect::<Option<Vec<i64>>>() {
            Some(raws) => (
                Kind::Integer,
                -(places as i8),
                Values::Integer(raws),
                self.nulls,
            ),
            None => {
                let values = (0..self.cells.len()).map(|row| self.nearest(row));
                (Kind::F64, 0, Values::F64(values.collect()), self.nulls)
            }
        }
    }

    /// Returns a cell's number times `10^places` if that is a whole number below [`RAW_END`].
    fn raw(&self, row: usize, places: u8) -> Option<i64> {
        if self.places[row] == DOUBLE {
            return None;
        }
        let more = u32::from(places.checked_sub(self.places[row])?);
        let raw = self.cells[row].checked_mul(10_i64.checked_pow(more)?)?;
        (raw.abs() < RAW_END).then_some(raw)
    }

    fn nearest(&self, row: usize) -> f64 {
        match self.places[row] {
            DOUBLE => f64::from_bits(self.cells[row] as u64),
            places => self.cells[row] as f64 / 10_f64.powi(places.into()),
        }
    }
}

/// Returns `(digits, places)` of a decimal number, both as small as possible, if the digits are
/// below [`RAW_END`].
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
    (digits < RAW_END).then_some((sign * digits, places))
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
    fn a_column_uses_as_many_places_as_its_finest_value() {
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
    fn numbers_beyond_scaled_integers_become_doubles() {
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
        // Each fits on its own, but not both with the same number of places.
        assert_eq!(column(&["9007199254740991", "0.1"]).0, Kind::F64);
    }

    #[test]
    fn text_other_than_numbers_is_refused() {
        for text in ["", "abc", "1,5", "1.2.3", "0x10", "--1", "1e", "NaN", "1 "] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_missing_value_is_null_and_changes_no_scale() {
        let mut builder = ColumnBuilder::default();
        builder.push(Decimal::parse("1.25"));
        builder.push(None);
        builder.push(Decimal::parse("-999.999"));
        assert_eq!(builder.clear(-999.999), 1);
        let (kind, exp10, _, nulls) = builder.finish();
        let nulls: Vec<usize> = (0..3).filter(|row| nulls.contains(*row)).collect();
        assert_eq!((kind, exp10, nulls), (Kind::Integer, -2, vec![1, 2]));
    }

    #[test]
    fn losses_of_numbers_are_reported() {
        let loss = |text: &str| Decimal::parse(text).unwrap().loss(text);
        for text in [
            "0",
            "0.0",
            "1.5",
            "inf",
            "-Infinity",
            "9007199254740992",
            "1e20",
            "0e-400",
        ] {
            assert_eq!(loss(text), None, "{text}");
        }
        for text in ["-0", "-0.0", "-0e5"] {
            assert_eq!(loss(text), Some(Loss::MinusZero), "{text}");
        }
        for text in [
            "9007199254740993",
            "-9007199254740993",
            "18446744073709551615",
        ] {
            assert_eq!(loss(text), Some(Loss::Rounded), "{text}");
        }
        assert_eq!(loss("1e400"), Some(Loss::TooLarge));
        assert_eq!(loss("-2e-400"), Some(Loss::TooSmall));
    }

    proptest! {
        #[test]
        fn scaled_integers_divide_back_to_the_double_that_was_written(
            digits in -RAW_END + 1..RAW_END, places in 0_usize..=9, is_mixed in any::<bool>(),
        ) {
            let width = places + 1;
            let padded = format!("{:0width$}", digits.unsigned_abs());
            let (whole, fraction) = padded.split_at(padded.len() - places);
            let sign = if digits < 0 { "-" } else { "" };
            let text = format!("{sign}{whole}.{fraction}");
            let expected = text.parse::<f64>().unwrap();
            if is_mixed {
                let (_, _, values) = column(&[&text, "1e300"]);
                prop_assert_eq!(values, Values::F64(vec![expected, 1e300]));
            } else {
                let (kind, exp10, values) = column(&[&text]);
                prop_assert_eq!(kind, Kind::Integer);
                let Values::Integer(raws) = values else { unreachable!() };
                prop_assert_eq!(raws[0] as f64 / 10_f64.powi(-i32::from(exp10)), expected);
            }
        }
    }
}
