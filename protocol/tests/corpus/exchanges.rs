//! Whole conversations: the device's frames come from [`Device`], in response to the gateway's
//! frames.

use fieldgate_protocol::auth::{NO_CHANNEL_BINDING, derive_device_key};
use fieldgate_protocol::device::{Config, Device, Queue};
use fieldgate_protocol::frame;
use fieldgate_protocol::message::{Ack, Hello, Nack, Welcome};

use super::handshake::{DEVICE_NONCE, FLEET_KEY, NAME, STREAM, hello, welcome};
use super::queue::MemoryQueue;
use super::*;

pub fn config() -> Config<'static> {
    Config {
        name: NAME,
        key: derive_device_key(&FLEET_KEY, NAME, 0),
        firmware: "2.4.1",
        stream: STREAM,
        boot: 7,
        schema: 1,
        schema_hash: hello().schema_hash,
        rx_bytes_max: 4096,
        window_frames: 64,
        reconnect_min_ms: 1_000,
        reconnect_max_ms: 300_000,
        handshake_timeout_ms: 10_000,
    }
}

struct Script {
    device: Device<'static>,
    queue: MemoryQueue,
    now_us: u64,
    connection: u32,
    steps: Vec<Value>,
}

impl Script {
    fn new(queue: MemoryQueue) -> Script {
        Script {
            device: Device::new(config()),
            queue,
            now_us: 1_000_000,
            connection: 0,
            steps: Vec::new(),
        }
    }

    /// Connects and performs the handshake.
    fn connect(&mut self, welcome: Welcome<'_>) {
        self.connection += 1;
        let mut nonce = DEVICE_NONCE;
        nonce[15] = b'0' + self.connection as u8;
        self.device
            .connect(nonce, NO_CHANNEL_BINDING, self.now_us, 0);
        let hello = Hello {
            nonce,
            mono_us: self.now_us,
            oldest_seq: self.queue.oldest_seq(),
            next_seq: self.queue.next_seq(),
            ..hello()
        };
        let says = format!(
            "WELCOME: durable {}, limit {}",
            welcome.durable_seq, welcome.limit_seq
        );
        let [hello, challenge, auth, welcome] =
            handshake::frames(&hello, self.now_us + 40_000, welcome, &NO_CHANNEL_BINDING);
        assert_eq!(self.device_sends(&["HELLO"]), [hello]);
        self.gateway_sends(&challenge, "CHALLENGE");
        self.now_us += 40_000;
        assert_eq!(self.device_sends(&["AUTH"]), [auth]);
        self.gateway_sends(&welcome, &says);
    }

    fn step(&mut self, from: &str, frame: &[u8], shows: &str) {
        self.steps.push(json!({ "connection": self.connection, "from": from, "hex": hex(frame), "shows": shows }));
    }

    fn gateway_sends(&mut self, bytes: &[u8], shows: &str) {
        self.step("gateway", bytes, shows);
        let frame = frame::decode(bytes, 4096).unwrap().unwrap();
        self.device
            .handle_frame(&frame, &mut self.queue, self.now_us)
            .unwrap();
    }

    fn ack(&mut self, seq: u64, limit_seq: u64) {
        let shows = format!("ACK {seq}, limit {limit_seq}");
        self.gateway_sends(
            &message_frame(
                &Ack {
                    limit_seq,
                    ext: &[],
                },
                seq,
            ),
            &shows,
        );
    }

    fn nack(&mut self, code: u8, seq: u64, expected_seq: u64, retry_after_ms: u32) {
        let nack = Nack {
            code,
            expected_seq,
            retry_after_ms,
            detail: "",
            ext: &[],
        };
        let shows = format!("NACK {code} of {seq}, expects {expected_seq}");
        self.gateway_sends(&message_frame(&nack, seq), &shows);
    }

    /// Checks that the device now sends exactly these frames.
    fn device_sends(&mut self, shows: &[&str]) -> Vec<Vec<u8>> {
        let mut out = [0; 4096];
        let mut sent = Vec::new();
        while let Some(len) = self
            .device
            .poll_transmit(&mut self.queue, self.now_us, &mut out)
        {
            sent.push(out[..len].to_vec());
        }
        assert_eq!(sent.len(), shows.len(), "the device sends {shows:?}");
        for (frame, shows) in sent.iter().zip(shows) {
            self.step("device", frame, shows);
        }
        sent
    }

    fn cut(&mut self, note: &str) {
        self.steps
            .push(json!({ "connection": self.connection, "from": "network", "shows": note }));
        self.device.disconnect(None, self.now_us, 0);
        self.now_us += 5_000_000;
    }

    fn finish(self, id: &str, note: &str) -> Value {
        json!({
            "id": id, "note": note, "steps": self.steps,
            "device_holds": self.queue.held(), "device_deleted_through": self.queue.deleted_through,
        })
    }
}

pub fn file() -> Value {
    json!({
        "about": "Conversations (SPEC.md R80-R118). Both sides start fresh; the fleet key is that of handshake.json",
        "exchanges": [
            lost_ack(), commit_under_way(), declares(), unknown_schema(), overwritten(), refused_frame(), store_down(), store_back(), credit(),
        ],
    })
}

fn lost_ack() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 3));
    script.connect(welcome(0, 1));
    script.device_sends(&["DATA 1", "DATA 2"]);
    script.cut("the gateway stores 1 and 2; ACK 2 is lost with the connection");
    script.queue.push();
    script.connect(welcome(2, 1));
    assert_eq!(script.queue.held(), [3]);
    script.device_sends(&["DATA 3"]);
    script.ack(3, 67);
    script.finish(
        "resume-after-lost-ack",
        "WELCOME replaces the lost ACK; nothing is sent twice",
    )
}

fn commit_under_way() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 4));
    script.connect(welcome(0, 1));
    script.device_sends(&["DATA 1", "DATA 2", "DATA 3"]);
    script.cut("1 is stored; 2 is in flight to the store; 3 never arrives");
    script.connect(welcome(1, 1));
    script.device_sends(&["DATA 2", "DATA 3"]);
    script.ack(2, 66);
    script.ack(3, 67);
    script.finish(
        "resume-with-a-commit-under-way",
        "2 arrives twice and is stored once: its second copy is only acknowledged",
    )
}

fn declares() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 2));
    script.connect(welcome(0, 0));
    script.device_sends(&["DECLARE 1", "DATA 1"]);
    script.ack(1, 65);
    script.finish(
        "declare",
        "a gateway that does not know the schema named in HELLO",
    )
}

fn unknown_schema() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 3));
    script.connect(welcome(0, 1));
    script.device_sends(&["DATA 1", "DATA 2"]);
    script.nack(20, 1, 1, 0);
    script.device_sends(&["DECLARE 1", "DATA 1", "DATA 2"]);
    script.ack(2, 66);
    script.finish(
        "unknown-schema",
        "2 is dropped after NACK 20; both are resent after DECLARE",
    )
}

fn overwritten() -> Value {
    let mut script = Script::new(MemoryQueue::holding(5, 7));
    script.connect(welcome(2, 1));
    script.device_sends(&["GAP 3 to 4", "DATA 5", "DATA 6"]);
    script.ack(6, 70);
    script.finish(
        "gap-after-overwrite",
        "3 and 4 were overwritten while the device was offline: the loss is reported",
    )
}

fn refused_frame() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 3));
    script.connect(welcome(0, 1));
    script.device_sends(&["DATA 1", "DATA 2"]);
    script.nack(31, 1, 3, 0);
    script.device_sends(&[]);
    script.ack(2, 66);
    script.finish(
        "refused-frame",
        "1 is in quarantine and its number is used; 2 is stored; neither is resent",
    )
}

fn store_down() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 3));
    script.connect(welcome(0, 1));
    script.device_sends(&["DATA 1", "DATA 2"]);
    script.nack(11, 1, 1, 2_000);
    script.now_us += 1_999_999;
    script.device_sends(&[]);
    script.now_us += 1;
    script.device_sends(&["DATA 1"]);
    script.ack(1, 65);
    script.device_sends(&["DATA 2"]);
    script.ack(2, 66);
    script.finish(
        "store-down",
        "the device waits 2 s, sends the frame that the NACK expects, and the others once that is durable",
    )
}

fn store_back() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 3));
    script.connect(welcome(0, 1));
    script.device_sends(&["DATA 1", "DATA 2"]);
    script.nack(11, 1, 1, 60_000);
    script.device_sends(&[]);
    script.ack(0, 64);
    script.device_sends(&["DATA 1"]);
    script.ack(1, 65);
    script.device_sends(&["DATA 2"]);
    script.ack(2, 66);
    script.finish(
        "store-back",
        "an ACK without a new number ends the pause: the device need not wait for its end",
    )
}

fn credit() -> Value {
    let mut script = Script::new(MemoryQueue::holding(1, 5));
    script.connect(Welcome {
        limit_seq: 1,
        ..welcome(0, 1)
    });
    script.device_sends(&["DATA 1"]);
    script.ack(1, 3);
    script.device_sends(&["DATA 2", "DATA 3"]);
    script.ack(3, 3);
    script.device_sends(&[]);
    script.ack(3, 10);
    script.device_sends(&["DATA 4"]);
    script.ack(4, 10);
    script.finish(
        "credit",
        "limits are absolute; an ACK of the same number can move the limit alone",
    )
}
