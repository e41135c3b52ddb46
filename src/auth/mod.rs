//! Keys: the fleet key, device keys, and the key that each device must prove.

pub mod claim;
pub mod credentials;
pub mod device_key;
pub mod fleet_key;
