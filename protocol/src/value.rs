//! Kinds of values, and the range of device times (R50).

use crate::error::Violation;

/// First microsecond of year 1 (R50).
pub const UTC_US_MIN: i64 = -62_135_596_800_000_000;
/// Last microsecond of year 9999 (R50).
pub const UTC_US_MAX: i64 = 253_402_300_799_999_999;
/// Longest time since boot: 2^53 microseconds, 285 years (R50).
pub const MONO_US_MAX: u64 = 1 << 53;

/// Kind of a channel's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Integer scaled by a power of ten.
    Integer = 0,
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary64.
    F64 = 2,
    /// False or true, stored as 0 or 1.
    Bool = 3,
}

impl Kind {
    /// Returns the kind for its byte in DECLARE, or `None` if unknown.
    pub const fn from_wire(kind: u8) -> Option<Kind> {
        match kind {
            0 => Some(Kind::Integer),
            1 => Some(Kind::F32),
            2 => Some(Kind::F64),
            3 => Some(Kind::Bool),
            _ => None,
        }
    }

    /// All kinds.
    pub const ALL: [Kind; 4] = [Kind::Integer, Kind::F32, Kind::F64, Kind::Bool];

    /// Returns the kind's name as used in SQL.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Integer => "integer",
            Kind::F32 => "f32",
            Kind::F64 => "f64",
            Kind::Bool => "bool",
        }
    }

    /// Returns the size of a value in [`RAW`](crate::column::encoding::RAW), in bytes.
    pub(crate) const fn width_bytes(self) -> usize {
        match self {
            Kind::Integer | Kind::F64 => 8,
            Kind::F32 => 4,
            Kind::Bool => 1,
        }
    }
}

/// Checks that a device may send this time (R50): UTC within the years 1 to 9999, time since boot
/// within 285 years.
pub fn check_time(clock: u8, time_us: i64) -> Result<(), Violation> {
    if clock != 0 {
        check_utc(time_us)
    } else if (0..=MONO_US_MAX as i64).contains(&time_us) {
        Ok(())
    } else {
        Err(Violation::TimeRange)
    }
}

/// Checks that a UTC time lies within the years 1 to 9999 (R50), so that sums with it cannot
/// overflow and every database can store it.
pub fn check_utc(utc_us: i64) -> Result<(), Violation> {
    if (UTC_US_MIN..=UTC_US_MAX).contains(&utc_us) {
        Ok(())
    } else {
        Err(Violation::TimeRange)
    }
}
