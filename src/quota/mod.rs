//! Limits per device: frames and readings per second, and space in quarantine.

pub mod device;
pub mod quarantine;
pub mod rate;
