//! Verification of one stream: its numbers, frame rows, gaps, and quarantined frames, byte for byte.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{FRAME_BYTES_MAX, HEADER_BYTES, types};

use super::store::{ReadError, Row, Store};
use super::{Own, Verdict};
use crate::encode::refusal_code;
use crate::plan::{Clock, FrameContent};
use crate::readings::Readings;
use crate::wire::Workbench;

/// NACK code of a frame whose payload was damaged in transit twice.
const DAMAGED: i64 = Code::PayloadCrcTwice as i64;
/// Range of plausible UTC times (R75): not before 2020, at most a day after receipt.
const PLAUSIBLE_FROM_US: i64 = 1_577_836_800_000_000;
const PLAUSIBLE_AHEAD_US: i64 = 86_400_000_000;
/// Value of `frames.quality` for a time in UTC.
const UTC: i64 = 0;
const ANCHORED: i64 = 1;
const SUSPECT: i64 = 3;

/// The part of a frame that verifying its readings needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) id: i64,
    pub(super) seq: u64,
    /// Offset added to the device's time.
    pub(super) offset_us: i64,
    /// Number of rows of readings that were sent, 0 for a frame without readings.
    pub(super) rows: u16,
    /// Index of the device's run that sent it.
    pub(super) own: u16,
}

pub(super) struct StreamRow {
    pub(super) id: i64,
    pub(super) stream: u64,
    pub(super) durable_seq: u64,
    pub(super) frames: i64,
    pub(super) readings: i64,
    pub(super) created_at_us: i64,
}

impl StreamRow {
    pub(super) const SQL: &str = "SELECT id, stream, durable_seq, frames, readings, created_at \
                                  FROM streams WHERE device_id = $1 ORDER BY id";

    pub(super) fn read(row: &Row) -> Result<StreamRow, ReadError> {
        Ok(StreamRow {
            id: row.integer(0)?,
            stream: row.integer(1)?.cast_unsigned(),
            durable_seq: row.integer(2)?.cast_unsigned(),
            frames: row.integer(3)?,
            readings: row.integer(4)?,
            created_at_us: row.integer(5)?,
        })
    }
}

/// Verification of one stream of one run.
pub(super) struct StreamProof<'a> {
    pub(super) own: &'a Own<'a>,
    pub(super) own_index: u16,
    pub(super) row: StreamRow,
    /// Addresses from which the device logged in; `None` if not all are known.
    pub(super) addresses: Option<&'a HashSet<SocketAddr>>,
}

struct FrameRow {
    id: i64,
    seq: u64,
    frame_type: i64,
    readings: i64,
    received_at_us: i64,
    quality: Option<i64>,
    offset_us: Option<i64>,
}

impl StreamProof<'_> {
    /// Verifies the stream's rows and appends its frames to `frames`.
    pub(super) async fn prove(
        &self,
        store: &mut Store,
        frames: &mut Vec<Frame>,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let gaps = self.prove_gaps(store, verdict).await?;
        let codes = self.prove_quarantine(store, verdict).await?;
        let mut walk = Walk {
            proof: self,
            gaps,
            codes: &codes,
            readings: Readings::default(),
            expected_seq: 1,
            frames: 0,
            readings_sum: 0,
        };
        let sql = "SELECT id, seq, type, readings, received_at, quality, clock_offset_us \
                   FROM frames WHERE stream_id = $1 ORDER BY seq";
        let on_row = |row: Row| {
            let row = FrameRow {
                id: row.integer(0)?,
                seq: row.integer(1)?.cast_unsigned(),
                frame_type: row.integer(2)?,
                readings: row.integer(3)?,
                received_at_us: row.integer(4)?,
                quality: row.integer_or_null(5)?,
                offset_us: row.integer_or_null(6)?,
            };
            frames.push(walk.take(&row, verdict));
            Ok(())
        };
        store.each(sql, &[self.row.id], on_row).await?;
        walk.finish(verdict);
        Ok(())
    }

    fn name(&self) -> &str {
        self.own.name()
    }

    /// Verifies that gaps cover only frames that the gateway lost in this run. Returns the start of each gap by its
    /// end.
    async fn prove_gaps(
        &self,
        store: &mut Store,
        verdict: &mut Verdict,
    ) -> Result<HashMap<u64, u64>, ReadError> {
        let sql =
            "SELECT from_seq, to_seq, reason FROM gaps WHERE stream_id = $1 ORDER BY from_seq";
        let rows = store.rows(sql, &[self.row.id]).await?;
        let mut gaps = HashMap::new();
        for row in &rows {
            let (first, last) = (
                row.integer(0)?.cast_unsigned(),
                row.integer(1)?.cast_unsigned(),
            );
            let reason = row.integer(2)?;
            let mut lost = self.own.journaled.lost.iter();
            if !lost.any(|(from, to)| *from <= first && last <= *to) {
                verdict.differ(|| {
                    format!(
                        "{}: gap {first} to {last}, reason {reason}: stored but not sent",
                        self.name()
                    )
                });
            }
            gaps.insert(last, first);
        }
        Ok(gaps)
    }

    /// Compares quarantined frames with those sent; returns the code of each frame.
    async fn prove_quarantine(
        &self,
        store: &mut Store,
        verdict: &mut Verdict,
    ) -> Result<HashMap<u64, i64>, ReadError> {
        let sql = "SELECT q.seq, q.code, q.received_at, q.peer, q.bytes, f.received_at \
                   FROM quarantine AS q \
                   LEFT JOIN frames AS f ON f.stream_id = q.stream_id AND f.seq = q.seq \
                   WHERE q.stream_id = $1 ORDER BY q.seq";
        let mut codes = HashMap::new();
        let mut workbench = Workbench::default();
        let mut sent = vec![0; FRAME_BYTES_MAX];
        let on_row = |row: Row| {
            let (seq, code) = (row.integer(0)?.cast_unsigned(), row.integer(1)?);
            let differ = |verdict: &mut Verdict, what: String| {
                verdict.differ(|| format!("{}: quarantined frame {seq}: {what}", self.name()));
            };
            if codes.insert(seq, code).is_some() {
                differ(verdict, "stored twice".to_owned());
            }
            match row.integer_or_null(5)? {
                None => differ(verdict, "no such frame is stored".to_owned()),
                Some(at_us) if at_us != row.integer(2)? => {
                    differ(
                        verdict,
                        "receive time differs from that of the frame".to_owned(),
                    );
                }
                Some(_) => {}
            }
            let peer = row.text_or_null(3)?.unwrap_or_default();
            if let Some(known) = self.addresses {
                let is_device = peer.parse().is_ok_and(|peer| known.contains(&peer));
                verdict.came_from(is_device, || {
                    let name = self.name();
                    format!("{name}: quarantined frame {seq} from {peer:?}, an address the device never used")
                });
            }
            let schema = self.own.run.schema;
            match workbench.frame(&self.own.device, seq, schema, &mut sent) {
                Err(_) => differ(verdict, "stored but not sent".to_owned()),
                Ok((frame_bytes, _)) => {
                    if !self.is_sent(seq, code, row.bytes(4)?, &sent[..frame_bytes]) {
                        differ(verdict, "bytes differ from those sent".to_owned());
                    }
                }
            }
            Ok(())
        };
        store.each(sql, &[self.row.id], on_row).await?;
        for (seq, code) in &self.own.journaled.quarantined {
            if codes.get(seq) != Some(&i64::from(*code)) {
                verdict.differ(|| {
                    format!(
                        "{}: frame {seq} was rejected with {code} but not quarantined",
                        self.name()
                    )
                });
            }
        }
        Ok(codes)
    }

    /// Returns whether `kept` results from the frame `sent`: the same bytes, or the bytes with one bit flipped if
    /// the frame was damaged.
    fn is_sent(&self, seq: u64, code: i64, kept: &[u8], sent: &[u8]) -> bool {
        if code != DAMAGED {
            return kept == sent;
        }
        if kept.len() != sent.len() || kept[..HEADER_BYTES] != sent[..HEADER_BYTES] {
            return false;
        }
        let differing: Vec<usize> = (HEADER_BYTES * 8..kept.len() * 8)
            .filter(|bit| (kept[bit / 8] ^ sent[bit / 8]) >> (bit % 8) & 1 == 1)
            .take(2)
            .collect();
        let made = self.own.journaled.damaged.iter();
        let made: Vec<usize> = made
            .filter(|(damaged, _)| *damaged == seq)
            .map(|(_, bit)| HEADER_BYTES * 8 + *bit as usize)
            .collect();
        let is_made = differing.len() == 1 && made.contains(&differing[0]);
        // The frame may also have been damaged in transit; the gateway then reported this while the device was
        // connected.
        let was_refused = self
            .own
            .journaled
            .quarantined
            .contains(&(seq, DAMAGED as u8));
        let is_anothers = made.len() < 2 && !differing.is_empty() && was_refused;
        is_made && made.len() > 1 || is_anothers || !self.own.run.ledger.complete
    }

    /// Returns the earliest and latest possible receive time of a frame, on the gateway's clock.
    fn received_within_us(&self, seq: u64) -> Option<(i64, i64)> {
        let (began_us, ended_us) = self.own.run.span_us()?;
        let due_us = self
            .own
            .run
            .pace
            .due_us(self.own.device.index(), seq.max(1));
        // An unacknowledged frame may have waited in the gateway's socket until after the run.
        let ended_us = match seq <= self.own.journaled.acked {
            true => ended_us,
            false => i64::MAX,
        };
        Some((began_us.saturating_add_unsigned(due_us), ended_us))
    }
}

/// State of a pass over the frames of a stream.
struct Walk<'a> {
    proof: &'a StreamProof<'a>,
    gaps: HashMap<u64, u64>,
    codes: &'a HashMap<u64, i64>,
    readings: Readings,
    expected_seq: u64,
    frames: i64,
    readings_sum: i64,
}

impl Walk<'_> {
    fn take(&mut self, row: &FrameRow, verdict: &mut Verdict) -> Frame {
        self.frames += 1;
        self.readings_sum = self.readings_sum.wrapping_add(row.readings);
        verdict.frames_stored += 1;
        let gap = self.gaps.remove(&row.seq);
        self.continue_with(row.seq, gap, verdict);
        let seq = row.seq;
        if let Some((least_us, most_us)) = self.proof.received_within_us(seq) {
            let at_us = row.received_at_us;
            if !(least_us..=most_us).contains(&at_us) {
                self.differ(verdict, || {
                    format!("frame {seq} received at {at_us} us, outside the time it was sent")
                });
            }
        }
        let code = self.codes.get(&seq).copied();
        let expected = match gap {
            Some(_) => Expected::of(types::GAP),
            None => self.expect(row, code, verdict),
        };
        if (expected.frame_type, expected.readings) != (row.frame_type, row.readings) {
            let (frame_type, readings) = (row.frame_type, row.readings);
            self.differ(verdict, || {
                format!(
                    "frame {seq} has type {frame_type:#04x} and {readings} readings, not \
                     {:#04x} and {}",
                    expected.frame_type, expected.readings
                )
            });
        }
        if expected.quality != row.quality {
            let quality = row.quality;
            self.differ(verdict, || {
                format!(
                    "frame {seq} has quality {quality:?}, not {:?}",
                    expected.quality
                )
            });
        }
        let is_offset = match (expected.quality, row.offset_us) {
            (None, offset_us) => offset_us.is_none(),
            (Some(ANCHORED), Some(offset_us)) => self.proof.own.is_offset(offset_us),
            (Some(_), offset_us) => offset_us == Some(0),
        };
        if !is_offset {
            let offset_us = row.offset_us;
            self.differ(verdict, || {
                format!(
                    "frame {seq} has clock offset {offset_us:?} us, more than its clock can be off"
                )
            });
        }
        Frame {
            id: row.id,
            seq,
            offset_us: row.offset_us.unwrap_or(0),
            rows: expected.rows,
            own: self.proof.own_index,
        }
    }

    /// Verifies that every number occurs exactly once.
    fn continue_with(&mut self, seq: u64, gap: Option<u64>, verdict: &mut Verdict) {
        let (first, expected) = (gap.unwrap_or(seq), self.expected_seq);
        if first != expected {
            self.differ(verdict, || {
                format!("expected frame {expected}, found {first}")
            });
        }
        if let Some(first) = gap {
            let acked = seq.min(self.proof.own.journaled.acked);
            if first <= acked {
                self.differ(verdict, || {
                    format!("frames {first} to {acked} were acknowledged but are not stored: the gateway lost them")
                });
            }
        }
        self.expected_seq = seq.saturating_add(1);
    }

    /// Returns the expected row of a frame that was sent.
    fn expect(&mut self, row: &FrameRow, code: Option<i64>, verdict: &mut Verdict) -> Expected {
        let own = self.proof.own;
        let content = own.device.frame(row.seq, &mut self.readings);
        let refusal = match content {
            Some(FrameContent::Malformed { variant, .. }) => Some(refusal_code(variant) as i64),
            _ => None,
        };
        if code == Some(DAMAGED) {
            verdict.damaged += 1;
        } else if code == refusal {
            verdict.quarantined += u64::from(code.is_some());
        } else {
            let seq = row.seq;
            let what = || {
                format!(
                    "{}: frame {seq} is quarantined as {code:?}, not {refusal:?}",
                    own.name()
                )
            };
            verdict.differ(what);
        }
        match content {
            // The fault may also be in the frame type.
            Some(FrameContent::Malformed {
                variant: crate::faults::Malformation::UnknownType,
                ..
            }) => Expected::of(crate::encode::UNKNOWN_TYPE),
            Some(FrameContent::Readings(readings)) if code.is_none() => {
                if row.seq <= own.journaled.acked {
                    verdict.readings_acked += readings.count();
                }
                Expected::readings(readings, own.device.clock(), row.received_at_us)
            }
            _ => Expected::of(types::DATA),
        }
    }

    fn finish(mut self, verdict: &mut Verdict) {
        let (own, row) = (self.proof.own, &self.proof.row);
        let last = self.expected_seq - 1;
        let (acked, sent) = (own.journaled.acked, own.journaled.sent);
        if last < acked {
            self.differ(verdict, || {
                format!(
                    "frames {} to {acked} were acknowledged but are not stored",
                    last + 1
                )
            });
        }
        if last != row.durable_seq {
            let durable_seq = row.durable_seq;
            self.differ(verdict, || {
                format!("durable_seq {durable_seq}, last frame {last}")
            });
        }
        // A simulator that was killed may have sent more frames than it recorded.
        if own.run.ledger.complete && last > sent {
            self.differ(verdict, || {
                format!("frame {last} is stored but was not sent; the last sent frame is {sent}")
            });
        }
        if (row.frames, row.readings) != (self.frames, self.readings_sum) {
            let (frames, readings) = (row.frames, row.readings);
            let (found, found_readings) = (self.frames, self.readings_sum);
            self.differ(verdict, || {
                format!(
                    "stream totals are {frames} frames and {readings} readings, but {found} and \
                     {found_readings} are stored"
                )
            });
        }
        for (last, first) in std::mem::take(&mut self.gaps) {
            self.differ(verdict, || format!("gap {first} to {last} has no frame"));
        }
    }

    fn differ(&self, verdict: &mut Verdict, what: impl FnOnce() -> String) {
        let (name, stream) = (self.proof.name(), self.proof.row.stream);
        verdict.differ(|| format!("{name} stream {stream}: {}", what()));
    }
}

/// Expected row of a frame.
struct Expected {
    frame_type: i64,
    readings: i64,
    rows: u16,
    quality: Option<i64>,
}

impl Expected {
    /// Returns the row of a frame of that type without readings.
    fn of(frame_type: u8) -> Expected {
        Expected {
            frame_type: frame_type.into(),
            readings: 0,
            rows: 0,
            quality: None,
        }
    }

    fn readings(readings: &Readings, clock: Clock, received_at_us: i64) -> Expected {
        let last = readings.rows.saturating_sub(1);
        let (oldest_us, newest_us) = (readings.time_us(0), readings.time_us(last));
        let is_plausible = oldest_us >= PLAUSIBLE_FROM_US
            && newest_us <= received_at_us.saturating_add(PLAUSIBLE_AHEAD_US);
        Expected {
            frame_type: types::DATA.into(),
            readings: readings.count() as i64,
            rows: readings.rows as u16,
            quality: Some(match clock {
                Clock::Boot => ANCHORED,
                Clock::Utc if is_plausible => UTC,
                Clock::Utc => SUSPECT,
            }),
        }
    }
}
