//! A rate with a burst, on a clock that is told: the generic cell rate algorithm (ITU-T I.371).

/// How much may come in the long run, and how much at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// A second; at least 1.
    pub per_s: u64,
    /// At once, after nothing has come for a while.
    pub burst: u64,
}

/// How far a [`Rate`] is used up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    /// When all that has come will have been paid for, on the clock of those who tell the time.
    paid_at_us: u64,
}

impl Meter {
    /// Takes in `amount`, whether there is room for it or not; gives the moment from which on more may
    /// come.
    pub fn spend(&mut self, rate: Rate, amount: u64, now_us: u64) -> u64 {
        let us = |amount: u64| amount.saturating_mul(1_000_000) / rate.per_s;
        self.paid_at_us = self.paid_at_us.max(now_us).saturating_add(us(amount));
        self.paid_at_us.saturating_sub(us(rate.burst))
    }

    /// Whether some of what has come is not paid for.
    pub fn owes(&self, now_us: u64) -> bool {
        self.paid_at_us > now_us
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
    fn a_burst_is_free_and_the_rest_has_its_pace() {
        let mut meter = Meter::default();
        let start_us = 7_000_000;
        assert!(meter.spend(RATE, 50, start_us) <= start_us);
        assert_eq!(meter.spend(RATE, 1, start_us), start_us + 10_000);
        assert_eq!(meter.spend(RATE, 100, start_us), start_us + 1_010_000);
    }

    #[test]
    fn in_the_long_run_no_more_than_the_rate_comes() {
        let mut meter = Meter::default();
        let (mut now_us, mut spent) = (1_000_000, 0);
        while now_us < 101_000_000 {
            now_us = now_us.max(meter.spend(RATE, 7, now_us));
            spent += 7;
        }
        assert!((10_000..=10_064).contains(&spent), "{spent}");
    }

    #[test]
    fn what_was_not_used_is_not_saved_up_beyond_the_burst() {
        let mut meter = Meter::default();
        meter.spend(RATE, 1, 0);
        let later_us = 3_600_000_000;
        assert!(meter.spend(RATE, 50, later_us) <= later_us);
        assert!(meter.spend(RATE, 1, later_us) > later_us);
    }

    #[test]
    fn an_absurd_amount_does_not_overflow() {
        let mut meter = Meter::default();
        meter.spend(RATE, u64::MAX, u64::MAX);
        assert!(meter.spend(RATE, u64::MAX, u64::MAX) > 0);
    }
}
