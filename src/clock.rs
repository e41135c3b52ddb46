//! Time as the gateway knows it: what "now" is, how a device's clock maps to UTC, and how far that
//! can be trusted. No clock is read here; "now" comes in from outside.

use serde::{Deserialize, Serialize};

/// One reading of the gateway's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Microseconds on a clock that never steps; only differences mean anything.
    pub mono_us: u64,
    /// Microseconds since 1970-01-01T00:00:00Z.
    pub utc_us: i64,
}

/// How a frame's device time became UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Quality {
    /// The device stamped UTC itself, and the stamp is plausible.
    Utc = 0,
    /// Time since boot, mapped by a measured offset of that boot.
    Anchored = 1,
    /// Time since a boot whose offset was never measured: the newest row is taken to be as old as
    /// its receipt.
    Unanchored = 2,
    /// The device's UTC is implausible; stored as sent.
    Suspect = 3,
}

/// A boot's clock against UTC: `utc = device time since boot + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootClock {
    /// The device's boot number.
    pub boot: u32,
    /// Microseconds to add to time since boot.
    pub offset_us: i64,
    /// Round-trip time of the exchange that measured it: the offset is off by at most half of this.
    pub delay_us: u64,
    /// When it was measured, microseconds UTC.
    pub measured_at_us: i64,
}
