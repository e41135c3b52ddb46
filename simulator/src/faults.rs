//! Selection of the faults for each frame.
//!
//! Parses `--faults` and decides by hash. The fleet damages the bytes and closes the sockets.
//!
//! Invariants: whether and how a frame is malformed depends only on seed, device and seq, because it is
//! part of the frame's content and must be the same when the frame is resent. Every other fault
//! is drawn separately for each attempt, so that no frame is hit indefinitely unless its probability
//! is 1. A run with the same seed has the same faults.

use crate::hash;
use std::fmt;
use std::str::FromStr;

/// A fault in the transmission of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device closes the connection right after the frame, without waiting for the ACK.
    Disconnect,
    /// After the frame, the device resends one that was acknowledged.
    Duplicate,
    /// One bit of the frame's payload is flipped in transit.
    Corrupt,
    /// The frame has valid checksums, but its payload cannot be decoded.
    Malformed,
    /// The frame is sent one byte at a time.
    Slow,
    /// The device disconnects in the middle of the frame.
    Abandon,
}

impl Fault {
    /// All faults, in the order of declaration.
    pub const ALL: [Self; 6] = [
        Self::Disconnect,
        Self::Duplicate,
        Self::Corrupt,
        Self::Malformed,
        Self::Slow,
        Self::Abandon,
    ];

    /// Returns its name in `--faults`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disconnect => "disconnect",
            Self::Duplicate => "duplicate",
            Self::Corrupt => "corrupt",
            Self::Malformed => "malformed",
            Self::Slow => "slow",
            Self::Abandon => "abandon",
        }
    }

    /// Returns its probability per frame if `--faults` gives none.
    pub const fn default_chance(self) -> Chance {
        Chance(match self {
            Self::Duplicate => 10_000_000,
            Self::Disconnect | Self::Slow | Self::Abandon => 2_000_000,
            Self::Corrupt => 1_000_000,
            // A gateway closes the connection after more than 8 such frames in a minute; a device
            // would have to send 270 frames a second to reach that.
            Self::Malformed => 500_000,
        })
    }
}

/// A probability in billionths. An integer, so that the journal preserves it exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chance(u32);

impl Chance {
    /// Probability 0.
    pub const NEVER: Self = Self(0);
    /// Probability 1.
    pub const ALWAYS: Self = Self(1_000_000_000);

    /// Returns a probability of that many billionths; `None` if that is more than 1.
    pub fn from_billionths(billionths: u32) -> Option<Self> {
        (billionths <= Self::ALWAYS.0).then_some(Self(billionths))
    }

    /// Returns the probability in billionths.
    pub fn billionths(self) -> u32 {
        self.0
    }

    /// Returns whether uniformly distributed `bits` select this probability.
    fn takes(self, bits: u64) -> bool {
        let drawn = (u128::from(bits) * u128::from(Self::ALWAYS.0)) >> 64;
        drawn < u128::from(self.0)
    }
}

/// Parses `0.01` or `1%`.
impl FromStr for Chance {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (number, whole) = match text.strip_suffix('%') {
            Some(percent) => (percent, 100.0),
            None => (text, 1.0),
        };
        let share: f64 = number.trim().parse::<f64>().map_err(drop)? / whole;
        if !(0.0..=1.0).contains(&share) {
            return Err(());
        }
        let billionths = (share * 1e9).round() as u32;
        // Less than half a billionth would silently become 0.
        if share > 0.0 && billionths == 0 {
            Err(())
        } else {
            Ok(Self(billionths))
        }
    }
}

impl fmt::Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1e9)
    }
}

/// Probability of every fault per frame; [`Faults::default`] has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    chances: [Chance; Fault::ALL.len()],
}

/// A `--faults` value is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultsError {
    /// The fault name is unknown.
    #[error("unknown fault {0:?}; expected one of {names}, all", names = names())]
    UnknownName(String),
    /// The text after the equals sign is not a valid probability.
    #[error("{name}={value}: expected a probability from 0 to 1, or a percentage such as 1%")]
    NotAProbability {
        /// Name of the fault.
        name: String,
        /// The invalid value.
        value: String,
    },
}

impl Faults {
    /// Returns the probability of a fault per frame.
    pub fn chance(&self, fault: Fault) -> Chance {
        self.chances[fault as usize]
    }

    /// Returns the faults of one attempt to send a frame. `attempt` counts from 0.
    ///
    /// Malformed content is not included; see [`malformation`].
    pub fn on_attempt(&self, seed: u64, device: u32, seq: u64, attempt: u32) -> Strikes {
        let key = hash::key(&[ATTEMPT, seed, u64::from(device), seq, u64::from(attempt)]);
        let struck = |fault: Fault| self.chance(fault).takes(hash::at(key, fault as u64));
        Strikes {
            disconnect: struck(Fault::Disconnect),
            duplicate: struck(Fault::Duplicate),
            corrupt: struck(Fault::Corrupt),
            slow: struck(Fault::Slow),
            abandon: struck(Fault::Abandon),
            bits: hash::at(key, Fault::ALL.len() as u64),
        }
    }
}

/// Parses a comma-separated list of `name` and `name=probability`. Later items override earlier ones, so
/// `all,slow=0` enables every fault except one.
impl FromStr for Faults {
    type Err = FaultsError;

    fn from_str(spec: &str) -> Result<Self, FaultsError> {
        let mut faults = Self::default();
        for item in spec.split(',').map(str::trim) {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name.trim(), Some(value.trim())),
                None => (item, None),
            };
            let chosen: Vec<Fault> = Fault::ALL
                .into_iter()
                .filter(|fault| name == "all" || name == fault.name())
                .collect();
            if chosen.is_empty() {
                return Err(FaultsError::UnknownName(name.to_owned()));
            }
            let chance = value.map(|value| {
                value
                    .parse::<Chance>()
                    .map_err(|()| FaultsError::NotAProbability {
                        name: name.to_owned(),
                        value: value.to_owned(),
                    })
            });
            let chance = chance.transpose()?;
            for fault in chosen {
                faults.chances[fault as usize] = chance.unwrap_or(fault.default_chance());
            }
        }
        Ok(faults)
    }
}

/// Faults of one attempt. Several can occur together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strikes {
    /// [`Fault::Disconnect`]
    pub disconnect: bool,
    /// [`Fault::Duplicate`]
    pub duplicate: bool,
    /// [`Fault::Corrupt`]
    pub corrupt: bool,
    /// [`Fault::Slow`]
    pub slow: bool,
    /// [`Fault::Abandon`]
    pub abandon: bool,
    /// Uniformly distributed bits for the remaining choices: which bit to flip, where to stop.
    pub bits: u64,
}

impl Strikes {
    /// Returns whether there is any fault.
    pub fn any(&self) -> bool {
        self.disconnect || self.duplicate || self.corrupt || self.slow || self.abandon
    }
}

/// Kind of malformed content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Malformation {
    /// The payload ends before its last field.
    TruncatedPayload,
    /// Bytes follow the last field of the payload.
    TrailingBytes,
    /// A number is encoded in more bytes than it needs.
    OverlongVarint,
    /// A column names an encoding that does not exist.
    UnknownEncoding,
    /// The number of values in a column differs from the number of rows in the frame.
    RowCountMismatch,
    /// A row is not later than the row before.
    NonIncreasingTime,
    /// A sequenced frame has a type that does not exist.
    UnknownType,
    /// A reserved bit of the header's flags is set.
    ReservedFlag,
}

impl Malformation {
    /// All malformations, in the order of declaration.
    pub const ALL: [Self; 8] = [
        Self::TruncatedPayload,
        Self::TrailingBytes,
        Self::OverlongVarint,
        Self::UnknownEncoding,
        Self::RowCountMismatch,
        Self::NonIncreasingTime,
        Self::UnknownType,
        Self::ReservedFlag,
    ];
}

/// Returns the malformation of frame `seq` of a device, if any; each frame has one with probability `chance`.
pub fn malformation(chance: Chance, seed: u64, device: u32, seq: u64) -> Option<Malformation> {
    let key = hash::key(&[CONTENT, seed, u64::from(device), seq]);
    let choice = hash::between(hash::at(key, 1), 0, Malformation::ALL.len() as i64 - 1);
    chance
        .takes(hash::at(key, 0))
        .then_some(Malformation::ALL[choice as usize])
}

const ATTEMPT: u64 = u64::from_be_bytes(*b"attempt\0");
const CONTENT: u64 = u64::from_be_bytes(*b"content\0");

fn names() -> String {
    Fault::ALL.map(Fault::name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(spec: &str) -> Result<Faults, FaultsError> {
        spec.parse()
    }

    #[test]
    fn a_list_gives_each_fault_its_probability() {
        let faults = parse("disconnect=0.01, corrupt=0.1%,malformed").unwrap();
        let chances = Fault::ALL.map(|fault| faults.chance(fault).billionths());
        assert_eq!(chances, [10_000_000, 0, 1_000_000, 500_000, 0, 0]);
    }

    #[test]
    fn all_means_every_fault_and_later_items_win() {
        let faults = parse("all,slow=0,duplicate=1").unwrap();
        assert_eq!(
            faults.chance(Fault::Abandon),
            Fault::Abandon.default_chance()
        );
        assert_eq!(faults.chance(Fault::Slow), Chance::NEVER);
        assert_eq!(faults.chance(Fault::Duplicate), Chance::ALWAYS);
        assert_eq!(
            parse("all=0.5").unwrap().chance(Fault::Slow).to_string(),
            "0.5"
        );
    }

    #[test]
    fn errors_name_the_item_and_the_valid_values() {
        let said = |spec: &str| parse(spec).unwrap_err().to_string();
        assert_eq!(
            said("slow,drop"),
            "unknown fault \"drop\"; expected one of disconnect, duplicate, corrupt, malformed, slow, \
            abandon, all"
        );
        assert!(said("").starts_with("unknown fault \"\""));
        for value in ["2", "-0.1", "NaN", "1e-10", "", "often", "101%"] {
            let error = said(&format!("slow={value}"));
            assert!(
                error.starts_with(&format!("slow={value}: expected a probability")),
                "{error}"
            );
        }
    }

    #[test]
    fn faults_are_reproducible_and_as_frequent_as_requested() {
        let faults = parse("disconnect=0.1,corrupt=1").unwrap();
        let strikes = |seq| faults.on_attempt(1, 2, seq, 0);
        let struck = (0..10_000).filter(|&seq| strikes(seq).disconnect).count();
        assert!((850..1_150).contains(&struck), "{struck}");
        assert!((0..1_000).all(|seq| strikes(seq).corrupt && !strikes(seq).slow));
        assert_eq!(strikes(5), strikes(5));
    }

    #[test]
    fn a_frame_with_a_fault_gets_through_on_a_later_attempt() {
        let faults = parse("all=0.5").unwrap();
        let clean = |attempt| {
            let strikes = faults.on_attempt(1, 2, 3, attempt);
            !(strikes.disconnect || strikes.corrupt || strikes.abandon)
        };
        assert!((0..100).any(clean) && !(0..100).all(clean));
    }

    #[test]
    fn malformed_frames_are_of_every_kind_and_as_frequent_as_requested() {
        let chance: Chance = "0.01".parse().unwrap();
        let struck: Vec<Malformation> = (1..=100_000)
            .filter_map(|seq| malformation(chance, 1, 2, seq))
            .collect();
        assert!((850..1_150).contains(&struck.len()), "{}", struck.len());
        assert!(Malformation::ALL.iter().all(|kind| struck.contains(kind)));
        assert_eq!(malformation(Chance::NEVER, 1, 2, 3), None);
        assert!(malformation(Chance::ALWAYS, 1, 2, 3).is_some());
    }
}
