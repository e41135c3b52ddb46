//! The polling loop of a gateway's periodic tasks, and their connection.

use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::config::store_url::StoreUrl;

use super::{Access, Argument, Cause, Connection, QueryError, Row, Source};

#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Minimum pause between two polls.
    pub interval: Duration,
    /// A poll that takes longer is abandoned.
    pub timeout: Duration,
    /// Polls take at most 1/`share` of the time; at least 1.
    pub share: u32,
}

impl Pace {
    fn pause_after(self, took: Duration) -> Duration {
        self.interval.max(took * (self.share - 1))
    }
}

/// A periodic task of a gateway.
pub trait Poll: Send {
    /// Name in the log.
    const TASK: &'static str;
    const PACE: Pace;

    /// # Cancel safety
    /// The next poll must work as if this one had failed.
    fn poll(&mut self) -> impl Future<Output = Result<(), QueryError>> + Send;
}

/// Polls after each pause, for as long as the future is polled.
pub async fn poll_every<T, P: Poll>(poller: P) -> T {
    poll_every_or_when(poller, &Notify::new()).await
}

/// Polls like [`poll_every`], and also when `wanted` is notified.
pub async fn poll_every_or_when<T, P: Poll>(mut poller: P, wanted: &Notify) -> T {
    let mut pause = P::PACE.interval;
    let mut has_warned = false;
    loop {
        let _ = timeout(pause, wanted.notified()).await;
        let began = Instant::now();
        poll_and_log(&mut poller, &mut has_warned).await;
        pause = P::PACE.pause_after(began.elapsed());
    }
}

/// Polls once.
pub async fn poll_once<P: Poll>(poller: &mut P) {
    poll_and_log(poller, &mut false).await;
}

/// Polls once, and logs a failure. `has_warned` is whether a warning was logged since the last success.
async fn poll_and_log<P: Poll>(poller: &mut P, has_warned: &mut bool) {
    let task = P::TASK;
    match timeout(P::PACE.timeout, poller.poll()).await {
        Ok(Ok(())) => *has_warned = false,
        Ok(Err(error)) if is_warning(&error) && !*has_warned => {
            *has_warned = true;
            tracing::warn!(task, %error, "poll failed, retrying");
        }
        Ok(Err(error)) => tracing::debug!(task, %error, "poll failed, retrying"),
        Err(_) => tracing::debug!(task, "poll timed out, retrying"),
    }
}

/// Returns whether an operator has to act, for example grant a permission. The writers report that the store is
/// unavailable.
fn is_warning(error: &QueryError) -> bool {
    error.cause() == Cause::Statement
}

/// A read-only connection that opens on first use, and reopens after a failure.
pub struct Reconnecting {
    source: Source,
    connection: Option<Connection>,
}

impl Reconnecting {
    /// Creates the connection without opening it.
    pub fn new(source: impl Into<Source>) -> Reconnecting {
        Reconnecting {
            source: source.into(),
            connection: None,
        }
    }

    /// Returns whether the database is SQLite rather than Postgres.
    pub fn is_sqlite(&self) -> bool {
        !matches!(self.source, Source::Store(StoreUrl::Postgres(_)))
    }

    /// Returns the rows of a query, like [`Connection::rows`]. Repeats it once on a new connection, because the old one
    /// may have been closed since the last query.
    ///
    /// # Errors
    /// The store cannot be opened or queried; the next call reconnects.
    ///
    /// # Cancel safety
    /// After a cancelled call the next one reconnects.
    pub async fn rows(
        &mut self,
        sql: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Vec<Row>, QueryError> {
        if let Some(mut connection) = self.connection.take()
            && let Ok(rows) = connection.rows(sql, arguments).await
        {
            self.connection = Some(connection);
            return Ok(rows);
        }
        let mut connection = Connection::open(self.source.clone(), Access::Poll).await?;
        let rows = connection.rows(sql, arguments).await?;
        self.connection = Some(connection);
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    struct Retried {
        polls: u32,
        third: Option<oneshot::Sender<()>>,
    }

    impl Poll for Retried {
        const TASK: &'static str = "test";
        const PACE: Pace = Pace {
            interval: Duration::from_millis(1),
            timeout: Duration::from_millis(20),
            share: 20,
        };

        async fn poll(&mut self) -> Result<(), QueryError> {
            self.polls += 1;
            match (self.polls, self.third.take()) {
                (2, third) => {
                    self.third = third;
                    std::future::pending().await
                }
                (3, Some(third)) => third.send(()).unwrap(),
                (_, third) => self.third = third,
            }
            Err(sqlx::Error::WorkerCrashed.into())
        }
    }

    #[tokio::test]
    async fn a_poll_that_fails_or_hangs_is_retried() {
        let (third, retried) = oneshot::channel();
        let poller = Retried {
            polls: 0,
            third: Some(third),
        };
        tokio::select! {
            () = poll_every(poller) => unreachable!(),
            retried = retried => retried.unwrap(),
        }
    }

    #[test]
    fn only_what_an_operator_must_change_is_a_warning() {
        let statement = sqlx::Error::Encode("too long".into());
        assert!(is_warning(&statement.into()));
        for error in [sqlx::Error::WorkerCrashed, sqlx::Error::PoolTimedOut] {
            assert!(!is_warning(&error.into()));
        }
        assert!(!is_warning(&QueryError::TooSlow));
    }

    #[test]
    fn a_slow_poll_is_followed_by_a_long_pause() {
        for (took_us, pause_us) in [(0, 1000), (50, 1000), (1000, 19_000)] {
            let pause = Retried::PACE.pause_after(Duration::from_micros(took_us));
            assert_eq!(pause, Duration::from_micros(pause_us));
        }
    }
}
