//! How a file is to be read, where that is not left to be guessed.

use serde::{Deserialize, Serialize};

use super::records::BLANKS;

/// Flags of every command that reads a CSV file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "How the CSV file is read")]
pub struct ReadOptions {
    /// Separator of the fields: , ; | tab, or blanks for runs of blanks [default: found in the file]
    #[arg(long, value_name = "CHAR", value_parser = separator)]
    pub separator: Option<char>,

    /// Decimal separator, . or , [default: found in the file]
    #[arg(long, value_name = "CHAR", value_parser = decimal)]
    pub decimal: Option<char>,

    /// Separator of thousands in numbers: , . ' _ or space [default: found in the file]
    #[arg(long, value_name = "CHAR", value_parser = thousands)]
    pub thousands: Option<char>,

    /// Line of the header, counted from 1; 0 for a file without one [default: found in the file]
    #[arg(long, value_name = "LINE")]
    pub header_line: Option<u64>,

    /// Column with the time, by its name or its number counted from 1; two for date and time of day;
    /// three and more for year, month, day, hour, minute, second [default: found in the file]
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    pub time_column: Vec<String>,

    /// How times are written: DD/MM/YYYY or MM/DD/YYYY for the order of day and month; epoch-s,
    /// epoch-ms, epoch-us or epoch-ns; year (such as 1958.21); excel (days since 1900); elapsed-s or
    /// elapsed-ms, with --start; or a pattern such as "%d.%m.%Y %H:%M" [default: found in the file]
    #[arg(long, value_name = "FORMAT", allow_hyphen_values = true)]
    pub time_format: Option<String>,

    /// Zone of times without an offset: UTC, an offset such as +02:00, or a name such as Europe/Berlin.
    /// Where clocks go back, the first pass through the hour is summer time; an hour that does not exist
    /// is read with the offset before it [default: UTC]
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub time_zone: Option<String>,

    /// UTC time from which --time-format elapsed-s and elapsed-ms count, such as 2024-05-01T12:00:00Z
    /// [default: none]
    #[arg(long, value_name = "TIME")]
    pub start: Option<String>,

    /// Cells that stand for a missing value, besides empty ones [default: NA, NaN, NULL, ?, - and the
    /// like, and numbers such as -999 or -9999 where they stand out in their column]
    #[arg(
        long,
        value_name = "MARKS",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    pub missing: Vec<String>,

    /// Columns to take, by their names or numbers [default: all that hold numbers]
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    pub columns: Vec<String>,

    /// Column that names the device of each row, for one device for each name; none for one device in
    /// all [default: a column with at most 100 names, if a tenth of the times repeat without it]
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

/// Returns how a separator is called.
pub fn name_of(separator: char) -> String {
    match separator {
        BLANKS => "blanks".to_owned(),
        '\t' => "tab".to_owned(),
        separator => format!("'{separator}'"),
    }
}
