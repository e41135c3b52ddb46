//! Vectors of the conversion from time since boot to UTC (R73 to R75). Expectations are written by
//! hand.

use serde_json::{Value, json};

const NOON: i64 = 1_760_000_000_000_000;
const S: i64 = 1_000_000;
const H: i64 = 3600 * S;
const WRAP: i64 = 1 << 32;

fn clock(boot: u32, offset_us: i64, delay_us: i64, measured_at_us: i64) -> Value {
    json!({ "boot": boot, "offset_us": offset_us, "delay_us": delay_us, "measured_at_us": measured_at_us })
}

/// A measurement, and the offset to use after it.
fn measured(boot: u32, offset_us: i64, delay_us: i64, at_us: i64, holds: i64) -> Value {
    json!({ "measured": clock(boot, offset_us, delay_us, at_us), "offset_us": holds })
}

fn frame(boot: u32, rows: (i64, i64), received_us: i64, expect: (i64, &str)) -> Value {
    let frame = json!({ "boot": boot, "oldest_us": rows.0, "newest_us": rows.1, "received_us": received_us });
    json!({ "frame": frame, "offset_us": expect.0, "quality": expect.1 })
}

fn utc(rows: (i64, i64), received_us: i64, quality: &str) -> Value {
    let frame = json!({ "oldest_us": rows.0, "newest_us": rows.1, "received_us": received_us });
    json!({ "frame": frame, "offset_us": 0, "quality": quality })
}

fn case(id: &str, note: &str, present: u32, known: &[Value], steps: Vec<Value>) -> Value {
    json!({ "id": id, "note": note, "present_boot": present, "known": known, "steps": steps })
}

pub fn file() -> Value {
    let about = "How a gateway converts times: it starts with the clocks in `known`; each step is a measurement of a \
        boot's clock or the rows of a frame, with the offset that then holds and the quality of the frame.";
    let cases = [measurements(), wraps(), chosen(), doubts()].concat();
    json!({ "about": about, "cases": cases })
}

fn measurements() -> Vec<Value> {
    let kept = clock(7, NOON, 10_000, NOON);
    vec![
        case("least-delay", "R73: 3,000 us of lead are used up after 60 s", 7, std::slice::from_ref(&kept), vec![
            measured(7, NOON + 500, 13_000, NOON + 59 * S, NOON),
            measured(7, NOON + 600, 13_000, NOON + 60 * S, NOON + 600),
            measured(7, NOON + 700, 9_000, NOON + 61 * S, NOON + 700),
        ]),
        case("clock-set-back", "R73: 2 h apart, however slow the newer exchange was", 7,
            &[clock(7, NOON + 2 * H, 10_000, NOON + 3 * H)], vec![
            measured(7, NOON, 900_000, NOON + H, NOON),
            frame(7, (H, H), NOON + H, (NOON, "anchored")),
        ]),
        case("clock-set-forward", "R73: 2 h apart", 7, std::slice::from_ref(&kept), vec![
            measured(7, NOON + 2 * H, 900_000, NOON + 3 * H, NOON + 2 * H),
        ]),
        case("slow-exchange", "R73: within half of both delays, so the precise one holds", 7, &[kept], vec![
            measured(7, NOON + 440_000, 900_000, NOON + 10 * S, NOON),
        ]),
    ]
}

fn wraps() -> Vec<Value> {
    let up = WRAP - 60 * S;
    let received = NOON + WRAP;
    vec![
        case("wrap-live", "R75: a counter of 32 bits of microseconds; anchored from the next measurement on", 7,
            &[clock(7, NOON, 1_000, NOON + up)], vec![
            frame(7, (up, up), NOON + up, (NOON, "anchored")),
            frame(7, (S, S), received + S, (NOON, "suspect")),
            frame(7, (2400 * S, 2400 * S), received + 2400 * S, (NOON, "suspect")),
            measured(7, received, 500_000, received + 2400 * S + 250_000, received),
            frame(7, (2401 * S, 2401 * S), received + 2401 * S, (received, "anchored")),
            frame(7, (2399 * S, 2401 * S), received + 2401 * S, (received, "suspect")),
        ]),
        case("wrap-unseen", "R75: the offset grew by 20 x 2^32 us, and the device's time did not go back", 7,
            &[clock(7, NOON, 1_000, NOON + 60 * S)], vec![
            measured(7, NOON + 20 * WRAP, 500_000, NOON + 20 * WRAP + 600 * S, NOON + 20 * WRAP),
            frame(7, (500 * S, 500 * S), NOON + 20 * WRAP + 601 * S, (NOON + 20 * WRAP, "suspect")),
            frame(7, (601 * S, 601 * S), NOON + 20 * WRAP + 601 * S, (NOON + 20 * WRAP, "anchored")),
        ]),
        case("other-channel", "R75: half an hour back is the order of frames", 7,
            &[clock(7, NOON, 1_000, NOON)], vec![
            frame(7, (H, H), NOON + 2 * H, (NOON, "anchored")),
            frame(7, (H / 2, H / 2), NOON + 2 * H, (NOON, "anchored")),
            frame(7, (H / 2 - 1, H / 2 - 1), NOON + 2 * H, (NOON, "suspect")),
        ]),
    ]
}

fn chosen() -> Vec<Value> {
    let present = clock(9, NOON, 1_000, NOON + S);
    let alive = NOON - 39 * H;
    vec![
        case("backlog-new-device", "R74: one offset, by the first frame", 9, std::slice::from_ref(&present), vec![
            frame(1, (0, H), NOON + 2 * S, (NOON + 2 * S - H, "unanchored")),
            frame(1, (H + 1, 2 * H), NOON + 3 * S, (NOON + 2 * S - H, "unanchored")),
            frame(1, (26 * H, 26 * H), NOON + 4 * S, (NOON + 2 * S - H, "suspect")),
        ]),
        case("backlog-after-contact", "R74: begins when the device was last known to be running", 9,
            &[present.clone(), clock(5, NOON - 41 * H, 1_000, NOON - 40 * H)], vec![
            frame(5, (2 * H, 2 * H), NOON + 2 * S, (NOON - 41 * H, "anchored")),
            frame(6, (0, H), NOON + 3 * S, (alive, "unanchored")),
            frame(6, (2 * H, 2 * H), NOON + 4 * S, (alive, "unanchored")),
            frame(8, (H, H), NOON + 5 * S, (alive + 2 * H, "unanchored")),
        ]),
        case("backlog-too-long", "R74: does not fit between then and receipt", 9,
            &[present, clock(5, NOON - 41 * H, 1_000, NOON - 40 * H)], vec![
            frame(6, (100 * H, 100 * H), NOON, (NOON - 100 * H, "unanchored")),
        ]),
        case("backlog-measured", "R74: a measurement replaces the chosen offset", 1, &[], vec![
            frame(1, (H, H), NOON, (NOON - H, "unanchored")),
            measured(1, NOON - 3 * H, 900_000, NOON + S, NOON - 3 * H),
            frame(1, (2 * H, 2 * H), NOON + 2 * S, (NOON - 3 * H, "anchored")),
        ]),
    ]
}

fn doubts() -> Vec<Value> {
    let day = 24 * H;
    let plausible = 1_577_836_800_000_000;
    vec![
        case("ahead", "R75: an anchored row ahead of receipt", 7, &[clock(7, NOON, 1_000, NOON)], vec![
            frame(7, (H, H + 61 * S), NOON + H, (NOON, "anchored")),
            frame(7, (H, H + 62 * S), NOON + H, (NOON, "suspect")),
        ]),
        case("utc", "R75", 7, &[], vec![
            utc((plausible, NOON), NOON, "utc"),
            utc((plausible - 1, NOON), NOON, "suspect"),
            utc((NOON, NOON + day), NOON, "utc"),
            utc((NOON, NOON + day + 1), NOON, "suspect"),
        ]),
    ]
}
