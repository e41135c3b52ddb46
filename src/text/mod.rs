//! Formats times, sizes and codes for people: for the output of commands, and for the page.

use fieldgate_protocol::error::Code;
use jiff::Timestamp;

/// Formats a time in microseconds UTC, to the second.
pub fn utc_text(us: i64) -> String {
    match Timestamp::from_microsecond(us) {
        // Round down, so that no event appears to be in the future.
        Ok(time) => {
            let time = Timestamp::from_second(time.as_microsecond().div_euclid(1_000_000));
            time.map_or_else(|_| us.to_string(), |time| time.to_string())
        }
        // Beyond the year 9999, show the number.
        Err(_) => us.to_string(),
    }
}

/// Formats the age of a time, in its largest unit.
pub fn age(us: i64, now_us: i64) -> String {
    let ago_s = now_us.saturating_sub(us).div_euclid(1_000_000);
    match ago_s {
        ..0 => "in the future".to_owned(),
        0..120 => format!("{ago_s} s ago"),
        120..7200 => format!("{} min ago", ago_s / 60),
        7200..172_800 => format!("{} h ago", ago_s / 3600),
        _ => format!("{} days ago", ago_s / 86_400),
    }
}

/// Formats a size in the largest unit with a value of at least 1.
pub fn bytes_text(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if size < 1024.0 {
            return if unit == "B" {
                format!("{bytes} B")
            } else {
                format!("{size:.1} {unit}")
            };
        }
        size /= 1024.0;
    }
    format!("{size:.1} TiB")
}

/// Formats a protocol code with its name, if this version knows it.
pub fn code_text(code: i64) -> String {
    let known = u8::try_from(code).ok().and_then(Code::from_wire);
    match known {
        Some(known) => format!("{code} {}", known.name()),
        None => code.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc() {
        assert_eq!(utc_text(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc_text(-1), "1969-12-31T23:59:59Z");
        assert_eq!(utc_text(i64::MAX), i64::MAX.to_string());
        assert_eq!(age(0, 119_999_999), "119 s ago");
        assert_eq!(age(0, 7_199_000_000), "119 min ago");
        assert_eq!(age(1, 0), "in the future");
        assert_eq!(age(0, 172_800_000_000), "2 days ago");
    }

    #[test]
    fn sizes_have_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (1 << 30, "1.0 GiB"),
            (1 << 50, "1024.0 TiB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
    }

    #[test]
    fn codes_have_names() {
        assert_eq!(code_text(30), "30 malformed");
        assert_eq!(code_text(99), "99");
        assert_eq!(code_text(30 + 256), "286");
    }
}
