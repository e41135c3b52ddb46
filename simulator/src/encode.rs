//! DATA frames of the simulator: well-formed ones, and malformed ones, which contain the same readings with
//! one fault and valid checksums.

pub use fieldgate::recording::encode::{DataTerms, Encoder, declare};
use fieldgate_protocol::column::ROWS_MAX;
use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::{
    self, HEADER_BYTES, Header, NoRoom, OVERHEAD_BYTES, VERSION, types,
};
use fieldgate_protocol::message::Data;

use crate::faults::Malformation;
use crate::readings::Readings;

/// A sequenced frame type that does not exist.
pub const UNKNOWN_TYPE: u8 = 0x1E;

/// Writes the DATA frame with number `seq`, well-formed or `malformed`; returns its length in bytes.
///
/// # Errors
/// The buffer is too small for the frame.
pub fn data_frame(
    encoder: &mut Encoder,
    seq: u64,
    terms: DataTerms,
    readings: &Readings,
    malformed: Option<Malformation>,
    out: &mut [u8],
) -> Result<usize, NoRoom> {
    let Some(malformation) = malformed else {
        return encoder.data_frame(seq, terms, readings, |_| {}, out);
    };
    let spoil = |data: &mut Data<'_>| spoil_fields(malformation, data);
    let frame_bytes = encoder.data_frame(seq, terms, readings, spoil, out)?;
    spoil_bytes(malformation, frame_bytes - OVERHEAD_BYTES, seq, out)
}

fn spoil_fields(malformation: Malformation, data: &mut Data<'_>) {
    match malformation {
        Malformation::UnknownEncoding => data.columns[0].encoding = 200,
        Malformation::RowCountMismatch => {
            // Columns may decode with one more row: spare bits of a packed column look like unchanged values. So
            // the times are listed explicitly, without one for that row.
            const ONES: [u8; ROWS_MAX] = [1; ROWS_MAX];
            if data.step != 0 {
                data.step = 0;
                data.dt = &ONES[..usize::from(data.rows - 1)];
            }
            data.rows += 1;
        }
        Malformation::NonIncreasingTime => {
            // A step of 0 between all rows; with one row, a step to a row that does not exist.
            const ZEROS: [u8; ROWS_MAX] = [0; ROWS_MAX];
            data.step = 0;
            data.dt = &ZEROS[..usize::from(data.rows - 1).max(1)];
        }
        Malformation::TruncatedPayload
        | Malformation::TrailingBytes
        | Malformation::OverlongVarint
        | Malformation::UnknownType
        | Malformation::ReservedFlag => {}
    }
}

/// Changes the header or payload of a complete frame and recalculates its checksums.
fn spoil_bytes(
    malformation: Malformation,
    payload_bytes: usize,
    seq: u64,
    out: &mut [u8],
) -> Result<usize, NoRoom> {
    let end = HEADER_BYTES + payload_bytes;
    let mut header = Header {
        version: VERSION,
        frame_type: types::DATA,
        flags: 0,
        payload_bytes: payload_bytes as u16,
        seq,
    };
    match malformation {
        Malformation::TruncatedPayload => header.payload_bytes -= 1,
        Malformation::TrailingBytes => {
            *out.get_mut(end).ok_or(NoRoom)? = 0;
            header.payload_bytes += 1;
        }
        Malformation::OverlongVarint => {
            // The schema number comes first: append one byte without bits to it.
            let number = out.get(HEADER_BYTES..end).ok_or(NoRoom)?;
            let last = number.iter().position(|byte| *byte < 0x80).ok_or(NoRoom)?;
            let rest = out.get_mut(HEADER_BYTES + last..=end).ok_or(NoRoom)?;
            rest.rotate_right(1);
            rest[0] = rest[1] | 0x80;
            rest[1] = 0;
            header.payload_bytes += 1;
        }
        Malformation::UnknownType => header.frame_type = UNKNOWN_TYPE,
        Malformation::ReservedFlag => header.flags = 1,
        Malformation::UnknownEncoding
        | Malformation::RowCountMismatch
        | Malformation::NonIncreasingTime => {}
    }
    frame::seal(header, out)
}

/// Returns the code with which a gateway rejects such a frame.
pub fn refusal_code(malformation: Malformation) -> Code {
    match malformation {
        Malformation::TruncatedPayload
        | Malformation::TrailingBytes
        | Malformation::OverlongVarint => Code::Malformed,
        Malformation::UnknownEncoding
        | Malformation::RowCountMismatch
        | Malformation::NonIncreasingTime => Code::Column,
        Malformation::UnknownType => Code::UnknownType,
        Malformation::ReservedFlag => Code::Critical,
    }
}
