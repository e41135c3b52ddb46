//! The values of all settings, for the log and for reloads.

use std::ffi::OsStr;
use std::fmt;

use crate::config::store_url::without_password;
use clap::{ArgMatches, Command};

/// A setting and its value from any source, without passwords.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingValue {
    pub flag: String,
    /// Empty if there is none.
    pub value: String,
    pub is_default: bool,
}

impl fmt::Display for SettingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.flag, self.value)
    }
}

/// Returns every setting of the subcommand; none for a subcommand without settings of its own.
pub fn setting_values(matches: &ArgMatches) -> Vec<SettingValue> {
    let mut command = super::command();
    command.build();
    let Some((name, matches)) = matches.subcommand() else {
        return Vec::new();
    };
    let args = command.find_subcommand(name).into_iter();
    let args = args.flat_map(Command::get_arguments);
    let values = args.filter_map(|arg| {
        let flag = arg.get_long()?.to_owned();
        let given = matches.try_get_raw(arg.get_id().as_str()).ok()?;
        let is_given = given.is_some();
        let text = |value: &OsStr| without_password(&value.to_string_lossy());
        let given: Vec<_> = given.into_iter().flatten().map(text).collect();
        let default: Vec<_> = arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy().into_owned())
            .collect();
        Some(SettingValue {
            flag,
            is_default: !is_given || given == default,
            value: given.join(","),
        })
    });
    values.collect()
}
