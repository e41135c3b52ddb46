//! Encodes readings into DATA frames as firmware would: with the coarsest exact time unit, and the
//! shorter delta encoding for integers.

use fieldgate_protocol::column::{encode_f32, encode_f64, encode_integers, encode_times, encoding};
use fieldgate_protocol::frame::{FRAME_BYTES_MAX, NoRoom};
use fieldgate_protocol::message::{self, CHANNELS_MAX, Data, Declare};
use fieldgate_protocol::value::{Clock, TimeUnit};

use super::readings::{Channel, Column, Readings, Values};

/// Returns the DECLARE of up to 32 channels. Their ids are 1, 2, … in order.
pub fn declare(channels: &[Channel], schema: u16) -> Declare<'_> {
    let channel = |(id, channel)| {
        let &Channel {
            ref name,
            ref unit,
            kind,
            exp10,
        } = channel;
        message::Channel {
            id,
            name,
            unit,
            kind,
            exp10,
        }
    };
    Declare {
        schema,
        channels: (1..).zip(channels).map(channel).collect(),
        ext: &[],
    }
}

/// Contents of a DATA apart from its readings.
#[derive(Clone, Copy, Debug)]
pub struct DataTerms {
    /// Schema of the columns; channel ids are 1, 2, … in column order.
    pub schema: u16,
    /// Clock of the times.
    pub clock: Clock,
    /// The boot that times count from.
    pub boot: u32,
}

/// Buffers that are reused for each frame.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    dense: Vec<i64>,
    times: Vec<i64>,
}

impl Default for Encoder {
    fn default() -> Self {
        Encoder {
            bytes: vec![0; 2 * FRAME_BYTES_MAX],
            dense: Vec::new(),
            times: Vec::new(),
        }
    }
}

/// Positions of a column's parts in [`Encoder::bytes`].
#[derive(Clone, Copy, Default)]
struct Packed {
    encoding: u8,
    nulls: (usize, usize),
    data: (usize, usize),
}

impl Encoder {
    /// Writes the DATA frame with number `seq`, after `edit` has changed its message. Returns its
    /// length in bytes.
    ///
    /// # Errors
    /// The frame does not fit.
    pub fn data_frame(
        &mut self,
        seq: u64,
        terms: DataTerms,
        readings: &Readings,
        edit: impl FnOnce(&mut Data<'_>),
        out: &mut [u8],
    ) -> Result<usize, NoRoom> {
        let mut used = 0;
        let mut packed = [Packed::default(); CHANNELS_MAX];
        for (place, column) in packed.iter_mut().zip(&readings.columns) {
            *place = self.pack(column, readings.rows, &mut used)?;
        }
        let time_unit = time_unit(readings);
        let unit_us = time_unit.us();
        let step = u32::try_from(readings.step_us / unit_us as u64).unwrap_or(0);
        let dt_start = used;
        if step == 0 && readings.rows > 1 {
            self.times.clear();
            self.times
                .extend((0..readings.rows).map(|row| readings.time_us(row) / unit_us));
            used += encode_times(&self.times, &mut self.bytes[used..])?;
        }
        let mut columns = heapless::Vec::new();
        for (i, place) in packed.iter().take(readings.columns.len()).enumerate() {
            let column = message::Column {
                channel: i as u8 + 1,
                encoding: place.encoding,
                nulls: &self.bytes[place.nulls.0..place.nulls.1],
                data: &self.bytes[place.data.0..place.data.1],
            };
            columns.push(column).map_err(|_| NoRoom)?;
        }
        let mut data = Data {
            schema: terms.schema,
            clock: terms.clock,
            time_unit,
            boot: terms.boot,
            t0: readings.t0_us / unit_us,
            rows: u16::try_from(readings.rows).map_err(|_| NoRoom)?,
            step: if readings.rows > 1 { step } else { 0 },
            dt: &self.bytes[dt_start..used],
            columns,
            ext: &[],
        };
        edit(&mut data);
        message::encode(&data, seq, out)
    }

    fn pack(&mut self, column: &Column, rows: usize, used: &mut usize) -> Result<Packed, NoRoom> {
        let nulls_start = *used;
        if column.nulls.count() > 0 {
            let bitmap_bytes = rows.div_ceil(8);
            let bits = column.nulls.bits();
            let room = self
                .bytes
                .get_mut(*used..*used + bitmap_bytes)
                .ok_or(NoRoom)?;
            room.fill(0);
            room[..bits.len()].copy_from_slice(bits);
            *used += bitmap_bytes;
        }
        let data_start = *used;
        let is_valid = |row: &usize| !column.nulls.contains(*row);
        let valid = (0..rows).filter(is_valid);
        let room = &mut self.bytes[data_start..];
        let (encoding, data_bytes) = match &column.values {
            Values::Integer(values) => {
                self.dense.clear();
                self.dense.extend(valid.map(|row| values[row]));
                encode_integers(&self.dense, room)?
            }
            Values::Bool(values) => {
                self.dense.clear();
                self.dense.extend(valid.map(|row| i64::from(values[row])));
                encode_integers(&self.dense, room)?
            }
            Values::F32(values) => (
                encoding::RAW,
                pack_each(valid, room, |row, room| {
                    encode_f32(&values[row..=row], room)
                })?,
            ),
            Values::F64(values) => (
                encoding::RAW,
                pack_each(valid, room, |row, room| {
                    encode_f64(&values[row..=row], room)
                })?,
            ),
        };
        *used += data_bytes;
        Ok(Packed {
            encoding,
            nulls: (nulls_start, data_start),
            data: (data_start, *used),
        })
    }
}

fn pack_each(
    rows: impl Iterator<Item = usize>,
    room: &mut [u8],
    pack: impl Fn(usize, &mut [u8]) -> Result<usize, NoRoom>,
) -> Result<usize, NoRoom> {
    let mut used = 0;
    for row in rows {
        used += pack(row, &mut room[used..])?;
    }
    Ok(used)
}

/// Returns the coarsest unit in which every time of the frame is a whole number.
fn time_unit(readings: &Readings) -> TimeUnit {
    let is_exact = |unit: &TimeUnit| {
        let unit_us = unit.us();
        readings.t0_us % unit_us == 0
            && readings.step_us.is_multiple_of(unit_us as u64)
            && readings
                .offsets_us
                .iter()
                .all(|offset_us| offset_us.is_multiple_of(unit_us as u64))
    };
    [TimeUnit::Seconds, TimeUnit::Milliseconds]
        .into_iter()
        .find(is_exact)
        .unwrap_or(TimeUnit::Microseconds)
}
