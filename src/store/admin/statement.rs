//! Checks that a text is a single read-only statement, before it is sent to the store.
//!
//! A read-only connection is not enough: `VACUUM INTO` writes a file, `ATTACH` opens other databases, `SET` makes a
//! Postgres session writable, and several statements in one text would return rows of different shapes.

use crate::config::store_url::StoreUrl;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    pub fn of(store: &StoreUrl) -> Dialect {
        match store {
            StoreUrl::Sqlite(_) => Dialect::Sqlite,
            StoreUrl::Postgres(_) => Dialect::Postgres,
        }
    }

    /// Returns the first words of statements that can only read, on a read-only connection. PRAGMA is not one of
    /// them, because many pragmas have effects. SQLite offers the read-only ones as functions, such as
    /// `pragma_table_info(…)`.
    fn reading(self) -> &'static [&'static str] {
        match self {
            Dialect::Sqlite => &["SELECT", "WITH", "VALUES", "EXPLAIN"],
            Dialect::Postgres => &["SELECT", "WITH", "VALUES", "TABLE", "SHOW", "EXPLAIN", "("],
        }
    }

    fn runs(self) -> &'static str {
        match self {
            Dialect::Sqlite => {
                "SELECT, WITH, VALUES and EXPLAIN (for PRAGMA x, write SELECT * FROM pragma_x)"
            }
            Dialect::Postgres => "SELECT, WITH, VALUES, TABLE, SHOW and EXPLAIN",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The text is empty or contains only comments.
    #[error("no SQL statement in {0:?}")]
    Empty(String),
    #[error("query runs one statement at a time; remove the text after the first `;`")]
    Several,
    /// A parameter has no number.
    #[error(
        "a parameter has no number; write parameters as $1, $2, … in the order of their values"
    )]
    Parameter,
    /// The statement may not be read-only.
    #[error("query is read-only and does not run {word}; it accepts {}", .dialect.runs())]
    Writes {
        word: String,
        /// Dialect, for the list of accepted statements.
        dialect: Dialect,
    },
}

/// Maximum number of parameters of a statement.
const PARAMETERS_MAX: usize = 1000;

/// Returns the highest number of the parameters `$1`, `$2`, … in `sql`; 0 if there are none.
pub fn parameters(sql: &str, dialect: Dialect) -> Result<usize, Refusal> {
    let mut tokens = Tokens { rest: sql, dialect };
    let mut highest = 0;
    while let Some(token) = tokens.next() {
        match (token, dialect) {
            ("?" | ":" | "@", Dialect::Sqlite) => return Err(Refusal::Parameter),
            ("$", _) => {
                let number = tokens.next().and_then(|number| number.parse().ok());
                let number = number.filter(|number| (1..=PARAMETERS_MAX).contains(number));
                highest = number.ok_or(Refusal::Parameter)?.max(highest);
            }
            _ => {}
        }
    }
    Ok(highest)
}

/// Checks that `sql` is a single read-only statement.
pub fn check(sql: &str, dialect: Dialect) -> Result<(), Refusal> {
    let mut tokens = Tokens { rest: sql, dialect };
    let first = loop {
        match tokens.next() {
            None => return Err(Refusal::Empty(sql.to_owned())),
            Some(";") => {}
            Some(token) => break token,
        }
    };
    let word = first.to_uppercase();
    if !dialect.reading().contains(&word.as_str()) {
        return Err(Refusal::Writes { word, dialect });
    }
    let after = tokens.skip_while(|token| *token != ";");
    if after.into_iter().any(|token| token != ";") {
        return Err(Refusal::Several);
    }
    Ok(())
}

/// Iterator over the words, quoted texts and single characters of a SQL text, without white space and comments.
struct Tokens<'a> {
    rest: &'a str,
    dialect: Dialect,
}

impl<'a> Iterator for Tokens<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        loop {
            self.rest = self.rest.trim_start();
            if self.rest.starts_with("--") {
                self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
            } else if self.rest.starts_with("/*") {
                self.take(self.comment());
            } else {
                break;
            }
        }
        let length = match (self.rest.chars().next()?, self.dialect) {
            (quote @ ('\'' | '"'), _) | (quote @ '`', Dialect::Sqlite) => self.quoted(quote),
            ('[', Dialect::Sqlite) => self.quoted(']'),
            ('$', Dialect::Postgres) => self.dollar_quoted().unwrap_or(1),
            ('e' | 'E', Dialect::Postgres) if self.rest[1..].starts_with('\'') => {
                self.quoted_with_escapes()
            }
            (first, _) if is_word(first) => self.word(),
            (first, _) => first.len_utf8(),
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

    /// Returns the length of a comment in bytes. An unclosed comment extends to the end of the text. Postgres nests
    /// comments.
    fn comment(&self) -> usize {
        let mut depth = 1;
        let mut at = 2;
        while let Some(found) = self.rest[at..].find(['/', '*']) {
            at += found;
            if self.rest[at..].starts_with("*/") {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            } else if self.rest[at..].starts_with("/*") && self.dialect == Dialect::Postgres {
                depth += 1;
                at += 2;
            } else {
                at += 1;
            }
        }
        self.rest.len()
    }

    fn word(&self) -> usize {
        let has_dollar = self.dialect == Dialect::Postgres;
        let end = self.rest.find(|c| !(is_word(c) || c == '$' && has_dollar));
        end.unwrap_or(self.rest.len())
    }

    /// Returns the length of a quoted text in bytes, including the quotes. A text with a doubled quote counts as two
    /// adjacent quoted texts, which end at the same position.
    fn quoted(&self, end: char) -> usize {
        self.rest[1..]
            .find(end)
            .map_or(self.rest.len(), |at| at + 2)
    }

    /// Returns the length of `E'…'` in bytes. A backslash escapes the next character. A doubled quote does not end
    /// the text: backslashes after it still escape.
    fn quoted_with_escapes(&self) -> usize {
        let mut chars = self.rest.char_indices().skip(2).peekable();
        while let Some((at, c)) = chars.next() {
            let is_doubled = c == '\'' && chars.peek().is_some_and(|(_, next)| *next == '\'');
            if c == '\\' || is_doubled {
                chars.next();
            } else if c == '\'' {
                return at + 1;
            }
        }
        self.rest.len()
    }

    /// Returns the length of `$tag$…$tag$` in bytes; `None` if the text does not start with a dollar quote.
    fn dollar_quoted(&self) -> Option<usize> {
        let tag = &self.rest[1..];
        let tag = &tag[..tag.find('$')?];
        if tag.starts_with(|c: char| c.is_ascii_digit()) || !tag.chars().all(is_word) {
            return None;
        }
        let quote = &self.rest[..tag.len() + 2];
        let text = &self.rest[quote.len()..];
        let end = text.find(quote).map(|at| at + 2 * quote.len());
        Some(end.unwrap_or(self.rest.len()))
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::Dialect::{Postgres, Sqlite};
    use super::*;

    #[test]
    fn single_read_only_statements_pass() {
        for sql in [
            "SELECT 1",
            " select 1 ; ",
            "-- a; b\nSELECT 1 -- c; d",
            "/* a; */ SELECT ';', \";\" /* ; */;",
            "SELECT 'it''s; fine'; -- done; really",
            ";;SELECT 1;;",
            "WITH a AS (SELECT 1) SELECT * FROM a",
            "VALUES (1)",
            "EXPLAIN SELECT 1",
            "SELECT '",
            "SELECT /* never closed; SELECT",
            "SELECT /**/ 1 /***/;",
        ] {
            assert_eq!(check(sql, Sqlite), Ok(()), "{sql}");
            assert_eq!(check(sql, Postgres), Ok(()), "{sql}");
        }
        for sql in [
            "SELECT `;`, [;]",
            "SELECT * FROM pragma_table_info('devices')",
            r"SELECT 'a\' /* ; */",
        ] {
            assert_eq!(check(sql, Sqlite), Ok(()), "{sql}");
        }
    }

    #[test]
    fn postgres_quoting_is_understood() {
        for sql in [
            "TABLE devices;",
            "SHOW server_version",
            "(SELECT 1) UNION (SELECT 2)",
            "SELECT $$ ; $$, $tag$ ; $$ ; $tag$;",
            "SELECT $1, $2 ; ",
            "SELECT $ä1$;$ä1$",
            "SELECT $$never closed;",
            "SELECT /* a /* b; */ c; */ 1",
            r"SELECT E'it\'s; ', e'\\' ;",
            r"SELECT E'''; \'; '",
            r"SELECT 'a\' ;",
            "SELECT a[1], '];[' FROM b",
            r"SELECT nameE'\';",
            "SELECT a$b FROM c$d;",
        ] {
            assert_eq!(check(sql, Postgres), Ok(()), "{sql}");
        }
        for sql in [
            r"SELECT 'a\'; DELETE FROM devices --'",
            r"SELECT E'\\'; DELETE FROM devices --'",
            "SELECT $$a$$; SELECT $$",
            "SELECT a$b$; SELECT $b$",
            "SELECT [;]",
            "SELECT /* /* */ */; SELECT",
        ] {
            assert_eq!(check(sql, Postgres), Err(Refusal::Several), "{sql}");
        }
        let not_nested = "SELECT /* /* */; SELECT";
        assert_eq!(check(not_nested, Sqlite), Err(Refusal::Several));
    }

    #[test]
    fn all_other_texts_are_rejected() {
        for dialect in [Sqlite, Postgres] {
            for sql in ["", "  ", ";", "-- SELECT 1", "/* SELECT 1 */"] {
                assert_eq!(check(sql, dialect), Err(Refusal::Empty(sql.to_owned())));
            }
            for sql in [
                "SELECT 1; SELECT 2",
                "SELECT ''; DELETE FROM devices",
                "SELECT 1;;/**/2",
                "SELECT 1 -- a\n; SELECT 2",
            ] {
                assert_eq!(check(sql, dialect), Err(Refusal::Several), "{sql}");
            }
            for (sql, word) in [
                ("delete from devices", "DELETE"),
                ("/* SELECT */ VACUUM INTO 'x'", "VACUUM"),
                ("ATTACH 'x' AS y", "ATTACH"),
                ("--\nINSERT INTO a VALUES (1)", "INSERT"),
                ("SELECTED", "SELECTED"),
                ("PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA"),
                ("SET default_transaction_read_only = off", "SET"),
                ("COPY devices TO PROGRAM 'x'", "COPY"),
            ] {
                let word = word.to_owned();
                let writes = Err(Refusal::Writes { word, dialect });
                assert_eq!(check(sql, dialect), writes, "{sql}");
            }
        }
        assert!(check("(SELECT 1)", Sqlite).is_err());
    }

    #[test]
    fn parameters_are_counted() {
        for (sql, count) in [
            ("SELECT 1", 0),
            ("SELECT $1, $3 -- $4", 3),
            ("SELECT '$2', $1", 1),
        ] {
            for dialect in [Sqlite, Postgres] {
                assert_eq!(parameters(sql, dialect), Ok(count), "{sql}");
            }
        }
        assert_eq!(
            parameters("SELECT $$ $2 $$, $1, a$5, 1::int", Postgres),
            Ok(1)
        );
        assert_eq!(parameters("SELECT '{}'::jsonb ? 'a'", Postgres), Ok(0));
        for sql in ["SELECT $0", "SELECT $a", "SELECT $1001", "SELECT $"] {
            for dialect in [Sqlite, Postgres] {
                assert_eq!(parameters(sql, dialect), Err(Refusal::Parameter), "{sql}");
            }
        }
        for sql in ["SELECT ?", "SELECT :a", "SELECT @a"] {
            assert_eq!(parameters(sql, Sqlite), Err(Refusal::Parameter), "{sql}");
        }
    }

    #[test]
    fn only_the_sqlite_error_mentions_pragmas() {
        let refusal = |dialect| check("PRAGMA x", dialect).unwrap_err().to_string();
        assert!(refusal(Sqlite).contains("pragma_x"));
        assert!(refusal(Postgres).ends_with("TABLE, SHOW and EXPLAIN"));
    }
}
