//! Time as the gateway knows it: what "now" is, how a device's clock maps to UTC, and how far that can
//! be trusted (SPEC R70 to R76).
//!
//! [`SystemClock`] is the one place where the machine's clocks are read; everything else is told the
//! time.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::store::ResolvedTime;

/// One reading of the gateway's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Microseconds on a clock that never steps; only differences mean anything.
    pub mono_us: u64,
    /// Microseconds since 1970-01-01T00:00:00Z.
    pub utc_us: i64,
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    started: Instant,
}

impl SystemClock {
    /// Its monotonic side begins at 0 now.
    pub fn start() -> SystemClock {
        SystemClock {
            started: Instant::now(),
        }
    }

    /// What the clocks show.
    pub fn now(&self) -> Now {
        let utc_us = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_micros() as i64,
            Err(before) => -(before.duration().as_micros() as i64),
        };
        Now {
            mono_us: self.started.elapsed().as_micros() as u64,
            utc_us,
        }
    }

    /// The instant at which `mono_us` is reached.
    pub fn instant(&self, mono_us: u64) -> Instant {
        self.started + std::time::Duration::from_micros(mono_us)
    }
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

/// How much worse a measurement is taken to become with age: 50 microseconds each second, more than
/// an ordinary crystal drifts.
const DRIFT_DIVISOR: u64 = 20_000;

/// A stamp before this is from a clock that was never set: 2020-01-01T00:00:00Z.
const UTC_PLAUSIBLE_FROM_US: i64 = 1_577_836_800_000_000;
/// A stamp further ahead of its receipt than a day is from a clock that is wrong.
const UTC_PLAUSIBLE_AHEAD_US: i64 = 86_400_000_000;

impl BootClock {
    /// A round trip that began and ended at the gateway: it sent at `sent_us` and received at
    /// `received_us` (both its UTC); the device received at `device_received_us` and sent at
    /// `device_sent_us` (both its time since boot). `None` if such a trip is impossible.
    pub fn measure(
        boot: u32,
        sent_us: i64,
        device_received_us: u64,
        device_sent_us: u64,
        received_us: i64,
    ) -> Option<BootClock> {
        let held_us = i64::try_from(device_sent_us.checked_sub(device_received_us)?).ok()?;
        let delay_us = received_us.checked_sub(sent_us)?.checked_sub(held_us)?;
        let delay_us = u64::try_from(delay_us).ok()?;
        let half_us = (delay_us / 2) as i64;
        let offset_us = received_us - half_us - i64::try_from(device_sent_us).ok()?;
        Some(BootClock {
            boot,
            offset_us,
            delay_us,
            measured_at_us: received_us,
        })
    }

    /// Whether `newer` is the better measurement of the same boot.
    fn is_beaten_by(&self, newer: &BootClock) -> bool {
        let age_us = newer
            .measured_at_us
            .saturating_sub(self.measured_at_us)
            .max(0) as u64;
        newer.delay_us <= self.delay_us.saturating_add(age_us / DRIFT_DIVISOR)
    }
}

/// The clocks of a device's latest boots.
#[derive(Clone, Debug, Default)]
pub struct BootClocks(Vec<BootClock>);

impl BootClocks {
    /// The clocks that a store remembers.
    pub fn new(clocks: Vec<BootClock>) -> BootClocks {
        BootClocks(clocks)
    }

    /// Takes in a measurement; tells whether it is the best of its boot and worth keeping.
    pub fn improve(&mut self, measured: BootClock) -> bool {
        match self.0.iter_mut().find(|clock| clock.boot == measured.boot) {
            Some(clock) if clock.is_beaten_by(&measured) => {
                *clock = measured;
                true
            }
            Some(_) => false,
            None => {
                self.0.push(measured);
                true
            }
        }
    }

    /// How times since `boot` become UTC, for a frame whose newest row is at `newest_us`.
    pub fn resolve_boot(&self, boot: u32, newest_us: i64, received_at_us: i64) -> ResolvedTime {
        match self.0.iter().find(|clock| clock.boot == boot) {
            Some(clock) => ResolvedTime {
                offset_us: clock.offset_us,
                quality: Quality::Anchored,
            },
            None => ResolvedTime {
                offset_us: received_at_us - newest_us,
                quality: Quality::Unanchored,
            },
        }
    }
}

/// How far a device's own UTC is trusted, for a frame with rows from `oldest_us` to `newest_us`.
pub fn resolve_utc(oldest_us: i64, newest_us: i64, received_at_us: i64) -> ResolvedTime {
    let is_plausible = oldest_us >= UTC_PLAUSIBLE_FROM_US
        && newest_us <= received_at_us.saturating_add(UTC_PLAUSIBLE_AHEAD_US);
    let quality = if is_plausible {
        Quality::Utc
    } else {
        Quality::Suspect
    };
    ResolvedTime {
        offset_us: 0,
        quality,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_gives_offset_and_delay() {
        // True offset 1,000,000; 300 us each way; the device holds the exchange for 50 us.
        let clock = BootClock::measure(7, 1_000_000, 300, 350, 1_000_650).unwrap();
        assert_eq!((clock.offset_us, clock.delay_us), (1_000_000, 600));
    }

    #[test]
    fn an_impossible_round_trip_measures_nothing() {
        assert_eq!(BootClock::measure(7, 1_000, 500, 400, 2_000), None);
        assert_eq!(BootClock::measure(7, 1_000, 0, 5_000, 2_000), None);
        assert_eq!(BootClock::measure(7, 2_000, 0, 0, 1_000), None);
    }

    #[test]
    fn the_exchange_of_least_delay_wins_until_it_is_old() {
        let at = |delay_us, measured_at_us| BootClock {
            boot: 1,
            offset_us: delay_us as i64,
            delay_us,
            measured_at_us,
        };
        let mut clocks = BootClocks::default();
        assert!(clocks.improve(at(1_000, 0)));
        assert!(!clocks.improve(at(3_000, 1_000_000)));
        assert!(clocks.improve(at(900, 2_000_000)));
        assert!(clocks.improve(at(3_000, 60_000_000)));
        assert_eq!(clocks.resolve_boot(1, 0, 0).offset_us, 3_000);
    }

    #[test]
    fn an_unknown_boot_ends_at_its_receipt() {
        let resolved = BootClocks::default().resolve_boot(9, 400, 10_000);
        assert_eq!(
            resolved,
            ResolvedTime {
                offset_us: 9_600,
                quality: Quality::Unanchored
            }
        );
    }

    #[test]
    fn implausible_utc_is_suspect_and_kept() {
        let now_us = 1_700_000_000_000_000;
        assert_eq!(resolve_utc(now_us, now_us, now_us).quality, Quality::Utc);
        assert_eq!(resolve_utc(0, 5, now_us).quality, Quality::Suspect);
        let ahead_us = now_us + UTC_PLAUSIBLE_AHEAD_US + 1;
        assert_eq!(
            resolve_utc(now_us, ahead_us, now_us).quality,
            Quality::Suspect
        );
    }
}
