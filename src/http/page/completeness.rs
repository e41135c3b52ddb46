//! `/completeness`: for each device and day, which part of the numbered frames arrived, out of the ledger.

use axum::extract::State;
use form_urlencoded::Serializer;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use maud::{Markup, html};
use serde::Deserialize;

use super::{DEVICES_AT_ONCE, Failed, Page, device_link, number, page_number, pages};
use crate::http::Shared;
use crate::http::devices::within;
use crate::http::problem::{Parameters, Problem, storable};
use crate::store::admin::completeness::{Day, days};
use crate::store::admin::fleet::{self, Order, Selection};
use crate::time::{DAY_US, utc_now};

/// Days in the table of all devices, the last of which is today.
const DAYS: usize = 7;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    #[serde(default)]
    q: String,
    page: Option<i64>,
}

/// Shows the last days of all devices.
pub(super) async fn completeness(
    State(site): State<Shared>,
    wanted: Result<Parameters<Wanted>, Problem>,
) -> Result<Page, Failed> {
    let Parameters(Wanted { q, page }) = wanted?;
    let page = page_number(page)?;
    let q = storable("q", q.trim().to_owned())?;
    let now_us = utc_now().as_microsecond();
    let selection = Selection {
        text: q.clone(),
        order: Order::Name,
        limit: DEVICES_AT_ONCE,
        offset: (page - 1) * DEVICES_AT_ONCE,
        now_us,
        ..Selection::default()
    };
    let begin_us = first_day_us(now_us, DAYS);
    let (total, devices, found) = within(async {
        let mut store = site.pages.slow.store().await;
        let (total, devices) = fleet::devices(&mut store, &selection).await?;
        let ids: Vec<i64> = devices.iter().map(|device| device.id).collect();
        let found = days(&mut store, &ids, begin_us, DAYS).await?;
        Ok((total, devices, found))
    })
    .await?;
    let dates: Vec<String> = (0..DAYS).map(|day| date(begin_us, day)).collect();
    let address = |page: i64| {
        let mut query = Serializer::new(String::new());
        if !q.is_empty() {
            query.append_pair("q", &q);
        }
        format!(
            "/completeness?{}",
            query.append_pair("page", &page.to_string()).finish()
        )
    };
    let content = html! {
        h1 #heading { "Completeness" }
        p { (EXPLANATION) }
        form method="get" action="/completeness" role="search" {
            label { "Name contains " input type="search" name="q" value=(q) maxlength="64"; }
            button { "Show" }
        }
        @if devices.is_empty() {
            p { "No device matches." }
        } @else {
            table .cards aria-labelledby="heading" {
                thead { tr {
                    th scope="col" { "Device" }
                    @for date in dates.iter().rev() { th .number scope="col" { (date) } }
                } }
                tbody {
                    @for device in &devices {
                        tr {
                            th scope="row" { (device_link(&device.name)) }
                            @for (day, date) in found[&device.id].iter().zip(&dates).rev() {
                                td .number data-label=(date) { (cell(day.as_ref())) }
                            }
                        }
                    }
                }
            }
        }
        (pages(page, total, address))
    };
    Ok(Page::new("Completeness", content))
}

/// What the numbers mean.
pub(super) const EXPLANATION: &str = "A device numbers its frames consecutively. Each day shows which percentage of \
    its frames arrived. “Late” frames arrived more than an hour after the end of the day. “Lost” frames were reported as \
    lost by the device or the store, and will not arrive. Frames that a device still keeps are not counted yet. Days are \
    UTC.";

/// Returns the start of the first of `days` days that end today, in UTC.
pub(super) fn first_day_us(now_us: i64, days: usize) -> i64 {
    now_us - now_us.rem_euclid(DAY_US) - (days as i64 - 1) * DAY_US
}

/// Returns the date of a day.
pub(super) fn date(begin_us: i64, day: usize) -> String {
    let at = Timestamp::from_microsecond(begin_us + day as i64 * DAY_US).unwrap_or_default();
    at.to_zoned(TimeZone::UTC).date().to_string()
}

fn cell(day: Option<&Day>) -> Markup {
    html! {
        @match day {
            None => { span .none { "no data" } },
            Some(day) => {
                span class=(if day.missing == 0 { "full" } else { "partial" }) { (percent(day)) }
                @if day.missing > 0 { " " small { (number(day.missing as f64)) " lost" } }
                @if day.late > 0 { " " small { (number(day.late as f64)) " late" } }
            },
        }
    }
}

/// Formats the part that arrived; only a complete day has 100 %.
pub(super) fn percent(day: &Day) -> String {
    if day.missing == 0 {
        return "100 %".to_owned();
    }
    let all = day.received as f64 + day.missing as f64;
    let part = (day.received as f64 / all * 10_000.0).floor() / 100.0;
    format!("{:.2} %", part.min(99.99))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_day_has_all_percent() {
        let day = |received, missing| Day {
            received,
            late: 0,
            missing,
        };
        for (day, text) in [
            (day(10, 0), "100 %"),
            (day(i64::MAX, 1), "99.99 %"),
            (day(1, 2), "33.33 %"),
            (day(0, i64::MAX), "0.00 %"),
        ] {
            assert_eq!(percent(&day), text);
        }
    }

    #[test]
    fn days_end_today() {
        // 2026-11-27T16:00:00Z
        let now_us = 1_795_795_200_000_000;
        let begin_us = first_day_us(now_us, 2);
        assert_eq!(date(begin_us, 1), "2026-11-27");
        assert_eq!(date(begin_us, 0), "2026-11-26");
    }
}
