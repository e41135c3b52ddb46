//! A connection on which every await has a deadline. All access to a database goes through it.
//!
//! A network may go silent at any byte, and a server may stop responding. So every request through a [`Link`]
//! ends: with an answer, or with an error when the server makes no progress for a while. A request that makes
//! progress may take any time: each row of an answer and each chunk of a COPY restarts the deadline. A dropped
//! link leaves its backend to [`Backends`], which terminates it.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;
use sqlx::postgres::{PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{Connection, Describe, Either, Execute, Executor, PgConnection, Postgres, SqlStr};
use tokio::time::{Sleep, timeout};

use super::backends::{Backend, Backends, Tenure, is_unknown, no_answer};
use crate::config::store_url::PostgresUrl;

/// Maximum time to close a connection cleanly, which is optional.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Reaction to a server that makes no progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Abandon it after the usual time.
    Limited,
    /// Abandon it after a specific time.
    Within(Duration),
    /// Ask over a second connection whether it still works on the statement: a user's query or a schema change
    /// may take hours.
    WhileWorking,
}

pub struct Link {
    conn: PgConnection,
    watch: Watch,
}

/// Awaits the server, and tracks the backend.
pub(super) struct Watch {
    tenure: Tenure,
    patience: Patience,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").finish()
    }
}

impl Link {
    /// Connects; an error for lack of a free slot is an I/O error.
    pub(super) async fn connect(url: &PostgresUrl) -> Result<Link, sqlx::Error> {
        let backends = Backends::of(url);
        let slot = backends.slot().await.map_err(std::io::Error::other)?;
        let (conn, tenure) = backends.connect(Some(slot)).await?;
        Ok(Link {
            conn,
            watch: Watch {
                tenure,
                patience: Patience::Limited,
            },
        })
    }

    /// Records the identity of its backend. From now on, the backend is abandoned only if the link is dropped
    /// during a statement.
    pub(super) fn identify(&mut self, pid: i32, started_us: i64) {
        self.watch.tenure.identify(pid, started_us);
        self.watch.tenure.set_settled(true);
        self.watch.tenure.backends().reached();
    }

    pub(super) fn set_patience(&mut self, patience: Patience) {
        self.watch.patience = patience;
    }

    /// Returns the server's release in the format of `server_version_num`, if the server sent it.
    pub(super) fn release(&self) -> Option<u32> {
        self.conn.server_version_num()
    }

    /// Returns the connection, for operations that are not statements, and the watch that must await them.
    pub(super) fn parts(&mut self) -> (&mut PgConnection, &mut Watch) {
        (&mut self.conn, &mut self.watch)
    }

    /// Sends the chunks from `next` with a COPY FROM STDIN, each within a deadline; returns how many rows the
    /// server stored.
    ///
    /// # Cancel safety
    /// None: the link must be dropped.
    pub(super) async fn copy_in(
        &mut self,
        statement: &str,
        mut next: impl FnMut() -> Option<Vec<u8>>,
    ) -> Result<u64, sqlx::Error> {
        let Link { conn, watch } = self;
        let mut copy = watch.answer(conn.copy_in_raw(statement)).await?;
        while let Some(chunk) = next() {
            let sent = async { copy.send(chunk).await.map(drop) };
            watch.answer(sent).await?;
        }
        watch.answer(copy.finish()).await
    }

    /// Closes the connection cleanly, within a short time.
    pub(super) async fn close(self) {
        let Link { conn, mut watch } = self;
        watch.tenure.set_settled(false);
        let closed = timeout(CLOSE_TIMEOUT, conn.close()).await;
        watch.tenure.set_settled(closed.is_ok());
    }
}

impl Watch {
    /// Awaits a server operation, up to the deadline.
    pub(super) async fn answer<T>(
        &mut self,
        doing: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        self.tenure.set_settled(false);
        let mut timer = Timer::new(self);
        let mut doing = pin!(doing);
        let done = poll_fn(|context| match doing.as_mut().poll(context) {
            Poll::Ready(done) => Poll::Ready(done),
            Poll::Pending => timer.poll(context).map(Err),
        });
        let done = done.await;
        self.tenure
            .set_settled(!done.as_ref().is_err_and(is_unknown));
        done
    }
}

type Answered = Result<Either<PgQueryResult, PgRow>, sqlx::Error>;

struct Answers<'l> {
    answers: Pin<Box<dyn Stream<Item = Answered> + Send + 'l>>,
    tenure: &'l mut Tenure,
    timer: Timer,
}

impl Stream for Answers<'_> {
    type Item = Answered;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Answered>> {
        let answer = match self.answers.as_mut().poll_next(context) {
            Poll::Ready(answer) => answer,
            Poll::Pending => match self.timer.poll(context) {
                Poll::Ready(error) => Some(Err(error)),
                Poll::Pending => return Poll::Pending,
            },
        };
        self.timer.restart();
        match &answer {
            Some(Ok(_)) => {}
            Some(Err(error)) => self.tenure.set_settled(!is_unknown(error)),
            None => self.tenure.set_settled(true),
        }
        Poll::Ready(answer)
    }
}

impl<'c> Executor<'c> for &'c mut Link {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> Pin<Box<dyn Stream<Item = Answered> + Send + 'e>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let Link { conn, watch } = self;
        watch.tenure.set_settled(false);
        Box::pin(Answers {
            timer: Timer::new(watch),
            answers: conn.fetch_many(query),
            tenure: &mut watch.tenure,
        })
    }

    fn fetch_optional<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> Pin<Box<dyn Future<Output = Result<Option<PgRow>, sqlx::Error>> + Send + 'e>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let mut answers = self.fetch_many(query);
        Box::pin(async move {
            let mut first = None;
            // Read to the end: an error may follow the row.
            while let Some(answer) = poll_fn(|context| answers.as_mut().poll_next(context)).await {
                if let Either::Right(row) = answer? {
                    first.get_or_insert(row);
                }
            }
            Ok(first)
        })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> Pin<Box<dyn Future<Output = Result<PgStatement, sqlx::Error>> + Send + 'e>>
    where
        'c: 'e,
    {
        let Link { conn, watch } = self;
        Box::pin(watch.answer(conn.prepare_with(sql, parameters)))
    }

    fn describe<'e>(
        self,
        sql: SqlStr,
    ) -> Pin<Box<dyn Future<Output = Result<Describe<Postgres>, sqlx::Error>> + Send + 'e>>
    where
        'c: 'e,
    {
        let Link { conn, watch } = self;
        Box::pin(watch.answer(conn.describe(sql)))
    }
}

/// Measures the time since the last data from the server.
struct Timer {
    within: Duration,
    /// Backend to ask whether the statement makes progress, if that is allowed.
    tenure: Option<(Arc<Backends>, Backend)>,
    sleep: Option<Pin<Box<Sleep>>>,
    asking: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
}

impl Timer {
    fn new(watch: &Watch) -> Timer {
        let backends = watch.tenure.backends();
        let may_ask = watch.patience == Patience::WhileWorking;
        Timer {
            within: match watch.patience {
                Patience::Within(within) => within,
                _ => backends.answer_timeout(),
            },
            tenure: may_ask.then(|| (Arc::clone(backends), watch.tenure.backend().clone())),
            sleep: None,
            asking: None,
        }
    }

    fn restart(&mut self) {
        self.sleep = None;
        self.asking = None;
    }

    /// Returns the error when the server has made no progress.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<sqlx::Error> {
        loop {
            if let Some(asking) = &mut self.asking {
                match asking.as_mut().poll(context) {
                    Poll::Ready(true) => self.restart(),
                    Poll::Ready(false) => return Poll::Ready(no_answer(self.within)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            let within = self.within;
            let sleep =
                { &mut self.sleep }.get_or_insert_with(|| Box::pin(tokio::time::sleep(within)));
            if sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            let Some((backends, backend)) = self.tenure.clone() else {
                return Poll::Ready(no_answer(self.within));
            };
            self.asking = Some(Box::pin(async move { backends.is_working(&backend).await }));
        }
    }
}
