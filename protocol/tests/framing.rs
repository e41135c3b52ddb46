//! Tests of frames in arbitrary pieces, with flipped bits, and of bytes that are not frames.

#[allow(dead_code, missing_docs)]
mod corpus;

use corpus::{Expect, SERVING, data, declare, message_frame, unhex, vectors};
use fieldgate_protocol::auth::Transcript;
use fieldgate_protocol::column::{check_shape, decode_times, decode_values};
use fieldgate_protocol::frame::{self, FrameError, Header};
use fieldgate_protocol::message::{
    Ack, Auth, Bye, Challenge, Command, CommandResult, Data, Declare, Event, Gap, Hello, Nack,
    Ping, Pong, Welcome, decode,
};
use fieldgate_protocol::value::Kind;
use proptest::prelude::*;

const LIMIT: usize = 4096;

/// Returns every valid frame among the vectors.
fn whole_frames() -> Vec<Vec<u8>> {
    vectors()
        .into_iter()
        .filter(|vector| vector.expect == Expect::Taken)
        .map(|vector| unhex(&vector.hex))
        .filter(|bytes| bytes.len() <= 600)
        .map(|bytes| {
            frame::decode(&bytes, LIMIT)
                .unwrap()
                .unwrap()
                .bytes
                .to_vec()
        })
        .collect()
}

/// Returns the frames that a receiver decodes from successive `chunks`.
fn received(chunks: &[&[u8]]) -> Vec<(Header, bool, Vec<u8>)> {
    let (mut buffer, mut found) = (Vec::new(), Vec::new());
    for chunk in chunks {
        buffer.extend_from_slice(chunk);
        while let Some(frame) = frame::decode(&buffer, LIMIT).unwrap() {
            found.push((frame.header, frame.intact, frame.bytes.to_vec()));
            let len = frame.bytes.len();
            buffer.drain(..len);
        }
    }
    assert!(buffer.is_empty(), "bytes left over");
    found
}

/// Calls all decoders; none may panic, whatever the bytes are.
fn decode_as_everything(payload: &[u8]) {
    let _ = decode::<Hello<'_>>(payload);
    let _ = decode::<Challenge<'_>>(payload);
    let _ = decode::<Auth<'_>>(payload);
    let _ = decode::<Welcome<'_>>(payload);
    let _ = decode::<Declare<'_>>(payload);
    let _ = decode::<Gap<'_>>(payload);
    let _ = decode::<Event<'_>>(payload);
    let _ = decode::<CommandResult<'_>>(payload);
    let _ = decode::<Command<'_>>(payload);
    let _ = decode::<Ack<'_>>(payload);
    let _ = decode::<Nack<'_>>(payload);
    let _ = decode::<Ping<'_>>(payload);
    let _ = decode::<Pong<'_>>(payload);
    let _ = decode::<Bye<'_>>(payload);
    if let Ok(data) = decode::<Data<'_>>(payload) {
        decode_readings(&data);
    }
    Transcript::default().add(payload);
}

fn decode_readings(data: &Data<'_>) {
    let _ = check_shape(data);
    let rows = usize::from(data.rows);
    let _ = decode_times(data, &mut vec![0; rows]);
    for column in &data.columns {
        for kind in [Kind::Integer, Kind::F32, Kind::F64, Kind::Bool] {
            for exp10 in [i8::MIN, -2, 0, i8::MAX] {
                let _ = decode_values(column, kind, exp10, &mut vec![0.0; rows]);
            }
        }
    }
}

#[test]
fn an_incomplete_frame_needs_more_bytes() {
    for bytes in whole_frames() {
        let whole = frame::decode(&bytes, LIMIT).unwrap().unwrap();
        for len in 0..whole.bytes.len() {
            assert_eq!(frame::decode(&bytes[..len], LIMIT), Ok(None));
        }
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    for bytes in [message_frame(&data(), 5), message_frame(&declare(), 0)] {
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            match frame::decode(&damaged, LIMIT) {
                Err(FrameError::Magic(_)) => assert!(bit < 8),
                Err(FrameError::HeaderCrc) => assert!((8..128).contains(&bit)),
                Ok(Some(frame)) => assert!(!frame.intact && bit >= 128, "bit {bit} passes"),
                other => panic!("bit {bit}: {other:?}"),
            }
        }
    }
}

#[test]
fn two_flipped_bits_of_a_header_are_noticed() {
    let bytes = message_frame(&data(), 5);
    for first in 8..128 {
        for second in first + 1..128 {
            let mut damaged = bytes.clone();
            damaged[first / 8] ^= 1 << (first % 8);
            damaged[second / 8] ^= 1 << (second % 8);
            assert_eq!(
                frame::decode(&damaged, LIMIT),
                Err(FrameError::HeaderCrc),
                "bits {first} and {second} pass"
            );
        }
    }
}

#[test]
fn a_length_over_the_limit_is_refused_by_the_header_alone() {
    let bytes = message_frame(&data(), 5);
    let frame_bytes = bytes.len();
    let too_large = Err(FrameError::TooLarge { frame_bytes });
    assert_eq!(frame::decode(&bytes[..16], frame_bytes - 1), too_large);
    assert!(frame::decode(&bytes, frame_bytes).unwrap().is_some());
}

/// No other encoding decodes to the same message: each byte below 0x80, where a varint may end, is
/// replaced by two bytes with the same meaning to a lenient decoder.
#[test]
fn no_varint_may_be_longer_than_necessary() {
    fn check(bytes: &[u8]) {
        let payload = corpus::payload_of(bytes);
        let decodes = |candidate: &[u8]| match bytes[2] {
            0x01 => decode(candidate).map(|m: Hello<'_>| format!("{m:?}")),
            0x02 => decode(candidate).map(|m: Challenge<'_>| format!("{m:?}")),
            0x03 => decode(candidate).map(|m: Auth<'_>| format!("{m:?}")),
            0x04 => decode(candidate).map(|m: Welcome<'_>| format!("{m:?}")),
            0x08 => decode(candidate).map(|m: Declare<'_>| format!("{m:?}")),
            0x11 => decode(candidate).map(|m: Data<'_>| format!("{m:?}")),
            0x12 => decode(candidate).map(|m: Gap<'_>| format!("{m:?}")),
            0x14 => decode(candidate).map(|m: Event<'_>| format!("{m:?}")),
            0x20 => decode(candidate).map(|m: Ack<'_>| format!("{m:?}")),
            0x21 => decode(candidate).map(|m: Nack<'_>| format!("{m:?}")),
            0x40 => decode(candidate).map(|m: Ping<'_>| format!("{m:?}")),
            0x41 => decode(candidate).map(|m: Pong<'_>| format!("{m:?}")),
            _ => decode(candidate).map(|m: Bye<'_>| format!("{m:?}")),
        };
        let original = decodes(payload).unwrap();
        for at in (0..payload.len()).filter(|at| payload[*at] < 0x80) {
            let long = [&payload[..at], &[payload[at] | 0x80, 0], &payload[at + 1..]].concat();
            assert_ne!(
                decodes(&long),
                Ok(original.clone()),
                "byte {at} of {payload:02x?}"
            );
        }
    }
    for bytes in whole_frames() {
        check(&bytes);
    }
}

proptest! {
    #[test]
    fn any_chunking_decodes_alike(
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let frames = whole_frames();
        let sent: Vec<Vec<u8>> = picks.iter().map(|pick| pick.get(&frames[..]).clone()).collect();
        let stream = sent.concat();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&[u8]> = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
        let found = received(&chunks);
        prop_assert_eq!(found.len(), sent.len());
        for ((_, intact, bytes), sent) in found.iter().zip(&sent) {
            prop_assert!(intact);
            prop_assert_eq!(bytes, sent);
        }
        let bytewise: Vec<&[u8]> = stream.chunks(1).collect();
        prop_assert_eq!(found, received(&bytewise));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = frame::decode(&bytes, LIMIT);
        let _ = corpus::judge::judge(SERVING, &bytes);
        decode_as_everything(&bytes);
    }

    #[test]
    fn damaged_messages_never_panic(
        pick in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let frames = whole_frames();
        let mut payload = corpus::payload_of(&frames[pick.index(frames.len())]).to_vec();
        payload.truncate(cut.index(payload.len() + 1));
        for (at, byte) in changes {
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
        }
        decode_as_everything(&payload);
    }
}
