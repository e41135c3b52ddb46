//! What a device may use: frames and readings a second, and room in quarantine.

pub mod device;
pub mod quarantine;
pub mod rate;
