//! The URL of a store, from the command line or the configuration.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use sqlx::postgres::{PgConnectOptions, PgSslMode};

/// Location of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// `sqlite://path`, relative to the working directory or absolute (`sqlite:///var/lib/…`).
    Sqlite(PathBuf),
    /// `postgres://user@host:port/database`.
    Postgres(PostgresUrl),
}

/// URL of a Postgres database. Missing parts come from `PGHOST`, `PGUSER`, `PGPASSWORD` and similar variables,
/// and from `~/.pgpass`, as in every Postgres client.
///
/// `Display` and `Debug` omit the password.
#[derive(Clone, PartialEq, Eq)]
pub struct PostgresUrl(String);

/// Parameters that a Postgres URL may have after `?`. A misspelt parameter is rejected, because `sslmode` is
/// one of them.
const POSTGRES_PARAMETERS: [&str; 14] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "host",
    "port",
    "user",
    "dbname",
    "options",
];

/// Reason why a text is not a valid store URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    /// The text has no `…://`; shown without its password.
    #[error("`{0}` is not a store URL; write sqlite://{0} for a file")]
    NoScheme(String),
    /// Unsupported scheme.
    #[error(
        "`{0}://` is not supported; use sqlite://PATH, such as \
         sqlite:///var/lib/fieldgate/fieldgate.db, or postgres://USER@HOST/DATABASE"
    )]
    UnknownScheme(String),
    /// No path after the scheme.
    #[error("store URL has no file; use sqlite://PATH")]
    NoPath,
    /// In-memory database such as `:memory:`.
    #[error("`{0}` is not a file; an in-memory store is not supported")]
    NotAFile(String),
    /// Invalid Postgres URL, or a parameter with an invalid value. The URL may contain a password, so the
    /// message has only the reason.
    #[error(
        "invalid Postgres URL: {0}; use postgres://USER@HOST:PORT/DATABASE, with special \
         characters percent-encoded"
    )]
    Postgres(String),
    /// Unknown parameter of a Postgres URL.
    #[error(
        "unknown parameter `{0}` in Postgres URL; supported are {list}",
        list = POSTGRES_PARAMETERS.join(", ")
    )]
    PostgresParameter(String),
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let no_scheme = || StoreUrlError::NoScheme(without_password(text));
        let (scheme, rest) = text.split_once("://").ok_or_else(no_scheme)?;
        match scheme {
            "sqlite" => sqlite_path(rest).map(Self::Sqlite),
            "postgres" | "postgresql" => PostgresUrl::new(text).map(Self::Postgres),
            other => Err(StoreUrlError::UnknownScheme(without_password(other))),
        }
    }
}

/// Returns a URL, valid or not, without the parts that may be a password.
pub fn without_password(text: &str) -> String {
    let (address, query) = match text.split_once('?') {
        Some((address, query)) => (address, Some(query)),
        None => (text, None),
    };
    let (scheme, rest) = match address.find("://") {
        Some(at) => address.split_at(at + 3),
        None => ("", address),
    };
    // The `?` may start the query or be part of a password; the text does not show which.
    if query.is_some_and(|query| query.contains('@')) {
        return format!("{scheme}…");
    }
    let (user, host) = match rest.rsplit_once('@') {
        Some((user, host)) if !scheme.is_empty() || user.contains(':') => ("…@", host),
        _ => ("", rest),
    };
    // Other programs write `host=db password=…`, or put parameters after a `;`.
    if let Some((before, _)) = host.split_once('=') {
        return format!("{scheme}{user}{before}=…");
    }
    let query = query.map(|query| format!("?{}", without_unknown(query)));
    format!("{scheme}{user}{host}{}", query.unwrap_or_default())
}

/// Returns the query parameters up to the first unknown one, which may be a password.
fn without_unknown(query: &str) -> String {
    let mut shown = Vec::new();
    for parameter in query.split('&') {
        match parameter.split_once('=') {
            Some((name, _)) if !is_known(name) => {
                shown.push(format!("{name}=…"));
                break;
            }
            _ => shown.push(parameter.to_owned()),
        }
    }
    shown.join("&")
}

fn is_known(parameter: &str) -> bool {
    POSTGRES_PARAMETERS.contains(&parameter) || parameter.starts_with("options[")
}

fn sqlite_path(path: &str) -> Result<PathBuf, StoreUrlError> {
    if path.is_empty() {
        Err(StoreUrlError::NoPath)
    } else if path.starts_with(":memory:") || path.ends_with('/') {
        Err(StoreUrlError::NotAFile(path.to_owned()))
    } else {
        Ok(PathBuf::from(path))
    }
}

impl PostgresUrl {
    fn new(text: &str) -> Result<Self, StoreUrlError> {
        let address = text.split_once("://").map_or(text, |(_, address)| address);
        let path_at = address.find(['/', '?', '#']).unwrap_or(address.len());
        let (path, query) =
            { address[path_at..].split_once('?') }.unwrap_or((&address[path_at..], ""));
        // An unencoded password may end the host early, and its rest would be shown as a database name.
        let misplaced = || {
            let what = "`@` or `=` after the host, outside a parameter value";
            StoreUrlError::Postgres(what.to_owned())
        };
        if path.contains(['@', '=']) {
            return Err(misplaced());
        }
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let name = parameter.split('=').next().unwrap_or_default();
            if !is_known(name) && query.contains('@') {
                return Err(misplaced());
            }
            if !is_known(name) {
                return Err(StoreUrlError::PostgresParameter(name.to_owned()));
            }
        }
        match text.parse::<PgConnectOptions>() {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(sqlx::Error::Configuration(error)) => {
                Err(StoreUrlError::Postgres(error.to_string()))
            }
            Err(error) => Err(StoreUrlError::Postgres(error.to_string())),
        }
    }

    /// Returns the connection options.
    pub fn options(&self) -> PgConnectOptions {
        let options: PgConnectOptions = self.0.parse().expect("checked when it was parsed");
        options.application_name("fieldgate")
    }

    /// Returns the whole URL with its password: for another process's environment, never for display.
    pub fn with_password(&self) -> &str {
        &self.0
    }

    /// Returns the URL of another database on the same server.
    pub fn with_database(&self, database: &str) -> PostgresUrl {
        let (address, query) = match self.0.split_once('?') {
            Some((address, query)) => (address, format!("?{query}")),
            None => (self.0.as_str(), String::new()),
        };
        let host_at = address.find("://").map_or(0, |at| at + 3);
        let server_ends = address[host_at..].find('/').map(|at| host_at + at);
        let server = &address[..server_ends.unwrap_or(address.len())];
        PostgresUrl(format!("{server}/{database}{query}"))
    }
}

impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = self.options();
        let user = options.get_username();
        write!(f, "postgres://{user}@")?;
        match options.get_socket() {
            Some(socket) => write!(f, "{}", socket.display())?,
            None => write!(f, "{}:{}", options.get_host(), options.get_port())?,
        }
        write!(f, "/{}", options.get_database().unwrap_or(user))?;
        match options.get_ssl_mode() {
            PgSslMode::Prefer => Ok(()),
            mode => write!(f, " ({mode:?})"),
        }
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite://{}", path.display()),
            Self::Postgres(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_round_trip() {
        for (text, path) in [
            ("sqlite://fieldgate.db", "fieldgate.db"),
            ("sqlite://./data/a b.db", "./data/a b.db"),
            (
                "sqlite:///var/lib/fieldgate/x.db",
                "/var/lib/fieldgate/x.db",
            ),
            ("sqlite://what?mode=ro", "what?mode=ro"),
        ] {
            let url: StoreUrl = text.parse().unwrap();
            assert_eq!(url, StoreUrl::Sqlite(PathBuf::from(path)));
            assert_eq!(url.to_string(), text);
        }
    }

    #[test]
    fn invalid_urls_say_what_to_write() {
        for (text, says) in [
            ("fieldgate.db", "write sqlite://fieldgate.db"),
            ("sqlite::memory:", "not a store URL"),
            ("sqlite://:memory:", "an in-memory store"),
            ("sqlite://", "has no file"),
            ("sqlite:///var/lib/", "is not a file"),
            ("mysql://host/db", "`mysql://` is not supported"),
            ("ann:s3cret@host/db", "`…@host/db` is not a store URL"),
            ("ann:s3cret@host://db", "`…@host://` is not supported"),
            ("host=db password=s3cret", "`host=…` is not a store URL"),
            ("postgres://ann:5/s3cret@host/db", "after the host"),
            ("postgres://ann:5#s3cret@host/db", "after the host"),
            ("postgres://ann:5?s3cret@host/db", "after the host"),
            ("postgres://host/db;password=s3cret", "after the host"),
            ("postgres://u:s3cret@host:x/db", "invalid Postgres URL"),
            (
                "postgres://host/db?sslmod=require",
                "unknown parameter `sslmod`",
            ),
            ("postgres://host/db?sslmode=of", "invalid Postgres URL"),
        ] {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let text = "postgresql://ann:s3cret@db.example:5433/site?sslmode=require";
        let StoreUrl::Postgres(url) = text.parse().unwrap() else {
            panic!("not Postgres");
        };
        let shown = "postgres://ann@db.example:5433/site (Require)";
        assert_eq!(url.to_string(), shown);
        assert_eq!(format!("{url:?}"), shown);
        assert_eq!(url.with_password(), text);
    }

    #[test]
    fn invalid_urls_are_shown_without_passwords() {
        for (text, shown) in [
            ("postgres://ann:s3cret@host:x/db", "postgres://…@host:x/db"),
            ("postgres://ann:s3@cret@host", "postgres://…@host"),
            ("postgres://ann:s3/cret@host/db", "postgres://…@host/db"),
            ("postgres://ann:s3?cret@host/db", "postgres://…"),
            (
                "postgres://ann@host/db?sslmode=of&host=/run",
                "postgres://…@host/db?sslmode=of&host=/run",
            ),
            (
                "postgres://host/db?sslmode=of&password=s3&cret=x",
                "postgres://host/db?sslmode=of&password=…",
            ),
            (
                "postgres://host/db?pass%77ord=s3cret",
                "postgres://host/db?pass%77ord=…",
            ),
            (
                "postgres://host/db?sslpassword=s3cret",
                "postgres://host/db?sslpassword=…",
            ),
            ("postgres://host/db?password=s3@cret", "postgres://…"),
            (
                "postgres://host/db;password=s3cret",
                "postgres://host/db;password=…",
            ),
            ("host=db password=s3cret", "host=…"),
            ("ann:s3cret@host/db", "…@host/db"),
            ("pump@site", "pump@site"),
            ("sqlite://a.db", "sqlite://a.db"),
            ("what?", "what?"),
        ] {
            assert_eq!(without_password(text), shown);
        }
    }

    #[test]
    fn another_database_of_the_same_server() {
        for (text, other) in [
            (
                "postgres://a:b@h:1/d?sslmode=disable",
                "postgres://a:b@h:1/x?sslmode=disable",
            ),
            ("postgres://h", "postgres://h/x"),
            ("postgres:///d?host=/tmp", "postgres:///x?host=/tmp"),
        ] {
            assert_eq!(PostgresUrl(text.to_owned()).with_database("x").0, other);
        }
    }
}
