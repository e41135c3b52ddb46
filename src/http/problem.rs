//! Errors of the API: a status, what is wrong and what to do, in one JSON shape.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Time after which a request that is refused for load may succeed, in seconds.
pub(super) const RETRY_AFTER_S: &str = "5";

/// An error as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    #[serde(skip)]
    pub(super) status: StatusCode,
    pub(super) error: String,
    pub(super) fix: String,
}

impl Problem {
    pub(super) fn new(
        status: StatusCode,
        error: impl Into<String>,
        fix: impl Into<String>,
    ) -> Problem {
        Problem {
            status,
            error: error.into(),
            fix: fix.into(),
        }
    }

    /// The request is not one that the API answers.
    pub(super) fn bad_request(error: impl Into<String>, fix: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, error, fix)
    }

    /// The same request may succeed later.
    pub(super) fn unavailable(error: impl Into<String>) -> Problem {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, error, "retry later")
    }

    pub(super) fn no_store() -> Problem {
        Problem::unavailable("the store does not answer")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.status;
        let answer = (status, Json(self));
        match status {
            StatusCode::SERVICE_UNAVAILABLE => {
                ([(RETRY_AFTER, RETRY_AFTER_S)], answer).into_response()
            }
            _ => answer.into_response(),
        }
    }
}

/// Answers requests for paths that the API does not have.
pub(super) async fn not_found() -> Problem {
    let fix = "see /openapi.json for the paths of the API";
    Problem::new(StatusCode::NOT_FOUND, "no such path", fix)
}

/// Answers requests with a method that the path does not have.
pub(super) async fn method_not_allowed() -> Problem {
    let fix = "use a method of the header Allow; see /openapi.json";
    let error = "this path does not have this method";
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, error, fix)
}

/// Query parameters of a request.
pub(super) struct Parameters<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Parameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(parameters)) => Ok(Parameters(parameters)),
            Err(error) => {
                let error = error.body_text();
                let why = error.rsplit_once("query string: ").map(|(_, why)| why);
                Err(Problem::bad_request(
                    format!("invalid query: {}", why.unwrap_or(&error)),
                    "remove or correct it; /openapi.json lists the parameters of the API",
                ))
            }
        }
    }
}

/// The name in the path of a request.
pub(super) struct Name(pub(super) String);

impl<S: Sync + Send> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let name: Result<Path<String>, PathRejection> =
            Path::from_request_parts(parts, state).await;
        name.map(|Path(name)| Name(name))
            .map_err(|_| Problem::bad_request("the path is not UTF-8", "encode the name as UTF-8"))
    }
}

/// Query parameters of a request that has none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// Returns a parameter unless it has a character that Postgres cannot store.
pub(super) fn storable(name: &str, text: String) -> Result<String, Problem> {
    match text.contains('\0') {
        false => Ok(text),
        true => {
            let error = format!("invalid query: {name} has a NUL");
            Err(Problem::bad_request(error, "remove the NUL"))
        }
    }
}
