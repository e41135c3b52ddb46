//! Time in the gateway: the current time, the conversion of device clocks to UTC, and its quality
//! (SPEC R70 to R76).
//!
//! Times that a gateway stores, or compares with a device's times, come from [`SystemClock`] as
//! arguments; waits, deadlines and commands read the machine's clocks directly. [`Origin`] reveals
//! a step of the wall clock, [`watch()`] records it, and [`BootClock::corrected`] corrects offsets
//! that were measured before it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod boots;
mod watch;

pub use self::boots::{
    BootClock, BootClocks, Quality, ResolvedTime, Stamp, UNMEASURED, resolve_utc,
};
pub use self::watch::{ClockStep, doubt_at_start, warn_at_start, watch};

/// Smallest change of the wall clock that counts as a step. A smaller one is noise between the two
/// readings.
const STEP_MIN_US: i64 = 100_000;
/// Maximum difference between two wall clock readings around a reading of the other clock.
const READING_SPREAD_MAX_US: i64 = 1_000;
const READINGS_MAX: usize = 5;
/// A day in microseconds.
pub const DAY_US: i64 = 86_400_000_000;
/// Earliest and latest wall clock time in the gateway: the years 1 to 9999, as for devices (SPEC
/// R50). A clock beyond a limit is read as that limit.
pub const UTC_MIN_US: i64 = -62_135_596_800_000_000;
/// See [`UTC_MIN_US`].
pub const UTC_MAX_US: i64 = 253_402_300_799_999_999;

/// UTC at which the monotonic clock was 0. Changes only when the wall clock is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Identifies the monotonic clock; changes at each system boot. 0 if there is none.
    pub timeline: i64,
    /// Microseconds UTC.
    pub at_us: i64,
}

impl Origin {
    /// Origin of a clock whose steps cannot be detected.
    pub const NONE: Origin = Origin {
        timeline: 0,
        at_us: 0,
    };

    /// Returns how far the wall clock was set forward from `self` to `later`, in microseconds; 0 if
    /// they cannot be compared or the difference is noise.
    pub fn step_to(self, later: Origin) -> i64 {
        let step_us = later.at_us.saturating_sub(self.at_us);
        let is_comparable = self.timeline != 0 && self.timeline == later.timeline;
        match is_comparable && step_us.saturating_abs() >= STEP_MIN_US {
            true => step_us,
            false => 0,
        }
    }
}

impl Now {
    /// Returns whether the wall clock is beyond the limits, where it is treated as standing still.
    fn is_out_of_bounds(&self) -> bool {
        [UTC_MIN_US, UTC_MAX_US].contains(&self.utc_us)
    }
}

/// A reading of the gateway's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Microseconds on the monotonic clock; only differences are meaningful.
    pub mono_us: u64,
    /// Microseconds since 1970-01-01T00:00:00Z, between [`UTC_MIN_US`] and [`UTC_MAX_US`].
    pub utc_us: i64,
    /// Origin, which reveals whether the wall clock was set between two readings.
    pub origin: Origin,
}

#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    started: Instant,
    timeline: i64,
}

impl SystemClock {
    /// Starts a clock; its monotonic part is 0 now.
    pub fn start() -> SystemClock {
        SystemClock {
            started: Instant::now(),
            timeline: timeline(),
        }
    }

    pub fn now(&self) -> Now {
        let (utc_us, up_us) = self.read_pair();
        let (utc_us, origin) = within_bounds(utc_us, up_us, self.timeline);
        Now {
            mono_us: self.started.elapsed().as_micros() as u64,
            utc_us,
            origin,
        }
    }

    /// Reads the wall clock and the time since system boot at the same moment: retries if the
    /// thread was interrupted between the readings.
    fn read_pair(&self) -> (i64, i64) {
        let mut before_us = wall_us();
        for _ in 1..READINGS_MAX {
            let up_us = self.up_us();
            let after_us = wall_us();
            if (0..=READING_SPREAD_MAX_US).contains(&after_us.saturating_sub(before_us)) {
                return (after_us, up_us);
            }
            before_us = after_us;
        }
        let up_us = self.up_us();
        (wall_us(), up_us)
    }

    /// Returns the time since system boot, including suspended time, like the wall clock.
    #[cfg(target_os = "linux")]
    fn up_us(&self) -> i64 {
        let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        up.tv_sec * 1_000_000 + up.tv_nsec / 1000
    }

    #[cfg(not(target_os = "linux"))]
    fn up_us(&self) -> i64 {
        self.started.elapsed().as_micros() as i64
    }

    /// Returns the instant at which `mono_us` is reached.
    pub fn instant(&self, mono_us: u64) -> Instant {
        self.started + Duration::from_micros(mono_us)
    }
}

/// Returns the wall clock within its limits, and the matching origin: a step back into the limits
/// corrects offsets that were measured beyond them.
fn within_bounds(utc_us: i64, up_us: i64, timeline: i64) -> (i64, Origin) {
    let utc_us = utc_us.clamp(UTC_MIN_US, UTC_MAX_US);
    let at_us = utc_us.saturating_sub(up_us);
    (utc_us, Origin { timeline, at_us })
}

fn wall_us() -> i64 {
    let us = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => us(since),
        Err(before) => -us(before.duration()),
    }
}

/// Returns the wall clock for dates. A time outside the range of `jiff` becomes the nearest time in
/// the range.
pub fn utc_now() -> jiff::Timestamp {
    utc_of(wall_us())
}

fn utc_of(us: i64) -> jiff::Timestamp {
    jiff::Timestamp::from_microsecond(us).unwrap_or(match us < 0 {
        true => jiff::Timestamp::MIN,
        false => jiff::Timestamp::MAX,
    })
}

/// Returns a number that identifies this system boot, or this process if the system does not
/// provide one.
fn timeline() -> i64 {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = boot_id.chars().filter(char::is_ascii_hexdigit).collect();
    let of_boot = digits
        .get(..16)
        .map(|digits| u64::from_str_radix(digits, 16));
    let number = match of_boot {
        Some(Ok(number)) => number,
        _ => getrandom::u64().unwrap_or_default(),
    };
    // SQL integers are signed, and 0 means none.
    (number >> 1).max(1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(timeline: i64, at_us: i64) -> Origin {
        Origin { timeline, at_us }
    }

    #[test]
    fn only_a_step_on_one_timeline_counts() {
        let hours_us = 7_200_000_000;
        assert_eq!(origin(1, 0).step_to(origin(1, hours_us)), hours_us);
        assert_eq!(origin(1, hours_us).step_to(origin(1, 0)), -hours_us);
        assert_eq!(origin(1, 0).step_to(origin(1, STEP_MIN_US - 1)), 0);
        assert_eq!(origin(1, 0).step_to(origin(2, hours_us)), 0);
        assert_eq!(origin(0, 0).step_to(origin(0, hours_us)), 0);
        assert_eq!(origin(1, i64::MIN).step_to(origin(1, i64::MAX)), i64::MAX);
    }

    #[test]
    fn measurements_beyond_the_limits_are_corrected_within_them() {
        const NOON_US: i64 = 1_700_000_000_000_000;
        for beyond_us in [UTC_MIN_US - 9_000_000, UTC_MAX_US + 9_000_000, i64::MAX] {
            let (measured_us, measured_by) = within_bounds(beyond_us, 5_000_000, 7);
            let (now_us, set_to) = within_bounds(NOON_US, 8_000_000, 7);
            let step_us = measured_by.step_to(set_to);
            assert_eq!(measured_us + 3_000_000 + step_us, now_us, "{beyond_us}");
        }
    }

    #[test]
    fn any_time_has_a_date() {
        for us in [
            i64::MIN,
            UTC_MIN_US,
            -1,
            0,
            UTC_MAX_US,
            UTC_MAX_US + 1,
            i64::MAX,
        ] {
            let day = utc_of(us).to_zoned(jiff::tz::TimeZone::UTC).date();
            assert!((-9999..=9999).contains(&day.year()), "{us}");
        }
        assert_eq!(utc_of(-1).as_microsecond(), -1);
    }

    #[test]
    fn the_clocks_of_one_machine_share_a_timeline() {
        let (one, other) = (SystemClock::start().now(), SystemClock::start().now());
        assert_eq!(one.origin.timeline, other.origin.timeline);
        assert_eq!(one.origin.step_to(other.origin), 0);
    }
}
