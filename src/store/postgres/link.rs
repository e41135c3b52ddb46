//! A connection on which every await has a deadline: the one way in which this program talks to a database.
//!
//! A network may go silent at any byte, and a server may stop to answer. So whatever is asked through a
//! [`Link`] ends: with an answer, or with an error when the server has not gone on for a while. What makes
//! progress may take as long as it takes: each row of an answer and each chunk of a COPY begins the time
//! again. A link that was given up leaves its backend to [`Backends`], which ends it.

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
use crate::store::url::PostgresUrl;

/// How long a farewell may take: it is only polite.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens when the server has not gone on for its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It is given up.
    Limited,
    /// It is given up after a time of its own.
    Within(Duration),
    /// A second connection asks whether it still works on the statement: a user's query, or a change of
    /// the schema, may take hours.
    WhileWorking,
}

/// A connection; see the module.
pub struct Link {
    conn: PgConnection,
    watch: Watch,
}

/// What awaits the server, and keeps count of the other end.
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
    /// Connects; the error of no room comes as one of I/O.
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

    /// Takes note of which backend it has: from now on it is left only with a statement on it.
    pub(super) fn identify(&mut self, pid: i32, started_us: i64) {
        self.watch.tenure.identify(pid, started_us);
        self.watch.tenure.set_settled(true);
        self.watch.tenure.backends().reached();
    }

    pub(super) fn set_patience(&mut self, patience: Patience) {
        self.watch.patience = patience;
    }

    /// Returns the release, as in `server_version_num`, if the server said it.
    pub(super) fn release(&self) -> Option<u32> {
        self.conn.server_version_num()
    }

    /// Gives the connection itself, for what is no statement, and the watch that has to await it.
    pub(super) fn parts(&mut self) -> (&mut PgConnection, &mut Watch) {
        (&mut self.conn, &mut self.watch)
    }

    /// Sends the chunks that `next` gives by a COPY from STDIN, each within a deadline; returns how many rows the
    /// server stored.
    ///
    /// # Cancel safety
    /// None: the link must be given up.
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

    /// Closes it politely, within a short time.
    pub(super) async fn close(self) {
        let Link { conn, mut watch } = self;
        watch.tenure.set_settled(false);
        let closed = timeout(CLOSE_TIMEOUT, conn.close()).await;
        watch.tenure.set_settled(closed.is_ok());
    }
}

impl Watch {
    /// Awaits something that the server does, for as long as patience lasts.
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

/// The answers to a statement.
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
            // To the end: an error may come behind the row.
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

/// Runs from the last sign of the server on.
struct Timer {
    within: Duration,
    /// Whom to ask whether the statement goes on, if that counts.
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

    /// Gives the error of a server that has not gone on.
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
