//! The proof: a run's journal against the store, row by row.
//!
//! What every frame held is computed again from the plan. Acked frames must be there, once and equal;
//! frames that were sent and not acked may be there, and then must be equal; nothing else may be there.
//!
//! Equal means: the same stream, number, channel, and time on the device's own clock, and the same
//! double bit for bit.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use fieldgate::store::reader::{OpenError, ReadError, Reader, Row};
use fieldgate::store::url::StoreUrl;
use fieldgate_protocol::column::scaled;
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;

use crate::encode::refusal_code;
use crate::journal::{DeviceLedger, Ledger};
use crate::plan::{DeviceScript, FrameContent, PlanError};
use crate::readings::{Channel, Readings, Values};

/// Differences that are told one by one.
const TOLD_MAX: usize = 10;

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The journal's plan cannot be carried out here.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store cannot be read.
    #[error("cannot read the store: {0}")]
    Read(#[from] ReadError),
}

/// What came of the comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Devices compared.
    pub devices: u64,
    /// Frames the journal calls acked.
    pub frames_acked: u64,
    /// Frames in the store.
    pub frames_stored: u64,
    /// Readings of acked frames.
    pub readings_acked: u64,
    /// Readings in the store.
    pub readings_stored: u64,
    /// Frames in quarantine that were sent malformed.
    pub quarantined: u64,
    /// Frames in quarantine because their payload was damaged on the way twice (code 35).
    pub damaged: u64,
    /// How many things differ.
    pub differences: u64,
    /// The first of them.
    pub told: Vec<String>,
}

impl Verdict {
    /// Whether what was acked is stored once and equal, and nothing was invented.
    pub fn is_equal(&self) -> bool {
        self.differences == 0
    }

    fn differ(&mut self, what: impl FnOnce() -> String) {
        self.differences += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push(what());
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} devices: {} frames acked, {} stored; {} of them in quarantine as sent malformed, {} as \
             damaged on the way twice",
            self.devices, self.frames_acked, self.frames_stored, self.quarantined, self.damaged
        )?;
        writeln!(
            f,
            "{} readings acked, {} stored",
            self.readings_acked, self.readings_stored
        )?;
        for difference in &self.told {
            writeln!(f, "  {difference}")?;
        }
        let untold = self.differences - self.told.len() as u64;
        if untold > 0 {
            writeln!(f, "  and {untold} more")?;
        }
        if self.is_equal() {
            write!(
                f,
                "equal: every acked reading is stored once, bit for bit, and none was invented"
            )
        } else {
            write!(f, "NOT EQUAL: {} differences", self.differences)
        }
    }
}

/// Compares a journal with the store. `progress` hears of every device done.
pub async fn verify(
    ledger: Ledger,
    store: &StoreUrl,
    mut progress: impl FnMut(u64),
) -> Result<Verdict, VerifyError> {
    let script = Arc::new(ledger.plan.open()?);
    let mut store = Reader::open(store).await?;
    let mut verdict = Verdict::default();
    for (index, journaled) in ledger.devices.iter().enumerate() {
        let device = script.device(index as u32);
        let comparison = Comparison {
            device: &device,
            channels: script.channels(),
            journaled,
            is_complete: ledger.complete,
        };
        comparison.run(&mut store, &mut verdict).await?;
        progress(index as u64 + 1);
    }
    Ok(verdict)
}

/// A row of the ledger.
#[derive(Clone, Copy)]
struct StoredFrame {
    seq: u64,
    frame_type: i64,
    readings: u64,
    clock_offset_us: i64,
    /// Why it is in quarantine, if it is.
    code: Option<i64>,
}

/// The code of a frame whose payload was damaged on the way twice.
const DAMAGED: i64 = Code::PayloadCrcTwice as i64;

/// A reading, in the order in which both sides are sorted: number, time on the device's clock, value.
type Sample = (u64, i64, Option<u64>);

struct Comparison<'a> {
    device: &'a DeviceScript,
    channels: &'a [Channel],
    journaled: &'a DeviceLedger,
    is_complete: bool,
}

impl Comparison<'_> {
    async fn run(&self, store: &mut Reader, verdict: &mut Verdict) -> Result<(), ReadError> {
        verdict.devices += 1;
        verdict.frames_acked += self.journaled.acked;
        let found = store
            .rows(
                "SELECT devices.id, streams.id, streams.durable_seq FROM devices \
                 JOIN streams ON streams.device_id = devices.id \
                 WHERE devices.name = $1 AND streams.stream = $2",
                &[
                    self.device.name().into(),
                    self.device.stream().cast_signed().into(),
                ],
            )
            .await?;
        let Some(found) = found.first() else {
            if self.journaled.acked > 0 {
                verdict.differ(|| {
                    let acked = self.journaled.acked;
                    format!(
                        "{}: stream not in the store, {acked} frames acked",
                        self.name()
                    )
                });
            }
            return Ok(());
        };
        let (device, stream) = (found.integer(0)?, found.integer(1)?);
        let durable_seq = found.integer(2)?.cast_unsigned();
        let frames = load_frames(store, stream).await?;
        self.compare_ledger(&frames, durable_seq, verdict);
        self.compare_quarantine(&frames, verdict);
        self.compare_readings(store, device, &frames, verdict).await
    }

    fn name(&self) -> &str {
        self.device.name()
    }

    /// Each number once, none missing, none that was never sent; each of the right type and size.
    fn compare_ledger(
        &self,
        frames: &HashMap<i64, StoredFrame>,
        durable_seq: u64,
        verdict: &mut Verdict,
    ) {
        verdict.frames_stored += frames.len() as u64;
        let mut stored: Vec<&StoredFrame> = frames.values().collect();
        stored.sort_unstable_by_key(|frame| frame.seq);
        for (expected_seq, frame) in (1..).zip(&stored) {
            if frame.seq != expected_seq {
                let found = frame.seq;
                verdict.differ(|| {
                    format!(
                        "{}: frame {expected_seq} expected, {found} found",
                        self.name()
                    )
                });
                break;
            }
        }
        let last = stored.last().map_or(0, |frame| frame.seq);
        let acked = self.journaled.acked;
        if last < acked {
            verdict.differ(|| {
                format!(
                    "{}: frames {}..={acked} acked and not stored",
                    self.name(),
                    last + 1
                )
            });
        }
        if last != durable_seq {
            verdict.differ(|| {
                format!(
                    "{}: durable_seq {durable_seq}, last frame {last}",
                    self.name()
                )
            });
        }
        // A simulator that was killed may have sent more than it wrote down.
        if self.is_complete && last > self.journaled.sent {
            let sent = self.journaled.sent;
            verdict.differ(|| format!("{}: frame {last} stored, {sent} sent", self.name()));
        }
        let mut buffer = Readings::default();
        for frame in stored {
            let expected = match self.device.frame(frame.seq, &mut buffer) {
                Some(_) if frame.code == Some(DAMAGED) => Some((frame.frame_type, 0)),
                Some(FrameContent::Readings(readings)) => {
                    Some((types::DATA.into(), readings.count()))
                }
                // The type on the wire is part of what may be wrong with it.
                Some(FrameContent::Malformed { .. }) => Some((frame.frame_type, 0)),
                None => None,
            };
            if expected != Some((frame.frame_type, frame.readings)) {
                verdict.differ(|| {
                    let StoredFrame {
                        seq,
                        frame_type,
                        readings,
                        ..
                    } = frame;
                    format!(
                        "{}: frame {seq} has type {frame_type:#04x} and {readings} readings, \
                         expected {expected:?}",
                        self.name()
                    )
                });
            }
        }
    }

    /// Every malformed frame is in quarantine, with the code of what is wrong with it; so is whatever
    /// the gateway said it put there. Others may be there only as damaged.
    fn compare_quarantine(&self, frames: &HashMap<i64, StoredFrame>, verdict: &mut Verdict) {
        let mut buffer = Readings::default();
        for frame in frames.values() {
            let expected = match self.device.frame(frame.seq, &mut buffer) {
                Some(FrameContent::Malformed { variant, .. }) => Some(refusal_code(variant) as i64),
                _ => None,
            };
            match frame.code {
                Some(DAMAGED) => verdict.damaged += 1,
                code if code == expected => verdict.quarantined += u64::from(code.is_some()),
                code => verdict.differ(|| {
                    let seq = frame.seq;
                    format!(
                        "{}: frame {seq} in quarantine as {code:?}, not {expected:?}",
                        self.name()
                    )
                }),
            }
        }
        for (seq, code) in &self.journaled.quarantined {
            let is_kept =
                |frame: &StoredFrame| frame.seq == *seq && frame.code == Some((*code).into());
            if !frames.values().any(is_kept) {
                verdict.differ(|| {
                    format!(
                        "{}: frame {seq} refused with {code} and not kept",
                        self.name()
                    )
                });
            }
        }
    }

    async fn compare_readings(
        &self,
        store: &mut Reader,
        device: i64,
        frames: &HashMap<i64, StoredFrame>,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let understood = frames.values().filter(|frame| frame.code.is_none());
        let mut seqs: Vec<u64> = understood.map(|frame| frame.seq).collect();
        seqs.sort_unstable();
        for (column, channel) in self.channels.iter().enumerate() {
            let expected = self.expected_samples(column, channel, &seqs, verdict);
            let stored = load_samples(store, device, channel, frames).await?;
            verdict.readings_stored += stored.len() as u64;
            for (found, (seq, time_us, bits)) in differing(&expected, &stored) {
                let what = if found {
                    "stored and not sent"
                } else {
                    "sent and not stored"
                };
                let value = bits.map_or("no valid value".into(), |bits| {
                    format!("{} ({bits:#018x})", f64::from_bits(bits))
                });
                verdict.differ(|| {
                    format!(
                        "{} stream {} seq {seq} {} at {time_us} us: {value} {what}",
                        self.name(),
                        self.device.stream(),
                        channel.name,
                    )
                });
            }
        }
        Ok(())
    }

    fn expected_samples(
        &self,
        column: usize,
        channel: &Channel,
        seqs: &[u64],
        verdict: &mut Verdict,
    ) -> Vec<Sample> {
        let mut buffer = Readings::default();
        let mut samples = Vec::new();
        for seq in seqs {
            let Some(FrameContent::Readings(readings)) = self.device.frame(*seq, &mut buffer)
            else {
                continue;
            };
            if *seq <= self.journaled.acked {
                verdict.readings_acked += readings.rows as u64;
            }
            for row in 0..readings.rows {
                let bits = stored_bits(readings, column, row, channel.exp10);
                samples.push((*seq, readings.time_us(row), bits));
            }
        }
        samples.sort_unstable();
        samples
    }
}

/// The bits of the double that is stored for a sample; `None` where NULL is.
fn stored_bits(readings: &Readings, column: usize, row: usize, exp10: i8) -> Option<u64> {
    let column = &readings.columns[column];
    if column.nulls.contains(row) {
        return None;
    }
    let value = match &column.values {
        Values::Integer(values) => scaled(values[row], exp10),
        Values::F32(values) => f64::from(values[row]),
        Values::F64(values) => values[row],
        Values::Bool(values) => f64::from(u8::from(values[row])),
    };
    (!value.is_nan()).then_some(value.to_bits())
}

async fn load_frames(
    store: &mut Reader,
    stream: i64,
) -> Result<HashMap<i64, StoredFrame>, ReadError> {
    let rows = store
        .rows(
            "SELECT frames.id, frames.seq, type, readings, coalesce(clock_offset_us, 0), code \
             FROM frames LEFT JOIN quarantine USING (stream_id, seq) WHERE stream_id = $1",
            &[stream.into()],
        )
        .await?;
    let frame = |row: &Row| {
        let frame = StoredFrame {
            seq: row.integer(1)?.cast_unsigned(),
            frame_type: row.integer(2)?,
            readings: row.integer(3)?.cast_unsigned(),
            clock_offset_us: row.integer(4)?,
            code: row.integer_or_null(5)?,
        };
        Ok((row.integer(0)?, frame))
    };
    rows.iter().map(frame).collect()
}

/// The readings of a channel that came with one of `frames`; other streams write to the same series.
async fn load_samples(
    store: &mut Reader,
    device: i64,
    channel: &Channel,
    frames: &HashMap<i64, StoredFrame>,
) -> Result<Vec<Sample>, ReadError> {
    let series = store
        .rows(
            "SELECT id FROM series \
             WHERE device_id = $1 AND channel = $2 AND unit = $3 AND kind = $4",
            &[
                device.into(),
                channel.name.as_str().into(),
                channel.unit.as_str().into(),
                channel.kind.name().into(),
            ],
        )
        .await?;
    let mut samples = Vec::new();
    let Some(series) = series.first() else {
        return Ok(samples);
    };
    let sql = "SELECT frame_id, ts, value FROM readings WHERE series_id = $1";
    let on_row = |row: Row| {
        samples.extend(sample(&row, frames)?);
        Ok(())
    };
    store
        .each(sql, &[series.integer(0)?.into()], on_row)
        .await?;
    samples.sort_unstable();
    Ok(samples)
}

/// `None` if it came with a frame of another stream.
fn sample(row: &Row, frames: &HashMap<i64, StoredFrame>) -> Result<Option<Sample>, ReadError> {
    let Some(frame) = frames.get(&row.integer(0)?) else {
        return Ok(None);
    };
    let time_us = row.integer(1)? - frame.clock_offset_us;
    let bits = row.real_or_null(2)?.map(f64::to_bits);
    Ok(Some((frame.seq, time_us, bits)))
}

/// What only one of two sorted lists has; `true` for the second. Repeated items count.
fn differing<T: Ord + Copy>(expected: &[T], found: &[T]) -> Vec<(bool, T)> {
    let (mut expected, mut found) = (expected.iter().peekable(), found.iter().peekable());
    let mut differing = Vec::new();
    loop {
        match (expected.peek(), found.peek()) {
            (Some(e), Some(f)) if e == f => {
                expected.next();
                found.next();
            }
            (Some(e), Some(f)) if e > f => {
                differing.push((true, **f));
                found.next();
            }
            (Some(e), _) => {
                differing.push((false, **e));
                expected.next();
            }
            (None, Some(f)) => {
                differing.push((true, **f));
                found.next();
            }
            (None, None) => return differing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::differing;

    #[test]
    fn every_kind_of_difference_is_found() {
        assert!(differing(&[1, 2, 2], &[1, 2, 2]).is_empty());
        assert_eq!(differing(&[1, 2], &[2]), [(false, 1)]);
        assert_eq!(differing(&[2], &[2, 2]), [(true, 2)]);
        assert_eq!(differing(&[1, 3], &[1, 2]), [(true, 2), (false, 3)]);
        assert_eq!(differing(&[], &[7]), [(true, 7)]);
    }
}
