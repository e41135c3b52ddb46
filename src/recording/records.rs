//! Splits a text into records of fields with one separator.

use csv::{ReaderBuilder, StringRecord, Trim};

use super::ReadError;
use super::text::{line_of, next_line};

/// Stands for runs of blanks and tabs between fields.
pub const BLANKS: char = ' ';
/// A quoted field with more line ends than this is treated as unterminated.
const LINE_ENDS_MAX: usize = 50;

/// Records of a text from a byte offset; blank lines are skipped.
pub struct Records<'t> {
    text: &'t str,
    start: usize,
    /// Byte offset of the next line, for fields separated by blanks.
    at: usize,
    csv: Option<csv::Reader<&'t [u8]>>,
}

impl<'t> Records<'t> {
    /// Starts at the byte `start`, which must be the start of a line.
    pub fn new(text: &'t str, start: usize, separator: char) -> Records<'t> {
        let csv = (separator != BLANKS).then(|| {
            ReaderBuilder::new()
                .delimiter(u8::try_from(separator).unwrap_or(b','))
                .has_headers(false)
                .flexible(true)
                .trim(Trim::All)
                .from_reader(&text.as_bytes()[start..])
        });
        Records {
            text,
            start,
            at: start,
            csv,
        }
    }

    /// Reads the next record; returns the byte at which it begins, or `None` at the end.
    ///
    /// # Errors
    /// A quoted field is unterminated.
    pub fn read(&mut self, record: &mut StringRecord) -> Result<Option<usize>, ReadError> {
        let Some(csv) = &mut self.csv else {
            return Ok(self.read_blanks(record));
        };
        match csv.read_record(record) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(error) => return Err(ReadError::file(format!("not CSV: {error}"))),
        }
        let byte = record
            .position()
            .map_or(0, |position| position.byte() as usize);
        let at = self.start + byte;
        // The position may be before blank lines and the second half of a CRLF.
        let blank = self.text.as_bytes()[at..]
            .iter()
            .take_while(|byte| matches!(byte, b'\r' | b'\n'));
        let at = at + blank.count();
        let ends = |field: &str| field.bytes().filter(|byte| *byte == b'\n').count();
        if record.iter().any(|field| ends(field) > LINE_ENDS_MAX) {
            let reason = "unterminated quoted field; is a quote missing?";
            return Err(ReadError::line(line_of(self.text, at), reason.to_owned()));
        }
        Ok(Some(at))
    }

    fn read_blanks(&mut self, record: &mut StringRecord) -> Option<usize> {
        while self.at < self.text.len() {
            let at = self.at;
            self.at = next_line(self.text, at);
            let line = self.text[at..self.at].trim();
            if !line.is_empty() {
                split_blanks(line, record);
                return Some(at);
            }
        }
        None
    }
}

/// Splits at runs of blanks; a field in double quotes may contain blanks.
fn split_blanks(line: &str, record: &mut StringRecord) {
    record.clear();
    let mut rest = line;
    while !rest.is_empty() {
        let quoted = rest.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let (field, after) = match quoted {
            Some(split) => split,
            None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        record.push_field(field);
        rest = after.trim_start();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(text: &str, separator: char) -> Vec<(usize, Vec<String>)> {
        let mut records = Records::new(text, 0, separator);
        let mut record = StringRecord::new();
        let mut found = Vec::new();
        while let Some(at) = records.read(&mut record).unwrap() {
            found.push((at, record.iter().map(str::to_owned).collect()));
        }
        found
    }

    #[test]
    fn records_report_where_they_begin() {
        let text = "a, b\r\n\r\n\"1\n2\";x\r\n";
        let found = records(text, ',');
        assert_eq!(found[0], (0, vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(found[1].0, 8);
        let found = records(text, ';');
        assert_eq!(found[1], (8, vec!["1\n2".to_owned(), "x".to_owned()]));
    }

    #[test]
    fn a_run_of_blanks_is_one_separator() {
        let found = records("  1  2\t3\n\n\"a b\" c\n", BLANKS);
        let fields: Vec<Vec<String>> = found.into_iter().map(|(_, fields)| fields).collect();
        assert_eq!(fields, [vec!["1", "2", "3"], vec!["a b", "c"]]);
    }

    #[test]
    fn an_unterminated_quote_is_an_error() {
        let text = format!("a,b\n1,\"2\n{}", "3,4\n".repeat(100));
        let mut records = Records::new(&text, 0, ',');
        let mut record = StringRecord::new();
        let mut read = || records.read(&mut record);
        assert!(read().is_ok());
        let error = read().unwrap_err().to_string();
        assert!(
            error.starts_with("line 2: unterminated quoted field"),
            "{error}"
        );
    }
}
