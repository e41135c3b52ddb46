//! Counts this process's open connections to a server, and terminates the abandoned ones at the server.
//!
//! A connection that is dropped while it runs a statement leaves a process at the server, a backend, that does
//! not notice: it waits for a lock, a standby, or a client behind a silent network. Each would occupy one of
//! the server's connections and keep its locks. So a second, short connection terminates an abandoned backend,
//! which counts as open until it is known to have ended.
//!
//! The module uses `pg_terminate_backend`, not `pg_cancel_backend`. A COMMIT that waits for a synchronous
//! standby answers a cancellation with success although the standby has nothing. Termination returns no result,
//! so the outcome is unknown, and the ledger decides when the batch is resubmitted.
//!
//! Invariants
//! - This process has at most [`SLOTS`] connections to a database plus [`SLOTS_PER_WRITER`] for each writer,
//!   including abandoned ones. To terminate those it opens one more at a time, which the server closes after
//!   [`UNUSED_TIMEOUT_S`] if the network goes silent meanwhile.
//! - Every await has a deadline.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::{ConnectOptions, Connection, PgConnection, Row};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::errors::reason;
use crate::config::store_url::PostgresUrl;

/// Maximum time for the server to accept a connection, and for each step of its setup.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections other than those of writers, in use or abandoned: two readers, one that creates partitions, and
/// slots for as many abandoned ones.
const SLOTS: usize = 8;
/// One connection in use and one abandoned.
const SLOTS_PER_WRITER: usize = 2;
/// Time, in seconds, after which the server closes a connection whose startup was abandoned and that ran no
/// statement (`authentication_timeout`, 60 s by default, closes it earlier).
const UNUSED_TIMEOUT_S: u64 = 60;
/// Time after which a backend abandoned during startup has ended, whether the server answers or not.
const STARTUP_LIFE_MAX: Duration = Duration::from_secs(2 * UNUSED_TIMEOUT_S);
/// Maximum time for a terminated backend to end.
const GONE_TIMEOUT: Duration = Duration::from_secs(2);
const GONE_INTERVAL: Duration = Duration::from_millis(20);
/// Delay after a failed attempt. Together with the duration of an attempt, it bounds the number of connections
/// that such attempts can abandon themselves.
const RETRY: Duration = Duration::from_secs(2);

/// Databases that this process uses, by URL.
static KNOWN: LazyLock<Mutex<HashMap<String, Arc<Backends>>>> = LazyLock::new(Mutex::default);

/// Backends of this process at one database; see the module.
pub(super) struct Backends {
    url: PostgresUrl,
    slots: Arc<Semaphore>,
    writers: AtomicUsize,
    left: Mutex<Vec<Left>>,
    is_ending: AtomicBool,
    /// Reason why abandoned backends could not be terminated yet.
    obstacle: Mutex<String>,
    /// Notified when the server was reached or the last backend has ended.
    changed: Notify,
    /// Whether the server, usually a pooler, rejects settings at startup.
    refuses_options: AtomicBool,
    /// Maximum time, in milliseconds, for the server to accept a connection and for each response.
    connect_ms: AtomicUsize,
    answer_ms: AtomicUsize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    /// Only its startup was observed. Contains its application name, which is used once.
    Starting(String),
    /// Process id, which a later backend may reuse, and start time.
    Running { pid: i32, started_us: i64 },
}

/// An abandoned backend.
struct Left {
    backend: Backend,
    at: Instant,
    /// Released when the backend has ended; connections that terminate others have none.
    _slot: Option<OwnedSemaphorePermit>,
}

impl Backends {
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

    /// Adds slots for this number of writers.
    pub(super) fn allow_writers(&self, writers: usize) {
        let before = self.writers.fetch_max(writers, Ordering::Relaxed);
        let more = writers.saturating_sub(before);
        self.slots.add_permits(more * SLOTS_PER_WRITER);
    }

    /// Returns the maximum time between two responses of the server.
    pub(super) fn answer_timeout(&self) -> Duration {
        Duration::from_millis(self.answer_ms.load(Ordering::Relaxed) as u64)
    }

    /// Returns the maximum time for a connection and for each step of its setup.
    pub(super) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_ms.load(Ordering::Relaxed) as u64)
    }

    /// Returns the maximum time for a short connection that queries or terminates a backend.
    fn errand_timeout(&self) -> Duration {
        2 * self.connect_timeout()
    }

    #[cfg(test)]
    pub(super) fn set_timeouts(&self, connect: Duration, answer: Duration) {
        let ms = |timeout: Duration| timeout.as_millis() as usize;
        self.connect_ms.store(ms(connect), Ordering::Relaxed);
        self.answer_ms.store(ms(answer), Ordering::Relaxed);
    }

    /// Waits for a free slot; the error is a readable reason.
    pub(super) async fn slot(&self) -> Result<OwnedSemaphorePermit, String> {
        let slot = Arc::clone(&self.slots).acquire_owned();
        match timeout(self.connect_timeout(), slot).await {
            Ok(Ok(slot)) => Ok(slot),
            _ => {
                let obstacle = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
                Err(format!(
                    "{} abandoned server sessions are still open: {obstacle}",
                    self.lock().len()
                ))
            }
        }
    }

    /// Connects, with a deadline. The backend counts as abandoned until it is settled.
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
            // Set before the first statement, because a network may go silent at any byte.
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

    /// Records an abandoned backend and starts its termination.
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

    /// Terminates abandoned backends now, because the server is known to respond.
    pub(super) fn reached(&self) {
        self.changed.notify_waiters();
    }

    async fn end(self: Arc<Self>) {
        loop {
            // Registered before the check, so that no notification is missed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let ended = timeout(self.errand_timeout(), self.end_once()).await;
            let obstacle = match ended {
                Ok(Ok(())) => "they are slow to end".to_owned(),
                Ok(Err(error)) => reason(&error),
                Err(_) => reason(&no_answer(self.errand_timeout())),
            };
            *self.obstacle.lock().unwrap_or_else(PoisonError::into_inner) = obstacle;
            {
                let mut left = self.lock();
                left.retain(|left| !left.is_over());
                if left.is_empty() {
                    // Cleared under the lock: a backend abandoned from now on starts a new task.
                    self.is_ending.store(false, Ordering::Release);
                    drop(left);
                    self.changed.notify_waiters();
                    return;
                }
            }
            let _ = timeout(RETRY, changed).await;
        }
    }

    /// Terminates the backends abandoned so far, and forgets those that have ended.
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

    /// Returns whether a backend still works on its statement; a backend that waits for its client does not.
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

/// Waits, for a limited time before the process exits, until abandoned backends have ended.
pub async fn end_left(within: Duration) {
    // Let dropped values of the finished command run their destructors first.
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
    /// Returns whether the server's own limits have ended it.
    fn is_over(&self) -> bool {
        matches!(self.backend, Backend::Starting(_)) && self.at.elapsed() > STARTUP_LIFE_MAX
    }
}

/// A backend from the first byte of its connection on. It counts as abandoned if it is dropped before it is
/// settled.
pub(super) struct Tenure {
    backend: Backend,
    backends: Arc<Backends>,
    slot: Option<OwnedSemaphorePermit>,
    is_settled: bool,
}

impl Tenure {
    pub(super) fn identify(&mut self, pid: i32, started_us: i64) {
        self.backend = Backend::Running { pid, started_us };
    }

    pub(super) fn backend(&self) -> &Backend {
        &self.backend
    }

    pub(super) fn backends(&self) -> &Arc<Backends> {
        &self.backends
    }

    /// Sets whether the backend ends by itself when its connection closes.
    pub(super) fn set_settled(&mut self, is_settled: bool) {
        self.is_settled = is_settled;
    }

    /// Marks the backend as ending by itself.
    pub(super) fn settle(mut self) {
        self.is_settled = true;
    }

    /// Marks the backend as ended if the server rejected the connection. Only a broken connection may leave a
    /// backend.
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

/// Returns whether an error leaves the state of its backend unknown. An error from the server itself does not.
pub(super) fn is_unknown(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(_) | sqlx::Error::Protocol(_))
}

/// Returns whether an established connection broke, so that its backend may still exist.
fn was_cut(error: &sqlx::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    let sqlx::Error::Io(error) = error else {
        // The process that answers a TLS request is not a backend yet.
        return matches!(error, sqlx::Error::Protocol(text) if !text.contains("SSLRequest"));
    };
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset
    )
}

/// Returns the error for a server that stopped responding.
pub(super) fn no_answer(within: Duration) -> sqlx::Error {
    let reason = format!("no answer within {} s", within.as_secs());
    std::io::Error::new(std::io::ErrorKind::TimedOut, reason).into()
}

/// Returns whether the server rejects startup settings: a pooler accepts few or none, and an old release does
/// not know all of them.
fn refuses_options(error: &sqlx::Error) -> bool {
    let code = super::code(error);
    let is_pooler = code.as_deref() == Some("08P01");
    let is_old = code.as_deref() == Some("42704");
    is_old || (is_pooler && error.to_string().contains("startup parameter"))
}

/// Finds backends of this user: by name ($1), or by process and start time ($2, $3).
const FIND: &str = "SELECT application_name, pid, started_us, state, wait_event_type FROM (
        SELECT *, (extract(epoch FROM backend_start) * 1000000)::bigint AS started_us
        FROM pg_stat_activity WHERE usename = current_user) AS mine
    WHERE application_name = ANY($1)
        OR (pid, started_us) IN (SELECT * FROM unnest($2::integer[], $3::bigint[]))";

/// Runs a query with the parameters of [`FIND`]; returns the backends in its rows, if it has such columns.
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
    // If another attempt has the same name, that attempt is terminated too, which is harmless.
    getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()))
}
