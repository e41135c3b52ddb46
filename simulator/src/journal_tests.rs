//! Tests of the journal, in a separate file because of their length.

use super::*;
use crate::hash;
use crate::plan::{Clock, Profile};

fn plan(devices: u32) -> Plan {
    Plan {
        format: plan::FORMAT,
        seed: 1,
        nonce: 2,
        name_prefix: "sim-".into(),
        devices,
        channels: 4,
        interval_us: 1_000_000,
        batch: 15,
        frames: None,
        clock: Clock::Utc,
        start_us: 3,
        profile: Profile::Steady,
        malformed_billionths: 0,
        replay: None,
    }
}

fn journal(devices: u32) -> Journal<Vec<u8>> {
    Journal::begin(Vec::new(), &plan(devices)).unwrap()
}

fn read(bytes: &[u8]) -> Result<Ledger, JournalError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    std::fs::write(&path, bytes).unwrap();
    Ledger::read(&path)
}

/// Returns the error for a journal, starting with its file name.
fn fault(bytes: &[u8]) -> String {
    let error = read(bytes).unwrap_err().to_string();
    error[error.find("a.jsonl").unwrap()..].to_owned()
}

/// Returns the journal of a finished run of three devices, in four lines.
fn run() -> Vec<u8> {
    let mut journal = journal(3);
    journal.sent(0, 4).unwrap();
    journal.sent(1, 4).unwrap();
    assert!(journal.tick(0).unwrap());
    journal.acked(0, 3).unwrap();
    journal.sent(0, 2).unwrap();
    journal.quarantined(1, 2, 30).unwrap();
    assert!(!journal.tick(999_999).unwrap());
    assert!(journal.tick(1_000_000).unwrap());
    journal.acked(0, 4).unwrap();
    journal.complete(1_500_000).unwrap()
}

fn lines(bytes: &[u8]) -> Vec<String> {
    std::str::from_utf8(bytes)
        .unwrap()
        .lines()
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn a_journal_yields_the_progress_of_each_device() {
    let ledger = read(&run()).unwrap();
    assert_eq!(ledger.plan, plan(3));
    let device = |sent, acked, quarantined| DeviceLedger {
        sent,
        acked,
        quarantined,
        ..DeviceLedger::default()
    };
    assert_eq!(
        ledger.devices,
        [
            device(4, 4, vec![]),
            device(4, 0, vec![(2, 30)]),
            device(0, 0, vec![])
        ]
    );
    assert!(ledger.complete && !ledger.torn);
    assert_eq!(ledger.elapsed_ms, 1_500);
}

#[test]
fn the_data_that_the_store_is_compared_with_is_read_back() {
    let mut journal = journal(2);
    let login = Login {
        took_us: 900,
        from: "127.0.0.1:40000".parse().unwrap(),
        welcomed: true,
    };
    journal.started(5_000);
    journal.login(1, login).unwrap();
    journal.clock(-20, 30);
    journal.clock(-10, 50);
    journal.damaged(1, 3, 77).unwrap();
    assert!(journal.tick(0).unwrap());
    journal.sent(1, 9).unwrap();
    journal.acked(1, 9).unwrap();
    journal.lost(1, 4, 9).unwrap();
    assert!(journal.login(2, login).is_err());
    let ledger = read(&journal.complete(1_000_000).unwrap()).unwrap();
    // The intersection of all measurements.
    assert_eq!(
        (ledger.started_us, ledger.clock_us),
        (Some(5_000), Some((-10, 30)))
    );
    let device = &ledger.devices[1];
    assert_eq!(
        (&device.logins[..], &device.damaged[..], &device.lost[..]),
        (&[login][..], &[(3, 77)][..], &[(4, 9)][..])
    );
}

#[test]
fn after_a_clock_step_the_range_covers_all_measurements() {
    let mut journal = journal(1);
    journal.clock(-10, 10);
    journal.clock(1_000, 1_020);
    journal.clock(995, 1_005);
    let ledger = read(&journal.complete(0).unwrap()).unwrap();
    assert_eq!(ledger.clock_us, Some((-10, 1_020)));
}

#[test]
fn a_journal_truncated_by_a_crash_is_correct_up_to_there() {
    let whole = run();
    let header = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    let mut acked = 0;
    for cut in header..=whole.len() {
        let ledger = read(&whole[..cut]).unwrap();
        assert_eq!(ledger.torn, whole[cut - 1] != b'\n', "cut at {cut}");
        assert_eq!(ledger.complete, cut == whole.len());
        assert!(ledger.devices[0].acked >= acked);
        acked = ledger.devices[0].acked;
    }
    assert_eq!(acked, 4);
    for cut in 0..header {
        assert!(fault(&whole[..cut]).ends_with("first line is missing or incomplete"));
    }
}

#[test]
fn a_missing_or_changed_line_is_detected_and_numbered() {
    let lines = lines(&run());
    let without = |gone: usize| {
        let kept = lines.iter().enumerate().filter(|(line, _)| *line != gone);
        kept.map(|(_, line)| line.as_str()).collect::<String>()
    };
    assert!(
        fault(without(1).as_bytes())
            .starts_with("a.jsonl, line 2: device 0 has more frames acknowledged")
    );
    assert!(fault(without(2).as_bytes()).contains("line 3: device totals are 8 frames sent and 1"));
    let altered = lines.concat().replace("\"acked\":3", "\"acked\":2");
    assert!(fault(altered.as_bytes()).starts_with("a.jsonl, line 3: device totals are"));
    let garbled = lines.concat().replace("\"moved\":[{", "\"moved\":[!");
    assert!(fault(garbled.as_bytes()).starts_with("a.jsonl, line 2: "));
    let more = lines.concat() + &lines[3];
    assert!(fault(more.as_bytes()).ends_with("line 5: unexpected line after the end of the run"));
}

#[test]
fn acknowledged_frames_never_decrease() {
    let decreasing = lines(&run())[..2].concat()
        + "{\"elapsed_ms\":9,\"sent_total\":8,\"acked_total\":0,\
           \"moved\":[{\"sent\":0,\"acked\":-1,\"devices\":\"0\"}]}\n";
    assert!(fault(decreasing.as_bytes()).ends_with("line 3: acked must not decrease"));
    let mut journal = journal(1);
    journal.sent(0, 5).unwrap();
    journal.acked(0, 5).unwrap();
    let said = |result: Result<(), JournalError>| result.unwrap_err().to_string();
    assert_eq!(
        said(journal.acked(0, 4)),
        "device 0: frame 4 is acknowledged out of order, after frame 5"
    );
    let unsent = "device 0: frame 6 is acknowledged, but the last sent frame is 5";
    assert_eq!(said(journal.acked(0, 6)), unsent);
    assert_eq!(
        said(journal.sent(1, 1)),
        "device 1: no such device in the plan"
    );
}

#[test]
fn a_journal_of_another_program_is_rejected_in_one_line() {
    let whole = String::from_utf8(run()).unwrap();
    let altered = |from: &str, to: &str| {
        assert!(whole.contains(from), "{from}");
        fault(whole.replacen(from, to, 1).as_bytes())
    };
    let version = env!("CARGO_PKG_VERSION");
    let start = "a.jsonl: ";
    let cases = [
        (
            "\"journal\":2",
            "\"journal\":1",
            format!("journal format 1, not 2; it was written by fieldgate-sim {version}"),
        ),
        (
            "\"format\":2",
            "\"format\":9",
            format!("plan format 9, not 2; it was written by fieldgate-sim {version}"),
        ),
        ("\"batch\":15,", "", "missing field `batch`".into()),
        (
            "\"replay\":null",
            "\"speed\":null",
            "unknown field `speed`, expected one of".into(),
        ),
        (
            "\"devices\":3",
            "\"devices\":4000000000",
            "its plan has 4000000000 devices".into(),
        ),
        ("{", "[", "first line does not contain a plan".into()),
    ];
    for (from, to, reason) in cases {
        let said = altered(from, to);
        assert!(
            said.starts_with(&format!("{start}{reason}")) && !said.contains('\n'),
            "{said}"
        );
    }
}

#[test]
fn devices_beyond_the_plan_are_rejected_immediately() {
    for devices in ["3", "0-4294967295", "1-", "a", ""] {
        let bytes = lines(&run())[0].clone()
            + "{\"elapsed_ms\":9,\"sent_total\":1,\"acked_total\":0,\"moved\":[{\"sent\":1,\"acked\":0,\
               \"devices\":\""
            + devices
            + "\"}]}\n";
        assert!(
            fault(bytes.as_bytes()).starts_with("a.jsonl, line 2: "),
            "{devices}"
        );
    }
}

#[test]
fn an_existing_journal_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    Journal::create(&path, &plan(1)).unwrap();
    let error = Journal::create(&path, &plan(1)).unwrap_err().to_string();
    assert!(
        error.ends_with("a.jsonl already exists; remove it or choose another journal"),
        "{error}"
    );
    assert_eq!(Ledger::read(&path).unwrap().devices.len(), 1);
}

#[test]
fn a_busy_fleet_of_a_thousand_writes_less_than_three_megabytes_in_five_minutes() {
    // 1,000 devices that each send about 22 frames of 15 rows of 4 channels a second for 300 s send
    // 400 M readings. The hard case: each device has its own rate, which varies all the time.
    let mut journal = journal(1_000);
    let mut sent = vec![0; 1_000];
    for tick in 0..300 {
        for device in 0..1_000 {
            let bits = hash::at(hash::key(&[tick]), u64::from(device));
            sent[device as usize] += 20 + (bits >> 62);
            journal.sent(device, sent[device as usize]).unwrap();
            journal
                .acked(device, sent[device as usize] - (bits & 3))
                .unwrap();
        }
        journal.tick(tick * TICK_US).unwrap();
    }
    let bytes = journal.complete(300 * TICK_US).unwrap();
    assert!(bytes.len() < 3_000_000, "{} bytes", bytes.len());
    let ledger = read(&bytes).unwrap();
    assert!(
        ledger
            .devices
            .iter()
            .zip(&sent)
            .all(|(device, &sent)| device.sent == sent)
    );
    assert!(sent.iter().sum::<u64>() * 60 > 100_000_000);
}

#[test]
fn an_idle_fleet_writes_nothing() {
    let mut journal = journal(10);
    let header = journal.out.len();
    assert!(!journal.tick(5_000_000).unwrap());
    assert_eq!(journal.out.len(), header);
}

#[test]
fn ranges_are_short() {
    assert_eq!(ranges(&[0, 1, 2, 7, 9, 10]), "0-2,7,9-10");
    assert_eq!(ranges(&[u32::MAX]), "4294967295");
}
