//! A value of SQLite, and how it is written.

use std::fmt::Write;

use sqlx::decode::Decode;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, TypeInfo, ValueRef};

/// What a column of a row can hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Integer(i64),
    Real(f64),
    Text(String),
    Blob(Vec<u8>),
}

impl Value {
    /// The values of a row, in the order of its columns. Text that is not UTF-8 is mended.
    pub fn row(row: &SqliteRow) -> Result<Vec<Value>, sqlx::Error> {
        (0..row.len()).map(|index| Value::of(row, index)).collect()
    }

    fn of(row: &SqliteRow, index: usize) -> Result<Value, sqlx::Error> {
        let raw = row.try_get_raw(index)?;
        if raw.is_null() {
            return Ok(Value::Null);
        }
        // The value's own type: SQLite's columns do not bind theirs.
        let value = match raw.type_info().name() {
            "INTEGER" => <i64 as Decode<Sqlite>>::decode(raw).map(Value::Integer),
            "REAL" => <f64 as Decode<Sqlite>>::decode(raw).map(Value::Real),
            "BLOB" => <Vec<u8> as Decode<Sqlite>>::decode(raw).map(Value::Blob),
            _ => <&[u8] as Decode<Sqlite>>::decode(raw)
                .map(|text| Value::Text(String::from_utf8_lossy(text).into_owned())),
        };
        value.map_err(sqlx::Error::Decode)
    }

    /// Whether it belongs to the right of its column.
    pub fn is_number(&self) -> bool {
        matches!(self, Value::Integer(_) | Value::Real(_))
    }

    /// For people. What devices sent must not steer a terminal, so control characters are spelled
    /// out.
    pub fn shown(&self) -> String {
        match self {
            Value::Null => "NULL".to_owned(),
            Value::Integer(value) => value.to_string(),
            Value::Real(value) => real(*value),
            Value::Text(value) => escape_controls(value),
            Value::Blob(value) => hex(value),
        }
    }

    /// A field of CSV. NULL is nothing at all, and an empty text is `""`.
    pub fn csv(&self) -> String {
        match self {
            Value::Null => String::new(),
            Value::Text(value) => csv_text(value),
            value => value.shown(),
        }
    }

    /// A JSON value. What JSON has no number for is a string.
    pub fn json(&self) -> String {
        match self {
            Value::Null => "null".to_owned(),
            Value::Integer(value) => value.to_string(),
            Value::Real(value) if value.is_finite() => real(*value),
            Value::Text(value) => json_text(value),
            value => json_text(&value.shown()),
        }
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Value::Integer(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::Text(value)
    }
}

/// A field of CSV that holds `text`.
pub fn csv_text(text: &str) -> String {
    if text.is_empty() || text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

/// A JSON string that holds `text`.
pub fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Lower-case digits, two for each byte.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The shortest digits that give the same number again, and always recognizable as REAL.
fn real(value: f64) -> String {
    match value {
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value => format!("{value:?}"),
    }
}

fn escape_controls(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let (plain, escaped) = if c.is_control() {
                (None, Some(c.escape_default()))
            } else {
                (Some(c), None)
            };
            plain.into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reals_come_back_as_they_were() {
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
    }

    #[test]
    fn csv_tells_null_from_empty() {
        assert_eq!(Value::Null.csv(), "");
        assert_eq!(Value::from("").csv(), "\"\"");
        assert_eq!(Value::from("a,\"b\"\n").csv(), "\"a,\"\"b\"\"\n\"");
        assert_eq!(Value::Blob(vec![0, 0xAB]).csv(), "00ab");
    }

    #[test]
    fn terminals_see_no_control_characters() {
        let value = Value::from("a\u{1b}[2Jb\nc\u{9b}é");
        assert_eq!(value.shown(), "a\\u{1b}[2Jb\\nc\\u{9b}é");
        assert_eq!(Value::from("\u{1b}\"").json(), "\"\\u001b\\\"\"".to_owned());
    }
}
