//! The reference: the content of every number, and the invariants checked against the store.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fieldgate_protocol::error::{Class, Code};
use fieldgate_protocol::frame::{self, types};
use fieldgate_protocol::message::{self, Nack, Welcome};

use super::device::{Made, MadeContent, NAMES, SCHEMAS};
use crate::store::memory::MemoryStore;
use crate::store::{Content, SeriesId};

/// Number of occurrences of each event, over all seeds. If an event never occurs, the simulation does not test it.
pub(super) type Tally = BTreeMap<&'static str, u64>;

#[derive(Default)]
struct DeviceRecord {
    made: BTreeMap<u64, Made>,
    /// Numbers overwritten before they were acknowledged.
    lost: BTreeSet<u64>,
    was_corrupted: bool,
    /// Rows of the store verified so far; the next field is the last number they cover.
    rows: usize,
    durable_seq: u64,
    series: HashMap<&'static str, SeriesId>,
}

#[derive(Default)]
pub(super) struct Record {
    devices: Vec<DeviceRecord>,
    pub tally: Tally,
}

impl Record {
    pub(super) fn add_device(&mut self) {
        self.devices.push(DeviceRecord {
            ..DeviceRecord::default()
        });
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub(super) fn made(&mut self, device: usize, seq: u64, made: Made) {
        let before = self.devices[device].made.insert(seq, made);
        assert!(
            before.is_none(),
            "{}: number {seq} used twice",
            NAMES[device]
        );
    }

    pub(super) fn lost(&mut self, device: usize, seq: u64) {
        self.devices[device].lost.insert(seq);
    }

    pub(super) fn corrupted(&mut self, device: usize) {
        self.devices[device].was_corrupted = true;
    }

    /// I1: every frame that a device deletes on an ACK is stored.
    pub(super) fn check_deleted(&self, device: usize, through_seq: u64) {
        let durable_seq = self.devices[device].durable_seq;
        assert!(
            through_seq <= durable_seq,
            "{}: {through_seq} deleted, {durable_seq} stored",
            NAMES[device]
        );
    }

    /// Verifies that all numbers that the gateway reports as durable are stored.
    pub(super) fn check_said(&mut self, device: usize, mut said: &[u8]) {
        let durable_seq = self.devices[device].durable_seq;
        while !said.is_empty() {
            let frame = frame::decode(said, frame::FRAME_BYTES_MAX)
                .unwrap()
                .expect("complete frames");
            let (claimed_seq, what) = match frame.header.frame_type {
                types::ACK => (frame.header.seq, "ack"),
                types::WELCOME => {
                    let welcome: Welcome<'_> = message::decode(frame.payload()).unwrap();
                    (welcome.durable_seq, "welcome")
                }
                types::NACK => {
                    let nack: Nack<'_> = message::decode(frame.payload()).unwrap();
                    let is_refused = Class::of(nack.code) == Class::Refused;
                    let claimed_seq = if is_refused { frame.header.seq } else { 0 };
                    (claimed_seq, Code::from_wire(nack.code).unwrap().name())
                }
                types::BYE => {
                    let bye: message::Bye<'_> = message::decode(frame.payload()).unwrap();
                    (0, Code::from_wire(bye.code).unwrap().name())
                }
                _ => (0, "other"),
            };
            self.count(what);
            assert!(
                claimed_seq <= durable_seq,
                "{}: {what} of {claimed_seq}, {durable_seq} durable",
                NAMES[device]
            );
            said = &said[frame.bytes.len()..];
        }
    }

    /// I2, I3 and I4 for everything committed since the last call.
    pub(super) fn check_store(&mut self, store: &MemoryStore) {
        for (record, name) in self.devices.iter_mut().zip(NAMES) {
            let rows = stored(store, name);
            for (seq, first_seq, content) in &rows[record.rows..] {
                assert_eq!(*first_seq, record.durable_seq + 1, "{name}: not contiguous");
                assert!(first_seq <= seq, "{name}: {first_seq} to {seq}");
                let kind = record.check_row(name, *first_seq, *seq, content);
                *self.tally.entry(kind).or_default() += 1;
                record.durable_seq = *seq;
            }
            record.rows = rows.len();
        }
    }

    /// Verifies that everything made is stored, once; checks every row again.
    pub(super) fn check_whole(&mut self, store: &MemoryStore) {
        for record in &mut self.devices {
            (record.rows, record.durable_seq) = (0, 0);
        }
        self.check_store(store);
        for (record, name) in self.devices.iter().zip(NAMES) {
            assert_eq!(
                record.durable_seq,
                record.made.len() as u64,
                "{name}: not everything is stored"
            );
        }
    }
}

/// Returns the stored content of a device's one stream: number, first number covered, content.
fn stored(store: &MemoryStore, name: &str) -> Vec<(u64, u64, Content)> {
    let streams = store
        .streams()
        .into_iter()
        .filter(|(_, device)| device == name);
    streams
        .flat_map(|(stream, _)| store.entries(stream))
        .map(|(seq, stored)| (seq, stored.first_seq, stored.entry.content))
        .collect()
}

impl DeviceRecord {
    fn check_row(
        &mut self,
        name: &str,
        first_seq: u64,
        seq: u64,
        content: &Content,
    ) -> &'static str {
        if let Content::Gap { .. } = content {
            for lost in first_seq..=seq {
                assert!(
                    self.lost.contains(&lost),
                    "{name}: {lost} is reported as lost, but was not"
                );
            }
            return "gap stored";
        }
        assert_eq!(
            first_seq, seq,
            "{name}: only a gap covers more than its number"
        );
        let made = self
            .made
            .get(&seq)
            .unwrap_or_else(|| panic!("{name}: {seq} was never made"));
        match (content, &made.content) {
            (
                Content::Readings(stored),
                MadeContent::Readings {
                    schema,
                    times_us,
                    columns,
                },
            ) => {
                let device_times_us: Vec<i64> = stored
                    .times_us
                    .iter()
                    .map(|us| us - stored.time.offset_us)
                    .collect();
                assert_eq!(&device_times_us, times_us, "{name}: times of {seq}");
                let sent = columns.iter().flatten().map(|value| value.to_bits());
                assert!(
                    stored.values.iter().map(|value| value.to_bits()).eq(sent),
                    "{name}: values of {seq}"
                );
                let channels = SCHEMAS[usize::from(*schema) - 1];
                assert_eq!(
                    stored.series.len(),
                    channels.len(),
                    "{name}: columns of {seq}"
                );
                for ((channel, ..), series) in channels.iter().zip(&stored.series) {
                    let known = self.series.entry(channel).or_insert(*series);
                    assert_eq!(known, series, "{name}: series of {channel}");
                }
                "readings stored"
            }
            (
                Content::Event {
                    time, at_us, text, ..
                },
                MadeContent::Event {
                    time_us,
                    text: sent,
                },
            ) => {
                assert_eq!(
                    (at_us - time.offset_us, text),
                    (*time_us, sent),
                    "{name}: event {seq}"
                );
                "event stored"
            }
            (Content::Quarantined { code, bytes, .. }, _)
                if *code == Code::PayloadCrcTwice as u8 =>
            {
                assert!(self.was_corrupted, "{name}: {seq} was not damaged");
                assert_ne!(bytes, &made.frame, "{name}: {seq} was not damaged");
                "damaged stored"
            }
            (Content::Quarantined { bytes, .. }, MadeContent::Malformed) => {
                assert_eq!(bytes, &made.frame, "{name}: bytes of {seq}");
                "malformed stored"
            }
            (stored, made) => panic!("{name}: {seq} was {made:?}, but {stored:?} is stored"),
        }
    }
}
