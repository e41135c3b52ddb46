//! `/livez` and `/readyz`, for probes.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Serialize;

use super::{Shared, Site};
use crate::time::utc_now;

/// Answer of `/readyz`.
#[derive(Serialize)]
struct Readiness {
    is_ready: bool,
    /// Reasons why the gateway is not ready.
    reasons: Vec<&'static str>,
}

/// Answers as long as the runtime has a free thread.
pub(super) async fn live() -> &'static str {
    "live\n"
}

/// Answers with 200 if the gateway is ready, otherwise with 503.
pub(super) async fn ready(State(site): State<Shared>) -> impl IntoResponse {
    let reasons = reasons(&site);
    let status = match reasons.is_empty() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    (
        status,
        Json(Readiness {
            is_ready: reasons.is_empty(),
            reasons,
        }),
    )
}

fn reasons(site: &Site) -> Vec<&'static str> {
    let expiry_s = site.metrics.certificate_expiry.get();
    let checks = [
        (site.drain.is_cancelled(), "the gateway is shutting down"),
        (
            !site.metrics.is_store_up(),
            "the store does not accept commits",
        ),
        (
            site.metrics.is_disk_stopped(),
            "a disk has too little free space to store readings",
        ),
        (
            expiry_s != 0 && expiry_s <= utc_now().as_second(),
            "the certificate has expired",
        ),
    ];
    checks
        .into_iter()
        .filter_map(|(holds, reason)| holds.then_some(reason))
        .collect()
}
