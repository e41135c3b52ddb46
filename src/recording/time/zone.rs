//! Converts local times to UTC.
//!
//! When clocks go back, an hour of local times repeats. The first pass is summer time; a row that
//! would then not be later than the previous row is winter time. When clocks go forward, an hour is
//! skipped; its times use the earlier offset.

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};

/// A time zone, as set with `--time-zone`.
#[derive(Clone, Debug)]
pub struct Zone(TimeZone);

/// Certainty of a UTC time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// The local time occurs once.
    Unique,
    /// The local time occurs twice.
    Twice,
    /// The local time does not exist.
    Never,
}

impl Zone {
    /// Returns the UTC zone.
    pub fn utc() -> Zone {
        Zone(TimeZone::UTC)
    }

    /// Parses an IANA time zone name, `UTC`, or an offset such as `+02:00`.
    ///
    /// # Errors
    /// The zone does not exist.
    pub fn parse(text: &str) -> Result<Zone, String> {
        if ["utc", "z", "gmt"].contains(&text.to_ascii_lowercase().as_str()) {
            return Ok(Zone::utc());
        }
        if let Some(offset) = offset(text) {
            return Ok(Zone(TimeZone::fixed(offset)));
        }
        TimeZone::get(text).map(Zone).map_err(|_| {
            format!("unknown time zone {text:?}; use a name such as Europe/Berlin, or an offset such as +02:00")
        })
    }

    /// Returns the UTC time in microseconds of a local time. `before_us` is the time of the
    /// previous row; `is_backwards` is true if the rows go back in time.
    pub fn resolve(
        &self,
        local: DateTime,
        before_us: Option<i64>,
        is_backwards: bool,
    ) -> Option<(i64, Certainty)> {
        let at = |offset: Offset| Some(offset.to_timestamp(local).ok()?.as_microsecond());
        match self.0.to_ambiguous_timestamp(local).offset() {
            AmbiguousOffset::Unambiguous { offset } => Some((at(offset)?, Certainty::Unique)),
            AmbiguousOffset::Gap { before, .. } => Some((at(before)?, Certainty::Never)),
            AmbiguousOffset::Fold { before, after } => {
                let (earlier_us, later_us) = (at(before)?, at(after)?);
                let is_second_pass = match (before_us, is_backwards) {
                    (None, is_backwards) => is_backwards,
                    (Some(before_us), false) => earlier_us <= before_us && later_us > before_us,
                    (Some(before_us), true) => later_us < before_us,
                };
                let us = if is_second_pass { later_us } else { earlier_us };
                Some((us, Certainty::Twice))
            }
        }
    }
}

fn offset(text: &str) -> Option<Offset> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'+' => (1, &text[1..]),
        b'-' => (-1, &text[1..]),
        _ => return None,
    };
    let (hours, minutes) = match digits.split_once(':') {
        Some(parts) => parts,
        None if digits.len() == 4 && digits.is_ascii() => digits.split_at(2),
        None => (digits, "0"),
    };
    let (hours, minutes): (i32, i32) = (hours.parse().ok()?, minutes.parse().ok()?);
    let is_offset = (0..=18).contains(&hours) && (0..60).contains(&minutes);
    let seconds = is_offset.then_some(sign * (hours * 3_600 + minutes * 60))?;
    Offset::from_seconds(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utc(
        zone: &str,
        local: &str,
        before: Option<&str>,
        is_backwards: bool,
    ) -> (String, Certainty) {
        let before_us =
            before.map(|time| time.parse::<jiff::Timestamp>().unwrap().as_microsecond());
        let zone = Zone::parse(zone).unwrap();
        let (us, certainty) = zone
            .resolve(local.parse().unwrap(), before_us, is_backwards)
            .unwrap();
        (
            jiff::Timestamp::from_microsecond(us).unwrap().to_string(),
            certainty,
        )
    }

    #[test]
    fn zones_have_names_or_offsets() {
        for (zone, expected) in [
            ("UTC", "2024-07-01T12:00:00Z"),
            ("+02:00", "2024-07-01T10:00:00Z"),
            ("-0330", "2024-07-01T15:30:00Z"),
            ("+5", "2024-07-01T07:00:00Z"),
            ("Europe/Berlin", "2024-07-01T10:00:00Z"),
            ("America/New_York", "2024-07-01T16:00:00Z"),
        ] {
            let expected = (expected.to_owned(), Certainty::Unique);
            assert_eq!(
                utc(zone, "2024-07-01T12:00", None, false),
                expected,
                "{zone}"
            );
        }
        for wrong in ["Berlin", "+25", "", "+1:75"] {
            assert!(Zone::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_repeated_hour_has_two_passes() {
        let passes = [
            ("02:00", "00:00"),
            ("02:30", "00:30"),
            ("02:00", "01:00"),
            ("02:30", "01:30"),
            ("03:00", "02:00"),
        ];
        let mut before: Option<String> = Some("2024-10-26T23:30:00Z".to_owned());
        for (local, expected) in passes {
            let local = format!("2024-10-27T{local}");
            let (time, _) = utc("Europe/Berlin", &local, before.as_deref(), false);
            assert_eq!(time, format!("2024-10-27T{expected}:00Z"), "{local}");
            before = Some(time);
        }
        let mut before: Option<String> = Some("2024-10-27T02:30:00Z".to_owned());
        for (local, expected) in passes.iter().rev() {
            let local = format!("2024-10-27T{local}");
            let (time, _) = utc("Europe/Berlin", &local, before.as_deref(), true);
            assert_eq!(time, format!("2024-10-27T{expected}:00Z"), "{local}");
            before = Some(time);
        }
    }

    #[test]
    fn the_skipped_hour_uses_the_earlier_offset() {
        let found = utc("Europe/Berlin", "2024-03-31T02:30", None, false);
        assert_eq!(found, ("2024-03-31T01:30:00Z".to_owned(), Certainty::Never));
    }
}
