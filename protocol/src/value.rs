//! Kinds of values, clocks and units of time, and the range of device times (R50).

use serde::{Serialize, Serializer};

use crate::error::Violation;

/// First microsecond of year 1 (R50).
pub const UTC_US_MIN: i64 = -62_135_596_800_000_000;
/// Last microsecond of year 9999 (R50).
pub const UTC_US_MAX: i64 = 253_402_300_799_999_999;
/// Longest time since boot: 2^53 microseconds, 285 years (R50).
pub const MONO_US_MAX: u64 = 1 << 53;

/// Declares an enum that is one byte in a message; `$refusal` is the violation of an unknown byte.
macro_rules! wire_enum {
    ($(#[$about:meta])* $name:ident, $refusal:expr,
     $($(#[$doc:meta])* $value:ident = $byte:literal),+ $(,)?) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$doc])* $value = $byte),+
        }

        impl $name {
            /// All values, in the order of their bytes.
            pub const ALL: [$name; [$($byte),+].len()] = [$($name::$value),+];

            /// Returns the value for its byte in a message.
            pub fn from_wire(byte: u8) -> Result<$name, Violation> {
                match byte {
                    $($byte => Ok($name::$value),)+
                    _ => Err($refusal(byte)),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_u8(*self as u8)
            }
        }
    };
}

wire_enum! {
    /// Clock that times refer to.
    Clock, |_| Violation::Range("clock"),
    /// Time since the boot that the message names.
    Boot = 0,
    /// UTC since 1970.
    Utc = 1,
}

wire_enum! {
    /// Unit of the times of a DATA.
    TimeUnit, |_| Violation::Range("time_unit"),
    /// Microseconds.
    Microseconds = 0,
    /// Milliseconds.
    Milliseconds = 1,
    /// Seconds.
    Seconds = 2,
}

wire_enum! {
    /// Kind of a channel's values.
    Kind, Violation::Kind,
    /// Integer scaled by a power of ten.
    Integer = 0,
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary64.
    F64 = 2,
    /// False or true, stored as 0 or 1.
    Bool = 3,
}

impl TimeUnit {
    /// Returns the length of the unit, in microseconds.
    pub const fn us(self) -> i64 {
        match self {
            TimeUnit::Microseconds => 1,
            TimeUnit::Milliseconds => 1_000,
            TimeUnit::Seconds => 1_000_000,
        }
    }
}

impl Kind {
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
pub fn check_time(clock: Clock, time_us: i64) -> Result<(), Violation> {
    match clock {
        Clock::Utc => check_utc(time_us),
        Clock::Boot if (0..=MONO_US_MAX as i64).contains(&time_us) => Ok(()),
        Clock::Boot => Err(Violation::TimeRange),
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
