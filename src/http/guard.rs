//! Which requests are answered: the ones with a known `Host`, an `Origin` of the same host, and a valid token.
//!
//! A page of another site can make a browser on this machine send requests here. Such a request has a foreign
//! `Origin`, or a `Host` that the site controls (DNS rebinding).

use std::collections::HashSet;
use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::Shared;
use super::token::Tokens;

/// Paths that need no token, for the probes of load balancers and orchestrators.
const OPEN_PATHS: [&str; 2] = ["/livez", "/readyz"];

/// Who may send requests.
#[derive(Debug, Default)]
pub(super) struct Guard {
    /// Names under which the listener may be reached, in lower case, besides addresses and `localhost`.
    pub(super) hosts: HashSet<String>,
    /// `None` if no token is required.
    pub(super) tokens: Option<Tokens>,
}

impl Guard {
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

    fn check(&self, path: &str, headers: &HeaderMap) -> Result<(), Response> {
        let text = |name| {
            headers
                .get(name)
                .and_then(|value: &HeaderValue| value.to_str().ok())
        };
        let host = text(HOST).unwrap_or_default();
        if !self.knows(host) {
            let why = "unknown host; add its name with --http-host\n";
            return Err((StatusCode::MISDIRECTED_REQUEST, why).into_response());
        }
        let origin = headers
            .get(ORIGIN)
            .map(|_| text(ORIGIN).unwrap_or_default());
        let is_own = |origin: &str| origin.split_once("://").is_some_and(|(_, of)| of == host);
        if origin.is_some_and(|origin| !is_own(origin)) {
            return Err((StatusCode::FORBIDDEN, "request of another site\n").into_response());
        }
        match &self.tokens {
            Some(tokens) if !OPEN_PATHS.contains(&path) => match token(headers) {
                Some(token) if tokens.contain(&token) => Ok(()),
                _ => {
                    let scheme = (
                        WWW_AUTHENTICATE,
                        "Basic realm=\"fieldgate\", charset=\"UTF-8\"",
                    );
                    let why = "token required: send it as a bearer token, or as the password of any user\n";
                    Err((StatusCode::UNAUTHORIZED, [scheme], why).into_response())
                }
            },
            _ => Ok(()),
        }
    }
}

/// Returns the token of a request: a bearer token, or the password that a browser asks for.
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

/// Answers a request only if the guard lets it through.
pub(super) async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    match shared.guard.check(request.uri().path(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal,
    }
}
