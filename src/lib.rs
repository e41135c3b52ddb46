//! Fieldgate: readings from a fleet of field devices into SQL, exactly once.
//!
//! Data flows through these folders: `server` (connections) -> `session` -> `ingest` (queue and
//! batcher) -> `store`; a `store::Receipt` returns. A folder imports only from folders below it in
//! this list, which a test checks.

#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod testing;

pub mod server;

pub mod import;

pub mod ingest;

pub mod session;

pub mod decode;

pub mod auth;

pub mod quota;

pub mod net;

pub mod store;

pub mod recording;

pub mod config;

pub mod time;

pub mod sys;
