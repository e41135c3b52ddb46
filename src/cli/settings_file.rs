//! The settings file: its values become the defaults of the flags, so that all sources share the parsing, checks and
//! precedence of the command line.
//!
//! Invariant: nothing in the file is ignored. A key that is not a flag, or a value that its flag rejects, ends the
//! program before it does anything, even if the subcommand does not have the flag.

use std::any::TypeId;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::store_url::without_password;
use crate::config::units::Unit;
use clap::{Arg, ArgAction, Command};
use toml::{Table, Value};

use super::nearest::nearest;
use super::{SETTINGS_COMMANDS, rendered, with_settings};

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("could not read settings file {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("settings file {}, line {line}: {message}", path.display())]
    Syntax {
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        message: String,
    },
    #[error("settings file {}: unknown setting {key:?}; did you mean {nearest:?}?", path.display())]
    UnknownKey {
        path: PathBuf,
        key: String,
        nearest: String,
    },
    #[error("settings file {}: {key:?} cannot be set in a file; use --{key} on the command line", path.display())]
    NotASetting { path: PathBuf, key: String },
    #[error("settings file {}: {key} = {value}: {fault}", path.display())]
    Value {
        path: PathBuf,
        key: String,
        /// The value, without passwords.
        value: String,
        fault: String,
    },
}

#[derive(Debug)]
pub struct SettingsFile(Table);

/// Reads a file without interpreting its keys.
pub fn read(path: &Path) -> Result<SettingsFile, FileError> {
    let text = fs::read_to_string(path).map_err(|source| FileError::Read {
        path: path.to_owned(),
        source,
    })?;
    let table = toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let before = &text.as_bytes()[..start.min(text.len())];
        FileError::Syntax {
            path: path.to_owned(),
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
            message: error.message().replace('\n', "; "),
        }
    })?;
    Ok(SettingsFile(table))
}

impl SettingsFile {
    /// Uses the file's values as defaults for the settings of `command`; `path` appears in errors.
    pub fn apply(&self, mut command: Command, path: &Path) -> Result<Command, FileError> {
        let flags: Vec<Arg> = setting_flags(&command).cloned().collect();
        for (key, value) in &self.0 {
            let Some(flag) = flags.iter().find(|flag| flag.get_long() == Some(key)) else {
                let (path, key) = (path.to_owned(), key.clone());
                if is_flag(&command, &key) {
                    return Err(FileError::NotASetting { path, key });
                }
                let names = flags.iter().filter_map(|flag| flag.get_long());
                let nearest = nearest(&key, names).unwrap_or_default().to_owned();
                return Err(FileError::UnknownKey { path, key, nearest });
            };
            let text = text_of(flag, value)
                .map_err(str::to_owned)
                .and_then(|text| try_out(flag, &text).map(|()| text))
                .map_err(|fault| FileError::Value {
                    path: path.to_owned(),
                    key: key.clone(),
                    value: shown(value),
                    fault,
                })?;
            command = set_default(command, key, &text);
        }
        Ok(command)
    }
}

/// Returns the names of all settings that a file may contain.
pub fn settings(command: &Command) -> impl Iterator<Item = &str> {
    setting_flags(command).filter_map(Arg::get_long)
}

/// Returns the flags that are settings, except `--config`.
pub(super) fn setting_flags(command: &Command) -> impl Iterator<Item = &Arg> {
    let serve = command.find_subcommand(SETTINGS_COMMANDS[0][0]);
    let serve = serve.into_iter().flat_map(Command::get_arguments);
    command.get_arguments().chain(serve).filter(|arg| {
        arg.get_long()
            .is_some_and(|long| !["config", "help", "version"].contains(&long))
    })
}

fn is_flag(command: &Command, name: &str) -> bool {
    let mut flags = command.get_arguments().filter_map(Arg::get_long);
    flags.any(|long| long == name) || command.get_subcommands().any(|it| is_flag(it, name))
}

/// Converts a value to its command-line form. Fails if its type does not match the flag.
fn text_of(flag: &Arg, value: &Value) -> Result<String, &'static str> {
    let parser = flag.get_value_parser().type_id();
    let is_number = [
        TypeId::of::<u8>(),
        TypeId::of::<u16>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
        TypeId::of::<usize>(),
    ]
    .iter()
    .any(|number| parser == *number);
    let unit = flag.get_long().and_then(Unit::of_setting);
    match (flag.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(value)) => Ok(value.to_string()),
        (ArgAction::SetTrue, _) => Err("must be true or false"),
        (_, Value::Integer(value)) if is_number => Ok(value.to_string()),
        (_, Value::String(value)) if is_number && unit.is_some() => Ok(value.clone()),
        (_, _) if is_number => Err("must be a whole number"),
        (_, Value::String(value)) => Ok(value.clone()),
        (_, _) => Err("must be a quoted string"),
    }
}

/// Formats a rejected value without passwords, which a store URL may contain.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => Value::from(without_password(text)).to_string(),
        // No flag accepts these types.
        Value::Array(_) => "[…]".to_owned(),
        Value::Table(_) => "{…}".to_owned(),
        value => value.to_string(),
    }
}

/// Checks a value with the flag's own parser. Errors in a default value would be reported as errors of the program.
pub(super) fn try_out(flag: &Arg, text: &str) -> Result<(), String> {
    let name = flag.get_long().unwrap_or_default();
    let flag = flag
        .clone()
        .action(ArgAction::Set)
        .num_args(1)
        .env(None::<&'static str>);
    let refused = Command::new("settings")
        .no_binary_name(true)
        .arg(flag)
        .try_get_matches_from([format!("--{name}={text}")]);
    let Err(error) = refused else {
        return Ok(());
    };
    let rendered = rendered(&error);
    let paragraph = rendered.split("\n\n").next().unwrap_or_default();
    let paragraph = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    // Keep only "why" of "error: invalid value '0' for '--some-flag <N>': why".
    let why = match paragraph.split_once(">': ").or(paragraph.split_once(">' ")) {
        Some((_, why)) => why.trim_matches(['[', ']']),
        None => paragraph.trim_start_matches("error: "),
    };
    Err(why.to_owned())
}

fn set_default(command: Command, key: &str, text: &str) -> Command {
    let set = |arg: Arg| match arg.get_long() == Some(key) {
        true => arg.default_value(text.to_owned()),
        false => arg,
    };
    with_settings(command, set)
}
