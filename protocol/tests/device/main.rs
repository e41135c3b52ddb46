//! Tests of the device state machine, driven frame by frame with a scripted gateway.

#[allow(dead_code, missing_docs)]
#[path = "../corpus/mod.rs"]
mod corpus;

mod handshake;
mod refusals;
mod stream;
mod waiting;

use corpus::exchanges::config;
use corpus::handshake::{DEVICE_NONCE, frames, hello, welcome};
use corpus::message_frame;
use corpus::queue::MemoryQueue;
use fieldgate_protocol::auth::NO_CHANNEL_BINDING;
use fieldgate_protocol::device::{Config, Device, Fault, Notice, Queue};
use fieldgate_protocol::frame::{self, types};
use fieldgate_protocol::message::{Ack, Gap, Hello, Message, Nack, Ping, Pong, Welcome, decode};

/// Short form of a frame that the device sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Hello,
    Auth,
    Declare,
    Data(u64),
    Gap(u64, u64),
    Ping,
}

/// A device with its queue and clock, over successive connections.
struct Rig {
    device: Device<'static>,
    queue: MemoryQueue,
    now_us: u64,
    out: Vec<u8>,
}

impl Rig {
    fn new(queue: MemoryQueue) -> Rig {
        Rig::with(config(), queue)
    }

    fn with(config: Config<'static>, queue: MemoryQueue) -> Rig {
        Rig {
            device: Device::new(config),
            queue,
            now_us: 1_000_000,
            out: vec![0; 4096],
        }
    }

    /// Returns a device after WELCOME.
    fn ready(queue: MemoryQueue, durable_seq: u64) -> Rig {
        let mut rig = Rig::new(queue);
        rig.welcome(welcome(durable_seq, 1)).unwrap();
        rig
    }

    fn connect(&mut self) {
        self.device
            .connect(DEVICE_NONCE, NO_CHANNEL_BINDING, self.now_us, 0);
    }

    /// Returns the gateway's two frames of a handshake that begins now.
    fn gateway_frames(&self, welcome: Welcome<'_>) -> (Vec<u8>, Vec<u8>) {
        let hello = Hello {
            mono_us: self.now_us,
            oldest_seq: self.queue.oldest_seq(),
            next_seq: self.queue.next_seq(),
            ..hello()
        };
        let [_, challenge, _, welcome] = frames(&hello, self.now_us, welcome, &NO_CHANNEL_BINDING);
        (challenge, welcome)
    }

    fn welcome(&mut self, welcome: Welcome<'_>) -> Result<Option<Notice>, Fault> {
        let (challenge, welcome) = self.gateway_frames(welcome);
        self.connect();
        assert_eq!(self.sends(), [Sent::Hello]);
        self.receive(&challenge)?;
        assert_eq!(self.sends(), [Sent::Auth]);
        self.receive(&welcome)
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<Option<Notice>, Fault> {
        let frame = frame::decode(bytes, 4096).unwrap().unwrap();
        self.device
            .handle_frame(&frame, &mut self.queue, self.now_us)
    }

    fn ack(&mut self, seq: u64, limit_seq: u64) -> Result<Option<Notice>, Fault> {
        self.receive(&message_frame(
            &Ack {
                limit_seq,
                ext: &[],
            },
            seq,
        ))
    }

    fn nack(
        &mut self,
        code: u8,
        seq: u64,
        expected_seq: u64,
        retry_after_ms: u32,
    ) -> Result<Option<Notice>, Fault> {
        let nack = Nack {
            code,
            expected_seq,
            retry_after_ms,
            detail: "",
            ext: &[],
        };
        self.receive(&message_frame(&nack, seq))
    }

    fn pong(&mut self) -> Result<Option<Notice>, Fault> {
        let ping: Ping<'_> = decode(corpus::payload_of(&self.out)).unwrap();
        let pong = Pong {
            mono_us: ping.mono_us,
            received_us: 5,
            sent_us: 6,
            ext: &[],
        };
        self.receive(&message_frame(&pong, 0))
    }

    /// Returns everything that the device sends now. The last frame stays in `out`.
    fn sends(&mut self) -> Vec<Sent> {
        let mut sent = Vec::new();
        loop {
            let mut out = vec![0; 4096];
            let Some(len) = self
                .device
                .poll_transmit(&mut self.queue, self.now_us, &mut out)
            else {
                return sent;
            };
            out.truncate(len);
            let frame = frame::decode(&out, 4096).unwrap().unwrap();
            let seq = frame.header.seq;
            sent.push(match frame.header.frame_type {
                types::HELLO => Sent::Hello,
                types::AUTH => Sent::Auth,
                types::DECLARE => Sent::Declare,
                types::DATA => Sent::Data(seq),
                types::GAP => Sent::Gap(decode::<Gap<'_>>(frame.payload()).unwrap().from_seq, seq),
                types::PING => Sent::Ping,
                other => panic!("the device sends type {other:#04x}"),
            });
            self.out = out;
        }
    }

    fn pass(&mut self, us: u64) -> Result<(), Fault> {
        self.now_us += us;
        self.device.handle_timeout(self.now_us)
    }
}
