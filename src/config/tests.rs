use std::path::Path;

use clap::Parser;

use super::*;

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    location: Location,
}

fn config(flags: &str) -> Result<Config, String> {
    let flags =
        Flags::try_parse_from(flags.split_whitespace()).map_err(|error| error.to_string())?;
    Config::new(flags.settings, flags.location).map_err(|faults| {
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        faults.join("\n")
    })
}

fn refusal(flags: &str) -> String {
    config(flags).expect_err(flags)
}

#[test]
fn defaults_are_valid() {
    let config = config("").unwrap();
    assert_eq!(
        config.store.to_string(),
        "sqlite://./fieldgate-data/fieldgate.db"
    );
    assert_eq!(config.session, SessionLimits::default());
    assert_eq!(
        (config.session.window_frames, config.sqlite.cache_bytes),
        (64, 256 << 20)
    );
}

#[test]
fn plaintext_is_limited_to_loopback_unless_allowed() {
    for (listen, is_loopback) in [
        ("127.0.0.1:7300", true),
        ("127.9.9.9:1", true),
        ("[::1]:7300", true),
        ("[::ffff:127.0.0.1]:7300", true),
        ("0.0.0.0:7300", false),
        ("[::]:7300", false),
        ("192.168.1.2:7300", false),
    ] {
        let listen = format!("--listen {listen}");
        assert_eq!(config(&listen).is_ok(), is_loopback, "{listen}");
        config(&format!("{listen} --allow-plaintext")).expect(&listen);
    }
    let refused = refusal("--listen 0.0.0.0:7300");
    assert!(
        refused.contains("0.0.0.0:7300") && refused.contains("--allow-plaintext"),
        "{refused}"
    );
}

#[test]
fn numbers_have_units_and_ranges() {
    for (flags, fault) in [
        ("--connections-max 0", "from 1 to 1000000"),
        ("--idle-timeout-s 8days", "from 1 to 604800"),
        ("--keepalive-s 65536", "from 1 to 65535"),
        ("--frame-bytes-max 511", "from 4096 to 16384"),
        ("--frame-bytes-max 16385", "from 4096 to 16384"),
        ("--window-frames 1.5", "must be a whole number"),
        ("--window-frames 64KiB", "must be a whole number"),
        ("--commit-interval-min-ms 11min", "from 0 to 600000"),
        ("--queue-readings-max 8191", "from 8192 to 4294967295"),
        ("--queue-bytes-max 1000", "from 1048576 to 1099511627776"),
        ("--queue-bytes-max 30s", "must be a size"),
        (
            "--drain-timeout-s 99999999999999999999",
            "must be whole seconds",
        ),
    ] {
        let refused = refusal(flags);
        assert!(refused.contains(fault), "{flags}: {refused}");
    }
    let config =
        config("--frame-bytes-max 16KiB --drain-timeout-s 0 --idle-timeout-s 5min").unwrap();
    assert_eq!(
        (config.session.frame_bytes_max, config.drain_timeout_s),
        (16_384, 0)
    );
    assert_eq!(config.session.idle_timeout_s, 300);
}

#[test]
fn a_certificate_requires_a_tls_listener() {
    let files = |flags: &str| config(flags).unwrap().tls_files();
    assert!(refusal("--tls-client-ca x.pem").starts_with("--tls-client-ca requires TLS"));
    assert!(refusal("--tls-cert x.pem --tls-key x.pem").starts_with("--tls-cert requires TLS"));
    assert!(refusal("--tls-listen :7301 --tls-cert x.pem").contains("belong together"));
    let usual = files("--tls-listen :7301").unwrap();
    assert_eq!(usual.cert, Path::new("./fieldgate-data/tls/server.pem"));
    assert_eq!(usual.key, Path::new("./fieldgate-data/tls/server.key"));
    let given = files("--tls-listen :7301 --tls-cert c --tls-key k").unwrap();
    assert_eq!((given.cert, given.key), ("c".into(), "k".into()));
    assert_eq!(files(""), None);
}

#[test]
fn settings_do_not_contradict_each_other() {
    for (flags, fault) in [
        (
            "--keepalive-s 120",
            "idle-timeout-s (120) must be more than keepalive-s (120)",
        ),
        (
            "--queue-readings-max 199999",
            "at least batch-readings-max (200000)",
        ),
        (
            "--postgres-writers 64 --queue-readings-max 524287",
            "at least postgres-writers times 8192 (524288)",
        ),
        (
            "--postgres-writers 64 --queue-bytes-max 31MiB",
            "postgres-writers times 512 KiB (33554432)",
        ),
        (
            "--commit-interval-min-ms 30s",
            "more than commit-interval-min-ms (30000)",
        ),
        (
            "--commit-interval-quiet-ms 30s",
            "more than commit-interval-quiet-ms (30000)",
        ),
        ("--spool", "--spool requires Postgres"),
    ] {
        let refused = refusal(flags);
        assert!(refused.contains(fault), "{flags}: {refused}");
    }
    for flags in [
        "--keepalive-s 119",
        "--queue-readings-max 200000",
        "--postgres-writers 64",
        "--commit-interval-min-ms 29999",
        "--spool --store postgres://u@h/d",
    ] {
        config(flags).expect(flags);
    }
}

#[test]
fn every_fault_is_found() {
    let refused = refusal(
        "--listen nowhere.invalid:1 --tls-cert x --keepalive-s 120 --commit-interval-min-ms 30s --spool",
    );
    let found: Vec<_> = refused
        .lines()
        .map(|line| line.split([' ', ',']).next().unwrap())
        .collect();
    let expected = [
        "could",
        "--spool",
        "--tls-cert",
        "--tls-cert",
        "idle-timeout-s",
        "ack-timeout-s",
    ];
    assert_eq!(found, expected, "{refused}");
}

#[test]
fn the_store_may_be_elsewhere_than_the_key() {
    let config = config("--store sqlite:///other/x.db").unwrap();
    assert_eq!(config.store.to_string(), "sqlite:///other/x.db");
}

#[test]
fn a_reload_changes_exactly_the_settings_that_are_documented() {
    use clap::Args as _;
    let command = Settings::augment_args(clap::Command::new("settings"));
    let values = [
        "7",
        "4097",
        "100000000",
        "10000000000",
        "127.0.0.1:9",
        "closed",
        "unit=Cel,days=7",
        "x",
    ];
    let old = Flags::parse_from([""; 0]).settings;
    for flag in command.get_arguments().filter_map(|arg| arg.get_long()) {
        let given = values.map(|value| format!("--{flag}={value}"));
        let mut given = given.into_iter().chain([format!("--{flag}")]);
        let parsed = given.find_map(|flag| {
            Some(Flags::try_parse_from([flag]).ok()?.settings).filter(|new| *new != old)
        });
        let new = parsed.expect(flag);
        let is_changed = old.reloaded(new) != old;
        assert_eq!(is_changed, RELOADABLE.contains(&flag), "{flag}");
    }
    let text = include_str!("../../docs/operations/service.md");
    for flag in RELOADABLE {
        assert!(text.contains(&format!("`{flag}`")), "{flag}");
    }
}
