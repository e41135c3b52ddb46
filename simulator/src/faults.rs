//! Which faults befall which frame.
//!
//! Parses `--faults` and decides by hash; it neither breaks bytes nor closes sockets, which is left to
//! the fleet.
//!
//! Invariants: whether and how a frame is malformed depends on seed, device and seq alone, for it is
//! part of the frame's content and must be the same when the frame is sent again. Every other fault
//! is drawn anew for each attempt, so that no frame can be struck for ever unless its probability
//! is 1. A run with the same seed meets the same faults.

use crate::hash;
use std::fmt;
use std::str::FromStr;

/// Something that goes wrong on the way of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device closes the connection right after the frame and does not wait for the ACK.
    Disconnect,
    /// After the frame, one that was acked is sent again.
    Duplicate,
    /// One bit of the frame's payload is flipped on the way.
    Corrupt,
    /// The frame is intact by its checksums, but its payload cannot be understood.
    Malformed,
    /// The frame comes one byte at a time.
    Slow,
    /// The device vanishes in the middle of the frame and leaves the connection half sent.
    Abandon,
}

impl Fault {
    /// Every fault, in the order of declaration.
    pub const ALL: [Self; 6] = [
        Self::Disconnect,
        Self::Duplicate,
        Self::Corrupt,
        Self::Malformed,
        Self::Slow,
        Self::Abandon,
    ];

    /// Its name in `--faults`.
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

    /// Its probability per frame where `--faults` names it without one.
    pub const fn default_chance(self) -> Chance {
        Chance(match self {
            Self::Duplicate => 10_000_000,
            Self::Disconnect | Self::Slow | Self::Abandon => 2_000_000,
            Self::Corrupt => 1_000_000,
            // A gateway closes the connection after more than 8 such frames in a minute; a device
            // would have to send 270 frames a second to get there.
            Self::Malformed => 500_000,
        })
    }
}

/// A probability in billionths. A whole number, so that it comes back from a journal unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chance(u32);

impl Chance {
    /// What never happens.
    pub const NEVER: Self = Self(0);
    /// What always happens.
    pub const ALWAYS: Self = Self(1_000_000_000);

    /// A probability of that many billionths; `None` if that is more than 1.
    pub fn from_billionths(billionths: u32) -> Option<Self> {
        (billionths <= Self::ALWAYS.0).then_some(Self(billionths))
    }

    /// The probability in billionths.
    pub fn billionths(self) -> u32 {
        self.0
    }

    /// Whether evenly spread `bits` fall within the probability.
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
        // Less than half a billionth would quietly become never.
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

/// Probability of every fault, per frame; [`Faults::default`] has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    chances: [Chance; Fault::ALL.len()],
}

/// Why a `--faults` was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultsError {
    /// No fault has that name.
    #[error("no fault is called {0:?}; there are {names} and all", names = names())]
    UnknownName(String),
    /// What follows the equals sign is no probability.
    #[error("{name}={value}: expected a probability from 0 to 1, or a percentage such as 1%")]
    NotAProbability {
        /// The fault.
        name: String,
        /// What was given.
        value: String,
    },
}

impl Faults {
    /// Probability of a fault per frame.
    pub fn chance(&self, fault: Fault) -> Chance {
        self.chances[fault as usize]
    }

    /// Which faults befall one attempt to send a frame. `attempt` counts from 0.
    ///
    /// Malformed content is not among them; see [`malformation`].
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

/// Parses a comma list of `name` and `name=probability`; a later item overrides an earlier one, so
/// `all,slow=0` is every fault but one.
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

/// The faults of one attempt. Several can come together.
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
    /// Evenly spread, for what remains to be chosen: which bit to flip, where to break off.
    pub bits: u64,
}

impl Strikes {
    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.disconnect || self.duplicate || self.corrupt || self.slow || self.abandon
    }
}

/// How the content of a frame is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Malformation {
    /// The payload ends before its last field.
    TruncatedPayload,
    /// Bytes follow the last field of the payload.
    TrailingBytes,
    /// A number is coded in more bytes than it needs.
    OverlongVarint,
    /// A column names an encoding that does not exist.
    UnknownEncoding,
    /// A column has another number of values than the frame has rows.
    RowCountMismatch,
    /// A row is not later than the row before.
    NonIncreasingTime,
    /// A sequenced frame of a type that does not exist.
    UnknownType,
    /// A reserved bit of the header's flags is set.
    ReservedFlag,
}

impl Malformation {
    /// Every malformation, in the order of declaration.
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

/// How frame `seq` of a device is malformed, if it is, where each frame is with probability `chance`.
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
    fn errors_name_the_item_and_what_would_be_right() {
        let said = |spec: &str| parse(spec).unwrap_err().to_string();
        assert_eq!(
            said("slow,drop"),
            "no fault is called \"drop\"; there are disconnect, duplicate, corrupt, malformed, slow, \
             abandon and all"
        );
        assert!(said("").starts_with("no fault is called \"\""));
        for value in ["2", "-0.1", "NaN", "1e-10", "", "often", "101%"] {
            let error = said(&format!("slow={value}"));
            assert!(
                error.starts_with(&format!("slow={value}: expected a probability")),
                "{error}"
            );
        }
    }

    #[test]
    fn faults_strike_as_often_as_told_and_the_same_again() {
        let faults = parse("disconnect=0.1,corrupt=1").unwrap();
        let strikes = |seq| faults.on_attempt(1, 2, seq, 0);
        let struck = (0..10_000).filter(|&seq| strikes(seq).disconnect).count();
        assert!((850..1_150).contains(&struck), "{struck}");
        assert!((0..1_000).all(|seq| strikes(seq).corrupt && !strikes(seq).slow));
        assert_eq!(strikes(5), strikes(5));
    }

    #[test]
    fn a_struck_frame_gets_through_on_some_later_attempt() {
        let faults = parse("all=0.5").unwrap();
        let clean = |attempt| {
            let strikes = faults.on_attempt(1, 2, 3, attempt);
            !(strikes.disconnect || strikes.corrupt || strikes.abandon)
        };
        assert!((0..100).any(clean) && !(0..100).all(clean));
    }

    #[test]
    fn malformed_frames_are_of_every_kind_and_as_many_as_told() {
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
