//! The database side of a spool: exclusive write access, and devices, streams and series with the ids that the
//! spool uses.
//!
//! While a spool holds frames that it has acknowledged, only the spool knows the position of their streams. So
//! a spool registers itself in the table `spool`, and every writer checks that table first. Gateways hold
//! [`WRITERS_LOCK`] in shared mode while they are connected, so that none of them can already be writing when a
//! spool registers.

use std::time::Duration;

use sqlx::Row;

use super::admit::clock_row;
use super::audit::close_sessions;
use super::errors::{OpenError, open_error};
use super::identity::mark_replaced;
use super::link::Link;
use super::open::{bring_up_to_date, connect};
use super::timestamp::Timestamp;
use super::write::Writer;
use super::{PostgresSettings, PostgresStore, SpoolClaim, classify, run};
use crate::config::store_url::PostgresUrl;
use crate::store::sqlite::spool::{
    DeviceRow, SchemaRow, SeriesRow, SpoolIdentity, Standing, StreamRow,
};
use crate::store::{DeviceId, SeriesId, StoreError, StreamId};
use crate::time::{ClockStep, Origin, SystemClock};

/// Advisory lock "FGat": shared by gateways that write, exclusive for a gateway that registers its spool.
const WRITERS_LOCK: i64 = 1_179_083_124;
/// How long to wait for the lock, which the server may still hold for a killed gateway.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Verifies that a connection may write; `spool` is the spool it writes for, if any.
pub(super) async fn enter(
    conn: &mut Link,
    url: &PostgresUrl,
    spool: Option<&SpoolClaim>,
) -> Result<(), OpenError> {
    let sql = |error| open_error(url, error);
    if spool.is_none() {
        // Waits only while a spool registers.
        let lock = sqlx::query("SELECT pg_advisory_lock_shared($1)").bind(WRITERS_LOCK);
        lock.execute(&mut *conn).await.map_err(sql)?;
    }
    let registered = registered(conn).await.map_err(sql)?;
    let url = || url.clone();
    match (registered, spool) {
        (Some((id, host, _)), spool) if spool.is_none_or(|spool| spool.id != id) => {
            Err(OpenError::Spooled { url: url(), host })
        }
        (Some((.., instance)), Some(spool)) if spool.instance != instance => {
            Err(OpenError::SpoolCopied { url: url() })
        }
        (None, Some(_)) => Err(OpenError::SpoolForgotten { url: url() }),
        (None, None) => Ok(()),
        (Some(_), _) => name_connection(conn).await.map_err(sql),
    }
}

/// Records that this connection drains a spool, so that a copy of the spool detects it.
async fn name_connection(conn: &mut Link) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE spool SET backend_pid = pid, backend_start = pg_stat_activity.backend_start
         FROM pg_stat_activity WHERE pid = pg_backend_pid()",
    )
    .execute(conn)
    .await
    .map(drop)
}

/// Request from a gateway that starts with a spool or reconnects with it.
#[derive(Clone, Debug)]
pub(in crate::store) struct ClaimRequest {
    pub(in crate::store) identity: SpoolIdentity,
    /// Whether the file differs from the one that was claimed last, because it was copied or moved.
    pub(in crate::store) is_other_file: bool,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Claimed {
    /// Count in the database, see [`SpoolClaim::drained`].
    pub(in crate::store) drained: i64,
    /// Whether the database lacks frames that the spool once drained.
    pub(in crate::store) is_restored: bool,
}

/// Makes this gateway the one that drains its spool into the database. Of several copies of one spool, the
/// first one wins.
///
/// # Errors
/// As for [`PostgresStore::open`]; [`OpenError::SpoolCopied`].
pub(in crate::store) async fn claim(
    settings: &PostgresSettings,
    request: &ClaimRequest,
) -> Result<Claimed, OpenError> {
    let url = &settings.url;
    let sql = |error| open_error(url, error);
    let mut conn = connect(url, settings.options.allow_postgres_data_loss).await?;
    bring_up_to_date(&mut conn, url).await?;
    // On an error, the dropped connection rolls this back.
    run(&mut conn, "BEGIN").await.map_err(sql)?;
    let found: Option<(String, String, String, i64, bool)> = sqlx::query_as(
        "SELECT id, host, instance, drained, EXISTS (
             SELECT FROM pg_stat_activity AS a
             WHERE a.pid = spool.backend_pid AND a.backend_start = spool.backend_start
         ) FROM spool FOR UPDATE",
    )
    .fetch_optional(&mut conn)
    .await
    .map_err(sql)?;
    let url = || settings.url.clone();
    let Some((id, host, instance, drained, is_fed)) = found else {
        return Err(OpenError::SpoolForgotten { url: url() });
    };
    let SpoolIdentity {
        id: own_id,
        instance: former,
        next_instance: next,
        drained: known,
        ..
    } = &request.identity;
    if id != *own_id {
        return Err(OpenError::Spooled { url: url(), host });
    }
    let is_known = instance == *former || instance == *next;
    if !is_known || (request.is_other_file && is_fed && instance != *next) {
        return Err(OpenError::SpoolCopied { url: url() });
    }
    let is_restored = drained < *known;
    let claimed = sqlx::query("UPDATE spool SET instance = $1")
        .bind(next)
        .execute(&mut conn);
    claimed.await.map_err(sql)?;
    if is_restored {
        mark_replaced(&mut conn).await.map_err(sql)?;
    }
    run(&mut conn, "COMMIT").await.map_err(sql)?;
    conn.close().await;
    Ok(Claimed {
        drained,
        is_restored,
    })
}

/// Reads the positions of all streams in the database, for a spool that was restored to an earlier state.
pub(in crate::store) async fn read_standing(
    settings: &PostgresSettings,
) -> Result<Standing, OpenError> {
    let url = &settings.url;
    let mut conn = connect(url, settings.options.allow_postgres_data_loss).await?;
    let standing = standing(&mut conn).await;
    standing.map_err(|error| open_error(url, error))
}

/// Registers `spool` as the only writer of the database, and sends it the positions of all streams.
///
/// # Errors
/// As for [`PostgresStore::open`]; another gateway writes to the database, with a spool or directly.
pub(in crate::store) async fn register(
    settings: &PostgresSettings,
    spool: &str,
) -> Result<Standing, OpenError> {
    let url = &settings.url;
    let mut conn = connect(url, settings.options.allow_postgres_data_loss).await?;
    bring_up_to_date(&mut conn, url).await?;
    await_writers(&mut conn, url).await?;
    let taken = sqlx::query(
        "INSERT INTO spool (id, host)
         VALUES ($1, coalesce(host(inet_client_addr()), 'the host of the database'))
         ON CONFLICT DO NOTHING",
    )
    .bind(spool)
    .execute(&mut conn)
    .await;
    taken.map_err(|error| open_error(url, error))?;
    let claim = SpoolClaim {
        id: spool.to_owned(),
        instance: String::new(),
        drained: 0,
        found_drained: 0,
    };
    enter(&mut conn, url, Some(&claim)).await?;
    // From now on the spool reports which sessions are open.
    let now_us = SystemClock::start().now().utc_us;
    let closed = close_sessions(&mut conn, &settings.gateway, now_us).await;
    closed.map_err(|error| open_error(url, error))?;
    let standing = standing(&mut conn).await;
    let standing = standing.map_err(|error| open_error(url, error))?;
    // Closing the connection releases the lock.
    conn.close().await;
    Ok(standing)
}

/// Releases the database for other gateways. The spool must be empty and stay empty.
pub(in crate::store) async fn release(
    settings: &PostgresSettings,
    spool: &SpoolIdentity,
) -> Result<(), OpenError> {
    let url = &settings.url;
    let mut conn = connect(url, settings.options.allow_postgres_data_loss).await?;
    bring_up_to_date(&mut conn, url).await?;
    // A copy of the spool may have taken over.
    let released = sqlx::query("DELETE FROM spool WHERE id = $1 AND instance IN ($2, $3)")
        .bind(&spool.id)
        .bind(&spool.instance)
        .bind(&spool.next_instance);
    let released = released.execute(&mut conn).await;
    released.map_err(|error| open_error(url, error))?;
    conn.close().await;
    Ok(())
}

/// Returns the id, host and instance of the registered spool.
async fn registered(conn: &mut Link) -> Result<Option<(String, String, String)>, sqlx::Error> {
    sqlx::query_as("SELECT id, host, instance FROM spool")
        .fetch_optional(conn)
        .await
}

/// Takes the exclusive lock: then no gateway is connected that has not checked the table `spool`.
async fn await_writers(conn: &mut Link, url: &PostgresUrl) -> Result<(), OpenError> {
    let patience_ends = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        let lock = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(WRITERS_LOCK);
        let is_alone = lock.fetch_one(&mut *conn).await;
        if is_alone.map_err(|error| open_error(url, error))? {
            return Ok(());
        }
        if tokio::time::Instant::now() > patience_ends {
            return Err(OpenError::InUse { url: url.clone() });
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
}

async fn standing(conn: &mut Link) -> Result<Standing, sqlx::Error> {
    let drained = sqlx::query_scalar("SELECT coalesce(max(drained), 0) FROM spool");
    let mut standing = Standing {
        drained: drained.fetch_one(&mut *conn).await?,
        ..Standing::default()
    };
    let devices = "SELECT id, name, enabled, firmware, first_seen_at, last_seen_at FROM devices";
    for row in sqlx::query(devices).fetch_all(&mut *conn).await? {
        let time_us = |column| -> Result<Option<i64>, sqlx::Error> {
            let time: Option<Timestamp> = row.try_get(column)?;
            Ok(time.map(|time| time.0))
        };
        let device = DeviceRow {
            name: row.try_get(1)?,
            is_enabled: row.try_get::<i32, _>(2)? != 0,
            firmware: row.try_get(3)?,
            first_seen_us: time_us(4)?,
            last_seen_us: time_us(5)?,
        };
        standing.devices.push((DeviceId(row.try_get(0)?), device));
    }
    let streams = "SELECT device_id, stream, durable_seq, created_at FROM streams";
    for row in sqlx::query(streams).fetch_all(&mut *conn).await? {
        standing.streams.push(StreamRow {
            device: DeviceId(row.try_get(0)?),
            number: row.try_get(1)?,
            durable_seq: row.try_get(2)?,
            created_us: row.try_get::<Timestamp, _>(3)?.0,
        });
    }
    let schemas = "SELECT device_id, schema, hash, declaration FROM schemas";
    for row in sqlx::query(schemas).fetch_all(&mut *conn).await? {
        let schema: i32 = row.try_get(1)?;
        standing.schemas.push(SchemaRow {
            device: DeviceId(row.try_get(0)?),
            schema: u16::try_from(schema).map_err(|error| sqlx::Error::Decode(error.into()))?,
            hash: row.try_get(2)?,
            declaration: row.try_get(3)?,
        });
    }
    let series = "SELECT device_id, channel, unit, kind FROM series";
    for row in sqlx::query(series).fetch_all(&mut *conn).await? {
        standing.series.push(SeriesRow {
            device: DeviceId(row.try_get(0)?),
            channel: row.try_get(1)?,
            unit: row.try_get(2)?,
            kind: row.try_get(3)?,
        });
    }
    let clocks = "SELECT device_id, boot, offset_us, delay_us, measured_at, timeline, origin_us,
         valid_from_us FROM clocks";
    for row in sqlx::query(clocks).fetch_all(&mut *conn).await? {
        let clock = (DeviceId(row.try_get(0)?), clock_row(&row)?);
        standing.clocks.push(clock);
    }
    let steps =
        "SELECT timeline, origin_us, since_at, before_at, after_at FROM clock_steps ORDER BY id";
    for row in sqlx::query(steps).fetch_all(&mut *conn).await? {
        standing.steps.push(ClockStep {
            origin: Origin {
                timeline: row.try_get(0)?,
                at_us: row.try_get(1)?,
            },
            since_us: row.try_get::<Timestamp, _>(2)?.0,
            before_us: row.try_get::<Timestamp, _>(3)?.0,
            after_us: row.try_get::<Timestamp, _>(4)?.0,
        });
    }
    Ok(standing)
}

/// Rows that a spool created and that the database may lack. Each is found or inserted on its own, so that
/// repeating the call is harmless. The ids are returned in the order of the rows.
impl PostgresStore {
    pub(in crate::store) async fn adopt_devices(
        &mut self,
        rows: &[&DeviceRow],
    ) -> Result<Vec<DeviceId>, StoreError> {
        let mut writer = self.writer().await?;
        let adopted = adopt_devices(&mut writer.conn, rows).await;
        self.keep_unless_failed(writer, adopted)
    }

    pub(in crate::store) async fn adopt_streams(
        &mut self,
        rows: &[StreamRow],
    ) -> Result<Vec<StreamId>, StoreError> {
        let mut writer = self.writer().await?;
        let adopted = adopt_streams(&mut writer.conn, rows).await;
        self.keep_unless_failed(writer, adopted)
    }

    pub(in crate::store) async fn adopt_series(
        &mut self,
        rows: &[SeriesRow],
    ) -> Result<Vec<SeriesId>, StoreError> {
        let mut writer = self.writer().await?;
        let adopted = adopt_series(&mut writer.conn, rows).await;
        self.keep_unless_failed(writer, adopted)
    }

    pub(in crate::store) async fn adopt_schemas(
        &mut self,
        rows: &[SchemaRow],
    ) -> Result<(), StoreError> {
        let mut writer = self.writer().await?;
        let adopted = adopt_schemas(&mut writer.conn, rows).await;
        self.keep_unless_failed(writer, adopted)
    }

    fn keep_unless_failed<T>(
        &mut self,
        writer: Writer,
        done: Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let done = done.map_err(|error| classify(&error.into()))?;
        self.writer = Some(writer);
        Ok(done)
    }
}

async fn adopt_devices(conn: &mut Link, rows: &[&DeviceRow]) -> Result<Vec<DeviceId>, sqlx::Error> {
    let time = |us: Option<i64>| us.map(Timestamp);
    let mut ids = Vec::with_capacity(rows.len());
    for row in rows {
        // The database decides whether a device may connect.
        let id = sqlx::query_scalar(
            "INSERT INTO devices (name, firmware, first_seen_at, last_seen_at)
             VALUES ($1, $2, $3, $4)
             ON CONFLICT (name) DO UPDATE SET
                 firmware = coalesce(excluded.firmware, devices.firmware),
                 first_seen_at = least(devices.first_seen_at, excluded.first_seen_at),
                 last_seen_at = greatest(devices.last_seen_at, excluded.last_seen_at)
             RETURNING id",
        )
        .bind(&row.name)
        .bind(&row.firmware)
        .bind(time(row.first_seen_us))
        .bind(time(row.last_seen_us))
        .fetch_one(&mut *conn)
        .await?;
        ids.push(DeviceId(id));
    }
    Ok(ids)
}

async fn adopt_streams(conn: &mut Link, rows: &[StreamRow]) -> Result<Vec<StreamId>, sqlx::Error> {
    let mut ids = Vec::with_capacity(rows.len());
    for row in rows {
        let id = sqlx::query_scalar(
            "INSERT INTO streams (device_id, stream, created_at) VALUES ($1, $2, $3)
             ON CONFLICT (device_id, stream) DO UPDATE SET created_at = streams.created_at
             RETURNING id",
        )
        .bind(row.device.0)
        .bind(row.number)
        .bind(Timestamp(row.created_us))
        .fetch_one(&mut *conn)
        .await?;
        ids.push(StreamId(id));
    }
    Ok(ids)
}

async fn adopt_series(conn: &mut Link, rows: &[SeriesRow]) -> Result<Vec<SeriesId>, sqlx::Error> {
    let mut ids = Vec::with_capacity(rows.len());
    for row in rows {
        let id = sqlx::query_scalar(
            "INSERT INTO series (device_id, channel, unit, kind) VALUES ($1, $2, $3, $4)
             ON CONFLICT (device_id, channel, unit, kind) DO UPDATE SET kind = excluded.kind
             RETURNING id",
        )
        .bind(row.device.0)
        .bind(&row.channel)
        .bind(&row.unit)
        .bind(&row.kind)
        .fetch_one(&mut *conn)
        .await?;
        ids.push(SeriesId(id));
    }
    Ok(ids)
}

async fn adopt_schemas(conn: &mut Link, rows: &[SchemaRow]) -> Result<(), sqlx::Error> {
    for row in rows {
        sqlx::query(
            "INSERT INTO schemas (device_id, schema, hash, declaration)
             VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        )
        .bind(row.device.0)
        .bind(i32::from(row.schema))
        .bind(&row.hash)
        .bind(&row.declaration)
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}
