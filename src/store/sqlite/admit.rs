//! Logins and declares. Each step is a few statements for the whole batch, because after a restart every device
//! of the fleet reconnects at the same time.

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::bulk::{Bulk, Params};
use super::rows::{CLOCK_COLUMNS, CLOCK_REPLACES, CLOCKS, bind_clock};
use crate::config::DeviceBounds;
use crate::store::admission::{
    CLOCKS_MAX, Found, FoundDevice, KeptClocks, MEASURED_AHEAD_MAX_US, NamedSchemas, StreamRow,
};
use crate::store::bounds::{Counts, StreamRoom};
use crate::store::schemas::{DeclareVerdict, judge_declares, new_declares};
use crate::store::schemas::{
    SeriesIndex, SeriesKey, StoredSchema, StoredSchemas, declaration, series_keys,
};
use crate::store::{Declare, DeclareOutcome, DeviceId, Login, LoginOutcome, StreamId};
use crate::time::{BootClock, Origin};

/// Time at which clock `l` was measured, corrected by the later steps of the gateway's clock.
const CORRECTED: &str = "l.measured_at + coalesce((SELECT s.origin_us FROM clock_steps AS s
    WHERE s.timeline = l.timeline ORDER BY s.id DESC LIMIT 1) - l.origin_us, 0)";

/// Prepared statements of logins and declares.
pub(super) struct Admissions {
    find_devices: Bulk,
    upsert_devices: Bulk,
    find_streams: Bulk,
    insert_streams: Bulk,
    keep_clocks: Bulk,
    latest_clocks: Bulk,
    find_schemas: Bulk,
    insert_schemas: Bulk,
    find_series: Bulk,
    insert_series: Bulk,
    count: Bulk,
    count_streams: Bulk,
    bounds: DeviceBounds,
}

impl Admissions {
    pub(super) fn new(bounds: DeviceBounds) -> Self {
        let bulk = |head: &str, columns, tail: &str| Bulk::new(head, columns, tail);
        Self {
            find_devices: bulk(
                "WITH wanted(name) AS (",
                1,
                ") SELECT d.name, d.id FROM wanted CROSS JOIN devices AS d USING (name)",
            ),
            upsert_devices: bulk(
                "INSERT INTO devices(name, firmware, first_seen_at, last_seen_at)",
                4,
                "ON CONFLICT (name) DO UPDATE SET firmware = excluded.firmware,
                    first_seen_at = coalesce(first_seen_at, excluded.first_seen_at),
                    last_seen_at = excluded.last_seen_at
                RETURNING name, id, enabled, revision, key_revision",
            ),
            find_streams: bulk(
                "WITH wanted(device_id, stream) AS (",
                2,
                ") SELECT s.device_id, s.stream, s.id, s.durable_seq
                FROM wanted CROSS JOIN streams AS s USING (device_id, stream)",
            ),
            insert_streams: bulk(
                "INSERT INTO streams(device_id, stream, created_at)",
                3,
                "RETURNING device_id, stream, id, durable_seq",
            ),
            keep_clocks: bulk(
                &format!("INSERT INTO {CLOCKS}"),
                CLOCK_COLUMNS,
                CLOCK_REPLACES,
            ),
            latest_clocks: bulk(
                "WITH wanted(device_id, boot, at) AS (",
                3,
                &format!(
                    ") SELECT c.device_id, c.boot, c.offset_us, c.delay_us, c.measured_at, c.timeline,
                        c.origin_us, c.valid_from_us,
                        (SELECT s.origin_us FROM clock_steps AS s WHERE s.timeline = c.timeline
                            ORDER BY s.id DESC LIMIT 1)
                    FROM wanted AS w CROSS JOIN clocks AS c ON c.device_id = w.device_id
                        AND (c.boot = w.boot OR c.boot IN (
                            SELECT boot FROM (
                                SELECT l.boot, {CORRECTED} AS measured_at,
                                    {CORRECTED} > w.at + {MEASURED_AHEAD_MAX_US} AS is_ahead
                                FROM clocks AS l WHERE l.device_id = w.device_id
                            )
                            ORDER BY is_ahead, measured_at DESC, boot DESC LIMIT {CLOCKS_MAX}
                        ))"
                ),
            ),
            find_schemas: bulk(
                "WITH wanted(device_id, schema) AS (",
                2,
                ") SELECT s.device_id, s.schema, s.hash, s.declaration
                FROM wanted CROSS JOIN schemas AS s USING (device_id, schema)",
            ),
            insert_schemas: bulk(
                "INSERT INTO schemas(device_id, schema, hash, declaration)",
                4,
                "",
            ),
            find_series: bulk(
                "WITH wanted(n, device_id, channel, unit, kind) AS (",
                5,
                ") SELECT w.n, s.id
                FROM wanted AS w CROSS JOIN series AS s USING (device_id, channel, unit, kind)",
            ),
            insert_series: bulk(
                "INSERT INTO series(device_id, channel, unit, kind)",
                4,
                "ON CONFLICT (device_id, channel, unit, kind) DO NOTHING",
            ),
            count: bulk(
                "WITH wanted(device_id) AS (",
                1,
                ") SELECT w.device_id,
                    (SELECT count(*) FROM schemas AS c WHERE c.device_id = w.device_id),
                    (SELECT count(*) FROM series AS s WHERE s.device_id = w.device_id)
                FROM wanted AS w",
            ),
            count_streams: bulk(
                "WITH wanted(device_id) AS (",
                1,
                ") SELECT w.device_id,
                    (SELECT count(*) FROM streams AS s WHERE s.device_id = w.device_id)
                FROM wanted AS w",
            ),
            bounds,
        }
    }

    /// Returns for each login whether its device may send, and from which number on.
    pub(super) async fn login(
        &self,
        conn: &mut SqliteConnection,
        logins: &[Login],
    ) -> Result<Vec<LoginOutcome>, sqlx::Error> {
        let devices = self.upsert_devices(conn, logins).await?;
        let let_in: Vec<(DeviceId, &Login)> = logins
            .iter()
            .filter_map(|login| {
                let device = devices.get(&login.device)?;
                device.lets_in(login).then_some((device.id, login))
            })
            .collect();
        let streams = self.find_or_create_streams(conn, &let_in).await?;
        let continues = |(device, login): &(DeviceId, &Login)| {
            let stream = streams.get(&(*device, login.stream));
            stream.is_some_and(|stream| login.next_seq > stream.durable_seq)
        };
        let admitted: Vec<_> = let_in.into_iter().filter(continues).collect();
        let clocks = self.offer_clocks(conn, &admitted).await?;
        let wanted = admitted
            .iter()
            .filter_map(|(device, login)| login.schema.map(|(schema, _)| (*device, schema)));
        let stored = self.find_schemas(conn, wanted.collect()).await?;
        let named = NamedSchemas::of(&admitted, &stored)?;
        let series = self.find_series(conn, &named.series_keys()).await?;

        let found = Found {
            devices,
            streams,
            clocks,
            schemas: named.schemas(&series)?,
            bounds: self.bounds,
        };
        logins.iter().map(|login| found.outcome(login)).collect()
    }

    /// Returns for each declare whether it is stored, and the series of its channels.
    pub(super) async fn declare(
        &self,
        conn: &mut SqliteConnection,
        declares: &[Declare],
    ) -> Result<Vec<DeclareOutcome>, sqlx::Error> {
        let wanted = declares
            .iter()
            .map(|declare| (declare.device, declare.schema))
            .collect();
        let stored = self.find_schemas(conn, wanted).await?;
        let new = new_declares(declares, &stored);
        let keys = { new.iter() }
            .flat_map(|declare| series_keys(declare.device, &declare.channels))
            .collect::<Vec<_>>();
        let series = self.find_series(conn, &keys).await?;
        let devices = new.iter().map(|declare| declare.device).collect();
        let counts = self.count(conn, devices).await?;
        let verdicts = judge_declares(declares, &stored, &series, counts, self.bounds);
        let judged = || declares.iter().zip(&verdicts);
        let new: Vec<&Declare> = judged()
            .filter(|(_, verdict)| **verdict == DeclareVerdict::New)
            .map(|(declare, _)| declare)
            .collect();
        self.insert_schemas(conn, &new).await?;
        let kept = judged().filter(|(_, verdict)| verdict.is_kept());
        let keys = kept.flat_map(|(declare, _)| series_keys(declare.device, &declare.channels));
        let series = self.find_series(conn, &keys.collect::<Vec<_>>()).await?;
        judged()
            .map(|(declare, verdict)| series.outcome(declare, *verdict))
            .collect()
    }

    async fn count(
        &self,
        conn: &mut SqliteConnection,
        devices: BTreeSet<DeviceId>,
    ) -> Result<HashMap<DeviceId, Counts>, sqlx::Error> {
        let rows = self
            .count
            .fetch(conn, devices.into_iter(), bind_device)
            .await?;
        let counts = |row: &SqliteRow| {
            let counts = Counts {
                schemas: row.try_get::<i64, _>(1)?.unsigned_abs(),
                series: row.try_get::<i64, _>(2)?.unsigned_abs(),
            };
            Ok((DeviceId(row.try_get(0)?), counts))
        };
        rows.iter().map(counts).collect()
    }

    async fn upsert_devices(
        &self,
        conn: &mut SqliteConnection,
        logins: &[Login],
    ) -> Result<HashMap<String, FoundDevice>, sqlx::Error> {
        let (may_register, others): (Vec<&Login>, Vec<&Login>) =
            logins.iter().partition(|login| login.may_register);
        let known = { others.iter() }.map(|login| login.device.as_str());
        let known = self.find_devices(conn, known.collect()).await?;
        let mut logins = may_register;
        logins.extend(
            others
                .iter()
                .filter(|login| known.contains_key(&login.device)),
        );
        let bind = |params: &mut Params, login: &Login| {
            params
                .bind(login.device.as_str())
                .bind(login.firmware.as_str())
                .bind(login.at_us)
                .bind(login.at_us);
        };
        let rows = { &self.upsert_devices }
            .fetch(conn, logins.into_iter(), bind)
            .await?;
        let device = |row: &SqliteRow| {
            let found = FoundDevice {
                id: DeviceId(row.try_get(1)?),
                is_enabled: row.try_get::<i64, _>(2)? != 0,
                revision: row.try_get(3)?,
                key_revision: row.try_get(4)?,
            };
            Ok((row.try_get(0)?, found))
        };
        rows.iter().map(device).collect()
    }

    /// Returns the devices that exist.
    pub(super) async fn find_devices(
        &self,
        conn: &mut SqliteConnection,
        names: BTreeSet<&str>,
    ) -> Result<HashMap<String, DeviceId>, sqlx::Error> {
        let bind = |params: &mut Params, name: &str| {
            params.bind(name);
        };
        let rows = { &self.find_devices }
            .fetch(conn, names.into_iter(), bind)
            .await?;
        let device = |row: &SqliteRow| Ok((row.try_get(0)?, DeviceId(row.try_get(1)?)));
        rows.iter().map(device).collect()
    }

    async fn find_or_create_streams(
        &self,
        conn: &mut SqliteConnection,
        logins: &[(DeviceId, &Login)],
    ) -> Result<HashMap<(DeviceId, u64), StreamRow>, sqlx::Error> {
        let bind_wanted = |params: &mut Params, (device, login): &(DeviceId, &Login)| {
            params.bind(device.0).bind(login.stream.cast_signed());
        };
        let found = self
            .find_streams
            .fetch(conn, logins.iter(), bind_wanted)
            .await?;
        let mut streams = found
            .iter()
            .map(stream_row)
            .collect::<Result<HashMap<_, _>, _>>()?;

        let mut seen = HashSet::new();
        let is_new = |(device, login): &&(DeviceId, &Login)| {
            let key = (*device, login.stream);
            !streams.contains_key(&key) && seen.insert(key)
        };
        let mut new: Vec<_> = logins.iter().filter(is_new).collect();
        let devices: BTreeSet<DeviceId> = new.iter().map(|(device, _)| *device).collect();
        let counted = { &self.count_streams }
            .fetch(conn, devices.into_iter(), bind_device)
            .await?;
        let count = |row: &SqliteRow| Ok((DeviceId(row.try_get(0)?), row.try_get(1)?));
        let counts = counted.iter().map(count);
        let mut remaining =
            StreamRoom::new(counts.collect::<Result<_, sqlx::Error>>()?, self.bounds);
        new.retain(|(device, _)| remaining.take(*device));
        let bind_new = |params: &mut Params, (device, login): &(DeviceId, &Login)| {
            params
                .bind(device.0)
                .bind(login.stream.cast_signed())
                .bind(login.at_us);
        };
        let created = self
            .insert_streams
            .fetch(conn, new.into_iter(), bind_new)
            .await?;
        for row in &created {
            streams.extend([stream_row(row)?]);
        }
        Ok(streams)
    }

    /// Stores the logins' clocks that are better than the stored ones, and reads the latest clocks.
    async fn offer_clocks(
        &self,
        conn: &mut SqliteConnection,
        logins: &[(DeviceId, &Login)],
    ) -> Result<HashMap<DeviceId, Vec<BootClock>>, sqlx::Error> {
        let wanted = |params: &mut Params, (device, login): &(DeviceId, &Login)| {
            params
                .bind(device.0)
                .bind(i64::from(login.clock.boot))
                .bind(login.at_us);
        };
        let rows = { &self.latest_clocks }
            .fetch(conn, logins.iter(), wanted)
            .await?;
        let mut clocks = KeptClocks::default();
        for row in &rows {
            let clock = BootClock {
                boot: row.try_get(1)?,
                offset_us: row.try_get(2)?,
                delay_us: row.try_get::<i64, _>(3)?.cast_unsigned(),
                measured_at_us: row.try_get(4)?,
                origin: Origin {
                    timeline: row.try_get(5)?,
                    at_us: row.try_get(6)?,
                },
                valid_from_us: row.try_get(7)?,
            };
            clocks.add(DeviceId(row.try_get(0)?), clock, row.try_get(8)?);
        }
        let changed = clocks.offer(logins);
        self.keep_clocks
            .execute(conn, changed.iter(), |params, (device, clock)| {
                bind_clock(params, *device, clock);
            })
            .await?;
        Ok(clocks.into_latest())
    }

    async fn find_schemas(
        &self,
        conn: &mut SqliteConnection,
        wanted: BTreeSet<(DeviceId, u16)>,
    ) -> Result<StoredSchemas, sqlx::Error> {
        let bind = |params: &mut Params, (device, schema): (DeviceId, u16)| {
            params.bind(device.0).bind(i64::from(schema));
        };
        let rows = self
            .find_schemas
            .fetch(conn, wanted.into_iter(), bind)
            .await?;
        let schema = |row: &SqliteRow| {
            let key = (DeviceId(row.try_get(0)?), row.try_get(1)?);
            Ok((
                key,
                StoredSchema {
                    hash: row.try_get(2)?,
                    declaration: row.try_get(3)?,
                },
            ))
        };
        rows.iter().map(schema).collect()
    }

    async fn insert_schemas(
        &self,
        conn: &mut SqliteConnection,
        declares: &[&Declare],
    ) -> Result<(), sqlx::Error> {
        let declarations = declares
            .iter()
            .map(|declare| declaration(&declare.channels));
        let declarations = declarations.collect::<Result<Vec<_>, _>>()?;
        let rows: Vec<_> = declares.iter().zip(&declarations).collect();
        self.insert_schemas
            .execute(conn, rows.into_iter(), |params, (declare, declaration)| {
                params
                    .bind(declare.device.0)
                    .bind(i64::from(declare.schema))
                    .bind(declare.hash.as_slice())
                    .bind(declaration.as_str());
            })
            .await?;
        let channels = declares.iter().flat_map(|declare| {
            declare
                .channels
                .iter()
                .map(|channel| (declare.device, channel))
        });
        let channels: Vec<_> = channels.collect();
        self.insert_series
            .execute(conn, channels.into_iter(), |params, (device, channel)| {
                params
                    .bind(device.0)
                    .bind(channel.name.as_str())
                    .bind(channel.unit.as_str())
                    .bind(channel.kind.name());
            })
            .await
    }

    async fn find_series<'k>(
        &self,
        conn: &mut SqliteConnection,
        wanted: &[SeriesKey<'k>],
    ) -> Result<SeriesIndex<'k>, sqlx::Error> {
        let bind = |params: &mut Params, (n, key): (usize, &SeriesKey<'k>)| {
            let (device, channel, unit, kind) = *key;
            params
                .bind(n as i64)
                .bind(device.0)
                .bind(channel)
                .bind(unit)
                .bind(kind);
        };
        let rows = { &self.find_series }
            .fetch(conn, wanted.iter().enumerate(), bind)
            .await?;
        let series = |row: &SqliteRow| Ok((row.try_get(0)?, row.try_get(1)?));
        let found = rows.iter().map(series);
        let found = found.collect::<Result<Vec<_>, sqlx::Error>>()?;
        Ok(SeriesIndex::new(wanted, &found))
    }
}

fn stream_row(row: &SqliteRow) -> Result<((DeviceId, u64), StreamRow), sqlx::Error> {
    let key = (
        DeviceId(row.try_get(0)?),
        row.try_get::<i64, _>(1)?.cast_unsigned(),
    );
    let id = StreamId(row.try_get(2)?);
    Ok((
        key,
        StreamRow {
            id,
            durable_seq: row.try_get::<i64, _>(3)?.cast_unsigned(),
        },
    ))
}

fn bind_device(params: &mut Params, device: DeviceId) {
    params.bind(device.0);
}
