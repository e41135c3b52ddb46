//! Numbers that come again: a frame is stored once for its number, and what comes again under it is the same
//! frame, sent once more. If its checksum is another one, the device gave out a number twice: its queue was
//! copied to another device, or put back to an earlier state.
//!
//! A row of the ledger has the checksum of its frame. It is looked up only for what comes again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{DeviceEvent, DeviceEventKind, DeviceId, StreamId};

/// From one line of a stream to the next, in the log and in the audit trail.
const QUIET: Duration = Duration::from_secs(60);
/// Streams of which is remembered when they were reported.
const STREAMS_MAX: usize = 10_000;

/// A number that came again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// Whose.
    pub device: DeviceId,
    /// Of which stream.
    pub stream: StreamId,
    /// The number.
    pub seq: u64,
    /// CRC-32C of the frame that came.
    pub crc: u32,
    /// When, microseconds UTC.
    pub at_us: i64,
}

/// A row of the ledger as it was looked up.
pub(super) fn row((stream, seq, crc): (i64, i64, Option<i64>)) -> (StreamId, u64, Option<u32>) {
    let crc = crc.and_then(|crc| u32::try_from(crc).ok());
    (StreamId(stream), seq.cast_unsigned(), crc)
}

/// Reports numbers that were given out twice, each stream once in a while.
#[derive(Debug, Default)]
pub(super) struct Reuse {
    reported: HashMap<StreamId, Instant>,
}

impl Reuse {
    /// Returns the lines of the audit trail for those of `repeats` that are not what the ledger has of them:
    /// `stored` gives stream, number and checksum.
    pub(super) fn report(
        &mut self,
        repeats: &[Repeat],
        stored: impl IntoIterator<Item = (StreamId, u64, Option<u32>)>,
        now: Instant,
    ) -> Vec<DeviceEvent> {
        let stored: HashMap<(StreamId, u64), u32> = { stored.into_iter() }
            .filter_map(|(stream, seq, crc)| Some(((stream, seq), crc?)))
            .collect();
        let mut events = Vec::new();
        for repeat in repeats {
            let known = stored.get(&(repeat.stream, repeat.seq));
            if known.is_none_or(|crc| *crc == repeat.crc) || !self.may_report(repeat.stream, now) {
                continue;
            }
            let detail = format!("number {} came again with other content", repeat.seq);
            tracing::warn!(
                device = repeat.device.0,
                seq = repeat.seq,
                "a number came again with other content: is the device's queue a copy, or put back?"
            );
            events.push(DeviceEvent {
                device: repeat.device,
                session: None,
                at_us: repeat.at_us,
                kind: DeviceEventKind::NumberReused,
                code: 0,
                detail,
            });
        }
        events
    }

    fn may_report(&mut self, stream: StreamId, now: Instant) -> bool {
        let is_quiet = |at: &Instant| now.duration_since(*at) < QUIET;
        if self.reported.get(&stream).is_some_and(is_quiet) {
            return false;
        }
        if self.reported.len() >= STREAMS_MAX {
            self.reported.retain(|_, at| is_quiet(at));
        }
        if self.reported.len() >= STREAMS_MAX {
            return false;
        }
        self.reported.insert(stream, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_other_content_is_reported_and_each_stream_once_in_a_while() {
        let repeat = |stream, seq, crc| Repeat {
            device: DeviceId(1),
            stream: StreamId(stream),
            seq,
            crc,
            at_us: 5,
        };
        let stored = [
            (StreamId(1), 7, Some(70)),
            (StreamId(1), 8, Some(80)),
            (StreamId(2), 7, None),
        ];
        let mut reuse = Reuse::default();
        let start = Instant::now();
        let mut report = |repeats: &[Repeat], after| {
            let events = reuse.report(repeats, stored, start + Duration::from_secs(after));
            events
                .into_iter()
                .map(|event| event.detail)
                .collect::<Vec<_>>()
        };
        let same = [repeat(1, 7, 70), repeat(2, 7, 71), repeat(3, 1, 1)];
        assert!(report(&same, 0).is_empty());
        let other = [repeat(1, 7, 71), repeat(1, 8, 81)];
        assert_eq!(
            report(&other, 0),
            ["number 7 came again with other content"]
        );
        assert!(report(&other, 59).is_empty());
        assert_eq!(report(&other, 60).len(), 1);
    }
}
