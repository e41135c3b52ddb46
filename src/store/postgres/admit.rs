//! Logins and declares. Each step is one statement for the whole batch, because after a restart every device of
//! the fleet reconnects at the same time.
//!
//! Rows that two gateways may need at the same time are locked or inserted in key order, which prevents
//! deadlocks. A device's row is locked first, so two logins of one device are serialized.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::link::Link;
use super::timestamp::Timestamp;
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
use crate::time::{BootClock, Origin, UNMEASURED};

/// Logins and declares of a transaction.
pub(super) struct Admissions<'c> {
    conn: &'c mut Link,
    bounds: DeviceBounds,
}

type Devices = HashMap<String, FoundDevice>;
type DeviceColumns = (String, i64, i32, i64, i64);
type Streams = HashMap<(DeviceId, u64), StreamRow>;

impl<'c> Admissions<'c> {
    pub(super) fn new(conn: &'c mut Link, bounds: DeviceBounds) -> Self {
        Self { conn, bounds }
    }

    /// Returns for each login whether its device may send, and from which number on.
    pub(super) async fn login(
        &mut self,
        logins: &[Login],
    ) -> Result<Vec<LoginOutcome>, sqlx::Error> {
        if logins.is_empty() {
            return Ok(Vec::new());
        }
        let devices = self.upsert_devices(logins).await?;
        let let_in: Vec<(DeviceId, &Login)> = logins
            .iter()
            .filter_map(|login| {
                let device = devices.get(&login.device)?;
                device.lets_in(login).then_some((device.id, login))
            })
            .collect();
        let streams = self.find_or_create_streams(&let_in).await?;
        let continues = |(device, login): &(DeviceId, &Login)| {
            let stream = streams.get(&(*device, login.stream));
            stream.is_some_and(|stream| login.next_seq > stream.durable_seq)
        };
        let admitted: Vec<_> = let_in.into_iter().filter(continues).collect();
        let clocks = self.offer_clocks(&admitted).await?;
        let wanted = admitted
            .iter()
            .filter_map(|(device, login)| login.schema.map(|(schema, _)| (*device, schema)));
        let stored = self.find_schemas(wanted.collect()).await?;
        let named = NamedSchemas::of(&admitted, &stored)?;
        let series = self.find_series(&named.series_keys()).await?;
        let found = Found {
            devices,
            streams,
            clocks,
            schemas: named.schemas(&series)?,
            bounds: self.bounds,
        };
        logins.iter().map(|login| found.outcome(login)).collect()
    }

    /// Returns for each declare whether it is stored, and the series of its channels. `logins` are those of the
    /// same transaction.
    pub(super) async fn declare(
        &mut self,
        declares: &[Declare],
        logins: &[Login],
    ) -> Result<Vec<DeclareOutcome>, sqlx::Error> {
        if declares.is_empty() {
            return Ok(Vec::new());
        }
        let wanted: BTreeSet<_> = { declares.iter() }
            .map(|declare| (declare.device, declare.schema))
            .collect();
        let mut stored = self.find_schemas(wanted.clone()).await?;
        let new = new_declares(declares, &stored);
        let devices: BTreeSet<DeviceId> = new.iter().map(|declare| declare.device).collect();
        let mut counts = HashMap::new();
        if !devices.is_empty() {
            // Another gateway may have stored the schema since. The lock makes it wait from here on.
            counts = self.lock_and_count(&devices, logins).await?;
            stored = self.find_schemas(wanted).await?;
        }
        let new = new_declares(declares, &stored);
        let keys = { new.iter() }
            .flat_map(|declare| series_keys(declare.device, &declare.channels))
            .collect::<Vec<_>>();
        let series = self.find_series(&keys).await?;
        let verdicts = judge_declares(declares, &stored, &series, counts, self.bounds);
        let judged = || declares.iter().zip(&verdicts);
        let new: Vec<&Declare> = judged()
            .filter(|(_, verdict)| **verdict == DeclareVerdict::New)
            .map(|(declare, _)| declare)
            .collect();
        self.insert_schemas(&new).await?;
        let kept: Vec<&Declare> = judged()
            .filter(|(_, verdict)| verdict.is_kept())
            .map(|(declare, _)| declare)
            .collect();
        let series = self.find_or_create_series(&kept).await?;
        judged()
            .map(|(declare, verdict)| series.outcome(declare, *verdict))
            .collect()
    }

    /// Locks the devices and returns their counts, which no other transaction can change until this one ends.
    async fn lock_and_count(
        &mut self,
        devices: &BTreeSet<DeviceId>,
        logins: &[Login],
    ) -> Result<HashMap<DeviceId, Counts>, sqlx::Error> {
        let ids: Vec<i64> = devices.iter().map(|device| device.0).collect();
        // Takes all of this transaction's locks together, in the order in which logins take them.
        sqlx::query(
            "SELECT FROM devices WHERE id = ANY($1) OR name = ANY($2) ORDER BY name
             FOR NO KEY UPDATE",
        )
        .bind(&ids)
        .bind(
            logins
                .iter()
                .map(|login| login.device.as_str())
                .collect::<Vec<_>>(),
        )
        .execute(&mut *self.conn)
        .await?;
        let counts: Vec<(i64, i64, i64)> = sqlx::query_as(
            "SELECT w.device, (SELECT count(*) FROM schemas AS c WHERE c.device_id = w.device),
                 (SELECT count(*) FROM series AS s WHERE s.device_id = w.device)
             FROM unnest($1::bigint[]) AS w (device)",
        )
        .bind(ids)
        .fetch_all(&mut *self.conn)
        .await?;
        let counts = counts.into_iter().map(|(device, schemas, series)| {
            let counts = Counts {
                schemas: schemas.unsigned_abs(),
                series: series.unsigned_abs(),
            };
            (DeviceId(device), counts)
        });
        Ok(counts.collect())
    }

    async fn upsert_devices(&mut self, logins: &[Login]) -> Result<Devices, sqlx::Error> {
        // By name; of several logins of one device the last one counts.
        let by_name: BTreeMap<&str, &Login> = logins
            .iter()
            .map(|login| (login.device.as_str(), login))
            .collect();
        let mut devices = self.update_devices(by_name.values().copied()).await?;
        let new = by_name
            .values()
            .filter(|login| login.may_register && !devices.contains_key(&login.device));
        let new: Vec<&Login> = new.copied().collect();
        if !new.is_empty() {
            devices.extend(self.insert_devices(&new).await?);
        }
        Ok(devices)
    }

    async fn update_devices<'l>(
        &mut self,
        logins: impl Iterator<Item = &'l Login> + Clone,
    ) -> Result<Devices, sqlx::Error> {
        let found: Vec<DeviceColumns> = sqlx::query_as(
            "WITH seen AS (
                 SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[])
                     AS seen (name, firmware, at)
             ), locked AS (
                 SELECT id, name FROM devices WHERE name = ANY($1) ORDER BY name
                 FOR NO KEY UPDATE
             )
             UPDATE devices SET firmware = seen.firmware,
                 first_seen_at = coalesce(devices.first_seen_at, seen.at), last_seen_at = seen.at
             FROM locked JOIN seen USING (name)
             WHERE devices.id = locked.id
             RETURNING devices.name, devices.id, devices.enabled, devices.revision,
                 devices.key_revision",
        )
        .bind(
            logins
                .clone()
                .map(|login| login.device.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            logins
                .clone()
                .map(|login| login.firmware.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            logins
                .map(|login| Timestamp(login.at_us))
                .collect::<Vec<_>>(),
        )
        .fetch_all(&mut *self.conn)
        .await?;
        Ok(found.into_iter().map(device_row).collect())
    }

    async fn insert_devices(&mut self, logins: &[&Login]) -> Result<Devices, sqlx::Error> {
        // Another gateway may have been faster.
        let inserted: Vec<DeviceColumns> = sqlx::query_as(
            "INSERT INTO devices (name, firmware, first_seen_at, last_seen_at)
             SELECT name, firmware, at, at
             FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS new (name, firmware, at)
             ON CONFLICT (name) DO UPDATE SET firmware = excluded.firmware,
                 first_seen_at = coalesce(devices.first_seen_at, excluded.first_seen_at),
                 last_seen_at = excluded.last_seen_at
             RETURNING name, id, enabled, revision, key_revision",
        )
        .bind(
            logins
                .iter()
                .map(|login| login.device.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            logins
                .iter()
                .map(|login| login.firmware.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            logins
                .iter()
                .map(|login| Timestamp(login.at_us))
                .collect::<Vec<_>>(),
        )
        .fetch_all(&mut *self.conn)
        .await?;
        Ok(inserted.into_iter().map(device_row).collect())
    }

    async fn find_or_create_streams(
        &mut self,
        logins: &[(DeviceId, &Login)],
    ) -> Result<Streams, sqlx::Error> {
        let wanted: BTreeMap<(DeviceId, u64), i64> = logins
            .iter()
            .map(|(device, login)| ((*device, login.stream), login.at_us))
            .collect();
        if wanted.is_empty() {
            return Ok(Streams::new());
        }
        let columns = |wanted: &BTreeMap<(DeviceId, u64), i64>| {
            let devices: Vec<i64> = wanted.keys().map(|(device, _)| device.0).collect();
            let streams = wanted.keys().map(|(_, stream)| stream.cast_signed());
            (devices, streams.collect::<Vec<i64>>())
        };
        let (devices, numbers) = columns(&wanted);
        let found: Vec<(i64, i64, i64, i64)> = sqlx::query_as(
            "SELECT device_id, stream, id, durable_seq
             FROM unnest($1::bigint[], $2::bigint[]) AS wanted (device_id, stream)
             JOIN streams USING (device_id, stream)",
        )
        .bind(devices)
        .bind(numbers)
        .fetch_all(&mut *self.conn)
        .await?;
        let mut streams: Streams = found.into_iter().map(stream_row).collect();
        let mut new = wanted;
        new.retain(|key, _| !streams.contains_key(key));
        // Their devices have been locked since the login began.
        let mut remaining = StreamRoom::new(self.count_streams(new.keys()).await?, self.bounds);
        new.retain(|(device, _), _| remaining.take(*device));
        if new.is_empty() {
            return Ok(streams);
        }
        let (devices, numbers) = columns(&new);
        let created: Vec<(i64, i64, i64, i64)> = sqlx::query_as(
            "INSERT INTO streams (device_id, stream, created_at)
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::timestamptz[])
             RETURNING device_id, stream, id, durable_seq",
        )
        .bind(devices)
        .bind(numbers)
        .bind(
            new.values()
                .map(|at_us| Timestamp(*at_us))
                .collect::<Vec<_>>(),
        )
        .fetch_all(&mut *self.conn)
        .await?;
        streams.extend(created.into_iter().map(stream_row));
        Ok(streams)
    }

    async fn count_streams(
        &mut self,
        new: impl Iterator<Item = &(DeviceId, u64)>,
    ) -> Result<HashMap<DeviceId, i64>, sqlx::Error> {
        let devices: BTreeSet<i64> = new.map(|(device, _)| device.0).collect();
        if devices.is_empty() {
            return Ok(HashMap::new());
        }
        let counts: Vec<(i64, i64)> = sqlx::query_as(
            "SELECT w.device, (SELECT count(*) FROM streams AS s WHERE s.device_id = w.device)
             FROM unnest($1::bigint[]) AS w (device)",
        )
        .bind(devices.into_iter().collect::<Vec<i64>>())
        .fetch_all(&mut *self.conn)
        .await?;
        let count = |(device, streams)| (DeviceId(device), streams);
        Ok(counts.into_iter().map(count).collect())
    }

    /// Stores the logins' clocks that are better than the stored ones, and reads the latest clocks.
    async fn offer_clocks(
        &mut self,
        logins: &[(DeviceId, &Login)],
    ) -> Result<HashMap<DeviceId, Vec<BootClock>>, sqlx::Error> {
        if logins.is_empty() {
            return Ok(HashMap::new());
        }
        let mut clocks = self.latest_clocks(logins).await?;
        let changed = clocks.offer(logins);
        keep_clocks(self.conn, &changed).await?;
        Ok(clocks.into_latest())
    }

    async fn latest_clocks(
        &mut self,
        logins: &[(DeviceId, &Login)],
    ) -> Result<KeptClocks, sqlx::Error> {
        let devices = logins.iter().map(|(device, _)| device.0);
        let boots = { logins.iter() }.map(|(_, login)| i64::from(login.clock.boot));
        let times = logins.iter().map(|(_, login)| Timestamp(login.at_us));
        let rows = sqlx::query(
            "SELECT c.device_id, c.boot, c.offset_us, c.delay_us, c.measured_at, c.timeline,
                 c.origin_us, c.valid_from_us,
                 (SELECT s.origin_us FROM clock_steps AS s WHERE s.timeline = c.timeline
                     ORDER BY s.id DESC LIMIT 1)
             FROM unnest($1::bigint[], $2::bigint[], $3::timestamptz[]) AS wanted (device_id, boot, at)
             JOIN clocks AS c ON c.device_id = wanted.device_id
                 AND (c.boot = wanted.boot OR c.boot IN (
                     SELECT corrected.boot FROM (
                         SELECT l.boot, l.measured_at + coalesce((
                             SELECT s.origin_us FROM clock_steps AS s
                             WHERE s.timeline = l.timeline ORDER BY s.id DESC LIMIT 1
                         ) - l.origin_us, 0) * interval '1 microsecond' AS measured_at
                         FROM clocks AS l WHERE l.device_id = wanted.device_id
                     ) AS corrected
                     ORDER BY corrected.measured_at > wanted.at + $4 * interval '1 microsecond',
                         corrected.measured_at DESC, corrected.boot DESC
                     LIMIT $5
                 ))",
        )
        .bind(devices.collect::<Vec<i64>>())
        .bind(boots.collect::<Vec<i64>>())
        .bind(times.collect::<Vec<Timestamp>>())
        .bind(MEASURED_AHEAD_MAX_US)
        .bind(CLOCKS_MAX as i64)
        .fetch_all(&mut *self.conn)
        .await?;
        let mut clocks = KeptClocks::default();
        for row in &rows {
            clocks.add(DeviceId(row.try_get(0)?), clock_row(row)?, row.try_get(8)?);
        }
        Ok(clocks)
    }

    async fn find_schemas(
        &mut self,
        wanted: BTreeSet<(DeviceId, u16)>,
    ) -> Result<StoredSchemas, sqlx::Error> {
        if wanted.is_empty() {
            return Ok(StoredSchemas::new());
        }
        let devices: Vec<i64> = wanted.iter().map(|(device, _)| device.0).collect();
        let numbers: Vec<i32> = wanted.iter().map(|(_, schema)| (*schema).into()).collect();
        let rows: Vec<(i64, i32, Vec<u8>, String)> = sqlx::query_as(
            "SELECT device_id, schema, hash, declaration
             FROM unnest($1::bigint[], $2::integer[]) AS wanted (device_id, schema)
             JOIN schemas USING (device_id, schema)",
        )
        .bind(devices)
        .bind(numbers)
        .fetch_all(&mut *self.conn)
        .await?;
        let schema = |(device, schema, hash, declaration): (i64, i32, Vec<u8>, String)| {
            let schema =
                u16::try_from(schema).map_err(|error| sqlx::Error::Decode(error.into()))?;
            let stored = StoredSchema { hash, declaration };
            Ok(((DeviceId(device), schema), stored))
        };
        rows.into_iter().map(schema).collect()
    }

    /// Inserts new schemas, each number once.
    async fn insert_schemas(&mut self, declares: &[&Declare]) -> Result<(), sqlx::Error> {
        if declares.is_empty() {
            return Ok(());
        }
        let by_key: BTreeMap<(DeviceId, u16), &Declare> = { declares.iter() }
            .map(|declare| ((declare.device, declare.schema), *declare))
            .collect();
        let devices: Vec<i64> = by_key.keys().map(|(device, _)| device.0).collect();
        let numbers: Vec<i32> = by_key.keys().map(|(_, schema)| (*schema).into()).collect();
        let hashes: Vec<&[u8]> = by_key.values().map(|declare| &declare.hash[..]).collect();
        let declarations = by_key
            .values()
            .map(|declare| declaration(&declare.channels));
        let declarations = declarations.collect::<Result<Vec<String>, _>>()?;
        sqlx::query(
            "INSERT INTO schemas (device_id, schema, hash, declaration)
             SELECT * FROM unnest($1::bigint[], $2::integer[], $3::bytea[], $4::text[])",
        )
        .bind(devices)
        .bind(numbers)
        .bind(hashes)
        .bind(declarations)
        .execute(&mut *self.conn)
        .await
        .map(drop)
    }

    async fn find_or_create_series<'k>(
        &mut self,
        declares: &[&'k Declare],
    ) -> Result<SeriesIndex<'k>, sqlx::Error> {
        let wanted: Vec<SeriesKey<'k>> = { declares.iter() }
            .flat_map(|declare| series_keys(declare.device, &declare.channels))
            .collect();
        let mut series = self.find_series(&wanted).await?;
        let new: BTreeSet<_> = { wanted.into_iter() }
            .filter(|key| !series.contains(key))
            .collect();
        if new.is_empty() {
            return Ok(series);
        }
        let new = Vec::from_iter(new);
        let (devices, channels, units, kinds) = series_columns(&new);
        sqlx::query(
            "INSERT INTO series (device_id, channel, unit, kind)
             SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[])
             ON CONFLICT (device_id, channel, unit, kind) DO NOTHING",
        )
        .bind(devices)
        .bind(channels)
        .bind(units)
        .bind(kinds)
        .execute(&mut *self.conn)
        .await?;
        series.extend(self.find_series(&new).await?);
        Ok(series)
    }

    /// Finds series. The statement is planned on every execution: a few series are looked up in the index,
    /// those of a whole fleet are joined. A plan that was cached while the table was small could read the whole
    /// table.
    async fn find_series<'k>(
        &mut self,
        wanted: &[SeriesKey<'k>],
    ) -> Result<SeriesIndex<'k>, sqlx::Error> {
        if wanted.is_empty() {
            return Ok(SeriesIndex::default());
        }
        let (devices, channels, units, kinds) = series_columns(wanted);
        let found: Vec<(i64, i64)> = sqlx::query_as(
            "SELECT wanted.n - 1, s.id
             FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) WITH ORDINALITY
                 AS wanted (device_id, channel, unit, kind, n)
             JOIN series AS s USING (device_id, channel, unit, kind)",
        )
        .persistent(false)
        .bind(devices)
        .bind(channels)
        .bind(units)
        .bind(kinds)
        .fetch_all(&mut *self.conn)
        .await?;
        Ok(SeriesIndex::new(wanted, &found))
    }
}

type SeriesColumns<'k> = (Vec<i64>, Vec<&'k str>, Vec<&'k str>, Vec<&'k str>);

fn series_columns<'k>(keys: &[SeriesKey<'k>]) -> SeriesColumns<'k> {
    (
        keys.iter().map(|(device, ..)| device.0).collect(),
        keys.iter().map(|(_, channel, ..)| *channel).collect(),
        keys.iter().map(|(_, _, unit, _)| *unit).collect(),
        keys.iter().map(|(.., kind)| *kind).collect(),
    )
}

fn device_row(columns: DeviceColumns) -> (String, FoundDevice) {
    let (name, id, enabled, revision, key_revision) = columns;
    let found = FoundDevice {
        id: DeviceId(id),
        is_enabled: enabled != 0,
        revision,
        key_revision,
    };
    (name, found)
}

fn stream_row(
    (device, stream, id, durable_seq): (i64, i64, i64, i64),
) -> ((DeviceId, u64), StreamRow) {
    let row = StreamRow {
        id: StreamId(id),
        durable_seq: durable_seq.cast_unsigned(),
    };
    ((DeviceId(device), stream.cast_unsigned()), row)
}

/// Reads a row of `clocks`, from its second column on.
pub(super) fn clock_row(row: &PgRow) -> Result<BootClock, sqlx::Error> {
    let boot: i64 = row.try_get(1)?;
    Ok(BootClock {
        boot: u32::try_from(boot).map_err(|error| sqlx::Error::Decode(error.into()))?,
        offset_us: row.try_get(2)?,
        delay_us: row.try_get::<i64, _>(3)?.cast_unsigned(),
        measured_at_us: row.try_get::<Timestamp, _>(4)?.0,
        origin: Origin {
            timeline: row.try_get(5)?,
            at_us: row.try_get(6)?,
        },
        valid_from_us: row.try_get(7)?,
    })
}

/// Stores clocks, replacing earlier clocks of the same boots. A chosen clock replaces nothing.
pub(super) async fn keep_clocks(
    conn: &mut Link,
    clocks: &[(DeviceId, BootClock)],
) -> Result<(), sqlx::Error> {
    // Of several clocks of one boot the last one counts, because a statement may change a row only once. A
    // chosen clock must not hide a measured one.
    let mut latest: BTreeMap<(i64, u32), BootClock> = BTreeMap::new();
    for (device, clock) in clocks {
        let key = (device.0, clock.boot);
        if clock.delay_us != UNMEASURED || !latest.contains_key(&key) {
            latest.insert(key, *clock);
        }
    }
    if latest.is_empty() {
        return Ok(());
    }
    let column = |value: fn(&BootClock) -> i64| latest.values().map(value).collect::<Vec<i64>>();
    let measured = latest.values().map(|clock| Timestamp(clock.measured_at_us));
    sqlx::query(
        "INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at, timeline, origin_us,
             valid_from_us)
         SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[],
             $5::timestamptz[], $6::bigint[], $7::bigint[], $8::bigint[])
             AS new (device_id, boot, offset_us, delay_us, measured_at, timeline, origin_us, valid_from_us)
         -- The device may have been removed since.
         WHERE EXISTS (SELECT FROM devices WHERE id = new.device_id)
         ON CONFLICT (device_id, boot) DO UPDATE SET offset_us = excluded.offset_us,
             delay_us = excluded.delay_us, measured_at = excluded.measured_at,
             timeline = excluded.timeline, origin_us = excluded.origin_us,
             valid_from_us = excluded.valid_from_us
         WHERE excluded.delay_us < 9223372036854775807",
    )
    .bind(latest.keys().map(|(device, _)| *device).collect::<Vec<_>>())
    .bind(column(|clock| i64::from(clock.boot)))
    .bind(column(|clock| clock.offset_us))
    .bind(column(|clock| clock.delay_us.cast_signed()))
    .bind(measured.collect::<Vec<Timestamp>>())
    .bind(column(|clock| clock.origin.timeline))
    .bind(column(|clock| clock.origin.at_us))
    .bind(column(|clock| clock.valid_from_us))
    .execute(conn)
    .await
    .map(drop)
}
