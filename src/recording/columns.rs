//! Converts the names and units of columns to those of channels.

use std::collections::HashSet;

use super::ReadError;
use super::layout::Layout;
use super::notes::Notes;

/// Longest name of a channel, in bytes.
const NAME_BYTES_MAX: usize = 32;
/// Longest unit, in bytes.
const UNIT_BYTES_MAX: usize = 16;
/// Longest part of a device's name that comes from a cell.
const ID_BYTES_MAX: usize = 24;

impl Layout {
    /// Returns a column's name for use in messages.
    pub fn title(&self, column: usize) -> String {
        match self.header.get(column).map(String::as_str) {
            None | Some("") => format!("column {}", column + 1),
            Some(header) => format!("{header:?}"),
        }
    }
}

/// Returns the first titles as one text, with the number of the others.
pub fn list_of(titles: &[String]) -> String {
    let shown = titles[..titles.len().min(6)].join(", ");
    match titles.len().saturating_sub(6) {
        0 => shown,
        more => format!("{shown}, and {more} more"),
    }
}

/// Returns the column that a flag specifies, by its header, its name without a unit, or its number.
///
/// # Errors
/// The column does not exist.
pub fn index_of(given: &str, header: &[String], flag: &str) -> Result<usize, ReadError> {
    let given = given.trim();
    let position = |is: &dyn Fn(&str) -> bool| header.iter().position(|header| is(header));
    let found = position(&|header| header == given)
        .or_else(|| position(&|header| header.eq_ignore_ascii_case(given)))
        .or_else(|| position(&|header| split(header).0.eq_ignore_ascii_case(given)))
        .or_else(|| {
            let number: usize = given.parse().ok()?;
            number
                .checked_sub(1)
                .filter(|column| *column < header.len())
        });
    found.ok_or_else(|| {
        let names: Vec<&str> = header.iter().map(String::as_str).take(12).collect();
        let more = if header.len() > names.len() {
            ", …"
        } else {
            ""
        };
        ReadError::file(format!(
            "{flag}: no column {given:?}; columns are {}{more}",
            names.join(", ")
        ))
    })
}

/// Splits a header into name and unit: `name [unit]` or `name (unit)`.
pub fn split(header: &str) -> (&str, &str) {
    let header = header.trim();
    let bracketed = header
        .strip_suffix(']')
        .and_then(|rest| rest.rsplit_once('['));
    if let Some((name, unit)) = bracketed {
        return (name.trim(), unit.trim());
    }
    let in_parentheses = header
        .strip_suffix(')')
        .and_then(|rest| rest.rsplit_once(" ("));
    match in_parentheses {
        Some((name, unit)) if !unit.contains(' ') && !unit.is_empty() => (name.trim(), unit),
        _ => (header, ""),
    }
}

/// Returns the names and units of the `taken` columns, changed to fit the protocol and to be
/// unique.
pub fn labels(layout: &Layout, taken: &[usize], notes: &mut Notes) -> Vec<(String, String)> {
    let mut labels: Vec<(String, String)> = taken
        .iter()
        .map(|&column| {
            let (name, unit) = split(&layout.header[column]);
            let below = layout.units.as_ref().map(|units| units[column].as_str());
            let unit = if unit.is_empty() {
                below.unwrap_or_default()
            } else {
                unit
            };
            (
                name.to_owned(),
                unit.trim_matches(['[', ']', '(', ')']).to_owned(),
            )
        })
        .collect();
    keep_units_that_differ(layout, taken, &mut labels);
    let mut changed = Vec::new();
    let mut names = HashSet::new();
    for ((name, unit), &column) in labels.iter_mut().zip(taken) {
        if name.is_empty() {
            *name = format!("column_{}", column + 1);
        }
        let unique = unique(name, NAME_BYTES_MAX, &mut names);
        if unique != *name {
            changed.push(format!("{} is {unique:?}", layout.title(column)));
            *name = unique;
        }
        if unit.len() > UNIT_BYTES_MAX {
            changed.push(format!("the unit {unit:?} is omitted"));
            unit.clear();
        }
    }
    if !changed.is_empty() {
        let more = changed.len().saturating_sub(5);
        let more = if more > 0 {
            format!(", and {more} more")
        } else {
            String::new()
        };
        let shown = changed[..changed.len().min(5)].join(", ");
        notes.say(format!("names shortened or changed: {shown}{more}"));
    }
    labels
}

/// Uses the whole header as the name wherever names without units are equal.
fn keep_units_that_differ(layout: &Layout, taken: &[usize], labels: &mut [(String, String)]) {
    let clash = |name: &str, labels: &[(String, String)]| {
        labels.iter().filter(|(other, _)| other == name).count() > 1
    };
    let clashing: Vec<bool> = labels.iter().map(|(name, _)| clash(name, labels)).collect();
    for ((label, &column), clashes) in labels.iter_mut().zip(taken).zip(clashing) {
        if clashes {
            label.0 = layout.header[column].trim().to_owned();
        }
    }
}

/// Returns the text, cut to `bytes_max` bytes, with a number appended if it occurred before.
fn unique(text: &str, bytes_max: usize, seen: &mut HashSet<String>) -> String {
    let cut = |bytes: usize| {
        let end = (0..=bytes.min(text.len()))
            .rev()
            .find(|end| text.is_char_boundary(*end));
        text[..end.unwrap_or(0)].trim_end()
    };
    let mut name = cut(bytes_max).to_owned();
    for number in 2.. {
        if !name.is_empty() && seen.insert(name.clone()) {
            break;
        }
        let suffix = format!("_{number}");
        name = format!("{}{suffix}", cut(bytes_max - suffix.len()));
    }
    name
}

/// Converts each cell of a column to a part of a device name.
pub fn device_ids(cells: &[String]) -> Vec<String> {
    let mut seen = HashSet::new();
    cells
        .iter()
        .map(|cell| {
            let id: String = cell
                .chars()
                .map(|char| {
                    if char.is_ascii_alphanumeric() || "._:-".contains(char) {
                        char
                    } else {
                        '-'
                    }
                })
                .collect();
            let id = if id.is_empty() { "none" } else { &id };
            unique(id, ID_BYTES_MAX, &mut seen)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_split_into_name_and_unit() {
        for (header, expected) in [
            ("Water flow [l/s]", ("Water flow", "l/s")),
            ("T (degC)", ("T", "degC")),
            ("CO(GT)", ("CO(GT)", "")),
            ("wind (10 m)", ("wind (10 m)", "")),
            (" a ", ("a", "")),
        ] {
            assert_eq!(split(header), expected, "{header}");
        }
    }

    #[test]
    fn names_are_cut_and_made_unique() {
        let mut seen = HashSet::new();
        assert_eq!(unique(&"ä".repeat(20), 32, &mut seen), "ä".repeat(16));
        assert_eq!(
            unique(&"ä".repeat(20), 32, &mut seen),
            format!("{}_2", "ä".repeat(15))
        );
        assert_eq!(
            device_ids(&["a b".into(), "a/b".into(), "".into()]),
            ["a-b", "a-b_2", "none"]
        );
    }
}
