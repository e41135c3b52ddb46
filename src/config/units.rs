//! Parses sizes and durations with units: `64MiB`, `1.5GB`, `500ms`, `2h 30m`.
//!
//! A number without a unit is in the setting's own unit, the suffix of its name.

use std::time::Duration;

use bytesize::ByteSize;

/// Unit of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Whole seconds.
    Seconds,
    /// Whole milliseconds.
    Milliseconds,
}

impl Unit {
    /// Returns the unit of the setting `name`, such as `idle-timeout-s` or `queue-bytes-max`; `None` for a
    /// plain number. A rate, such as `device-frames-per-s`, is a plain number.
    pub fn of_setting(name: &str) -> Option<Unit> {
        let name = name.trim_end_matches("-max").trim_end_matches("-min");
        match name.rsplit('-').next() {
            _ if name.ends_with("-per-s") => None,
            Some("bytes") => Some(Unit::Bytes),
            Some("s") => Some(Unit::Seconds),
            Some("ms") => Some(Unit::Milliseconds),
            _ => None,
        }
    }

    /// Parses a whole number of this unit, written with or without a unit.
    ///
    /// # Errors
    /// Returns one line with the expected format.
    pub fn parse(self, text: &str) -> Result<u64, String> {
        match text.trim().parse() {
            Ok(number) => Ok(number),
            Err(_) => self.with_unit(text.trim()),
        }
    }

    fn with_unit(self, text: &str) -> Result<u64, String> {
        match self {
            Unit::Bytes => {
                let size = text.parse::<ByteSize>();
                let expected = "must be a size, such as 65536, 64KiB, 64MiB or 2GB";
                size.map(|size| size.as_u64()).map_err(|_| expected.into())
            }
            Unit::Seconds => {
                let expected = "must be whole seconds, such as 30, 30s or 5min";
                let duration = duration(text).filter(|it| it.subsec_nanos() == 0);
                let seconds = duration.map(|it| it.as_secs());
                seconds.ok_or_else(|| expected.into())
            }
            Unit::Milliseconds => {
                let expected = "must be whole milliseconds, such as 500, 500ms or 2s";
                let duration = duration(text).filter(|it| it.subsec_nanos() % 1_000_000 == 0);
                let millis = duration.and_then(|it| u64::try_from(it.as_millis()).ok());
                millis.ok_or_else(|| expected.into())
            }
        }
    }
}

fn duration(text: &str) -> Option<Duration> {
    humantime::parse_duration(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_ends_with_its_unit() {
        for (name, unit) in [
            ("queue-bytes-max", Some(Unit::Bytes)),
            ("cache-bytes", Some(Unit::Bytes)),
            ("idle-timeout-s", Some(Unit::Seconds)),
            ("keepalive-s", Some(Unit::Seconds)),
            ("failure-delay-max-ms", Some(Unit::Milliseconds)),
            ("commit-interval-min-ms", Some(Unit::Milliseconds)),
            ("device-frames-per-s", None),
            ("accepts-per-s-max", None),
            ("connections-max", None),
            ("listen", None),
        ] {
            assert_eq!(Unit::of_setting(name), unit, "{name}");
        }
    }

    #[test]
    fn units_are_parsed_exactly() {
        for (unit, text, number) in [
            (Unit::Bytes, "65536", 65_536),
            (Unit::Bytes, "64KiB", 65_536),
            (Unit::Bytes, "64 MiB", 64 << 20),
            (Unit::Bytes, "1.5GiB", 3 << 29),
            (Unit::Bytes, "2GB", 2_000_000_000),
            (Unit::Seconds, "30", 30),
            (Unit::Seconds, "30s", 30),
            (Unit::Seconds, "1h 30m", 5400),
            (Unit::Milliseconds, "500", 500),
            (Unit::Milliseconds, "500ms", 500),
            (Unit::Milliseconds, " 2s ", 2000),
        ] {
            assert_eq!(unit.parse(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn errors_name_the_expected_format() {
        for (unit, text, says) in [
            (Unit::Bytes, "a lot", "64MiB"),
            (Unit::Bytes, "", "64MiB"),
            (Unit::Bytes, "-5", "64MiB"),
            (Unit::Bytes, "30s", "64MiB"),
            (Unit::Seconds, "500ms", "whole seconds"),
            (Unit::Seconds, "64MiB", "whole seconds"),
            (Unit::Milliseconds, "5us", "whole milliseconds"),
        ] {
            let refused = unit.parse(text).unwrap_err();
            assert!(refused.contains(says), "{text}: {refused}");
        }
    }
}
