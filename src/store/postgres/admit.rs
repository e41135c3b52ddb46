//! Logins and declares, each step of them as one statement for the whole batch: after a restart every
//! device of the fleet comes back at once.
//!
//! Rows that two gateways may want at once are locked or inserted in the order of their keys, so that
//! they wait for each other and never in a circle. A device's row is locked first, so two logins of one
//! device take turns.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::PgConnection;

use super::timestamp::Timestamp;
use crate::clock::BootClock;
use crate::store::admission::{
    Found, FoundDevice, NamedSchemas, SeriesIndex, SeriesKey, StoredSchema, StoredSchemas,
    StreamRow, declaration, series_keys,
};
use crate::store::bounds::{
    Counts, DeclareVerdict, DeviceBounds, StreamRoom, judge_declares, new_declares,
};
use crate::store::ledger::DRIFT_PARTS;
use crate::store::{Declare, DeclareOutcome, DeviceId, Login, LoginOutcome, StreamId};

/// How many boots' clocks a login gets.
const CLOCKS_MAX: i64 = 8;

/// A transaction's logins and declares.
pub(super) struct Admissions<'c> {
    conn: &'c mut PgConnection,
    bounds: DeviceBounds,
}

type Devices = HashMap<String, FoundDevice>;
type DeviceColumns = (String, i64, i32, i64, i64);
type Streams = HashMap<(DeviceId, u64), StreamRow>;

impl<'c> Admissions<'c> {
    pub(super) fn new(conn: &'c mut PgConnection, bounds: DeviceBounds) -> Self {
        Self { conn, bounds }
    }

    /// Says of each login whether its device may send, and from where on.
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

    /// Says of each declare whether it is kept, and where its channels' readings go.
    pub(super) async fn declare(
        &mut self,
        declares: &[Declare],
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
            // Another gateway may have been faster; from here on it waits.
            counts = self.lock_and_count(&devices).await?;
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

    /// What devices have, which nobody else adds to before this transaction ends.
    async fn lock_and_count(
        &mut self,
        devices: &BTreeSet<DeviceId>,
    ) -> Result<HashMap<DeviceId, Counts>, sqlx::Error> {
        let ids: Vec<i64> = devices.iter().map(|device| device.0).collect();
        // By name, as logins lock them.
        sqlx::query("SELECT FROM devices WHERE id = ANY($1) ORDER BY name FOR NO KEY UPDATE")
            .bind(&ids)
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
        // By name; of several logins of one device the last one tells.
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
        // Their devices are locked since the login began.
        let mut room = StreamRoom::new(self.count_streams(new.keys()).await?, self.bounds);
        new.retain(|(device, _), _| room.take(*device));
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

    /// Keeps the logins' clocks where they are better than what is kept, and reads the latest.
    async fn offer_clocks(
        &mut self,
        logins: &[(DeviceId, &Login)],
    ) -> Result<HashMap<DeviceId, Vec<BootClock>>, sqlx::Error> {
        // A statement may change a row only once: of several logins with one boot, the last one offers.
        let offered: BTreeMap<(DeviceId, u32), BootClock> = logins
            .iter()
            .map(|(device, login)| ((*device, login.clock.boot), login.clock))
            .collect();
        if offered.is_empty() {
            return Ok(HashMap::new());
        }
        let devices: Vec<i64> = offered.keys().map(|(device, _)| device.0).collect();
        let boots: Vec<i64> = offered.keys().map(|(_, boot)| i64::from(*boot)).collect();
        let offsets: Vec<i64> = offered.values().map(|clock| clock.offset_us).collect();
        let delays = offered.values().map(|clock| clock.delay_us.cast_signed());
        let measured = offered
            .values()
            .map(|clock| Timestamp(clock.measured_at_us));
        // The rule of `ledger::replaces`.
        sqlx::query(
            "INSERT INTO clocks (device_id, boot, offset_us, delay_us, measured_at)
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[],
                 $5::timestamptz[])
             ON CONFLICT (device_id, boot) DO UPDATE SET offset_us = excluded.offset_us,
                 delay_us = excluded.delay_us, measured_at = excluded.measured_at
             WHERE excluded.delay_us - clocks.delay_us <= (extract(epoch FROM
                 excluded.measured_at - clocks.measured_at) * 1000000)::bigint / $6",
        )
        .bind(&devices)
        .bind(boots)
        .bind(offsets)
        .bind(delays.collect::<Vec<i64>>())
        .bind(measured.collect::<Vec<Timestamp>>())
        .bind(DRIFT_PARTS)
        .execute(&mut *self.conn)
        .await?;
        self.latest_clocks(devices).await
    }

    async fn latest_clocks(
        &mut self,
        devices: Vec<i64>,
    ) -> Result<HashMap<DeviceId, Vec<BootClock>>, sqlx::Error> {
        let devices: BTreeSet<i64> = devices.into_iter().collect();
        let rows: Vec<(i64, i64, i64, i64, Timestamp)> = sqlx::query_as(
            "SELECT c.device_id, c.boot, c.offset_us, c.delay_us, c.measured_at
             FROM unnest($1::bigint[]) AS wanted (device_id)
             CROSS JOIN LATERAL (
                 SELECT * FROM clocks WHERE clocks.device_id = wanted.device_id
                 ORDER BY measured_at DESC, boot DESC LIMIT $2
             ) AS c
             ORDER BY c.device_id, c.measured_at DESC, c.boot DESC",
        )
        .bind(devices.into_iter().collect::<Vec<i64>>())
        .bind(CLOCKS_MAX)
        .fetch_all(&mut *self.conn)
        .await?;
        let mut clocks: HashMap<DeviceId, Vec<BootClock>> = HashMap::new();
        for (device, boot, offset_us, delay_us, measured_at) in rows {
            clocks.entry(DeviceId(device)).or_default().push(BootClock {
                boot: u32::try_from(boot).map_err(|error| sqlx::Error::Decode(error.into()))?,
                offset_us,
                delay_us: delay_us.cast_unsigned(),
                measured_at_us: measured_at.0,
            });
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

    /// Keeps new ones, each number once.
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

    /// Planned anew each time: a few are looked up in the index, whatever else there is, and those of a
    /// whole fleet are joined. A plan that was kept could be from when the table was small, and read all
    /// of it.
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
