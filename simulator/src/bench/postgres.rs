//! The bare loop on Postgres: binary COPY on as many connections as the gateway writes with, each for
//! devices of its own. And the database for it all.

use std::ops::Range;
use std::time::{Duration, Instant};

use fieldgate::store::postgres::migrate;
use fieldgate::store::reader::OpenError;
use fieldgate::store::url::PostgresUrl;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};
use tokio::task::JoinSet;

use super::{BACKLOG_US, BATCH, BenchError, CHANNELS, DEVICES, READINGS_OF_FRAME, WINDOW_FRAMES};

/// How long the server may take to let a connection in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A database for this process alone.
pub(super) struct Database {
    server: PostgresUrl,
    own: PostgresUrl,
    name: String,
}

impl Database {
    /// On the server of `server`, a database that exists there. Nothing is made yet.
    pub(super) fn on(server: &PostgresUrl) -> Database {
        let name = format!("fieldgate_bench_{}", std::process::id());
        Database {
            server: server.clone(),
            own: server.with_database(&name),
            name,
        }
    }

    pub(super) fn url(&self) -> &PostgresUrl {
        &self.own
    }

    /// Makes it, empty, whether it was there or not.
    pub(super) async fn make_anew(&self) -> Result<(), BenchError> {
        self.remove().await?;
        let name = &self.name;
        self.tell(format!(
            "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'"
        ))
        .await
    }

    /// Takes it away, also from those who are connected to it.
    pub(super) async fn remove(&self) -> Result<(), BenchError> {
        let name = &self.name;
        self.tell(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            .await
    }

    async fn tell(&self, sql: String) -> Result<(), BenchError> {
        let refused = |error: sqlx::Error| BenchError::Server {
            server: self.server.clone(),
            reason: match error.as_database_error() {
                Some(error) => error.message().to_owned(),
                None => error.to_string(),
            },
        };
        let mut conn = connect(&self.server).await.map_err(refused)?;
        execute(&mut conn, sql).await.map_err(refused)?;
        conn.close().await.map_err(refused)
    }
}

async fn connect(url: &PostgresUrl) -> Result<PgConnection, sqlx::Error> {
    let options = url.options().disable_statement_logging();
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, options.connect()).await;
    let timed_out = || {
        let seconds = CONNECT_TIMEOUT.as_secs();
        std::io::Error::other(format!("no answer within {seconds} s")).into()
    };
    connected.unwrap_or_else(|_| Err(timed_out()))
}

async fn execute(conn: &mut PgConnection, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    let sql = sqlx::raw_sql(AssertSqlSafe(sql.into()));
    sql.execute(conn).await.map(drop)
}

const DAY_US: i64 = 86_400_000_000;
/// Windows of frames in a transaction: about as many readings as the gateway takes at most. Neither fewer
/// nor more were found to be faster.
const WINDOWS: usize = 212;

/// Copies what a fleet of the burst's shape would send, and nothing else; returns readings per second.
pub(super) async fn bare(
    url: &PostgresUrl,
    connections: usize,
    duration: Duration,
) -> Result<f64, BenchError> {
    migrate(url).await.map_err(OpenError::from)?;
    let start_us = jiff::Timestamp::now().as_microsecond() - BACKLOG_US;
    make_partitions(&mut connect(url).await?, start_us).await?;
    let mut copiers = Vec::new();
    for number in 0..connections {
        copiers.push(Copier {
            conn: connect(url).await?,
            number,
            connections,
            start_us,
            windows: 0,
            bytes: Vec::new(),
        });
    }
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for copier in copiers {
        tasks.spawn(copier.copy_until(started + duration));
    }
    let mut frames = 0;
    while let Some(copied) = tasks.join_next().await {
        frames += copied.map_err(std::io::Error::other)??;
    }
    let elapsed_s = started.elapsed().as_secs_f64();
    Ok((frames * READINGS_OF_FRAME) as f64 / elapsed_s)
}

/// For the days of the readings, as the gateway makes them: none are to go to the default partition.
async fn make_partitions(conn: &mut PgConnection, start_us: i64) -> Result<(), sqlx::Error> {
    let first = start_us.div_euclid(DAY_US);
    for day in first..first + 2 {
        let midnight = |day: i64| format!("to_timestamp({})", day * DAY_US / 1_000_000);
        let (from, to) = (midnight(day), midnight(day + 1));
        let table = format!("CREATE TABLE readings_day_{day} PARTITION OF readings");
        execute(conn, format!("{table} FOR VALUES FROM ({from}) TO ({to})")).await?;
    }
    Ok(())
}

/// One connection, and how far it is.
struct Copier {
    conn: PgConnection,
    number: usize,
    connections: usize,
    start_us: i64,
    /// Windows of frames that were copied.
    windows: usize,
    bytes: Vec<u8>,
}

/// A device's frames from `first_seq` on, as many as are in flight at once. The first of them has the
/// id `first_id`.
#[derive(Clone, Copy)]
struct Window {
    device: i64,
    first_seq: i64,
    first_id: i64,
}

impl Window {
    /// Number within its stream and id of each frame.
    fn frames(self) -> impl Iterator<Item = (i64, i64)> {
        (0..WINDOW_FRAMES as i64).map(move |n| (self.first_seq + n, self.first_id + n))
    }
}

/// What a connection copies in its turns. Each device sends a window, and then it is the next one's turn:
/// that is how frames arrive in a burst. They are sorted by device, as the gateway does before it stores
/// them.
fn windows(number: usize, connections: usize, turns: Range<usize>) -> Vec<Window> {
    let devices = (DEVICES as usize - number).div_ceil(connections);
    // Each connection has ids that follow each other, as in the gateway.
    let ids_start = (number as i64) << 40;
    let mut windows: Vec<Window> = turns
        .map(|turn| Window {
            device: (number + turn % devices * connections) as i64,
            first_seq: (turn / devices) as i64 * WINDOW_FRAMES as i64 + 1,
            first_id: ids_start + turn as i64 * WINDOW_FRAMES as i64,
        })
        .collect();
    windows.sort_unstable_by_key(|window| (window.device, window.first_seq));
    windows
}

impl Copier {
    /// Gives back the number of frames.
    async fn copy_until(mut self, end: Instant) -> Result<usize, sqlx::Error> {
        while Instant::now() < end {
            let turns = self.windows..self.windows + WINDOWS;
            self.windows = turns.end;
            let windows = windows(self.number, self.connections, turns);
            execute(&mut self.conn, "BEGIN").await?;
            self.copy_frames(&windows).await?;
            self.copy_readings(&windows).await?;
            execute(&mut self.conn, "COMMIT").await?;
        }
        Ok(self.windows * WINDOW_FRAMES as usize)
    }

    async fn copy_frames(&mut self, windows: &[Window]) -> Result<(), sqlx::Error> {
        let received_at = since_2000(self.start_us + BACKLOG_US).to_be_bytes();
        self.copy("frames", windows, |bytes, window| {
            for (seq, id) in window.frames() {
                bytes.extend_from_slice(&8_i16.to_be_bytes());
                field(bytes, id.to_be_bytes());
                field(bytes, window.device.to_be_bytes());
                field(bytes, seq.to_be_bytes());
                field(bytes, 17_i16.to_be_bytes());
                field(bytes, received_at);
                field(bytes, (READINGS_OF_FRAME as i32).to_be_bytes());
                field(bytes, 0_i16.to_be_bytes());
                field(bytes, 0_i64.to_be_bytes());
            }
        })
        .await
    }

    async fn copy_readings(&mut self, windows: &[Window]) -> Result<(), sqlx::Error> {
        let start = since_2000(self.start_us);
        self.copy("readings", windows, |bytes, window| {
            for channel in 0..i64::from(CHANNELS) {
                let series = window.device * i64::from(CHANNELS) + channel;
                for (seq, id) in window.frames() {
                    for sample in 0..i64::from(BATCH) {
                        let second = seq * i64::from(BATCH) + sample;
                        bytes.extend_from_slice(&4_i16.to_be_bytes());
                        field(bytes, series.to_be_bytes());
                        field(bytes, (start + second * 1_000_000).to_be_bytes());
                        field(bytes, id.to_be_bytes());
                        field(bytes, (second as f64 / 100.0).to_be_bytes());
                    }
                }
            }
        })
        .await
    }

    /// Copies what `write` makes of the windows; what it made of one is sent while it makes the next.
    async fn copy(
        &mut self,
        table: &str,
        windows: &[Window],
        write: impl Fn(&mut Vec<u8>, Window) + Send,
    ) -> Result<(), sqlx::Error> {
        let sql = format!("COPY {table} FROM STDIN (FORMAT binary)");
        let mut copy = self.conn.copy_in_raw(&sql).await?;
        self.bytes.clear();
        self.bytes
            .extend_from_slice(b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0");
        for window in windows {
            write(&mut self.bytes, *window);
            copy.send(self.bytes.as_slice()).await?;
            self.bytes.clear();
        }
        copy.send(&(-1_i16).to_be_bytes()[..]).await?;
        copy.finish().await.map(drop)
    }
}

fn field<const N: usize>(bytes: &mut Vec<u8>, value: [u8; N]) {
    bytes.extend_from_slice(&(N as i32).to_be_bytes());
    bytes.extend_from_slice(&value);
}

/// Microseconds as Postgres counts them.
fn since_2000(time_us: i64) -> i64 {
    time_us - 946_684_800_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_sends_its_frames_once_and_in_order() {
        for connections in [1, 2, 3] {
            let mut seqs = vec![Vec::new(); DEVICES as usize];
            let mut ids = Vec::new();
            for number in 0..connections {
                for start in [0, WINDOWS, 2 * WINDOWS, 3 * WINDOWS] {
                    for window in windows(number, connections, start..start + WINDOWS) {
                        assert_eq!(window.device as usize % connections, number);
                        seqs[window.device as usize].extend(window.frames().map(|(seq, _)| seq));
                        ids.extend(window.frames().map(|(_, id)| id));
                    }
                }
            }
            for seqs in seqs {
                assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>());
            }
            let count = ids.len();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), count);
        }
    }
}
