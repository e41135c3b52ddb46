//! Tests that need the real binary, a file for each subject.

mod cli;
mod client;
mod cluster;
mod database;
mod fleet;
mod fuzzed;
mod gateway;
mod gateways;
mod handshake;
mod kill;
mod malformed;
mod outage;
mod own_postgres;
mod plans;
mod quarantine;
mod quarantine_full;
mod replay;
mod session;
mod simulator;
mod site;
mod spool_outage;
mod start;
mod store_down;
mod stored;
mod stored_in_postgres;
