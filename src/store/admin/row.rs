//! Parameters and rows of queries, the same types for every store.

use sqlx::Arguments;
use sqlx::postgres::PgArguments;
use sqlx::sqlite::SqliteArguments;

use super::{QueryError, Value};
use crate::store::postgres;

#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    Integer(i64),
    Text(&'a str),
    /// A time, microseconds UTC.
    Time(i64),
    Bytes(Option<&'a [u8]>),
}

impl From<i64> for Argument<'_> {
    fn from(value: i64) -> Self {
        Argument::Integer(value)
    }
}

impl<'a> From<&'a str> for Argument<'a> {
    fn from(value: &'a str) -> Self {
        Argument::Text(value)
    }
}

pub(super) fn sqlite_arguments(values: &[Argument<'_>]) -> Result<SqliteArguments, sqlx::Error> {
    let mut arguments = SqliteArguments::default();
    for value in values {
        match value {
            Argument::Integer(value) | Argument::Time(value) => arguments.add(*value),
            Argument::Text(value) => arguments.add((*value).to_owned()),
            Argument::Bytes(value) => arguments.add(value.map(<[u8]>::to_vec)),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

/// Returns the parameters of a user's statement.
pub(super) fn sqlite_values(values: &[Value]) -> Result<SqliteArguments, sqlx::Error> {
    let mut arguments = SqliteArguments::default();
    for value in values {
        match value {
            Value::Null => arguments.add(None::<i64>),
            Value::Bool(value) => arguments.add(i64::from(*value)),
            Value::Integer(value) => arguments.add(*value),
            Value::Real(value) => arguments.add(*value),
            Value::Decimal(text) | Value::Text(text) => arguments.add(text.clone()),
            Value::Blob(bytes) => arguments.add(bytes.clone()),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

pub(super) fn postgres_arguments(values: &[Argument<'_>]) -> Result<PgArguments, sqlx::Error> {
    let mut arguments = PgArguments::default();
    for value in values {
        match value {
            Argument::Integer(value) => arguments.add(*value),
            Argument::Text(value) => arguments.add(*value),
            Argument::Time(value) => arguments.add(postgres::Timestamp(*value)),
            Argument::Bytes(value) => arguments.add(*value),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

/// Returns ids as a list in SQL, without parentheses.
pub(super) fn id_list(ids: &[i64]) -> String {
    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
    ids.join(", ")
}

/// A row: its values in column order.
#[derive(Clone, Debug, PartialEq)]
pub struct Row(pub Vec<Value>);

impl Row {
    pub fn integer(&self, column: usize) -> Result<i64, QueryError> {
        match self.0[column] {
            Value::Integer(value) => Ok(value),
            _ => Err(self.unexpected(column)),
        }
    }

    pub fn integer_or_null(&self, column: usize) -> Result<Option<i64>, QueryError> {
        match self.0[column] {
            Value::Null => Ok(None),
            _ => self.integer(column).map(Some),
        }
    }

    pub fn real_or_null(&self, column: usize) -> Result<Option<f64>, QueryError> {
        match self.0[column] {
            Value::Null => Ok(None),
            Value::Real(value) => Ok(Some(value)),
            _ => Err(self.unexpected(column)),
        }
    }

    /// Returns the value of a reading. SQLite returns one that is written without a decimal point as an integer.
    pub fn sample(&self, column: usize) -> Result<Option<f64>, QueryError> {
        match self.0[column] {
            Value::Integer(value) => Ok(Some(value as f64)),
            _ => self.real_or_null(column),
        }
    }

    pub fn text_or_null(&self, column: usize) -> Result<Option<&str>, QueryError> {
        match &self.0[column] {
            Value::Null => Ok(None),
            Value::Text(value) => Ok(Some(value)),
            _ => Err(self.unexpected(column)),
        }
    }

    /// Returns a text; empty for NULL.
    pub fn text(&self, column: usize) -> Result<&str, QueryError> {
        Ok(self.text_or_null(column)?.unwrap_or_default())
    }

    pub fn bytes(&self, column: usize) -> Result<&[u8], QueryError> {
        match &self.0[column] {
            Value::Blob(value) => Ok(value),
            _ => Err(self.unexpected(column)),
        }
    }

    /// Returns the name of a value of `frames.quality`: how the time was converted to UTC.
    pub fn quality(&self, column: usize) -> Result<Option<&'static str>, QueryError> {
        Ok(match self.integer_or_null(column)? {
            Some(0) => Some("utc"),
            Some(1) => Some("anchored"),
            Some(2) => Some("unanchored"),
            Some(3) => Some("suspect"),
            _ => None,
        })
    }

    fn unexpected(&self, column: usize) -> QueryError {
        QueryError::Unexpected {
            column,
            found: self.0[column].clone(),
        }
    }
}
