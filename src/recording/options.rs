//! Options that override the detected format of a file.

use serde::{Deserialize, Serialize};

use super::records::BLANKS;

/// Options of every command that reads a CSV file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "CSV format")]
pub struct ReadOptions {
    /// Field separator: , ; | tab, or blanks for runs of blanks [default: detected]
    #[arg(long, value_name = "CHAR", value_parser = separator)]
    pub separator: Option<char>,

    /// Decimal separator, . or , [default: detected]
    #[arg(long, value_name = "CHAR", value_parser = decimal)]
    pub decimal: Option<char>,

    /// Thousands separator: , . ' _ or space [default: detected]
    #[arg(long, value_name = "CHAR", value_parser = thousands)]
    pub thousands: Option<char>,

    /// Header line, counted from 1; 0 for none [default: detected]
    #[arg(long, value_name = "LINE")]
    pub header_line: Option<u64>,

    /// Time column, by name or by number from 1; two columns for date and time of day; three or
    /// more for year, month, day, hour, minute, second [default: detected]
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    pub time_column: Vec<String>,

    /// Time format: DD/MM/YYYY or MM/DD/YYYY for the order of day and month; epoch-s, epoch-ms,
    /// epoch-us or epoch-ns; year (such as 1958.21); excel (days since 1900); elapsed-s or
    /// elapsed-ms, with --start; or a pattern such as "%d.%m.%Y %H:%M" [default: detected]
    #[arg(long, value_name = "FORMAT", allow_hyphen_values = true)]
    pub time_format: Option<String>,

    /// Zone of times without an offset: UTC, an offset such as +02:00, or a name such as
    /// Europe/Berlin. In the repeated hour when clocks go back, the first pass is summer time;
    /// times in the skipped hour use the earlier offset [default: UTC]
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub time_zone: Option<String>,

    /// UTC time from which --time-format elapsed-s and elapsed-ms count, such as
    /// 2024-05-01T12:00:00Z [default: none]
    #[arg(long, value_name = "TIME")]
    pub start: Option<String>,

    /// Values that mean "missing", in addition to empty cells [default: NA, NaN, NULL, ?, - and
    /// similar, and numbers such as -999 or -9999 that are outliers in their column]
    #[arg(
        long,
        value_name = "MARKS",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    pub missing: Vec<String>,

    /// Columns to read, by name or number [default: all numeric columns]
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    pub columns: Vec<String>,

    /// Column that names the device of each row; none for a single device [default: a column with
    /// at most 100 names, if a tenth of the times repeat without it]
    #[arg(long, value_name = "COLUMN")]
    pub device_column: Option<String>,
}

fn separator(text: &str) -> Result<char, String> {
    match text {
        "," | ";" | "|" | ":" => Ok(text.chars().next().unwrap_or(',')),
        "tab" | "\t" | "\\t" => Ok('\t'),
        "blanks" | "blank" | "space" | " " => Ok(BLANKS),
        _ => Err("expected , ; | tab or blanks".to_owned()),
    }
}

fn decimal(text: &str) -> Result<char, String> {
    match text {
        "." | "point" => Ok('.'),
        "," | "comma" => Ok(','),
        _ => Err("expected . or ,".to_owned()),
    }
}

fn thousands(text: &str) -> Result<char, String> {
    match text {
        "," | "." | "'" | "_" | " " => Ok(text.chars().next().unwrap_or(',')),
        "space" => Ok(' '),
        _ => Err("expected , . ' _ or space".to_owned()),
    }
}

/// Returns the name of a separator in messages.
pub fn name_of(separator: char) -> String {
    match separator {
        BLANKS => "blanks".to_owned(),
        '\t' => "tab".to_owned(),
        separator => format!("'{separator}'"),
    }
}
