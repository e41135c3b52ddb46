//! Splits a batch into several transactions when the database rejects it as a whole.
//!
//! A limit on time, memory or locks rejects a large batch every time but accepts a smaller one. After an error
//! that depends on size, the next transaction gets half as much; after a number of successes, twice as much.
//! Resubmitting a batch whose first parts are committed is safe: the ledger skips their frames, as after a
//! COMMIT with unknown outcome.
//!
//! Invariant: parts keep the order of a batch: declares, entries, logins, then the rest.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{Batch, Committed, Content, Declare, Entry, Receipt, StreamId};

/// Successful parts before a larger one is tried; doubled after each failed attempt.
const PASSES_MIN: u32 = 8;
const PASSES_MAX: u32 = 1024;

/// Maximum size of a transaction.
#[derive(Debug)]
pub(super) struct Cut {
    /// Maximum weight of a part; `None` for no limit.
    weight_max: Option<usize>,
    passed: u32,
    passes_needed: u32,
    /// Whether the limit was raised since the last cut.
    has_grown: bool,
    /// Weight of the largest batch that was cut.
    whole: usize,
}

impl Default for Cut {
    fn default() -> Self {
        Self {
            weight_max: None,
            passed: 0,
            passes_needed: PASSES_MIN,
            has_grown: false,
            whole: 0,
        }
    }
}

impl Cut {
    /// Returns the next part, starting with the first item that was in no earlier part; `None` after the last
    /// one.
    pub(super) fn next_part<'b>(
        &self,
        batch: &'b Batch,
        taken: &mut usize,
    ) -> Option<Cow<'b, Batch>> {
        let all = items(batch);
        let weight_max = self.weight_max.unwrap_or(usize::MAX);
        if *taken == 0 && weight(batch) <= weight_max {
            *taken = all.max(1);
            return Some(Cow::Borrowed(batch));
        }
        if *taken >= all {
            return None;
        }
        let part = Part::of(batch, *taken, weight_max);
        *taken += items(&part);
        Some(Cow::Owned(part))
    }

    /// Records that a part was rejected for its size. Returns whether a smaller part, no smaller than `floor`,
    /// may be tried.
    pub(super) fn halve(&mut self, part: &Batch, floor: usize, reason: &str) -> bool {
        let weight = weight(part);
        if items(part) < 2 || weight <= floor {
            return false;
        }
        if std::mem::take(&mut self.has_grown) {
            self.passes_needed = (self.passes_needed * 2).min(PASSES_MAX);
        }
        self.passed = 0;
        self.whole = self.whole.max(weight);
        let half = (weight / 2).max(1);
        self.weight_max = Some(half);
        tracing::warn!(
            %reason,
            rows = weight,
            rows_max = half,
            "could not commit the batch in one transaction, committing it in parts"
        );
        true
    }

    /// Records that a part was committed.
    pub(super) fn pass(&mut self, part: &Batch) {
        let Some(weight_max) = self.weight_max else {
            return;
        };
        // The success of a small part shows nothing about the limit.
        if weight(part) * 2 < weight_max {
            return;
        }
        self.passed += 1;
        if self.passed < self.passes_needed {
            return;
        }
        (self.passed, self.has_grown) = (0, true);
        self.weight_max = Some(weight_max * 2).filter(|weight_max| *weight_max < self.whole);
        if self.weight_max.is_none() {
            tracing::info!("batches fit in one transaction again");
        }
    }
}

/// Combined results of the parts of a batch.
#[derive(Debug, Default)]
pub(super) struct Sum {
    committed: Committed,
    receipts: BTreeMap<StreamId, Receipt>,
}

impl Sum {
    pub(super) fn add(&mut self, part: Committed) {
        self.committed.logins.extend(part.logins);
        self.committed.declares.extend(part.declares);
        self.committed.stored.add(part.stored);
        // A stream's later part has the higher number.
        let receipts = part.receipts.into_iter();
        self.receipts
            .extend(receipts.map(|receipt| (receipt.stream(), receipt)));
    }

    pub(super) fn committed(mut self) -> Committed {
        self.committed.receipts = self.receipts.into_values().collect();
        self.committed
    }
}

/// A part under construction.
struct Part {
    part: Batch,
    skip: usize,
    weight: usize,
    weight_max: usize,
}

impl Part {
    /// Takes items after the first `skip`, and at least one.
    fn of(batch: &Batch, skip: usize, weight_max: usize) -> Batch {
        let mut it = Part {
            part: Batch::default(),
            skip,
            weight: 0,
            weight_max,
        };
        let is_whole = it.take(&batch.declares, declare_weight, |part| &mut part.declares)
            && it.take(&batch.entries, entry_weight, |part| &mut part.entries)
            && it.take(&batch.logins, |_| 1, |part| &mut part.logins)
            && it.take(&batch.clocks, |_| 1, |part| &mut part.clocks)
            && it.take(&batch.events, |_| 1, |part| &mut part.events)
            && it.take(&batch.refusals, |_| 1, |part| &mut part.refusals);
        if is_whole {
            // Few and small. Repeated numbers are compared with the frames of all parts.
            it.part.steps.clone_from(&batch.steps);
            it.part.repeats.clone_from(&batch.repeats);
        }
        debug_assert!(is_whole || it.weight > 0);
        it.part
    }

    /// Takes the items that fit; returns whether those are all.
    fn take<T: Clone>(
        &mut self,
        items: &[T],
        weight: impl Fn(&T) -> usize,
        into: impl Fn(&mut Batch) -> &mut Vec<T>,
    ) -> bool {
        let skipped = self.skip.min(items.len());
        self.skip -= skipped;
        for item in &items[skipped..] {
            let weight = weight(item);
            if self.weight > 0 && self.weight + weight > self.weight_max {
                return false;
            }
            self.weight += weight;
            into(&mut self.part).push(item.clone());
        }
        true
    }
}

/// Returns roughly how many rows a batch writes.
fn weight(batch: &Batch) -> usize {
    let declares = batch.declares.iter().map(declare_weight);
    let entries = batch.entries.iter().map(entry_weight);
    declares.chain(entries).sum::<usize>()
        + batch.logins.len()
        + batch.clocks.len()
        + batch.events.len()
        + batch.refusals.len()
}

fn declare_weight(declare: &Declare) -> usize {
    1 + declare.channels.len()
}

fn entry_weight(entry: &Entry) -> usize {
    match &entry.content {
        Content::Readings(readings) => 1 + readings.values.len(),
        _ => 1,
    }
}

/// Returns the number of indivisible items.
fn items(batch: &Batch) -> usize {
    batch.declares.len()
        + batch.entries.len()
        + batch.logins.len()
        + batch.clocks.len()
        + batch.events.len()
        + batch.refusals.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::reuse::Repeat;
    use crate::store::{DeviceEvent, DeviceEventKind, DeviceId};
    use crate::time::{ClockStep, Origin};

    fn batch(events: usize) -> Batch {
        let event = |n: usize| DeviceEvent {
            device: DeviceId(n as i64),
            session: None,
            at_us: 0,
            kind: DeviceEventKind::Connected,
            code: 0,
            detail: String::new(),
        };
        Batch {
            events: (0..events).map(event).collect(),
            ..Batch::default()
        }
    }

    fn parts<'b>(cut: &Cut, batch: &'b Batch) -> Vec<Cow<'b, Batch>> {
        let mut taken = 0;
        std::iter::from_fn(|| cut.next_part(batch, &mut taken)).collect()
    }

    fn sizes(cut: &Cut, batch: &Batch) -> Vec<usize> {
        let parts = parts(cut, batch);
        parts.iter().map(|part| part.events.len()).collect()
    }

    #[test]
    fn a_batch_is_halved_until_it_passes_and_grows_again() {
        let whole = batch(100);
        let mut cut = Cut::default();
        assert_eq!(sizes(&cut, &whole), [100]);
        assert!(cut.halve(&whole, 0, "too large"));
        assert_eq!(sizes(&cut, &whole), [50, 50]);
        assert!(cut.halve(&batch(50), 0, "too large"));
        assert_eq!(sizes(&cut, &whole), [25, 25, 25, 25]);
        let order = parts(&cut, &whole);
        let order = order.iter().flat_map(|part| &part.events);
        assert!(order.map(|event| event.device.0).eq(0..100));
        for _ in 0..PASSES_MIN {
            cut.pass(&batch(25));
        }
        assert_eq!(sizes(&cut, &whole), [50, 50]);
        // A size that failed again is tried half as often.
        assert!(cut.halve(&batch(50), 0, "too large"));
        for _ in 0..2 * PASSES_MIN - 1 {
            cut.pass(&batch(25));
        }
        assert_eq!(sizes(&cut, &whole), [25, 25, 25, 25]);
        cut.pass(&batch(25));
        for _ in 0..2 * PASSES_MIN {
            cut.pass(&batch(50));
        }
        assert_eq!(sizes(&cut, &whole), [100]);
    }

    #[test]
    fn every_item_of_a_batch_is_in_a_part() {
        let whole = Batch {
            steps: vec![ClockStep {
                origin: Origin::NONE,
                since_us: 1,
                before_us: 2,
                after_us: 3,
            }],
            repeats: vec![Repeat {
                device: DeviceId(1),
                stream: StreamId(3),
                seq: 7,
                crc: 9,
                at_us: 5,
            }],
            ..batch(10)
        };
        let mut cut = Cut::default();
        assert!(cut.halve(&whole, 0, "too large"));
        let parts = parts(&cut, &whole);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts.iter().map(|part| part.steps.len()).sum::<usize>(), 1);
        assert_eq!(
            parts.iter().map(|part| part.repeats.len()).sum::<usize>(),
            1
        );
    }

    #[test]
    fn indivisible_batches_are_not_cut() {
        let mut cut = Cut::default();
        assert_eq!(sizes(&cut, &batch(0)), [0]);
        assert!(!cut.halve(&batch(1), 0, "too large"));
        assert!(!cut.halve(&batch(2), 2, "too large"));
        assert!(cut.halve(&batch(2), 0, "too large"));
        assert_eq!(sizes(&cut, &batch(2)), [1, 1]);
        assert!(!cut.halve(&batch(1), 0, "too large"));
    }
}
