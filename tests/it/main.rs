//! Tests that need the real binary, a file for each subject.

mod cli;
mod site;
