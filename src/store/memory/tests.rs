//! The conformance suite over the in-memory store.

use super::*;
use crate::store::conformance::{Dump, Harness, conformance};
use crate::store::{Content, DeviceEventKind, Readings};
use crate::time::ResolvedTime;

conformance!(MemoryStore);

impl State {
    /// Closes open sessions, like the next run of a gateway.
    fn close_sessions(&mut self) {
        for (session, begun) in std::mem::take(&mut self.sessions) {
            self.events.push(DeviceEvent {
                session: Some(session),
                kind: DeviceEventKind::Disconnected,
                detail: crate::store::rows::LEFT_OPEN.to_owned(),
                ..begun
            });
        }
    }
}

impl Harness for MemoryStore {
    type Store = Self;

    async fn create() -> Self {
        Self::new()
    }

    fn store(&mut self) -> &mut Self {
        self
    }

    async fn reopen(self) -> Self {
        self.state().close_sessions();
        self
    }

    async fn change(&mut self, device: &str, is_enabled: bool, replaces_key: bool) -> i64 {
        let changed = MemoryStore::change(self, device, is_enabled, replaces_key);
        changed.unwrap()
    }

    async fn fill_disk(&mut self) {
        self.fail_next_commits(1);
    }

    async fn free_disk(&mut self) {}

    async fn dump(&mut self) -> Dump {
        let mut dump = Dump::default();
        for (stream, device) in self.streams() {
            for (seq, stored) in self.entries(stream) {
                dump_entry(self, &mut dump, &device, stream, seq, &stored);
            }
        }
        let names: Vec<String> = self
            .state()
            .devices
            .iter()
            .map(|device| device.name.clone())
            .collect();
        for (id, name) in (1..).zip(&names) {
            let clock = |c: BootClock| (name.clone(), c.boot, c.offset_us, c.delay_us);
            dump.clocks
                .extend(self.clocks(DeviceId(id)).into_iter().map(clock));
        }
        let open = self.state().sessions.clone();
        dump.open_sessions
            .extend(open.into_values().map(|event| event.detail));
        dump.events.extend(self.events().into_iter().map(|event| {
            let kind = event.kind.name();
            let name = names[row(event.device.0)].clone();
            (
                name,
                event.at_us,
                kind.to_owned(),
                event.code.into(),
                event.detail,
            )
        }));
        let state = self.state();
        dump.refusals.extend(state.refusals.values().map(|refusal| {
            (
                refusal.peer.to_string(),
                refusal.device.clone(),
                refusal.code,
                refusal.count,
                refusal.first_at_us,
                refusal.at_us,
            )
        }));
        drop(state);
        dump.readings.sort();
        dump.events.sort();
        dump
    }
}

fn dump_entry(
    store: &MemoryStore,
    dump: &mut Dump,
    device: &str,
    stream: StreamId,
    seq: u64,
    stored: &StoredEntry,
) {
    let mut time: Option<ResolvedTime> = None;
    match stored.entry.content.clone() {
        Content::Readings(readings) => {
            time = Some(readings.time);
            dump_readings(store, dump, device, seq, &readings);
        }
        Content::Gap { .. } => {}
        Content::Event {
            time: at,
            at_us,
            code,
            text,
            ..
        } => {
            time = Some(at);
            dump.events
                .push((device.to_owned(), at_us, "event".to_owned(), code, text));
        }
        Content::Quarantined {
            code,
            detail,
            bytes,
            ..
        } => {
            let usage = dump.quarantine_usage.entry(device.to_owned());
            *usage.or_default() += bytes.len() as u64;
            dump.quarantine.push((stream.0, seq, code, detail, bytes));
        }
    }
    let item = crate::store::ledger::Appended {
        entry: &stored.entry,
        first_seq: stored.first_seq,
    };
    let gap = { item.gap_reason() }.map(|reason| (stream.0, item.first_seq, seq, reason));
    dump.gaps.extend(gap);
    let (quality, offset_us) = time.map(|t| (t.quality as u8, t.offset_us)).unzip();
    let frame_type = stored.entry.frame_type;
    dump.frames.push((
        device.to_owned(),
        stream.0,
        seq,
        frame_type,
        quality,
        offset_us,
    ));
}

fn dump_readings(
    store: &MemoryStore,
    dump: &mut Dump,
    device: &str,
    seq: u64,
    readings: &Readings,
) {
    for (column, series) in readings.series.iter().enumerate() {
        let key = store.series(*series).unwrap();
        for (r, ts_us) in readings.times_us.iter().enumerate() {
            let value = readings.values[column * readings.times_us.len() + r];
            let bits = (!value.is_nan()).then_some(value.to_bits());
            let (channel, unit) = (key.channel.clone(), key.unit.clone());
            dump.readings
                .push((device.to_owned(), channel, unit, *ts_us, seq, bits));
        }
    }
}
