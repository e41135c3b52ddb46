//! Compares a session with the protocol's published vectors, which specify how a gateway handles a
//! frame.

use serde_json::{Value, json};

use super::*;

const FILES: [&str; 3] = ["frames", "messages", "readings"];

fn bytes_of(digits: &Value) -> Vec<u8> {
    hex::decode(digits.as_str().unwrap()).unwrap()
}

fn sealed(frame_type: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; frame::OVERHEAD_BYTES + payload.len()];
    bytes[HEADER_BYTES..][..payload.len()].copy_from_slice(payload);
    let header = frame::Header {
        version: frame::VERSION,
        frame_type,
        flags: 0,
        payload_bytes: payload.len() as u16,
        seq: 0,
    };
    frame::seal(header, &mut bytes).unwrap();
    bytes
}

/// Returns a session in which 1 to 3 are durable and 4 is in flight.
async fn serving(declare: &[u8], state: &str) -> Bench {
    let mut bench = Bench::welcomed().await;
    bench.take(&sealed(types::DECLARE, declare));
    bench.commit().await;
    for seq in 1..=4 {
        if seq == 4 {
            bench.commit().await;
        }
        bench.take(&frame_for(Input::Good(0), seq, seq));
    }
    match state {
        "serving_dropping" => bench.take(&frame_for(Input::Good(0), 6, 6)),
        "serving_crc_failed_5" => bench.take(&frame_for(Input::Damaged(0), 5, 5)),
        _ => {}
    }
    bench.say();
    bench
}

/// Returns the outcome for `bytes`, in the terms of the vectors.
async fn judge(bench: &mut Bench, bytes: &[u8]) -> Value {
    let frame_type = match frame::decode(bytes, bench.inbox.session.frame_bytes_max()) {
        Ok(Some(frame)) => frame.header.frame_type,
        Ok(None) => return json!({"outcome": "incomplete"}),
        Err(_) => 0,
    };
    bench.inbox.input().extend_from_slice(bytes);
    let submission = bench.inbox.poll_submission(NOW);
    // A repeated number is not an outcome.
    let is_submitted = !matches!(submission, None | Some(Submission::Repeat(_)));
    let is_refused = matches!(submission, Some(Submission::Quarantine(..)));
    submission.into_iter().for_each(|it| bench.queue(it));
    match bench.inbox.session.closed().map(|close| close.code) {
        // The device disconnects normally.
        Some(None) if frame_type == types::BYE => return json!({"outcome": "taken"}),
        Some(None) => return json!({"outcome": "close"}),
        Some(Some(code)) => return json!({"outcome": "bye", "code": code as u8}),
        None => {}
    }
    if is_refused || !bench.waiting.declares.is_empty() {
        bench.commit().await;
    }
    let said = bench.say();
    let mut rest = said.as_slice();
    while let Some(frame) = frame::decode(rest, 4096).unwrap() {
        let seq = frame.header.seq;
        rest = &rest[frame.bytes.len()..];
        if frame.header.frame_type == types::NACK {
            let nack: Nack<'_> = message::decode(frame.payload()).unwrap();
            return json!({
                "outcome": "nack",
                "code": nack.code,
                "seq": seq,
                "expected_seq": nack.expected_seq,
                "consumed": is_refused,
            });
        }
        if frame.header.frame_type == types::ACK && !is_submitted {
            return json!({"outcome": "ack", "seq": seq});
        }
    }
    let outcome = match frame_type {
        _ if is_submitted || !said.is_empty() => "taken",
        frame_type if types::is_skippable(frame_type) => "passed_over",
        _ => "dropped",
    };
    json!({"outcome": outcome})
}

/// Covers all vectors except those for devices, and AUTH, whose proof is tested elsewhere.
#[tokio::test]
async fn a_session_matches_the_vectors() {
    let mut judged = 0;
    for file in FILES {
        let path = format!(
            "{}/protocol/vectors/{file}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        let text = std::fs::read_to_string(path).unwrap();
        let vectors: Value = serde_json::from_str(&text).unwrap();
        let declare = bytes_of(&vectors["states"]["serving"]["schemas"][0]);
        for vector in vectors["vectors"].as_array().unwrap() {
            let mut bench = match vector["state"].as_str().unwrap() {
                "device" | "await_auth" => continue,
                "await_hello" => Bench::accepted(Arc::default()),
                state => serving(&declare, state).await,
            };
            let found = judge(&mut bench, &bytes_of(&vector["hex"])).await;
            assert_eq!(
                found, vector["expect"],
                "{}: {}",
                vector["id"], vector["note"]
            );
            judged += 1;
        }
    }
    assert!(judged > 300, "{judged}");
}
