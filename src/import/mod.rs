//! Imports recordings into a gateway: each device's history becomes a stream, stored exactly once.
//!
//! A recording is sent like a device's queue. Its frames are numbered from 1, and the stream number
//! is a hash of their whole content. The gateway itself therefore knows the progress of an import:
//! an interrupted import resumes, and a second import of the same content has nothing left to send.
//!
//! Invariant: [`History`] is a pure function of the recording and the device's name. Increase
//! [`history::FORMAT`] whenever the division of rows into frames changes.

mod history;
mod send;

pub use self::history::History;
pub use self::send::{ImportError, Progress, Target, send};
