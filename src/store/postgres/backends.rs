//! Counts what this process has open at a server, and ends there what it has given up.
//!
//! A connection that is given up with a statement on it leaves a process at the server, a backend, that
//! does not notice: it waits for a lock, for a standby, or for a client behind a network that went
//! silent. Each would hold one of the server's connections, and its locks. So a backend that was left is
//! ended by a second, short connection, and until it is known to be gone it counts as open.
//!
//! `pg_terminate_backend` and not `pg_cancel_backend`: a COMMIT that waits for a synchronous standby
//! answers a cancellation with success although the standby has nothing. Termination gives no answer, so
//! the outcome is unknown, and the ledger decides when the batch comes again.
//!
//! Invariants
//! - This process has at most [`SLOTS`] connections to a database and [`SLOTS_PER_WRITER`] for each writer,
//!   with those that it left. To end those it opens one more at a time, which the server ends by itself
//!   after [`UNUSED_TIMEOUT_S`] if the network goes silent in the middle of it.
//! - Every await here has a deadline.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::{ConnectOptions, Connection, PgConnection, Row};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::open::CONNECT_TIMEOUT;
use crate::store::url::PostgresUrl;

/// Connections besides those of writers, in use and left: two readers, one that makes partitions, and room
/// for as many that were left.
const SLOTS: usize = 8;
/// One in use and one that was left.
const SLOTS_PER_WRITER: usize = 2;
/// A connection whose start-up was given up is ended by the server after this long without a statement
/// (`authentication_timeout`, 60 s by default, ends it earlier).
const UNUSED_TIMEOUT_S: u64 = 60;
/// A backend that was left in its start-up is gone after this long, whether the server answers or not.
const STARTUP_LIFE_MAX: Duration = Duration::from_secs(2 * UNUSED_TIMEOUT_S);
/// How long an ended backend may take to go, and how often the server is asked.
const GONE_TIMEOUT: Duration = Duration::from_secs(2);
const GONE_INTERVAL: Duration = Duration::from_millis(20);
/// Wait after an attempt in vain. With the time that an attempt takes, it bounds how many connections such
/// attempts can leave themselves.
const RETRY: Duration = Duration::from_secs(2);

/// The databases that this process talks to, by address.
static KNOWN: LazyLock<Mutex<HashMap<String, Arc<Backends>>>> = LazyLock::new(Mutex::default);

/// The backends of this process at one database; see the module.
pub(super) struct Backends {
    url: PostgresUrl,
    slots: Arc<Semaphore>,
    writers: AtomicUsize,
    left: Mutex<Vec<Left>>,
    is_ending: AtomicBool,
    /// Why what was left could not be ended yet.
    obstacle: Mutex<String>,
    /// The server was reached, or the last backend is gone.
    changed: Notify,
    /// A pooler refuses settings at start-up.
    refuses_options: AtomicBool,
    /// Milliseconds that the server may take to let a connection in, and to go on.
    connect_ms: AtomicUsize,
    answer_ms: AtomicUsize,
}

/// What identifies a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    /// Only its start-up was seen: its application has this name, which is used once.
    Starting(String),
    /// Its process, which a later one may share, and when it began.
    Running { pid: i32, started_us: i64 },
}

/// A backend that was left.
struct Left {
    backend: Backend,
    at: Instant,
    /// Free when it is gone; the connections that end others have none.
    _slot: Option<OwnedSemaphorePermit>,
}

impl Backends {
    /// Returns those of a database.
    pub(super) fn of(url: &PostgresUrl) -> Arc<Backends> {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(Backends {
                url: url.clone(),
                slots: Arc::new(Semaphore::new(SLOTS)),
                writers: AtomicUsize::new(0),
                left: Mutex::default(),
                is_ending: AtomicBool::new(false),
                obstacle: Mutex::default(),
                changed: Notify::new(),
                refuses_options: AtomicBool::new(false),
                connect_ms: AtomicUsize::new(CONNECT_TIMEOUT.as_millis() as usize),
                answer_ms: AtomicUsize::new(super::ANSWER_TIMEOUT.as_millis() as usize),
            })
        };
        let known = known.entry(url.with_password().to_owned());
        Arc::clone(known.or_insert_with(new))
    }

    /// Makes room for this many writers.
    pub(super) fn allow_writers(&self, writers: usize) {
        let before = self.writers.fetch_max(writers, Ordering::Relaxed);
        let more = writers.saturating_sub(before);
        self.slots.add_permits(more * SLOTS_PER_WRITER);
    }

    /// Returns how long the server may take to go on.
    pub(super) fn answer_timeout(&self) -> Duration {
        Duration::from_millis(self.answer_ms.load(Ordering::Relaxed) as u64)
    }

    /// Returns how long a connection, and each step of its set-up, may take.
    pub(super) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_ms.load(Ordering::Relaxed) as u64)
    }

    /// Returns how long a short connection to ask or end something may take.
    fn errand_timeout(&self) -> Duration {
        2 * self.connect_timeout()
    }

    #[cfg(test)]
    pub(super) fn set_timeouts(&self, connect: Duration, answer: Duration) {
        let ms = |timeout: Duration| timeout.as_millis() as usize;
        self.connect_ms.store(ms(connect), Ordering::Relaxed);
        self.answer_ms.store(ms(answer), Ordering::Relaxed);
    }

    /// Waits for room for one more connection; the error is a reason for people.
    pub(super) async fn slot(&self) -> Result<OwnedSemaphorePermit, String> {
        let slot = Arc::clone(&self.slots).acquire_owned();
        match timeout(self.connect_timeout(), slot).await {
            Ok(Ok(slot)) => Ok(slot),
            _ => {
                let obstacle = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
                Err(format!(
                    "{} connections that were given up have not ended there yet: {obstacle}",
                    self.lock().len()
                ))
            }
        }
    }

    /// Connects, with a deadline. The backend counts as left until it is settled.
    pub(super) async fn connect(
        self: &Arc<Self>,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Result<(PgConnection, Tenure), sqlx::Error> {
        let starting = Tenure {
            backend: Backend::Starting(format!("fieldgate {:016x}", random())),
            backends: Arc::clone(self),
            slot,
            is_settled: false,
        };
        let within = self.connect_timeout();
        match timeout(within, self.start_up(starting)).await {
            Ok(connected) => connected,
            Err(_) => Err(no_answer(within)),
        }
    }

    async fn start_up(
        self: &Arc<Self>,
        starting: Tenure,
    ) -> Result<(PgConnection, Tenure), sqlx::Error> {
        let mut options = self.url.options();
        if let Backend::Starting(name) = &starting.backend {
            options = options.application_name(name);
        }
        let options = options.disable_statement_logging();
        if !self.refuses_options.load(Ordering::Relaxed) {
            // Before the first statement: a network may go silent at any byte, and these are for that.
            let limited = options.clone().options([
                (
                    "idle_session_timeout",
                    format!("{UNUSED_TIMEOUT_S}s").as_str(),
                ),
                ("tcp_keepalives_idle", "30"),
                ("tcp_keepalives_interval", "10"),
                ("tcp_keepalives_count", "3"),
            ]);
            match limited.connect().await {
                Err(error) if refuses_options(&error) => {
                    self.refuses_options.store(true, Ordering::Relaxed);
                }
                connected => return starting.settle_if_refused(connected),
            }
        }
        let connected = options.connect().await;
        starting.settle_if_refused(connected)
    }

    /// Takes note of a backend that was left, and has it ended.
    fn leave(self: &Arc<Self>, backend: Backend, slot: Option<OwnedSemaphorePermit>) {
        self.lock().push(Left {
            backend,
            at: Instant::now(),
            _slot: slot,
        });
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if !self.is_ending.swap(true, Ordering::AcqRel) {
            runtime.spawn(Arc::clone(self).end());
        }
    }

    /// Has what was left ended now, because the server is known to answer.
    pub(super) fn reached(&self) {
        self.changed.notify_waiters();
    }

    async fn end(self: Arc<Self>) {
        loop {
            // Registered before the look: what happens in between is noticed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let ended = timeout(self.errand_timeout(), self.end_once()).await;
            let obstacle = match ended {
                Ok(Ok(())) => "they take long to end".to_owned(),
                Ok(Err(error)) => super::open::reason(&error),
                Err(_) => super::open::reason(&no_answer(self.errand_timeout())),
            };
            *self.obstacle.lock().unwrap_or_else(PoisonError::into_inner) = obstacle;
            {
                let mut left = self.lock();
                left.retain(|left| !left.is_over());
                if left.is_empty() {
                    // Under the lock: whoever leaves one from now on begins again.
                    self.is_ending.store(false, Ordering::Release);
                    drop(left);
                    self.changed.notify_waiters();
                    return;
                }
            }
            let _ = timeout(RETRY, changed).await;
        }
    }

    /// Ends what was left so far, and forgets what is gone.
    async fn end_once(self: &Arc<Self>) -> Result<(), sqlx::Error> {
        let backends: Vec<Backend> = self
            .lock()
            .iter()
            .map(|left| left.backend.clone())
            .collect();
        let (mut conn, tenure) = self.connect(None).await?;
        let terminate = format!("SELECT pg_terminate_backend(pid) FROM ({FIND}) AS found");
        find(&mut conn, &terminate, &backends).await?;
        let patience_ends = Instant::now() + GONE_TIMEOUT;
        loop {
            let there = find(&mut conn, FIND, &backends).await?;
            self.lock()
                .retain(|left| !backends.contains(&left.backend) || there.contains(&left.backend));
            if there.is_empty() || Instant::now() > patience_ends {
                break;
            }
            tokio::time::sleep(GONE_INTERVAL).await;
        }
        conn.close().await?;
        tenure.settle();
        Ok(())
    }

    /// Asks whether a backend still works on its statement; one that waits for its client does not.
    pub(super) async fn is_working(self: &Arc<Self>, backend: &Backend) -> bool {
        let asking = async {
            let (mut conn, tenure) = self.connect(None).await?;
            let sql = format!(
                "SELECT application_name, pid, started_us FROM ({FIND}) AS found
                 WHERE state = 'active' AND wait_event_type IS DISTINCT FROM 'Client'"
            );
            let found = find(&mut conn, &sql, std::slice::from_ref(backend)).await?;
            conn.close().await?;
            tenure.settle();
            Ok::<bool, sqlx::Error>(!found.is_empty())
        };
        matches!(timeout(self.errand_timeout(), asking).await, Ok(Ok(true)))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Left>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until what was given up has ended at the servers, for a short time: for the end of a process.
pub async fn end_left(within: Duration) {
    // What the end of a command has dropped may be waiting to be dropped.
    tokio::task::yield_now().await;
    let known: Vec<Arc<Backends>> = {
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().cloned().collect()
    };
    let all_gone = async {
        for backends in known {
            loop {
                let mut changed = std::pin::pin!(backends.changed.notified());
                changed.as_mut().enable();
                if backends.lock().is_empty() {
                    break;
                }
                changed.await;
            }
        }
    };
    let _ = timeout(within, all_gone).await;
}

impl Left {
    /// Whether it is gone by the server's own limits.
    fn is_over(&self) -> bool {
        matches!(self.backend, Backend::Starting(_)) && self.at.elapsed() > STARTUP_LIFE_MAX
    }
}

/// A backend from the first byte of its connection on. Dropped without being settled, it was left.
pub(super) struct Tenure {
    backend: Backend,
    backends: Arc<Backends>,
    slot: Option<OwnedSemaphorePermit>,
    is_settled: bool,
}

impl Tenure {
    /// Takes note of which backend it is.
    pub(super) fn identify(&mut self, pid: i32, started_us: i64) {
        self.backend = Backend::Running { pid, started_us };
    }

    pub(super) fn backend(&self) -> &Backend {
        &self.backend
    }

    pub(super) fn backends(&self) -> &Arc<Backends> {
        &self.backends
    }

    /// Says whether the backend goes by itself when its connection does.
    pub(super) fn set_settled(&mut self, is_settled: bool) {
        self.is_settled = is_settled;
    }

    /// Ends it as one that goes by itself.
    pub(super) fn settle(mut self) {
        self.is_settled = true;
    }

    /// A refusal ends a backend; only where nothing is known it may be there.
    fn settle_if_refused(
        mut self,
        connected: Result<PgConnection, sqlx::Error>,
    ) -> Result<(PgConnection, Self), sqlx::Error> {
        match connected {
            Ok(conn) => Ok((conn, self)),
            Err(error) => {
                self.is_settled = !was_cut(&error);
                Err(error)
            }
        }
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        if !self.is_settled {
            let slot = self.slot.take();
            self.backends.leave(self.backend.clone(), slot);
        }
    }
}

/// Whether an error leaves open what its backend does. What the server says itself does not.
pub(super) fn is_unknown(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(_) | sqlx::Error::Protocol(_))
}

/// Whether a connection that had begun was lost on the way: its other end may be there.
fn was_cut(error: &sqlx::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    let sqlx::Error::Io(error) = error else {
        // What answers a request for TLS is no backend yet.
        return matches!(error, sqlx::Error::Protocol(text) if !text.contains("SSLRequest"));
    };
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset
    )
}

/// The error of a server that did not go on.
pub(super) fn no_answer(within: Duration) -> sqlx::Error {
    let reason = format!("no answer within {} s", within.as_secs());
    std::io::Error::new(std::io::ErrorKind::TimedOut, reason).into()
}

/// A pooler takes few settings at start-up, or none, and an old release does not know all of them.
fn refuses_options(error: &sqlx::Error) -> bool {
    let code = super::code(error);
    let is_pooler = code.as_deref() == Some("08P01");
    let is_old = code.as_deref() == Some("42704");
    is_old || (is_pooler && error.to_string().contains("startup parameter"))
}

/// Backends of this user: by name ($1), or by process and start ($2, $3).
const FIND: &str = "SELECT application_name, pid, started_us, state, wait_event_type FROM (
        SELECT *, (extract(epoch FROM backend_start) * 1000000)::bigint AS started_us
        FROM pg_stat_activity WHERE usename = current_user) AS mine
    WHERE application_name = ANY($1)
        OR (pid, started_us) IN (SELECT * FROM unnest($2::integer[], $3::bigint[]))";

/// Runs a query with the parameters of [`FIND`]; gives the backends in its rows, if it has such columns.
async fn find(
    conn: &mut PgConnection,
    sql: &str,
    backends: &[Backend],
) -> Result<Vec<Backend>, sqlx::Error> {
    let (mut names, mut pids, mut starts) = (vec![], vec![], vec![]);
    for backend in backends {
        match backend {
            Backend::Starting(name) => names.push(name.clone()),
            Backend::Running { pid, started_us } => {
                pids.push(*pid);
                starts.push(*started_us);
            }
        }
    }
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql.to_owned()))
        .bind(&names)
        .bind(pids)
        .bind(starts)
        .fetch_all(conn)
        .await?;
    let backend = |row: &sqlx::postgres::PgRow| {
        let name: String = row.try_get("application_name").ok()?;
        if names.contains(&name) {
            return Some(Backend::Starting(name));
        }
        Some(Backend::Running {
            pid: row.try_get("pid").ok()?,
            started_us: row.try_get("started_us").ok()?,
        })
    };
    Ok(rows.iter().filter_map(backend).collect())
}

fn random() -> u64 {
    // A name that another attempt has as well would only end that one, too.
    getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()))
}
