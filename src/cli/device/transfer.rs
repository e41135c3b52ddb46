//! `fieldgate device export|import`: devices as CSV.
//!
//! Each line is a device: its name, whether it is enabled (yes or no), its key version, and its individual key as
//! 64 hexadecimal digits. The last field is empty for a derived key, and `-` for an individual key that the file
//! does not contain. An omitted column leaves existing devices unchanged.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::auth::device_key::DeviceKey;
use crate::auth::fleet_key::FleetKey;
use crate::config::store_url::StoreUrl;
use crate::store::admin::device::{self, DeviceState, StoredKey};
use crate::store::admin::{Access, Connection};
use crate::sys::secret_file::create_secret;
use clap::Args;
use serde::{Deserialize, Deserializer, Serialize};

use super::change::{Wanted, edit, next_version, seal};
use super::{device_name, key};
use crate::cli::Error;
use crate::cli::fleet_key::FleetKeyFile;
use crate::cli::output;

/// Devices per transaction. While a transaction is open, a gateway on SQLite acknowledges nothing.
const DEVICES_AT_ONCE: usize = 100;
const COLUMNS: [&str; 4] = ["name", "enabled", "key_version", "own_key"];
/// Stands for an individual key that the file does not contain.
const OMITTED: &str = "-";

#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Include individual device keys. Anyone with the file can then impersonate the devices
    #[arg(long)]
    with_keys: bool,

    /// Output file, readable by this user only; must not exist [default: standard output]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct ImportArgs {
    /// CSV file with the columns name, enabled (yes or no), key_version and own_key (empty for a derived key); -
    /// for standard input. All columns but the first are optional: existing devices keep their values; new ones
    /// are enabled with the first derived key
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// A line of the file. The field of an omitted column is `None`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: String,
    #[serde(default, deserialize_with = "field")]
    enabled: Option<String>,
    #[serde(default, deserialize_with = "field")]
    key_version: Option<u32>,
    #[serde(default, deserialize_with = "field")]
    own_key: Option<String>,
}

/// Reads a field of an existing column. An empty field is a value, not `None`.
fn field<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

pub async fn export(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &ExportArgs,
) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Read).await?;
    let devices = device::all(&mut connection).await?;
    let has_own = devices.iter().any(|device| device.key.sealed.is_some());
    let fleet = match args.with_keys && has_own {
        true => Some(key_file.load(store).await?),
        false => None,
    };
    let mut csv = csv::Writer::from_writer(Vec::new());
    let mut omitted = 0;
    for device in devices {
        let own_key = match (&device.key.sealed, &fleet) {
            (None, _) => String::new(),
            (Some(_), Some(fleet)) => key::open(fleet, &device.name, &device.key)?.to_digits(),
            (Some(_), None) => {
                omitted += 1;
                OMITTED.to_owned()
            }
        };
        let line = Line {
            name: device.name,
            enabled: Some(if device.is_enabled { "yes" } else { "no" }.to_owned()),
            key_version: Some(device.key.version),
            own_key: Some(own_key),
        };
        csv.serialize(line).map_err(cannot_write)?;
    }
    let text = csv
        .into_inner()
        .map_err(|error| cannot_write(error.into_error().into()))?;
    let text = String::from_utf8_lossy(&text);
    match &args.out {
        Some(path) => create_secret(path, &text).map_err(|error| {
            Error::Failed(format!("could not write {}: {error}", path.display()))
        })?,
        None => {
            let mut out = output::stdout();
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
    }
    if omitted > 0 {
        tracing::warn!(
            keys = omitted,
            "individual device keys omitted; use --with-keys to export them"
        );
    }
    Ok(())
}

fn cannot_write(error: csv::Error) -> Error {
    Error::Output(error.into())
}

/// Updates devices to match the file.
pub async fn import(
    key_file: FleetKeyFile<'_>,
    store: &StoreUrl,
    args: &ImportArgs,
) -> Result<(), Error> {
    let lines = read(&args.file)?;
    let fleet = key_file.load(store).await?;
    let names: Vec<String> = lines.iter().map(|(_, line)| line.name.clone()).collect();
    let by_name: HashMap<&str, &(usize, Line)> = lines
        .iter()
        .map(|line| (line.1.name.as_str(), line))
        .collect();
    let (mut added, mut changed, mut same) = (0, 0, 0);
    for names in names.chunks(DEVICES_AT_ONCE) {
        let mut are_new = 0;
        let set = edit(store, names, |name, before| {
            are_new += u64::from(before.is_none());
            let (number, line) = by_name[name];
            wanted(&fleet, line, before)
                .map(Some)
                .map_err(|fault| fault.of(&args.file, *number))
        })
        .await
        .map_err(|error| match added + changed + same {
            0 => error,
            done => Error::Failed(format!(
                "{error}; the {done} devices before line {} were imported, the rest are unchanged",
                by_name[names[0].as_str()].0
            )),
        })?;
        let are_set = set.values().filter(|is_changed| **is_changed).count() as u64;
        added += are_new;
        changed += are_set - are_new;
        same += set.len() as u64 - are_set;
    }
    let mut out = output::stdout();
    writeln!(out, "{added} added, {changed} changed, {same} unchanged")?;
    out.flush().map_err(Error::Output)
}

enum Fault {
    Line(String),
    Other(Error),
}

impl Fault {
    fn of(self, file: &Path, number: usize) -> Error {
        match self {
            Fault::Line(fault) => {
                Error::Failed(format!("{}, line {number}: {fault}", file.display()))
            }
            Fault::Other(error) => error,
        }
    }
}

fn wanted(fleet: &FleetKey, line: &Line, before: Option<&DeviceState>) -> Result<Wanted, Fault> {
    let is_enabled = match &line.enabled {
        Some(enabled) => enabled == "yes",
        None => before.is_none_or(|before| before.is_enabled),
    };
    Ok((is_enabled, wanted_key(fleet, line, before)?))
}

fn wanted_key(
    fleet: &FleetKey,
    line: &Line,
    before: Option<&DeviceState>,
) -> Result<StoredKey, Fault> {
    let before = before.map(|before| &before.key);
    let kept = before.filter(|before| before.sealed.is_some());
    let version_or = |otherwise| line.key_version.unwrap_or(otherwise);
    // Count up as `rotate-key` does: with the current version, a replaced key could become valid again.
    let next_version = || match (line.key_version, before) {
        (Some(version), _) => Ok(version),
        (None, Some(before)) => next_version(before).map_err(Fault::Line),
        (None, None) => Ok(0),
    };
    match (line.own_key.as_deref(), kept) {
        (None, Some(kept)) if version_or(kept.version) == kept.version => Ok(kept.clone()),
        (None, Some(_)) => {
            let fault = "key_version cannot replace an individual key; add an empty own_key column to switch to \
                 the derived key";
            Err(Fault::Line(fault.to_owned()))
        }
        (Some(""), Some(_)) => Ok(StoredKey {
            version: next_version()?,
            sealed: None,
        }),
        (None | Some(""), None) => Ok(StoredKey {
            version: version_or(before.map_or(0, |before| before.version)),
            sealed: None,
        }),
        (Some(OMITTED), Some(kept)) => Ok(kept.clone()),
        (Some(OMITTED), None) => {
            let fault =
                "the file does not contain the device's individual key; export it with --with-keys";
            Err(Fault::Line(fault.to_owned()))
        }
        (Some(digits), kept) => {
            let own = DeviceKey::parse(digits).map_err(no_key)?;
            let has_it = |kept: &&StoredKey| {
                key::open(fleet, &line.name, kept).is_ok_and(|kept| kept == own)
            };
            match kept.filter(has_it) {
                Some(kept) => Ok(kept.clone()),
                None => Ok(StoredKey {
                    version: next_version()?,
                    sealed: Some(seal(fleet, &line.name, own).map_err(Fault::Other)?),
                }),
            }
        }
    }
}

fn no_key(error: impl std::fmt::Display) -> Fault {
    Fault::Line(format!(
        "own_key is invalid: {error}; a key is 64 hexadecimal digits"
    ))
}

/// Reads and checks all lines of the file. Returns them with their line numbers.
fn read(path: &Path) -> Result<Vec<(usize, Line)>, Error> {
    let cannot =
        |fault: String| Error::Failed(format!("could not read {}: {fault}", path.display()));
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        io::stdin().read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|mut file| file.read_to_end(&mut bytes))
    }
    .map_err(|error| cannot(error.to_string()))?;
    lines(&bytes, path)
}

fn lines(bytes: &[u8], path: &Path) -> Result<Vec<(usize, Line)>, Error> {
    let cannot =
        |fault: String| Error::Failed(format!("could not read {}: {fault}", path.display()));
    // Spreadsheets write a byte order mark.
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let mut csv = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_reader(bytes);
    let headers = csv
        .headers()
        .map_err(|error| cannot(fault(bytes, &error)))?;
    let headers = headers.clone();
    if let Some(fault) = other_separator(&headers) {
        return Err(cannot(fault));
    }
    if let Some(fault) = header_fault(&headers) {
        let number = line_number(bytes, headers.position());
        return Err(cannot(format!("line {number}: {fault}")));
    }
    let mut lines = Vec::new();
    let mut seen = HashMap::new();
    for record in csv.records() {
        let record = record.map_err(|error| cannot(fault(bytes, &error)))?;
        let number = line_number(bytes, record.position());
        let line: Result<Line, csv::Error> = record.deserialize(Some(&headers));
        let line = line.map_err(|error| cannot(fault(bytes, &error)))?;
        check(&line).map_err(|fault| fault.of(path, number))?;
        if let Some(before) = seen.insert(line.name.clone(), number) {
            let fault = format!(
                "duplicate device {}, first seen in line {before}",
                line.name
            );
            return Err(Fault::Line(fault).of(path, number));
        }
        lines.push((number, line));
    }
    Ok(lines)
}

/// Returns an error for a header that uses another field separator.
fn other_separator(headers: &csv::StringRecord) -> Option<String> {
    let header = headers.get(0).filter(|_| headers.len() == 1)?;
    let (separator, name) = [(';', "`;`"), ('\t', "tabs"), ('|', "`|`")]
        .into_iter()
        .find(|(separator, _)| header.contains(*separator))?;
    let unquoted = |field: &'_ str| field.trim().trim_matches('"').to_owned();
    let fields = header.split(separator).map(unquoted).collect::<Vec<_>>();
    Some(format!(
        "fields are separated by {name}; save the file with commas and this header: {}",
        fields.join(",")
    ))
}

/// Returns an error for an invalid header. An empty file, such as an export of no devices, has no header.
fn header_fault(headers: &csv::StringRecord) -> Option<String> {
    let columns = COLUMNS.join(", ");
    let unknown = |name: &&str| !COLUMNS.contains(name);
    if headers.is_empty() {
        None
    } else if let Some(name) = headers.iter().find(unknown) {
        Some(format!(
            "unknown column {name:?}; expected columns are {columns}"
        ))
    } else if !headers.iter().any(|name| name == COLUMNS[0]) {
        Some(format!("missing column {}", COLUMNS[0]))
    } else {
        let twice = |name: &&&str| headers.iter().filter(|other| other == *name).count() > 1;
        let twice = COLUMNS.iter().find(twice);
        twice.map(|name| format!("duplicate column {name}"))
    }
}

/// Describes a parser error with its line number.
fn fault(bytes: &[u8], error: &csv::Error) -> String {
    let what = match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!("{len} fields, but the header has {expected_len}"),
        csv::ErrorKind::Utf8 { .. } => "text that is not UTF-8".to_owned(),
        csv::ErrorKind::Deserialize { err, .. } => err.kind().to_string(),
        _ => return error.to_string(),
    };
    match error.position() {
        Some(position) => format!("line {}: {what}", line_number(bytes, Some(position))),
        None => what,
    }
}

/// Returns the line on which a record begins, counted from 1. The parser's own count stops before blank lines and
/// omits line ends within quotes.
fn line_number(bytes: &[u8], position: Option<&csv::Position>) -> usize {
    let at = position.map_or(0, |position| position.byte() as usize);
    let blank = bytes[at.min(bytes.len())..]
        .iter()
        .take_while(|byte| matches!(byte, b'\n' | b'\r'));
    let begin = (at + blank.count()).min(bytes.len());
    // A line ends with a line feed, a carriage return, or both.
    let ends = |at: &usize| match bytes[*at] {
        b'\n' => true,
        b'\r' => bytes.get(*at + 1) != Some(&b'\n'),
        _ => false,
    };
    1 + (0..begin).filter(ends).count()
}

fn check(line: &Line) -> Result<(), Fault> {
    device_name(&line.name).map_err(|fault| Fault::Line(format!("{:?}: {fault}", line.name)))?;
    let is_valid = |enabled: &&String| ["yes", "no"].contains(&enabled.as_str());
    if let Some(enabled) = line.enabled.as_ref().filter(|enabled| !is_valid(enabled)) {
        return Err(Fault::Line(format!(
            "enabled must be yes or no, but is {enabled:?}"
        )));
    }
    if let Some(digits) = &line.own_key
        && !["", OMITTED].contains(&digits.as_str())
    {
        DeviceKey::parse(digits).map_err(no_key)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        match lines(text.as_bytes(), Path::new("devices.csv")) {
            Ok(lines) => panic!("{} lines were read", lines.len()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn faults_name_the_line_of_the_file() {
        for (text, says) in [
            ("name,enabled\na,yes\nb,perhaps\n", "line 3"),
            ("name,enabled\n\n\na,yes\n\nb,perhaps\n", "line 6"),
            ("name,enabled\r\n\r\na,yes\r\nb,perhaps\r\n", "line 4"),
            ("name,enabled\n\"a\n\",yes\nb,perhaps\n", "line 4"),
            ("name,enabled\n\"a\",\"y\nes\"\n", "line 2"),
            ("name,enabled\na,yes\n\na,yes\n", "line 4"),
            ("name,enabled\n\na,yes\n\na,yes\n", "first seen in line 3"),
            ("name,enabled\n\na\n", "line 3: 1 fields"),
            ("name,key_version\n\na,b\n", "line 3"),
            ("\u{feff}name,enabled\n\na,perhaps\n", "line 3"),
            ("name,enabled\ra,yes\rb,perhaps\r", "line 3"),
            ("\r\rname,enabled\ra,yes\r\rb,perhaps\r", "line 6"),
            ("name,enabled\r\n\r\n\ra,yes\r\nb,perhaps\r\n", "line 5"),
            ("c1\nc2\n", "line 1: unknown column \"c1\""),
            ("\n\nname,alias\na,b\n", "line 3: unknown column \"alias\""),
            ("Name,enabled\n", "line 1"),
            ("name,enabled,name\n", "duplicate column name"),
            ("enabled\nyes\n", "missing column name"),
        ] {
            let refused = refusal(text);
            assert!(refused.contains(says), "{text:?}: {refused}");
        }
    }

    #[test]
    fn other_separators_are_named() {
        for (text, says) in [
            ("name;enabled\na;yes\n", "separated by `;`"),
            ("name\tenabled\na\tyes\n", "separated by tabs"),
            ("name|enabled\na|yes\n", "header: name,enabled"),
            ("\"name\";\"enabled\"\na;yes\n", "header: name,enabled"),
        ] {
            let refused = refusal(text);
            assert!(refused.contains(says), "{text:?}: {refused}");
        }
        assert_eq!(lines(b"name\na\nb\n", Path::new("x")).unwrap().len(), 2);
        assert_eq!(lines(b"", Path::new("x")).unwrap().len(), 0);
    }
}
