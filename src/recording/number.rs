//! Value of a cell: a number in the file's style, true or false, a missing value, or text.

use std::borrow::Cow;

use super::decimal::Decimal;

/// Marks of a missing value that are recognized by default, in lower case.
const MISSING: [&str; 25] = [
    "", "na", "n/a", "nan", "null", "none", "nil", "?", "-", "--", "---", "-nan", ".", "..", "*",
    "#n/a", "#na", "#value!", "#div/0!", "<na>", "\\n", "missing", "nodata", "no data", "mm",
];

/// Numbers that stand for a missing value in many files. [`Marks::guess`] says whether they are
/// used.
pub const SENTINELS: [f64; 14] = [
    -99_999.0, -9_999.99, -9_999.9, -9_999.0, -9_900.0, -999.99, -999.9, -999.0, -200.0, -99.99,
    -99.9, -99.0, -32_768.0, -6_999.0,
];

/// Number format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Decimal separator.
    pub decimal: char,
    /// Thousands separator.
    pub thousands: Option<char>,
}

/// Numbers such as 1234.5.
pub const POINT: Style = Style {
    decimal: '.',
    thousands: None,
};

/// Value of a cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    Missing,
    Number(Decimal),
    /// Anything else.
    Text,
}

/// Marks of a missing value.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    given: Vec<String>,
}

impl Marks {
    /// Uses the given marks, or the default ones if none are given.
    pub fn new(given: &[String]) -> Marks {
        Marks {
            given: given.iter().map(|mark| mark.trim().to_owned()).collect(),
        }
    }

    /// Returns whether numbers such as -999 may be treated as marks.
    pub fn guess(&self) -> bool {
        self.given.is_empty()
    }

    /// Returns whether a cell is a missing value.
    pub fn contain(&self, cell: &str) -> bool {
        if !self.given.is_empty() {
            return cell.is_empty() || self.given.iter().any(|mark| mark == cell);
        }
        cell.len() <= 8 && MISSING.iter().any(|mark| mark.eq_ignore_ascii_case(cell))
    }
}

impl Style {
    /// Reads a cell.
    pub fn read(self, cell: &str, marks: &Marks) -> Value {
        if marks.contain(cell) {
            return Value::Missing;
        }
        match self.number(cell) {
            Some(text) => Decimal::parse(&text).map_or(Value::Text, Value::Number),
            None => match () {
                () if cell.eq_ignore_ascii_case("true") => Value::Number(one(true)),
                () if cell.eq_ignore_ascii_case("false") => Value::Number(one(false)),
                () => Value::Text,
            },
        }
    }

    /// Returns a number's text with a decimal point, without thousands separators and without a
    /// percent sign. Returns `None` if the cell is not a number in this style.
    pub fn number(self, cell: &str) -> Option<Cow<'_, str>> {
        let cell = cell.strip_suffix('%').map_or(cell, str::trim_end);
        let first = cell.chars().next()?;
        if !(first.is_ascii_digit() || "+-.,−iI".contains(first)) {
            return None;
        }
        let is_plain = |byte: u8| byte.is_ascii_digit() || b"+-eE.".contains(&byte);
        if self == POINT && cell.bytes().all(is_plain) {
            return Some(Cow::Borrowed(cell));
        }
        if ["inf", "+inf", "-inf", "infinity", "-infinity"].contains(&cell.to_lowercase().as_str())
        {
            return Some(Cow::Borrowed(cell));
        }
        let (mantissa, exponent) = cell.split_at(cell.find(['e', 'E']).unwrap_or(cell.len()));
        let (whole, fraction) = match mantissa.rsplit_once(self.decimal) {
            Some((whole, fraction)) => (whole, Some(fraction)),
            None => (mantissa, None),
        };
        let mut text = self.ungroup(whole)?;
        if let Some(fraction) = fraction {
            text.push('.');
            text.push_str(fraction);
        }
        text.push_str(exponent);
        let is_number = text.bytes().all(is_plain);
        is_number.then_some(Cow::Owned(text))
    }

    /// Removes the thousands separators from the whole part; they must separate groups of three
    /// digits.
    fn ungroup(self, whole: &str) -> Option<String> {
        let whole = whole.replace('−', "-");
        let Some(separator) = self.thousands else {
            return Some(whole);
        };
        let is_separator = |char: char| match separator {
            ' ' => matches!(char, ' ' | '\u{A0}' | '\u{202F}'),
            separator => char == separator,
        };
        let mut groups = whole.split(is_separator);
        let first = groups.next()?;
        let mut text = first.to_owned();
        let mut is_grouped = false;
        for group in groups {
            is_grouped = true;
            if group.len() != 3 {
                return None;
            }
            text.push_str(group);
        }
        let digits = first.trim_start_matches(['+', '-']).len();
        (!is_grouped || (1..=3).contains(&digits)).then_some(text)
    }
}

fn one(is_true: bool) -> Decimal {
    Decimal::parse(if is_true { "1" } else { "0" }).expect("digits")
}

/// Possible meanings of the commas and points in the examined cells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Census {
    decimal_point: u32,
    decimal_comma: u32,
    grouped_by_comma: u32,
    grouped_by_point: u32,
    /// Such as `1,234`: a decimal comma or a thousands separator.
    unclear: u32,
}

impl Census {
    /// Examines a cell.
    pub fn add(&mut self, cell: &str) {
        let is_digit = |byte: u8| byte.is_ascii_digit() || b"+-.,eE".contains(&byte);
        if cell.is_empty() || !cell.bytes().all(is_digit) || cell.parse::<u64>().is_ok() {
            return;
        }
        let commas = cell.matches(',').count();
        let points = cell.matches('.').count();
        let by = |separator, decimal| Style {
            decimal,
            thousands: Some(separator),
        };
        match (commas, points) {
            (0, 1) => self.decimal_point += 1,
            (1, 0) if by(',', '.').number(cell).is_some() && !cell.starts_with("0,") => {
                self.unclear += 1
            }
            (1, 0) => self.decimal_comma += 1,
            (2.., 0 | 1) if by(',', '.').number(cell).is_some() => self.grouped_by_comma += 1,
            (1, 1) if by(',', '.').number(cell).is_some() => self.grouped_by_comma += 1,
            (0 | 1, 1..) if by('.', ',').number(cell).is_some() => self.grouped_by_point += 1,
            _ => {}
        }
    }

    /// Returns the style in which the cells are numbers.
    ///
    /// # Errors
    /// The commas are ambiguous.
    pub fn style(self) -> Result<Style, String> {
        let style = |decimal, thousands| Ok(Style { decimal, thousands });
        match self {
            _ if self.grouped_by_point > 0 && self.grouped_by_point >= self.grouped_by_comma => {
                style(',', Some('.'))
            }
            _ if self.grouped_by_comma > 0 => style('.', Some(',')),
            _ if self.decimal_comma > 0 => style(',', None),
            _ if self.unclear > 0 && self.decimal_point > 0 => style('.', Some(',')),
            _ if self.unclear > 0 => Err(
                "ambiguous numbers such as 1,234 (1.234 or 1234); use --decimal , or --thousands ,"
                    .to_owned(),
            ),
            _ => Ok(POINT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMA: Style = Style {
        decimal: ',',
        thousands: None,
    };

    fn number(style: Style, cell: &str) -> Option<f64> {
        match style.read(cell, &Marks::default()) {
            Value::Number(number) => Some(number.nearest()),
            _ => None,
        }
    }

    #[test]
    fn numbers_are_read_in_their_style() {
        let english = Style {
            decimal: '.',
            thousands: Some(','),
        };
        let french = Style {
            decimal: ',',
            thousands: Some(' '),
        };
        for (style, cell, expected) in [
            (POINT, "-1.5e3", Some(-1500.0)),
            (POINT, "12.5 %", Some(12.5)),
            (POINT, "−4", Some(-4.0)),
            (POINT, "True", Some(1.0)),
            (POINT, "-inf", Some(f64::NEG_INFINITY)),
            (POINT, "1,5", None),
            (POINT, "12:30", None),
            (POINT, "2020-01-01", None),
            (COMMA, "-1,5", Some(-1.5)),
            (COMMA, "1,5E-2", Some(0.015)),
            (COMMA, ",5", Some(0.5)),
            (COMMA, "1.5", Some(1.5)),
            (english, "1,234,567.8", Some(1_234_567.8)),
            (english, "12,34", None),
            (english, "1234.5", Some(1234.5)),
            (french, "1\u{202F}234,5", Some(1234.5)),
        ] {
            assert_eq!(number(style, cell), expected, "{cell}");
        }
    }

    #[test]
    fn given_marks_of_missing_values_replace_the_default_ones() {
        let known = Marks::default();
        for cell in ["", "NA", "n/a", "NaN", "NULL", "?", "-", "--", "<NA>"] {
            assert_eq!(POINT.read(cell, &known), Value::Missing, "{cell}");
        }
        let given = Marks::new(&["-1".to_owned(), "x".to_owned()]);
        assert_eq!(POINT.read("-1", &given), Value::Missing);
        assert_eq!(POINT.read("x", &given), Value::Missing);
        assert_eq!(POINT.read("NA", &given), Value::Text);
    }

    #[test]
    fn the_style_follows_from_the_cells() {
        let style = |cells: &[&str]| {
            let mut census = Census::default();
            cells.iter().for_each(|cell| census.add(cell));
            census.style().map(|style| (style.decimal, style.thousands))
        };
        assert_eq!(style(&["1.5", "2"]), Ok(('.', None)));
        assert_eq!(style(&["1,5", "1,234"]), Ok((',', None)));
        assert_eq!(style(&["0,123"]), Ok((',', None)));
        assert_eq!(style(&["1,234", "5.5"]), Ok(('.', Some(','))));
        assert_eq!(style(&["1,234,567"]), Ok(('.', Some(','))));
        assert_eq!(style(&["1.234,5"]), Ok((',', Some('.'))));
        assert!(style(&["1,234", "5"]).unwrap_err().contains("--decimal ,"));
    }
}
