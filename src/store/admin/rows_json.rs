//! Writes rows as a JSON array of objects, piece by piece.

use std::fmt::Write;

use super::Value;
use super::value::json_text;

/// The state between two pieces of an array.
pub struct RowsJson {
    keys: Vec<String>,
    is_first: bool,
}

impl RowsJson {
    /// Creates the array of rows with these column names.
    pub fn new(columns: &[String]) -> RowsJson {
        RowsJson {
            keys: unique(columns).iter().map(|key| json_text(key)).collect(),
            is_first: true,
        }
    }

    /// Returns the text for the next row.
    pub fn row(&mut self, row: &[Value]) -> String {
        let mut text = String::from(if self.is_first { "[\n{" } else { ",\n{" });
        self.is_first = false;
        for (index, (key, value)) in self.keys.iter().zip(row).enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(text, "{comma}{key}:{}", value.json()).expect("a String takes all");
        }
        text.push('}');
        text
    }

    /// Returns the text after the last row.
    pub fn end(&self) -> &'static str {
        if self.is_first { "[]\n" } else { "\n]\n" }
    }
}

/// Makes keys unique: the second `id` becomes `id_2`. JSON parsers keep only one value per key.
fn unique(headers: &[String]) -> Vec<String> {
    let mut keys: Vec<String> = Vec::with_capacity(headers.len());
    for header in headers {
        let mut key = header.clone();
        let mut number = 1;
        while keys.contains(&key) || (number > 1 && headers.contains(&key)) {
            number += 1;
            key = format!("{header}_{number}");
        }
        keys.push(key);
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn keys_are_unique() {
        assert_eq!(unique(&strings(&["a", "b"])), ["a", "b"]);
        assert_eq!(unique(&strings(&["a", "a", "a"])), ["a", "a_2", "a_3"]);
        assert_eq!(unique(&strings(&["a", "a", "a_2"])), ["a", "a_3", "a_2"]);
    }
}
