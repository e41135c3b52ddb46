//! The fleet simulator.
fn main() {}
