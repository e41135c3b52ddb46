//! A silent network: nothing is reset, and nothing arrives. Every operation that waits for the database times
//! out, at any byte, and abandoned backends are terminated at the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;
use crate::config::PostgresOptions;
use crate::store::admin::{Access, Connection, Reconnecting};
use crate::store::conformance::eventually;

/// Maximum time for the server to accept a connection and for each response, in these tests.
const CONNECT: Duration = Duration::from_millis(1500);
const ANSWER: Duration = Duration::from_millis(400);
/// Far longer than timing out takes on a busy machine, and far shorter than an endless wait.
const PATIENCE: Duration = Duration::from_secs(60);
/// Minimum number of points between the first and last byte at which the network goes silent.
const PLACES: u64 = 30;
/// Number of routes tried concurrently; each uses some of the server's connections.
const AT_ONCE: usize = 6;

/// A route to the server.
pub(in crate::store) struct Way {
    state: Arc<State>,
    url: PostgresUrl,
    _carriers: JoinSet<()>,
}

#[derive(Default)]
struct State {
    /// Bytes from the server after which a connection goes silent.
    silent_after: AtomicU64,
    is_silent: AtomicBool,
    /// Bytes from the server so far, over all connections.
    brought: AtomicU64,
}

impl Way {
    /// Creates a route on which each connection goes silent after this many bytes from the server.
    pub(in crate::store) async fn new(database: &Database, silent_after: u64) -> Way {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let direct = database.url();
        let target = direct.options().get_port();
        let address = direct
            .with_password()
            .replace(&format!(":{target}/"), &format!(":{port}/"));
        let StoreUrl::Postgres(url) = address.parse().unwrap() else {
            panic!("not a Postgres URL")
        };
        Backends::of(&url).set_timeouts(CONNECT, ANSWER);
        let state = Arc::new(State::default());
        state.silent_after.store(silent_after, Ordering::Relaxed);
        let mut carriers = JoinSet::new();
        let shared = Arc::clone(&state);
        carriers.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else {
                    continue;
                };
                connections.spawn(carry(client, server, Arc::clone(&shared)));
            }
        });
        Way {
            state,
            url,
            _carriers: carriers,
        }
    }

    pub(in crate::store) fn settings(&self) -> PostgresSettings {
        PostgresSettings {
            url: self.url.clone(),
            options: PostgresOptions {
                postgres_writers: 1,
                allow_postgres_data_loss: true,
                ..PostgresOptions::default()
            },
            bounds: DeviceBounds::default(),
            gateway: "one".to_owned(),
            spool: None,
        }
    }

    /// Silences all existing and new connections.
    pub(in crate::store) fn silence(&self) {
        self.state.is_silent.store(true, Ordering::Relaxed);
    }

    /// Lets new connections through; silent ones stay silent.
    fn heal(&self) {
        self.state.is_silent.store(false, Ordering::Relaxed);
        self.state.silent_after.store(u64::MAX, Ordering::Relaxed);
    }
}

async fn carry(mut client: TcpStream, mut server: TcpStream, state: Arc<State>) {
    let silent_after = state.silent_after.load(Ordering::Relaxed);
    let mut brought = 0;
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    loop {
        let (mut from_client, mut from_server) = (0, 0);
        tokio::select! {
            read = client.read(&mut up) => from_client = read.unwrap_or(0),
            read = server.read(&mut down) => from_server = read.unwrap_or(0),
        }
        if from_client == 0 && from_server == 0 {
            return;
        }
        let is_silent = state.is_silent.load(Ordering::Relaxed);
        if is_silent || brought + from_server as u64 > silent_after {
            // Forward the bytes up to the limit, so that a message breaks off in the middle.
            let rest = silent_after.saturating_sub(brought).min(from_server as u64);
            let _ = client
                .write_all(&down[..rest as usize * usize::from(!is_silent)])
                .await;
            // Both ends stay open and receive nothing, not even the close of the other end.
            return std::future::pending().await;
        }
        brought += from_server as u64;
        state
            .brought
            .fetch_add(from_server as u64, Ordering::Relaxed);
        let sent = match from_server {
            0 => server.write_all(&up[..from_client]).await,
            _ => client.write_all(&down[..from_server]).await,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Runs every operation of a gateway and of the commands once; their results do not matter.
async fn use_all(settings: PostgresSettings) {
    let store = StoreUrl::Postgres(settings.url.clone());
    let query = "SELECT name FROM devices";
    if let Ok(mut stores) = PostgresStore::open(settings).await {
        let mut gateway = stores.remove(0);
        let entry = crate::store::conformance::login("a", 1, 1);
        let batch = Batch {
            logins: vec![entry],
            ..Batch::default()
        };
        let _ = gateway.commit(&batch).await;
        let _ = gateway.close().await;
    }
    let _ = Reconnecting::new(&store).rows(query, &[]).await;
    if let Ok(mut connection) = Connection::open(&store, Access::Read).await {
        let _ = connection.rows(query, &[]).await;
    }
    if let Ok(mut connection) = Connection::open(&store, Access::Write).await {
        let _ = connection.begin().await;
        let _ = connection
            .execute("UPDATE devices SET enabled = 1", &[])
            .await;
        let _ = connection.commit().await;
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn silence_at_any_byte_times_out() {
    let database = Database::create().await;
    open::migrate(&database.url()).await.unwrap();
    let open_way = Way::new(&database, u64::MAX).await;
    Backends::of(&open_way.url).set_timeouts(PATIENCE, PATIENCE);
    let mut stores = PostgresStore::open(open_way.settings()).await.unwrap();
    stores.remove(0).close().await.unwrap();
    let bytes = open_way.state.brought.load(Ordering::Relaxed);
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut tries = JoinSet::new();
    let database = Arc::new(database);
    for place in 0..PLACES {
        let (database, places) = (Arc::clone(&database), Arc::clone(&places));
        tries.spawn(async move {
            let _place = places.acquire().await.unwrap();
            // Each connection is roughly as long as the longest.
            let way = Way::new(&database, place * bytes / PLACES / 2).await;
            let used = timeout(PATIENCE, use_all(way.settings())).await;
            assert!(
                used.is_ok(),
                "waits after {} bytes",
                place * bytes / PLACES / 2
            );
        });
    }
    while let Some(tried) = tries.join_next().await {
        tried.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
async fn backends_abandoned_by_silence_are_terminated() {
    let database = Database::create().await;
    open::migrate(&database.url()).await.unwrap();
    let way = Way::new(&database, u64::MAX).await;
    let mut store = PostgresStore::open(way.settings()).await.unwrap().remove(0);
    let peer = peer(&mut store, "a").await;
    let batch = |seq| Batch {
        entries: vec![peer.readings(seq, &[(1, 1.0)])],
        ..Batch::default()
    };
    store.commit(&batch(1)).await.unwrap();
    // Within a transaction and while connecting: twenty attempts, more than there are slots.
    way.silence();
    for _ in 0..20 {
        let failed = store.commit(&batch(2)).await;
        assert!(
            matches!(failed, Err(StoreError::Transient(_))),
            "{failed:?}"
        );
    }
    let mut server = database.connect().await;
    let count = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name LIKE 'fieldgate%'";
    let mut count = async || -> i64 {
        sqlx::query_scalar(count)
            .fetch_one(&mut server)
            .await
            .unwrap()
    };
    let left = count().await;
    assert!(left <= 20, "{left} connections while the network is silent");
    way.heal();
    let is_stored = async || store.commit(&batch(2)).await.is_ok();
    eventually("new connections work", is_stored).await;
    // One that writes, one that creates partitions, and one that is connecting.
    eventually("abandoned backends are terminated", async || {
        count().await <= 3
    })
    .await;
}
