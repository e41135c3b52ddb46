//! Signals like those of field sensors: a daily cycle, slow drift, noise and the occasional step.
//!
//! Each channel of each device draws its own parameters from the seed. Its value at a moment is then a function of
//! time and sample number alone. [`plan`](crate::plan) assigns samples to frames.
//!
//! Invariants: the values are the same on every machine and in every release of one plan format. Therefore all
//! arithmetic is on integers, in 65,536ths of the channel's smallest step. The platform's sine function is
//! unsuitable: libraries differ in the last bit, and if such a bit decides how a value is rounded, the verifier
//! on one machine would reject what another machine sent. The daily cycle consists of parabolas instead, which
//! look like a sine and cost one multiplication.

use crate::catalogue::CATALOGUE;
use crate::hash;
use crate::readings::{Column, Nulls, Values};
use fieldgate_protocol::value::Kind;

/// Evenly spaced samples of one device.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Number of the first sample since the start of the device's stream, from 0.
    pub first_sample: u64,
    /// Time of the first sample, in microseconds since 1970.
    pub t0_us: i64,
    /// Time between two samples, in microseconds, at least 1.
    pub step_us: u64,
    /// Number of samples.
    pub rows: usize,
}

/// Signal of one channel of one device.
#[derive(Clone, Debug)]
pub struct Signal {
    key: u64,
    /// All amplitudes are in 65,536ths of the channel's smallest step.
    center: i64,
    day: Wave,
    drift: Wave,
    noise: i64,
    plateaus: Plateaus,
    counter: Counter,
}

impl Signal {
    /// Draws the parameters of one channel. `origin_us` is the start of the device's measurements, in
    /// microseconds since 1970; counters start at 0 there.
    pub fn new(seed: u64, device: u32, channel: usize, origin_us: i64) -> Self {
        let model = &CATALOGUE[channel % CATALOGUE.len()];
        let key = hash::key(&[
            hash::key(&[SIGNAL]),
            seed,
            u64::from(device),
            channel as u64,
        ]);
        let draw = |index, (low, high): (i64, i64)| {
            hash::between(hash::at(!key, index), low * ONE, high * ONE)
        };
        let drift_s = hash::between(hash::at(!key, 5), 2 * DAY_S, 20 * DAY_S);
        let (day, drift) = (draw(1, model.day), draw(3, model.drift));
        let day = match model.kind {
            // The daily swing of a counter is its mean power times a number of hours: the drawn number divided by
            // 500.
            Kind::F64 => day / 500 * (drift / ONE),
            _ => day,
        };
        Self {
            key,
            center: draw(0, model.center),
            day: Wave::new(day, DAY_S, hash::at(!key, 2)),
            drift: Wave::new(drift, drift_s, hash::at(!key, 4)),
            noise: draw(6, model.noise),
            plateaus: Plateaus {
                key: hash::key(&[key]),
                length_us: hash::between(hash::at(!key, 7), model.plateau_s.0, model.plateau_s.1)
                    * 1_000_000,
                height: model.step * ONE,
            },
            counter: Counter {
                rate: (drift << 16) / 3_600_000,
                origin_us,
            },
        }
    }

    /// Appends the samples of `span` to a column of this channel's kind.
    ///
    /// A column of another kind is left unchanged; [`Readings::reset`](crate::readings::Readings::reset)
    /// with [`channels`](crate::catalogue::channels) creates the right ones.
    pub fn fill(&self, span: Span, column: &mut Column) {
        let nulls = &mut column.nulls;
        match &mut column.values {
            Values::Integer(values) => self.sample(span, nulls, |level| {
                values.push((level + ONE / 2) >> ONE_BITS)
            }),
            Values::F32(values) => self.sample(span, nulls, |level| {
                // In thousandths; 1/65,536 is a power of two, so only the division rounds.
                values.push((level as f64 / ONE as f64 / 1_000.0) as f32)
            }),
            Values::F64(values) => self.count(span, nulls, values),
            Values::Bool(values) => self.switch(span, nulls, values),
        }
    }

    /// Returns an analog value: the sum of all components.
    #[inline]
    fn sample(&self, span: Span, nulls: &mut Nulls, mut take: impl FnMut(i64)) {
        let (mut day, mut drift) = (self.day.at(span), self.drift.at(span));
        let mut plateau = self.plateaus.at(span.t0_us);
        for row in 0..span.rows {
            let t_us = span.time_us(row);
            if t_us >= plateau.end_us {
                plateau = self.plateaus.at(t_us);
            }
            let bits = self.bits(span, row);
            if is_null(bits) {
                nulls.insert(row);
            }
            take(self.center + day.next() + drift.next() + plateau.step + self.noise(bits));
        }
    }

    /// Fills a column with the count of an energy meter in whole watt-hours, as kWh. It never decreases: the daily
    /// swing is less than two hours' worth of the mean power, and a wave falls by at most its height
    /// in three hours.
    fn count(&self, span: Span, nulls: &mut Nulls, values: &mut Vec<f64>) {
        let mut day = self.day.at(span);
        for row in 0..span.rows {
            if is_null(self.bits(span, row)) {
                nulls.insert(row);
            }
            let counted = self.counter.at(span.time_us(row));
            let level = self.center.wrapping_add(counted).wrapping_add(day.next());
            values.push((level >> ONE_BITS) as f64 / 1_000.0);
        }
    }

    /// Fills a column with the state of a contact, which is closed during one in eight intervals.
    fn switch(&self, span: Span, nulls: &mut Nulls, values: &mut Vec<bool>) {
        let mut plateau = self.plateaus.at(span.t0_us);
        for row in 0..span.rows {
            let t_us = span.time_us(row);
            if t_us >= plateau.end_us {
                plateau = self.plateaus.at(t_us);
            }
            if is_null(self.bits(span, row)) {
                nulls.insert(row);
            }
            values.push(plateau.raised);
        }
    }

    #[inline]
    fn bits(&self, span: Span, row: usize) -> u64 {
        hash::at(self.key, span.first_sample.wrapping_add(row as u64))
    }

    /// Returns noise within plus and minus `noise`, with smaller values more likely: the sum of two draws.
    #[inline]
    fn noise(&self, bits: u64) -> i64 {
        let two_draws = (bits & 0xFFFF) as i64 + (bits >> 16 & 0xFFFF) as i64 - 0xFFFF;
        (two_draws * self.noise) >> 16
    }
}

impl Span {
    #[inline]
    fn time_us(&self, row: usize) -> i64 {
        self.t0_us
            .wrapping_add_unsigned(self.step_us.wrapping_mul(row as u64))
    }
}

const SIGNAL: u64 = u64::from_be_bytes(*b"signal\0\0");
const DAY_S: i64 = 86_400;
const ONE_BITS: u32 = 16;
const ONE: i64 = 1 << ONE_BITS;

/// Returns whether a sample is invalid, as when a sensor does not respond: one in 2,048 is. It uses other bits than
/// the noise.
#[inline]
fn is_null(bits: u64) -> bool {
    bits >> 53 == 0
}

/// A cycle of parabolas between `-height` and `height`.
#[derive(Clone, Debug)]
struct Wave {
    height: i64,
    /// Part of a period, in 2^-64, that passes in a microsecond.
    rate: u64,
    phase: u64,
}

impl Wave {
    fn new(height: i64, period_s: i64, phase: u64) -> Self {
        Self {
            height,
            rate: u64::MAX / (period_s.unsigned_abs() * 1_000_000),
            phase,
        }
    }

    #[inline]
    fn at(&self, span: Span) -> Ride {
        // Wrapping is intended: the phase counts modulo one period.
        let phase = (span.t0_us as u64)
            .wrapping_mul(self.rate)
            .wrapping_add(self.phase);
        Ride {
            height: self.height,
            phase,
            advance: self.rate.wrapping_mul(span.step_us),
        }
    }
}

/// Iterator over a wave at evenly spaced samples.
struct Ride {
    height: i64,
    phase: u64,
    advance: u64,
}

impl Ride {
    #[inline]
    fn next(&mut self) -> i64 {
        let height = if self.phase >> 63 == 0 {
            self.height
        } else {
            -self.height
        };
        let along = (self.phase << 1 >> 33) as i64;
        self.phase = self.phase.wrapping_add(self.advance);
        let arch = (along * ((1 << 31) - along)) >> 44;
        (height * arch) >> ONE_BITS
    }
}

/// Intervals of equal length, each with its own random bits.
#[derive(Clone, Debug)]
struct Plateaus {
    key: u64,
    length_us: i64,
    height: i64,
}

struct Plateau {
    end_us: i64,
    /// Whether the interval differs from the base level; one in eight does.
    raised: bool,
    /// Height of the step, if it does.
    step: i64,
}

impl Plateaus {
    fn at(&self, t_us: i64) -> Plateau {
        let number = t_us.div_euclid(self.length_us);
        let end_us = number.saturating_add(1).saturating_mul(self.length_us);
        let bits = hash::at(self.key, number as u64);
        let raised = bits >> 61 == 0;
        let step = if raised {
            hash::between(bits << 3, -self.height, self.height)
        } else {
            0
        };
        Plateau {
            end_us,
            raised,
            step,
        }
    }
}

/// Watt-hours accumulated at a constant power.
#[derive(Clone, Debug)]
struct Counter {
    /// Watt-hours per millisecond, in 2^-32.
    rate: i64,
    origin_us: i64,
}

impl Counter {
    /// Returns the watt-hours since the origin, in 65,536ths. With milliseconds, 30 years fit in an `i64`.
    fn at(&self, t_us: i64) -> i64 {
        let elapsed_ms = t_us.wrapping_sub(self.origin_us) / 1_000;
        elapsed_ms.wrapping_mul(self.rate) >> 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::channels;
    use crate::readings::Readings;

    const START_US: i64 = 1_750_000_000_000_000;

    fn span(first_sample: u64, rows: usize) -> Span {
        let t0_us = START_US + first_sample as i64 * 1_000_000;
        Span {
            first_sample,
            t0_us,
            step_us: 1_000_000,
            rows,
        }
    }

    fn column(device: u32, channel: usize, span: Span) -> Column {
        let mut column = Column::new(CATALOGUE[channel % CATALOGUE.len()].kind);
        Signal::new(1, device, channel, START_US).fill(span, &mut column);
        column
    }

    fn integers(device: u32, channel: usize, span: Span) -> Vec<i64> {
        match column(device, channel, span).values {
            Values::Integer(values) => values,
            other => panic!("not an integer channel: {other:?}"),
        }
    }

    #[test]
    fn samples_do_not_depend_on_where_a_span_begins() {
        for (channel, model) in CATALOGUE.iter().enumerate() {
            let whole = column(3, channel, span(0, 20_000));
            let part = column(3, channel, span(12_345, 777));
            let rows = 12_345..12_345 + 777;
            let same = match (&whole.values, &part.values) {
                (Values::Integer(whole), Values::Integer(part)) => whole[rows.clone()] == part[..],
                (Values::F32(whole), Values::F32(part)) => whole[rows.clone()] == part[..],
                (Values::F64(whole), Values::F64(part)) => whole[rows.clone()] == part[..],
                (Values::Bool(whole), Values::Bool(part)) => whole[rows.clone()] == part[..],
                _ => false,
            };
            assert!(same, "{}", model.name);
            let nulls = |column: &Column, from: usize| -> Vec<bool> {
                (from..from + 777)
                    .map(|row| column.nulls.contains(row))
                    .collect()
            };
            assert_eq!(nulls(&whole, 12_345), nulls(&part, 0));
        }
    }

    #[test]
    fn neighbouring_samples_differ_little_enough_for_delta_encoding() {
        for channel in (0..CATALOGUE.len()).filter(|&c| CATALOGUE[c].kind == Kind::Integer) {
            for device in 0..20 {
                let values = integers(device, channel, span(0, 20_000));
                let zigzag = |pair: &[i64]| (pair[1] - pair[0]).unsigned_abs() * 2;
                let mean = values.windows(2).map(zigzag).sum::<u64>() / (values.len() as u64 - 1);
                assert!(
                    mean < 32,
                    "{}: mean zigzag delta {mean}",
                    CATALOGUE[channel].name
                );
                if CATALOGUE[channel].name == "temperature" {
                    let narrow = values
                        .windows(2)
                        .map(zigzag)
                        .filter(|&delta| delta < 16)
                        .count();
                    assert!(
                        narrow * 1_000 > values.len() * 999,
                        "4 bits hold only {narrow}"
                    );
                }
            }
        }
    }

    #[test]
    fn signals_move_through_the_day_and_stay_plausible() {
        let day = Span {
            first_sample: 0,
            t0_us: START_US,
            step_us: 60_000_000,
            rows: 1_440,
        };
        for device in 0..50 {
            for (channel, model) in CATALOGUE.iter().enumerate() {
                if model.kind != Kind::Integer {
                    continue;
                }
                let values = integers(device, channel, day);
                let (low, high) = (values.iter().min().unwrap(), values.iter().max().unwrap());
                assert!(
                    high - low >= 2 * model.day.0,
                    "{} does not change",
                    model.name
                );
                assert!(
                    *low >= 0 || model.name == "temperature",
                    "{} is {low}",
                    model.name
                );
                assert!(
                    *high <= 1_000 || model.name != "humidity",
                    "humidity is {high}"
                );
            }
        }
    }

    #[test]
    fn the_energy_meter_never_runs_backwards() {
        let week = Span {
            first_sample: 0,
            t0_us: START_US,
            step_us: 300_000_000,
            rows: 2_016,
        };
        for device in 0..50 {
            let Values::F64(values) = column(device, 7, week).values else {
                panic!()
            };
            assert!(values.is_sorted(), "device {device}");
            assert!(
                values[2_015] - values[0] > 10.0,
                "device {device} counts too little"
            );
        }
    }

    #[test]
    fn few_samples_are_null_and_a_door_opens_sometimes() {
        let door = column(0, 8, span(0, 200_000));
        assert!(
            (60..140).contains(&door.nulls.count()),
            "{} nulls",
            door.nulls.count()
        );
        let Values::Bool(values) = door.values else {
            panic!()
        };
        let open = values.iter().filter(|&&open| open).count();
        assert!(
            (10_000..45_000).contains(&open),
            "open for {open} of 200,000 s"
        );
    }

    #[test]
    fn devices_and_channels_of_one_model_differ() {
        let values = |device, channel| integers(device, channel, span(0, 50));
        assert_ne!(values(0, 0), values(1, 0));
        assert_ne!(values(0, 0), values(0, 12));
    }

    #[test]
    fn values_never_change_within_a_plan_format() {
        // If this fails, the signals have changed: increase the plan format number, so that no
        // journal of an older program is verified against other values.
        let mut readings = Readings::default();
        readings.reset(&channels(12));
        let mut digest = 0;
        for (channel, column) in readings.columns.iter_mut().enumerate() {
            Signal::new(9, 4, channel, START_US).fill(span(1_000_000, 5_000), column);
            let bits: Vec<u64> = match &column.values {
                Values::Integer(values) => values.iter().map(|&value| value as u64).collect(),
                Values::F32(values) => values.iter().map(|v| u64::from(v.to_bits())).collect(),
                Values::F64(values) => values.iter().map(|value| value.to_bits()).collect(),
                Values::Bool(values) => values.iter().map(|&value| u64::from(value)).collect(),
            };
            let nulls = (0..5_000)
                .filter(|&row| column.nulls.contains(row))
                .map(|row| row as u64);
            digest = bits
                .into_iter()
                .chain(nulls)
                .fold(digest, |digest, b| hash::key(&[digest, b]));
        }
        assert_eq!(digest, 0xB5FD_ADAE_43EC_F9A4, "{digest:#018x}");
    }

    #[test]
    fn extreme_times_and_sample_numbers_do_not_overflow() {
        for t0_us in [i64::MIN, i64::MAX] {
            let edge = Span {
                first_sample: u64::MAX,
                t0_us,
                step_us: u64::MAX,
                rows: 3,
            };
            for channel in 0..CATALOGUE.len() {
                column(0, channel, edge);
            }
        }
    }
}
