//! Tests of the plan, in a separate file because of their length.

use super::*;
use crate::readings::Values;
use std::collections::HashSet;

fn plan() -> Plan {
    Plan {
        format: FORMAT,
        seed: 42,
        nonce: 7,
        name_prefix: "sim-".into(),
        devices: 10,
        channels: 12,
        interval_us: 1_000_000,
        batch: 15,
        frames: None,
        clock: Clock::Utc,
        start_us: 1_750_000_000_000_000,
        profile: Profile::Steady,
        malformed_billionths: 0,
        replay: None,
    }
}

fn device(plan: Plan, index: u32) -> DeviceScript {
    Arc::new(plan.open().unwrap()).device(index)
}

fn readings(device: &DeviceScript, seq: u64) -> Readings {
    let mut readings = Readings::default();
    device.frame(seq, &mut readings).unwrap();
    readings
}

fn water_flow() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/water-flow.csv")
}

#[test]
fn a_frame_is_the_same_in_any_order_and_any_buffer() {
    let (first, again) = (device(plan(), 3), device(plan(), 3));
    let mut dirty = Readings::default();
    for seq in [9, 1, 1_000_000, 9, 2] {
        again.frame(seq + 5, &mut dirty).unwrap();
        let content = again.frame(seq, &mut dirty).unwrap();
        assert_eq!(content, FrameContent::Readings(&readings(&first, seq)));
    }
}

#[test]
fn frames_hold_each_sample_once() {
    let wide = device(
        Plan {
            batch: 60,
            ..plan()
        },
        3,
    );
    let narrow = device(plan(), 3);
    let whole = readings(&wide, 2);
    for part in 0..4 {
        let frame = readings(&narrow, 5 + part);
        assert_eq!(frame.t0_us, whole.time_us(part as usize * 15));
        let temperatures = |readings: &Readings| match &readings.columns[0].values {
            Values::Integer(values) => values.clone(),
            other => panic!("{other:?}"),
        };
        let from = part as usize * 15;
        assert_eq!(temperatures(&frame), temperatures(&whole)[from..from + 15]);
        assert!(frame.columns.iter().all(|column| column.values.len() == 15));
        assert_eq!(frame.count(), 15 * 12);
    }
}

#[test]
fn devices_have_individual_names_streams_and_boots() {
    let script = Arc::new(
        Plan {
            devices: 1_000,
            ..plan()
        }
        .open()
        .unwrap(),
    );
    let devices: Vec<DeviceScript> = (0..1_000).map(|index| script.device(index)).collect();
    assert_eq!(devices[42].name(), "sim-00042");
    let streams: HashSet<u64> = devices.iter().map(DeviceScript::stream).collect();
    assert_eq!(streams.len(), 1_000);
    assert!(streams.iter().all(|&stream| stream > 0 && stream < 1 << 63));
    let other_run = device(Plan { nonce: 8, ..plan() }, 3);
    assert_ne!(
        (other_run.stream(), other_run.boot()),
        (devices[3].stream(), devices[3].boot())
    );
    assert_eq!(readings(&other_run, 5), readings(&devices[3], 5));
}

#[test]
fn a_device_without_the_time_of_day_counts_from_its_boot() {
    let (utc, boot) = (
        device(plan(), 1),
        device(
            Plan {
                clock: Clock::Boot,
                ..plan()
            },
            1,
        ),
    );
    let (by_utc, by_boot) = (readings(&utc, 4), readings(&boot, 4));
    assert_eq!(by_boot.t0_us, boot.uptime_us(by_utc.t0_us));
    assert!((60_000_000..40 * 86_400_000_000).contains(&by_boot.t0_us));
    assert_eq!(by_utc.columns, by_boot.columns);
}

#[test]
fn malformed_frames_keep_their_place_and_their_kind() {
    let device = device(
        Plan {
            malformed_billionths: 100_000_000,
            ..plan()
        },
        0,
    );
    let mut buffer = Readings::default();
    let mut kinds = |seq| match device.frame(seq, &mut buffer).unwrap() {
        FrameContent::Malformed { variant, .. } => Some(variant),
        FrameContent::Readings(_) => None,
    };
    let first: Vec<_> = (1..500).map(&mut kinds).collect();
    let again: Vec<_> = (1..500).map(&mut kinds).collect();
    assert_eq!(first, again);
    assert!((25..75).contains(&first.iter().flatten().count()));
}

#[test]
fn a_device_sends_as_many_frames_as_planned() {
    let device = device(
        Plan {
            frames: Some(3),
            ..plan()
        },
        0,
    );
    let mut buffer = Readings::default();
    let sent: Vec<u64> = (0..9)
        .filter(|&seq| device.frame(seq, &mut buffer).is_some())
        .collect();
    assert_eq!(sent, [1, 2, 3]);
}

#[test]
fn a_recording_gives_the_channels_and_ends_with_its_last_row() {
    let script = Plan {
        clock: Clock::Boot,
        ..plan()
    }
    .replaying(&water_flow(), &ReplayOptions::default(), None)
    .unwrap();
    assert_eq!(
        (script.plan().channels, script.frames()),
        (1, Some(10 * 1_268_u64.div_ceil(15)))
    );
    // The plan alone yields the same frames.
    let again = Arc::new(script.plan().clone().open().unwrap());
    let script = Arc::new(script);
    for seq in 1..=script.device(2).frames().unwrap() {
        assert_eq!(
            readings(&script.device(2), seq),
            readings(&again.device(2), seq)
        );
    }
    let mut buffer = Readings::default();
    assert!(script.device(2).frame(86, &mut buffer).is_none());
    assert!(readings(&script.device(2), 1).t0_us < 31 * 86_400_000_000);
}

#[test]
fn devices_of_a_recording_have_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    let csv = "Time,site,a\n2025-06-01T12:00:00Z,x,1\n2025-06-01T12:00:00Z,y,2\n2025-06-01T12:00:01Z,y,3\n";
    std::fs::write(&path, csv).unwrap();
    let script = |devices: Option<u32>| {
        let plan = Plan {
            devices: devices.unwrap_or(10),
            ..plan()
        };
        let script = plan.replaying(&path, &ReplayOptions::default(), devices);
        Arc::new(script.unwrap())
    };
    let both = script(None);
    assert_eq!(both.plan().devices, 2);
    assert_eq!(both.device(1).name(), "sim-y");
    assert_eq!(
        (both.index_of("sim-y"), both.index_of("sim-00001")),
        (Some(1), None)
    );
    assert_eq!(readings(&both.device(1), 1).rows, 2);
    // Devices beyond those in the recording resend its rows under numbered names.
    let more = script(Some(3));
    assert_eq!(more.device(2).name(), "sim-00002");
    assert_eq!(
        (more.index_of("sim-00002"), more.index_of("sim-y")),
        (Some(2), None)
    );
    assert_eq!(readings(&more.device(2), 1).rows, 1);
}

#[test]
fn a_changed_recording_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    std::fs::write(&path, "Time,a\n2025-06-01T12:00:00Z,1\n").unwrap();
    let planned = plan()
        .replaying(&path, &ReplayOptions::default(), None)
        .unwrap()
        .plan()
        .clone();
    std::fs::write(&path, "Time,a\n2025-06-01T12:00:00Z,2\n").unwrap();
    let error = planned.clone().open().unwrap_err().to_string();
    assert!(
        error.contains("a.csv has changed since the run: its SHA-256 was "),
        "{error}"
    );
    std::fs::write(&path, "Time,a\n2025-06-01T12:00:00Z,11\n").unwrap();
    let error = planned.clone().open().unwrap_err().to_string();
    assert!(
        error.ends_with("its size in bytes was 30 and is 31"),
        "{error}"
    );
    std::fs::remove_file(&path).unwrap();
    assert!(
        planned
            .open()
            .unwrap_err()
            .to_string()
            .contains("a.csv: No such file")
    );
}

#[test]
fn values_out_of_range_are_named() {
    let said = |plan: Plan| plan.open().unwrap_err().to_string();
    assert_eq!(
        said(Plan {
            devices: 0,
            ..plan()
        }),
        "devices must be 1 to 100000, but is 0"
    );
    assert_eq!(
        said(Plan {
            channels: 33,
            ..plan()
        }),
        "channels must be 1 to 32, but is 33"
    );
    assert_eq!(
        said(Plan { batch: 0, ..plan() }),
        "batch must be 1 to 1024, but is 0"
    );
    assert_eq!(
        said(Plan {
            name_prefix: "a b".into(),
            ..plan()
        }),
        "name_prefix must be at most 27 letters, digits, '.', '_', ':' or '-', but is \"a b\""
    );
    let error = said(Plan {
        format: FORMAT + 1,
        ..plan()
    });
    assert!(
        error.starts_with("plan format 3 is not supported, only 2"),
        "{error}"
    );
}

#[test]
fn a_plan_survives_json_and_no_field_may_be_missing() {
    let whole = Plan {
        seed: u64::MAX,
        frames: Some(5),
        ..plan()
    };
    let json = serde_json::to_value(&whole).unwrap();
    assert_eq!(serde_json::from_value::<Plan>(json.clone()).unwrap(), whole);
    for field in json.as_object().unwrap().keys() {
        let mut part = json.clone();
        part.as_object_mut().unwrap().remove(field);
        assert!(
            serde_json::from_value::<Plan>(part).is_err(),
            "{field} was missing"
        );
    }
}

#[test]
fn absurd_sequence_numbers_do_not_overflow() {
    let device = device(
        Plan {
            start_us: i64::MAX,
            clock: Clock::Boot,
            ..plan()
        },
        0,
    );
    for seq in [u64::MAX, 1 << 60] {
        let readings = readings(&device, seq);
        assert_eq!(readings.rows, 15);
    }
}

/// Manual measurement, in release: `cargo test -p fieldgate-simulator --release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
fn measure_values_per_second() {
    for (channels, batch) in [(4, 15), (4, 60), (12, 60), (32, 60)] {
        let device = device(
            Plan {
                channels,
                batch,
                ..plan()
            },
            0,
        );
        let mut buffer = Readings::default();
        let (started, mut values, mut sum) = (std::time::Instant::now(), 0, 0);
        for seq in 1..=50_000_000 / (u64::from(channels) * u64::from(batch)) {
            device
                .frame(std::hint::black_box(seq), &mut buffer)
                .unwrap();
            values += buffer.count();
            sum ^= buffer.t0_us;
        }
        std::hint::black_box(sum);
        let rate = values as f64 / started.elapsed().as_secs_f64() / 1e6;
        println!("{channels} channels, {batch} rows: {rate:.1} M values/s");
    }
}
