//! Delays announced to devices whose frames cannot be accepted now.

/// Shortest and longest delay.
const WAIT_MS: std::ops::RangeInclusive<u64> = 1_000..=60_000;

/// Returns the delay for a device, in milliseconds, if the cause has lasted since `since_us`: about
/// the time it has lasted so far. A device therefore resends only a few times in an outage of any
/// length, and waits at most about as long as the outage lasted. Each delay varies by up to a
/// quarter in either direction, so that a fleet does not reconnect all at the same time.
pub(crate) fn retry_after_ms(since_us: u64, now_us: u64, device: i64) -> u32 {
    let lasted_ms = now_us.saturating_sub(since_us) / 1000;
    let wait_ms = lasted_ms.clamp(*WAIT_MS.start(), *WAIT_MS.end());
    let spread_ms = wait_ms / 2;
    let offset_ms = scatter(device.cast_unsigned() ^ now_us) % (spread_ms + 1);
    let spread = wait_ms - wait_ms / 4 + offset_ms;
    spread.clamp(*WAIT_MS.start(), *WAIT_MS.end()) as u32
}

/// Returns a pseudorandom number for `seed` (splitmix64).
fn scatter(seed: u64) -> u64 {
    let mut bits = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_as_long_as_the_outage_so_far() {
        for (lasted_s, least_ms, most_ms) in [
            (0, 1_000, 1_250),
            (2, 1_500, 2_500),
            (16, 12_000, 20_000),
            (60, 45_000, 60_000),
            (100_000, 45_000, 60_000),
        ] {
            let waits = (0..1000).map(|device| {
                let since_us = 5_000_000;
                retry_after_ms(since_us, since_us + lasted_s * 1_000_000, device)
            });
            let waits = Vec::from_iter(waits);
            let (least, most) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
            assert!(
                (least_ms..=most_ms).contains(least),
                "{lasted_s} s: {least}"
            );
            assert!((least_ms..=most_ms).contains(most), "{lasted_s} s: {most}");
            // Delays occur near both ends of the range.
            assert!(lasted_s == 0 || most - least > (most_ms - least_ms) / 2);
        }
    }

    /// Each delay begins when the previous one is over: a few in any outage.
    #[test]
    fn an_outage_of_any_length_takes_few_attempts() {
        let mut attempts = 0;
        let mut now_us = 0;
        while now_us < 600_000_000 {
            now_us += u64::from(retry_after_ms(0, now_us, 7)) * 1000;
            attempts += 1;
        }
        assert!(attempts < 25, "{attempts}");
    }
}
