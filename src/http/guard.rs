//! Decides which requests are answered: those with a known `Host`, no `Origin` of another host, and a valid token if
//! tokens are required.
//!
//! A web page of another site can make a browser on this machine send requests here. Such a request has the `Origin`
//! of that site, or a `Host` that the site controls (DNS rebinding).

use std::collections::HashSet;
use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::Shared;
use super::problem::Problem;
use super::token::Tokens;

/// Paths that need no token, for the probes of load balancers and orchestrators.
const OPEN_PATHS: [&str; 2] = ["/livez", "/readyz"];

/// Conditions that a request must meet.
#[derive(Debug, Default)]
pub struct Guard {
    /// Host names that are accepted in addition to IP addresses and `localhost`, in lower case.
    pub(super) hosts: HashSet<String>,
    /// `None` if no token is required.
    pub(super) tokens: Option<Tokens>,
}

impl Guard {
    /// Creates a guard that accepts addresses, `localhost` and `hosts`; with `tokens`, only requests that have one of
    /// them.
    pub fn new(hosts: impl IntoIterator<Item = String>, tokens: Option<Tokens>) -> Guard {
        let hosts = hosts.into_iter();
        Guard {
            hosts: hosts.map(|host| host.to_ascii_lowercase()).collect(),
            tokens,
        }
    }

    /// Returns whether `host`, with or without port, is an address, `localhost` or a known name.
    fn knows(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|c| c.is_ascii_digit()) => name,
            _ => host,
        };
        let name = name.to_ascii_lowercase();
        let address = name.trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || address.parse::<IpAddr>().is_ok() || self.hosts.contains(&name)
    }

    /// Returns the answer to a request that is refused.
    fn refusal(&self, path: &str, headers: &HeaderMap) -> Option<Problem> {
        let text = |name| {
            headers
                .get(name)
                .map(|value| value.to_str().unwrap_or_default())
        };
        let host = text(HOST).unwrap_or_default();
        if !self.knows(host) {
            return Some(Problem::new(
                StatusCode::MISDIRECTED_REQUEST,
                "unknown host",
                "add its name with --http-host",
            ));
        }
        let is_foreign = |origin: &str| {
            let of = origin.split_once("://").map(|(_, of)| of);
            of != Some(host)
        };
        if text(ORIGIN).is_some_and(is_foreign) {
            return Some(Problem::new(
                StatusCode::FORBIDDEN,
                "request from another site",
                "open the page at the address of the gateway",
            ));
        }
        let tokens = self
            .tokens
            .as_ref()
            .filter(|_| !OPEN_PATHS.contains(&path))?;
        let is_known = token(headers).is_some_and(|token| tokens.contain(&token));
        let required = Problem::new(
            StatusCode::UNAUTHORIZED,
            "token required",
            "send it as a bearer token, or as the password of any user",
        );
        (!is_known).then_some(required)
    }
}

/// Returns the token of a request: a bearer token, or the password of HTTP basic authentication.
fn token(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, rest) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    let is_basic = scheme.eq_ignore_ascii_case("basic");
    let decoded = BASE64_STANDARD
        .decode(rest.trim())
        .ok()
        .filter(|_| is_basic)?;
    let decoded = String::from_utf8(decoded).ok()?;
    decoded
        .split_once(':')
        .map(|(_, password)| password.to_owned())
}

/// Answers a request only if it meets the conditions of the guard.
pub(super) async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let refusal = shared.guard.borrow().refusal(path, request.headers());
    match refusal {
        None => next.run(request).await,
        // Browsers ask for a password.
        Some(refusal) if refusal.status == StatusCode::UNAUTHORIZED => {
            let scheme = "Basic realm=\"fieldgate\", charset=\"UTF-8\"";
            ([(WWW_AUTHENTICATE, scheme)], refusal).into_response()
        }
        Some(refusal) => refusal.into_response(),
    }
}
