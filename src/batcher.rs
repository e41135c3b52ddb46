//! Gathers submissions into the batch that is committed next.
//!
//! It knows no queue and no clock: `ingest` pushes what has arrived and asks whether the batch may go.
//! A batch goes when it is full or when its writer is idle; so there is no delay when it is quiet, and
//! batches grow by themselves when it is busy. A least time between commits may be set, for storage
//! that wears out.

use crate::session::Submission;
use crate::store::{Batch, Content};

/// When a batch may go.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Readings of a full batch.
    pub readings_max: usize,
    /// Bytes of memory of a full batch.
    pub bytes_max: usize,
    /// Least time from one commit to the next, microseconds.
    pub interval_min_us: u64,
}

/// What a submission takes up until it is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Readings.
    pub readings: usize,
    /// Bytes of memory, roughly.
    pub bytes: usize,
}

impl Size {
    /// The size of a submission.
    pub fn of(submission: &Submission) -> Size {
        let Submission::Entry(entry) = submission else {
            return Size {
                readings: 0,
                bytes: SUBMISSION_BYTES,
            };
        };
        let (readings, payload_bytes) = match &entry.content {
            Content::Readings(readings) => {
                let rows = readings.times_us.len() + readings.values.len();
                (readings.values.len(), rows * 8 + readings.series.len() * 8)
            }
            Content::Quarantined { bytes, detail, .. } => (0, bytes.len() + detail.len()),
            Content::Event { text, .. } => (0, text.len()),
            Content::Gap { .. } => (0, 0),
        };
        Size {
            readings,
            bytes: SUBMISSION_BYTES + payload_bytes,
        }
    }
}

impl std::ops::AddAssign for Size {
    fn add_assign(&mut self, other: Size) {
        self.readings += other.readings;
        self.bytes += other.bytes;
    }
}

/// What a submission takes up besides its readings or bytes.
const SUBMISSION_BYTES: usize = 256;

/// A batch, and for each of its parts that is answered the tag it came with.
#[derive(Debug)]
pub struct Tagged<T> {
    /// What to commit.
    pub batch: Batch,
    /// One for each login.
    pub logins: Vec<T>,
    /// One for each declare.
    pub declares: Vec<T>,
    /// One for each entry.
    pub entries: Vec<T>,
    /// What it takes up.
    pub size: Size,
}

impl<T> Default for Tagged<T> {
    fn default() -> Self {
        Tagged {
            batch: Batch::default(),
            logins: Vec::new(),
            declares: Vec::new(),
            entries: Vec::new(),
            size: Size::default(),
        }
    }
}

/// The batch being gathered. `T` tells whom to answer.
#[derive(Debug)]
pub struct Batcher<T> {
    limits: BatchLimits,
    open: Tagged<T>,
    committed_at_us: Option<u64>,
}

impl<T> Batcher<T> {
    /// An empty one.
    pub fn new(limits: BatchLimits) -> Batcher<T> {
        Batcher {
            limits,
            open: Tagged::default(),
            committed_at_us: None,
        }
    }

    /// Adds a submission. One that exceeds the limits by itself makes a batch of its own.
    pub fn push(&mut self, submission: Submission, tag: T) {
        self.open.size += Size::of(&submission);
        let Tagged {
            batch,
            logins,
            declares,
            entries,
            ..
        } = &mut self.open;
        match submission {
            Submission::Login(login) => {
                batch.logins.push(login);
                logins.push(tag);
            }
            Submission::Declare(declare) => {
                batch.declares.push(declare);
                declares.push(tag);
            }
            Submission::Entry(entry) => {
                batch.entries.push(entry);
                entries.push(tag);
            }
            Submission::Clock(device, clock) => batch.clocks.push((device, clock)),
            Submission::Event(event) => batch.events.push(event),
        }
    }

    /// Whether nothing is gathered.
    pub fn is_empty(&self) -> bool {
        self.open.size == Size::default()
    }

    /// Whether nothing more should be gathered.
    pub fn is_full(&self) -> bool {
        self.open.size.readings >= self.limits.readings_max
            || self.open.size.bytes >= self.limits.bytes_max
    }

    /// The batch, if it may go now that the writer is idle; else `None`, and it may go at
    /// [`Batcher::poll_deadline`].
    pub fn poll_batch(&mut self, now_us: u64) -> Option<Tagged<T>> {
        let may_go = !self.is_empty()
            && (self.is_full() || self.poll_deadline().is_none_or(|due_us| now_us >= due_us));
        may_go.then(|| {
            self.committed_at_us = Some(now_us);
            std::mem::take(&mut self.open)
        })
    }

    /// The moment before which only a full batch goes; `None` where there was no commit yet.
    pub fn poll_deadline(&self) -> Option<u64> {
        self.committed_at_us
            .map(|at_us| at_us + self.limits.interval_min_us)
    }
}
