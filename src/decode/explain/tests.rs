//! Compares the walk with the decoder, over all vectors of the specification and over mutations of
//! them.

use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX, Header, OVERHEAD_BYTES};
use fieldgate_protocol::value::Kind;
use proptest::prelude::*;

use super::*;
use crate::store::{SchemaChannel, SeriesId};
use crate::time::{BootClocks, Origin};

/// Schema of the vectors' receiver: one channel of each kind.
fn schema() -> Schema {
    let channel = |id, kind, exp10| SchemaChannel {
        id,
        kind,
        exp10,
        series: SeriesId(id.into()),
    };
    Schema {
        schema: 1,
        channels: vec![
            channel(1, Kind::Integer, -2),
            channel(2, Kind::F32, 0),
            channel(3, Kind::F64, 0),
            channel(4, Kind::Bool, 0),
        ],
    }
}

fn taken_apart(bytes: &[u8]) -> Option<Dissection> {
    let frame = frame::decode(bytes, FRAME_BYTES_MAX).ok()??;
    if !types::is_sequenced(frame.header.frame_type) {
        return None;
    }
    let clocks = BootClocks::default();
    let context = Context {
        clocks: &clocks,
        received_at_us: 0,
        origin: Origin::default(),
    };
    let schema = schema();
    let found = dissect(&frame, &context, |wanted| {
        (wanted == schema.schema).then_some(&schema)
    });
    assert_agrees(&frame, &found, &schema);
    Some(found)
}

/// Checks that the parts cover each byte of the frame once, and that the walk finds the decoder's
/// fault and its position.
fn assert_agrees(frame: &Frame<'_>, found: &Dissection, schema: &Schema) {
    let mut covered = 0;
    for part in &found.parts {
        assert_eq!(part.bytes.start, covered, "{found:?}");
        covered = part.bytes.end;
    }
    assert_eq!(covered, frame.bytes.len());
    let Some(fault) = &found.fault else {
        return;
    };
    assert!(fault.at <= frame.bytes.len() - TRAILER_BYTES, "{found:?}");
    let Some(violation) = fault.violation else {
        return;
    };
    let walk = Walk::of(frame);
    let located = locate(frame, &walk, Some(schema), violation);
    assert_eq!(located, Some(fault.at), "{found:?}");
    let has_fields = matches!(
        frame.header.frame_type,
        types::DATA | types::GAP | types::EVENT
    );
    if !has_fields || matches!(violation, Violation::Flags(_)) {
        return;
    }
    let is_broken = matches!(violation, Violation::Encoding | Violation::TrailingBytes);
    assert_eq!(walk.broken_at.is_some(), is_broken, "{found:?}");
    if !is_broken {
        let is_overlong = violation == Violation::NotCanonical;
        assert_eq!(walk.overlong_at.is_some(), is_overlong, "{found:?}");
    }
}

fn sealed(header: Header, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; payload.len() + OVERHEAD_BYTES];
    bytes[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
    let payload_bytes = payload.len() as u16;
    let header = Header {
        payload_bytes,
        ..header
    };
    frame::seal(header, &mut bytes).unwrap();
    bytes
}

/// Returns the sequenced frames of the vectors, with the NACK code of those that are refused.
fn vectors() -> Vec<(String, Vec<u8>, Option<u64>)> {
    let mut frames = Vec::new();
    for file in ["frames", "messages", "readings"] {
        let path = format!(
            "{}/protocol/vectors/{file}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        let json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for vector in json["vectors"].as_array().unwrap() {
            let bytes = hex::decode(vector["hex"].as_str().unwrap()).unwrap();
            if vector["state"] == "serving" && bytes.get(2).is_some_and(|t| types::is_sequenced(*t))
            {
                let id = vector["id"].as_str().unwrap().to_owned();
                frames.push((id, bytes, vector["expect"]["code"].as_u64()));
            }
        }
    }
    frames
}

#[test]
fn the_faulty_byte_of_each_refused_vector_is_found() {
    let mut refused = 0;
    for (id, bytes, code) in vectors() {
        let Some(found) = taken_apart(&bytes) else {
            continue;
        };
        let violation = found.fault.and_then(|fault| fault.violation);
        if let Some(violation) = violation {
            refused += 1;
            // Numbers and credit are checked before the content.
            assert!(
                code.is_none_or(|code| !(30..40).contains(&code) || code == violation.code() as u64),
                "{id}: {violation} is not {code:?}"
            );
        } else {
            assert!(!code.is_some_and(|code| (30..35).contains(&code)), "{id}");
        }
    }
    assert!(refused > 80, "{refused}");
}

fn payload_of(bytes: &[u8]) -> &[u8] {
    &bytes[HEADER_BYTES..bytes.len() - TRAILER_BYTES]
}

#[test]
fn the_faulty_byte_is_distinguished_from_its_neighbours() {
    let header = |frame_type| Header {
        version: 1,
        frame_type,
        flags: 0,
        payload_bytes: 0,
        seq: 5,
    };
    let at = |bytes: &[u8]| taken_apart(bytes).unwrap().fault.map(|fault| fault.at);
    // schema, clock, time_unit, boot, t0, rows, step, dt, columns: channel, encoding, nulls, data; ext.
    let data = [1, 1, 2, 7, 2, 3, 1, 0, 1, 1, 1, 0, 3, 10, 2, 2, 0];
    // Offset, new byte, and offset of the fault.
    for (place, byte, fault) in [
        (1, 2, 1),
        (2, 3, 2),
        (5, 0, 5),
        (9, 9, 9),
        (10, 3, 10),
        // Three more bytes belong to `nulls`, so the payload ends too early.
        (11, 4, 17),
        // The length itself, if it exceeds the payload.
        (12, 9, 12),
        // The third value is now the length of `ext`.
        (12, 2, 15),
        // A varint that continues beyond its column.
        (15, 0x80, 16),
        (16, 1, 16),
    ] {
        let mut changed = data;
        changed[place] = byte;
        let found = at(&sealed(header(types::DATA), &changed));
        assert_eq!(found, Some(HEADER_BYTES + fault), "{byte} at {place}");
    }
    assert_eq!(at(&sealed(header(types::DATA), &data)), None);
    // Columns with as many rows: channel, encoding, nulls and data, and the offset of the fault in
    // the data.
    let column = |rows: u8, fields: &[u8]| {
        let payload = [&[1, 1, 2, 7, 2, rows, 1, 0, 1], fields, &[0]].concat();
        at(&sealed(header(types::DATA), &payload)).map(|at| at - HEADER_BYTES - 9)
    };
    let nine_raw = [1, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(column(1, &nine_raw), Some(4 + 8));
    assert_eq!(column(3, &[4, 0, 0, 3, 0, 1, 2]), Some(4 + 2));
    assert_eq!(column(3, &[4, 1, 0, 3, 2, 1, 4]), Some(4 + 2));
    assert_eq!(column(3, &[1, 2, 0, 3, 0, 65, 0]), Some(4 + 1));
    assert_eq!(column(3, &[1, 2, 0, 3, 0, 2, 0xF1]), Some(4 + 2));
    assert_eq!(column(3, &[1, 1, 1, 0x18, 2, 0, 0]), Some(3));
    assert_eq!(column(3, &[1, 1, 2, 0, 0, 2, 0, 0]), Some(2));
    let event = [1, 7, 2, 1, 9, 2, b'a', 0xFF, 0];
    assert_eq!(
        at(&sealed(header(types::EVENT), &event)),
        Some(HEADER_BYTES + 7)
    );
    let event = [1, 7, 2, 5, 9, 2, b'a', b'b', 0];
    assert_eq!(
        at(&sealed(header(types::EVENT), &event)),
        Some(HEADER_BYTES + 3)
    );
    let gap = [0x85, 0x00, 0, 0];
    assert_eq!(
        at(&sealed(header(types::GAP), &gap)),
        Some(HEADER_BYTES + 1)
    );
    let gap = [5, 0, 5, 1, 1, 9, 2, 0];
    assert_eq!(
        at(&sealed(header(types::GAP), &gap)),
        Some(HEADER_BYTES + 6)
    );
    assert_eq!(at(&sealed(header(0x1E), &[1, 2])), Some(2));
    let mut damaged = sealed(header(types::GAP), &[5, 0, 0]);
    damaged[HEADER_BYTES] = 4;
    assert_eq!(at(&damaged), Some(HEADER_BYTES + 3));
}

#[derive(Clone, Debug)]
enum Edit {
    Set(prop::sample::Index, u8),
    Insert(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Lengthen(prop::sample::Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let byte = prop_oneof![any::<u8>(), 0u8..4, Just(0x80), Just(0xFF)];
    prop_oneof![
        4 => (any::<prop::sample::Index>(), byte.clone()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        1 => (any::<prop::sample::Index>(), byte).prop_map(|(at, byte)| Edit::Insert(at, byte)),
        1 => any::<prop::sample::Index>().prop_map(Edit::Remove),
        1 => any::<prop::sample::Index>().prop_map(Edit::Lengthen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn walk_and_decoder_agree_on_mutated_frames(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec(edit(), 0..4),
    ) {
        thread_local!(static VECTORS: Vec<(String, Vec<u8>, Option<u64>)> = vectors());
        let bytes = VECTORS.with(|vectors| which.get(vectors).1.clone());
        let Ok(Some(frame)) = frame::decode(&bytes, FRAME_BYTES_MAX) else {
            return Ok(());
        };
        let mut payload = payload_of(frame.bytes).to_vec();
        for edit in edits {
            let places = payload.len();
            if places == 0 {
                break;
            }
            match edit {
                Edit::Set(at, byte) => payload[at.index(places)] = byte,
                Edit::Insert(at, byte) => payload.insert(at.index(places), byte),
                Edit::Remove(at) => drop(payload.remove(at.index(places))),
                // If the byte ends a varint, this makes the varint one byte longer than necessary.
                Edit::Lengthen(at) => {
                    payload[at.index(places)] |= 0x80;
                    payload.insert(at.index(places) + 1, 0);
                }
            }
        }
        taken_apart(&sealed(frame.header, &payload));
    }
}
