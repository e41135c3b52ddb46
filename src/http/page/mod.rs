//! The page for people: HTML that is made on the server and works without JavaScript.
//!
//! With JavaScript, one stream of server-sent events (`live.rs`) updates the numbers, and `page.js` replaces the parts
//! of the page that have the attribute `data-refresh`. The program contains all assets;
//! `Content-Security-Policy` forbids others.

mod chart;
mod completeness;
mod device;
mod fleet;
mod live;
mod quarantine;
mod rates;
mod table;

use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{Router, get};
use maud::{DOCTYPE, Markup, html};

pub use self::live::{Live, LiveNumbers};
pub use self::rates::{Rates, RatesSampler};
use super::Shared;
use super::devices::Reader;
use super::problem::{Problem, RETRY_AFTER_S};
use crate::config::store_url::StoreUrl;
use crate::text::{age, utc_text};
use crate::time::utc_now;

/// Only assets of this server, no frames around the page, and forms only to this server.
const POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
const CONTENT_TYPE_OPTIONS: HeaderName = HeaderName::from_static("x-content-type-options");
const REFERRER_POLICY: HeaderName = HeaderName::from_static("referrer-policy");

/// Assets: path, media type, content.
const ASSETS: [(&str, &str, &str); 3] = [
    (
        "/page.css",
        "text/css; charset=utf-8",
        include_str!("page.css"),
    ),
    (
        "/page.js",
        "text/javascript; charset=utf-8",
        include_str!("page.js"),
    ),
    ("/icon.svg", "image/svg+xml", include_str!("icon.svg")),
];

/// State of the pages.
#[derive(Debug)]
pub(super) struct Pages {
    store: StoreUrl,
    /// Connection for lists.
    quick: Reader,
    /// Connection for charts and for completeness, which read more.
    slow: Reader,
    live: std::sync::Arc<Live>,
}

impl Pages {
    /// Creates the state without connecting to the store.
    pub(super) fn new(store: &StoreUrl, live: std::sync::Arc<Live>) -> Pages {
        Pages {
            store: store.clone(),
            quick: Reader::new(store),
            slow: Reader::new(store),
            live,
        }
    }
}

/// Returns the routes of the pages and their assets.
pub(super) fn routes() -> Router<Shared> {
    let mut router = Router::new()
        .route("/", get(fleet::fleet))
        .route("/devices/{name}", get(device::device))
        .route("/completeness", get(completeness::completeness))
        .route("/quarantine", get(quarantine::list))
        .route("/quarantine/{id}", get(quarantine::frame))
        .route("/live", get(live::live))
        .fallback(not_found);
    for (path, media_type, content) in ASSETS {
        let headers = [
            (CONTENT_TYPE, HeaderValue::from_static(media_type)),
            // So that a browser does not mix the assets of two versions.
            (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        ];
        router = router.route(path, get(move || async move { (headers, content) }));
    }
    router
}

/// A page with its title.
struct Page {
    title: String,
    content: Markup,
}

impl Page {
    fn new(title: impl Into<String>, content: Markup) -> Page {
        let title = title.into();
        Page { title, content }
    }

    fn markup(&self) -> Markup {
        let now = utc_now().as_microsecond();
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) " – Fieldgate" }
                    link rel="icon" href="/icon.svg";
                    link rel="stylesheet" href="/page.css";
                    script src="/page.js" defer {}
                }
                body {
                    a .skip href="#main" { "Skip to content" }
                    header {
                        a .name href="/" { "Fieldgate" }
                        nav aria-label="Pages" {
                            a href="/" { "Fleet" }
                            a href="/completeness" { "Completeness" }
                            a href="/quarantine" { "Quarantine" }
                        }
                    }
                    main #main tabindex="-1" { (self.content) }
                    footer {
                        p {
                            "Times are UTC. Page loaded " (time(now)) " from Fieldgate " (env!("CARGO_PKG_VERSION")) ". "
                            span #connection role="status" {}
                        }
                    }
                }
            }
        }
    }
}

impl IntoResponse for Page {
    fn into_response(self) -> Response {
        let headers = [
            (
                CONTENT_TYPE,
                HeaderValue::from_static("text/html; charset=utf-8"),
            ),
            (CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
            (CACHE_CONTROL, HeaderValue::from_static("no-store")),
            (CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        ];
        (headers, self.markup().into_string()).into_response()
    }
}

/// A problem, shown as a page.
struct Failed(Problem);

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Failed {
        Failed(problem)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Failed(Problem { status, error, fix }) = self;
        let reason = status.canonical_reason().unwrap_or("Error");
        let content = html! {
            h1 { (reason) }
            p { (error) }
            p { "What to do: " (fix) "." }
            p { a href="/" { "Show the fleet" } }
        };
        let mut response = (status, Page::new(reason, content)).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            let after = HeaderValue::from_static(RETRY_AFTER_S);
            response.headers_mut().insert(RETRY_AFTER, after);
        }
        response
    }
}

async fn not_found() -> Failed {
    let fix = "start at the list of devices";
    Failed(Problem::new(StatusCode::NOT_FOUND, "no such page", fix))
}

/// Devices on a page of a list.
const DEVICES_AT_ONCE: i64 = 50;
/// Highest number of a page.
const PAGE_MAX: i64 = 1_000_000;

/// Returns the number of the wanted page, which is 1 by default.
fn page_number(wanted: Option<i64>) -> Result<i64, Problem> {
    let number = wanted.unwrap_or(1);
    if (1..=PAGE_MAX).contains(&number) {
        return Ok(number);
    }
    let error = format!("invalid query: page must be from 1 to {PAGE_MAX}");
    Err(Problem::bad_request(error, "begin with page 1"))
}

/// Returns links to the pages before and after `page` of a list of `total` devices, unless it has one page.
fn pages(page: i64, total: i64, address: impl Fn(i64) -> String) -> Markup {
    let last = (total + DEVICES_AT_ONCE - 1) / DEVICES_AT_ONCE;
    html! {
        @if last > 1 || page > 1 {
            nav .pages aria-label="Pages of devices" {
                @if page > 1 { a rel="prev" href=(address(page - 1)) { "Previous" } }
                span { "Page " (page) " of " (last.max(1)) }
                @if page < last { a rel="next" href=(address(page + 1)) { "Next" } }
            }
        }
    }
}

/// Shows a time; `page.js` adds the time in the zone of the browser.
fn time(us: i64) -> Markup {
    let text = utc_text(us);
    html! { time datetime=(text) { (text) } }
}

/// Shows the age of a time, and the time.
fn seen(us: Option<i64>, now_us: i64) -> Markup {
    match us {
        None => html! { "never" },
        Some(us) => {
            html! { time datetime=(utc_text(us)) title=(utc_text(us)) { (age(us, now_us)) } }
        }
    }
}

/// Shows a state, by its word and not by its colour alone.
fn state(name: &str) -> Markup {
    html! { span class={ "state " (name) } { (name) } }
}

fn device_link(name: &str) -> Markup {
    html! {
        // A device that is being removed has no page.
        @if name.starts_with('#') { (name) } @else {
            // A name has only letters, digits and `._:-`, all of which a path may have.
            a href={ "/devices/" (name) } { (name) }
        }
    }
}

/// Formats a number with separators between thousands.
fn number(value: f64) -> String {
    let digits = format!("{value:.0}");
    let (sign, digits) = match digits.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", &*digits),
    };
    let mut text = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_separators() {
        for (value, text) in [
            (0.0, "0"),
            (999.4, "999"),
            (1000.0, "1,000"),
            (1_234_567.0, "1,234,567"),
            (-1000.0, "-1,000"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn text_of_devices_is_escaped() {
        let failed = Failed(Problem::bad_request("<script>", "a & b"));
        let Failed(Problem { error, .. }) = failed;
        let page = Page::new("<title>", html! { (error) });
        let text = page.markup().into_string();
        assert!(
            !text.contains("<script>") && text.contains("&lt;script&gt;"),
            "{text}"
        );
        assert!(
            text.contains("<title>&lt;title&gt; – Fieldgate</title>"),
            "{text}"
        );
    }
}
