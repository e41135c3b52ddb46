//! The tokens that HTTP requests need, from a secret file.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;

use crate::sys::secret_file::{SecretError, SecretReaders, open_secret};

/// Minimum length of a token in bytes. 16 random bytes are longer, in hex and in base64.
const TOKEN_BYTES_MIN: usize = 20;
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Tokens that permit read requests.
pub struct Tokens(Vec<String>);

/// Reason why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read, or other users can read it.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A line is not a token.
    #[error(
        "could not use token file {}, line {line}: write `read` and a token of at least {TOKEN_BYTES_MIN} letters, \
         digits or symbols, such as from `openssl rand -hex 16`",
        path.display()
    )]
    Line {
        /// Path of the file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
    },
    /// The file has no token.
    #[error("could not use token file {}: it has no token; write `read` and a token on a line", .0.display())]
    Empty(PathBuf),
}

impl Tokens {
    /// Reads a file with a line `read TOKEN` for each token. Ignores empty lines and lines that start with `#`.
    ///
    /// # Errors
    /// The file cannot be read, others can read it, or a line is not a token.
    pub fn load(path: &Path, readers: SecretReaders) -> Result<Tokens, TokenError> {
        let file = open_secret(path, readers)?;
        let mut text = String::new();
        let read = file.take(FILE_BYTES_MAX).read_to_string(&mut text);
        read.map_err(|source| SecretError::Read {
            path: path.to_owned(),
            source,
        })?;
        let lines = (1..).zip(text.lines().map(str::trim));
        let mut tokens = Vec::new();
        for (line, text) in lines.filter(|(_, text)| !text.is_empty() && !text.starts_with('#')) {
            let token = text
                .strip_prefix("read ")
                .map(str::trim)
                .filter(|token| is_token(token));
            match token {
                Some(token) => tokens.push(token.to_owned()),
                None => {
                    return Err(TokenError::Line {
                        path: path.to_owned(),
                        line,
                    });
                }
            }
        }
        match tokens.is_empty() {
            true => Err(TokenError::Empty(path.to_owned())),
            false => Ok(Tokens(tokens)),
        }
    }

    /// Returns the first token.
    pub fn first(&self) -> Option<&str> {
        self.0.first().map(String::as_str)
    }

    /// Returns whether `token` is one of these, in a time that does not depend on where they differ.
    pub fn contain(&self, token: &str) -> bool {
        let is_equal = |known: &String| known.as_bytes().ct_eq(token.as_bytes());
        self.0
            .iter()
            .map(is_equal)
            .fold(false, |found, is_equal| found | bool::from(is_equal))
    }
}

fn is_token(token: &str) -> bool {
    token.len() >= TOKEN_BYTES_MIN && token.bytes().all(|c| c.is_ascii_graphic())
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}
