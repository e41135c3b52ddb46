use super::*;

fn refusal(change: impl FnOnce(&mut Settings)) -> Option<String> {
    let mut settings = Settings::default();
    change(&mut settings);
    Config::new(settings).err().map(|error| error.to_string())
}

#[test]
fn defaults_are_valid() {
    let config = Config::new(Settings::default()).unwrap();
    assert_eq!(
        config.store().to_string(),
        "sqlite://./fieldgate-data/fieldgate.db"
    );
    assert_eq!(config.window_frames, 64);
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
        let refused = refusal(|s| s.listen = listen.parse().unwrap());
        assert_eq!(refused.is_none(), is_loopback, "{listen}: {refused:?}");
        let refused = refusal(|s| {
            s.listen = listen.parse().unwrap();
            s.allow_plaintext = true;
        });
        assert_eq!(refused, None, "{listen}");
    }
    let refused = refusal(|s| s.listen = "0.0.0.0:7300".parse().unwrap()).unwrap();
    assert!(
        refused.contains("0.0.0.0:7300") && refused.contains("--allow-plaintext"),
        "{refused}"
    );
}

#[test]
fn each_limit_has_bounds() {
    type Change = fn(&mut Settings);
    let changes: [(&str, Change); 17] = [
        ("connections-max", |s| s.connections_max = 0),
        ("handshake-timeout-s", |s| s.handshake_timeout_s = 0),
        ("frame-timeout-s", |s| s.frame_timeout_s = 0),
        ("idle-timeout-s", |s| s.idle_timeout_s = u64::MAX),
        ("keepalive-s", |s| s.keepalive_s = 0),
        ("ack-timeout-s", |s| s.ack_timeout_s = 0),
        ("window-frames", |s| s.window_frames = 0),
        ("frame-bytes-max", |s| s.frame_bytes_max = 511),
        ("frame-bytes-max", |s| s.frame_bytes_max = 16_385),
        ("batch-readings-max", |s| s.batch_readings_max = 0),
        ("commit-interval-min-ms", |s| {
            s.commit_interval_min_ms = 600_001
        }),
        ("queue-readings-max", |s| s.queue_readings_max = 8191),
        ("queue-bytes-max", |s| s.queue_bytes_max = 1000),
        ("drain-timeout-s", |s| s.drain_timeout_s = u64::MAX),
        ("quarantine-bytes-max", |s| s.quarantine_bytes_max = 1000),
        ("cache-bytes", |s| s.cache_bytes = 0),
        ("wal-bytes-max", |s| s.wal_bytes_max = 0),
    ];
    for (name, change) in changes {
        let refused = refusal(change).unwrap_or_default();
        assert!(
            refused.starts_with(&format!("{name} must be from")),
            "{name}: {refused}"
        );
    }
    assert_eq!(refusal(|s| s.frame_bytes_max = 16_384), None);
    assert_eq!(refusal(|s| s.drain_timeout_s = 0), None);
}

#[test]
fn a_certificate_requires_a_tls_listener() {
    let path = || Some(PathBuf::from("x.pem"));
    let listen = Some(SocketAddr::from(([0, 0, 0, 0], 7301)));
    let files = |change: fn(&mut Settings)| {
        let mut settings = Settings {
            tls_listen: Some(SocketAddr::from(([0, 0, 0, 0], 7301))),
            ..Settings::default()
        };
        change(&mut settings);
        Config::new(settings).map(|config| config.tls_files().unwrap())
    };
    let refused = refusal(|s| s.tls_client_ca = path()).unwrap();
    assert!(
        refused.starts_with("--tls-client-ca requires TLS"),
        "{refused}"
    );
    let refused = refusal(|s| (s.tls_cert, s.tls_key) = (path(), path())).unwrap();
    assert!(refused.starts_with("--tls-cert requires TLS"), "{refused}");
    let refused = refusal(|s| (s.tls_listen, s.tls_cert) = (listen, path())).unwrap();
    assert!(refused.contains("belong together"), "{refused}");
    let usual = files(|_| {}).unwrap();
    assert_eq!(usual.cert, Path::new("./fieldgate-data/tls/server.pem"));
    assert_eq!(usual.key, Path::new("./fieldgate-data/tls/server.key"));
    let given = files(|s| (s.tls_cert, s.tls_key) = (Some("c".into()), Some("k".into()))).unwrap();
    assert_eq!((given.cert, given.key), ("c".into(), "k".into()));
    assert!(
        Config::new(Settings::default())
            .unwrap()
            .tls_files()
            .is_none()
    );
}

#[test]
fn settings_do_not_contradict_each_other() {
    let refused = refusal(|s| s.keepalive_s = 120).unwrap();
    assert!(
        refused.starts_with("idle-timeout-s (120) must be more than keepalive-s (120)"),
        "{refused}"
    );
    assert_eq!(refusal(|s| s.keepalive_s = 119), None);
    let refused = refusal(|s| s.queue_readings_max = 199_999).unwrap();
    assert!(
        refused.contains("at least batch-readings-max (200000)"),
        "{refused}"
    );
    assert_eq!(refusal(|s| s.queue_readings_max = 200_000), None);
    let refused = refusal(|s| (s.postgres_writers, s.queue_readings_max) = (64, 524_287)).unwrap();
    assert!(
        refused.contains("at least postgres-writers times 8192 (524288)"),
        "{refused}"
    );
    assert_eq!(refusal(|s| s.postgres_writers = 64), None);
    let refused = refusal(|s| (s.postgres_writers, s.queue_bytes_max) = (64, 31 << 20)).unwrap();
    assert!(
        refused.contains("postgres-writers times 512 KiB (33554432)"),
        "{refused}"
    );
    let refused = refusal(|s| s.commit_interval_min_ms = 30_000).unwrap();
    assert!(
        refused.contains("more than commit-interval-min-ms (30000)"),
        "{refused}"
    );
    assert_eq!(refusal(|s| s.commit_interval_min_ms = 29_999), None);
}

#[test]
fn the_store_may_be_elsewhere_than_the_key() {
    let settings = Settings {
        store: Some("sqlite:///other/x.db".parse().unwrap()),
        ..Settings::default()
    };
    let config = Config::new(settings).unwrap();
    assert_eq!(config.store().to_string(), "sqlite:///other/x.db");
}
