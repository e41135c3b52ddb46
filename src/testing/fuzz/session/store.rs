//! What stands behind the sessions, and the expected content of the store, with which the real content is compared.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::accepted::Accepted;
use crate::ingest::batcher::BatchLimits;
use crate::quota::quarantine::{DEVICE_SHARE, Gauge};
use crate::store::admin::quarantine_usage::QuarantineUsage;
use crate::store::memory::{MemoryStore, SeriesKey};
use crate::store::{
    Batch, Committed, Declare, DeclareOutcome, DeviceEventKind, DeviceId, Login, LoginOutcome,
    SchemaHash, StreamId,
};
use crate::testing::backend::Backend;
use crate::time::Now;

const LIMITS: BatchLimits = BatchLimits {
    readings_max: 40,
    bytes_max: 1 << 20,
    interval_min_us: 0,
    interval_quiet_us: 0,
};

/// Verified part of a stream.
#[derive(Default)]
struct Found {
    rows: usize,
    durable_seq: u64,
    refusals: HashMap<u64, u8>,
}

pub(super) struct StoreSide {
    pub backend: Backend,
    pub expected: Expected,
    gauge: Arc<Gauge>,
}

pub(super) struct Expected {
    quarantine_bytes_max: u64,
    /// All frames accepted under a number, by any session.
    accepted: HashMap<(StreamId, u64), Vec<Accepted>>,
    found: HashMap<StreamId, Found>,
    streams: HashMap<(String, u64), (DeviceId, StreamId)>,
    declared: HashMap<(DeviceId, u16), SchemaHash>,
    barred: HashSet<String>,
    /// Quarantined frames that were not purged.
    kept: QuarantineUsage,
}

impl StoreSide {
    pub(super) fn new(gauge: Arc<Gauge>, quarantine_bytes_max: u64) -> StoreSide {
        StoreSide {
            backend: Backend::new(MemoryStore::new(), LIMITS),
            expected: Expected {
                quarantine_bytes_max,
                accepted: HashMap::new(),
                found: HashMap::new(),
                streams: HashMap::new(),
                declared: HashMap::new(),
                barred: HashSet::new(),
                kept: QuarantineUsage::new(),
            },
            gauge,
        }
    }

    /// Runs one step of the backend and checks what it commits; returns whether there was one.
    pub(super) fn work(&mut self, now: Now) -> bool {
        let expected = &mut self.expected;
        let check = |store: &_, batch: &_, committed: &_| {
            expected.check_commit(store, batch, committed);
        };
        self.backend.work(now, check)
    }

    /// Makes the next commits fail, or the current one time out.
    pub(super) fn fail(&mut self, pick: u8) {
        match pick % 4 {
            0 => self.backend.stall(),
            commits => self.backend.store.fail_next_commits(u32::from(commits)),
        }
    }

    pub(super) fn recover(&mut self) {
        self.backend.store.fail_next_commits(0);
    }

    pub(super) fn read_quarantine(&mut self) {
        self.gauge
            .update(&self.expected.kept, &self.gauge.committed());
    }

    pub(super) fn purge_quarantine(&mut self) {
        self.expected.kept.clear();
        self.read_quarantine();
    }

    pub(super) fn bar_or_let_in(&mut self, name: &str) {
        let barred = &mut self.expected.barred;
        let is_barred = !barred.remove(name);
        let changed = self.backend.store.change(name, !is_barred, false);
        if changed.is_some() && is_barred {
            barred.insert(name.to_owned());
        }
    }

    /// Verifies that every session that began has ended.
    pub(super) fn check_audit_trail(&self) {
        let events = self.backend.store.events();
        let count = |kind| events.iter().filter(|event| event.kind == kind).count();
        let ended = count(DeviceEventKind::Disconnected);
        assert_eq!(count(DeviceEventKind::Connected), ended);
    }
}

impl Expected {
    /// Returns whether quarantine is unlimited.
    pub(super) fn is_roomy(&self) -> bool {
        self.quarantine_bytes_max > u64::from(u32::MAX)
    }

    pub(super) fn durable_seq(&self, stream: StreamId) -> u64 {
        self.found.get(&stream).map_or(0, |found| found.durable_seq)
    }

    /// Returns the code with which a number is quarantined.
    pub(super) fn refusal(&self, stream: StreamId, seq: u64) -> Option<u8> {
        self.found.get(&stream)?.refusals.get(&seq).copied()
    }

    /// Returns whether two sessions accepted a number before it was durable. Neither then knows whose frame was stored.
    pub(super) fn is_taken_twice(&self, stream: StreamId, seq: u64) -> bool {
        let of_stream = self.accepted.iter().filter(|((of, _), _)| *of == stream);
        let taken = of_stream.flat_map(|(_, taken)| taken);
        taken.filter(|taken| taken.covers(seq)).count() > 1
    }

    pub(super) fn accept(&mut self, stream: StreamId, taken: Accepted) {
        let of_number = self.accepted.entry((stream, taken.seq)).or_default();
        of_number.push(taken);
    }

    fn check_commit(&mut self, store: &MemoryStore, batch: &Batch, committed: &Committed) {
        for (declare, outcome) in batch.declares.iter().zip(&committed.declares) {
            self.check_declare(store, declare, outcome);
        }
        for receipt in &committed.receipts {
            self.check_rows(store, receipt.stream());
            let durable_seq = self.durable_seq(receipt.stream());
            assert_eq!(receipt.durable_seq(), durable_seq);
            assert_eq!(store.durable_seq(receipt.stream()), durable_seq);
        }
        for (login, outcome) in batch.logins.iter().zip(&committed.logins) {
            self.check_login(login, outcome);
        }
        assert_eq!(batch.logins.len(), committed.logins.len());
        assert_eq!(batch.declares.len(), committed.declares.len());
        let device_bytes_max = self.quarantine_bytes_max / DEVICE_SHARE;
        assert!(self.kept.values().all(|bytes| *bytes <= device_bytes_max));
    }

    /// Verifies that each number is stored once, in order, without holes, and equal to an accepted frame.
    fn check_rows(&mut self, store: &MemoryStore, stream: StreamId) {
        let found = self.found.entry(stream).or_default();
        let entries = store.entries(stream);
        for (seq, stored) in entries.iter().skip(found.rows) {
            assert_eq!(stored.first_seq, found.durable_seq + 1);
            assert!(stored.first_seq <= *seq && *seq == stored.entry.seq);
            let expected = { self.accepted.get(&(stream, *seq)) }
                .and_then(|taken| taken.iter().find(|taken| taken.is(&stored.entry)))
                .expect("an accepted frame");
            if let Some((code, bytes)) = expected.refusal() {
                found.refusals.insert(*seq, code);
                *self.kept.entry(stored.entry.device).or_default() += bytes as u64;
            }
            found.durable_seq = *seq;
        }
        found.rows = entries.len();
    }

    /// Verifies that the first DECLARE of a number is the one stored.
    fn check_declare(&mut self, store: &MemoryStore, declare: &Declare, outcome: &DeclareOutcome) {
        let key = (declare.device, declare.schema);
        let hash = *self.declared.entry(key).or_insert(declare.hash);
        match outcome {
            DeclareOutcome::Accepted(schema) => {
                assert_eq!((schema.schema, declare.hash), (declare.schema, hash));
                assert_eq!(schema.channels.len(), declare.channels.len());
                for (kept, declared) in schema.channels.iter().zip(&declare.channels) {
                    assert_eq!((kept.id, kept.exp10), (declared.id, declared.exp10));
                    let series = SeriesKey {
                        device: declare.device,
                        channel: declared.name.clone(),
                        unit: declared.unit.clone(),
                        kind: kept.kind,
                    };
                    assert_eq!(kept.kind, declared.kind);
                    assert_eq!(store.series(kept.series), Some(series));
                }
            }
            DeclareOutcome::Conflict => assert_ne!(declare.hash, hash),
            DeclareOutcome::OverBound(_) => panic!("the number of schemas stays below the limit"),
        }
    }

    fn check_login(&mut self, login: &Login, outcome: &LoginOutcome) {
        let key = (login.device.clone(), login.stream);
        let known = self.streams.get(&key).copied();
        let durable_seq = known.map_or(0, |(_, stream)| self.durable_seq(stream));
        match outcome {
            LoginOutcome::Admitted(admission) => {
                let ids = (admission.device, admission.receipt.stream());
                assert_eq!(ids, known.unwrap_or(ids));
                assert_eq!(admission.receipt.durable_seq(), durable_seq);
                assert!(login.next_seq > durable_seq && !self.barred.contains(&login.device));
                let hash = |number| self.declared.get(&(admission.device, number)).copied();
                let is_known = { login.schema }
                    .is_some_and(|(number, declared)| hash(number) == Some(declared));
                assert_eq!(admission.schema.is_some(), is_known);
                self.streams.insert(key, ids);
            }
            LoginOutcome::Disabled => assert!(self.barred.contains(&login.device)),
            LoginOutcome::StreamConflict => assert!(login.next_seq <= durable_seq),
            LoginOutcome::Unregistered | LoginOutcome::KeyReplaced | LoginOutcome::OverBound(_) => {
                panic!("no other outcome is possible here")
            }
        }
    }
}
