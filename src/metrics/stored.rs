//! What a commit stored, by the labels of the metrics.

/// Counts of the content that a commit added to the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Frames stored, excluding gaps and quarantined frames.
    pub frames: u64,
    /// Readings stored.
    pub readings: u64,
    /// Readings left out because they are older than their retention.
    pub too_old: u64,
    /// Frames that were stored before.
    pub duplicates: u64,
    /// Number of frames that a gap covers, with its reason.
    pub gaps: Vec<(u8, u64)>,
    /// Codes of the frames put into quarantine.
    pub quarantined: Vec<u8>,
    /// Readings by the quality of their times, in the order of [`QUALITIES`].
    pub by_quality: Box<[u64; QUALITIES.len()]>,
    /// Readings by the time between sampling and receipt, in the order of [`AGES`].
    pub by_age: Box<[u64; AGES.len()]>,
}

/// Labels of the qualities of times, in the order of their codes.
pub const QUALITIES: [&str; 4] = ["utc", "anchored", "unanchored", "suspect"];

/// Labels of ages, with the upper limit of each but the last, in microseconds.
pub const AGES: [(&str, i64); 5] = [
    ("under_1m", 60_000_000),
    ("under_1h", 3_600_000_000),
    ("under_1d", 86_400_000_000),
    ("under_7d", 604_800_000_000),
    ("over_7d", i64::MAX),
];

impl Stored {
    /// Adds the counts of another commit.
    pub fn add(&mut self, other: Stored) {
        self.frames += other.frames;
        self.readings += other.readings;
        self.too_old += other.too_old;
        self.duplicates += other.duplicates;
        self.gaps.extend(other.gaps);
        self.quarantined.extend(other.quarantined);
        for (sum, more) in self.by_quality.iter_mut().zip(*other.by_quality) {
            *sum += more;
        }
        for (sum, more) in self.by_age.iter_mut().zip(*other.by_age) {
            *sum += more;
        }
    }

    /// Counts readings of a frame. `quality` is the code of the quality of their times; `age_us` the time between the
    /// first reading and the receipt of the frame.
    pub fn count_readings(&mut self, readings: u64, quality: u8, age_us: i64) {
        self.readings += readings;
        self.by_quality[usize::from(quality).min(QUALITIES.len() - 1)] += readings;
        let age = AGES.iter().position(|(_, limit_us)| age_us < *limit_us);
        self.by_age[age.unwrap_or(AGES.len() - 1)] += readings;
    }
}
