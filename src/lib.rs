//! Fieldgate: readings from a fleet of field devices into SQL, exactly once.
//!
//! The way of the data, one room an arrow: `connection` (socket and codec) -> `session` ->
//! `ingest` (queue, `batcher`) -> `store`; a `store::Receipt` travels back.

pub mod batcher;
pub mod clock;
pub mod codec;
pub mod config;
pub mod connection;
pub mod content;
pub mod dissect;
pub mod ingest;
pub mod keys;
pub mod mailbox;
pub mod quarantine;
pub mod registry;
pub mod server;
pub mod session;
#[cfg(test)]
mod simulation;
pub mod store;
