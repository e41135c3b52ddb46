//! What continues a stream, and what was there before: the rule by which every store is exactly-once.

use std::collections::BTreeMap;

use super::{Entry, Receipt, StreamId};

/// What a store does with an entry, given how far its stream is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It continues the stream: store it, and move the watermark to its number. A gap may begin among
    /// what is durable; only the part from `first_seq` is missing.
    Store {
        /// First number it covers that is not durable yet.
        first_seq: u64,
    },
    /// All it covers is durable.
    Duplicate,
    /// What comes before it is not durable: not stored, the watermark stays.
    OutOfOrder,
}

/// Judges numbers `first_seq..=seq` of a stream that is durable through `durable_seq`.
pub fn judge(durable_seq: u64, first_seq: u64, seq: u64) -> Verdict {
    if seq <= durable_seq {
        Verdict::Duplicate
    } else if first_seq > durable_seq + 1 {
        Verdict::OutOfOrder
    } else {
        Verdict::Store {
            first_seq: durable_seq + 1,
        }
    }
}

/// How far each stream of a batch is durable, as its entries are judged one after the other.
#[derive(Debug, Default)]
pub struct Watermarks {
    durable_seqs: BTreeMap<StreamId, u64>,
}

impl Watermarks {
    /// From what the store holds.
    pub fn new(stored: impl IntoIterator<Item = (StreamId, u64)>) -> Watermarks {
        Watermarks {
            durable_seqs: stored.into_iter().collect(),
        }
    }

    /// The entries to store, in order, each with the first number it covers anew. The watermarks are
    /// moved past them.
    pub fn admit<'e>(&mut self, entries: &'e [Entry]) -> Vec<(&'e Entry, u64)> {
        let mut admitted = Vec::with_capacity(entries.len());
        for entry in entries {
            let durable_seq = self.durable_seqs.entry(entry.stream).or_default();
            if let Verdict::Store { first_seq } = judge(*durable_seq, entry.first_seq, entry.seq) {
                *durable_seq = entry.seq;
                admitted.push((entry, first_seq));
            }
        }
        admitted
    }

    /// A receipt for each stream, sorted by stream; to be given out after the commit.
    pub fn receipts(&self) -> Vec<Receipt> {
        self.durable_seqs
            .iter()
            .map(|(stream, durable_seq)| Receipt {
                stream: *stream,
                durable_seq: *durable_seq,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::{Content, DeviceId};

    fn entry(stream: i64, first_seq: u64, seq: u64) -> Entry {
        Entry {
            device: DeviceId(1),
            stream: StreamId(stream),
            first_seq,
            seq,
            frame_type: 0x12,
            received_at_us: 0,
            content: Content::Gap { reason: 0 },
        }
    }

    proptest! {
        /// However entries are repeated, reordered or overlap: each number is stored at most once, what
        /// is stored is contiguous, and nothing that continues the stream is left out.
        #[test]
        fn stores_each_number_once_and_in_order(
            spans in prop::collection::vec((1i64..3, 1u64..12, 0u64..4), 0..80),
            start in 0u64..5,
        ) {
            let entries: Vec<Entry> = spans
                .iter()
                .map(|(stream, first_seq, more)| entry(*stream, *first_seq, first_seq + more))
                .collect();
            let mut watermarks = Watermarks::new([(StreamId(1), start), (StreamId(2), start)]);
            let admitted = watermarks.admit(&entries);
            for stream in [StreamId(1), StreamId(2)] {
                let mut durable_seq = start;
                for entry in entries.iter().filter(|entry| entry.stream == stream) {
                    if entry.first_seq <= durable_seq + 1 && entry.seq > durable_seq {
                        durable_seq = entry.seq;
                    }
                }
                let mut covered = start;
                for (entry, first_seq) in admitted.iter().filter(|(e, _)| e.stream == stream) {
                    prop_assert_eq!(*first_seq, covered + 1);
                    prop_assert!(entry.first_seq <= *first_seq && *first_seq <= entry.seq);
                    covered = entry.seq;
                }
                prop_assert_eq!(covered, durable_seq);
                let receipts = watermarks.receipts();
                let receipt = receipts.iter().find(|receipt| receipt.stream == stream).unwrap();
                prop_assert_eq!(receipt.durable_seq, durable_seq);
            }
        }
    }

    #[test]
    fn a_gap_that_overlaps_what_is_durable_begins_after_it() {
        assert_eq!(judge(5, 3, 9), Verdict::Store { first_seq: 6 });
        assert_eq!(judge(9, 3, 9), Verdict::Duplicate);
        assert_eq!(judge(1, 3, 9), Verdict::OutOfOrder);
    }
}
