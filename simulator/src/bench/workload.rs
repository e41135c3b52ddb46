//! Workloads of fleets, and the rows that the baselines insert for them.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    pub devices: u32,
    /// Channels per device.
    pub channels: u8,
    /// Samples per channel in a frame.
    pub samples: u16,
    /// Maximum number of unacknowledged frames per device.
    pub window_frames: u16,
}

/// The workload that the others are compared with.
pub(super) const BASE: Workload = Workload {
    devices: 1_000,
    channels: 4,
    samples: 15,
    window_frames: 16,
};

/// Frames of one reading.
pub(super) const SINGLE: Workload = Workload {
    channels: 1,
    samples: 1,
    ..BASE
};

/// A small workload that only checks that everything works.
pub(super) const SMOKE: Workload = Workload {
    devices: 10,
    ..SINGLE
};

/// Readings per transaction of the baseline; the next constant is its maximum number of frames. Half and twice these
/// values were measured, two rounds each. With 60 and 240 readings per frame, and on Postgres also with 1 and 4, the
/// results differed by no more than the rounds did. On SQLite, frames of 1 and 4 readings were 10 to 20 % slower with
/// half, and 18 to 22 % faster with 40,000 frames at a time; but that is more than a thousand devices have in flight,
/// and no gateway could commit that many together.
const TRANSACTION_READINGS: usize = 204_000;
const TRANSACTION_FRAMES_MAX: usize = 20_000;

impl Workload {
    /// Returns all workloads to measure.
    pub(super) fn all(is_quick: bool) -> Vec<Workload> {
        let samples = |samples| Workload { samples, ..BASE };
        let devices = |devices| Workload { devices, ..BASE };
        let mut workloads = vec![BASE, SINGLE, BASE.with_window(1)];
        if !is_quick {
            workloads.extend([samples(1), samples(60)]);
            workloads.extend([devices(10), devices(100), devices(10_000)]);
            workloads.extend([BASE.with_window(4), SINGLE.with_window(1)]);
        }
        workloads
    }

    pub(super) const fn with_window(self, window_frames: u16) -> Workload {
        Workload {
            window_frames,
            ..self
        }
    }

    pub(super) fn frame_readings(self) -> usize {
        usize::from(self.channels) * usize::from(self.samples)
    }

    /// Returns the number of frames in a transaction of the baseline.
    pub(super) fn transaction_frames(self) -> usize {
        (TRANSACTION_READINGS / self.frame_readings()).clamp(1, TRANSACTION_FRAMES_MAX)
    }
}

/// A frame that the baseline stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Frame {
    /// Device number, from 1.
    pub(super) device: i64,
    pub(super) seq: i64,
    pub(super) id: i64,
}

/// The frames of every `stride`-th device, in the order in which they arrive in a burst: each device
/// sends a window, followed by the next device.
#[derive(Clone, Debug)]
pub(super) struct Frames {
    workload: Workload,
    first: usize,
    stride: usize,
    first_id: i64,
    taken: usize,
}

impl Frames {
    pub(super) fn new(workload: Workload, first: usize, stride: usize, first_id: i64) -> Frames {
        Frames {
            workload,
            first,
            stride,
            first_id,
            taken: 0,
        }
    }

    /// Returns the frames of a transaction, sorted by device and number, as in the gateway.
    pub(super) fn transaction(&mut self) -> Vec<Frame> {
        let range = self.taken..self.taken + self.workload.transaction_frames();
        self.taken = range.end;
        let mut frames: Vec<Frame> = range.map(|n| self.nth(n)).collect();
        frames.sort_unstable();
        frames
    }

    fn nth(&self, n: usize) -> Frame {
        let devices = (self.workload.devices as usize - self.first).div_ceil(self.stride);
        let window = usize::from(self.workload.window_frames);
        let (turn, in_window) = (n / window, n % window);
        Frame {
            device: (self.first + turn % devices * self.stride) as i64 + 1,
            seq: (turn / devices * window + in_window) as i64 + 1,
            id: self.first_id + n as i64,
        }
    }
}

/// A row of `readings`; times are seconds since the first sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) series: i64,
    pub(super) second: i64,
    pub(super) frame_id: i64,
    pub(super) value: f64,
}

/// Returns the readings of sorted frames by series and time, as in the gateway.
pub(super) fn rows(workload: Workload, frames: &[Frame]) -> impl Iterator<Item = Row> {
    let (channels, samples) = (i64::from(workload.channels), i64::from(workload.samples));
    let of_device = frames.chunk_by(|a, b| a.device == b.device);
    of_device.flat_map(move |frames| {
        (1..=channels).flat_map(move |channel| {
            frames.iter().flat_map(move |frame| {
                (0..samples).map(move |sample| {
                    let second = (frame.seq - 1) * samples + sample;
                    Row {
                        series: (frame.device - 1) * channels + channel,
                        second,
                        frame_id: frame.id,
                        value: second as f64 / 100.0,
                    }
                })
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_sends_its_frames_once_and_in_order() {
        for stride in [1, 2, 3] {
            let mut seqs = vec![Vec::new(); BASE.devices as usize];
            let mut ids = Vec::new();
            for first in 0..stride {
                let mut frames = Frames::new(BASE, first, stride, (first as i64) << 40);
                for frame in (0..6).flat_map(|_| frames.transaction()) {
                    let index = frame.device as usize - 1;
                    assert_eq!(index % stride, first);
                    seqs[index].push(frame.seq);
                    ids.push(frame.id);
                }
            }
            for seqs in seqs {
                assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>());
            }
            let count = ids.len();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), count);
        }
    }

    #[test]
    fn readings_are_sorted_and_unique() {
        let workload = Workload {
            devices: 10,
            ..BASE
        };
        let frames = Frames::new(workload, 0, 1, 1).transaction();
        let rows: Vec<Row> = rows(workload, &frames).collect();
        assert_eq!(rows.len(), frames.len() * workload.frame_readings());
        let keys: Vec<_> = rows.iter().map(|row| (row.series, row.second)).collect();
        assert!(keys.is_sorted_by(|a, b| a < b));
        assert_eq!(keys.last().map(|key| key.0), Some(40));
    }

    #[test]
    fn transactions_hold_about_the_same_number_of_readings_for_any_frame_size() {
        let frames = |workload: Workload| workload.transaction_frames();
        let samples = |samples| frames(Workload { samples, ..BASE });
        assert_eq!((samples(15), samples(60)), (3_400, 850));
        assert_eq!((samples(1), frames(SINGLE)), (20_000, 20_000));
    }

    #[test]
    fn quick_workloads_are_a_subset_of_all() {
        let all = Workload::all(false);
        assert!(
            Workload::all(true)
                .iter()
                .all(|workload| all.contains(workload))
        );
        assert_eq!((all[0], all.len()), (BASE, 10));
    }
}
