//! Frames as devices send them, correct and damaged.

use fieldgate_protocol::auth::schema_hash;
use fieldgate_protocol::column::encoding;
use fieldgate_protocol::frame::{
    FRAME_BYTES_MAX, HEADER_BYTES, Header, OVERHEAD_BYTES, TRAILER_BYTES, VERSION, decode, seal,
};
use fieldgate_protocol::message::{
    self, Bye, Channel, Column, Data, Declare, Event, Gap, Message, Ping,
};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};

/// Number of the schema that [`declare`] declares and [`readings`] uses.
pub const SCHEMA: u16 = 1;
/// Channel "temperature": integer, hundredths.
pub const TEMPERATURE: u8 = 1;
/// Channel "level": binary64.
pub const LEVEL: u8 = 2;
/// Channel "open": bool.
pub const OPEN: u8 = 3;
/// Channel "flow": binary32.
pub const FLOW: u8 = 4;

/// 2025-10-09T08:53:20Z.
pub const T0_US: i64 = 1_760_000_000_000_000;

/// Returns a header for a frame of `frame_type`, complete except for its length.
pub fn header(frame_type: u8, seq: u64) -> Header {
    Header {
        version: VERSION,
        frame_type,
        flags: 0,
        payload_bytes: 0,
        seq,
    }
}

/// Returns a frame of any header and payload, with correct checksums.
pub fn sealed(header: Header, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; payload.len() + OVERHEAD_BYTES];
    bytes[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
    let payload_bytes = u16::try_from(payload.len()).expect("fits a header");
    let header = Header {
        payload_bytes,
        ..header
    };
    seal(header, &mut bytes).expect("fits");
    bytes
}

pub fn frame<'m>(message: &impl Message<'m>, seq: u64) -> Vec<u8> {
    let mut bytes = vec![0; FRAME_BYTES_MAX];
    let count = message::encode(message, seq, &mut bytes).expect("fits");
    bytes.truncate(count);
    bytes
}

/// Returns the bytes between header and trailer.
pub fn payload(frame: &[u8]) -> &[u8] {
    &frame[HEADER_BYTES..frame.len() - TRAILER_BYTES]
}

/// Returns `frame` with one bit of its payload flipped and its checksums unchanged.
pub fn damaged(mut frame: Vec<u8>) -> Vec<u8> {
    frame[HEADER_BYTES] ^= 0x10;
    frame
}

/// Returns a message with the header fields changed by `change`.
pub fn reheaded(frame: &[u8], change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let header = decode(frame, FRAME_BYTES_MAX)
        .expect("a frame")
        .expect("whole")
        .header;
    let mut changed = header;
    change(&mut changed);
    sealed(changed, payload(frame))
}

/// Returns the frame with another byte in its payload, for values that no message can have.
pub fn with_byte(frame: &[u8], at: usize, byte: u8) -> Vec<u8> {
    let mut payload = payload(frame).to_vec();
    payload[at] = byte;
    let header = decode(frame, FRAME_BYTES_MAX)
        .expect("a frame")
        .expect("whole")
        .header;
    sealed(header, &payload)
}

fn channel(
    id: u8,
    name: &'static str,
    unit: &'static str,
    kind: Kind,
    exp10: i8,
) -> Channel<'static> {
    Channel {
        id,
        name,
        unit,
        kind,
        exp10,
    }
}

/// Returns a DECLARE of schema `schema` with any channels.
pub fn declare_channels(schema: u16, channels: &[Channel<'_>]) -> Vec<u8> {
    let channels = channels.iter().copied().collect();
    frame(
        &Declare {
            schema,
            channels,
            ext: &[],
        },
        0,
    )
}

/// Returns a DECLARE of the usual channels.
pub fn declare(schema: u16) -> Vec<u8> {
    let channels = [
        channel(TEMPERATURE, "temperature", "Cel", Kind::Integer, -2),
        channel(LEVEL, "level", "m", Kind::F64, 0),
        channel(OPEN, "open", "", Kind::Bool, 0),
        channel(FLOW, "flow", "l/s", Kind::F32, 0),
    ];
    declare_channels(schema, &channels)
}

/// Returns the hash of the content that [`declare`] declares.
pub fn declared_hash(schema: u16) -> [u8; 8] {
    schema_hash(payload(&declare(schema)))
}

/// Returns a DATA without columns: UTC, microseconds, one row per second.
pub fn no_columns(rows: u16) -> Data<'static> {
    Data {
        schema: SCHEMA,
        clock: Clock::Utc,
        time_unit: TimeUnit::Microseconds,
        boot: 7,
        t0: T0_US,
        rows,
        step: u32::from(rows > 1) * 1_000_000,
        dt: &[],
        columns: std::iter::empty().collect(),
        ext: &[],
    }
}

/// Returns `data` with these columns, as a frame.
pub fn with_columns(data: Data<'_>, seq: u64, columns: &[Column<'_>]) -> Vec<u8> {
    let columns = columns.iter().copied().collect();
    frame(&Data { columns, ..data }, seq)
}

/// Returns a raw column without nulls.
pub fn raw(channel: u8, data: &[u8]) -> Column<'_> {
    Column {
        channel,
        encoding: encoding::RAW,
        nulls: &[],
        data,
    }
}

/// Returns DATA `seq`: temperatures in hundredths, the first at `t0_us`.
pub fn readings_at(seq: u64, t0_us: i64, hundredths: &[i64]) -> Vec<u8> {
    let bytes: Vec<u8> = hundredths.iter().flat_map(|h| h.to_le_bytes()).collect();
    let data = Data {
        t0: t0_us,
        ..no_columns(hundredths.len() as u16)
    };
    with_columns(data, seq, &[raw(TEMPERATURE, &bytes)])
}

/// Returns DATA `seq` with one reading, whose value in hundredths is its number.
pub fn readings(seq: u64) -> Vec<u8> {
    readings_at(seq, T0_US + seq as i64 * 60_000_000, &[seq as i64])
}

pub fn gap(from_seq: u64, seq: u64, reason: u8) -> Vec<u8> {
    frame(
        &Gap {
            from_seq,
            reason,
            ext: &[],
        },
        seq,
    )
}

/// Returns EVENT `seq` with a UTC time.
pub fn event(seq: u64, level: u8, code: u16, text: &str) -> Vec<u8> {
    frame(
        &Event {
            clock: Clock::Utc,
            boot: 7,
            time_us: T0_US,
            level,
            code,
            text,
            ext: &[],
        },
        seq,
    )
}

pub fn ping(mono_us: u64, pong_sent_us: i64, pong_mono_us: u64) -> Vec<u8> {
    frame(
        &Ping {
            mono_us,
            pong_sent_us,
            pong_mono_us,
            ext: &[],
        },
        0,
    )
}

pub fn bye() -> Vec<u8> {
    frame(
        &Bye {
            code: 0,
            retry_after_ms: 0,
            min_version: 0,
            max_version: 0,
            detail: "",
            ext: &[],
        },
        0,
    )
}
