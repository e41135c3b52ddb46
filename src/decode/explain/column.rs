//! Finds the position of faults in times and columns (R50 to R58). Used only after the decoder has
//! reported a fault.

use std::ops::Range;

use fieldgate_protocol::column::encoding;
use fieldgate_protocol::value::Kind;

use super::walk::{ColumnFields, DataFields, unzigzag};

/// Consecutive varints in a part of a frame.
struct Varints<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Varints<'a> {
    fn new(bytes: &'a [u8], range: &Range<usize>) -> Varints<'a> {
        let Range { start: at, end } = *range;
        Varints { bytes, at, end }
    }

    /// Returns the next varint. The error is the position of an invalid byte (R22), or the end of
    /// the part if bytes are missing.
    fn next(&mut self) -> Result<u64, usize> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            if self.at == self.end {
                return Err(self.at);
            }
            let byte = self.bytes[self.at];
            let is_too_wide = shift == 63 && byte > 1;
            let is_overlong = shift > 0 && byte == 0;
            if is_too_wide || is_overlong {
                return Err(self.at);
            }
            self.at += 1;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.at)
    }
}

/// Returns the position of a fault in `dt`, or of its length if it must be empty.
pub(super) fn times_fault(bytes: &[u8], data: &DataFields) -> Option<usize> {
    if data.step > 0 {
        return Some(data.dt.start);
    }
    let mut dt = Varints::new(bytes, &data.dt);
    let mut time_us = data.t0.checked_mul(data.unit_us())?;
    let mut out_of_range = None;
    for _ in 1..data.rows {
        let start = dt.at;
        let step = match dt.next() {
            Ok(0) => return Some(start),
            Ok(step) => step,
            Err(at) => return Some(at),
        };
        let later = i64::try_from(step).ok();
        let later = later.and_then(|step| step.checked_mul(data.unit_us()));
        let Some(later) = later.and_then(|step_us| time_us.checked_add(step_us)) else {
            return Some(start);
        };
        time_us = later;
        // Reported only if the steps themselves are correct.
        if out_of_range.is_none() && !data.is_in_range(time_us) {
            out_of_range = Some(start);
        }
    }
    if dt.at < dt.end {
        return Some(dt.at);
    }
    out_of_range
}

/// Returns the position of the length of `nulls`, or of the byte whose spare bits are not zero.
pub(super) fn nulls_fault(data: &DataFields, column: &ColumnFields) -> usize {
    if column.nulls.len() == data.rows.div_ceil(8) {
        column.nulls.end - 1
    } else {
        column.nulls_at
    }
}

/// Returns the position of a fault in the `data` of a column.
pub(super) fn data_fault(
    bytes: &[u8],
    data: &DataFields,
    column: &ColumnFields,
    kind: Kind,
) -> Option<usize> {
    let values = data.rows.checked_sub(column.nulls_set)?;
    match column.encoding {
        encoding::RAW => raw_fault(bytes, &column.data, kind, values),
        encoding::DELTA_VARINT => delta_fault(bytes, &column.data, kind, values),
        _ => packed_fault(bytes, &column.data, kind, values),
    }
}

/// Returns the position after the expected bytes, or the end if some are missing; `None` if the
/// length is correct.
fn length_fault(range: &Range<usize>, bytes: usize) -> Option<usize> {
    (range.len() != bytes).then(|| (range.start + bytes).min(range.end))
}

fn raw_fault(bytes: &[u8], range: &Range<usize>, kind: Kind, values: usize) -> Option<usize> {
    let width_bytes = match kind {
        Kind::Integer | Kind::F64 => 8,
        Kind::F32 => 4,
        Kind::Bool => 1,
    };
    length_fault(range, values * width_bytes).or_else(|| {
        range
            .clone()
            .find(|at| kind == Kind::Bool && bytes[*at] > 1)
    })
}

fn is_refused(kind: Kind, value: i64) -> bool {
    kind == Kind::Bool && !matches!(value, 0 | 1)
}

fn delta_fault(bytes: &[u8], range: &Range<usize>, kind: Kind, values: usize) -> Option<usize> {
    let mut deltas = Varints::new(bytes, range);
    let mut value = 0i64;
    for _ in 0..values {
        let start = deltas.at;
        match deltas.next() {
            Ok(delta) => value = value.wrapping_add(unzigzag(delta)),
            Err(at) => return Some(at),
        }
        if is_refused(kind, value) {
            return Some(start);
        }
    }
    (deltas.at < deltas.end).then_some(deltas.at)
}

fn packed_fault(bytes: &[u8], range: &Range<usize>, kind: Kind, values: usize) -> Option<usize> {
    let Some(others) = values.checked_sub(1) else {
        return Some(range.start);
    };
    let mut first = Varints::new(bytes, range);
    let mut value = match first.next() {
        Ok(delta) => unzigzag(delta),
        Err(at) => return Some(at),
    };
    let width_at = first.at;
    if width_at == range.end || bytes[width_at] > 64 {
        return Some(width_at);
    }
    let width_bits = usize::from(bytes[width_at]);
    let packed = width_at + 1..range.end;
    let wrong_length = length_fault(&packed, (others * width_bits).div_ceil(8));
    if wrong_length.is_some() {
        return wrong_length;
    }
    if is_refused(kind, value) {
        return Some(range.start);
    }
    let bit = |at: usize| u64::from(bytes[packed.start + at / 8] >> (at % 8) & 1);
    for n in 0..others {
        let from = n * width_bits;
        let delta = (0..width_bits).fold(0, |delta, at| delta | bit(from + at) << at);
        value = value.wrapping_add(unzigzag(delta));
        if is_refused(kind, value) {
            return Some(packed.start + from / 8);
        }
    }
    // Only its spare bits can still be wrong.
    Some(range.end - 1)
}
