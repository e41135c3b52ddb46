//! A rate limit with a burst, on a clock that the caller passes in: the generic cell rate algorithm
//! (ITU-T I.371).

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units per second, at least 1.
    pub per_s: u64,
    /// Units accepted at the same time after a pause.
    pub burst: u64,
}

/// Usage of a [`Rate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Gcra {
    /// Theoretical arrival time of the next unit, on the caller's clock.
    theoretical_arrival_us: u64,
}

impl Gcra {
    /// Counts `amount`, even over the limit; returns the time from which more may be received.
    pub fn consume(&mut self, rate: Rate, amount: u64, now_us: u64) -> u64 {
        let us = |amount: u64| amount.saturating_mul(1_000_000) / rate.per_s;
        self.theoretical_arrival_us = self
            .theoretical_arrival_us
            .max(now_us)
            .saturating_add(us(amount));
        self.theoretical_arrival_us.saturating_sub(us(rate.burst))
    }

    pub fn is_in_debt(&self, now_us: u64) -> bool {
        self.theoretical_arrival_us > now_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        per_s: 100,
        burst: 50,
    };

    #[test]
    fn a_burst_is_accepted_and_the_rest_is_paced() {
        let mut meter = Gcra::default();
        let start_us = 7_000_000;
        assert!(meter.consume(RATE, 50, start_us) <= start_us);
        assert_eq!(meter.consume(RATE, 1, start_us), start_us + 10_000);
        assert_eq!(meter.consume(RATE, 100, start_us), start_us + 1_010_000);
    }

    #[test]
    fn the_sustained_rate_is_not_exceeded() {
        let mut meter = Gcra::default();
        let (mut now_us, mut spent) = (1_000_000, 0);
        while now_us < 101_000_000 {
            now_us = now_us.max(meter.consume(RATE, 7, now_us));
            spent += 7;
        }
        assert!((10_000..=10_064).contains(&spent), "{spent}");
    }

    #[test]
    fn unused_rate_accumulates_only_up_to_the_burst() {
        let mut meter = Gcra::default();
        meter.consume(RATE, 1, 0);
        let later_us = 3_600_000_000;
        assert!(meter.consume(RATE, 50, later_us) <= later_us);
        assert!(meter.consume(RATE, 1, later_us) > later_us);
    }

    #[test]
    fn an_absurd_amount_does_not_overflow() {
        let mut meter = Gcra::default();
        meter.consume(RATE, u64::MAX, u64::MAX);
        assert!(meter.consume(RATE, u64::MAX, u64::MAX) > 0);
    }
}
