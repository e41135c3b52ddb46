//! Whether the database is still the one whose ids a writer knows by heart.
//!
//! A database that is put back to an earlier state (a restored dump, a standby that lacks the latest
//! commits) gives ids out again, to other devices. So each writer has a row in `store_writers` that counts
//! its commits, and each transaction begins by moving that count from what the writer remembers: it finds
//! no such row in a database that lacks any commit of this writer. What a session knows of the store came
//! from commits of its writer, so nothing else has to be compared. For a spool, its row in `spool` counts.
//!
//! The owner of each stream and series of a batch is compared as well: that costs nothing where the rows
//! are read anyway, and finds what was put back in part.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::link::Link;
use super::timestamp::Timestamp;
use super::write::CommitError;
use super::{PostgresSettings, run_counted};
use crate::store::{
    Batch, Committed, Content, DeviceId, Entry, Login, LoginOutcome, Receipt, SeriesId, StreamId,
};
use fieldgate_protocol::frame::types;

/// Reason of a gap that no device reported: the store has lost what it had acknowledged.
pub(in crate::store) const REASON_LOST_BY_STORE: u8 = 254;
/// Streams that a writer remembers; beyond that it forgets those of former sessions.
const STREAMS_MAX: usize = 200_000;
/// Series whose owner a connection remembers; beyond that it looks again.
const SERIES_MAX: usize = 1_000_000;

/// A stream of which a writer has heard.
#[derive(Clone, Debug)]
struct KnownStream {
    device: DeviceId,
    name: String,
    number: u64,
    durable_seq: u64,
}

/// What a writer knows by heart, and how it finds out that it no longer holds.
#[derive(Debug)]
pub(super) struct Identity {
    count: Count,
    streams: HashMap<StreamId, KnownStream>,
    /// What the store had acknowledged before it was put back, by device and stream number.
    acknowledged: HashMap<(String, u64), u64>,
}

/// The row that counts this writer's commits.
#[derive(Debug)]
enum Count {
    /// In `store_writers`.
    Own {
        id: String,
        /// Count after the latest commit of which is known that it succeeded.
        known: u64,
        /// Count that a commit of which nothing is known may have left behind.
        possible: u64,
    },
    /// In `spool`: the spool keeps count with what it holds.
    Spool {
        id: String,
        instance: String,
        drained: i64,
        /// What the database may count at least.
        found: i64,
    },
}

impl Identity {
    pub(super) fn new(settings: &PostgresSettings) -> Self {
        let count = match &settings.spool {
            Some(spool) => Count::Spool {
                id: spool.id.clone(),
                instance: spool.instance.clone(),
                drained: spool.drained,
                found: spool.found_drained,
            },
            None => Count::Own {
                id: random_id(),
                known: 0,
                possible: 0,
            },
        };
        Self {
            count,
            streams: HashMap::new(),
            acknowledged: HashMap::new(),
        }
    }

    /// Begins a transaction, in one round trip with the check that the database has all former commits.
    pub(super) async fn begin(&mut self, conn: &mut Link) -> Result<(), CommitError> {
        // Each statement must see what another gateway has committed while this one waited for a lock.
        let mut sql = "BEGIN ISOLATION LEVEL READ COMMITTED;".to_owned();
        // Ids are random hexadecimal digits of this program's own.
        let _ = match &mut self.count {
            Count::Own {
                id,
                known: 0,
                possible,
            } => {
                *possible += 1;
                write!(
                    sql,
                    "INSERT INTO store_writers (id, commits, committed_at) VALUES ('{id}', {possible}, now())
                     ON CONFLICT (id) DO UPDATE SET commits = excluded.commits"
                )
            }
            Count::Own {
                id,
                known,
                possible,
            } => {
                let next = *possible + 1;
                let written = write!(
                    sql,
                    "UPDATE store_writers SET commits = {next}, committed_at = now()
                     WHERE id = '{id}' AND commits BETWEEN {known} AND {possible}"
                );
                *possible = next;
                written
            }
            Count::Spool {
                id,
                instance,
                drained,
                found,
            } => write!(
                sql,
                "UPDATE spool SET drained = {next}
                 WHERE id = '{id}' AND instance = '{instance}' AND drained BETWEEN {found} AND {next}",
                next = *drained + 1
            ),
        };
        match run_counted(conn, sql).await? {
            1 => Ok(()),
            _ => Err(self.replaced()),
        }
    }

    fn replaced(&self) -> CommitError {
        CommitError::Replaced(match &self.count {
            Count::Own { .. } => "the database lacks commits of this gateway".to_owned(),
            Count::Spool { .. } => {
                "the database does not stand where this spool left it".to_owned()
            }
        })
    }

    /// Compares a stream's row with what is known of it.
    pub(super) fn check_stream(
        &self,
        stream: StreamId,
        device: DeviceId,
        number: u64,
        durable_seq: u64,
    ) -> Result<(), CommitError> {
        let Some(known) = self.streams.get(&stream) else {
            return Ok(());
        };
        let is_same = (known.device, known.number) == (device, number);
        if is_same && known.durable_seq <= durable_seq {
            return Ok(());
        }
        Err(CommitError::Replaced(match is_same {
            true => "a stream lacks frames that were acknowledged".to_owned(),
            false => "a stream belongs to another device".to_owned(),
        }))
    }

    /// Remembers what a commit has shown.
    pub(super) fn remember(&mut self, batch: &Batch, committed: &Committed) {
        match &mut self.count {
            Count::Own {
                known, possible, ..
            } => *known = *possible,
            Count::Spool { drained, found, .. } => {
                *found = *drained;
                return;
            }
        }
        for receipt in &committed.receipts {
            if let Some(stream) = self.streams.get_mut(&receipt.stream()) {
                stream.durable_seq = receipt.durable_seq();
            }
        }
        if self.streams.len() >= STREAMS_MAX {
            self.streams.clear();
        }
        for (login, outcome) in batch.logins.iter().zip(&committed.logins) {
            let LoginOutcome::Admitted(admission) = outcome else {
                continue;
            };
            let known = KnownStream {
                device: admission.device,
                name: login.device.clone(),
                number: login.stream,
                durable_seq: admission.receipt.durable_seq(),
            };
            self.streams.insert(admission.receipt.stream(), known);
            if !self.acknowledged.is_empty() {
                self.acknowledged
                    .remove(&(login.device.clone(), login.stream));
            }
        }
    }

    /// Begins again with a store of which nothing is known.
    pub(super) fn forget(&mut self) {
        if let Count::Own {
            id,
            known,
            possible,
        } = &mut self.count
        {
            (*id, *known, *possible) = (random_id(), 0, 0);
        }
        if self.acknowledged.len() >= STREAMS_MAX {
            self.acknowledged.clear();
        }
        for (_, stream) in self.streams.drain() {
            let key = (stream.name, stream.number);
            let seq = self.acknowledged.entry(key).or_default();
            *seq = stream.durable_seq.max(*seq);
        }
    }

    /// Leaves nothing behind.
    pub(super) async fn leave(&self, conn: &mut Link) -> Result<(), sqlx::Error> {
        let Count::Own { id, .. } = &self.count else {
            return Ok(());
        };
        sqlx::query("DELETE FROM store_writers WHERE id = $1")
            .bind(id)
            .execute(conn)
            .await
            .map(drop)
    }

    /// The spool has forgotten what it drained by the latest commit.
    pub(super) fn advance_drained(&mut self) {
        if let Count::Spool { drained, .. } = &mut self.count {
            *drained += 1;
        }
    }

    /// Finds what was acknowledged to devices that log in, and neither they nor the store have any more.
    pub(super) fn lost(&self, logins: &[Login], outcomes: &[LoginOutcome]) -> Vec<LostFrames> {
        if self.acknowledged.is_empty() {
            return Vec::new();
        }
        let mut lost = BTreeMap::new();
        for (login, outcome) in logins.iter().zip(outcomes) {
            let LoginOutcome::Admitted(admission) = outcome else {
                continue;
            };
            let key = (login.device.clone(), login.stream);
            let acknowledged = self.acknowledged.get(&key).copied().unwrap_or(0);
            // What the device still holds, it sends again.
            let through_seq = acknowledged.min(login.oldest_seq.saturating_sub(1));
            let Receipt {
                stream,
                durable_seq,
            } = admission.receipt;
            if through_seq > durable_seq {
                let frames = LostFrames {
                    stream,
                    from_seq: durable_seq + 1,
                    through_seq,
                    at_us: login.at_us,
                };
                lost.insert(stream, frames);
            }
        }
        lost.into_values().collect()
    }
}

/// Frames of a stream that were acknowledged and that the store has lost.
#[derive(Clone, Copy, Debug)]
pub(super) struct LostFrames {
    stream: StreamId,
    from_seq: u64,
    through_seq: u64,
    at_us: i64,
}

/// Records a gap for each, under the ledger's `ids`, and moves the streams over them; the logins' receipts
/// follow.
pub(super) async fn store_lost(
    conn: &mut Link,
    ids: Vec<i64>,
    lost: &[LostFrames],
    outcomes: &mut [LoginOutcome],
) -> Result<(), sqlx::Error> {
    let seqs = |seq: fn(&LostFrames) -> u64| -> Vec<i64> {
        lost.iter().map(|lost| seq(lost).cast_signed()).collect()
    };
    let moved: Vec<i64> = sqlx::query_scalar(
        "WITH lost AS (
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[],
                 $5::timestamptz[]) AS lost (id, stream_id, from_seq, to_seq, at)
         ), moved AS (
             UPDATE streams SET durable_seq = lost.to_seq, frames = frames + 1
             FROM lost WHERE streams.id = lost.stream_id AND streams.durable_seq = lost.from_seq - 1
             RETURNING streams.id
         ), numbered AS (
             INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
             SELECT lost.id, stream_id, to_seq, $6, at, 0
             FROM lost JOIN moved ON moved.id = stream_id
         )
         INSERT INTO gaps (stream_id, from_seq, to_seq, reason, received_at)
         SELECT stream_id, from_seq, to_seq, $7, at FROM lost JOIN moved ON moved.id = stream_id
         RETURNING stream_id",
    )
    .bind(ids)
    .bind(lost.iter().map(|lost| lost.stream.0).collect::<Vec<_>>())
    .bind(seqs(|lost| lost.from_seq))
    .bind(seqs(|lost| lost.through_seq))
    .bind(
        lost.iter()
            .map(|lost| Timestamp(lost.at_us))
            .collect::<Vec<_>>(),
    )
    .bind(i16::from(types::GAP))
    .bind(i16::from(REASON_LOST_BY_STORE))
    .fetch_all(conn)
    .await?;
    for outcome in outcomes {
        let LoginOutcome::Admitted(admission) = outcome else {
            continue;
        };
        let stream = admission.receipt.stream;
        let recorded = lost.iter().find(|lost| lost.stream == stream);
        if let Some(lost) = recorded.filter(|_| moved.contains(&stream.0)) {
            admission.receipt.durable_seq = lost.through_seq;
            tracing::warn!(
                stream = stream.0,
                from_seq = lost.from_seq,
                to_seq = lost.through_seq,
                "Postgres lacks frames that it had; recorded as a gap"
            );
        }
    }
    Ok(())
}

/// Deletes the rows of writers that ended without doing so themselves.
pub(super) async fn prune(conn: &mut Link) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM store_writers WHERE committed_at < now() - interval '90 days'")
        .execute(conn)
        .await
        .map(drop)
}

/// Draws a new mark for the store, by which readers see that what they know of it may not hold.
pub(super) async fn mark_replaced(conn: &mut Link) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE store_identity SET mark = gen_random_uuid()::text")
        .execute(conn)
        .await
        .map(drop)
}

/// The series that a connection has found to belong to the devices that use them.
#[derive(Debug, Default)]
pub(super) struct OwnedSeries(HashMap<SeriesId, DeviceId>);

impl OwnedSeries {
    /// Makes sure that each series in `entries` belongs to the entry's device.
    pub(super) async fn check(
        &mut self,
        conn: &mut Link,
        entries: &[Entry],
    ) -> Result<(), CommitError> {
        let mut unknown = BTreeMap::new();
        for entry in entries {
            let Content::Readings(readings) = &entry.content else {
                continue;
            };
            for series in &readings.series {
                match self.0.get(series) {
                    Some(owner) if *owner == entry.device => {}
                    _ if unknown
                        .insert(*series, entry.device)
                        .is_none_or(|of| of == entry.device) => {}
                    _ => return Err(foreign_series()),
                }
            }
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let ids: Vec<i64> = unknown.keys().map(|series| series.0).collect();
        let found: Vec<(i64, i64)> =
            sqlx::query_as("SELECT id, device_id FROM series WHERE id = ANY($1)")
                .bind(ids)
                .fetch_all(conn)
                .await?;
        let is_owned =
            |(id, device): &(i64, i64)| unknown.get(&SeriesId(*id)) == Some(&DeviceId(*device));
        if found.len() < unknown.len() || !found.iter().all(is_owned) {
            return Err(foreign_series());
        }
        if self.0.len() >= SERIES_MAX {
            self.0.clear();
        }
        self.0.extend(unknown);
        Ok(())
    }
}

fn foreign_series() -> CommitError {
    CommitError::Replaced("a series belongs to another device".to_owned())
}

fn random_id() -> String {
    let mut bytes = [0; 16];
    // Without random numbers no session begins either.
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
