//! SQL rows of entries, clocks and the audit trail.

use sqlx::{Connection, SqliteConnection};

use super::bulk::{Bulk, Params};
use crate::store::rows::{EventRow, Frame, LEFT_OPEN, Run, reading_span, resolved_time, sessions};
use crate::store::{Content, DeviceEvent, DeviceId, REFUSALS_MAX, Refusal};
use crate::time::{BootClock, ClockStep};

/// A row of `clocks`, with the values of [`bind_clock`].
pub(super) const CLOCKS: &str =
    "clocks(device_id, boot, offset_us, delay_us, measured_at, timeline,
    origin_us, valid_from_us)";
pub(super) const CLOCK_COLUMNS: usize = 8;
/// Replaces the stored clock of the same boot. A chosen clock replaces nothing.
pub(super) const CLOCK_REPLACES: &str =
    "ON CONFLICT (device_id, boot) DO UPDATE SET offset_us = excluded.offset_us,
    delay_us = excluded.delay_us, measured_at = excluded.measured_at,
    timeline = excluded.timeline, origin_us = excluded.origin_us,
    valid_from_us = excluded.valid_from_us
    WHERE excluded.delay_us < 9223372036854775807";

/// Prepared statements of the ledger, clocks and audit trail.
pub(super) struct Rows {
    frames: Bulk,
    gaps: Bulk,
    quarantine: Bulk,
    clocks: Bulk,
    steps: Bulk,
    events: Bulk,
    refusals: Bulk,
    begin_sessions: Bulk,
    end_sessions: Bulk,
}

impl Rows {
    pub(super) fn new() -> Self {
        let insert = |into: &str, columns: usize, tail: &str| {
            Bulk::new(&format!("INSERT OR FAIL INTO {into}"), columns, tail)
        };
        Self {
            frames: insert(
                "frames(id, stream_id, seq, type, received_at, readings, quality, clock_offset_us,
                    first_ts, last_ts, crc)",
                11,
                "",
            )
            .whole(),
            gaps: insert(
                "gaps(stream_id, from_seq, to_seq, reason, received_at)",
                5,
                "",
            )
            .whole(),
            quarantine: insert(
                "quarantine(device_id, stream_id, seq, received_at, peer, code, detail, bytes)",
                8,
                "",
            )
            .whole(),
            // The device of a clock or an event may have been removed since.
            clocks: Bulk::new(
                "WITH new(device_id, c2, c3, c4, c5, c6, c7, c8) AS (",
                CLOCK_COLUMNS,
                &format!(
                    ") INSERT OR FAIL INTO {CLOCKS}
                    SELECT * FROM new WHERE device_id IN (SELECT id FROM devices) {CLOCK_REPLACES}"
                ),
            ),
            steps: insert(
                "clock_steps(timeline, origin_us, since_at, before_at, after_at, step_us)",
                6,
                "ON CONFLICT (timeline, origin_us) DO NOTHING",
            ),
            events: Bulk::new(
                "WITH new(device_id, at, kind, level, code, detail, frame_id, session) AS (",
                8,
                ") INSERT OR FAIL INTO device_events(device_id, at, kind, level, code, detail, frame_id,
                    session)
                SELECT * FROM new WHERE device_id IN (SELECT id FROM devices)",
            ),
            refusals: insert(
                "refusals(peer, device, code, reason, count, first_at, last_at)",
                7,
                "ON CONFLICT (peer, device, code) DO UPDATE SET reason = excluded.reason,
                    count = count + excluded.count, last_at = excluded.last_at",
            ),
            begin_sessions: Bulk::new(
                "WITH new(id, device_id, gateway, peer, connected_at) AS (",
                5,
                ") INSERT INTO sessions(id, device_id, gateway, peer, connected_at)
                SELECT * FROM new WHERE device_id IN (SELECT id FROM devices)
                ON CONFLICT (id) DO NOTHING",
            ),
            end_sessions: Bulk::new("DELETE FROM sessions WHERE id IN (", 1, ")"),
        }
    }

    /// Writes the ledger and the content of the entries, except readings and events.
    pub(super) async fn store(
        &self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'_>],
    ) -> Result<(), sqlx::Error> {
        self.store_ledger(conn, frames).await?;
        self.store_gaps(conn, frames).await?;
        self.store_quarantine(conn, frames).await
    }

    async fn store_ledger(
        &self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'_>],
    ) -> Result<(), sqlx::Error> {
        self.frames
            .execute(conn, frames.iter(), |params, frame| {
                let entry = frame.item.entry;
                let time = resolved_time(entry);
                let span = reading_span(entry);
                params
                    .bind(frame.id)
                    .bind(entry.stream.0)
                    .bind(entry.seq.cast_signed())
                    .bind(i64::from(entry.frame_type))
                    .bind(entry.received_at_us)
                    .bind(frame.item.readings() as i64)
                    .bind(time.map(|time| time.quality as i64))
                    .bind(time.map(|time| time.offset_us))
                    .bind(span.and_then(|(first, last)| (first < last).then_some(first)))
                    .bind(span.map(|(_, last)| last))
                    .bind(entry.crc.map(i64::from));
            })
            .await
    }

    async fn store_gaps(
        &self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'_>],
    ) -> Result<(), sqlx::Error> {
        let gaps: Vec<_> = frames
            .iter()
            .filter_map(|frame| Some((frame.item, frame.item.gap_reason()?)))
            .collect();
        self.gaps
            .execute(conn, gaps.into_iter(), |params, (item, reason)| {
                params
                    .bind(item.entry.stream.0)
                    .bind(item.first_seq.cast_signed())
                    .bind(item.entry.seq.cast_signed())
                    .bind(i64::from(reason))
                    .bind(item.entry.received_at_us);
            })
            .await
    }

    async fn store_quarantine(
        &self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'_>],
    ) -> Result<(), sqlx::Error> {
        let quarantined: Vec<_> = frames
            .iter()
            .map(|frame| frame.item.entry)
            .filter(|entry| matches!(entry.content, Content::Quarantined { .. }))
            .collect();
        self.quarantine
            .execute(conn, quarantined.into_iter(), |params, entry| {
                let Content::Quarantined {
                    code,
                    detail,
                    bytes,
                    peer,
                } = &entry.content
                else {
                    return;
                };
                params
                    .bind(entry.device.0)
                    .bind(entry.stream.0)
                    .bind(entry.seq.cast_signed())
                    .bind(entry.received_at_us)
                    .bind(peer.as_str())
                    .bind(i64::from(*code))
                    .bind(detail.as_str())
                    .bind(bytes.as_slice());
            })
            .await
    }

    /// Stores clocks unchanged, replacing the stored clocks of the same boots.
    pub(super) async fn store_clocks(
        &self,
        conn: &mut SqliteConnection,
        clocks: &[(DeviceId, BootClock)],
    ) -> Result<(), sqlx::Error> {
        self.clocks
            .execute(conn, clocks.iter(), |params, (device, clock)| {
                bind_clock(params, *device, clock);
            })
            .await
    }

    pub(super) async fn store_steps(
        &self,
        conn: &mut SqliteConnection,
        steps: &[ClockStep],
    ) -> Result<(), sqlx::Error> {
        self.steps
            .execute(conn, steps.iter(), |params, step| {
                params
                    .bind(step.origin.timeline)
                    .bind(step.origin.at_us)
                    .bind(step.since_us)
                    .bind(step.before_us)
                    .bind(step.after_us)
                    .bind(step.size_us());
            })
            .await
    }

    /// Writes audit events: those that devices reported in entries, and those of their sessions.
    pub(super) async fn store_events(
        &self,
        conn: &mut SqliteConnection,
        frames: &[Frame<'_>],
        events: &[&DeviceEvent],
    ) -> Result<(), sqlx::Error> {
        let reported = frames.iter().filter_map(EventRow::reported);
        let rows: Vec<EventRow<'_>> = reported
            .chain(events.iter().copied().map(EventRow::of))
            .collect();
        self.events
            .execute(conn, rows.into_iter(), |params, row| {
                params
                    .bind(row.device.0)
                    .bind(row.at_us)
                    .bind(row.kind)
                    .bind(row.level.map(i64::from))
                    .bind(i64::from(row.code))
                    .bind(row.detail)
                    .bind(row.frame)
                    .bind(row.session);
            })
            .await?;
        self.store_sessions(conn, events).await
    }

    /// Opens and closes sessions. No session begins twice, so beginnings are written first.
    async fn store_sessions(
        &self,
        conn: &mut SqliteConnection,
        events: &[&DeviceEvent],
    ) -> Result<(), sqlx::Error> {
        let (begun, ended) = sessions(events);
        self.begin_sessions
            .execute(conn, begun.into_iter(), |params, (session, event)| {
                params
                    .bind(session.0)
                    .bind(event.device.0)
                    .bind("")
                    .bind(event.detail.as_str())
                    .bind(event.at_us);
            })
            .await?;
        self.end_sessions
            .execute(conn, ended.into_iter(), |params, session| {
                params.bind(session.0);
            })
            .await
    }
}

/// Closes the sessions that the last run left open; only one gateway writes to a file.
pub(super) async fn close_sessions(
    conn: &mut SqliteConnection,
    now_us: i64,
) -> Result<(), sqlx::Error> {
    let mut transaction = conn.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query(
        "INSERT INTO device_events (device_id, at, kind, code, detail, session)
         SELECT device_id, ?, 'disconnected', 0, ?, id FROM sessions ORDER BY connected_at, id",
    )
    .bind(now_us)
    .bind(LEFT_OPEN)
    .execute(&mut *transaction)
    .await?;
    sqlx::query("DELETE FROM sessions")
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await
}

pub(super) fn bind_clock(params: &mut Params, device: DeviceId, clock: &BootClock) {
    params
        .bind(device.0)
        .bind(i64::from(clock.boot))
        .bind(clock.offset_us)
        .bind(clock.delay_us.cast_signed())
        .bind(clock.measured_at_us)
        .bind(clock.origin.timeline)
        .bind(clock.origin.at_us)
        .bind(clock.valid_from_us);
}

impl Rows {
    /// Records refusals and deletes the oldest. Times later than the last refusal come from a clock that was
    /// ahead.
    pub(super) async fn store_refusals(
        &self,
        conn: &mut SqliteConnection,
        refusals: &[Refusal],
    ) -> Result<(), sqlx::Error> {
        let Some(last) = refusals.last() else {
            return Ok(());
        };
        self.refusals
            .execute(conn, refusals.iter(), |params, refusal| {
                params
                    .bind(refusal.peer.to_string())
                    .bind(refusal.device.as_str())
                    .bind(i64::from(refusal.code))
                    .bind(refusal.detail.as_str())
                    .bind(refusal.count.cast_signed())
                    .bind(refusal.first_at_us)
                    .bind(refusal.at_us);
            })
            .await?;
        let forget = sqlx::query(
            "DELETE FROM refusals WHERE id IN (
                SELECT id FROM refusals ORDER BY last_at > ?, last_at DESC LIMIT -1 OFFSET ?
            )",
        );
        let forget = forget.bind(last.at_us).bind(REFUSALS_MAX);
        forget.execute(conn).await.map(drop)
    }
}

/// Returns the statement that inserts readings into `table`, in any database of this program.
pub(super) fn readings_into(table: &str) -> Bulk {
    let head = format!("INSERT OR FAIL INTO {table}(series_id, ts, frame_id, value)");
    Bulk::new(&head, 4, "").whole()
}

/// Inserts the readings of all runs, in order.
pub(super) async fn insert_runs(
    into: &Bulk,
    conn: &mut SqliteConnection,
    runs: &[Run<'_>],
) -> Result<(), sqlx::Error> {
    let readings = Counted {
        left: runs.iter().map(|run| run.times_us.len()).sum(),
        items: runs.iter().flat_map(Run::readings),
    };
    into.execute(conn, readings, |params, (series, ts_us, frame, value)| {
        params.bind(series).bind(ts_us).bind(frame).bind(value);
    })
    .await
}

/// An iterator with a precomputed length.
struct Counted<I> {
    left: usize,
    items: I,
}

impl<I: Iterator> Iterator for Counted<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.left = self.left.saturating_sub(1);
        self.items.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<I: Iterator> ExactSizeIterator for Counted<I> {}
