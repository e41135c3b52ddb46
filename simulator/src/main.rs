//! The fleet simulator's command line.
fn main() {}
