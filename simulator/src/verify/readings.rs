//! Verification of one series: its readings in time order, each compared with the frame that sent it.
//!
//! Readings are streamed. For each frame, the verifier keeps the number of readings seen and the row of the last one.
//! Readings of a frame arrive in row order, so none can be stored twice, and all are stored if the count matches.

use fieldgate_protocol::column::scaled;

use super::ledger::Frame;
use super::store::{ReadError, Row, Store, Value};
use super::{Own, Verdict};
use crate::plan::FrameContent;
use crate::readings::{Readings, Values};

/// Number of differences per series that are shown individually.
const SHOWN_MAX: usize = 3;
/// Number of regenerated frames to cache, because readings of neighbouring frames may alternate.
const KEPT_FRAMES: usize = 8;

/// Selects all readings of a series in SQLite from the tables themselves, compacted and recent.
const SQLITE: &str = "SELECT ts, frame_id, value FROM readings_sorted WHERE series_id = $1
     UNION ALL
     SELECT u.ts + CAST(v.key AS INTEGER), u.frame_id, v.value
     FROM readings_sorting AS m
     CROSS JOIN readings_recent AS u ON u.id > m.sorted_id
         AND (u.id > m.sorting_id OR (u.series_id, u.ts, u.frame_id) > (m.series_id, m.ts, m.frame_id))
     CROSS JOIN json_each(u.samples) AS v
     WHERE u.series_id = $1
     ORDER BY 1, 2";
const POSTGRES: &str =
    "SELECT ts, frame_id, value FROM readings WHERE series_id = $1 ORDER BY ts, frame_id";
/// Counts readings of a series from streams of other runs.
const OTHERS: &str = "SELECT count(*) FROM readings AS r
     JOIN frames AS f ON f.id = r.frame_id JOIN streams AS s ON s.id = f.stream_id
     WHERE r.series_id = $1 AND s.device_id = $2 AND s.stream NOT IN ";

pub(super) struct SeriesRow {
    id: i64,
    channel: String,
    unit: String,
    kind: String,
}

impl SeriesRow {
    pub(super) fn read(row: &Row) -> Result<SeriesRow, ReadError> {
        let text = |column| -> Result<String, ReadError> {
            Ok(row.text_or_null(column)?.unwrap_or_default().to_owned())
        };
        Ok(SeriesRow {
            id: row.integer(0)?,
            channel: text(1)?,
            unit: text(2)?,
            kind: text(3)?,
        })
    }

    pub(super) async fn count(&self, store: &mut Store) -> Result<i64, ReadError> {
        let sql = "SELECT count(*) FROM readings WHERE series_id = $1";
        store.row(sql, &[self.id]).await?.integer(0)
    }

    pub(super) fn describe(&self) -> String {
        format!("{} [{}] {}", self.channel, self.unit, self.kind)
    }

    /// Returns the channel of a run that this series stores.
    pub(super) fn column(&self, own: &Own<'_>) -> Option<usize> {
        own.run.script.channels().iter().position(|channel| {
            channel.name == self.channel
                && channel.unit == self.unit
                && channel.kind.name() == self.kind
        })
    }
}

pub(super) struct SeriesProof<'a> {
    pub(super) owns: &'a [Own<'a>],
    /// For each of `owns`, the channel that this series stores.
    pub(super) columns: Vec<Option<usize>>,
    /// In id order.
    pub(super) frames: &'a [Frame],
    pub(super) series: SeriesRow,
    pub(super) device: i64,
    /// Whether it may contain readings of other runs.
    pub(super) is_mixed: bool,
}

/// Progress within a frame.
#[derive(Clone, Copy, Default)]
struct Seen {
    readings: u16,
    /// Rows before this one have been processed.
    rows: u16,
}

/// A reading as stored.
struct Stored<'a> {
    ts_us: i64,
    frame_id: i64,
    value: &'a Value,
}

impl SeriesProof<'_> {
    pub(super) async fn prove(
        &self,
        store: &mut Store,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let sql = match store {
            Store::Sqlite(_) => SQLITE,
            Store::Postgres(_) => POSTGRES,
        };
        let mut walk = Walk {
            proof: self,
            seen: vec![Seen::default(); self.frames.len()],
            kept: Kept::default(),
            strange: 0,
            shown: 0,
        };
        let on_row = |row: Row| {
            let stored = Stored {
                ts_us: row.integer(0)?,
                frame_id: row.integer(1)?,
                value: &row.0[2],
            };
            walk.take(&stored, verdict);
            Ok(())
        };
        store.each(sql, &[self.series.id], on_row).await?;
        let strange = walk.finish(verdict);
        if self.is_mixed && strange > 0 {
            self.explain(store, strange, verdict).await?;
        }
        Ok(())
    }

    /// Verifies that readings of unknown frames belong to other streams of the device.
    async fn explain(
        &self,
        store: &mut Store,
        strange: u64,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let streams: Vec<String> = self
            .owns
            .iter()
            .map(|own| own.device.stream().to_string())
            .collect();
        let sql = format!("{OTHERS} ({})", streams.join(", "));
        let arguments = [self.series.id, self.device];
        let others = store.row(&sql, &arguments).await?.integer(0)?;
        let invented = strange.abs_diff(others.cast_unsigned());
        if invented > 0 {
            verdict.differ(|| {
                format!(
                    "{} {}: {invented} readings without a frame: stored but not sent",
                    self.owns[0].name(),
                    self.series.describe()
                )
            });
        }
        Ok(())
    }

    fn find(&self, frame_id: i64) -> Option<usize> {
        let found = self
            .frames
            .binary_search_by_key(&frame_id, |frame| frame.id);
        found.ok()
    }
}

/// State of a pass over the readings of a series.
struct Walk<'a> {
    proof: &'a SeriesProof<'a>,
    /// In the order of the frames.
    seen: Vec<Seen>,
    kept: Kept,
    /// Readings of frames that belong to none of the runs.
    strange: u64,
    /// Number of differences that were shown individually.
    shown: usize,
}

impl Walk<'_> {
    fn take(&mut self, stored: &Stored<'_>, verdict: &mut Verdict) {
        verdict.readings_stored += 1;
        let Some(index) = self.proof.find(stored.frame_id) else {
            self.strange += 1;
            if !self.proof.is_mixed {
                let frame_id = stored.frame_id;
                let what =
                    format!("stored but not sent: the device has no frame with id {frame_id}");
                self.differ(None, stored, &what, verdict);
            }
            return;
        };
        let frame = self.proof.frames[index];
        let own = &self.proof.owns[usize::from(frame.own)];
        let column = self.proof.columns[usize::from(frame.own)];
        let time_us = stored.ts_us.wrapping_sub(frame.offset_us);
        let (Some(column), true) = (column, frame.rows > 0) else {
            self.differ(
                Some(frame),
                stored,
                "stored but not sent: not in the frame",
                verdict,
            );
            return;
        };
        let readings = self.kept.get(index, frame.seq, own);
        let Some(row) = row_at(readings, time_us) else {
            self.differ(
                Some(frame),
                stored,
                "stored but not sent: the frame has no reading at that time",
                verdict,
            );
            return;
        };
        let exp10 = own.run.script.channels()[column].exp10;
        let sent = stored_bits(readings, column, row, exp10);
        let seen = &mut self.seen[index];
        if row < usize::from(seen.rows) {
            self.differ(Some(frame), stored, "stored twice", verdict);
            return;
        }
        seen.rows = row as u16 + 1;
        seen.readings += 1;
        let is_equal = match stored.value {
            Value::Null => sent.is_none(),
            Value::Real(value) => sent == Some(value.to_bits()),
            _ => false,
        };
        if !is_equal {
            let sent = sent.map_or("no valid value".into(), |bits| {
                describe(f64::from_bits(bits))
            });
            self.differ(
                Some(frame),
                stored,
                &format!("differs from the value sent: {sent}"),
                verdict,
            );
        }
    }

    fn differ(
        &mut self,
        frame: Option<Frame>,
        stored: &Stored<'_>,
        what: &str,
        verdict: &mut Verdict,
    ) {
        self.shown += 1;
        if self.shown > SHOWN_MAX {
            // Other differences are more useful than more of the same kind.
            verdict.differences += 1;
            return;
        }
        verdict.differ(|| {
            let series = &self.proof.series;
            let name = self.proof.owns[0].name();
            let from = frame.map_or(String::new(), |frame| {
                let stream = self.proof.owns[usize::from(frame.own)].device.stream();
                format!(" stream {stream} seq {}", frame.seq)
            });
            let value = match stored.value {
                Value::Null => "no valid value".to_owned(),
                Value::Real(value) => describe(*value),
                other => format!("{other:?}, not a double,"),
            };
            let ts_us = stored.ts_us;
            format!(
                "{name}{from} {} at {ts_us} us: {value} {what}",
                series.describe()
            )
        });
    }

    /// Reports frames with missing readings; returns the number of readings from frames of other runs.
    fn finish(self, verdict: &mut Verdict) -> u64 {
        for (frame, seen) in self.proof.frames.iter().zip(&self.seen) {
            let has_column = self.proof.columns[usize::from(frame.own)].is_some();
            if !has_column || seen.readings == frame.rows {
                continue;
            }
            let missing = frame.rows - seen.readings;
            verdict.differ(|| {
                let own = &self.proof.owns[usize::from(frame.own)];
                format!(
                    "{} stream {} seq {} {}: {missing} of {} readings were sent but not stored",
                    own.name(),
                    own.device.stream(),
                    frame.seq,
                    self.proof.series.describe(),
                    frame.rows
                )
            });
        }
        self.strange
    }
}

/// The most recently regenerated frames.
#[derive(Default)]
struct Kept {
    frames: Vec<(usize, Readings)>,
    next: usize,
}

impl Kept {
    /// Returns the readings of the frame with that index and number.
    fn get(&mut self, index: usize, seq: u64, own: &Own<'_>) -> &Readings {
        if let Some(place) = self.frames.iter().position(|(kept, _)| *kept == index) {
            return &self.frames[place].1;
        }
        let place = self.next % KEPT_FRAMES;
        self.next += 1;
        if place == self.frames.len() {
            self.frames.push((index, Readings::default()));
        }
        let (kept, readings) = &mut self.frames[place];
        *kept = index;
        match own.device.frame(seq, readings) {
            Some(FrameContent::Readings(_)) => {}
            _ => readings.rows = 0,
        }
        &self.frames[place].1
    }
}

/// Returns the row at a time on the device's clock; times increase from row to row.
fn row_at(readings: &Readings, time_us: i64) -> Option<usize> {
    let (mut low, mut high) = (0, readings.rows);
    while low < high {
        let middle = low + (high - low) / 2;
        match readings.time_us(middle).cmp(&time_us) {
            std::cmp::Ordering::Equal => return Some(middle),
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    None
}

fn describe(value: f64) -> String {
    format!("{value} ({:#018x})", value.to_bits())
}

/// Returns the bits of the double stored for a sample; `None` for NULL.
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
