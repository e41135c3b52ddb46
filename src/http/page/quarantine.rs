//! `/quarantine`: frames that could not be decoded, and one of them field by field.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use maud::{Markup, html};

use super::table::{Column, table};
use super::{Failed, Page, device_link, number, time};
use crate::decode::explain::{Dissection, explain};
use crate::http::Shared;
use crate::http::devices::within;
use crate::http::problem::Problem;
use crate::store::admin::replay::QuarantinedFrame;
use crate::store::admin::{Access, Connection, Row};
use crate::text::code_text;

/// Frames on the page.
const FRAMES: i64 = 100;

/// A frame in quarantine, in a list.
pub(super) struct Entry {
    id: i64,
    device: String,
    seq: i64,
    received_at_us: i64,
    refused_as: String,
}

/// Columns of an [`Entry`].
pub(super) const ENTRIES: &str = "SELECT q.id, d.name, q.seq, q.received_at, q.code, q.detail
    FROM quarantine AS q JOIN devices AS d ON d.id = q.device_id";

impl Entry {
    pub(super) fn of(row: &Row) -> Result<Entry, crate::store::admin::QueryError> {
        Ok(Entry {
            id: row.integer(0)?,
            device: row.text(1)?.to_owned(),
            seq: row.integer(2)?,
            received_at_us: row.integer(3)?,
            refused_as: format!("{}: {}", code_text(row.integer(4)?), row.text(5)?),
        })
    }
}

/// Shows the newest frames.
pub(super) async fn list(State(site): State<Shared>) -> Result<Page, Failed> {
    let (total, entries) = within(async {
        let mut store = site.pages.quick.store().await;
        let total = store.rows("SELECT count(*) FROM quarantine", &[]).await?;
        let total = total.first().map_or(Ok(0), |row| row.integer(0))?;
        let sql = format!("{ENTRIES} ORDER BY q.id DESC LIMIT $1");
        let rows = store.rows(&sql, &[FRAMES.into()]).await?;
        let entries: Result<Vec<_>, _> = rows.iter().map(Entry::of).collect();
        Ok((total, entries?))
    })
    .await?;
    let content = html! {
        h1 #heading { "Quarantine" }
        p {
            "Frames that arrived intact but could not be decoded. They are kept as received. "
            code { "fieldgate quarantine replay" } " stores those that can be decoded now."
        }
        p { (number(total as f64)) (if total == 1 { " frame" } else { " frames" }) @if total > FRAMES { ", of which the newest " (FRAMES) " are shown" } }
        (frames(&entries, "heading"))
    };
    Ok(Page::new("Quarantine", content))
}

/// Returns a table of frames, which the element `labelled_by` names.
pub(super) fn frames(entries: &[Entry], labelled_by: &str) -> Markup {
    html! {
        @if entries.is_empty() {
            p { "No frame is in quarantine." }
        } @else {
            (table(labelled_by,
                [Column::Text("Frame"), Column::Text("Device"), Column::Number("Number"), Column::Text("Received"), Column::Text("Refused as")],
                entries.iter().map(|entry| [
                    html! { a href={ "/quarantine/" (entry.id) } { "Frame " (entry.id) } },
                    device_link(&entry.device),
                    html! { (entry.seq) },
                    time(entry.received_at_us),
                    html! { (entry.refused_as) },
                ])
            ))
        }
    }
}

/// Shows a frame field by field.
pub(super) async fn frame(
    State(site): State<Shared>,
    Path(id): Path<String>,
) -> Result<Page, Failed> {
    let none = || {
        let fix =
            "see the list of frames in quarantine; a replayed or purged frame is no longer there";
        Problem::new(StatusCode::NOT_FOUND, "no such frame in quarantine", fix)
    };
    let id: i64 = id.parse().map_err(|_| none())?;
    let found = within(async {
        // The lock bounds the number of connections.
        let _turn = site.pages.slow.store().await;
        let mut connection = Connection::open(&site.pages.store, Access::Poll).await?;
        let condition = format!("q.id = {id}");
        let frames = connection
            .quarantined_frames(&condition, &[], i64::MIN, 1)
            .await?;
        let Some(kept) = frames.into_iter().next() else {
            return Ok(None);
        };
        let rows = connection
            .rows(&format!("{ENTRIES} WHERE q.id = $1"), &[id.into()])
            .await?;
        let Some(entry) = rows.first().map(Entry::of).transpose()? else {
            return Ok(None);
        };
        let explained = explain(&mut connection, &kept).await?;
        Ok(Some((kept, entry, explained)))
    })
    .await?;
    let (kept, entry, explained) = found.ok_or_else(none)?;
    let title = format!("Frame {id} in quarantine");
    let content = html! {
        h1 #heading { (title) }
        dl .facts {
            div { dt { "Device" } dd { (device_link(&entry.device)) } }
            div { dt { "Number" } dd { (entry.seq) } }
            div { dt { "Received" } dd { (time(entry.received_at_us)) } }
            div { dt { "Bytes" } dd { (kept.bytes.len()) } }
            div { dt { "Refused as" } dd { (entry.refused_as) } }
            div { dt { "Now" } dd { (verdict(explained.as_ref())) } }
        }
        (parts(&kept, explained.as_ref()))
    };
    Ok(Page::new(title, content))
}

fn verdict(explained: Option<&Dissection>) -> String {
    match explained {
        Some(explained) => explained.verdict(),
        None => "not a complete frame with a valid header".to_owned(),
    }
}

fn parts(kept: &QuarantinedFrame, explained: Option<&Dissection>) -> Markup {
    let Some(explained) = explained else {
        return html! { p { code { (digits(&kept.bytes)) } } };
    };
    html! {
        table .cards aria-labelledby="heading" {
            thead { tr {
                th scope="col" { "Field" }
                th .number scope="col" { "Offset" }
                th scope="col" { "Bytes" }
                th scope="col" { "Value" }
            } }
            tbody {
                @for line in explained.lines(kept.bytes.len()) {
                    tr .fault[line.fault_at.is_some()] {
                        th scope="row" { (line.part.name) }
                        td .number data-label="Offset" { (line.part.bytes.start) }
                        td data-label="Bytes" { code { (digits(&kept.bytes[line.part.bytes.clone()])) } }
                        td data-label="Value" {
                            (line.part.value)
                            @if let Some(at) = line.fault_at {
                                " " strong .warning { "byte " (at) ": " (explained.verdict()) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Returns the bytes as hexadecimal digits, which a browser wraps.
fn digits(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}
