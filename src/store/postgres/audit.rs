//! Statements of a batch for the audit trail: events, sessions and refusals.

use std::collections::{BTreeMap, HashMap};

use super::link::Link;
use super::timestamp::Timestamp;
use super::write::{Writer, is_whole};
use crate::store::rows::{EventRow, Frame, LEFT_OPEN, sessions};
use crate::store::{DeviceEvent, DeviceId, REFUSALS_MAX, Refusal};

impl Writer {
    /// Returns audit events for refusals of existing devices. Call it after the logins, which may create
    /// devices.
    pub(super) async fn refusals(
        &mut self,
        refusals: &[Refusal],
    ) -> Result<Vec<DeviceEvent>, sqlx::Error> {
        if refusals.is_empty() {
            return Ok(Vec::new());
        }
        let refusals = refusals.iter().filter(|refusal| refusal.is_audited);
        let names = refusals.clone().map(|refusal| refusal.device.as_str());
        let devices: Vec<(String, i64)> =
            sqlx::query_as("SELECT name, id FROM devices WHERE name = ANY($1)")
                .bind(names.collect::<Vec<_>>())
                .fetch_all(&mut self.conn)
                .await?;
        let devices: HashMap<String, i64> = devices.into_iter().collect();
        let event = |refusal: &Refusal| Some(refusal.of(DeviceId(*devices.get(&refusal.device)?)));
        Ok(refusals.filter_map(event).collect())
    }

    /// Records refusals and deletes the oldest. Times later than the last refusal come from a clock that was
    /// ahead.
    pub(super) async fn store_refusals(&mut self, refusals: &[Refusal]) -> Result<(), sqlx::Error> {
        let Some(last) = refusals.last() else {
            return Ok(());
        };
        // In key order, like the locks of other gateways; a statement changes a row only once.
        let mut by_key: BTreeMap<(String, &str, u8), Refusal> = BTreeMap::new();
        for refusal in refusals {
            let key = (refusal.peer.to_string(), &*refusal.device, refusal.code);
            let noted = by_key.entry(key).or_insert_with(|| Refusal {
                count: 0,
                ..refusal.clone()
            });
            noted.count += refusal.count;
            noted.at_us = refusal.at_us;
        }
        let rows = || by_key.values();
        sqlx::query(
            "INSERT INTO refusals (peer, device, code, reason, count, first_at, last_at)
             SELECT * FROM unnest($1::text[], $2::text[], $3::smallint[], $4::text[], $5::bigint[],
                 $6::timestamptz[], $7::timestamptz[])
             ON CONFLICT (peer, device, code) DO UPDATE SET reason = excluded.reason,
                 count = refusals.count + excluded.count, last_at = excluded.last_at",
        )
        .bind(by_key.keys().map(|key| key.0.as_str()).collect::<Vec<_>>())
        .bind(rows().map(|row| row.device.as_str()).collect::<Vec<_>>())
        .bind(rows().map(|row| row.code.into()).collect::<Vec<i16>>())
        .bind(rows().map(|row| row.detail.as_str()).collect::<Vec<_>>())
        .bind(
            rows()
                .map(|row| row.count.cast_signed())
                .collect::<Vec<_>>(),
        )
        .bind(
            rows()
                .map(|row| Timestamp(row.first_at_us))
                .collect::<Vec<_>>(),
        )
        .bind(rows().map(|row| Timestamp(row.at_us)).collect::<Vec<_>>())
        .execute(&mut self.conn)
        .await?;
        sqlx::query(
            "DELETE FROM refusals WHERE id IN (
                 SELECT id FROM refusals WHERE id NOT IN (
                     SELECT id FROM refusals ORDER BY last_at > $1, last_at DESC LIMIT $2
                 )
                 FOR UPDATE SKIP LOCKED
             )",
        )
        .bind(Timestamp(last.at_us))
        .bind(REFUSALS_MAX)
        .execute(&mut self.conn)
        .await
        .map(drop)
    }

    /// Writes audit events. Reported events are as new as their frames; session events may have been written by a
    /// COMMIT with unknown outcome.
    pub(super) async fn store_events(
        &mut self,
        frames: &[Frame<'_>],
        events: &[&DeviceEvent],
    ) -> Result<(), sqlx::Error> {
        let reported = frames.iter().filter_map(EventRow::reported);
        let rows: Vec<EventRow<'_>> = reported
            .chain(events.iter().copied().map(EventRow::of))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        let level = |row: &EventRow<'_>| row.level.map(i16::from);
        sqlx::query(
            "INSERT INTO device_events (device_id, at, kind, level, code, detail, frame_id, session)
             SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::smallint[],
                 $5::integer[], $6::text[], $7::bigint[], $8::bigint[])
                 AS new (device_id, at, kind, level, code, detail, frame_id, session)
             -- The device may have been removed since.
             WHERE EXISTS (SELECT FROM devices WHERE id = new.device_id)
             AND (new.frame_id IS NOT NULL OR NOT EXISTS (
                 SELECT FROM device_events AS old
                 WHERE old.device_id = new.device_id AND old.at = new.at AND old.kind = new.kind
                     AND old.detail = new.detail AND old.session IS NOT DISTINCT FROM new.session
             ))",
        )
        .bind(rows.iter().map(|row| row.device.0).collect::<Vec<_>>())
        .bind(
            rows.iter()
                .map(|row| Timestamp(row.at_us))
                .collect::<Vec<_>>(),
        )
        .bind(rows.iter().map(|row| row.kind).collect::<Vec<_>>())
        .bind(rows.iter().map(level).collect::<Vec<_>>())
        .bind(
            rows.iter()
                .map(|row| i32::from(row.code))
                .collect::<Vec<_>>(),
        )
        .bind(rows.iter().map(|row| row.detail).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.frame).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.session).collect::<Vec<_>>())
        .execute(&mut self.conn)
        .await
        .and_then(|done| {
            // Reported events were acknowledged with their frames, and a device with a frame is not removed.
            let reported = rows.iter().filter(|row| row.frame.is_some()).count();
            let stored = (reported as u64).min(done.rows_affected());
            is_whole("device_events", reported, stored)
        })?;
        self.store_sessions(events).await
    }

    /// Opens and closes sessions. No session begins twice, so beginnings are written first.
    async fn store_sessions(&mut self, events: &[&DeviceEvent]) -> Result<(), sqlx::Error> {
        let (begun, ended) = sessions(events);
        if !begun.is_empty() {
            let ids: Vec<i64> = begun.iter().map(|(session, _)| session.0).collect();
            let devices: Vec<i64> = begun.iter().map(|(_, event)| event.device.0).collect();
            let peers: Vec<&str> = { begun.iter() }
                .map(|(_, event)| event.detail.as_str())
                .collect();
            let times = begun.iter().map(|(_, event)| Timestamp(event.at_us));
            sqlx::query(
                "INSERT INTO sessions (id, device_id, gateway, peer, connected_at)
                 SELECT id, device_id, $5, peer, at
                 FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[])
                     AS new (id, device_id, peer, at)
                 WHERE EXISTS (SELECT FROM devices WHERE id = new.device_id)
                 ON CONFLICT (id) DO NOTHING",
            )
            .bind(ids)
            .bind(devices)
            .bind(peers)
            .bind(times.collect::<Vec<_>>())
            .bind(&self.gateway)
            .execute(&mut self.conn)
            .await?;
        }
        if !ended.is_empty() {
            let ids: Vec<i64> = ended.iter().map(|session| session.0).collect();
            sqlx::query("DELETE FROM sessions WHERE id = ANY($1)")
                .bind(ids)
                .execute(&mut self.conn)
                .await?;
        }
        Ok(())
    }
}

/// Closes the sessions that the gateway's last run left open, as of the time when it was last alive.
pub(super) async fn close_sessions(
    conn: &mut Link,
    gateway: &str,
    now_us: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH closed AS (
             DELETE FROM sessions WHERE gateway = $1 RETURNING id, device_id, connected_at
         )
         INSERT INTO device_events (device_id, at, kind, code, detail, session)
         SELECT device_id, greatest(connected_at, coalesce(
             (SELECT least(alive_at, $2) FROM gateways WHERE id = $1), $2)), 'disconnected', 0, $3, id
         FROM closed ORDER BY connected_at, id",
    )
    .bind(gateway)
    .bind(Timestamp(now_us))
    .bind(LEFT_OPEN)
    .execute(conn)
    .await
    .map(drop)
}
