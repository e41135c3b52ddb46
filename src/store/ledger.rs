//! Decides which entries of a batch are stored: the rule "once and in order", shared by every store.
//!
//! The module does no I/O. Within its transaction, a store loads the watermarks of the batch's streams, calls
//! [`Watermarks::append`], and stores the returned entries together with the new watermarks.
//!
//! Invariants
//! - A watermark only grows, and only by entries that begin at the number after it.
//! - The entries that `append` returns for a stream are contiguous: each entry's `first_seq` is one more than
//!   the `seq` of the previous entry.

use std::collections::BTreeMap;

use super::reuse::Repeat;
use super::{Content, Entry, Receipt, StreamId};
use crate::metrics::Stored;

/// Highest sequence number that a store can keep; SQL integers are signed.
pub const SEQ_MAX: u64 = i64::MAX as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Store it, starting at `first_seq`: a gap may overlap durable numbers.
    Store {
        /// First number that is not durable yet.
        first_seq: u64,
    },
    /// All of it is durable: store nothing, acknowledge again.
    Duplicate,
    /// It does not continue the stream: store nothing, keep the watermark.
    OutOfOrder,
}

/// Decides whether an entry that covers `first_seq..=seq` continues a stream that is durable up to
/// `durable_seq`.
pub fn judge(durable_seq: u64, first_seq: u64, seq: u64) -> Verdict {
    if seq <= durable_seq {
        Verdict::Duplicate
    } else if first_seq > durable_seq + 1 || seq > SEQ_MAX {
        Verdict::OutOfOrder
    } else {
        Verdict::Store {
            first_seq: durable_seq + 1,
        }
    }
}

/// Reason of a gap that was reported by a quarantined frame (SPEC, section 4).
pub const REASON_REFUSED: u8 = 253;

#[derive(Clone, Copy, Debug)]
pub struct Appended<'a> {
    pub entry: &'a Entry,
    /// First number to store; the last one is `entry.seq`.
    pub first_seq: u64,
}

impl Appended<'_> {
    pub fn readings(&self) -> usize {
        match &self.entry.content {
            Content::Readings(readings) => readings.values.len(),
            Content::Gap { .. } | Content::Event { .. } | Content::Quarantined { .. } => 0,
        }
    }

    /// Adds the entry to what a commit stores.
    fn count(&self, stored: &mut Stored) {
        if let Some(reason) = self.gap_reason() {
            let last_seq = match self.entry.content {
                Content::Quarantined { .. } => self.entry.seq - 1,
                _ => self.entry.seq,
            };
            stored.gaps.push((reason, last_seq - self.first_seq + 1));
        }
        match self.entry.content {
            Content::Readings(_) | Content::Event { .. } => stored.frames += 1,
            Content::Quarantined { code, .. } => stored.quarantined.push(code),
            Content::Gap { .. } => {}
        }
        if let Content::Readings(readings) = &self.entry.content {
            let first_us = readings.times_us.first();
            let age_us = first_us.map_or(0, |us| self.entry.received_at_us.saturating_sub(*us));
            stored.too_old += readings.too_old;
            stored.count_readings(self.readings() as u64, readings.time.quality as u8, age_us);
        }
    }

    pub fn gap_reason(&self) -> Option<u8> {
        match self.entry.content {
            Content::Gap { reason } => Some(reason),
            Content::Quarantined { .. } if self.first_seq < self.entry.seq => Some(REASON_REFUSED),
            _ => None,
        }
    }
}

/// Progress of a stream within a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Watermark including the appended entries.
    pub durable_seq: u64,
    pub frames: u64,
    pub readings: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stream {0:?} is not in the store")]
pub struct UnknownStream(pub StreamId);

/// Watermarks of the streams of one batch.
#[derive(Debug, Default)]
pub struct Watermarks {
    streams: BTreeMap<StreamId, Progress>,
    repeats: Vec<Repeat>,
    stored: Stored,
}

impl Watermarks {
    pub fn new(durable: impl IntoIterator<Item = (StreamId, u64)>) -> Self {
        let start = |(stream, durable_seq)| {
            (
                stream,
                Progress {
                    durable_seq,
                    frames: 0,
                    readings: 0,
                },
            )
        };
        Self {
            streams: durable.into_iter().map(start).collect(),
            repeats: Vec::new(),
            stored: Stored::default(),
        }
    }

    /// Returns the entries to store, in order, and advances the watermarks.
    ///
    /// # Errors
    /// A stream was not passed to [`Watermarks::new`].
    pub fn append<'a>(&mut self, entries: &'a [Entry]) -> Result<Vec<Appended<'a>>, UnknownStream> {
        let mut appended = Vec::with_capacity(entries.len());
        for entry in entries {
            let progress = self
                .streams
                .get_mut(&entry.stream)
                .ok_or(UnknownStream(entry.stream))?;
            let verdict = judge(progress.durable_seq, entry.first_seq, entry.seq);
            if let Verdict::Store { first_seq } = verdict {
                let item = Appended { entry, first_seq };
                progress.durable_seq = entry.seq;
                progress.frames += 1;
                progress.readings += item.readings() as u64;
                item.count(&mut self.stored);
                appended.push(item);
            } else if let (Verdict::Duplicate, Some(crc)) = (verdict, entry.crc) {
                self.stored.duplicates += 1;
                self.repeats.push(Repeat {
                    device: entry.device,
                    stream: entry.stream,
                    seq: entry.seq,
                    crc,
                    at_us: entry.received_at_us,
                });
            }
        }
        Ok(appended)
    }

    /// Returns the entries seen by [`Watermarks::append`] that were already durable.
    pub fn repeats(&self) -> &[Repeat] {
        &self.repeats
    }

    /// Returns what the appended entries add to the store.
    pub(super) fn stored(&self) -> Stored {
        self.stored.clone()
    }

    /// Returns the streams whose watermark moved, ordered by id.
    pub fn moved(&self) -> Vec<(StreamId, Progress)> {
        let moved = self
            .streams
            .iter()
            .filter(|(_, progress)| progress.frames > 0);
        moved
            .map(|(stream, progress)| (*stream, *progress))
            .collect()
    }

    /// Returns one receipt per stream, sorted. Hand them out only after the batch is durable.
    pub(super) fn receipts(&self) -> Vec<Receipt> {
        let receipt = |(stream, progress): (&StreamId, &Progress)| Receipt {
            stream: *stream,
            durable_seq: progress.durable_seq,
        };
        self.streams.iter().map(receipt).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::DeviceId;

    fn entry(stream: i64, first_seq: u64, seq: u64) -> Entry {
        Entry {
            device: DeviceId(1),
            stream: StreamId(stream),
            first_seq,
            seq,
            frame_type: 0x12,
            crc: None,
            received_at_us: 0,
            content: Content::Gap { reason: 0 },
            clock: None,
        }
    }

    #[test]
    fn verdicts() {
        let store = |first_seq| Verdict::Store { first_seq };
        for (durable, first, seq, expected) in [
            (0, 1, 1, store(1)),
            (7, 8, 8, store(8)),
            (7, 7, 7, Verdict::Duplicate),
            (7, 1, 3, Verdict::Duplicate),
            (7, 9, 9, Verdict::OutOfOrder),
            (7, 5, 12, store(8)),
            (7, 8, 12, store(8)),
            (7, 9, 12, Verdict::OutOfOrder),
            (0, 0, 0, Verdict::Duplicate),
            (0, 1, SEQ_MAX, store(1)),
            (0, 1, SEQ_MAX + 1, Verdict::OutOfOrder),
            (0, 1, u64::MAX, Verdict::OutOfOrder),
            (SEQ_MAX, SEQ_MAX, u64::MAX, Verdict::OutOfOrder),
        ] {
            assert_eq!(
                judge(durable, first, seq),
                expected,
                "{durable} {first}..={seq}"
            );
        }
    }

    #[test]
    fn an_unknown_stream_is_an_error() {
        let entries = [entry(3, 1, 1)];
        let unknown = Watermarks::new([(StreamId(2), 0)])
            .append(&entries)
            .unwrap_err();
        assert_eq!(unknown, UnknownStream(StreamId(3)));
    }

    /// Naive model: the set of stored numbers of each stream.
    fn model(entries: &[Entry]) -> BTreeMap<StreamId, Vec<u64>> {
        let mut stored: BTreeMap<StreamId, Vec<u64>> = BTreeMap::new();
        for entry in entries {
            let numbers = stored.entry(entry.stream).or_default();
            let fresh: Vec<u64> = (entry.first_seq..=entry.seq)
                .filter(|seq| !numbers.contains(seq))
                .collect();
            if fresh.first() == Some(&(numbers.len() as u64 + 1)) {
                numbers.extend(fresh);
            }
        }
        stored
    }

    proptest! {
        #[test]
        fn each_number_is_stored_once_and_in_order(
            arrivals in prop::collection::vec((0_i64..3, 1_u64..24, 0_u64..5), 0..120),
            batch_len in 1_usize..40,
        ) {
            let entries: Vec<Entry> =
                arrivals.iter().map(|&(stream, seq, more)| entry(stream, seq, seq + more)).collect();
            let mut durable: BTreeMap<StreamId, u64> = (0..3).map(|id| (StreamId(id), 0)).collect();
            let mut stored: BTreeMap<StreamId, Vec<u64>> = BTreeMap::new();
            for batch in entries.chunks(batch_len) {
                let mut watermarks = Watermarks::new(durable.clone());
                for item in watermarks.append(batch).unwrap() {
                    let numbers = stored.entry(item.entry.stream).or_default();
                    prop_assert_eq!(item.first_seq, numbers.last().copied().unwrap_or(0) + 1);
                    numbers.extend(item.first_seq..=item.entry.seq);
                }
                for receipt in watermarks.receipts() {
                    durable.insert(receipt.stream(), receipt.durable_seq());
                }
            }
            let mut expected = model(&entries);
            expected.retain(|_, numbers| !numbers.is_empty());
            prop_assert_eq!(&stored, &expected);
            for (stream, numbers) in &stored {
                prop_assert_eq!(durable[stream], numbers.len() as u64);
            }
        }
    }
}
