//! Random numbers that can be looked up by index.
//!
//! These functions derive everything that a simulated device does from the seed. They keep no
//! state between numbers, so that frame 1,000,000 costs no more than frame 1, and they
//! use integers only, so that every machine draws the same numbers. They are not suitable for keys or nonces of the
//! protocol.

/// The odd number nearest to 2^64 divided by the golden ratio: its consecutive multiples are
/// spread over all 64 bits.
pub const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Scrambles 64 bits so that each bit of the result depends on all of them (the finalizer of
/// SplitMix64). One-to-one.
#[inline]
pub const fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// Returns a key that depends on every part and on their order. The first part should name the purpose of the
/// key, so that no two uses of one seed share numbers.
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(GOLDEN, |key, part| {
        mix(key.wrapping_mul(5) ^ mix(part.wrapping_add(GOLDEN)))
    })
}

/// Returns the `index`-th number of the sequence for `key`.
#[inline]
pub const fn at(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(index.wrapping_mul(GOLDEN)))
}

/// Maps uniformly distributed `bits` uniformly to `low..=high`.
///
/// `low` must not be above `high`, and their distance must fit an `i64`.
#[inline]
pub const fn between(bits: u64, low: i64, high: i64) -> i64 {
    let choices = (high - low) as u128 + 1;
    low + ((bits as u128 * choices) >> 64) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_key_depends_on_every_part_and_on_their_order() {
        let keys = [
            key(&[]),
            key(&[0]),
            key(&[0, 0]),
            key(&[1, 2]),
            key(&[2, 1]),
            key(&[1, 2, 0]),
        ];
        assert_eq!(HashSet::from(keys).len(), keys.len());
    }

    #[test]
    fn numbers_of_one_key_are_spread_evenly() {
        let mut counts = [0_u32; 16];
        for index in 0..160_000 {
            counts[(at(key(&[7]), index) >> 60) as usize] += 1;
        }
        assert!(
            counts.iter().all(|count| (9_600..10_400).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn between_reaches_both_ends_and_stays_within() {
        assert_eq!(between(0, -3, 3), -3);
        assert_eq!(between(u64::MAX, -3, 3), 3);
        assert_eq!(between(u64::MAX, 5, 5), 5);
        assert_eq!(between(u64::MAX, 0, i64::MAX), i64::MAX);
    }

    #[test]
    fn the_numbers_never_change() {
        // A journal of last year must still be verifiable: these values are part of the plan's format.
        assert_eq!(mix(1), 0x5692_161D_100B_05E5);
        assert_eq!(at(0, 1), 0xE220_A839_7B1D_CDAF);
    }
}
