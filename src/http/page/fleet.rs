//! `/`: the fleet in numbers, what the gateway stores, and a table of devices.

use axum::extract::State;
use form_urlencoded::Serializer;
use maud::{Markup, html};
use serde::Deserialize;

use super::rates::Rate;
use super::{DEVICES_AT_ONCE, Failed, Page, device_link, number, page_number, pages, seen, state};
use crate::http::Shared;
use crate::http::devices::within;
use crate::http::problem::{Parameters, Problem, storable};
use crate::store::admin::fleet::{self, Device, Numbers, Order, Selection};
use crate::store::admin::presence::Presence;
use crate::time::utc_now;

/// Query of a request.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Part of the names of the devices.
    #[serde(default)]
    q: String,
    /// Name of a state; empty for all, as a form sends it.
    #[serde(default)]
    state: String,
    #[serde(default)]
    sort: Order,
    /// Overrides the default direction, [`is_descending`].
    desc: Option<bool>,
    page: Option<i64>,
}

impl Wanted {
    fn selection(&self, page: i64, now_us: i64) -> Result<Selection, Problem> {
        let state = { Presence::ALL.into_iter() }.find(|state| state.name() == self.state);
        if state.is_none() && !self.state.is_empty() {
            let names = Presence::ALL.map(Presence::name).join(", ");
            let error = format!("invalid query: unknown state {:?}", self.state);
            return Err(Problem::bad_request(error, format!("use one of {names}")));
        }
        Ok(Selection {
            text: storable("q", self.q.trim().to_owned())?,
            state,
            order: self.sort,
            is_descending: self.is_descending(),
            limit: DEVICES_AT_ONCE,
            offset: (page - 1) * DEVICES_AT_ONCE,
            now_us,
        })
    }

    fn is_descending(&self) -> bool {
        self.desc.unwrap_or(is_descending(self.sort))
    }

    /// Returns the address of the same list with another page and order.
    fn address(&self, page: i64, sort: Order, desc: bool) -> String {
        let mut query = Serializer::new(String::new());
        for (name, value) in [("q", &self.q), ("state", &self.state)] {
            if !value.is_empty() {
                query.append_pair(name, value);
            }
        }
        if sort != Order::default() {
            query.append_pair("sort", order_name(sort));
        }
        if desc != is_descending(sort) {
            query.append_pair("desc", &desc.to_string());
        }
        if page > 1 {
            query.append_pair("page", &page.to_string());
        }
        format!("/?{}", query.finish())
    }
}

/// Orders: name in the query, label, and the order itself.
const ORDERS: [(&str, &str, Order); 4] = [
    ("name", "Device", Order::Name),
    ("state", "State", Order::State),
    ("seen", "Last seen", Order::Seen),
    ("missing", "Lost today", Order::Missing),
];

fn order_name(order: Order) -> &'static str {
    let found = ORDERS.iter().find(|(_, _, other)| *other == order);
    found.map_or("", |(name, ..)| name)
}

/// Returns whether the devices with the highest values come first unless the query says otherwise: those with the most
/// lost frames, and those that were seen last.
fn is_descending(order: Order) -> bool {
    matches!(order, Order::Missing | Order::Seen)
}

/// Shows the fleet.
pub(super) async fn fleet(
    State(site): State<Shared>,
    wanted: Result<Parameters<Wanted>, Problem>,
) -> Result<Page, Failed> {
    let Parameters(wanted) = wanted?;
    let now_us = utc_now().as_microsecond();
    let page = page_number(wanted.page)?;
    let selection = wanted.selection(page, now_us)?;
    let (numbers, (total, devices)) = within(async {
        let mut store = site.pages.quick.store().await;
        let numbers = fleet::numbers(&mut store).await?;
        Ok((numbers, fleet::devices(&mut store, &selection).await?))
    })
    .await?;
    let rates = site.pages.live.rates();
    let content = html! {
        h1 { "Fleet" }
        (numbers_markup(&numbers))
        (rates_markup(&rates))
        h2 #devices-heading { "Devices" }
        (search(&wanted))
        div #devices data-refresh="5" { (list(&wanted, page, total, &devices, now_us)) }
    };
    Ok(Page::new("Fleet", content))
}

/// Returns the numbers with the keys under which the stream of updates sends them.
pub(super) fn numbers_by_key(numbers: &Numbers) -> Vec<(&'static str, String)> {
    let devices = Presence::ALL.iter().zip(numbers.devices);
    let mut by_key: Vec<_> = devices
        .map(|(state, devices)| (state.name(), number(devices as f64)))
        .collect();
    by_key.push(("quarantined", number(numbers.quarantined as f64)));
    by_key
}

fn numbers_markup(numbers: &Numbers) -> Markup {
    html! {
        ul .numbers {
            @for (key, value) in numbers_by_key(numbers) {
                @let (address, label) = match key {
                    "quarantined" => ("/quarantine".to_owned(), "quarantined frames"),
                    "never" => ("/?state=never".to_owned(), "never seen"),
                    state => (format!("/?state={state}"), state),
                };
                li { a href=(address) { strong data-live=(key) { (value) } " " (label) } }
            }
        }
    }
}

fn rates_markup(rates: &[Rate]) -> Markup {
    html! {
        dl .facts {
            @for rate in rates {
                div { dt { (rate.label) } dd data-live=(rate.key) { (rate.text) } }
            }
        }
    }
}

fn search(wanted: &Wanted) -> Markup {
    html! {
        form method="get" action="/" role="search" {
            label { "Name contains " input type="search" name="q" value=(wanted.q) maxlength="64"; }
            label { "State "
                select name="state" {
                    option value="" { "all" }
                    @for state in Presence::ALL {
                        option value=(state.name()) selected[state.name() == wanted.state] { (state.name()) }
                    }
                }
            }
            label { "Sorted by "
                select name="sort" {
                    @for (name, label, order) in ORDERS {
                        option value=(name) selected[order == wanted.sort] { (label) }
                    }
                }
            }
            @if let Some(desc) = wanted.desc { input type="hidden" name="desc" value=(desc); }
            button { "Show" }
        }
    }
}

fn list(wanted: &Wanted, page: i64, total: i64, devices: &[Device], now_us: i64) -> Markup {
    html! {
        p { (number(total as f64)) " " (if total == 1 { "device" } else { "devices" }) }
        @if devices.is_empty() {
            p { "No device matches. A device appears here when it logs in for the first time." }
        } @else {
            (table(wanted, devices, now_us))
        }
        (pages(page, total, |page| wanted.address(page, wanted.sort, wanted.is_descending())))
    }
}

fn table(wanted: &Wanted, devices: &[Device], now_us: i64) -> Markup {
    html! {
        table .cards aria-labelledby="devices-heading" {
            thead { tr {
                @for (_, label, order) in ORDERS { (sortable(wanted, label, order)) }
                th scope="col" { "Clock" }
                th scope="col" { "Firmware" }
                th scope="col" { "Address" }
            } }
            tbody {
                @for device in devices {
                    tr {
                        th scope="row" { (device_link(&device.name)) }
                        td data-label="State" {
                            (state(&device.state))
                            @if device.has_twin { " " strong .warning { "two devices use this name" } }
                        }
                        td data-label="Last seen" { (seen(device.seen_at_us, now_us)) }
                        td .number data-label="Lost today" { (number(device.missing_today)) }
                        td data-label="Clock" { (device.quality.unwrap_or("unknown")) }
                        td data-label="Firmware" { (device.firmware.as_deref().unwrap_or("unknown")) }
                        td data-label="Address" { (device.peer.as_deref().unwrap_or("not connected")) }
                    }
                }
            }
        }
    }
}

/// Returns a column header whose link sorts by it, or reverses the order if the table is sorted by it.
fn sortable(wanted: &Wanted, label: &str, order: Order) -> Markup {
    let is_sorted = wanted.sort == order;
    let sort = match (is_sorted, wanted.is_descending()) {
        (false, _) => None,
        (true, false) => Some("ascending"),
        (true, true) => Some("descending"),
    };
    let desc = match is_sorted {
        true => !wanted.is_descending(),
        false => is_descending(order),
    };
    html! {
        th .number[order == Order::Missing] scope="col" aria-sort=[sort] {
            a href=(wanted.address(1, order, desc)) { (label) }
            @match sort {
                Some("ascending") => { span aria-hidden="true" { " ▲" } },
                Some(_) => { span aria-hidden="true" { " ▼" } },
                None => {},
            }
        }
    }
}
