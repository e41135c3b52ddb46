//! Test harnesses that drive sessions and stores; never part of the product.

pub mod fuzz;
#[cfg(test)]
mod simulation;
