//! The target `session`: the input selects actions of devices, network and store. Sessions with their inboxes,
//! mailboxes, registry, batcher and memory store are the real ones.
//!
//! After every call, the output, requests and submissions of a session must equal those of [`model`].
//! Independently of the model:
//! - numbers in an ACK, WELCOME or class 3 NACK (for a quarantined frame) are in the store when the message is
//!   sent;
//! - the numbers of ACKs never decrease, and there is at most one ACK for each commit and each duplicate;
//! - the output grows by at most [`connection::CALL_BYTES_MAX`] per call, and by [`connection::NACK_BYTES_MAX`] for
//!   each durable rejection;
//! - a closed session sends, requests and accepts nothing, whatever it receives;
//! - the store has each stream's numbers once, in order, without holes, equal to the accepted frames, and
//!   no more quarantined frames than the quota allows.
//!
//! At the end, when everything is committed and answered, no session waits for anything but its peer.

mod accepted;
mod connection;
mod device;
mod model;
mod store;

use std::sync::Arc;

use fieldgate_protocol::frame::{self, FRAME_BYTES_MAX, Header, types};

use self::connection::Line;
use self::device::{FLEET_KEY, KNOWN};
use self::store::StoreSide;
use super::{poll_once, reseal_all};
use crate::auth::credentials::Credentials;
use crate::auth::fleet_key::FleetKey;
use crate::config::{DeviceRates, SessionLimits};
use crate::quota::device::DeviceQuotas;
use crate::quota::quarantine::Gauge;
use crate::session::SessionSettings;
use crate::time::{Now, Origin};

/// More than a device can use up here.
const PLENTY: u64 = 1_000_000;
const OPERATIONS_MAX: usize = 300;
/// Maximum number of sessions at a time; one more replaces the oldest.
const LINES_MAX: usize = 3;
const OUTBOUND_BYTES_MAX: usize = 2_000;
/// 2026-01-01T00:00:00Z.
const START_UTC_US: i64 = 1_767_225_600_000_000;

/// Input: a byte that selects the settings and the start of the first connection, followed by the operations in
/// `World::operate`.
pub fn session(input: &[u8]) {
    let mut input = Input(input);
    let picks = input.byte();
    let mut world = World::new(picks);
    world.connect(usize::from(picks >> 6), picks & 32 == 0);
    for _ in 0..OPERATIONS_MAX {
        if input.0.is_empty() {
            break;
        }
        world.operate(&mut input);
        world.forget_closed();
    }
    world.end();
}

/// The rest of the input, followed by zeros.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    /// Returns as many bytes as the first byte specifies.
    fn bytes(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte()).min(self.0.len());
        self.0.split_off(..len).unwrap_or_default()
    }
}

struct World {
    now: Now,
    settings: Arc<SessionSettings>,
    /// The model's quotas.
    quotas: Arc<DeviceQuotas>,
    store: StoreSide,
    /// The newest is last.
    lines: Vec<Line>,
}

impl World {
    fn new(picks: u8) -> World {
        let is_roomy = picks & 1 == 0;
        // A device may use an eighth: a few short frames.
        let bytes_max = if is_roomy { u64::MAX / 2 } else { 8 * 200 };
        let mut rates = DeviceRates {
            device_frames_per_s: PLENTY,
            device_frames_burst: PLENTY,
            device_readings_per_s: PLENTY,
            device_readings_burst: PLENTY,
        };
        if picks & 8 != 0 {
            (rates.device_frames_per_s, rates.device_frames_burst) = (2, 9);
        }
        if picks & 4 != 0 {
            (rates.device_readings_per_s, rates.device_readings_burst) = (10, 40);
        }
        let settings = SessionSettings {
            credentials: Arc::new(Credentials::new(FleetKey::from_bytes(FLEET_KEY))),
            limits: SessionLimits {
                window_frames: if picks & 2 == 0 { 64 } else { 3 },
                outbound_bytes_max: OUTBOUND_BYTES_MAX,
                ..SessionLimits::default()
            },
            quotas: Arc::new(DeviceQuotas::new(&rates)),
            quarantine: Arc::new(Gauge::new(bytes_max)),
            ..SessionSettings::default()
        };
        let settings = Arc::new(settings);
        World {
            now: Now {
                mono_us: 1_000_000,
                utc_us: START_UTC_US,
                origin: Origin {
                    timeline: 1,
                    at_us: START_UTC_US - 1_000_000,
                },
            },
            store: StoreSide::new(Arc::clone(&settings.quarantine), bytes_max),
            settings,
            quotas: Arc::new(DeviceQuotas::new(&rates)),
            lines: Vec::new(),
        }
    }

    fn connect(&mut self, known: usize, is_welcomed: bool) {
        if self.lines.len() == LINES_MAX {
            self.lose(0);
            self.forget_closed();
        }
        let (settings, quotas) = (Arc::clone(&self.settings), Arc::clone(&self.quotas));
        self.lines.push(Line::new(settings, quotas, self.now));
        if is_welcomed {
            let line = self.lines.len() - 1;
            self.receive(line, &KNOWN[known].hello);
            self.receive(line, &KNOWN[known].auth);
            self.settle();
        }
    }

    fn operate(&mut self, input: &mut Input<'_>) {
        let operation = input.byte();
        if self.lines.is_empty() {
            self.connect(usize::from(operation % 4), operation & 4 == 0);
        }
        let newest = self.lines.len() - 1;
        let line = if operation < 200 { newest } else { 0 };
        let (seq, utc_us) = (self.lines[line].next_seq, self.now.utc_us);
        match operation % 20 {
            0 => self.send(line, device::event(seq, input.byte(), utc_us), input.byte()),
            1 | 2 => {
                let (pick, rows) = (input.byte(), input.byte());
                let raw: Vec<u8> = (0..=rows % 16).map(|_| input.byte()).collect();
                let utc_us = (rows & 16 == 0).then_some(utc_us);
                self.send(line, device::data(seq, pick, utc_us, &raw), input.byte());
            }
            3 => {
                let (back, more) = (u64::from(input.byte() % 8), u64::from(input.byte() % 8));
                let from_seq = (seq + 2).saturating_sub(back);
                self.send(line, device::gap(from_seq, seq + more), input.byte());
            }
            4 => self.send(line, device::declare(input.byte()), input.byte()),
            5 => {
                let mono_us = self.now.mono_us + u64::from(input.byte());
                let ping = device::ping(mono_us, self.lines[line].pong_sent_us);
                self.send(line, ping, input.byte());
            }
            6 => self.send_made(line, input),
            7 => self.receive(line, input.bytes()),
            8 => self.receive(line, &reseal_all(input.bytes())),
            9 => self.send(line, KNOWN[usize::from(input.byte() % 4)].hello.clone(), 0),
            10 => self.send(line, KNOWN[usize::from(input.byte() % 4)].auth.clone(), 0),
            11 => {
                for _ in 0..=input.byte() % 4 {
                    self.store.work(self.now);
                }
            }
            12 => drop(self.take_mail(line)),
            13 => self.settle(),
            14 => self.store.fail(input.byte()),
            15 => self.pass(1 << (input.byte() % 28)),
            16 => self.pass_until_deadline(line, input.byte()),
            17 => self.leave(line, input.byte()),
            18 => {
                let pick = input.byte();
                self.connect(usize::from(pick % 4), pick & 4 == 0);
            }
            _ => self.turn(line, input.byte()),
        }
    }

    /// Sends a frame with type, number and payload from the input.
    fn send_made(&mut self, line: usize, input: &mut Input<'_>) {
        let (frame_type, damage, payload) = (input.byte(), input.byte(), input.bytes());
        let seq = match frame_type {
            frame_type if types::is_sequenced(frame_type) => self.lines[line].next_seq,
            _ => 0,
        };
        let mut made = vec![0; frame::OVERHEAD_BYTES + payload.len()];
        made[frame::HEADER_BYTES..][..payload.len()].copy_from_slice(payload);
        let header = Header {
            version: frame::VERSION,
            frame_type,
            flags: 0,
            payload_bytes: payload.len() as u16,
            seq,
        };
        frame::seal(header, &mut made).expect("the buffer is large enough");
        self.send(line, made, damage);
    }

    fn send(&mut self, line: usize, mut sent: Vec<u8>, damage: u8) {
        let decoded = frame::decode_header(&sent, FRAME_BYTES_MAX);
        let mut header = decoded.expect("a valid frame").expect("a complete frame");
        match damage % 16 {
            8 => header.seq = header.seq.wrapping_sub(1),
            9 => header.seq += 1 + u64::from(damage / 16),
            10 => {
                header.seq =
                    [0, u64::MAX, self.settings.limits.window_frames][usize::from(damage / 86)]
            }
            12 => header.flags = 1 << (damage / 32),
            13 => header.payload_bytes = header.payload_bytes.saturating_sub(1),
            15 => header.version = damage / 16 % 3,
            _ => {}
        }
        let frame_bytes = frame::seal(header, &mut sent).expect("no longer than it was");
        sent.truncate(frame_bytes);
        match damage % 16 {
            11 => sent[frame::HEADER_BYTES] ^= 1 << (damage / 32),
            14 => {
                let rest = sent.split_off(frame_bytes * usize::from(1 + damage / 16) / 17);
                self.receive(line, &sent);
                self.lines[line].held_back = rest;
                return;
            }
            _ => {}
        }
        let is_next = header.seq == self.lines[line].next_seq;
        if types::is_sequenced(header.frame_type) && is_next {
            self.lines[line].next_seq += 1;
        }
        self.receive(line, &sent);
    }

    /// Sends bytes, preceded by the rest of a frame that an earlier operation held back.
    fn receive(&mut self, line: usize, bytes: &[u8]) {
        let line = &mut self.lines[line];
        let held_back = std::mem::take(&mut line.held_back);
        line.receive(&held_back);
        line.receive(bytes);
        line.process(self.now, &mut self.store);
    }

    /// Delivers a session's mail; returns whether there was any.
    fn take_mail(&mut self, line: usize) -> bool {
        let line = &mut self.lines[line];
        let Some(mail) = poll_once(line.mailbox.take()) else {
            return false;
        };
        line.handle_mail(mail, self.now);
        line.process(self.now, &mut self.store);
        true
    }

    /// Runs until everything is committed and answered.
    fn settle(&mut self) {
        loop {
            let mut is_moved = self.store.work(self.now);
            for line in 0..self.lines.len() {
                is_moved |= self.take_mail(line);
            }
            if !is_moved {
                return;
            }
        }
    }

    fn pass(&mut self, us: u64) {
        self.now.mono_us += us;
        self.now.utc_us += us as i64;
        for line in &mut self.lines {
            line.handle_time(self.now);
            line.process(self.now, &mut self.store);
        }
    }

    fn pass_until_deadline(&mut self, line: usize, pick: u8) {
        if let Some(at_us) = self.lines[line].inbox.session.poll_deadline() {
            let at_us = (at_us + u64::from(pick)).saturating_sub(1);
            self.pass(at_us.saturating_sub(self.now.mono_us));
        }
    }

    fn leave(&mut self, line: usize, pick: u8) {
        let line_ = &mut self.lines[line];
        match pick % 4 {
            0 if !line_.inbox.session.is_leaving() => line_.handle_drain(),
            1 if line_.inbox.wants_input() => line_.handle_end_of_input(),
            2 => return self.receive(line, &device::bye()),
            3 => return self.lose(line),
            _ => {}
        }
        line_.process(self.now, &mut self.store);
    }

    fn lose(&mut self, line: usize) {
        let line = &mut self.lines[line];
        line.lose();
        line.process(self.now, &mut self.store);
    }

    /// Runs an event that neither device nor store causes.
    fn turn(&mut self, line: usize, pick: u8) {
        let line = &mut self.lines[line];
        match pick % 9 {
            0 => line.reads = false,
            1 => line.reads = true,
            2 | 3 => line.read(usize::from(pick)),
            4 => self.store.read_quarantine(),
            5 => self.store.purge_quarantine(),
            6 => self
                .store
                .bar_or_let_in(KNOWN[usize::from(pick / 8 % 4)].name),
            7 => line.handle_old_receipt(self.now),
            _ => {
                let step_us = (i64::from(pick) - 128) * 60_000_000;
                self.now.utc_us += step_us;
                self.now.origin.at_us += step_us;
            }
        }
        line.process(self.now, &mut self.store);
    }

    fn forget_closed(&mut self) {
        let is_closed = |line: &mut Line| line.inbox.session.closed().is_some();
        for mut line in self.lines.extract_if(.., is_closed) {
            line.poke(self.now);
            line.part(self.now, &mut self.store);
        }
    }

    /// Settles and checks the end state: a session that still waits for the gateway would wait indefinitely.
    fn end(mut self) {
        self.store.recover();
        self.settle();
        self.forget_closed();
        for line in &self.lines {
            let session = &line.inbox.session;
            assert!(
                !session.is_leaving(),
                "waits for something already committed and answered"
            );
            assert!(
                session.poll_deadline().is_some(),
                "the session has no deadline"
            );
        }
        for line in 0..self.lines.len() {
            self.lose(line);
        }
        self.forget_closed();
        self.settle();
        self.store.check_audit_trail();
    }
}
