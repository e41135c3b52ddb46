//! Tests that need the real binary, a file for each subject.

mod cli;
mod client;
mod fuzzed;
mod gateway;
mod handshake;
mod kill;
mod malformed;
mod quarantine;
mod session;
mod simulator;
mod site;
mod start;
mod stored;
