//! What the gateway stores: now and over the last hour, from samples of its metrics.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::number;
use crate::metrics::{ACK_DELAYS, Metrics};
use crate::store::admin::{Pace, Poll, QueryError};
use crate::text::bytes_text;
use crate::time::utc_now;

const SAMPLE_EVERY: Duration = Duration::from_secs(5);
const HISTORY: Duration = Duration::from_secs(3600);
const SAMPLES_MAX: usize = (HISTORY.as_secs() / SAMPLE_EVERY.as_secs()) as usize + 1;
/// Minimum time between two samples to estimate when a disk is full.
const DISK_HISTORY_MIN: Duration = Duration::from_secs(600);
const DAY_S: f64 = 86_400.0;

/// Metrics at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    readings: u64,
    /// Acknowledgements by delay, as in [`Metrics::ack_delays`].
    ack_delays: [u64; ACK_DELAYS],
    /// Free space of the disk that has the least.
    disk_free_bytes: Option<i64>,
}

/// Samples of the last hour.
#[derive(Debug, Default)]
pub struct Rates(Mutex<VecDeque<Sample>>);

/// A rate as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Name of the value in the stream of updates.
    pub key: &'static str,
    pub label: &'static str,
    pub text: String,
}

impl Rates {
    fn add(&self, sample: Sample) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == SAMPLES_MAX {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// Returns the rates at the present time.
    pub fn shown(&self, metrics: &Metrics) -> Vec<Rate> {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = samples.back();
        // Two sample intervals, so that one slow commit does not look like an outage.
        let recent = newest.zip(samples.iter().rev().nth(2).or(samples.front()));
        let whole = newest.zip(samples.front());
        let rate = |key, label, text| Rate { key, label, text };
        vec![
            rate("readings_now", "Readings stored now", per_second(recent)),
            rate(
                "readings_hour",
                "Readings stored, last hour",
                per_second(whole),
            ),
            rate("ack_p99", "ACK delay, 99 % within", delay(whole)),
            rate(
                "unstored",
                "Oldest frame being committed",
                unstored(metrics),
            ),
            rate("disk", "Disk", disk(metrics, whole)),
        ]
    }
}

/// Two samples: the newer one, and the older one.
type Pair<'a> = Option<(&'a Sample, &'a Sample)>;

fn per_second(pair: Pair<'_>) -> String {
    let Some((new, old)) = pair.filter(|(new, old)| new.at > old.at) else {
        return "not known yet".to_owned();
    };
    let seconds = (new.at - old.at).as_secs_f64();
    let rate = new.readings.saturating_sub(old.readings) as f64 / seconds;
    match rate {
        0.0 => "0/s".to_owned(),
        ..10.0 => format!("{rate:.1}/s"),
        _ => format!("{}/s", number(rate)),
    }
}

fn delay(pair: Pair<'_>) -> String {
    let Some((new, old)) = pair else {
        return "not known yet".to_owned();
    };
    let mut counts = new.ack_delays;
    for (count, old) in counts.iter_mut().zip(old.ack_delays) {
        *count = count.saturating_sub(old);
    }
    match percentile_99(&counts) {
        None => "no frame".to_owned(),
        Some(limit_s) if limit_s.is_infinite() => "over a minute".to_owned(),
        Some(limit_s) if limit_s < 1.0 => format!("{:.0} ms", limit_s * 1000.0),
        Some(limit_s) => format!("{limit_s:.1} s"),
    }
}

/// Returns the upper limit of the interval that has the 99th percentile, in seconds.
fn percentile_99(counts: &[u64; ACK_DELAYS]) -> Option<f64> {
    let total: u64 = counts.iter().sum();
    let wanted = total - total / 100;
    let mut sum = 0;
    let found = counts.iter().position(|count| {
        sum += count;
        total > 0 && sum >= wanted
    });
    found.map(Metrics::ack_delay_limit_s)
}

fn unstored(metrics: &Metrics) -> String {
    match metrics.unstored_oldest_us() {
        None => "none".to_owned(),
        Some(us) => {
            let waits_us = utc_now().as_microsecond().saturating_sub(us).max(0);
            format!("{:.1} s", waits_us as f64 / 1e6)
        }
    }
}

fn disk(metrics: &Metrics, pair: Pair<'_>) -> String {
    let Some(free) = metrics.disk_free_bytes() else {
        return "not known yet".to_owned();
    };
    let mut text = format!("{} free", bytes_text(free.unsigned_abs()));
    let pair = pair.filter(|(new, old)| new.at - old.at >= DISK_HISTORY_MIN);
    if let Some((new, old)) = pair
        && let Some((new_free, old_free)) = new.disk_free_bytes.zip(old.disk_free_bytes)
    {
        let used = (old_free - new_free) as f64 / (new.at - old.at).as_secs_f64() * DAY_S;
        match free as f64 / used {
            _ if used <= 0.0 => text.push_str(", not filling"),
            days if days < 1000.0 => _ = write!(text, ", {days:.0} days left at this rate"),
            _ => text.push_str(", more than 1,000 days left"),
        }
    }
    text
}

/// Adds a sample of the metrics at intervals.
pub struct RatesSampler {
    metrics: Arc<Metrics>,
    rates: Arc<Rates>,
}

impl RatesSampler {
    /// Creates a task that samples `metrics`.
    pub fn new(metrics: Arc<Metrics>, rates: Arc<Rates>) -> RatesSampler {
        RatesSampler { metrics, rates }
    }
}

impl Poll for RatesSampler {
    const TASK: &'static str = "rates";
    const PACE: Pace = Pace {
        interval: SAMPLE_EVERY,
        timeout: SAMPLE_EVERY,
        share: 20,
    };

    async fn poll(&mut self) -> Result<(), QueryError> {
        self.rates.add(Sample {
            at: Instant::now(),
            readings: self.metrics.readings_stored(),
            ack_delays: self.metrics.ack_delays(),
            disk_free_bytes: self.metrics.disk_free_bytes(),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::disk::{Place, Space};

    fn sample(at: Instant, readings: u64, disk_free_bytes: i64) -> Sample {
        Sample {
            at,
            readings,
            ack_delays: [0; ACK_DELAYS],
            disk_free_bytes: Some(disk_free_bytes),
        }
    }

    #[test]
    fn rates_are_differences_of_samples() {
        let began = Instant::now();
        let old = sample(began, 100, 1 << 40);
        let new = sample(
            began + Duration::from_secs(1000),
            2_000_100,
            (1 << 40) - (1 << 30),
        );
        assert_eq!(per_second(Some((&new, &old))), "2,000/s");
        assert_eq!(per_second(Some((&new, &new))), "not known yet");
        let metrics = Metrics::default();
        assert_eq!(disk(&metrics, None), "not known yet");
        let space = |free_bytes| Space {
            free_bytes,
            total_bytes: 1 << 50,
        };
        metrics.set_disk(Place::Store, space(864 << 30), false);
        metrics.set_disk(Place::Data, space(900 << 30), false);
        // A GiB in 1,000 s.
        assert_eq!(
            disk(&metrics, Some((&new, &old))),
            "864.0 GiB free, 10 days left at this rate"
        );
        assert_eq!(disk(&metrics, Some((&old, &old))), "864.0 GiB free");
        let grown = Sample {
            disk_free_bytes: Some(1 << 41),
            ..new
        };
        assert_eq!(
            disk(&metrics, Some((&grown, &old))),
            "864.0 GiB free, not filling"
        );
    }

    #[test]
    fn the_percentile_is_the_limit_of_an_interval() {
        let mut counts = [0; ACK_DELAYS];
        assert_eq!(percentile_99(&counts), None);
        counts[0] = 99;
        counts[4] = 1;
        assert_eq!(percentile_99(&counts), Some(Metrics::ack_delay_limit_s(0)));
        counts[4] = 2;
        assert_eq!(percentile_99(&counts), Some(Metrics::ack_delay_limit_s(4)));
        counts[ACK_DELAYS - 1] = 1000;
        assert_eq!(percentile_99(&counts), Some(f64::INFINITY));
    }

    #[test]
    fn samples_are_bounded() {
        let rates = Rates::default();
        let began = Instant::now();
        for n in 0..2 * SAMPLES_MAX as u64 {
            rates.add(sample(began + SAMPLE_EVERY * n as u32, n, 0));
        }
        assert_eq!(rates.0.lock().unwrap().len(), SAMPLES_MAX);
    }
}
