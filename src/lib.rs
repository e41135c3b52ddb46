//! Fieldgate: readings from a fleet of field devices into SQL, exactly once.
//!
//! The way of the data, one room an arrow: `connection` (socket and codec) -> `session` ->
//! `ingest` (queue, `batcher`) -> `store`; a `store::Receipt` travels back.

pub mod allowance;
pub mod batcher;
pub mod clock;
pub mod codec;
pub mod config;
pub mod connection;
pub mod content;
pub mod credentials;
pub mod descriptors;
pub mod device_key;
pub mod dissect;
pub mod entrance;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod gateway_id;
pub mod import;
pub mod ingest;
pub mod keys;
pub mod log;
pub mod mailbox;
pub mod quarantine;
pub mod rate;
pub mod recording;
pub mod registry;
pub mod server;
pub mod session;
#[cfg(test)]
mod simulation;
pub mod socket;
pub mod store;
pub mod supervisor;
pub mod tls;
pub mod units;
