//! Collects submissions into the next batch.
//!
//! It has no access to the queue or a clock: `ingest` adds submissions and asks whether the batch
//! is due. A batch is due when it is full, or when its writer is idle and an interval has passed
//! since the last commit. At high load the interval is short, because batches grow anyway. At low
//! load it is longer, so that devices that send rarely share commits and the storage medium lasts
//! longer. It stays short while a device waits for its login or DECLARE, or for the ACK that lets
//! it send the next frame.

use std::collections::HashSet;

use crate::quota::quarantine::Reservation;
use crate::session::Submission;
use crate::store::{Batch, Content, StreamId};

#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Number of readings in a full batch.
    pub readings_max: usize,
    /// Memory of a full batch, in bytes.
    pub bytes_max: usize,
    /// Minimum interval between commits, in microseconds.
    pub interval_min_us: u64,
    /// Interval without load, in microseconds; it shrinks to the minimum as the number of frames
    /// per second grows.
    pub interval_quiet_us: u64,
}

/// Frames per second at which the load is high.
const BUSY_FRAMES: u64 = 200;
const SECOND_US: u64 = 1_000_000;

/// Resources that a submission uses until it is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub readings: usize,
    /// Memory in bytes, approximate.
    pub bytes: usize,
}

impl Size {
    pub fn of(submission: &Submission) -> Size {
        let (Submission::Entry(entry) | Submission::Quarantine(entry, _)) = submission else {
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

/// Overhead of a submission in addition to its readings or bytes.
const SUBMISSION_BYTES: usize = 256;

/// A batch, with the tag of each part that is answered.
#[derive(Debug)]
pub struct Tagged<T> {
    pub batch: Batch,
    pub logins: Vec<T>,
    pub declares: Vec<T>,
    pub entries: Vec<T>,
    /// Reserved quarantine space, held until the batch is finished.
    pub reservations: Vec<Reservation>,
    pub size: Size,
}

impl<T> Default for Tagged<T> {
    fn default() -> Self {
        Tagged {
            batch: Batch::default(),
            logins: Vec::new(),
            declares: Vec::new(),
            entries: Vec::new(),
            reservations: Vec::new(),
            size: Size::default(),
        }
    }
}

impl<T> Tagged<T> {
    /// Drops all parts with ids of a replaced store. Their capacity stays in use until the rest is
    /// committed.
    pub fn forget_ids(&mut self) {
        self.batch.declares.clear();
        self.declares.clear();
        self.batch.entries.clear();
        self.entries.clear();
        self.reservations.clear();
        self.batch.repeats.clear();
        self.batch.clocks.clear();
        self.batch.events.clear();
    }
}

/// Collects the next batch. `T` identifies the receiver of an answer.
#[derive(Debug)]
pub struct Batcher<T> {
    limits: BatchLimits,
    open: Tagged<T>,
    committed_at_us: Option<u64>,
    /// Streams in the last batch.
    committed_streams: HashSet<StreamId>,
    /// Streams in the open batch, if it may wait.
    open_streams: HashSet<StreamId>,
    /// Whether a device waits for the open batch.
    is_awaited: bool,
    load: Load,
}

/// Number of frames per second.
#[derive(Debug, Default)]
struct Load {
    since_us: u64,
    frames: u64,
    /// Number in the previous second.
    before: u64,
}

impl Load {
    fn count(&mut self, frames: u64, now_us: u64) {
        let elapsed_us = now_us.saturating_sub(self.since_us);
        if elapsed_us >= SECOND_US {
            self.before = self.frames * SECOND_US / elapsed_us;
            (self.since_us, self.frames) = (now_us, 0);
        }
        self.frames += frames;
    }

    fn frames_per_s(&self) -> u64 {
        self.frames.max(self.before)
    }
}

impl<T> Batcher<T> {
    pub fn new(limits: BatchLimits) -> Batcher<T> {
        Batcher {
            limits,
            open: Tagged::default(),
            committed_at_us: None,
            committed_streams: HashSet::new(),
            open_streams: HashSet::new(),
            is_awaited: false,
            load: Load::default(),
        }
    }

    /// Adds a submission. One that exceeds the limits on its own forms its own batch.
    pub fn push(&mut self, submission: Submission, tag: T) {
        self.open.size += Size::of(&submission);
        self.is_awaited |= self.awaits(&submission);
        let Tagged {
            batch,
            logins,
            declares,
            entries,
            reservations,
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
                batch
                    .clocks
                    .extend(entry.clock.map(|clock| (entry.device, clock)));
                batch.entries.push(entry);
                entries.push(tag);
            }
            Submission::Quarantine(entry, reservation) => {
                batch.entries.push(entry);
                entries.push(tag);
                reservations.push(reservation);
            }
            Submission::Repeat(repeat) => batch.repeats.push(repeat),
            Submission::Clock(device, clock) => batch.clocks.push((device, clock)),
            Submission::Event(event) => batch.events.push(event),
            Submission::Refusal(refusal) => batch.refusals.push(refusal),
            Submission::Step(step) => batch.steps.push(step),
        }
    }

    /// See [`Tagged::forget_ids`].
    pub fn forget_ids(&mut self) {
        self.open.forget_ids();
        self.open_streams.clear();
        self.committed_streams.clear();
    }

    /// Returns whether a device waits for this submission: it sends more as soon as it has an
    /// answer, or sends several frames in a row.
    fn awaits(&mut self, submission: &Submission) -> bool {
        match submission {
            Submission::Login(_) | Submission::Declare(_) => true,
            // At high load no device waits for long.
            _ if self.interval_us() == self.limits.interval_min_us => false,
            Submission::Entry(entry) | Submission::Quarantine(entry, _) => {
                let is_first = self.is_awaited || self.open_streams.insert(entry.stream);
                !is_first || self.committed_streams.contains(&entry.stream)
            }
            Submission::Repeat(_)
            | Submission::Clock(..)
            | Submission::Event(_)
            | Submission::Refusal(_)
            | Submission::Step(_) => false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.open.size == Size::default()
    }

    pub fn is_full(&self) -> bool {
        self.open.size.readings >= self.limits.readings_max
            || self.open.size.bytes >= self.limits.bytes_max
    }

    /// Returns the batch if it is due now that the writer is idle. If it returns `None`, the batch
    /// is due at [`Batcher::poll_deadline`].
    pub fn poll_batch(&mut self, now_us: u64) -> Option<Tagged<T>> {
        let may_go = !self.is_empty()
            && (self.is_full() || self.poll_deadline().is_none_or(|due_us| now_us >= due_us));
        may_go.then(|| {
            self.committed_at_us = Some(now_us);
            self.load.count(self.open.entries.len() as u64, now_us);
            self.open_streams.clear();
            self.committed_streams.clear();
            self.is_awaited = false;
            // The streams matter only at low load.
            if self.interval_us() > self.limits.interval_min_us {
                let entries = self.open.batch.entries.iter();
                self.committed_streams
                    .extend(entries.map(|entry| entry.stream));
            }
            std::mem::take(&mut self.open)
        })
    }

    /// Returns the time before which only a full batch is due; `None` before the first commit.
    pub fn poll_deadline(&self) -> Option<u64> {
        let interval_us = match self.is_awaited {
            true => self.limits.interval_min_us,
            false => self.interval_us(),
        };
        self.committed_at_us.map(|at_us| at_us + interval_us)
    }

    fn interval_us(&self) -> u64 {
        let BatchLimits {
            interval_min_us,
            interval_quiet_us,
            ..
        } = self.limits;
        let idle = BUSY_FRAMES.saturating_sub(self.load.frames_per_s());
        interval_min_us.max(interval_quiet_us * idle / BUSY_FRAMES)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::{DeviceId, Entry, Readings, SeriesId, StreamId};
    use crate::time::{Quality, ResolvedTime};

    fn entry(seq: u64, readings: usize) -> Submission {
        let time = ResolvedTime {
            offset_us: 0,
            quality: Quality::Utc,
        };
        Submission::Entry(Entry {
            device: DeviceId(1),
            stream: StreamId(1),
            first_seq: seq,
            seq,
            frame_type: 0x11,
            crc: None,
            received_at_us: 0,
            content: Content::Readings(Readings {
                time,
                times_us: (0..readings as i64).collect(),
                series: vec![SeriesId(1)],
                values: vec![0.0; readings],
                too_old: 0,
            }),
            clock: None,
        })
    }

    #[derive(Clone, Debug)]
    enum Input {
        Push(usize),
        Idle { after_us: u64 },
    }

    fn inputs() -> impl Strategy<Value = Vec<Input>> {
        let push = (1usize..40).prop_map(Input::Push);
        let idle = (0u64..50).prop_map(|after_us| Input::Idle { after_us });
        prop::collection::vec(prop_oneof![3 => push, 1 => idle], 1..200)
    }

    proptest! {
        /// Compares a batcher with a plain list: every submission comes out once, in order and with
        /// its own tag; a batch is no larger than its limit plus its last entry; the minimum
        /// interval holds unless the batch is full.
        #[test]
        fn agrees_with_a_list(inputs in inputs(), interval_min_us in 0u64..40) {
            let limits = BatchLimits {
                readings_max: 100,
                bytes_max: 1 << 20,
                interval_min_us,
                interval_quiet_us: 0,
            };
            let mut batcher = Batcher::new(limits);
            let mut model: Vec<usize> = Vec::new();
            let (mut pushed, mut taken, mut now_us) = (0u64, 0u64, 0u64);
            let mut committed_at_us: Option<u64> = None;
            for input in inputs {
                let Input::Push(readings) = input else {
                    let Input::Idle { after_us } = input else { unreachable!() };
                    now_us += after_us;
                    let is_full = model.iter().sum::<usize>() >= limits.readings_max;
                    let is_due = committed_at_us.is_none_or(|at| now_us >= at + interval_min_us);
                    let batch = batcher.poll_batch(now_us);
                    prop_assert_eq!(batch.is_some(), !model.is_empty() && (is_full || is_due));
                    if let Some(tagged) = batch {
                        let readings: Vec<usize> = tagged.batch.entries.iter().map(|entry| {
                            Size::of(&Submission::Entry(entry.clone())).readings
                        }).collect();
                        prop_assert_eq!(&readings, &model);
                        for (entry, tag) in tagged.batch.entries.iter().zip(&tagged.entries) {
                            taken += 1;
                            prop_assert_eq!((entry.seq, *tag), (taken, taken));
                        }
                        let all_but_last: usize = model[..model.len() - 1].iter().sum();
                        prop_assert!(all_but_last < limits.readings_max);
                        model.clear();
                        committed_at_us = Some(now_us);
                    }
                    continue;
                };
                if !batcher.is_full() {
                    pushed += 1;
                    batcher.push(entry(pushed, readings), pushed);
                    model.push(readings);
                }
                prop_assert_eq!(
                    batcher.is_full(),
                    model.iter().sum::<usize>() >= limits.readings_max
                );
            }
        }
    }

    #[test]
    fn an_idle_writer_gets_the_batch_immediately() {
        let limits = BatchLimits {
            readings_max: 100,
            bytes_max: 1 << 20,
            interval_min_us: 0,
            interval_quiet_us: 0,
        };
        let mut batcher = Batcher::new(limits);
        assert!(batcher.poll_batch(0).is_none());
        batcher.push(entry(1, 1), ());
        assert_eq!(batcher.poll_batch(0).unwrap().batch.entries.len(), 1);
        assert!(batcher.is_empty());
    }

    const QUIET: BatchLimits = BatchLimits {
        readings_max: 1_000_000,
        bytes_max: 1 << 30,
        interval_min_us: 3_000,
        interval_quiet_us: 200_000,
    };

    fn of_stream(stream: i64) -> Submission {
        let Submission::Entry(mut first) = entry(1, 1) else {
            unreachable!()
        };
        first.stream = StreamId(stream);
        Submission::Entry(first)
    }

    /// Returns how long a batch of the streams `streams` waits after a batch of the streams
    /// `before`.
    fn waits(before: &[i64], streams: &[i64]) -> u64 {
        let mut batcher = Batcher::new(QUIET);
        let now_us = 10_000_000;
        for stream in before {
            batcher.push(of_stream(*stream), ());
        }
        assert!(batcher.poll_batch(now_us).is_some());
        for stream in streams {
            batcher.push(of_stream(*stream), ());
        }
        batcher.poll_deadline().unwrap() - now_us
    }

    #[test]
    fn devices_that_send_rarely_share_commits() {
        assert_eq!(waits(&[1], &[2, 3, 4]), 199_000);
        // No wait without a recent commit.
        let mut batcher = Batcher::new(QUIET);
        batcher.push(of_stream(1), ());
        assert!(batcher.poll_batch(0).is_some());
        batcher.push(of_stream(2), ());
        assert!(batcher.poll_batch(300_000).is_some());
    }

    #[test]
    fn a_device_that_waits_for_its_ack_gets_it_soon() {
        // It sent the next frame when it received the ACK; it is sending a backlog.
        assert_eq!(waits(&[1, 2], &[3, 2]), 3_000);
        assert_eq!(waits(&[1], &[2, 3, 2]), 3_000);
        let mut batcher = Batcher::new(QUIET);
        batcher.push(of_stream(1), ());
        batcher.poll_batch(1_000).unwrap();
        batcher.push(
            Submission::Declare(crate::store::Declare {
                device: DeviceId(1),
                schema: 1,
                hash: [0; 8],
                channels: Vec::new(),
            }),
            (),
        );
        assert_eq!(batcher.poll_deadline(), Some(4_000));
        // The awaited submission leaves with this batch and does not affect the next one.
        batcher.poll_batch(4_000).unwrap();
        batcher.push(of_stream(7), ());
        assert!(batcher.poll_deadline().unwrap() > 100_000);
    }

    #[test]
    fn commits_do_not_wait_at_high_load() {
        let mut batcher = Batcher::new(QUIET);
        let mut now_us = 1_000_000;
        let mut stream = 0;
        // One frame per millisecond, each from another device.
        for _ in 0..3_000 {
            now_us += 1_000;
            stream += 1;
            batcher.push(of_stream(stream), ());
            batcher.poll_batch(now_us);
        }
        batcher.push(of_stream(0), ());
        let began_us = batcher.committed_at_us.unwrap();
        assert_eq!(batcher.poll_deadline(), Some(began_us + 3_000));
        // At low load, commits wait again.
        for _ in 0..3 {
            now_us += 1_000_000;
            stream += 1;
            batcher.push(of_stream(stream), ());
            batcher.poll_batch(now_us).unwrap();
        }
        batcher.push(of_stream(0), ());
        assert!(batcher.poll_deadline().unwrap() > now_us + 190_000);
    }

    #[test]
    fn a_batch_is_full_by_bytes() {
        let limits = BatchLimits {
            readings_max: 1000,
            bytes_max: 600,
            interval_min_us: 0,
            interval_quiet_us: 0,
        };
        let mut batcher = Batcher::new(limits);
        batcher.push(entry(1, 1), ());
        assert!(!batcher.is_full());
        batcher.push(entry(2, 1), ());
        batcher.push(entry(3, 1), ());
        assert!(batcher.is_full());
    }
}
