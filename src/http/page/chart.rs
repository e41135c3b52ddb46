//! A chart of a series as SVG: the extremes of each interval, with a break where readings are missing.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;

use crate::store::admin::history::{INTERVALS, Interval};

const WIDTH: u32 = 480;
const HEIGHT: u32 = 170;
const FONT: (&str, u32) = ("sans-serif", 14);
/// Values beyond this are not drawn, because differences of them may be infinite.
const VALUE_MAX: f64 = 1e300;
/// Smallest height of a chart, as a part of its values: differences of doubles become coarse below it.
const HEIGHT_MIN: f64 = 1e-9;
/// A distance that is longer than this many times the median is a break in the line.
const BREAK: i64 = 3;

/// Time that a chart covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Name in the query of the page.
    pub(super) name: &'static str,
    pub(super) label: &'static str,
    pub(super) duration_us: i64,
    /// Distance of the labels of the time axis.
    label_every_us: i64,
    /// Format of the labels, as in strftime.
    label_format: &'static str,
}

const MINUTE_US: i64 = 60_000_000;

/// Ranges that can be chosen; the first one is the default.
pub(super) const RANGES: [Range; 3] = [
    Range {
        name: "1h",
        label: "Last hour",
        duration_us: 60 * MINUTE_US,
        label_every_us: 15 * MINUTE_US,
        label_format: "%H:%M",
    },
    Range {
        name: "1d",
        label: "Last day",
        duration_us: 1440 * MINUTE_US,
        label_every_us: 360 * MINUTE_US,
        label_format: "%H:%M",
    },
    Range {
        name: "30d",
        label: "Last 30 days",
        duration_us: 30 * 1440 * MINUTE_US,
        label_every_us: 7 * 1440 * MINUTE_US,
        label_format: "%m-%d",
    },
];

impl Range {
    pub(super) fn interval_us(&self) -> i64 {
        self.duration_us / INTERVALS
    }
}

/// Draws the intervals of a series from `begin_us` on. Returns `None` if no value can be drawn.
pub(super) fn svg(intervals: &[Interval], begin_us: i64, range: &Range) -> Option<String> {
    let lines = lines(intervals);
    let values = lines.iter().flatten().map(|(_, value)| *value);
    let (low, high) = values.fold(None, |found: Option<(f64, f64)>, value| {
        let (low, high) = found.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })?;
    let mut text = String::new();
    // It fails only if a label cannot be written, and a String takes everything.
    draw(&mut text, &lines, axis(low, high), begin_us, range).ok()?;
    Some(text)
}

/// Returns the range of the values with a margin.
fn axis(low: f64, high: f64) -> std::ops::Range<f64> {
    let size = low.abs().max(high.abs());
    let margin = match high - low {
        height if height > size * HEIGHT_MIN => height * 0.05,
        _ if size > 0.0 => size * 0.01,
        _ => 1.0,
    };
    low - margin..high + margin
}

/// Returns the lines between breaks, as points of interval and value. An interval has a point for its smallest and one
/// for its largest value.
fn lines(intervals: &[Interval]) -> Vec<Vec<(f64, f64)>> {
    let is_drawn = |value: f64| value.abs() <= VALUE_MAX;
    let drawn: Vec<(i64, Option<(f64, f64)>)> = intervals
        .iter()
        .map(|interval| {
            let extremes = interval.extremes;
            let extremes = extremes.filter(|(low, high)| is_drawn(*low) && is_drawn(*high));
            (interval.index, extremes)
        })
        .collect();
    let mut distances: Vec<i64> = drawn.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    distances.sort_unstable();
    let median = distances.get(distances.len() / 2).copied().unwrap_or(1);
    let mut lines: Vec<Vec<(f64, f64)>> = Vec::new();
    let mut last = None;
    for (index, extremes) in drawn {
        let is_break = last.is_none_or(|last| index - last > BREAK * median);
        let Some((low, high)) = extremes else {
            last = None;
            continue;
        };
        if is_break {
            lines.push(Vec::new());
        }
        last = Some(index);
        let at = index as f64 + 0.5;
        if let Some(line) = lines.last_mut() {
            line.push((at, low));
            if high > low {
                line.push((at, high));
            }
        }
    }
    lines
}

fn draw(
    text: &mut String,
    lines: &[Vec<(f64, f64)>],
    values: std::ops::Range<f64>,
    begin_us: i64,
    range: &Range,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(text, (WIDTH, HEIGHT)).into_drawing_area();
    let mut chart = ChartBuilder::on(&area)
        .margin(6)
        .margin_right(16)
        .x_label_area_size(22)
        .y_label_area_size(64)
        .build_cartesian_2d(TimeAxis { begin_us, range }, values)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(FONT)
        .y_labels(4)
        .y_label_formatter(&|value| value_text(*value))
        .draw()?;
    for line in lines {
        match &line[..] {
            [point] => {
                let point = Circle::new(*point, 2, BLUE.filled());
                chart.draw_series([point])?;
            }
            points => {
                chart.draw_series(LineSeries::new(points.iter().copied(), BLUE))?;
            }
        }
    }
    area.present()?;
    Ok(())
}

/// The horizontal axis, in intervals from its begin.
struct TimeAxis<'a> {
    begin_us: i64,
    range: &'a Range,
}

impl TimeAxis<'_> {
    fn time_us(&self, interval: f64) -> i64 {
        self.begin_us + (interval * self.range.interval_us() as f64).round() as i64
    }
}

impl Ranged for TimeAxis<'_> {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, interval: &f64, pixels: (i32, i32)) -> i32 {
        let width = f64::from(pixels.1 - pixels.0);
        pixels.0 + (interval / INTERVALS as f64 * width).round() as i32
    }

    /// Returns the multiples of the distance of the labels.
    fn key_points<H: KeyPointHint>(&self, _: H) -> Vec<f64> {
        let every_us = self.range.label_every_us;
        let first_us = (self.begin_us.div_euclid(every_us) + 1) * every_us;
        let labels = std::iter::successors(Some(first_us), |us| Some(us + every_us));
        let intervals =
            labels.map(|us| (us - self.begin_us) as f64 / self.range.interval_us() as f64);
        intervals
            .take_while(|interval| *interval < INTERVALS as f64)
            .collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        0.0..INTERVALS as f64
    }
}

impl ValueFormatter<f64> for TimeAxis<'_> {
    fn format_ext(&self, interval: &f64) -> String {
        let at = Timestamp::from_microsecond(self.time_us(*interval)).unwrap_or_default();
        let at = at.to_zoned(TimeZone::UTC);
        at.strftime(self.range.label_format).to_string()
    }
}

/// Formats a value of the axis in few characters.
fn value_text(value: f64) -> String {
    let size = value.abs();
    match size {
        0.0 => "0".to_owned(),
        _ if (0.001..100_000.0).contains(&size) => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(index: i64, extremes: Option<(f64, f64)>) -> Interval {
        Interval {
            index,
            extremes,
            is_cut: false,
        }
    }

    #[test]
    fn missing_readings_break_the_line() {
        let at = |index, value| interval(index, Some((value, value)));
        let found = lines(&[at(0, 1.0), at(1, 2.0), at(2, 1.0), at(9, 3.0), at(10, 3.0)]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[1], [(9.5, 3.0), (10.5, 3.0)]);
        // A value that was sampled and is invalid.
        let found = lines(&[at(0, 1.0), interval(1, None), at(2, 1.0)]);
        assert_eq!(found, [[(0.5, 1.0)], [(2.5, 1.0)]]);
        // A slow series has no breaks.
        let slow: Vec<Interval> = (0..10).map(|n| at(n * 20, 1.0)).collect();
        assert_eq!(lines(&slow).len(), 1);
        let wide = lines(&[interval(3, Some((1.0, 2.0)))]);
        assert_eq!(wide, [[(3.5, 1.0), (3.5, 2.0)]]);
    }

    #[test]
    fn every_value_ends_in_a_chart_or_in_none() {
        let values = [
            0.0,
            -0.0,
            1.0,
            1e16,
            1e16 + 2.0,
            5e-324,
            1e300,
            -1e300,
            f64::MAX,
            f64::INFINITY,
            f64::NEG_INFINITY,
        ];
        for low in values {
            for high in values {
                let both = [
                    interval(0, Some((low, low))),
                    interval(7, Some((high, high))),
                ];
                for range in &RANGES {
                    let chart = svg(&both, 1_700_000_000_000_000, range);
                    let is_drawn = low.abs() <= VALUE_MAX || high.abs() <= VALUE_MAX;
                    assert_eq!(chart.is_some(), is_drawn, "{low} {high}");
                    let chart = chart.unwrap_or_default();
                    assert!(!chart.contains("NaN") && !chart.contains("inf"), "{chart}");
                }
            }
        }
        assert_eq!(svg(&[], 0, &RANGES[0]), None);
    }

    #[test]
    fn axes_have_round_labels() {
        let begin_us = 1_700_000_123_000_000;
        let chart = svg(&[interval(5, Some((20.0, 21.5)))], begin_us, &RANGES[0]).unwrap();
        for label in ["22:30", "22:45", "23:00", "23:15", "20.5"] {
            assert!(chart.contains(label), "{label}: {chart}");
        }
        for (value, text) in [
            (0.25, "0.25"),
            (-3.0, "-3"),
            (1e9, "1.00e9"),
            (1e-7, "1.00e-7"),
        ] {
            assert_eq!(value_text(value), text);
        }
    }
}
