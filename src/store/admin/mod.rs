//! Queries and changes by commands and by the pollers of a gateway, on separate connections while gateways write.
//!
//! Every function that takes a connection fails if the store is unavailable; its documentation names other errors.

#[cfg(test)]
#[macro_use]
mod both_stores;

pub mod completeness;
pub mod device;
pub mod feed;
pub mod fleet;
pub mod history;
pub mod mirror;
pub mod presence;
pub mod prune;
pub mod quarantine_usage;
pub mod removal;
pub mod replay;
pub mod retention;
pub mod rows_json;
pub mod statement;

mod connection;
mod error;
mod poll;
mod row;
mod value;

pub use self::connection::{Access, Connection, Source};
pub use self::error::{Cause, OpenError, QueryError};
pub use self::poll::{Pace, Poll, Reconnecting, poll_every, poll_every_or_when, poll_once};
pub use self::row::{Argument, Row};
pub use self::value::{Value, real};
