//! Notes from a reader: its guesses and what it could not read, one line each.

use super::text::line_of;

/// Maximum number of lines listed in a note.
const NAMED: usize = 3;

/// Notes as human-readable lines.
#[derive(Clone, Debug, Default)]
pub struct Notes(Vec<String>);

impl Notes {
    /// Adds a guess, and the flags that override it.
    pub fn guess(&mut self, what: String, flags: &str) {
        self.0.push(format!("guess: {what} ({flags})"));
    }

    /// Adds a line.
    pub fn say(&mut self, line: String) {
        self.0.push(line);
    }

    /// Adds a count, if it is not zero: `3 rows ... (lines 5, 7, 9)`.
    pub fn tally(&mut self, text: &str, noun: &str, what: &str, tally: &Tally) {
        if tally.count > 0 {
            let plural = if tally.count == 1 { "" } else { "s" };
            let (count, places) = (tally.count, tally.places(text));
            self.0
                .push(format!("{count} {noun}{plural} {what} ({places})"));
        }
    }

    pub fn into_lines(self) -> Vec<String> {
        self.0
    }
}

/// Counts occurrences, and keeps the first positions.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub count: u64,
    at: Vec<usize>,
    /// The first occurrence.
    pub example: String,
}

impl Tally {
    /// Counts an occurrence at a byte offset of the text.
    pub fn add(&mut self, at: usize, example: &str) {
        if self.count == 0 {
            self.example = example.chars().take(40).collect();
        }
        if self.at.len() < NAMED {
            self.at.push(at);
        }
        self.count += 1;
    }

    /// Returns the line of the first occurrence.
    pub fn line(&self, text: &str) -> u64 {
        line_of(text, self.at.first().copied().unwrap_or(0))
    }

    /// Returns the first lines, and an example: `lines 5, 7, 9, …: "x"`.
    pub fn places(&self, text: &str) -> String {
        let lines: Vec<String> = self
            .at
            .iter()
            .map(|at| line_of(text, *at).to_string())
            .collect();
        let noun = if self.count == 1 { "line" } else { "lines" };
        let more = if self.count > NAMED as u64 {
            ", …"
        } else {
            ""
        };
        let example = match self.example.is_empty() {
            true => String::new(),
            false => format!(": {:?}", self.example),
        };
        format!("{noun} {}{more}{example}", lines.join(", "))
    }
}
