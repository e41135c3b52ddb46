//! Properties that hold for any input: functions that take bytes and panic if a property is
//! violated.
//!
//! Only fuzz targets and tests call them. They allocate no more than the rest of the crate.

use crate::column::{
    READINGS_MAX, ROWS_MAX, check_shape, decode_times, decode_values, encode_f64, encode_integers,
    encoding,
};
use crate::frame::{self, FRAME_BYTES_MAX, HEADER_BYTES, Header, OVERHEAD_BYTES};
use crate::message::{
    Ack, Auth, Bye, Challenge, Column, Command, CommandResult, Data, Declare, Event, Gap, Hello,
    Message, Nack, Ping, Pong, Welcome, decode, encode,
};
use crate::value::Kind;

/// Checks frame decoding. The first byte selects the limit; the others are the bytes of a
/// connection.
pub fn frame(input: &[u8]) {
    let Some((pick, bytes)) = input.split_first() else {
        return;
    };
    let frame_bytes_max = [512, 4096, FRAME_BYTES_MAX, usize::MAX][usize::from(pick % 4)];
    is_a_frame_by_its_own_bytes(bytes, frame_bytes_max);
    // Random input never has valid checksums, so repeat with corrected ones.
    let mut fixed = [0; FRAME_BYTES_MAX];
    if let Some(len) = reseal(bytes, &mut fixed) {
        let found = frame::decode(&fixed[..len], FRAME_BYTES_MAX);
        assert!(found.is_ok_and(|found| found.is_some_and(|frame| frame.intact)));
        is_a_frame_by_its_own_bytes(&fixed[..len], frame_bytes_max);
    }
}

fn is_a_frame_by_its_own_bytes(bytes: &[u8], frame_bytes_max: usize) {
    let Ok(Some(found)) = frame::decode(bytes, frame_bytes_max) else {
        return;
    };
    let len = found.header.frame_bytes();
    assert!(len <= frame_bytes_max);
    assert_eq!(found.bytes, &bytes[..len]);
    assert_eq!(found.payload().len(), len - OVERHEAD_BYTES);
    assert_eq!(
        frame::decode(&bytes[..len], frame_bytes_max),
        Ok(Some(found))
    );
    assert_eq!(frame::decode(&bytes[..len - 1], frame_bytes_max), Ok(None));
    let mut sealed = [0; FRAME_BYTES_MAX];
    if found.intact && len <= FRAME_BYTES_MAX {
        sealed[..len].copy_from_slice(found.bytes);
        assert_eq!(frame::seal(found.header, &mut sealed), Ok(len));
        assert_eq!(&sealed[..len], found.bytes);
    }
}

/// Copies the frame at the start of `bytes` into `out`, cut to the available bytes, with correct
/// magic, length and checksums. Returns `None` if the bytes cannot hold a frame, or `out` is too
/// small.
pub fn reseal(bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    let room_bytes = bytes.len().min(out.len()).checked_sub(OVERHEAD_BYTES)?;
    let header = bytes.first_chunk::<HEADER_BYTES>()?;
    let wanted_bytes = usize::from(u16::from_le_bytes([header[4], header[5]]));
    let payload_bytes = wanted_bytes.min(room_bytes);
    let end = HEADER_BYTES + payload_bytes;
    out[..end].copy_from_slice(&bytes[..end]);
    let (seq, _) = header[6..].split_first_chunk::<8>()?;
    let header = Header {
        version: header[1],
        frame_type: header[2],
        flags: header[3],
        payload_bytes: payload_bytes as u16,
        seq: u64::from_le_bytes(*seq),
    };
    frame::seal(header, out).ok()
}

/// Checks message decoding. The first byte selects the type; the others are the payload.
pub fn message(input: &[u8]) {
    let Some((pick, payload)) = input.split_first() else {
        return;
    };
    match pick % 15 {
        0 => has_one_form::<Hello<'_>>(payload),
        1 => has_one_form::<Challenge<'_>>(payload),
        2 => has_one_form::<Auth<'_>>(payload),
        3 => has_one_form::<Welcome<'_>>(payload),
        4 => has_one_form::<Declare<'_>>(payload),
        5 => {
            has_one_form::<Data<'_>>(payload);
            has_times_in_order(payload);
        }
        6 => has_one_form::<Gap<'_>>(payload),
        7 => has_one_form::<Event<'_>>(payload),
        8 => has_one_form::<CommandResult<'_>>(payload),
        9 => has_one_form::<Command<'_>>(payload),
        10 => has_one_form::<Ack<'_>>(payload),
        11 => has_one_form::<Nack<'_>>(payload),
        12 => has_one_form::<Ping<'_>>(payload),
        13 => has_one_form::<Pong<'_>>(payload),
        _ => has_one_form::<Bye<'_>>(payload),
    }
}

/// Checks that a payload that decodes is encoded to the same bytes (R20 to R22).
fn has_one_form<'a, M: Message<'a>>(payload: &'a [u8]) {
    let mut out = [0; FRAME_BYTES_MAX];
    if payload.len() > FRAME_BYTES_MAX - OVERHEAD_BYTES {
        return;
    }
    if let Ok(message) = decode::<M>(payload) {
        let len = encode(&message, 1, &mut out).expect("it was decoded from that many bytes");
        assert_eq!(
            &out[HEADER_BYTES..len - OVERHEAD_BYTES + HEADER_BYTES],
            payload
        );
    }
}

/// Checks that times strictly increase if the rows are within their limit (R51, R52).
fn has_times_in_order(payload: &[u8]) {
    let Ok(data) = decode::<Data<'_>>(payload) else {
        return;
    };
    if check_shape(&data).is_err() {
        return;
    }
    let rows = usize::from(data.rows);
    assert!((1..=ROWS_MAX).contains(&rows) && rows * data.columns.len() <= READINGS_MAX);
    let mut times_us = [0; ROWS_MAX];
    if decode_times(&data, &mut times_us[..rows]).is_ok() {
        assert!(times_us[..rows].is_sorted_by(|earlier, later| earlier < later));
    }
}

/// Checks column decoding. Input: kind, exponent, encoding, rows (two bytes), length of the null
/// bitmap; then bitmap and data.
pub fn column(input: &[u8]) {
    let Some(([kind, exp10, encoding, rows0, rows1, nulls_bytes], rest)) =
        input.split_first_chunk()
    else {
        return;
    };
    let Some((nulls, data)) = rest.split_at_checked(usize::from(*nulls_bytes)) else {
        return;
    };
    let kind = Kind::ALL[usize::from(kind % 4)];
    let rows = usize::from(u16::from_le_bytes([*rows0, *rows1])) % (ROWS_MAX + 1);
    let (encoding, channel) = (*encoding, 1);
    let column = Column {
        channel,
        encoding,
        nulls,
        data,
    };
    // A bit pattern that decoding never produces, to find elements that were not written.
    let untouched = f64::from_bits(0x7FF0_DEAD_BEEF_0001);
    let mut out = [untouched; ROWS_MAX];
    let is_decoded = decode_values(&column, kind, *exp10 as i8, &mut out[..rows]).is_ok();
    let beyond = &out[rows..];
    assert!(
        beyond
            .iter()
            .all(|value| value.to_bits() == untouched.to_bits())
    );
    if is_decoded {
        is_packed_again(&column, kind, *exp10 as i8, &out[..rows]);
    }
}

/// Checks that the values survive encoding by this crate and decoding.
fn is_packed_again(column: &Column<'_>, kind: Kind, exp10: i8, values: &[f64]) {
    let is_null = |row: usize| {
        let byte = column.nulls.get(row / 8);
        byte.is_some_and(|byte| byte >> (row % 8) & 1 == 1)
    };
    let valid = || {
        (0..values.len())
            .filter(|row| !is_null(*row))
            .map(|row| values[row])
    };
    let mut packed = [0; 10 * ROWS_MAX + 1];
    let (encoding, len) = match kind {
        Kind::F64 => {
            let mut dense = [0.0; ROWS_MAX];
            let count = fill(&mut dense, valid());
            let len = encode_f64(&dense[..count], &mut packed).expect("8 bytes per value");
            assert_eq!(&packed[..len], column.data);
            (encoding::RAW, len)
        }
        // Only values unchanged by rounding can be compared.
        Kind::Integer | Kind::Bool
            if (exp10 == 0 || kind == Kind::Bool)
                && valid().all(|value| value.abs() < (1i64 << 53) as f64) =>
        {
            let mut dense = [0; ROWS_MAX];
            let count = fill(&mut dense, valid().map(|value| value as i64));
            encode_integers(&dense[..count], &mut packed).expect("10 bytes per value")
        }
        _ => return,
    };
    let data = &packed[..len];
    let again = Column {
        encoding,
        data,
        ..*column
    };
    let mut out = [0.0; ROWS_MAX];
    let out = &mut out[..values.len()];
    assert_eq!(decode_values(&again, kind, exp10, out), Ok(()));
    let bits = |values: &[f64], row: usize| values[row].to_bits();
    assert!((0..values.len()).all(|row| bits(out, row) == bits(values, row)));
}

fn fill<T>(places: &mut [T], values: impl Iterator<Item = T>) -> usize {
    places
        .iter_mut()
        .zip(values)
        .map(|(place, value)| *place = value)
        .count()
}
