use super::*;

const HOUR_US: i64 = 3_600_000_000;
const NOON_US: i64 = 1_700_000_000_000_000;

fn now(utc_us: i64) -> Now {
    Now {
        mono_us: 0,
        utc_us,
        origin: Origin::default(),
    }
}

fn set_by(step_us: i64) -> Origin {
    Origin {
        timeline: 7,
        at_us: NOON_US + step_us,
    }
}

fn clock(boot: u32, offset_us: i64, delay_us: u64, measured_at_us: i64) -> BootClock {
    BootClock {
        boot,
        offset_us,
        delay_us,
        measured_at_us,
        origin: Origin::default(),
        valid_from_us: 0,
    }
}

fn resolve(
    clocks: &mut BootClocks,
    boot: u32,
    newest_us: i64,
    received_at_us: i64,
) -> ResolvedTime {
    let rows = (newest_us, newest_us);
    let (time, chosen) = clocks.resolve_boot(boot, rows, received_at_us, Origin::default());
    clocks.advance(&Stamp {
        boot: Some(boot),
        newest_us,
        time,
        chosen,
    });
    time
}

#[test]
fn a_round_trip_gives_offset_and_delay() {
    // True offset 1,000,000; 300 us in each direction; the device takes 50 us to reply.
    let clock = BootClock::measure(7, 650, 300, 350, now(1_000_650)).unwrap();
    assert_eq!((clock.offset_us, clock.delay_us), (1_000_000, 600));
    assert_eq!(clock.device_us(), 350);
}

#[test]
fn an_impossible_round_trip_measures_nothing() {
    assert_eq!(BootClock::measure(7, 1_000, 500, 400, now(2_000)), None);
    assert_eq!(BootClock::measure(7, 1_000, 0, 5_000, now(2_000)), None);
    assert_eq!(BootClock::measure(7, -1_000, 0, 0, now(1_000)), None);
}

/// The numbers of R73.
#[test]
fn the_exchange_with_the_least_delay_is_kept_until_50_ppm_of_its_age_exceed_it() {
    let kept = clock(1, 5, 10_000, NOON_US);
    let newer = |delay_us, age_us| clock(1, 5, delay_us, NOON_US + age_us);
    let holds = |newer: BootClock| kept.replaced_by(&newer).is_none();
    assert!(!holds(newer(10_000, 0)) && !holds(newer(9_000, 0)));
    assert!(holds(newer(13_000, 59_000_000)) && !holds(newer(13_000, 60_000_000)));
    assert!(holds(newer(50_000, 799_000_000)) && !holds(newer(50_000, 800_000_000)));
}

/// A step that no gateway observed: between two runs, or on another gateway.
#[test]
fn a_contradicting_measurement_replaces_the_kept_one_at_any_delay() {
    let kept = clock(1, NOON_US, 1_000, NOON_US + HOUR_US);
    for (newer, replaces) in [
        // The gateway's clock was 2 h ahead and was set back, or the reverse, or it was at
        // 1970.
        (
            clock(
                1,
                NOON_US - 2 * HOUR_US,
                900_000,
                NOON_US - HOUR_US + 60_000_000,
            ),
            true,
        ),
        (
            clock(
                1,
                NOON_US + 2 * HOUR_US,
                900_000,
                NOON_US + 3 * HOUR_US + 60_000_000,
            ),
            true,
        ),
        (clock(1, 60_000_000, 900_000, HOUR_US + 120_000_000), true),
        // Neither the error of a slow exchange nor the drift of a crystal is a contradiction.
        (
            clock(
                1,
                NOON_US + 449_000,
                900_000,
                NOON_US + HOUR_US + 60_000_000,
            ),
            false,
        ),
        (
            clock(1, NOON_US + 30_000, 20_000, NOON_US + HOUR_US + 60_000_000),
            false,
        ),
    ] {
        assert_eq!(
            kept.replaced_by(&newer),
            replaces.then_some(newer),
            "{newer:?}"
        );
    }
}

#[test]
fn measurements_before_a_step_are_corrected() {
    let before = BootClock {
        origin: set_by(2 * HOUR_US),
        ..clock(1, NOON_US + 2 * HOUR_US, 1_000, NOON_US + 3 * HOUR_US)
    };
    let clocks = BootClocks::new(vec![before]);
    let at_us = NOON_US + HOUR_US;
    let (time, chosen) = clocks.resolve_boot(1, (HOUR_US, HOUR_US), at_us, set_by(0));
    assert_eq!(
        (time.offset_us, time.quality, chosen),
        (NOON_US, Quality::Anchored, None)
    );
    // Noise between two readings of the clocks is not a step.
    let (time, _) = clocks.resolve_boot(1, (0, 0), at_us, set_by(2 * HOUR_US + 900));
    assert_eq!(time.offset_us, NOON_US + 2 * HOUR_US);
    // It agrees with the measurement after the step, so the one with the smaller delay is used.
    let worse = BootClock {
        origin: set_by(0),
        ..clock(1, NOON_US + 100_000, 900_000, at_us)
    };
    assert_eq!(before.replaced_by(&worse), None);
}

/// A 32-bit counter of milliseconds wraps after 49.7 days, of microseconds after 71 minutes.
#[test]
fn a_counter_that_wraps_within_a_boot_anchors_nothing_in_the_past() {
    for period_us in [WRAP_US, 1000 * WRAP_US] {
        let up_us = period_us - 60_000_000;
        let known = clock(1, NOON_US, 1_000, NOON_US + up_us);
        let mut clocks = BootClocks::new(vec![known]).of_session(1);
        let anchored = resolve(&mut clocks, 1, up_us, NOON_US + up_us);
        assert_eq!(anchored.quality, Quality::Anchored);
        for after_us in [0, 60_000_000, period_us / 8] {
            let received_at_us = NOON_US + period_us + after_us;
            let wrapped = resolve(&mut clocks, 1, after_us, received_at_us);
            assert_eq!(wrapped.quality, Quality::Suspect, "{after_us}");
        }
        // The next PING measures it; older times may belong to either period.
        let (at_us, offset_us) = (period_us / 4, NOON_US + period_us);
        let measured = clock(1, offset_us, 500_000, offset_us + at_us + 250_000);
        let kept = clocks.improve(measured).expect("replaces");
        assert_eq!(kept.valid_from_us, at_us);
        let received_at_us = offset_us + at_us + 1_000_000;
        let live = resolve(&mut clocks, 1, at_us + 1, received_at_us);
        assert_eq!(
            (live.offset_us, live.quality),
            (offset_us, Quality::Anchored)
        );
        let older = resolve(&mut clocks, 1, at_us / 2, received_at_us);
        assert_eq!(older.quality, Quality::Suspect);
    }
}

/// A device that was unreachable while its counter wrapped shows a later time than before.
#[test]
fn a_counter_that_wrapped_while_unreachable_is_detected() {
    let kept = clock(1, NOON_US, 1_000, NOON_US + 60_000_000);
    for rounds in [1, 20, 1000] {
        let offset_us = NOON_US + rounds * WRAP_US + 1_000_000;
        let newer = clock(1, offset_us, 3_000_000, offset_us + 600_000_000);
        let replacement = kept.replaced_by(&newer).expect("contradicts");
        assert_eq!(replacement.valid_from_us, newer.device_us());
    }
}

#[test]
fn a_row_far_ahead_of_its_receipt_is_not_anchored() {
    let mut clocks = BootClocks::new(vec![clock(1, NOON_US, 1_000, NOON_US)]);
    let mut quality = |newest_us| resolve(&mut clocks, 1, newest_us, NOON_US + HOUR_US).quality;
    assert_eq!(quality(HOUR_US + 59_000_000), Quality::Anchored);
    assert_eq!(quality(HOUR_US + 70_000_000), Quality::Suspect);
}

/// A slowly filled frame gets its number after newer ones.
#[test]
fn frames_of_other_channels_may_be_older() {
    let mut clocks = BootClocks::new(vec![clock(1, NOON_US, 1_000, NOON_US)]);
    for newest_us in [HOUR_US, HOUR_US / 2 + 1, HOUR_US + 1] {
        let time = resolve(&mut clocks, 1, newest_us, NOON_US + 2 * HOUR_US);
        assert_eq!(time.quality, Quality::Anchored);
    }
}

#[test]
fn a_boot_without_a_clock_has_one_offset() {
    // Nothing is known about the device: the newest row of the first frame gets the time of
    // receipt.
    let mut clocks = BootClocks::new(vec![clock(2, NOON_US, 1_000, NOON_US)]).of_session(2);
    for hour in 1..=6 {
        let time = resolve(&mut clocks, 1, hour * HOUR_US, NOON_US + hour);
        assert_eq!(time.offset_us, NOON_US + 1 - HOUR_US, "{hour}");
        assert_eq!(time.quality, Quality::Unanchored);
    }
    // A time more than a day ahead is suspect, but keeps its offset.
    let time = resolve(&mut clocks, 1, 30 * HOUR_US, NOON_US);
    assert_eq!(
        (time.offset_us, time.quality),
        (NOON_US + 1 - HOUR_US, Quality::Suspect)
    );
}

#[test]
fn a_boot_without_a_clock_begins_when_the_device_was_last_alive() {
    let known = vec![
        clock(9, NOON_US, 1_000, NOON_US + HOUR_US),
        clock(5, NOON_US - 41 * HOUR_US, 1_000, NOON_US - 40 * HOUR_US),
    ];
    let mut clocks = BootClocks::new(known).of_session(9);
    let received_at_us = NOON_US + HOUR_US;
    // A frame of the previous boot gives a later time than its measurement.
    let alive_us = NOON_US - 39 * HOUR_US;
    let time = resolve(&mut clocks, 5, 2 * HOUR_US, received_at_us);
    assert_eq!(
        (time.offset_us, time.quality),
        (NOON_US - 41 * HOUR_US, Quality::Anchored)
    );
    assert_eq!(
        resolve(&mut clocks, 6, HOUR_US, received_at_us).offset_us,
        alive_us
    );
    assert_eq!(
        resolve(&mut clocks, 6, 2 * HOUR_US, received_at_us).offset_us,
        alive_us
    );
    // The next boot begins where the previous one ended.
    let time = resolve(&mut clocks, 7, HOUR_US, received_at_us);
    assert_eq!(time.offset_us, alive_us + 2 * HOUR_US);
    // A boot that does not fit between then and now ends now.
    let time = resolve(&mut clocks, 8, 100 * HOUR_US, received_at_us);
    assert_eq!(time.offset_us, received_at_us - 100 * HOUR_US);
}

#[test]
fn boots_without_a_clock_are_bounded() {
    let mut clocks = BootClocks::new(vec![clock(0, NOON_US, 1_000, NOON_US)]).of_session(0);
    for boot in 1..1_000 {
        resolve(&mut clocks, boot, 1, NOON_US);
    }
    assert_eq!(clocks.clocks.len(), 1 + CHOSEN_MAX);
    assert!(clocks.find(0).is_some() && clocks.find(999).is_some());
}

/// The published test vectors.
#[test]
fn times_are_resolved_as_the_vectors_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/protocol/vectors/times.json");
    let text = std::fs::read_to_string(path).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let number = |of: &serde_json::Value, key: &str| of[key].as_i64().expect("a number");
    let of = |clock: &serde_json::Value| {
        let [offset_us, delay_us, measured_at_us] =
            ["offset_us", "delay_us", "measured_at_us"].map(|key| number(clock, key));
        let boot = number(clock, "boot") as u32;
        self::clock(boot, offset_us, delay_us.unsigned_abs(), measured_at_us)
    };
    for case in file["cases"].as_array().unwrap() {
        let known = case["known"].as_array().unwrap().iter().map(of);
        let present = number(case, "present_boot") as u32;
        let mut clocks = BootClocks::new(known.collect()).of_session(present);
        for step in case["steps"].as_array().unwrap() {
            if step["measured"].is_object() {
                let measured = of(&step["measured"]);
                clocks.improve(measured);
                let kept = clocks.find(measured.boot).expect("kept");
                assert_eq!(kept.offset_us, number(step, "offset_us"), "{}", case["id"]);
                continue;
            }
            let frame = &step["frame"];
            let rows = (number(frame, "oldest_us"), number(frame, "newest_us"));
            let received_at_us = number(frame, "received_us");
            let boot = frame["boot"].as_u64().map(|boot| boot as u32);
            let (time, chosen) = match boot {
                Some(boot) => clocks.resolve_boot(boot, rows, received_at_us, Origin::NONE),
                None => (resolve_utc(rows.0, rows.1, received_at_us), None),
            };
            clocks.advance(&Stamp {
                boot,
                newest_us: rows.1,
                time,
                chosen,
            });
            let quality = serde_json::to_value(time.quality).unwrap();
            let expected = (&step["offset_us"], &step["quality"]);
            let found = (&serde_json::Value::from(time.offset_us), &quality);
            assert_eq!(found, expected, "{}: {step}", case["id"]);
        }
    }
}

#[test]
fn implausible_utc_is_suspect_and_kept() {
    let now_us = 1_700_000_000_000_000;
    assert_eq!(resolve_utc(now_us, now_us, now_us).quality, Quality::Utc);
    assert_eq!(resolve_utc(0, 5, now_us).quality, Quality::Suspect);
    let ahead_us = now_us + UTC_PLAUSIBLE_AHEAD_US + 1;
    assert_eq!(
        resolve_utc(now_us, ahead_us, now_us).quality,
        Quality::Suspect
    );
}
