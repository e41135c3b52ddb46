//! `POST /v1/query`: the rows of one read-only statement, as JSON.
//!
//! A query has a connection of its own. It is stopped in the store when its time is over, when its client has gone,
//! and when the gateway needs the write-ahead log.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Deserialize;
use serde_json::Value as Json;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::problem::{Nothing, Parameters, Problem};
use super::{Client, Shared};
use crate::config::store_url::StoreUrl;
use crate::store::admin::rows_json::RowsJson;
use crate::store::admin::statement::{self, Dialect, Refusal};
use crate::store::admin::{Access, Cause, Connection, QueryError, Row, Value};
use crate::store::sqlite::readers;

/// Maximum number of queries that run at a time.
const QUERIES_MAX: usize = 2;
/// Maximum duration of a query, with the time in which its client reads the answer.
pub(super) const QUERY_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum time to receive the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of the body of a request.
pub(super) const BODY_BYTES_MAX: usize = 64 << 10;
/// Maximum size of the texts and blobs of a row.
const ROW_BYTES_MAX: usize = 8 << 20;
/// Size of the pieces of an answer.
const PIECE_BYTES: usize = 64 << 10;
/// Number of rows that wait to be written.
const ROWS_QUEUED: usize = 16;

/// What runs queries.
pub(super) struct Queries {
    store: StoreUrl,
    slots: Arc<Semaphore>,
}

impl fmt::Debug for Queries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "queries with {} free slots",
            self.slots.available_permits()
        )
    }
}

impl Queries {
    pub(super) fn new(store: &StoreUrl) -> Queries {
        Queries {
            store: store.clone(),
            slots: Arc::new(Semaphore::new(QUERIES_MAX)),
        }
    }
}

/// Body of a request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    sql: String,
    #[serde(default)]
    params: Vec<Json>,
}

/// A statement with the values of its parameters.
struct Statement {
    sql: String,
    parameters: Vec<Value>,
}

/// Runs a statement.
pub(super) async fn query(
    State(site): State<Shared>,
    Extension(client): Extension<Client>,
    Parameters(Nothing {}): Parameters<Nothing>,
    request: Request,
) -> Result<Response, Problem> {
    let wanted = timeout(BODY_TIMEOUT, body(request)).await.map_err(|_| {
        let fix = "send the body with the request";
        Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive", fix)
    })??;
    let statement = check(wanted, Dialect::of(&site.queries.store))?;
    let slot = Arc::clone(&site.queries.slots).try_acquire_owned();
    let slot = slot.map_err(|_| {
        Problem::unavailable(format!("{QUERIES_MAX} queries run, and no more at a time"))
    })?;
    let (pieces, mut answer) = mpsc::channel(1);
    let store = site.queries.store.clone();
    tokio::spawn(run(store, statement, pieces, client, slot));
    // The status is that of the first piece.
    let first = answer.recv().await.unwrap_or(Err(Problem::no_store()))?;
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-store"),
    ];
    let body = Body::from_stream(Pieces {
        first: Some(first),
        rest: answer,
    });
    Ok((headers, body).into_response())
}

async fn body(request: Request) -> Result<Wanted, Problem> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body is not JSON",
            "send JSON with Content-Type: application/json",
        ));
    }
    let body = to_bytes(request.into_body(), BODY_BYTES_MAX).await;
    let body = body.map_err(|_| {
        Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {BODY_BYTES_MAX} bytes"),
            "send a shorter statement",
        )
    })?;
    serde_json::from_slice(&body).map_err(|error| {
        Problem::bad_request(
            format!("invalid body: {error}"),
            r#"send a JSON object such as {"sql": "SELECT $1", "params": [1]}"#,
        )
    })
}

fn check(wanted: Wanted, dialect: Dialect) -> Result<Statement, Problem> {
    let Wanted { sql, params } = wanted;
    let refused = |refusal: Refusal| {
        let status = match refusal {
            Refusal::Writes { .. } => StatusCode::FORBIDDEN,
            _ => StatusCode::BAD_REQUEST,
        };
        let fix = "send one statement that reads";
        Problem::new(status, refusal.to_string(), fix)
    };
    statement::check(&sql, dialect).map_err(refused)?;
    let wanted = statement::parameters(&sql, dialect).map_err(refused)?;
    if wanted != params.len() {
        return Err(Problem::bad_request(
            format!(
                "the statement has {wanted} parameters, and params has {} values",
                params.len()
            ),
            "send a value for each of $1, $2, …",
        ));
    }
    let has_nul = |text: &str| text.contains('\0');
    let parameters: Option<Vec<_>> = params.into_iter().map(value).collect();
    let parameters = parameters.ok_or_else(|| {
        let error = "a value of params is an array or an object";
        Problem::bad_request(error, "send texts, numbers, true, false or null")
    })?;
    let is_text_with_nul = |value: &Value| matches!(value, Value::Text(text) if has_nul(text));
    if has_nul(&sql) || parameters.iter().any(is_text_with_nul) {
        return Err(Problem::bad_request("a text has a NUL", "remove it"));
    }
    Ok(Statement { sql, parameters })
}

fn value(json: Json) -> Option<Value> {
    Some(match json {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Bool(value),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(value), _) => Value::Integer(value),
            (None, Some(value)) => Value::Real(value),
            (None, None) => return None,
        },
        Json::String(text) => Value::Text(text),
        Json::Array(_) | Json::Object(_) => return None,
    })
}

/// Sends the answer in pieces; a problem is the last one.
async fn run(
    store: StoreUrl,
    statement: Statement,
    pieces: Sender<Result<Bytes, Problem>>,
    client: Client,
    _slot: OwnedSemaphorePermit,
) {
    let gone = pieces.clone();
    let ended = tokio::select! {
        ended = timeout(QUERY_TIMEOUT, write(&store, &statement, &pieces)) => {
            ended.unwrap_or_else(|_| Err(too_slow()))
        }
        () = gone.closed() => return,
        () = readers::log_is_needed(&store) => Err(Problem::unavailable(
            "the query kept the gateway from checkpointing its write-ahead log",
        )),
    };
    if let Err(problem) = ended {
        // A client that does not read has the channel filled.
        if pieces.try_send(Err(problem)).is_err() {
            client.close();
        }
    }
}

fn too_slow() -> Problem {
    Problem::new(
        StatusCode::GATEWAY_TIMEOUT,
        format!("the query took longer than {} s", QUERY_TIMEOUT.as_secs()),
        "query less data at a time",
    )
}

async fn write(
    store: &StoreUrl,
    statement: &Statement,
    pieces: &Sender<Result<Bytes, Problem>>,
) -> Result<(), Problem> {
    let connection = Connection::open(store, Access::Read).await;
    let mut connection = connection.map_err(|error| problem(&error.into()))?;
    let stop = connection.bound(QUERY_TIMEOUT).await;
    let _stop = stop.map_err(|error| problem(&error))?;
    let columns = connection.columns(&statement.sql).await;
    let columns = columns.map_err(|error| problem(&error))?;
    let (sender, rows) = mpsc::channel(ROWS_QUEUED);
    let reading = async {
        // The receiver ends when this is dropped.
        let sender = sender;
        let read = { connection.send(&statement.sql, &statement.parameters, &sender) }.await;
        read.map_err(|error| problem(&error))
    };
    let mut writer = Writer {
        rows: RowsJson::new(&columns),
        piece: String::new(),
        pieces,
    };
    tokio::try_join!(reading, writer.write(rows))?;
    let end = writer.rows.end();
    writer.piece.push_str(end);
    writer.send().await
}

/// Collects rows into pieces.
struct Writer<'p> {
    rows: RowsJson,
    piece: String,
    pieces: &'p Sender<Result<Bytes, Problem>>,
}

impl Writer<'_> {
    async fn write(&mut self, mut rows: Receiver<Row>) -> Result<(), Problem> {
        while let Some(Row(row)) = rows.recv().await {
            if row.iter().map(size).sum::<usize>() > ROW_BYTES_MAX {
                let error = format!("a row is larger than {ROW_BYTES_MAX} bytes");
                return Err(Problem::bad_request(error, "query parts of its values"));
            }
            self.piece.push_str(&self.rows.row(&row));
            if self.piece.len() >= PIECE_BYTES {
                self.send().await?;
            }
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<(), Problem> {
        let piece = std::mem::take(&mut self.piece);
        let sent = self.pieces.send(Ok(piece.into())).await;
        sent.map_err(|_| Problem::unavailable("the client has gone"))
    }
}

fn size(value: &Value) -> usize {
    match value {
        Value::Text(text) | Value::Decimal(text) => text.len(),
        Value::Blob(bytes) => bytes.len(),
        _ => 0,
    }
}

fn problem(error: &QueryError) -> Problem {
    if error.is_write() {
        return Problem::new(
            StatusCode::FORBIDDEN,
            "this statement would write",
            "send one statement that reads",
        );
    }
    match error.cause() {
        Cause::Statement => {
            let hint = error
                .hint()
                .unwrap_or("correct the statement or its params");
            Problem::bad_request(error.to_string(), hint)
        }
        Cause::Stopped => too_slow(),
        Cause::Store => {
            tracing::debug!(%error, "could not run a query of an HTTP request");
            Problem::no_store()
        }
    }
}

/// The body of an answer. A problem after the first piece cuts it off.
struct Pieces {
    first: Option<Bytes>,
    rest: Receiver<Result<Bytes, Problem>>,
}

impl Stream for Pieces {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let piece = self.rest.poll_recv(context);
        piece.map(|piece| {
            piece.map(|piece| piece.map_err(|problem| io::Error::other(problem.error)))
        })
    }
}
