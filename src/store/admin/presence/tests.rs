use super::*;
use crate::store::postgres::tests::Database;
use crate::store::postgres::{PostgresSettings, PostgresStore};
use crate::time::DAY_US;

const MINUTE_US: i64 = 60 * SECOND_US;

#[test]
fn the_interval_is_the_median_of_the_spacings() {
    let learned = |arrivals_s: &[i64]| {
        let arrivals: Vec<i64> = arrivals_s.iter().map(|s| s * SECOND_US).collect();
        interval_of(&arrivals, 40)
    };
    assert_eq!(learned(&[]), None);
    assert_eq!(learned(&[5]), None);
    assert_eq!(learned(&[0, 900]), Some(900));
    assert_eq!(learned(&[0, 900, 1800, 9000, 9900]), Some(900));
    // A steady stream, even with outages, has the keepalive.
    let steady: Vec<i64> = (0..128).map(|n| n * 10).collect();
    assert_eq!(learned(&steady), Some(40));
    let outage: Vec<i64> = (0..128).map(|n| n + n / 100 * 7200).collect();
    assert_eq!(learned(&outage), Some(40));
    let outages: Vec<i64> = (0..128).map(|n| n * 10 + n / 32 * 7200).collect();
    assert_eq!(learned(&outages), Some(40));
    // Bursts of 30 frames, one each hour.
    let bursts: Vec<i64> = (0..128).map(|n| n % 30 + n / 30 * 3600).collect();
    assert_eq!(learned(&bursts), Some(3600));
    // A burst from a device that was disconnected shows no interval.
    assert_eq!(learned(&[0; 128]), None);
}

fn watch(store: &StoreUrl) -> PresenceWatch {
    PresenceWatch {
        started_us: 0,
        ..PresenceWatch::new(store, None, Arc::default(), 40)
    }
}

struct Site {
    store: StoreUrl,
    connection: Connection,
}

impl Site {
    async fn new(store: StoreUrl) -> Site {
        let connection = open(&store).await.unwrap();
        Site { store, connection }
    }

    async fn run(&mut self, sql: &str, arguments: &[Argument<'_>]) {
        self.connection.step(sql, arguments).await.unwrap();
    }

    /// Adds devices with the ids from 1 on, each with a stream.
    async fn add_devices(&mut self, count: i64) {
        let numbers =
            "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < $1)";
        for insert in [
            "INSERT INTO devices (name) SELECT 'd' || x FROM n ORDER BY x",
            "INSERT INTO streams (device_id, stream, durable_seq, created_at)
             SELECT id, 1, 0, $2 FROM devices CROSS JOIN (SELECT max(x) FROM n) AS m",
        ] {
            let arguments = [count.into(), Argument::Time(0)];
            let used = 1 + usize::from(insert.contains("$2"));
            self.run(&format!("{numbers} {insert}"), &arguments[..used])
                .await;
        }
    }

    /// Stores a frame of each device with an id up to `last`.
    async fn frames(&mut self, seq: i64, last: i64, at_us: i64) {
        let sql = "INSERT INTO frames (id, stream_id, seq, type, received_at, readings)
            SELECT st.device_id * 1000 + $1, st.id, $1, 17, $2, 0 FROM streams AS st WHERE st.device_id <= $3";
        let arguments = [seq.into(), Argument::Time(at_us), last.into()];
        self.run(sql, &arguments).await;
        let sql = "UPDATE streams SET durable_seq = $1 WHERE device_id <= $2";
        self.run(sql, &[seq.into(), last.into()]).await;
    }

    async fn round(&mut self, watch: &mut PresenceWatch) -> Vec<i64> {
        let found = watch.round(&mut self.connection, now_us()).await.unwrap();
        counts(&found)
    }

    async fn events(&mut self, kind: &str, detail: &str) -> i64 {
        let sql = "SELECT count(*) FROM device_events WHERE kind = $1 AND detail LIKE $2";
        self.connection
            .integer(sql, &[kind.into(), detail.into()])
            .await
            .unwrap()
    }

    async fn integer(&mut self, sql: &str) -> i64 {
        self.connection.integer(sql, &[]).await.unwrap()
    }
}

fn now_us() -> i64 {
    SystemClock::start().now().utc_us
}

/// Returns the number of devices in each state.
fn counts(found: &Found) -> Vec<i64> {
    let count = |state| found.devices.get(&state).copied().unwrap_or_default();
    Presence::ALL.map(count).into()
}

async fn every_change_is_recorded_once(store: StoreUrl) {
    const DEVICES: i64 = 10_000;
    let mut site = Site::new(store).await;
    site.add_devices(DEVICES).await;
    site.frames(1, DEVICES - 1, now_us()).await;
    let mut one = watch(&site.store);
    assert_eq!(site.round(&mut one).await, [DEVICES - 1, 0, 0, 1, 0]);
    assert_eq!(
        site.events("presence", "from never to online").await,
        DEVICES - 1
    );
    // All devices disappear together, and two gateways notice it.
    site.run(
        "UPDATE frames SET received_at = $1",
        &[Argument::Time(now_us() - 5 * MINUTE_US)],
    )
    .await;
    let mut two = watch(&site.store);
    let mut other = open(&site.store).await.unwrap();
    let (found, _) = tokio::join!(
        one.round(&mut site.connection, now_us()),
        two.round(&mut other, now_us()),
    );
    assert_eq!(counts(&found.unwrap()), [0, DEVICES - 1, 0, 1, 0]);
    assert_eq!(
        site.events("presence", "from online to late").await,
        DEVICES - 1
    );
    // All devices except one return and stay online.
    site.frames(2, DEVICES - 2, now_us()).await;
    for _ in 0..2 {
        assert_eq!(site.round(&mut one).await, [DEVICES - 2, 1, 0, 1, 0]);
    }
    assert_eq!(
        site.events("presence", "from late to online").await,
        DEVICES - 2
    );
    assert_eq!(site.events("presence", "%").await, 3 * DEVICES - 4);
}

async fn the_view_shows_presence(store: StoreUrl) {
    let mut site = Site::new(store).await;
    site.add_devices(8).await;
    let ago = |us: i64| now_us() - us;
    site.frames(1, 7, ago(3 * DAY_US)).await;
    site.frames(2, 5, ago(20 * MINUTE_US)).await;
    site.run("UPDATE devices SET enabled = 0 WHERE id = 1", &[])
        .await;
    let seen = "UPDATE devices SET last_seen_at = $1 WHERE id = 2";
    site.run(seen, &[Argument::Time(ago(MINUTE_US))]).await;
    let ended = "INSERT INTO device_events (device_id, at, kind, code, detail) VALUES (3, $1, 'disconnected', 0, '')";
    site.run(ended, &[Argument::Time(ago(MINUTE_US))]).await;
    let open = "INSERT INTO sessions (id, device_id, gateway, peer, connected_at) VALUES (1, 7, '', '', $1)";
    site.run(open, &[Argument::Time(ago(DAY_US))]).await;
    site.connection.begin().await.unwrap();
    for (name, interval_s) in [("d4", Some(600)), ("d6", Some(86_400 * 2))] {
        assert!(
            set_interval(&mut site.connection, name, interval_s, 0)
                .await
                .unwrap()
        );
    }
    assert!(
        !set_interval(&mut site.connection, "nothing", None, 0)
            .await
            .unwrap()
    );
    site.connection.commit().await.unwrap();
    let sql = "SELECT presence, interval_s, is_interval_set FROM device_status ORDER BY device";
    let rows = site.connection.rows(sql, &[]).await.unwrap();
    let row = |state: &str, interval: i64, is_set: i64| {
        Row(vec![state.into(), interval.into(), is_set.into()])
    };
    let mut expected = [
        row("disabled", 40, 0),
        row("online", 40, 0),
        row("online", 40, 0),
        row("online", 600, 1),
        row("late", 40, 0),
        // Silent only if it is late, too.
        row("online", 172_800, 1),
        row("online", 40, 0),
        row("never", 40, 0),
    ];
    assert_eq!(rows, expected);
    site.run("DELETE FROM sessions", &[]).await;
    site.connection.begin().await.unwrap();
    let learned = set_interval(&mut site.connection, "d4", None, 0).await;
    assert!(learned.unwrap());
    site.connection.commit().await.unwrap();
    expected[3] = row("late", 40, 0);
    expected[6] = row("silent", 40, 0);
    assert_eq!(site.connection.rows(sql, &[]).await.unwrap(), expected);
    assert_eq!(site.events("interval_set", "600 s").await, 1);
    assert_eq!(site.events("interval_set", "learned").await, 1);
}

async fn intervals_are_learned_and_survive_a_start(store: StoreUrl) {
    let mut site = Site::new(store).await;
    site.add_devices(2).await;
    let mut first = watch(&site.store);
    for seq in 1..=4 {
        site.frames(seq, 1, now_us() - (5 - seq) * 15 * MINUTE_US)
            .await;
    }
    let mut now = now_us();
    first.round(&mut site.connection, now).await.unwrap();
    assert_eq!(
        site.integer("SELECT learned_s FROM presence WHERE device_id = 1")
            .await,
        900
    );
    assert_eq!(
        site.integer("SELECT learned_s FROM presence WHERE device_id = 2")
            .await,
        40
    );
    assert_eq!(site.round(&mut first).await, [1, 0, 0, 1, 0]);
    // After a start, a gateway waits for three intervals before it reports a device as late.
    site.run(
        "UPDATE frames SET received_at = $1",
        &[Argument::Time(now - 4 * 15 * MINUTE_US)],
    )
    .await;
    let mut again = watch(&site.store);
    again.started_us = now;
    assert_eq!(site.round(&mut again).await, [1, 0, 0, 1, 0]);
    now += 46 * MINUTE_US;
    let found = again.round(&mut site.connection, now).await.unwrap();
    assert_eq!(counts(&found), [0, 1, 0, 1, 0]);
}

async fn twins_are_reported_once_an_hour(store: StoreUrl) {
    let mut site = Site::new(store).await;
    site.add_devices(2).await;
    let mut watch = watch(&site.store);
    let now = now_us();
    let ended = "INSERT INTO device_events (device_id, at, kind, code, detail)
        SELECT id, $1, 'disconnected', 41, '' FROM devices WHERE id <= $2";
    for (at_us, last) in [(now - 20 * MINUTE_US, 2), (now, 1)] {
        for _ in 0..TAKEN_OVER_MIN {
            site.run(ended, &[Argument::Time(at_us), last.into()]).await;
        }
    }
    for (later_us, twins, events) in [(0, 1, 1), (MINUTE_US, 1, 1), (61 * MINUTE_US, 0, 1)] {
        let found = watch.round(&mut site.connection, now + later_us).await;
        assert_eq!(found.unwrap().twins, twins);
        assert_eq!(site.events("twin", "%").await, events);
    }
    for _ in 0..TAKEN_OVER_MIN {
        let at = Argument::Time(now + 61 * MINUTE_US);
        site.run(ended, &[at, 1.into()]).await;
    }
    let later = watch
        .round(&mut site.connection, now + 62 * MINUTE_US)
        .await;
    assert_eq!(later.unwrap().twins, 1);
    assert_eq!(site.events("twin", "two devices use this name%").await, 2);
}

/// Devices of a gateway that died go late; those of one that runs, and all after an outage of the database, do not.
#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn a_gateway_that_died_does_not_keep_its_devices_online() {
    const DEVICES: i64 = 4000;
    let database = Database::create().await;
    let stores = PostgresStore::open(database.settings()).await.unwrap();
    let mut site = Site::new(StoreUrl::Postgres(database.settings().url)).await;
    site.add_devices(DEVICES).await;
    site.frames(1, DEVICES, now_us() - 3 * DAY_US).await;
    let open = "INSERT INTO sessions (id, device_id, gateway, peer, connected_at)
        SELECT id, id, CASE WHEN id <= $1 THEN 'dead' ELSE 'alive' END, '', $2 FROM devices";
    let connected = Argument::Time(now_us() - 2 * DAY_US);
    site.run(open, &[(DEVICES / 2).into(), connected]).await;
    let watch_of = |gateway: &str| PresenceWatch {
        gateway: Some(gateway.to_owned()),
        ..watch(&site.store)
    };
    let (mut alive, mut dead) = (watch_of("alive"), watch_of("dead"));
    assert_eq!(site.round(&mut dead).await, [DEVICES, 0, 0, 0, 0]);
    assert_eq!(site.round(&mut alive).await, [DEVICES, 0, 0, 0, 0]);
    let ago = |minutes: i64| format!("now() - interval '{minutes} minutes'");
    let set = |id: &str, at: i64, since: i64| {
        let (at, since) = (ago(at), ago(since));
        format!("UPDATE gateways SET alive_at = {at}, alive_since = {since} WHERE id = '{id}'")
    };
    // After an outage of the database, `alive` is the first to return.
    site.run(&set("dead", 5, 60), &[]).await;
    site.run(&set("alive", 5, 60), &[]).await;
    alive.alive_at = None;
    assert_eq!(site.round(&mut alive).await, [DEVICES, 0, 0, 0, 0]);
    // Two minutes later the other has not returned. Its devices were heard until it died.
    site.run(&set("alive", 0, 3), &[]).await;
    let half = DEVICES / 2;
    assert_eq!(site.round(&mut alive).await, [half, half, 0, 0, 0]);
    assert_eq!(site.events("presence", "from online to late").await, half);
    let connected = "SELECT count(*) FROM device_status WHERE state = 'connected'";
    assert_eq!(site.integer(connected).await, half);
    // It starts again, and closes its sessions as of its death.
    drop(stores);
    let settings = PostgresSettings {
        gateway: "dead".to_owned(),
        ..database.settings()
    };
    let _stores = PostgresStore::open(settings).await.unwrap();
    assert_eq!(site.round(&mut dead).await, [half, half, 0, 0, 0]);
    let ended = "SELECT count(*) FROM device_events WHERE kind = 'disconnected'
        AND at BETWEEN now() - interval '6 minutes' AND now() - interval '4 minutes'";
    assert_eq!(site.integer(ended).await, half);
    // Its devices connect to the other gateway.
    let moved = "INSERT INTO sessions (id, device_id, gateway, peer, connected_at)
        SELECT id, id, 'alive', '', now() FROM devices WHERE id <= $1";
    site.run(moved, &[half.into()]).await;
    assert_eq!(site.round(&mut alive).await, [DEVICES, 0, 0, 0, 0]);
    assert_eq!(site.events("presence", "from late to online").await, half);
}

in_both_stores! {
    every_change_is_recorded_once
    the_view_shows_presence
    intervals_are_learned_and_survive_a_start
    twins_are_reported_once_an_hour
}
