//! Suggests similar names for unknown ones.

use crate::store::admin::Connection;

use super::Error;

/// Returns up to three of `names` that resemble `wanted`, the most similar first.
pub fn near<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let tolerated = (wanted.chars().count() / 3).max(2);
    let mut near: Vec<(usize, &str)> = names
        .into_iter()
        .map(|name| (difference(wanted, name), name))
        .filter(|(difference, _)| *difference <= tolerated)
        .collect();
    near.sort_unstable();
    near.into_iter().take(3).map(|(_, name)| name).collect()
}

/// Returns the most similar of `names`, even if the similarity is low.
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names
        .into_iter()
        .min_by_key(|name| (difference(wanted, name), *name))
}

/// Returns the Levenshtein distance, ignoring case. If `b` begins with `a`, returns at most 1.
fn difference(a: &str, b: &str) -> usize {
    let [a, b] = [a, b].map(str::to_lowercase);
    match !a.is_empty() && b.starts_with(&a) {
        true => usize::from(a != b),
        false => strsim::levenshtein(&a, &b),
    }
}

/// Returns the error for an unknown device, with similar names.
pub async fn unknown_device(connection: &mut Connection, name: &str) -> Result<Error, Error> {
    let rows = connection.rows("SELECT name FROM devices", &[]).await?;
    let mut names = Vec::with_capacity(rows.len());
    for row in &rows {
        names.extend(row.text_or_null(0)?);
    }
    let near = near(name, names);
    Ok(Error::Failed(if near.is_empty() {
        format!("unknown device {name:?}; `fieldgate device list` shows all devices")
    } else {
        format!(
            "unknown device {name:?}; did you mean {}?",
            near.join(" or ")
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted() {
        for (a, b, n) in [
            ("kitten", "sitting", 3),
            ("", "abc", 3),
            ("abc", "", 3),
            ("listen", "LISTEN", 0),
            ("lisen", "listen", 1),
            ("pump", "pump-17", 1),
        ] {
            assert_eq!(difference(a, b), n, "{a} {b}");
        }
    }

    #[test]
    fn similar_names_are_suggested() {
        let names = ["pump-1", "pump-12", "valve-1", "meter"];
        assert_eq!(near("pmup-1", names), ["pump-1"]);
        assert_eq!(near("pump", names), ["pump-1", "pump-12"]);
        assert!(near("turbine", names).is_empty());
        assert_eq!(nearest("metro", names), Some("meter"));
        assert_eq!(nearest("x", []), None);
    }
}
