//! Encoding and decoding of the times and columns of a DATA (R50 to R59), using buffers that the
//! caller provides.

use crate::error::Violation;
use crate::frame::NoRoom;
use crate::message::{Column, Data};
use crate::value::{Kind, check_time};

/// Maximum number of rows in a DATA (R52).
pub const ROWS_MAX: usize = 4096;
/// Maximum number of readings (rows times columns) in a DATA (R52).
pub const READINGS_MAX: usize = 8192;
/// Encodings of a column's values (R54).
pub mod encoding {
    /// Little-endian values of the kind's width.
    pub const RAW: u8 = 0;
    /// Varints of zigzag differences, the first from 0. For integers and bools.
    pub const DELTA_VARINT: u8 = 1;
    /// The first value as in [`DELTA_VARINT`], a width in bits, then the other zigzag differences in
    /// that many bits each, lowest bit first. For integers and bools.
    pub const DELTA_PACKED: u8 = 2;
}

/// Decodes the time of each row, in microseconds of the device's clock, into `out`.
///
/// `out` has one element for each row of `data`.
pub fn decode_times(data: &Data<'_>, out: &mut [i64]) -> Result<(), Violation> {
    if out.is_empty() || out.len() > ROWS_MAX {
        return Err(Violation::Rows);
    }
    let unit_us = data.time_unit.us();
    let mut time_us = data.t0.checked_mul(unit_us).ok_or(Violation::TimeRange)?;
    let mut dt = Bytes { rest: data.dt };
    out[0] = time_us;
    for place in &mut out[1..] {
        let step = if data.step > 0 {
            u64::from(data.step)
        } else {
            dt.varint()
                .filter(|step| *step > 0)
                .ok_or(Violation::Times)?
        };
        time_us = i64::try_from(step)
            .ok()
            .and_then(|step| step.checked_mul(unit_us))
            .and_then(|step_us| time_us.checked_add(step_us))
            .ok_or(Violation::TimeRange)?;
        *place = time_us;
    }
    if !dt.rest.is_empty() {
        return Err(Violation::Times);
    }
    // Times increase, so checking the first and the last is enough.
    check_time(data.clock, out[0])?;
    check_time(data.clock, time_us)
}

/// Checks rows, readings and channel numbers (R52, R53), before anything of that size is allocated.
pub fn check_shape(data: &Data<'_>) -> Result<(), Violation> {
    let rows = usize::from(data.rows);
    if !(1..=ROWS_MAX).contains(&rows) || rows * data.columns.len() > READINGS_MAX {
        return Err(Violation::Rows);
    }
    if data.columns.is_empty() {
        return Err(Violation::ColumnChannel(0));
    }
    let mut seen = [0u64; 4];
    for column in &data.columns {
        let (word, bit) = (usize::from(column.channel / 64), column.channel % 64);
        if seen[word] >> bit & 1 == 1 {
            return Err(Violation::ColumnChannel(column.channel));
        }
        seen[word] |= 1 << bit;
    }
    Ok(())
}

/// Decodes the value of each row into `out`; NaN if there is no valid value.
///
/// `out` has one element for each row of the DATA.
pub fn decode_values(
    column: &Column<'_>,
    kind: Kind,
    exp10: i8,
    out: &mut [f64],
) -> Result<(), Violation> {
    let nulls =
        Nulls::new(column.nulls, out.len()).ok_or(Violation::ColumnNulls(column.channel))?;
    let valid = out.len() - nulls.count();
    let dense = &mut out[..valid];
    match (column.encoding, kind) {
        (encoding::RAW, _) => decode_raw(column.data, kind, exp10, dense),
        (encoding::DELTA_VARINT, Kind::Integer | Kind::Bool) => {
            decode_delta_varint(column.data, kind, exp10, dense)
        }
        (encoding::DELTA_PACKED, Kind::Integer | Kind::Bool) => {
            decode_delta_packed(column.data, kind, exp10, dense)
        }
        _ => return Err(Violation::ColumnEncoding(column.channel)),
    }
    .ok_or(Violation::ColumnData(column.channel))?;
    nulls.spread(valid, out);
    Ok(())
}

fn decode_raw(data: &[u8], kind: Kind, exp10: i8, out: &mut [f64]) -> Option<()> {
    if data.len() != out.len() * kind.width_bytes() {
        return None;
    }
    match kind {
        Kind::Integer => {
            let scale = Scale::new(kind, exp10);
            for (place, bytes) in out.iter_mut().zip(data.as_chunks::<8>().0) {
                *place = scale.apply(i64::from_le_bytes(*bytes))?;
            }
        }
        Kind::F32 => {
            for (place, bytes) in out.iter_mut().zip(data.as_chunks::<4>().0) {
                *place = f64::from(f32::from_le_bytes(*bytes));
            }
        }
        Kind::F64 => {
            for (place, bytes) in out.iter_mut().zip(data.as_chunks::<8>().0) {
                *place = f64::from_le_bytes(*bytes);
            }
        }
        Kind::Bool => {
            for (place, byte) in out.iter_mut().zip(data) {
                *place = Scale::Bool.apply(i64::from(*byte))?;
            }
        }
    }
    Some(())
}

fn decode_delta_varint(data: &[u8], kind: Kind, exp10: i8, out: &mut [f64]) -> Option<()> {
    let scale = Scale::new(kind, exp10);
    let mut data = Bytes { rest: data };
    let mut value = 0i64;
    for place in out {
        value = value.wrapping_add(unzigzag(data.varint()?));
        *place = scale.apply(value)?;
    }
    data.rest.is_empty().then_some(())
}

fn decode_delta_packed(data: &[u8], kind: Kind, exp10: i8, out: &mut [f64]) -> Option<()> {
    let scale = Scale::new(kind, exp10);
    let Some((first, others)) = out.split_first_mut() else {
        return data.is_empty().then_some(());
    };
    let mut data = Bytes { rest: data };
    let mut value = unzigzag(data.varint()?);
    let width_bits = u32::from(data.byte()?);
    if width_bits > 64 || data.rest.len() != (others.len() * width_bits as usize).div_ceil(8) {
        return None;
    }
    *first = scale.apply(value)?;
    let mut bits = BitReader {
        rest: data.rest,
        window: 0,
        window_bits: 0,
    };
    for place in others {
        value = value.wrapping_add(unzigzag(bits.take(width_bits)));
        *place = scale.apply(value)?;
    }
    // Spare bits of the last byte, now left in the window, must be 0.
    (bits.window == 0).then_some(())
}

/// Conversion of an integer to the stored double.
enum Scale {
    Bool,
    Times(f64),
    Over(f64),
}

impl Scale {
    fn new(kind: Kind, exp10: i8) -> Scale {
        let power = POWERS_OF_TEN[usize::from(exp10.unsigned_abs()).min(22)];
        match kind {
            Kind::Bool => Scale::Bool,
            _ if exp10 < 0 => Scale::Over(power),
            _ => Scale::Times(power),
        }
    }

    /// Both operands are exact up to 2^53, so there is only one rounding: 2157 with exponent -2
    /// becomes the double 21.57 (R57).
    #[inline]
    fn apply(&self, raw: i64) -> Option<f64> {
        match self {
            Scale::Bool => matches!(raw, 0 | 1).then_some(raw as f64),
            Scale::Times(power) => Some(raw as f64 * power),
            Scale::Over(power) => Some(raw as f64 / power),
        }
    }
}

/// Powers of ten that are exact as doubles.
const POWERS_OF_TEN: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
];

/// Returns the double stored for an integer of a channel (R57).
pub fn scaled(raw: i64, exp10: i8) -> f64 {
    let power = POWERS_OF_TEN[usize::from(exp10.unsigned_abs()).min(22)];
    if exp10 < 0 {
        raw as f64 / power
    } else {
        raw as f64 * power
    }
}

/// Rows without a valid value.
struct Nulls<'a> {
    bitmap: &'a [u8],
}

impl<'a> Nulls<'a> {
    fn new(bitmap: &'a [u8], rows: usize) -> Option<Nulls<'a>> {
        if bitmap.is_empty() {
            return Some(Nulls { bitmap });
        }
        let spare_bits = (8 - rows % 8) % 8;
        let last = *bitmap.last()?;
        let fits = bitmap.len() == rows.div_ceil(8)
            && u32::from(last).leading_zeros() as usize >= 24 + spare_bits;
        fits.then_some(Nulls { bitmap })
    }

    fn count(&self) -> usize {
        self.bitmap
            .iter()
            .map(|byte| byte.count_ones() as usize)
            .sum()
    }

    fn contains(&self, row: usize) -> bool {
        self.bitmap[row / 8] >> (row % 8) & 1 == 1
    }

    /// Moves the first `valid` values of `out` to their rows, last one first.
    fn spread(&self, mut valid: usize, out: &mut [f64]) {
        if self.bitmap.is_empty() {
            return;
        }
        for row in (0..out.len()).rev() {
            if self.contains(row) {
                out[row] = f64::NAN;
            } else {
                valid -= 1;
                out[row] = out[valid];
            }
        }
    }
}

struct Bytes<'a> {
    rest: &'a [u8],
}

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    /// Reads an unsigned LEB128 number of at most 64 bits; returns `None` if it is not the shortest
    /// form (R22).
    #[inline]
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7F);
            if shift == 63 && bits > 1 {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return (byte != 0 || shift == 0).then_some(value);
            }
        }
        None
    }
}

struct BitReader<'a> {
    rest: &'a [u8],
    window: u128,
    window_bits: u32,
}

impl BitReader<'_> {
    /// Returns the next `width_bits` bits, at most 64. The caller has checked that they exist.
    #[inline]
    fn take(&mut self, width_bits: u32) -> u64 {
        while self.window_bits < width_bits {
            if let Some((word, rest)) = self.rest.split_first_chunk::<8>() {
                self.window |= u128::from(u64::from_le_bytes(*word)) << self.window_bits;
                self.window_bits += 64;
                self.rest = rest;
            } else {
                let (byte, rest) = self.rest.split_first().expect("length was checked");
                self.window |= u128::from(*byte) << self.window_bits;
                self.window_bits += 8;
                self.rest = rest;
            }
        }
        let mask = (1u128 << width_bits) - 1;
        let bits = (self.window & mask) as u64;
        self.window >>= width_bits;
        self.window_bits -= width_bits;
        bits
    }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Encodes integers (or bools as 0 and 1) with the delta encoding that is shorter. Returns the
/// encoding and the number of bytes written.
pub fn encode_integers(values: &[i64], out: &mut [u8]) -> Result<(u8, usize), NoRoom> {
    let Some((first, others)) = values.split_first() else {
        return Ok((encoding::DELTA_VARINT, 0));
    };
    let deltas = || {
        values
            .windows(2)
            .map(|pair| zigzag(pair[1].wrapping_sub(pair[0])))
    };
    let width_bits = deltas()
        .map(|delta| 64 - delta.leading_zeros())
        .max()
        .unwrap_or(0);
    let packed_bytes = 1 + (others.len() * width_bits as usize).div_ceil(8);
    let varint_bytes: usize = deltas().map(varint_bytes).sum();
    let mut out = Out { out, used: 0 };
    out.varint(zigzag(*first))?;
    if varint_bytes <= packed_bytes {
        for delta in deltas() {
            out.varint(delta)?;
        }
        return Ok((encoding::DELTA_VARINT, out.used));
    }
    out.byte(width_bits as u8)?;
    let mut window = 0u128;
    let mut window_bits = 0;
    for delta in deltas() {
        window |= u128::from(delta) << window_bits;
        window_bits += width_bits;
        while window_bits >= 8 {
            out.byte(window as u8)?;
            window >>= 8;
            window_bits -= 8;
        }
    }
    if window_bits > 0 {
        out.byte(window as u8)?;
    }
    Ok((encoding::DELTA_PACKED, out.used))
}

impl<'a> Column<'a> {
    /// Encodes the integers of all rows (or bools as 0 and 1) into `out`, and returns the column.
    pub fn integers(channel: u8, values: &[i64], out: &'a mut [u8]) -> Result<Self, NoRoom> {
        let (encoding, len) = encode_integers(values, out)?;
        Ok(Column {
            channel,
            encoding,
            nulls: &[],
            data: &out[..len],
        })
    }
}

/// Encodes doubles unchanged; returns the number of bytes written.
pub fn encode_f64(values: &[f64], out: &mut [u8]) -> Result<usize, NoRoom> {
    let mut out = Out { out, used: 0 };
    for value in values {
        out.slice(&value.to_le_bytes())?;
    }
    Ok(out.used)
}

/// Encodes singles unchanged; returns the number of bytes written.
pub fn encode_f32(values: &[f32], out: &mut [u8]) -> Result<usize, NoRoom> {
    let mut out = Out { out, used: 0 };
    for value in values {
        out.slice(&value.to_le_bytes())?;
    }
    Ok(out.used)
}

/// Encodes the steps between consecutive times for [`Data::dt`]; times strictly increase. Returns
/// the number of bytes written.
pub fn encode_times(times: &[i64], out: &mut [u8]) -> Result<usize, NoRoom> {
    let mut out = Out { out, used: 0 };
    for pair in times.windows(2) {
        out.varint(pair[1].wrapping_sub(pair[0]) as u64)?;
    }
    Ok(out.used)
}

struct Out<'a> {
    out: &'a mut [u8],
    used: usize,
}

impl Out<'_> {
    fn byte(&mut self, byte: u8) -> Result<(), NoRoom> {
        *self.out.get_mut(self.used).ok_or(NoRoom)? = byte;
        self.used += 1;
        Ok(())
    }

    fn slice(&mut self, bytes: &[u8]) -> Result<(), NoRoom> {
        let end = self.used + bytes.len();
        self.out
            .get_mut(self.used..end)
            .ok_or(NoRoom)?
            .copy_from_slice(bytes);
        self.used = end;
        Ok(())
    }

    fn varint(&mut self, mut value: u64) -> Result<(), NoRoom> {
        while value >= 0x80 {
            self.byte(value as u8 | 0x80)?;
            value >>= 7;
        }
        self.byte(value as u8)
    }
}

fn varint_bytes(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}
