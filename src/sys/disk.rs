//! Free space of a disk, and the levels at which the gateway warns and stops storing.

use std::io;
use std::path::Path;

/// Space of a disk in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Space that this user can fill.
    pub free_bytes: u64,
    /// Used and free space, without what is reserved for root.
    pub total_bytes: u64,
}

/// What the gateway keeps on a disk. A disk that holds several of them counts as the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The store.
    Store,
    /// The spool.
    Spool,
    /// The data directory.
    Data,
}

impl Place {
    /// Every place.
    pub const ALL: [Place; 3] = [Place::Store, Place::Spool, Place::Data];

    /// Returns the label in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Place::Store => "store",
            Place::Spool => "spool",
            Place::Data => "data",
        }
    }

    /// Returns what is there, for operators.
    pub fn purpose(self) -> &'static str {
        match self {
            Place::Store => "the store",
            Place::Spool => "the spool",
            Place::Data => "the data directory",
        }
    }

    /// Returns whether readings are stored there.
    pub fn holds_readings(self) -> bool {
        self != Place::Data
    }
}

/// Percentages of free space. 0 turns a level off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levels {
    /// Below it, the gateway warns.
    pub warn_percent: u8,
    /// Below it, the gateway stops storing.
    pub stop_percent: u8,
}

/// How full a disk is, in ascending order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Above both percentages.
    #[default]
    Enough,
    /// Below the percentage at which the gateway warns.
    Low,
    /// Below the percentage at which the gateway stops storing.
    Full,
}

impl Space {
    /// Reads the space of the disk that holds `path`. Blocks until the disk answers.
    ///
    /// # Errors
    /// `path` does not exist or cannot be read.
    pub fn of(path: &Path) -> io::Result<Space> {
        let disk = rustix::fs::statvfs(path)?;
        let used = disk.f_blocks.saturating_sub(disk.f_bfree);
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        Ok(Space {
            free_bytes: bytes(disk.f_bavail),
            total_bytes: bytes(used.saturating_add(disk.f_bavail)),
        })
    }

    /// Returns the free part in percent, rounded down.
    pub fn free_percent(self) -> u64 {
        let percent = u128::from(self.free_bytes) * 100 / u128::from(self.total_bytes.max(1));
        percent as u64
    }

    /// Returns whether less than `percent` is free. A file system that does not report its size has enough.
    fn is_below(self, percent: u8) -> bool {
        self.total_bytes > 0 && self.free_percent() < percent.into()
    }
}

impl Levels {
    /// Returns the level of a disk that was at the level `before`. To leave a level, a disk needs 1 % more free space
    /// than to enter it, so that the level does not change with each reading.
    pub fn level(self, space: Space, before: Level) -> Level {
        let is_at = |level, percent| {
            let more = u8::from(before >= level);
            percent > 0 && space.is_below(percent + more)
        };
        if is_at(Level::Full, self.stop_percent) {
            Level::Full
        } else if is_at(Level::Low, self.warn_percent) {
            Level::Low
        } else {
            Level::Enough
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEVELS: Levels = Levels {
        warn_percent: 15,
        stop_percent: 5,
    };

    fn space(free_permille: u64) -> Space {
        Space {
            free_bytes: free_permille << 30,
            total_bytes: 1000 << 30,
        }
    }

    /// Returns the level after each of these parts of free space, in thousandths.
    fn levels(levels: Levels, free: &[u64]) -> Vec<Level> {
        let mut level = Level::default();
        let next = |free: &u64| {
            level = levels.level(space(*free), level);
            level
        };
        free.iter().map(next).collect()
    }

    #[test]
    fn a_level_is_left_only_with_one_percent_more_space() {
        use Level::{Enough, Full, Low};
        for (free, expected) in [
            (
                &[150, 149, 150, 159, 160, 150][..],
                &[Enough, Low, Low, Low, Enough, Enough][..],
            ),
            (
                &[50, 49, 50, 59, 60, 50],
                &[Low, Full, Full, Full, Low, Low],
            ),
            // Both levels at once, in either direction.
            (
                &[1000, 0, 1000, 49, 155, 160],
                &[Enough, Full, Enough, Full, Low, Enough],
            ),
        ] {
            assert_eq!(levels(LEVELS, free), expected, "{free:?}");
        }
    }

    #[test]
    fn zero_turns_a_level_off() {
        use Level::{Enough, Full, Low};
        let off = |warn_percent, stop_percent| Levels {
            warn_percent,
            stop_percent,
        };
        assert_eq!(levels(off(0, 0), &[0]), [Enough]);
        assert_eq!(levels(off(15, 0), &[100, 0]), [Low, Low]);
        assert_eq!(levels(off(0, 5), &[100, 0, 55]), [Enough, Full, Full]);
    }

    #[test]
    fn a_disk_without_a_size_has_enough_space() {
        let unknown = Space {
            free_bytes: 0,
            total_bytes: 0,
        };
        assert_eq!(LEVELS.level(unknown, Level::Enough), Level::Enough);
    }
}
