//! Tells a statement that reads from everything else, before the store sees it.
//!
//! A read-only connection alone is not enough: `VACUUM INTO` writes a file through one, `ATTACH`
//! opens other databases, `SET` makes a session of Postgres write after all, and several statements in
//! one text would give rows of different shapes.

use fieldgate::store::url::StoreUrl;

/// Whose SQL it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// The SQL of a store.
    pub fn of(store: &StoreUrl) -> Dialect {
        match store {
            StoreUrl::Sqlite(_) => Dialect::Sqlite,
            StoreUrl::Postgres(_) => Dialect::Postgres,
        }
    }

    /// How statements begin that can only read, on a connection that is read-only. PRAGMA is none of
    /// them: many change or do something. SQLite offers those that only read as functions,
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
    #[error("query only reads the store, it does not run {word}; it runs {}", .dialect.runs())]
    Writes {
        /// What it begins with.
        word: String,
        /// Says what could be run.
        dialect: Dialect,
    },
}

/// Checks that `sql` is one statement, and of those that read.
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

/// Words, quoted texts and single characters of an SQL text, without white space and comments.
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

    /// Bytes of a comment, up to the end of the text if nothing closes it. In Postgres comments hold
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

    /// Bytes up to and with the closing quote. A doubled quote makes two quoted texts in a row, which
    /// ends at the same place.
    fn quoted(&self, end: char) -> usize {
        self.rest[1..]
            .find(end)
            .map_or(self.rest.len(), |at| at + 2)
    }

    /// Bytes of `E'…'`, in which a backslash makes the next character a plain one. Nor does a doubled
    /// quote end it: backslashes after one still count.
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

    /// Bytes of `$tag$…$tag$`; `None` if that is not what begins here.
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
    fn one_statement_that_reads_passes() {
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
    fn postgres_has_ways_to_quote_of_its_own() {
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
    fn everything_else_is_refused() {
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
    fn only_sqlite_is_told_about_pragmas() {
        let refusal = |dialect| check("PRAGMA x", dialect).unwrap_err().to_string();
        assert!(refusal(Sqlite).contains("pragma_x"));
        assert!(refusal(Postgres).ends_with("TABLE, SHOW and EXPLAIN"));
    }
}
