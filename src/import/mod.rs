//! Recordings into a gateway: history becomes streams of devices, each exactly once.
//!
//! A recording is sent as a device sends its queue. Its frames are numbered from 1, and the stream's
//! number is a hash of all that they hold. So the gateway itself knows how far an import has come: an
//! interrupted one goes on there, and a second one of the same content has nothing left to send.
//!
//! Invariant: [`History`] is a pure function of the recording and the device's name. A change of how
//! rows are cut into frames has to raise [`FORMAT`].

mod history;
mod send;

pub use self::history::{FORMAT, History, HistoryError};
pub use self::send::{ImportError, Progress, Target, send};
