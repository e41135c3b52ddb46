//! Rigs that drive sessions and stores in tests: never part of the product.

pub mod fuzz;
#[cfg(test)]
mod simulation;
