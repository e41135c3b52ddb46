//! Detects reused sequence numbers. A frame is stored once per number, and a repetition is normally the same
//! frame, resent. If its checksum differs, the device assigned the number twice: its queue was copied to
//! another device or restored to an earlier state.
//!
//! A row of the ledger has the checksum of its frame. It is looked up only for repeated numbers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{DeviceEvent, DeviceEventKind, DeviceId, StreamId};

/// Minimum interval between two reports for a stream, in the log and in the audit trail.
const QUIET: Duration = Duration::from_secs(60);
/// Number of streams whose latest report is remembered.
const STREAMS_MAX: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    pub device: DeviceId,
    pub stream: StreamId,
    pub seq: u64,
    /// CRC-32C of the repeated frame.
    pub crc: u32,
    /// Time of arrival, microseconds UTC.
    pub at_us: i64,
}

/// Converts a row of the ledger.
pub(super) fn row((stream, seq, crc): (i64, i64, Option<i64>)) -> (StreamId, u64, Option<u32>) {
    let crc = crc.and_then(|crc| u32::try_from(crc).ok());
    (StreamId(stream), seq.cast_unsigned(), crc)
}

/// Reports reused numbers, at limited intervals per stream.
#[derive(Debug, Default)]
pub(super) struct Reuse {
    reported: HashMap<StreamId, Instant>,
}

impl Reuse {
    /// Returns audit events for those of `repeats` that differ from the ledger: `stored` has stream, number and
    /// checksum.
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
            let detail = format!("number {} was reused with different content", repeat.seq);
            tracing::warn!(
                device = repeat.device.0,
                seq = repeat.seq,
                "device reused a sequence number with different content; its queue may be a copy or restored"
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
    fn only_different_content_is_reported_at_limited_intervals() {
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
            ["number 7 was reused with different content"]
        );
        assert!(report(&other, 59).is_empty());
        assert_eq!(report(&other, 60).len(), 1);
    }
}
