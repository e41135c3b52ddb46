//! Formats values for tables and CSV.

pub use crate::store::admin::Value;
use crate::store::admin::real;

/// Output formats of a value.
pub trait Written {
    /// Returns whether the value is a number, which tables align to the right.
    fn is_number(&self) -> bool;
    /// Formats the value for people. Control characters are escaped, because text from devices must not control the
    /// terminal.
    fn shown(&self) -> String;
    /// Formats the value as a CSV field. NULL is an empty field, and an empty text is `""`.
    fn csv(&self) -> String;
}

impl Written for Value {
    fn is_number(&self) -> bool {
        matches!(self, Value::Integer(_) | Value::Real(_) | Value::Decimal(_))
    }

    fn shown(&self) -> String {
        match self {
            Value::Null => "NULL".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Real(value) => real(*value),
            Value::Decimal(value) => value.clone(),
            Value::Text(value) => escape_controls(value),
            Value::Blob(value) => hex::encode(value),
        }
    }

    fn csv(&self) -> String {
        match self {
            Value::Null => String::new(),
            Value::Text(value) => csv_text(value),
            value => value.shown(),
        }
    }
}

pub fn csv_text(text: &str) -> String {
    if text.is_empty() || text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

fn escape_controls(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let (plain, escaped) = if c.is_control() || is_bidi_control(c) {
                (None, Some(c.escape_default()))
            } else {
                (Some(c), None)
            };
            plain.into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

/// Returns whether a character changes the display order of the following text (Unicode property Bidi_Control).
fn is_bidi_control(c: char) -> bool {
    matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reals_round_trip() {
        for value in [
            0.0,
            -0.0,
            1.0,
            0.1 + 0.2,
            1e21,
            5e-324,
            f64::MAX,
            -21.57,
            1e16,
        ] {
            let value_json = Value::Real(value).json();
            let read: f64 = serde_json::from_str(&value_json).unwrap();
            assert_eq!(read.to_bits(), value.to_bits(), "{value_json}");
            let read: f64 = Value::Real(value).csv().parse().unwrap();
            assert_eq!(read.to_bits(), value.to_bits());
        }
        assert_eq!(Value::Real(1.0).json(), "1.0");
        assert_eq!(Value::Real(f64::NEG_INFINITY).json(), "\"-Infinity\"");
        let read: f64 = Value::Real(f64::INFINITY).csv().parse().unwrap();
        assert_eq!(read, f64::INFINITY);
        assert_eq!(Value::Real(f64::NAN).json(), "\"NaN\"");
    }

    #[test]
    fn postgres_types_are_written_as_json() {
        assert_eq!(Value::Bool(true).json(), "true");
        let digits = "123456789012345678901234567890.5";
        assert_eq!(Value::Decimal(digits.to_owned()).json(), digits);
        assert!(Value::Decimal(digits.to_owned()).is_number());
    }

    #[test]
    fn csv_distinguishes_null_from_empty() {
        assert_eq!(Value::Null.csv(), "");
        assert_eq!(Value::from("").csv(), "\"\"");
        assert_eq!(Value::from("a,\"b\"\n").csv(), "\"a,\"\"b\"\"\n\"");
        assert_eq!(Value::Blob(vec![0, 0xAB]).csv(), "00ab");
    }

    #[test]
    fn control_characters_are_escaped() {
        let value = Value::from("a\u{1b}[2Jb\nc\u{9b}é\u{202e}d");
        assert_eq!(value.shown(), "a\\u{1b}[2Jb\\nc\\u{9b}é\\u{202e}d");
        assert_eq!(Value::from("\u{1b}\"").json(), "\"\\u001b\\\"\"".to_owned());
    }
}
