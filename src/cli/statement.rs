//! Tells a statement that reads from everything else, before SQLite sees it.
//!
//! A read-only connection alone is not enough: `VACUUM INTO` writes a file through one, `ATTACH`
//! opens other databases, and several statements in one text would give rows of different shapes.

/// Statements that can only read, on a connection that is read-only. PRAGMA is none of them: many
/// change or do something. SQLite offers those that only read as functions, `pragma_table_info(…)`.
const READING: [&str; 4] = ["SELECT", "WITH", "VALUES", "EXPLAIN"];

/// Why a text is not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing, or only comments.
    #[error("there is no SQL statement in {0:?}")]
    Empty(String),
    /// More than one.
    #[error("query runs one statement at a time; there is another one after the first `;`")]
    Several,
    /// It does something else.
    #[error(
        "query only reads the store, it does not run {0}; it runs SELECT, WITH, VALUES and EXPLAIN \
         (for PRAGMA x, write SELECT * FROM pragma_x)"
    )]
    Writes(String),
}

/// Checks that `sql` is one statement, and of those that read.
pub fn check(sql: &str) -> Result<(), Refusal> {
    let mut tokens = Tokens { rest: sql };
    let first = loop {
        match tokens.next() {
            None => return Err(Refusal::Empty(sql.to_owned())),
            Some(";") => {}
            Some(token) => break token,
        }
    };
    let first = first.to_uppercase();
    if !READING.contains(&first.as_str()) {
        return Err(Refusal::Writes(first));
    }
    let after = tokens.skip_while(|token| *token != ";");
    if after.into_iter().any(|token| token != ";") {
        return Err(Refusal::Several);
    }
    Ok(())
}

/// Words, quoted texts and single characters of an SQL text, without white space and comments.
struct Tokens<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Tokens<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        loop {
            self.rest = self.rest.trim_start();
            if self.rest.starts_with("--") {
                self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
            } else if self.rest.starts_with("/*") {
                let end = self.rest[2..].find("*/");
                self.take(end.map_or(self.rest.len(), |at| at + 4));
            } else {
                break;
            }
        }
        let length = match self.rest.chars().next()? {
            quote @ ('\'' | '"' | '`') => self.quoted(quote),
            '[' => self.quoted(']'),
            first if is_word(first) => self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len()),
            first => first.len_utf8(),
        };
        Some(self.take(length))
    }
}

impl<'a> Tokens<'a> {
    fn take(&mut self, length: usize) -> &'a str {
        let (token, rest) = self.rest.split_at(length);
        self.rest = rest;
        token
    }

    /// Bytes up to and with the closing quote. A doubled quote makes two quoted texts in a row, which
    /// ends at the same place.
    fn quoted(&self, end: char) -> usize {
        self.rest[1..]
            .find(end)
            .map_or(self.rest.len(), |at| at + 2)
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_statement_that_reads_passes() {
        for sql in [
            "SELECT 1",
            " select 1 ; ",
            "-- a; b\nSELECT 1 -- c; d",
            "/* a; */ SELECT ';', \";\", `;`, [;] /* ; */;",
            "SELECT 'it''s; fine'; -- done; really",
            ";;SELECT 1;;",
            "WITH a AS (SELECT 1) SELECT * FROM a",
            "VALUES (1)",
            "EXPLAIN QUERY PLAN SELECT 1",
            "SELECT * FROM pragma_table_info('devices')",
            "SELECT '",
            "SELECT /* never closed; SELECT",
        ] {
            assert_eq!(check(sql), Ok(()), "{sql}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for sql in ["", "  ", ";", "-- SELECT 1", "/* SELECT 1 */"] {
            assert_eq!(check(sql), Err(Refusal::Empty(sql.to_owned())));
        }
        for sql in [
            "SELECT 1; SELECT 2",
            "SELECT ''; DELETE FROM devices",
            "SELECT 1;;/**/2",
            "SELECT 1 -- a\n; SELECT 2",
        ] {
            assert_eq!(check(sql), Err(Refusal::Several), "{sql}");
        }
        for (sql, word) in [
            ("delete from devices", "DELETE"),
            ("/* SELECT */ VACUUM INTO 'x'", "VACUUM"),
            ("ATTACH 'x' AS y", "ATTACH"),
            ("--\nINSERT INTO a VALUES (1)", "INSERT"),
            ("(SELECT 1)", "("),
            ("SELECTED", "SELECTED"),
            ("PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA"),
        ] {
            assert_eq!(check(sql), Err(Refusal::Writes(word.to_owned())), "{sql}");
        }
    }
}
