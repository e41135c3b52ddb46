//! Tests that need the real binary, a file for each subject.

mod cli;
mod client;
mod fuzzed;
mod gateway;
mod handshake;
mod malformed;
mod quarantine;
mod session;
mod start;
mod stored;
