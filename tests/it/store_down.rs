//! A store that is unavailable for some time: devices have to wait, nothing is acknowledged, and when
//! it is back everything is stored once.

use std::path::Path;
use std::time::{Duration, Instant};

use fieldgate_protocol::error::Code;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};
use tokio::runtime::{Builder, Runtime};

use crate::support::client::{Heard, Link};
use crate::support::gateway::Gateway;
use crate::support::messages::readings;

/// Expects the NACK of an outage: nothing past `durable_seq` is stored.
pub fn expect_store_down(link: &mut Link, durable_seq: u64) {
    loop {
        match link.hear() {
            Heard::Nack {
                code,
                expected_seq,
                retry_after_ms,
                ..
            } => {
                let nack = (code, expected_seq);
                assert_eq!(nack, (Code::StoreDown as u8, durable_seq + 1));
                assert!(retry_after_ms > 0);
                return;
            }
            Heard::Ack { seq, .. } if seq <= durable_seq => {}
            other => panic!("{other:?} while nothing can be stored"),
        }
    }
}

/// Resends `frames` as often as necessary, until number `last` is acknowledged.
pub fn resend_until_acked(link: &mut Link, frames: &[u8], last: u64, patience: Duration) {
    let began = Instant::now();
    link.send(frames);
    loop {
        match link.hear() {
            Heard::Ack { seq, .. } if seq == last => break,
            Heard::Ack { .. } => {}
            Heard::Nack { code, .. } if code == Code::StoreDown as u8 => link.send(frames),
            other => panic!("{other:?} instead of an ACK"),
        }
    }
    let waited = began.elapsed();
    assert!(waited < patience, "only after {waited:?}");
}

/// Another program with an open write transaction.
struct Writer {
    runtime: Runtime,
    connection: SqliteConnection,
}

impl Writer {
    fn begin(path: &Path) -> Writer {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let options = SqliteConnectOptions::new().filename(path);
        let connection = runtime.block_on(options.connect()).expect("a database");
        let mut writer = Writer {
            runtime,
            connection,
        };
        writer.execute("BEGIN IMMEDIATE");
        writer
    }

    fn execute(&mut self, sql: &'static str) {
        let statement = sqlx::raw_sql(sql).execute(&mut self.connection);
        self.runtime.block_on(statement).expect(sql);
    }
}

#[test]
fn a_database_that_another_program_locks_is_waited_for() {
    let mut gateway = Gateway::start(&[]);
    let (mut link, _) = gateway.connect("pump");
    link.send(&readings(1));
    link.expect_ack(1);
    let mut writer = Writer::begin(&gateway.data_dir().join("fieldgate.db"));
    let frames: Vec<u8> = (2..=4).flat_map(readings).collect();
    link.send(&frames);
    expect_store_down(&mut link, 1);
    // Once the gateway has noticed the outage, it answers each further attempt immediately.
    link.send(&readings(2));
    expect_store_down(&mut link, 1);
    assert!(gateway.is_alive());
    writer.execute("ROLLBACK");
    resend_until_acked(&mut link, &frames, 4, Duration::from_secs(10));
    let mut database = gateway.database();
    let numbers: Vec<_> = (1..=4).map(|seq| (seq, 17)).collect();
    assert_eq!(database.frames("pump"), numbers);
    let values: Vec<_> = database.readings("pump").iter().map(|row| row.1).collect();
    assert_eq!(values, [Some(0.01), Some(0.02), Some(0.03), Some(0.04)]);
}
