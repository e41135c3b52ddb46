//! Verification of one device of the store: its row, streams, schemas, clocks, events and series.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use super::ledger::{Frame, StreamProof, StreamRow};
use super::readings::{SeriesProof, SeriesRow};
use super::store::{ReadError, Row, Store};
use super::{Others, Own, Verdict};
use crate::readings::Channel;

/// Selects all devices of the store.
pub(super) const DEVICES: &str = "SELECT id, name, firmware, first_seen_at, revision, enabled, key_version, \
     CASE WHEN sealed_key IS NULL THEN 0 ELSE 1 END FROM devices ORDER BY id";

pub(super) struct DeviceRow {
    pub(super) id: i64,
    pub(super) name: String,
    firmware: Option<String>,
    first_seen_at_us: Option<i64>,
    /// Above 0 if an operator has changed the device.
    pub(super) revision: i64,
    /// Whether the device is enabled and has the key derived from its name.
    is_as_made: bool,
}

impl DeviceRow {
    pub(super) fn read(row: &Row) -> Result<DeviceRow, ReadError> {
        Ok(DeviceRow {
            id: row.integer(0)?,
            name: row.text_or_null(1)?.unwrap_or_default().to_owned(),
            firmware: row.text_or_null(2)?.map(str::to_owned),
            first_seen_at_us: row.integer_or_null(3)?,
            revision: row.integer(4)?,
            is_as_made: row.integer(5)? == 1 && row.integer(6)? == 0 && row.integer(7)? == 0,
        })
    }
}

/// A device of the store, with the data that the runs have about it.
pub(super) struct StoredDevice<'a> {
    pub(super) row: DeviceRow,
    pub(super) owns: Vec<Own<'a>>,
    pub(super) others: Others,
    /// Latest possible start of the first run, on the gateway's clock.
    pub(super) began_us: i64,
}

impl StoredDevice<'_> {
    pub(super) async fn prove(
        &self,
        store: &mut Store,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        if self.owns.is_empty() {
            return self.prove_stranger(store, verdict).await;
        }
        verdict.devices += 1;
        for own in &self.owns {
            verdict.frames_acked += own.journaled.acked;
        }
        let mut streams = Vec::new();
        for row in store.rows(StreamRow::SQL, &[self.row.id]).await? {
            streams.push(StreamRow::read(&row)?);
        }
        let (own, strange): (Vec<_>, Vec<_>) = streams
            .into_iter()
            .partition(|row| self.own_of(row).is_some());
        let is_mixed = self.prove_strange_streams(store, &strange, verdict).await?;
        self.prove_row(is_mixed, verdict);
        let addresses = self.prove_events(store, is_mixed, verdict).await?;
        self.prove_schemas(store, is_mixed, verdict).await?;
        let mut frames = Vec::new();
        for row in own {
            let own_index = self.own_of(&row).expect("it is one of them");
            let proof = StreamProof {
                own: &self.owns[own_index],
                own_index: own_index as u16,
                row,
                addresses: addresses.as_ref(),
            };
            self.prove_created(&proof, verdict);
            proof.prove(store, &mut frames, verdict).await?;
        }
        for own in &self.owns {
            self.miss_stream(own, &frames, verdict);
        }
        self.prove_clocks(store, is_mixed, verdict).await?;
        frames.sort_unstable_by_key(|frame| frame.id);
        self.prove_series(store, &frames, is_mixed, verdict).await
    }

    pub(super) fn say(&self, what: &str) -> String {
        format!("{}: {what}", self.row.name)
    }

    fn own_of(&self, row: &StreamRow) -> Option<usize> {
        let is_own = |own: &Own<'_>| own.device.stream() == row.stream;
        self.owns.iter().position(is_own)
    }

    fn prove_row(&self, is_mixed: bool, verdict: &mut Verdict) {
        let mut programs = self.owns.iter().map(|own| &own.run.ledger.program);
        let firmware = self.row.firmware.as_ref();
        if let Some(firmware) = firmware.filter(|firmware| programs.all(|of| of != *firmware)) {
            verdict.foreign(is_mixed && self.others == Others::Any, || {
                self.say(&format!("firmware {firmware:?}: stored but not sent"))
            });
        }
        if self.row.revision == 0 && !self.row.is_as_made {
            verdict.differ(|| self.say("disabled or re-keyed without an operator's change"));
        }
        let at_us = self.row.first_seen_at_us;
        let is_true = |at_us| self.is_within(at_us, true) || is_mixed;
        if at_us.is_some_and(|at_us| !is_true(at_us)) {
            verdict.differ(|| self.say(&format!("first seen at {at_us:?} us, outside all runs")));
        }
    }

    /// Returns whether a time lies within one of the runs; without `has_end`, it may also lie after a run's end.
    fn is_within(&self, at_us: i64, has_end: bool) -> bool {
        let mut spans = self.owns.iter().map(|own| own.run.span_us());
        spans.any(|span| match span {
            None => true,
            Some((began_us, ended_us)) => began_us <= at_us && (at_us <= ended_us || !has_end),
        })
    }

    fn prove_created(&self, proof: &StreamProof<'_>, verdict: &mut Verdict) {
        let at_us = proof.row.created_at_us;
        let has_end = proof.own.journaled.acked > 0;
        let span = proof.own.run.span_us();
        let is_within = span.is_none_or(|(began_us, ended_us)| {
            began_us <= at_us && (at_us <= ended_us || !has_end)
        });
        if !is_within {
            let stream = proof.row.stream;
            verdict.differ(|| {
                self.say(&format!(
                    "stream {stream} created at {at_us} us, outside its run"
                ))
            });
        }
    }

    fn miss_stream(&self, own: &Own<'_>, frames: &[Frame], verdict: &mut Verdict) {
        let index = self.owns.iter().position(|other| std::ptr::eq(other, own));
        let is_there = frames
            .iter()
            .any(|frame| Some(usize::from(frame.own)) == index);
        let acked = own.journaled.acked;
        if !is_there && acked > 0 {
            let stream = own.device.stream();
            verdict.differ(|| {
                self.say(&format!(
                    "stream {stream} is not stored, but {acked} of its frames were acknowledged"
                ))
            });
        }
    }

    /// Verifies that every schema was declared, channel by channel.
    async fn prove_schemas(
        &self,
        store: &mut Store,
        is_mixed: bool,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let sql = "SELECT schema, hash, declaration FROM schemas WHERE device_id = $1";
        for row in store.rows(sql, &[self.row.id]).await? {
            let schema = row.integer(0)?;
            let mut owns = self.owns.iter();
            let own = owns.find(|own| i64::from(own.run.schema) == schema);
            let is_equal = match own {
                None => false,
                Some(own) => {
                    let declaration = row.text_or_null(2)?.unwrap_or_default();
                    row.bytes(1)? == own.run.declare_hash
                        && is_declaration(declaration, own.run.script.channels())
                }
            };
            if !is_equal {
                verdict.foreign(is_mixed && own.is_none(), || {
                    self.say(&format!("schema {schema}: stored but not declared"))
                });
            }
        }
        Ok(())
    }

    /// Verifies that every clock belongs to a boot of the device and is within the possible error.
    async fn prove_clocks(
        &self,
        store: &mut Store,
        is_mixed: bool,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let sql = "SELECT boot, offset_us, measured_at FROM clocks WHERE device_id = $1";
        for row in store.rows(sql, &[self.row.id]).await? {
            let (boot, offset_us) = (row.integer(0)?, row.integer(1)?);
            let at_us = row.integer(2)?;
            let mut owns = self.owns.iter();
            let own = owns.find(|own| i64::from(own.device.boot()) == boot);
            let is_true =
                own.is_some_and(|own| own.is_offset(offset_us)) && self.is_within(at_us, false);
            let may_be_others =
                is_mixed && own.is_none() && self.others.allow(at_us < self.began_us);
            if !is_true && !may_be_others {
                verdict.differ(|| {
                    self.say(&format!(
                        "clock of boot {boot}, measured at {at_us} us, is {offset_us} us off: the device had no \
                        such clock"
                    ))
                });
            }
        }
        Ok(())
    }

    /// Verifies that the device made every stored login. Returns the device's addresses, if all are known.
    async fn prove_events(
        &self,
        store: &mut Store,
        is_mixed: bool,
        verdict: &mut Verdict,
    ) -> Result<Option<HashSet<SocketAddr>>, ReadError> {
        let is_torn = self.owns.iter().any(|own| !own.run.ledger.complete);
        if is_torn || is_mixed && self.others == Others::Any {
            return Ok(None);
        }
        let mut unused: HashMap<SocketAddr, usize> = HashMap::new();
        let logins = self.owns.iter().flat_map(|own| &own.journaled.logins);
        logins.for_each(|login| *unused.entry(login.from).or_default() += 1);
        let known: HashSet<SocketAddr> = unused.keys().copied().collect();
        let mut counts: HashMap<String, u64> = HashMap::new();
        let sql = "SELECT kind, at, level, code, detail, frame_id FROM device_events \
                   WHERE device_id = $1 ORDER BY id";
        let on_row = |row: Row| {
            if is_mixed && row.integer(1)? < self.began_us {
                return Ok(());
            }
            let kind = row.text_or_null(0)?.unwrap_or_default().to_owned();
            let detail = row.text_or_null(4)?.unwrap_or_default().to_owned();
            *counts.entry(kind.clone()).or_default() += 1;
            if !self.is_event(&kind, &row, verdict)? {
                let at_us = row.integer(1)?;
                verdict.differ(|| {
                    self.say(&format!(
                        "event {kind} {detail:?} at {at_us} us: stored but not sent"
                    ))
                });
            } else if kind == "connected" {
                let left = detail.parse().ok().and_then(|from| unused.get_mut(&from));
                let left = left.filter(|left| **left > 0);
                let is_device = left.is_some();
                if let Some(left) = left {
                    *left -= 1;
                }
                verdict.came_from(is_device, || {
                    self.say(&format!(
                        "event connected from {detail:?}, an address the device never used"
                    ))
                });
            }
            Ok(())
        };
        store.each(sql, &[self.row.id], on_row).await?;
        if is_mixed {
            // A session of an older run may have ended late.
            counts.remove("disconnected");
        }
        self.count_events(&counts, verdict);
        Ok(Some(known))
    }

    /// Returns whether an event is plausible: simulated devices report none, and only devices that an operator
    /// changed have operator events.
    fn is_event(&self, kind: &str, row: &Row, verdict: &mut Verdict) -> Result<bool, ReadError> {
        let at_us = row.integer(1)?;
        let is_plain = row.integer_or_null(2)?.is_none() && row.integer_or_null(5)?.is_none();
        let code = row.integer(3)?;
        Ok(match kind {
            "connected" => is_plain && code == 0 && self.is_within(at_us, true),
            "disconnected" => is_plain && self.is_within(at_us, false),
            "refused" => is_plain && self.is_within(at_us, true),
            "event" => false,
            // By the gateway, from what it stored, and by operators without a change of the device itself.
            "presence" | "twin" | "interval_set" => is_plain && code == 0,
            // Operator events.
            _ => {
                verdict.operator_events += u64::from(self.row.revision > 0);
                is_plain && self.row.revision > 0
            }
        })
    }

    /// Verifies that there are not more events of a kind than the device can have caused. Old events may have been
    /// pruned.
    fn count_events(&self, counts: &HashMap<String, u64>, verdict: &mut Verdict) {
        let logins = self.owns.iter().flat_map(|own| &own.journaled.logins);
        let (tried, unanswered) = logins.fold((0, 0), |(tried, unanswered), login| {
            (tried + 1, unanswered + u64::from(!login.welcomed))
        });
        for (kind, most) in [
            ("connected", tried),
            ("disconnected", tried),
            ("refused", unanswered),
        ] {
            let found = counts.get(kind).copied().unwrap_or(0);
            if found > most {
                verdict.differ(|| {
                    self.say(&format!(
                        "{found} events {kind}, but the device caused at most {most}"
                    ))
                });
            }
        }
    }

    async fn prove_series(
        &self,
        store: &mut Store,
        frames: &[Frame],
        is_mixed: bool,
        verdict: &mut Verdict,
    ) -> Result<(), ReadError> {
        let sql = "SELECT id, channel, unit, kind FROM series WHERE device_id = $1 ORDER BY id";
        let mut found = HashSet::new();
        for row in store.rows(sql, &[self.row.id]).await? {
            let series = SeriesRow::read(&row)?;
            let columns: Vec<Option<usize>> =
                self.owns.iter().map(|own| series.column(own)).collect();
            let is_own = columns.iter().any(Option::is_some);
            if !is_own {
                let readings = series.count(store).await?;
                verdict.foreign(is_mixed, || {
                    let series = series.describe();
                    self.say(&format!(
                        "series {series} with {readings} readings: stored but not sent"
                    ))
                });
                continue;
            }
            for (own, column) in columns.iter().enumerate() {
                found.extend(column.map(|column| (own, column)));
            }
            let proof = SeriesProof {
                owns: &self.owns,
                columns,
                frames,
                series,
                device: self.row.id,
                is_mixed,
            };
            proof.prove(store, verdict).await?;
        }
        for (own_index, own) in self.owns.iter().enumerate() {
            let of_own = |frame: &&Frame| usize::from(frame.own) == own_index && frame.rows > 0;
            let Some(first) = frames.iter().find(of_own) else {
                continue;
            };
            for (column, channel) in own.run.script.channels().iter().enumerate() {
                if !found.contains(&(own_index, column)) {
                    let (name, seq) = (&channel.name, first.seq);
                    verdict.differ(|| {
                        self.say(&format!(
                            "{name}: the series for that channel, unit and kind is missing; readings from \
                            frame {seq} on were sent but not stored"
                        ))
                    });
                }
            }
        }
        Ok(())
    }
}

/// Returns whether the text of `schemas.declaration` declares these channels.
fn is_declaration(text: &str, channels: &[Channel]) -> bool {
    let expected: Vec<serde_json::Value> = (1..)
        .zip(channels)
        .map(|(id, channel)| {
            serde_json::json!({
                "id": id,
                "name": channel.name,
                "unit": channel.unit,
                "kind": channel.kind.name(),
                "exp10": channel.exp10,
            })
        })
        .collect();
    serde_json::from_str::<Vec<serde_json::Value>>(text).is_ok_and(|found| found == expected)
}
