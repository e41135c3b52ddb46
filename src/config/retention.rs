//! Parses the rules that delete some readings earlier or later than the others.

use std::str::FromStr;

use wildmatch::WildMatch;

/// Days that readings are kept in the store; `None` if they are never deleted.
pub type Days = Option<u32>;

/// Retention of the readings whose device, channel and unit match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionRule {
    device: String,
    channel: String,
    unit: String,
    days: Days,
}

impl FromStr for RetentionRule {
    type Err = String;

    fn from_str(text: &str) -> Result<RetentionRule, String> {
        let mut rule = RetentionRule {
            device: "*".to_owned(),
            channel: "*".to_owned(),
            unit: "*".to_owned(),
            days: None,
        };
        let mut has_days = false;
        for part in text.split(',') {
            let (key, value) = part.trim().split_once('=').ok_or_else(usage)?;
            match key {
                "device" => rule.device = value.to_owned(),
                "channel" => rule.channel = value.to_owned(),
                "unit" => rule.unit = value.to_owned(),
                "days" => {
                    rule.days = days(value)?;
                    has_days = true;
                }
                _ => return Err(usage()),
            }
        }
        has_days.then_some(rule).ok_or_else(usage)
    }
}

/// Returns whether a text matches a pattern, in which `*` stands for any text and `?` for one character.
fn matches(pattern: &str, text: &str) -> bool {
    WildMatch::new(pattern).matches(text)
}

fn usage() -> String {
    "write device=PATTERN,channel=PATTERN,unit=PATTERN,days=DAYS; each pattern may be omitted, and days is required"
        .to_owned()
}

fn days(text: &str) -> Result<Days, String> {
    match text {
        "forever" => Ok(None),
        text => match text.parse() {
            Ok(days @ 1..=36_500) => Ok(Some(days)),
            _ => Err("days must be a whole number from 1 to 36500, or forever".to_owned()),
        },
    }
}

/// Returns the longer of two retentions.
fn longer(a: Days, b: Days) -> Days {
    Some(a?.max(b?))
}

/// Retention of readings: the default, and the rules that precede it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadingRetention {
    /// Days for series that no rule matches.
    pub days: Days,
    /// The first rule that matches a series applies.
    pub rules: Vec<RetentionRule>,
}

impl ReadingRetention {
    /// Returns the days of a series.
    pub fn days_of(&self, device: &str, channel: &str, unit: &str) -> Days {
        let matching = self.rules.iter().find(|rule| {
            matches(&rule.device, device)
                && matches(&rule.channel, channel)
                && matches(&rule.unit, unit)
        });
        matching.map_or(self.days, |rule| rule.days)
    }

    /// Returns the most days that any series can have.
    pub fn longest(&self) -> Days {
        let rules = self.rules.iter().map(|rule| rule.days);
        rules.fold(self.days, longer)
    }

    /// Returns the most days that any series of a device can have.
    pub fn longest_of(&self, device: &str) -> Days {
        let mut longest = Some(0);
        let rules = { self.rules.iter() }.filter(|rule| matches(&rule.device, device));
        for rule in rules {
            longest = longer(longest, rule.days);
            if rule.channel == "*" && rule.unit == "*" {
                return longest;
            }
        }
        longer(longest, self.days)
    }

    /// Returns whether any reading can be deleted.
    pub fn is_limited(&self) -> bool {
        self.days.is_some() || self.rules.iter().any(|rule| rule.days.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retention(days: Days, rules: &[&str]) -> ReadingRetention {
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        ReadingRetention { days, rules }
    }

    #[test]
    fn the_first_matching_rule_applies() {
        let retention = retention(
            Some(90),
            &[
                "device=pump-*, channel=vib*,days=7",
                "unit=Cel,days=forever",
            ],
        );
        assert_eq!(retention.days_of("pump-1", "vibration", "mm/s"), Some(7));
        assert_eq!(retention.days_of("pump-1", "vibration", "Cel"), Some(7));
        assert_eq!(retention.days_of("fan-1", "vibration", "Cel"), None);
        assert_eq!(retention.days_of("fan-1", "vibration", "mm/s"), Some(90));
        assert_eq!(retention.longest(), None);
        assert!(retention.is_limited());
    }

    #[test]
    fn the_longest_retention_is_that_of_any_series() {
        assert_eq!(
            retention(Some(90), &["days=400", "days=7"]).longest(),
            Some(400)
        );
        assert_eq!(retention(None, &["days=7"]).longest(), None);
        assert!(!retention(None, &[]).is_limited());
        assert!(retention(None, &["days=7"]).is_limited());
    }

    #[test]
    fn the_longest_retention_of_a_device_depends_on_the_rules_for_it() {
        let retention = retention(
            Some(90),
            &["device=pump-*,channel=vib*,days=400", "device=fan-*,days=7"],
        );
        assert_eq!(retention.longest_of("pump-1"), Some(400));
        assert_eq!(retention.longest_of("fan-1"), Some(7));
        assert_eq!(retention.longest_of("lamp-1"), Some(90));
    }

    #[test]
    fn a_wrong_rule_is_explained() {
        for (rule, word) in [
            ("", "write"),
            ("device=a", "days is required"),
            ("device=a,days=0", "1 to 36500"),
            ("days=1d", "1 to 36500"),
            ("name=a,days=1", "write"),
            ("7", "write"),
        ] {
            let error = rule.parse::<RetentionRule>().unwrap_err();
            assert!(error.contains(word), "{rule}: {error}");
        }
    }
}
