//! The address of a store, as it is given on the command line and in the configuration.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where readings are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// `sqlite://path`, relative to the working directory or absolute (`sqlite:///var/lib/…`).
    Sqlite(PathBuf),
}

/// Why a text is no address of a store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    /// There is no `…://` in it.
    #[error("`{0}` is not the address of a store: write sqlite://{0} for a file of that name")]
    NoScheme(String),
    /// A store that this program does not know.
    #[error(
        "`{0}://` is not supported: a store is sqlite://PATH, such as sqlite:///var/lib/fieldgate/fieldgate.db"
    )]
    UnknownScheme(String),
    /// A scheme and nothing after it.
    #[error("the store's address names no file: write sqlite://PATH")]
    NoPath,
    /// `:memory:` and the like.
    #[error("`{0}` is no file: a store has to outlive the process")]
    NotAFile(String),
}

impl StoreUrl {
    /// The database's file.
    pub fn path(&self) -> &Path {
        let Self::Sqlite(path) = self;
        path
    }
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let no_scheme = || StoreUrlError::NoScheme(text.to_owned());
        let (scheme, path) = text.split_once("://").ok_or_else(no_scheme)?;
        if scheme != "sqlite" {
            return Err(StoreUrlError::UnknownScheme(scheme.to_owned()));
        }
        match path {
            "" => Err(StoreUrlError::NoPath),
            memory if memory.starts_with(":memory:") => {
                Err(StoreUrlError::NotAFile(memory.to_owned()))
            }
            directory if directory.ends_with('/') => {
                Err(StoreUrlError::NotAFile(directory.to_owned()))
            }
            path => Ok(Self::Sqlite(PathBuf::from(path))),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_back_as_they_were_written() {
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
    fn what_is_no_address_says_what_to_write() {
        for (text, says) in [
            ("fieldgate.db", "write sqlite://fieldgate.db"),
            ("sqlite::memory:", "not the address of a store"),
            ("sqlite://:memory:", "outlive the process"),
            ("sqlite://", "names no file"),
            ("sqlite:///var/lib/", "is no file"),
            ("postgres://host/db", "`postgres://` is not supported"),
        ] {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
