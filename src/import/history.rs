//! The frames of one device's history, regenerated from the recording on each use.

use std::ops::Range;

use fieldgate_protocol::device::Queue;
use fieldgate_protocol::frame::NoRoom;
use fieldgate_protocol::message::{self, CHANNELS_MAX, Declare};
use fieldgate_protocol::value::Clock;
use ring::digest::{Context, SHA256};

use crate::recording::encode::{self, DataTerms, Encoder};
use crate::recording::readings::{Channel, Readings, Values};
use crate::recording::{DeviceRows, Recording};

/// Version of the conversion from rows to frames. It is part of the stream number.
pub const FORMAT: u32 = 1;
/// Longest frame, in bytes. Every gateway accepts this length (R9).
const FRAME_BYTES: usize = 4_096;
/// Maximum number of rows in a frame.
const ROWS_MAX: usize = 1_024;
/// Length of a frame without its rows, in bytes.
const FRAME_FIXED_BYTES: usize = 400;
/// Number of valid schema numbers; 0 is not valid.
const SCHEMAS: u32 = 0xFFFF;

#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("a channel's name or unit is too long")]
    Channel,
}

/// Frames of one device.
#[derive(Debug)]
pub struct History<'r> {
    recording: &'r Recording,
    stream: u64,
    boot: u32,
    groups: Vec<Group>,
    /// Added to schema numbers if the device already uses these for other schemas.
    schema_shift: u32,
    durable_seq: u64,
    encoder: Encoder,
    readings: Readings,
}

/// Up to 32 channels, which form one schema, and the frames with their readings.
#[derive(Debug)]
struct Group {
    channels: Range<usize>,
    /// First row of each frame, and the end of the last one.
    starts: Vec<usize>,
    first_seq: u64,
    schema: u32,
}

impl<'r> History<'r> {
    /// Divides the rows of a device into frames.
    pub fn new(
        recording: &'r Recording,
        device: &DeviceRows,
        name: &str,
    ) -> Result<History<'r>, HistoryError> {
        let mut groups = Vec::new();
        let mut first_seq = 1;
        let all = recording.channels.len();
        for start in (0..all).step_by(CHANNELS_MAX) {
            let channels = start..(start + CHANNELS_MAX).min(all);
            // Times and values take at most 10 bytes, and nulls one bit.
            let row_bytes = 10 + 11 * channels.len();
            let rows_max = ((FRAME_BYTES - FRAME_FIXED_BYTES) / row_bytes).clamp(1, ROWS_MAX);
            let starts = recording.frame_starts(device.rows.clone(), rows_max);
            let frames = starts.len() as u64 - 1;
            let schema = number_of(&recording.channels[channels.clone()]);
            groups.push(Group {
                channels,
                starts,
                first_seq,
                schema,
            });
            first_seq += frames;
        }
        let digest = digest(recording, device, name);
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| digest[at + byte]));
        let history = History {
            recording,
            // 63 bits, but not 0.
            stream: (number(0) >> 1).max(1),
            boot: number(8) as u32,
            groups,
            schema_shift: 0,
            durable_seq: 0,
            encoder: Encoder::default(),
            readings: Readings::default(),
        };
        for group in 0..history.groups.len() {
            let written = message::encode(&history.declare(group), 0, &mut [0; FRAME_BYTES]);
            written.map_err(|_| HistoryError::Channel)?;
        }
        Ok(history)
    }

    pub fn stream(&self) -> u64 {
        self.stream
    }

    pub fn boot(&self) -> u32 {
        self.boot
    }

    pub fn frames(&self) -> u64 {
        self.groups.iter().map(Group::frames).sum()
    }

    /// Returns the highest durable number that the gateway has reported.
    pub fn durable_seq(&self) -> u64 {
        self.durable_seq
    }

    /// Returns whether all frames are stored.
    pub fn is_done(&self) -> bool {
        self.durable_seq >= self.frames()
    }

    /// Returns the number and the hash of the schema of the first frames.
    pub fn schema(&self) -> (u16, [u8; 8]) {
        (self.schema_of(0), self.declare(0).hash())
    }

    /// Switches to other schema numbers, for a device that already uses the current ones for other
    /// schemas.
    pub fn renumber_schemas(&mut self) {
        self.schema_shift += 1;
    }

    fn schema_of(&self, group: usize) -> u16 {
        let number = (self.groups[group].schema + self.schema_shift) % SCHEMAS;
        number as u16 + 1
    }

    fn group_of(&self, seq: u64) -> usize {
        let after = self.groups.iter().position(|group| group.first_seq > seq);
        after.unwrap_or(self.groups.len()).saturating_sub(1)
    }

    fn declare(&self, group: usize) -> Declare<'_> {
        let channels = self.groups[group].channels.clone();
        encode::declare(&self.recording.channels[channels], self.schema_of(group))
    }
}

impl Group {
    fn frames(&self) -> u64 {
        self.starts.len() as u64 - 1
    }
}

impl Queue for History<'_> {
    fn oldest_seq(&self) -> u64 {
        self.durable_seq + 1
    }

    fn next_seq(&self) -> u64 {
        self.frames() + 1
    }

    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let at = self.group_of(seq);
        let group = &self.groups[at];
        let frame = (seq - group.first_seq) as usize;
        let rows = group.starts[frame]..group.starts[frame + 1];
        let channels = group.channels.clone();
        self.recording.fill(rows, channels, 0, &mut self.readings);
        let terms = DataTerms {
            schema: self.schema_of(at),
            clock: Clock::Utc,
            boot: self.boot,
        };
        self.encoder
            .data_frame(seq, terms, &self.readings, |_| {}, out)
    }

    fn write_declare(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        message::encode(&self.declare(self.group_of(seq)), 0, out)
    }

    fn delete_through(&mut self, seq: u64) {
        self.durable_seq = seq;
    }
}

/// Returns a hash of the frames' whole content, independent of its encoding.
fn digest(recording: &Recording, device: &DeviceRows, name: &str) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    let mut text = |text: &str| {
        context.update(&(text.len() as u64).to_le_bytes());
        context.update(text.as_bytes());
    };
    text("fieldgate import");
    text(&FORMAT.to_string());
    text(name);
    for Channel {
        name,
        unit,
        kind,
        exp10,
    } in &recording.channels
    {
        text(name);
        text(unit);
        text(&format!("{kind:?} {exp10}"));
    }
    let mut readings = Readings::default();
    let channels = 0..recording.channels.len();
    let starts = recording.frame_starts(device.rows.clone(), ROWS_MAX);
    for frame in starts.windows(2) {
        recording.fill(frame[0]..frame[1], channels.clone(), 0, &mut readings);
        for row in 0..readings.rows {
            context.update(&readings.time_us(row).to_le_bytes());
        }
        for column in &readings.columns {
            for row in 0..readings.rows {
                let bits = match &column.values {
                    _ if column.nulls.contains(row) => continue,
                    Values::Integer(values) => values[row] as u64,
                    Values::F64(values) => values[row].to_bits(),
                    Values::F32(values) => values[row].to_bits().into(),
                    Values::Bool(values) => values[row].into(),
                };
                context.update(&bits.to_le_bytes());
            }
            context.update(column.nulls.bits());
        }
    }
    let digest = context.finish();
    std::array::from_fn(|byte| digest.as_ref()[byte])
}

/// Returns a number derived from the channels, so that equal channels share a schema.
fn number_of(channels: &[Channel]) -> u32 {
    let mut context = Context::new(&SHA256);
    for channel in channels {
        context.update(format!("{channel:?}").as_bytes());
    }
    let digest = context.finish();
    u32::from_le_bytes(std::array::from_fn(|byte| digest.as_ref()[byte])) % SCHEMAS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::ReadOptions;
    use fieldgate_protocol::frame::decode;

    fn recording(rows: u32, columns: u32, last: &str) -> Recording {
        let header: String = (0..columns).map(|column| format!(",c{column}")).collect();
        let row = |row: u32| {
            let cells: String = (0..columns)
                .map(|column| format!(",{}.5", row * column))
                .collect();
            format!("{}{cells}\n", 1_700_000_000 + row)
        };
        let body: String = (0..rows).map(row).collect();
        let csv = format!("time{header}\n{body}{last}");
        Recording::read(csv.as_bytes(), &ReadOptions::default()).expect("a recording")
    }

    fn history<'r>(recording: &'r Recording, name: &str) -> History<'r> {
        History::new(recording, &recording.devices[0], name).expect("a history")
    }

    #[test]
    fn the_stream_depends_on_content_and_name() {
        let first = recording(500, 2, "");
        let stream = |recording: &Recording, name: &str| history(recording, name).stream();
        assert_eq!(stream(&first, "a"), stream(&recording(500, 2, ""), "a"));
        assert_ne!(stream(&first, "a"), stream(&first, "b"));
        assert_ne!(stream(&first, "a"), stream(&recording(501, 2, ""), "a"));
        assert_ne!(
            stream(&first, "a"),
            stream(&recording(500, 2, "1700001000,1,2\n"), "a")
        );
    }

    #[test]
    fn every_row_is_in_one_frame_of_each_group_of_channels() {
        let recording = recording(100, 70, "");
        let mut history = history(&recording, "a");
        let groups: Vec<usize> = history
            .groups
            .iter()
            .map(|group| group.channels.len())
            .collect();
        assert_eq!(groups, [32, 32, 6]);
        let mut rows = vec![0; 3];
        let mut out = [0; FRAME_BYTES];
        for seq in 1..=history.frames() {
            let frame_bytes = history.write_frame(seq, &mut out).expect("fits");
            let frame = decode(&out[..frame_bytes], FRAME_BYTES)
                .expect("a frame")
                .expect("whole");
            let data: message::Data<'_> = message::decode(frame.payload()).expect("DATA");
            let group = history.group_of(seq);
            assert_eq!(data.schema, history.schema_of(group));
            assert_eq!(data.columns.len(), groups[group]);
            rows[group] += data.rows;
        }
        assert_eq!(rows, [100, 100, 100]);
        let before = history.schema();
        history.renumber_schemas();
        assert_ne!(before, history.schema());
    }

    #[test]
    fn the_worst_frame_fits_every_gateway() {
        for columns in [1, 4, 31, 32] {
            let header: String = (0..columns).map(|column| format!(",c{column}")).collect();
            let row = |row: u64| {
                let cells = format!(",{}e300", 1.0 + row as f64 / 7.0).repeat(columns);
                format!(
                    "{},{}\n",
                    1_500_000_000_000_000 + row * row * 6_543_210_987,
                    &cells[1..]
                )
            };
            let csv: String = (1..600).map(row).collect();
            let csv = format!("time{header}\n{csv}");
            let recording = Recording::read(csv.as_bytes(), &ReadOptions::default()).expect("read");
            let mut history = history(&recording, "a");
            let mut out = [0; FRAME_BYTES];
            for seq in 1..=history.frames() {
                history.write_frame(seq, &mut out).expect("fits");
            }
        }
    }
}
