//! Parses the number of a setting, in the unit with which the setting's name ends, and checks its range.

use std::ffi::OsStr;
use std::marker::PhantomData;

use clap::builder::TypedValueParser;
use clap::{Arg, Command};

use super::units::Unit;

/// Returns the parser of a number from `min` to `max`. A size or duration, as its flag's name says, may have a
/// unit, such as `64MiB`.
pub fn number<N>(min: u64, max: u64) -> Number<N> {
    Number {
        min,
        max,
        number: PhantomData,
    }
}

/// See [`number`].
#[derive(Clone)]
pub struct Number<N> {
    min: u64,
    max: u64,
    number: PhantomData<N>,
}

impl<N: TryFrom<u64> + Clone + Send + Sync + 'static> TypedValueParser for Number<N> {
    type Value = N;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<N, clap::Error> {
        let unit = arg.and_then(Arg::get_long).and_then(Unit::of_setting);
        let (min, max) = (self.min, self.max);
        let parse = move |text: &str| {
            let number = match unit {
                Some(unit) => unit.parse(text)?,
                None => text
                    .parse()
                    .map_err(|_| "must be a whole number".to_owned())?,
            };
            let in_range = (min..=max).contains(&number).then_some(number);
            let number = in_range.and_then(|number| N::try_from(number).ok());
            number.ok_or_else(|| format!("must be from {min} to {max}"))
        };
        TypedValueParser::parse_ref(&parse, command, arg, value)
    }
}
