//! `/devices/NAME`: a device with its newest readings, charts, completeness, sessions, events and refused frames.

use std::collections::HashMap;

use axum::extract::State;
use maud::{Markup, PreEscaped, html};
use serde::Deserialize;

use super::chart::{self, RANGES, Range};
use super::completeness::{EXPLANATION, date, first_day_us, percent};
use super::quarantine::{ENTRIES, Entry, frames};
use super::table::{Column, table};
use super::{Failed, Page, number, seen, state, time};
use crate::http::Shared;
use crate::http::devices::{Device, Newest, device as find_device, newest, within};
use crate::http::problem::{Name, Parameters, Problem};
use crate::store::admin::completeness::{Days, days};
use crate::store::admin::feed::Number;
use crate::store::admin::history::{self, Interval, READINGS_MAX, Series};
use crate::store::admin::{QueryError, Reconnecting, Row};
use crate::text::code_text;
use crate::time::utc_now;

/// Charts on a page.
const CHARTS: i64 = 12;
const DAYS: usize = 14;
const EVENTS: i64 = 30;
const SESSIONS: usize = 20;
/// Events of sessions that are read. A session has two.
const SESSION_EVENTS: i64 = 2 * SESSIONS as i64;
const QUARANTINED: i64 = 20;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Name of a [`Range`].
    range: Option<String>,
    /// Number of series before the first chart.
    #[serde(default)]
    skip: u32,
    /// The only part that is wanted; all by default.
    part: Option<Part>,
}

/// A part of the page that `page.js` loads again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    Newest,
    Charts,
}

impl Wanted {
    fn wants(&self, part: Part) -> bool {
        self.part.is_none_or(|wanted| wanted == part)
    }
}

/// Shows a device.
pub(super) async fn device(
    State(site): State<Shared>,
    name: Result<Name, Problem>,
    wanted: Result<Parameters<Wanted>, Problem>,
) -> Result<Page, Failed> {
    let (Name(name), Parameters(wanted)) = (name?, wanted?);
    let range = range(wanted.range.as_deref())?;
    let now_us = utc_now().as_microsecond();
    let device = find_device(&site.pages.quick, &name).await?;
    let mut content = Vec::new();
    if wanted.part.is_none() {
        content.push(html! { h1 { (device.device) } });
    }
    if wanted.wants(Part::Newest) {
        let newest = newest(&site.pages.quick, &name).await?;
        content.push(html! {
            div #state data-refresh="5" data-part="newest" { (facts(&device, now_us)) }
            h2 #newest-heading { "Newest readings" }
            div #newest data-refresh="5" data-part="newest" { (newest_markup(&newest)) }
        });
    }
    if wanted.wants(Part::Charts) {
        let (begin_us, skip) = (now_us - range.duration_us, i64::from(wanted.skip));
        let charts = within(async {
            let mut store = site.pages.slow.store().await;
            Charts::read(&mut store, &name, skip, begin_us, range).await
        })
        .await?;
        content.push(html! {
            h2 { "Charts" }
            div #charts data-refresh="30" data-part="charts" { (charts.markup(&name, range, skip, begin_us)) }
        });
    }
    if wanted.part.is_none() {
        content.push(history_markup(&site, &name, now_us).await?);
    }
    let content = html! { @for part in content { (part) } };
    Ok(Page::new(device.device, content))
}

/// Returns what is shown once: completeness, sessions, events and frames in quarantine.
async fn history_markup(site: &Shared, name: &str, now_us: i64) -> Result<Markup, Problem> {
    let records = within(async {
        let mut store = site.pages.quick.store().await;
        Records::read(&mut store, name).await
    })
    .await?;
    let begin_us = first_day_us(now_us, DAYS);
    let mut days = within(async {
        let mut store = site.pages.slow.store().await;
        days(&mut store, &[records.id], begin_us, DAYS).await
    })
    .await?;
    let days = days.remove(&records.id).unwrap_or_default();
    Ok(html! {
        h2 #days-heading { "Completeness" }
        p { (EXPLANATION) }
        (days_markup(&days, begin_us))
        h2 #sessions-heading { "Sessions" }
        (sessions_markup(&records.sessions))
        h2 #events-heading { "Events" }
        (events_markup(&records.events))
        h2 #quarantine-heading { "Frames in quarantine" }
        (frames(&records.quarantined, "quarantine-heading"))
    })
}

fn range(name: Option<&str>) -> Result<&'static Range, Problem> {
    let Some(name) = name else {
        return Ok(&RANGES[0]);
    };
    let found = RANGES.iter().find(|range| range.name == name);
    found.ok_or_else(|| {
        let names = RANGES.map(|range| range.name).join(", ");
        let error = format!("invalid query: unknown range {name:?}");
        Problem::bad_request(error, format!("use one of {names}"))
    })
}

fn facts(device: &Device, now_us: i64) -> Markup {
    let source = if device.is_interval_set {
        "set"
    } else {
        "learned"
    };
    html! {
        dl .facts {
            div { dt { "State" } dd { (state(&device.presence)) } }
            div { dt { "Last seen" } dd { (seen(device.last_seen_at, now_us)) } }
            div { dt { "Last frame" } dd { (seen(device.last_frame_at, now_us)) } }
            div { dt { "First seen" } dd { (seen(device.first_seen_at, now_us)) } }
            div { dt { "Expected interval" } dd { (device.interval_s) " s, " (source) } }
            div { dt { "Firmware" } dd { (device.firmware.as_deref().unwrap_or("unknown")) } }
            div { dt { "Frames" } dd { (number(device.frames as f64)) } }
            div { dt { "Readings" } dd { (number(device.readings as f64)) } }
            div { dt { "Lost frames" } dd { (number(device.missing as f64)) } }
        }
    }
}

fn value(value: &Number) -> String {
    match value {
        Number::Missing => "missing".to_owned(),
        Number::Finite(value) => value.to_string(),
        Number::Infinite(text) => (*text).to_owned(),
    }
}

fn newest_markup(newest: &[Newest]) -> Markup {
    html! {
        @if newest.is_empty() {
            p { "This device has sent no reading yet." }
        } @else {
            (table("newest-heading", [Column::Text("Channel"), Column::Number("Value"), Column::Text("Time"), Column::Text("Clock")],
                newest.iter().map(|reading| [
                    html! { (reading.channel) },
                    html! { (value(&reading.value)) " " (reading.unit) },
                    time(reading.ts),
                    html! { (reading.quality.as_deref().unwrap_or("unknown")) },
                ])
            ))
        }
    }
}

/// The series of a page with their readings.
struct Charts {
    series: Vec<Series>,
    intervals: HashMap<i64, Vec<Interval>>,
    has_more: bool,
}

impl Charts {
    async fn read(
        store: &mut Reconnecting,
        name: &str,
        skip: i64,
        begin_us: i64,
        range: &Range,
    ) -> Result<Charts, QueryError> {
        let device = id_of(store, name).await?;
        let mut series = history::series(store, device, CHARTS + 1, skip).await?;
        let has_more = series.len() > CHARTS as usize;
        series.truncate(CHARTS as usize);
        let ids: Vec<i64> = series.iter().map(|series| series.id).collect();
        let intervals = history::intervals(store, &ids, begin_us, range.interval_us()).await?;
        Ok(Charts {
            series,
            intervals,
            has_more,
        })
    }

    fn markup(&self, name: &str, range: &Range, skip: i64, begin_us: i64) -> Markup {
        let address = |range: &str, skip: i64| match skip {
            0 => format!("/devices/{name}?range={range}"),
            _ => format!("/devices/{name}?range={range}&skip={skip}"),
        };
        html! {
            nav .pages aria-label="Time of the charts" {
                @for other in &RANGES {
                    a href=(address(other.name, skip)) aria-current=[(other == range).then_some("true")] {
                        (other.label)
                    }
                }
            }
            @if self.series.is_empty() { p { "No channels." } }
            @if self.intervals.values().flatten().any(|interval| interval.is_cut) {
                p { small {
                    "Some intervals of " (range.interval_us() as f64 / 1e6) " s have more than " (READINGS_MAX)
                    " readings. For these, the charts show the smallest and largest of the first " (READINGS_MAX) "."
                } }
            }
            div .charts {
                @for series in &self.series { (self.figure(series, range, begin_us)) }
            }
            @if skip > 0 || self.has_more {
                nav .pages aria-label="Pages of charts" {
                    @if skip > 0 { a rel="prev" href=(address(range.name, (skip - CHARTS).max(0))) { "Previous" } }
                    @if self.has_more { a rel="next" href=(address(range.name, skip + CHARTS)) { "Next" } }
                }
            }
        }
    }

    fn figure(&self, series: &Series, range: &Range, begin_us: i64) -> Markup {
        let none = Vec::new();
        let intervals = self.intervals.get(&series.id).unwrap_or(&none);
        html! {
            figure {
                figcaption {
                    strong { (series.channel) } " " (series.unit) " " small { (series.kind) }
                }
                @match chart::svg(intervals, begin_us, range) {
                    Some(svg) => {
                        div role="img" aria-label=(summary(series, intervals, range)) { (PreEscaped(svg)) }
                    },
                    None => p .none { "No reading in the " (range.label.to_lowercase()) "." },
                }
            }
        }
    }
}

/// Describes a chart to people who do not see it.
fn summary(series: &Series, intervals: &[Interval], range: &Range) -> String {
    let extremes = intervals.iter().filter_map(|interval| interval.extremes);
    let (low, high) = extremes.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), found| {
        (low.min(found.0), high.max(found.1))
    });
    let Series { channel, unit, .. } = series;
    format!(
        "{channel} in the {}: from {low} to {high} {unit}",
        range.label.to_lowercase()
    )
}

fn days_markup(days: &Days, begin_us: i64) -> Markup {
    let columns = [
        Column::Text("Day"),
        Column::Number("Complete"),
        Column::Number("Received"),
        Column::Number("Late"),
        Column::Number("Lost"),
    ];
    let rows = days.iter().enumerate().rev().map(|(index, day)| {
        let date = html! { (date(begin_us, index)) };
        let Some(day) = day else {
            let none = html! { span .none { "no data" } };
            return [date, none, html! {}, html! {}, html! {}];
        };
        let class = if day.missing == 0 { "full" } else { "partial" };
        let count = |count| html! { (number(count as f64)) };
        [
            date,
            html! { span class=(class) { (percent(day)) } },
            count(day.received),
            count(day.late),
            count(day.missing),
        ]
    });
    table("days-heading", columns, rows)
}

/// A session; either end may be older than the events that were read.
struct Session {
    began_us: Option<i64>,
    /// Time and reason of its end; `None` while it is open.
    ended: Option<(i64, String)>,
    detail: String,
}

struct Event {
    at_us: i64,
    kind: String,
    level: String,
    /// Its code, if the kind of the event has one.
    code: String,
    text: String,
}

impl Event {
    fn of(row: &Row) -> Result<Event, QueryError> {
        let (kind, code) = (row.text(1)?.to_owned(), row.integer(3)?);
        Ok(Event {
            at_us: row.integer(0)?,
            code: match kind.as_str() {
                "event" => code.to_string(),
                "disconnected" | "refused" => code_text(code),
                _ => String::new(),
            },
            kind,
            level: row.text(2)?.to_owned(),
            text: row.text(4)?.to_owned(),
        })
    }
}

/// What the store has about a device besides its readings.
struct Records {
    id: i64,
    sessions: Vec<Session>,
    events: Vec<Event>,
    quarantined: Vec<Entry>,
}

/// The first list of kinds is that of the index `device_events_of_sessions`.
const SESSIONS_SQL: &str = "SELECT session, kind, at, code, detail FROM device_events
    WHERE device_id = $1 AND kind IN ('connected', 'disconnected', 'refused', 'presence', 'twin')
        AND kind IN ('connected', 'disconnected')
    ORDER BY id DESC LIMIT $2";
const EVENTS_SQL: &str = "SELECT at, kind, level, code, text FROM events
    WHERE device = $1 ORDER BY at DESC LIMIT $2";

/// Returns the id of a device; 0 if it was removed a moment ago.
async fn id_of(store: &mut Reconnecting, name: &str) -> Result<i64, QueryError> {
    let sql = "SELECT id FROM devices WHERE name = $1";
    let rows = store.rows(sql, &[name.into()]).await?;
    rows.first().map_or(Ok(0), |row| row.integer(0))
}

impl Records {
    async fn read(store: &mut Reconnecting, name: &str) -> Result<Records, QueryError> {
        let id = id_of(store, name).await?;
        let rows = store
            .rows(SESSIONS_SQL, &[id.into(), SESSION_EVENTS.into()])
            .await?;
        let sessions = sessions(&rows)?;
        let rows = store
            .rows(EVENTS_SQL, &[name.into(), EVENTS.into()])
            .await?;
        let events = rows.iter().map(Event::of).collect::<Result<_, _>>()?;
        let sql = format!("{ENTRIES} WHERE q.device_id = $1 ORDER BY q.id DESC LIMIT $2");
        let rows = store.rows(&sql, &[id.into(), QUARANTINED.into()]).await?;
        let quarantined = rows.iter().map(Entry::of).collect::<Result<_, _>>()?;
        Ok(Records {
            id,
            sessions,
            events,
            quarantined,
        })
    }
}

/// Joins the starts and ends of sessions, which come newest first.
fn sessions(rows: &[Row]) -> Result<Vec<Session>, QueryError> {
    let mut sessions: Vec<(Option<i64>, Session)> = Vec::new();
    for row in rows {
        let (number, at_us) = (row.integer_or_null(0)?, row.integer(2)?);
        match row.text_or_null(1)? {
            Some("disconnected") => sessions.push((
                number,
                Session {
                    began_us: None,
                    ended: Some((at_us, code_text(row.integer(3)?))),
                    detail: row.text(4)?.to_owned(),
                },
            )),
            Some("connected") => {
                let ended =
                    { sessions.iter_mut() }.find(|(other, _)| number.is_some() && *other == number);
                match ended {
                    Some((_, session)) => session.began_us = Some(at_us),
                    None => sessions.push((
                        number,
                        Session {
                            began_us: Some(at_us),
                            ended: None,
                            detail: row.text(4)?.to_owned(),
                        },
                    )),
                }
            }
            _ => {}
        }
    }
    sessions.truncate(SESSIONS);
    Ok(sessions.into_iter().map(|(_, session)| session).collect())
}

fn sessions_markup(sessions: &[Session]) -> Markup {
    html! {
        @if sessions.is_empty() {
            p { "No session yet." }
        } @else {
            (table("sessions-heading", [Column::Text("Began"), Column::Text("Ended"), Column::Text("Reason"), Column::Text("Detail")],
                sessions.iter().map(session_row)))
        }
    }
}

fn session_row(session: &Session) -> [Markup; 4] {
    let began = session.began_us.map_or(html! { "earlier" }, time);
    let (ended, reason) = match &session.ended {
        Some((us, reason)) => (time(*us), html! { (reason) }),
        None => (html! { "open" }, html! {}),
    };
    [began, ended, reason, html! { (session.detail) }]
}

fn events_markup(events: &[Event]) -> Markup {
    html! {
        @if events.is_empty() {
            p { "No event yet." }
        } @else {
            (table("events-heading", [Column::Text("Time"), Column::Text("Kind"), Column::Text("Level"), Column::Number("Code"), Column::Text("Text")],
                events.iter().map(|event| [
                    time(event.at_us),
                    html! { (event.kind) },
                    html! { (event.level) },
                    html! { (event.code) },
                    html! { (event.text) },
                ])
            ))
        }
    }
}
