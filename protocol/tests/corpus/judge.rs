//! Determines the outcome of one frame with the crate's decoders: the order of checks in SPEC.md
//! (R44, R101), for a gateway that stores immediately. Only the order is tested here; the states of
//! a real gateway are tested separately.

use fieldgate_protocol::auth::schema_hash;
use fieldgate_protocol::column::{check_shape, decode_times, decode_values};
use fieldgate_protocol::error::Violation;
use fieldgate_protocol::frame::{self, Frame, FrameError, SEQ_MAX, VERSION, types};
use fieldgate_protocol::message::{
    Ack, Auth, Bye, Challenge, Data, Declare, Event, Gap, Hello, Nack, Ping, Pong, Welcome, decode,
};

use super::{
    AWAIT_AUTH, AWAIT_HELLO, CRC_FAILED, DEVICE, DROPPING, DURABLE_SEQ, EXPECTED_SEQ, Expect,
    LIMIT_SEQ, bye, declare, message_frame, nack, payload_of,
};

/// Returns the expected outcome of the frame at the start of `bytes`.
pub fn judge(state: &str, bytes: &[u8]) -> Expect {
    let limit = if [AWAIT_HELLO, AWAIT_AUTH].contains(&state) {
        512
    } else {
        4096
    };
    match frame::decode(bytes, limit) {
        Ok(None) => Expect::Incomplete,
        Ok(Some(frame)) if types::is_skippable(frame.header.frame_type) && frame.intact => {
            Expect::PassedOver
        }
        Ok(Some(frame)) if state == DEVICE => for_device(&frame),
        Ok(Some(frame)) if [AWAIT_HELLO, AWAIT_AUTH].contains(&state) => handshake(state, &frame),
        Ok(Some(frame)) => serving(state, &frame),
        Err(_) if state == DEVICE => Expect::Close,
        Err(FrameError::Magic(_)) => Expect::Close,
        Err(FrameError::HeaderCrc) => bye(46),
        Err(FrameError::TooLarge { .. }) => bye(45),
    }
}

fn for_device(frame: &Frame<'_>) -> Expect {
    let payload = frame.payload();
    let is_right = match frame.header.frame_type {
        types::CHALLENGE => decode::<Challenge<'_>>(payload).is_ok_and(|c| c.version == VERSION),
        types::WELCOME => decode::<Welcome<'_>>(payload).is_ok(),
        types::ACK => decode::<Ack<'_>>(payload).is_ok(),
        types::NACK => decode::<Nack<'_>>(payload).is_ok(),
        types::PONG => decode::<Pong<'_>>(payload).is_ok(),
        types::BYE => decode::<Bye<'_>>(payload).is_ok(),
        // Includes COMMAND: for a device without commands it is a fault, even if valid.
        _ => false,
    };
    if is_right && frame.intact && frame.header.flags == 0 && frame.header.version == VERSION {
        Expect::Taken
    } else {
        Expect::Close
    }
}

fn handshake(state: &str, frame: &Frame<'_>) -> Expect {
    let header = frame.header;
    if header.version != VERSION {
        return bye(51);
    }
    let payload = frame.payload();
    let awaited = if state == AWAIT_HELLO {
        types::HELLO
    } else {
        types::AUTH
    };
    if header.frame_type != awaited || header.seq != 0 || !frame.intact || header.flags != 0 {
        return bye(50);
    }
    if awaited == types::AUTH {
        // The vectors of the handshake test the MAC.
        return decode::<Auth<'_>>(payload).map_or(bye(50), |_| Expect::Taken);
    }
    match decode::<Hello<'_>>(payload) {
        Err(_) => bye(50),
        Ok(hello) if !(hello.min_version..=hello.max_version).contains(&VERSION) => bye(51),
        Ok(_) => Expect::Taken,
    }
}

fn serving(state: &str, frame: &Frame<'_>) -> Expect {
    let header = frame.header;
    let damaged = Expect::Nack {
        code: 22,
        seq: 0,
        expected_seq: EXPECTED_SEQ,
        consumed: false,
    };
    if types::is_skippable(header.frame_type) {
        return damaged;
    }
    if !(1..=VERSION).contains(&header.version) {
        return bye(51);
    }
    if types::is_sequenced(header.frame_type) {
        return sequenced(state, frame);
    }
    if header.seq != 0 {
        return bye(44);
    }
    if !frame.intact {
        return damaged;
    }
    let payload = frame.payload();
    let is_right = match header.frame_type {
        types::DECLARE => match decode::<Declare<'_>>(payload) {
            Ok(again) if again.schema == 1 => {
                let known = message_frame(&declare(), 0);
                if schema_hash(payload) != schema_hash(payload_of(&known)) {
                    return Expect::Nack {
                        code: 23,
                        seq: 0,
                        expected_seq: EXPECTED_SEQ,
                        consumed: false,
                    };
                }
                true
            }
            other => other.is_ok(),
        },
        types::PING => decode::<Ping<'_>>(payload).is_ok(),
        types::BYE => decode::<Bye<'_>>(payload).is_ok(),
        _ => false,
    };
    if is_right && header.flags == 0 {
        Expect::Taken
    } else {
        bye(44)
    }
}

fn sequenced(state: &str, frame: &Frame<'_>) -> Expect {
    let seq = frame.header.seq;
    if !(1..=SEQ_MAX).contains(&seq) {
        return bye(44);
    }
    let mut first_seq = seq;
    if frame.header.frame_type == types::GAP
        && frame.intact
        && let Ok((from_seq, _)) = postcard::take_from_bytes::<u64>(frame.payload())
        && from_seq <= seq
    {
        first_seq = from_seq;
    }
    if first_seq > LIMIT_SEQ {
        return bye(43);
    }
    if seq <= DURABLE_SEQ {
        return Expect::Ack { seq: DURABLE_SEQ };
    }
    if seq < EXPECTED_SEQ || (first_seq > EXPECTED_SEQ && state == DROPPING) {
        return Expect::Dropped;
    }
    if first_seq > EXPECTED_SEQ {
        return Expect::Nack {
            code: 21,
            seq,
            expected_seq: EXPECTED_SEQ,
            consumed: false,
        };
    }
    if !frame.intact {
        return nack(if state == CRC_FAILED { 35 } else { 22 }, seq);
    }
    match content(frame) {
        Ok(true) => Expect::Taken,
        Ok(false) => nack(20, seq),
        Err(violation) => nack(violation.code() as u8, seq),
    }
}

/// Returns whether the schema is known, or the fault in the content.
fn content(frame: &Frame<'_>) -> Result<bool, Violation> {
    let header = frame.header;
    if header.flags != 0 {
        return Err(Violation::Flags(header.flags));
    }
    match header.frame_type {
        types::DATA => readings(&decode(frame.payload())?),
        types::GAP => {
            let gap: Gap<'_> = decode(frame.payload())?;
            if gap.from_seq > header.seq {
                return Err(Violation::Range("from_seq"));
            }
            Ok(true)
        }
        types::EVENT => decode::<Event<'_>>(frame.payload()).map(|_| true),
        other => Err(Violation::UnknownType(other)),
    }
}

fn readings(data: &Data<'_>) -> Result<bool, Violation> {
    let schema = declare();
    if data.schema != schema.schema {
        return Ok(false);
    }
    check_shape(data)?;
    let rows = usize::from(data.rows);
    decode_times(data, &mut vec![0; rows])?;
    for column in &data.columns {
        let channel = schema
            .channels
            .iter()
            .find(|channel| channel.id == column.channel)
            .ok_or(Violation::ColumnChannel(column.channel))?;
        decode_values(column, channel.kind, channel.exp10, &mut vec![0.0; rows])?;
    }
    Ok(true)
}
