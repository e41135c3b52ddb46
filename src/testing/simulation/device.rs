//! A simulated device: the protocol's state machine over a queue in memory, and its generated data.

use std::collections::BTreeMap;
use std::rc::Rc;

use fieldgate_protocol::auth::{NO_CHANNEL_BINDING, derive_device_key};
use fieldgate_protocol::column::{encode_f64, encode_integers, encoding, scaled};
use fieldgate_protocol::device::{Config, Device, Fault, Queue};
use fieldgate_protocol::frame::{
    self, DEFAULT_FRAME_BYTES_MAX, Header, NoRoom, VERSION, seal, types,
};
use fieldgate_protocol::message::{Column, Data, Event, encode};
use fieldgate_protocol::value::{Clock, Kind, TimeUnit};

use super::link::LinkId;
use super::random::Random;
use crate::testing;
use crate::time::Now;

/// Device names; static, because the state machine borrows them.
pub(super) const NAMES: [&str; 4] = ["sim-a", "sim-b", "sim-c", "sim-d"];
pub(super) const FLEET_KEY: [u8; 32] = [7; 32];
pub(super) const STEP_US: i64 = 1000;
/// Maximum delay between attempts to connect.
pub(super) const RECONNECT_MAX_MS: u32 = 20_000;
const FRAME_BYTES: usize = 512;

/// Name, kind and exponent of every channel, by schema; ids are counted from 1.
pub(super) const SCHEMAS: [&[(&str, Kind, i8)]; 2] = [
    &[("temperature", Kind::Integer, -2), ("level", Kind::F64, 0)],
    &[
        ("level", Kind::F64, 0),
        ("open", Kind::Bool, 0),
        ("count", Kind::Integer, 0),
    ],
];

/// Content of a sequence number.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub frame: Vec<u8>,
    pub content: MadeContent,
}

#[derive(Clone, Debug)]
pub(super) enum MadeContent {
    /// Device times, and values by channel.
    Readings {
        schema: u16,
        times_us: Vec<i64>,
        columns: Vec<Vec<f64>>,
    },
    Event {
        time_us: i64,
        text: String,
    },
    /// Intact, but of a type that the gateway does not process.
    Malformed,
}

pub(super) fn declare_frame(schema: u16) -> Vec<u8> {
    let declare = testing::declare(schema, SCHEMAS[usize::from(schema) - 1]);
    framed(|out| encode(&declare, 0, out))
}

fn framed(write: impl FnOnce(&mut [u8]) -> Result<usize, NoRoom>) -> Vec<u8> {
    let mut frame = vec![0; FRAME_BYTES];
    let frame_bytes = write(&mut frame).expect("frames of the simulation are short");
    frame.truncate(frame_bytes);
    frame
}

/// Generates a frame at a moment of the device's clock.
fn make(seq: u64, boot: u32, uptime_us: u64, utc_us: i64, random: &mut Random) -> Made {
    let (clock, time_us) = match random.below(2) {
        0 => (Clock::Boot, uptime_us as i64),
        _ => (Clock::Utc, utc_us),
    };
    match random.below(20) {
        0 => {
            let text = format!("event {seq}");
            let event = Event {
                clock,
                boot,
                time_us,
                level: 1,
                code: 3,
                text: &text,
                ext: &[],
            };
            let frame = framed(|out| encode(&event, seq, out));
            Made {
                frame,
                content: MadeContent::Event { time_us, text },
            }
        }
        1 => {
            let header = Header {
                version: VERSION,
                frame_type: types::RESULT,
                flags: 0,
                payload_bytes: 3,
                seq,
            };
            let frame = framed(|out| seal(header, out));
            Made {
                frame,
                content: MadeContent::Malformed,
            }
        }
        _ => {
            let schema = if random.takes(80) { 1 } else { 2 };
            make_data(seq, boot, clock, time_us, schema, random)
        }
    }
}

fn make_data(
    seq: u64,
    boot: u32,
    clock: Clock,
    time_us: i64,
    schema: u16,
    random: &mut Random,
) -> Made {
    let rows = 1 + random.index(4);
    let channels = SCHEMAS[usize::from(schema) - 1];
    let (mut columns, mut packed) = (Vec::new(), Vec::new());
    for (_, kind, exp10) in channels {
        let raw: Vec<i64> = (0..rows)
            .map(|_| match kind {
                Kind::Bool => random.below(2) as i64,
                _ => random.below(100_000) as i64 - 50_000,
            })
            .collect();
        let mut bytes = vec![0; 128];
        let (encoding, used) = if *kind == Kind::F64 {
            let doubles: Vec<f64> = raw.iter().map(|raw| *raw as f64 / 7.0).collect();
            let used = encode_f64(&doubles, &mut bytes).unwrap();
            columns.push(doubles);
            (encoding::RAW, used)
        } else {
            columns.push(raw.iter().map(|raw| scaled(*raw, *exp10)).collect());
            encode_integers(&raw, &mut bytes).unwrap()
        };
        bytes.truncate(used);
        packed.push((encoding, bytes));
    }
    let data = Data {
        schema,
        clock,
        time_unit: TimeUnit::Microseconds,
        boot,
        t0: time_us,
        rows: rows as u16,
        step: STEP_US as u32,
        dt: &[],
        columns: packed
            .iter()
            .zip(1..)
            .map(|((encoding, data), channel)| Column {
                channel,
                encoding: *encoding,
                nulls: &[],
                data,
            })
            .collect(),
        ext: &[],
    };
    let frame = framed(|out| encode(&data, seq, out));
    let times_us = (0..rows as i64)
        .map(|row| time_us + row * STEP_US)
        .collect();
    Made {
        frame,
        content: MadeContent::Readings {
            schema,
            times_us,
            columns,
        },
    }
}

/// A durable queue, which survives reboots.
pub(super) struct MemoryQueue {
    frames: BTreeMap<u64, Made>,
    next_seq: u64,
    /// The highest number that the gateway acknowledged.
    pub acked_through: u64,
    declares: Rc<[Vec<u8>; 2]>,
}

impl MemoryQueue {
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Drops the oldest frame as if the queue were full; returns its number.
    pub(super) fn overwrite_oldest(&mut self) -> Option<u64> {
        self.frames.pop_first().map(|(seq, _)| seq)
    }
}

impl Queue for MemoryQueue {
    fn oldest_seq(&self) -> u64 {
        self.frames.keys().next().copied().unwrap_or(self.next_seq)
    }

    fn next_seq(&self) -> u64 {
        self.next_seq
    }

    fn write_frame(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let frame = &self.frames[&seq].frame;
        out.get_mut(..frame.len())
            .ok_or(NoRoom)?
            .copy_from_slice(frame);
        Ok(frame.len())
    }

    fn write_declare(&mut self, seq: u64, out: &mut [u8]) -> Result<usize, NoRoom> {
        let schema = match self.frames[&seq].content {
            MadeContent::Readings { schema, .. } => schema,
            _ => 1,
        };
        let declare = &self.declares[usize::from(schema) - 1];
        out.get_mut(..declare.len())
            .ok_or(NoRoom)?
            .copy_from_slice(declare);
        Ok(declare.len())
    }

    fn delete_through(&mut self, seq: u64) {
        assert!(
            seq < self.next_seq,
            "asked to delete a frame that does not exist"
        );
        self.frames = self.frames.split_off(&(seq + 1));
        self.acked_through = self.acked_through.max(seq);
    }
}

pub(super) struct FieldDevice {
    pub name: &'static str,
    pub stream: u64,
    pub queue: MemoryQueue,
    pub machine: Device<'static>,
    pub link: Option<LinkId>,
    /// Received bytes of an incomplete frame.
    input: Vec<u8>,
    boot: u32,
    booted_at_us: u64,
    /// Time to reconnect, on the simulation's clock.
    pub again_at_us: u64,
}

impl FieldDevice {
    pub(super) fn new(index: usize, declares: &Rc<[Vec<u8>; 2]>, random: &mut Random) -> Self {
        let stream = random.below(1 << 40);
        FieldDevice {
            name: NAMES[index],
            stream,
            queue: MemoryQueue {
                frames: BTreeMap::new(),
                next_seq: 1,
                acked_through: 0,
                declares: Rc::clone(declares),
            },
            machine: machine(NAMES[index], stream, 1, random),
            link: None,
            input: Vec::new(),
            boot: 1,
            booted_at_us: 0,
            again_at_us: 0,
        }
    }

    /// Restarts the device after a power failure: only the queue survives.
    pub(super) fn reboot(&mut self, now: Now, random: &mut Random) {
        self.boot += 1;
        self.booted_at_us = now.mono_us;
        self.again_at_us = now.mono_us;
        self.link = None;
        self.input.clear();
        self.machine = machine(self.name, self.stream, self.boot, random);
    }

    pub(super) fn uptime_us(&self, now: Now) -> u64 {
        now.mono_us - self.booted_at_us
    }

    /// Takes a reading; returns its number and content.
    pub(super) fn sample(&mut self, now: Now, random: &mut Random) -> (u64, Made) {
        let seq = self.queue.next_seq;
        let made = make(seq, self.boot, self.uptime_us(now), now.utc_us, random);
        self.queue.frames.insert(seq, made.clone());
        self.queue.next_seq += 1;
        (seq, made)
    }

    pub(super) fn connect(&mut self, link: LinkId, now: Now, random: &mut Random) {
        self.link = Some(link);
        self.input.clear();
        let uptime_us = self.uptime_us(now);
        self.machine
            .connect(random.nonce(), NO_CHANNEL_BINDING, uptime_us, now.utc_us);
    }

    pub(super) fn disconnect(&mut self, fault: Option<Fault>, now: Now, random: &mut Random) {
        self.link = None;
        self.input.clear();
        let uptime_us = self.uptime_us(now);
        let again_us = self
            .machine
            .disconnect(fault, uptime_us, random.bits() as u32);
        self.again_at_us = self.booted_at_us + again_us;
    }

    pub(super) fn transmit(&mut self, now: Now) -> Option<Vec<u8>> {
        let mut frame = vec![0; FRAME_BYTES];
        let uptime_us = self.uptime_us(now);
        let frame_bytes = self
            .machine
            .poll_transmit(&mut self.queue, uptime_us, &mut frame)?;
        frame.truncate(frame_bytes);
        Some(frame)
    }

    /// Receives bytes and processes the whole frames.
    pub(super) fn receive(
        &mut self,
        bytes: impl Iterator<Item = u8>,
        now: Now,
    ) -> Result<(), Fault> {
        self.input.extend(bytes);
        let uptime_us = self.uptime_us(now);
        let mut taken = 0;
        loop {
            let found = frame::decode(&self.input[taken..], DEFAULT_FRAME_BYTES_MAX);
            let Some(frame) = found.map_err(|_| Fault::Protocol("not a frame"))? else {
                break;
            };
            taken += frame.bytes.len();
            self.machine
                .handle_frame(&frame, &mut self.queue, uptime_us)?;
        }
        self.input.drain(..taken);
        Ok(())
    }

    /// Returns the next deadline of the device, on the simulation's clock.
    pub(super) fn deadline_us(&self) -> Option<u64> {
        match self.link {
            None => Some(self.again_at_us),
            Some(_) => self
                .machine
                .poll_deadline()
                .map(|us| self.booted_at_us + us),
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.queue.acked_through + 1 == self.queue.next_seq
    }
}

fn machine(name: &'static str, stream: u64, boot: u32, random: &mut Random) -> Device<'static> {
    let schema = 1 + random.below(2) as u16;
    Device::new(Config {
        name,
        key: derive_device_key(&FLEET_KEY, name, 0),
        firmware: "simulated",
        stream,
        boot,
        schema,
        schema_hash: testing::declare(schema, SCHEMAS[usize::from(schema) - 1]).hash(),
        rx_bytes_max: FRAME_BYTES as u16,
        window_frames: 1 + random.below(12),
        reconnect_min_ms: 50,
        reconnect_max_ms: RECONNECT_MAX_MS,
        handshake_timeout_ms: 10_000,
    })
}
