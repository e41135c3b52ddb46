//! Keys: the fleet's, each device's, and which of them a device has to prove.

pub mod claim;
pub mod credentials;
pub mod device_key;
pub mod fleet_key;
