//! Postgres plans for common queries: they read only the partitions of the requested time,
//! by their indexes.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::database::{PgDatabase, Session};
use crate::support::gateway::Gateway;
use crate::support::messages::readings_at;

/// Number of steps of readings; the steps are short enough that no month is empty.
const STEPS: i64 = 7;
const STEP_US: i64 = 28 * 86_400_000_000;

/// A partition that is read, and the kind of scan.
type Scan = (String, String);

/// Collects every scan of a partition of `readings`, and of other large tables.
fn scans(plan: &Value, found: &mut BTreeSet<Scan>) {
    match plan {
        Value::Array(parts) => parts.iter().for_each(|part| scans(part, found)),
        Value::Object(node) => {
            if let (Some(Value::String(table)), Some(Value::String(kind))) =
                (node.get("Relation Name"), node.get("Node Type"))
                && (table.starts_with("readings") || table == "frames")
                // In the plan of an executed query, count only the parts that ran.
                && node.get("Actual Loops") != Some(&Value::from(0.0))
                && node.get("Actual Loops") != Some(&Value::from(0))
            {
                found.insert((table.clone(), kind.clone()));
            }
            node.values().for_each(|value| scans(value, found));
        }
        _ => {}
    }
}

/// Asserts that a query reads `partitions` and possibly the default one, by their indexes.
fn assert_reads(session: &mut Session, sql: &str, partitions: &[String]) {
    let plan = session.explain(sql);
    assert_plan_reads(&plan, sql, partitions);
}

fn assert_plan_reads(plan: &Value, sql: &str, partitions: &[String]) {
    let mut found = BTreeSet::new();
    scans(plan, &mut found);
    let whole: Vec<_> = found
        .iter()
        .filter(|(_, kind)| kind == "Seq Scan")
        .collect();
    let read: BTreeSet<&str> = found
        .iter()
        .map(|(table, _)| table.as_str())
        .filter(|table| !["frames", "readings_default"].contains(table))
        .collect();
    let wanted: BTreeSet<&str> = partitions.iter().map(String::as_str).collect();
    assert_eq!(read, wanted, "{sql}\n{plan:#}");
    assert!(whole.is_empty(), "{whole:?}: {sql}\n{plan:#}");
}

/// Creates a store with a reading every five minutes of the last months, in four channels of some devices.
fn filled() -> PgDatabase {
    let mut database = PgDatabase::create();
    let gateway = Gateway::start(&["--store", &database.url()]);
    let now_us = jiff::Timestamp::now().as_microsecond();
    for device in 0..5 {
        let (mut link, _) = gateway.connect(&format!("pump-{device}"));
        for step in 0..STEPS {
            let seq = step as u64 + 1;
            link.send(&readings_at(seq, now_us - step * STEP_US, &[1]));
        }
        link.expect_ack(STEPS as u64);
    }
    drop(gateway);
    let session = database.session();
    session.execute(
        "INSERT INTO readings
         SELECT s.id, ts, 1024, 1.5 FROM series AS s,
             generate_series(now() - interval '160 days', now(), interval '5 min') AS ts;
         INSERT INTO reading_hours
         SELECT generate_series(date_trunc('hour', now()) - interval '160 days', now(), interval '1 hour')
         ON CONFLICT DO NOTHING;
         INSERT INTO frames
         SELECT n, 1000000, n, 17, now(), 1, 0, 0 FROM generate_series(1000000, 1050000) AS n;
         ANALYZE",
    );
    database
}

/// Returns the names of the partitions from `first` to `last` months ago.
fn partitions(session: &mut Session, first: i64, last: i64) -> Vec<String> {
    let names: Vec<(String,)> = session.rows(&format!(
        "SELECT to_char(date_trunc('month', now() AT TIME ZONE 'UTC') - n * interval '1 month',
             '\"readings_\"YYYYMM')
         FROM generate_series({last}, {first}) AS n"
    ));
    names.into_iter().map(|name| name.0).collect()
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn queries_read_the_partitions_of_their_time_by_index() {
    let mut database = filled();
    let session = database.session();
    session.execute("SET timezone = 'UTC'");
    let month = |n: u32| format!("date_trunc('month', now()) - interval '{n} months'");
    let (from, to) = (month(1), month(0));
    let last = partitions(session, 1, 1);
    let some = partitions(session, 4, 2);
    let of_pump = "SELECT ts, value FROM telemetry WHERE device = 'pump-3' AND channel = 'level'";
    let range = format!("AND ts >= {from} AND ts < {to}");
    assert_reads(session, &format!("{of_pump} {range}"), &last);
    let range = format!("AND ts >= {} AND ts < {from} ORDER BY ts", month(4));
    assert_reads(session, &format!("{of_pump} {range}"), &some);
    // A filter on hours reads the same ones, through pruning at run time.
    let hourly = format!(
        "SELECT * FROM telemetry_hourly WHERE device = 'pump-3' AND channel = 'level' \
         AND hour >= {from} AND hour < {from} + interval '5 hours'"
    );
    let plan = session.explain_run(&hourly);
    assert_plan_reads(&plan, &hourly, &last);
    // With literal times, and all columns of the view.
    let (from, to): (String, String) = session
        .rows(&format!(
            "SELECT ({from})::date::text, ({from})::date::text || ' 12:00'"
        ))
        .remove(0);
    let sql = format!(
        "SELECT * FROM telemetry WHERE device = 'pump-3' AND channel = 'level' \
         AND ts >= '{from}' AND ts < '{to}'"
    );
    assert_reads(session, &sql, &last);
    // All devices, the last five minutes.
    let sql = "SELECT device, channel, ts, value FROM telemetry \
               WHERE ts >= now() - interval '5 minutes' AND ts <= now()";
    let started_on: Vec<String> = {
        let five = "SELECT DISTINCT to_char(at, '\"readings_\"YYYYMM') FROM \
                    (VALUES (now()), (now() - interval '5 minutes')) AS times (at)";
        let names: Vec<(String,)> = session.rows(five);
        names.into_iter().map(|name| name.0).collect()
    };
    assert_reads(session, sql, &started_on);
}
