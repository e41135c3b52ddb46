//! A value of a result row, the same type for every store.

use sqlx::decode::Decode;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgRow, PgValueFormat, PgValueRef};
use sqlx::sqlite::{SqliteRow, SqliteValueRef};
use sqlx::{Postgres, Row, Sqlite, TypeInfo, ValueRef};

use crate::store::postgres::Timestamp;

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    /// Boolean; Postgres only.
    Bool(bool),
    /// Integer; a time is microseconds UTC.
    Integer(i64),
    Real(f64),
    /// Finite Postgres number of any precision, as text.
    Decimal(String),
    /// Text, or a Postgres type without a variant of its own.
    Text(String),
    Blob(Vec<u8>),
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

impl Value {
    /// Formats the value as JSON. A number that JSON cannot represent becomes a string.
    pub fn json(&self) -> String {
        match self {
            Value::Null => "null".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Real(value) if !value.is_finite() => json_text(&real(*value)),
            Value::Real(value) => real(*value),
            Value::Decimal(value) => value.clone(),
            Value::Text(value) => json_text(value),
            Value::Blob(value) => json_text(&hex::encode(value)),
        }
    }
}

pub fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Formats a number with the fewest digits that parse to the same number, in a form that is always a REAL.
pub fn real(value: f64) -> String {
    match value {
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value => format!("{value:?}"),
    }
}

/// Returns the values of a row in column order. Invalid UTF-8 is replaced by U+FFFD.
pub(super) fn of_sqlite(row: &SqliteRow) -> Result<Vec<Value>, sqlx::Error> {
    let value = |index| {
        let raw = row.try_get_raw(index)?;
        sqlite_value(raw).map_err(sqlx::Error::Decode)
    };
    (0..row.len()).map(value).collect()
}

fn sqlite_value(raw: SqliteValueRef<'_>) -> Result<Value, BoxDynError> {
    if raw.is_null() {
        return Ok(Value::Null);
    }
    // Use the value's own type: SQLite does not enforce column types.
    match raw.type_info().name() {
        "INTEGER" => <i64 as Decode<Sqlite>>::decode(raw).map(Value::Integer),
        "REAL" => <f64 as Decode<Sqlite>>::decode(raw).map(Value::Real),
        "BLOB" => <Vec<u8> as Decode<Sqlite>>::decode(raw).map(Value::Blob),
        _ => <&[u8] as Decode<Sqlite>>::decode(raw)
            .map(|text| Value::Text(String::from_utf8_lossy(text).into_owned())),
    }
}

/// Returns the values of a row in column order.
pub(super) fn of_postgres(row: &PgRow) -> Result<Vec<Value>, sqlx::Error> {
    let value = |index| {
        let raw = row.try_get_raw(index)?;
        postgres_value(raw).map_err(sqlx::Error::Decode)
    };
    (0..row.len()).map(value).collect()
}

/// Converts a value. A user's statement returns values as text, so that every type has a representation; times
/// then stay as Postgres writes them.
fn postgres_value(raw: PgValueRef<'_>) -> Result<Value, BoxDynError> {
    if raw.is_null() {
        return Ok(Value::Null);
    }
    let is_text = raw.format() == PgValueFormat::Text;
    let type_info = raw.type_info().into_owned();
    match type_info.name() {
        "INT2" | "INT4" | "INT8" => <i64 as Decode<Postgres>>::decode(raw).map(Value::Integer),
        "BOOL" => <bool as Decode<Postgres>>::decode(raw).map(Value::Bool),
        // Shortest digits of either width, which are also those of the nearest double.
        "FLOAT4" | "FLOAT8" if is_text => Ok(Value::Real(raw.as_str()?.parse()?)),
        "FLOAT8" => <f64 as Decode<Postgres>>::decode(raw).map(Value::Real),
        "BYTEA" if is_text && !raw.as_str()?.starts_with("\\x") => Ok(escaped(raw.as_str()?)),
        "BYTEA" => <Vec<u8> as Decode<Postgres>>::decode(raw).map(Value::Blob),
        "TIMESTAMPTZ" if !is_text => {
            <Timestamp as Decode<Postgres>>::decode(raw).map(|at| Value::Integer(at.0))
        }
        "NUMERIC" if is_text => Ok(decimal(raw.as_str()?)),
        _ => Ok(Value::Text(raw.as_str()?.to_owned())),
    }
}

/// Decodes bytes in the format of `bytea_output = escape`, which a statement may set: a backslash is doubled,
/// and a byte that is not printable ASCII is a backslash and three octal digits.
fn escaped(text: &str) -> Value {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let (byte, behind) = match (first, behind) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    behind @ ..,
                ],
            ) => ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), behind),
            (b'\\', [b'\\', behind @ ..]) => (b'\\', behind),
            (byte, behind) => (*byte, behind),
        };
        bytes.push(byte);
        rest = behind;
    }
    Value::Blob(bytes)
}

/// Parses a number. Postgres has NaN and infinities, which few other programs accept.
fn decimal(text: &str) -> Value {
    if text.ends_with(|last: char| last.is_ascii_digit()) {
        Value::Decimal(text.to_owned())
    } else {
        Value::Text(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_bytes_are_read() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("plain", b"plain"),
            ("\\000\\377a\\\\b", b"\0\xffa\\b"),
            ("\\\\x00", b"\\x00"),
        ] {
            assert_eq!(escaped(text), Value::Blob(bytes.to_vec()), "{text}");
        }
    }

    #[test]
    fn only_finite_decimals_are_numbers() {
        for text in ["0", "-12.50", "123456789012345678901234567890"] {
            assert_eq!(decimal(text), Value::Decimal(text.to_owned()));
        }
        for text in ["NaN", "Infinity", "-Infinity"] {
            assert_eq!(decimal(text), Value::Text(text.to_owned()));
        }
    }
}
