//! Tests that need the real binary, a file for each subject.

mod cli;
mod client;
mod gateway;
mod malformed;
