//! Names that somebody may have meant.

/// Up to three of `names` that resemble `wanted`, the most similar first.
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

/// The most similar of `names`, however little that is.
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names
        .into_iter()
        .min_by_key(|name| (difference(wanted, name), *name))
}

/// How many characters to insert, remove or replace to make one text of the other, upper and lower
/// case being alike (Levenshtein's distance, by the row). A text that begins with the other is near.
fn difference(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().collect();
    let b: Vec<char> = b.to_lowercase().chars().collect();
    if !a.is_empty() && b.starts_with(&a) {
        return usize::from(a != b);
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_differs() {
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
    fn offers_what_is_meant() {
        let names = ["pump-1", "pump-12", "valve-1", "meter"];
        assert_eq!(near("pmup-1", names), ["pump-1"]);
        assert_eq!(near("pump", names), ["pump-1", "pump-12"]);
        assert!(near("turbine", names).is_empty());
        assert_eq!(nearest("metro", names), Some("meter"));
        assert_eq!(nearest("x", []), None);
    }
}
