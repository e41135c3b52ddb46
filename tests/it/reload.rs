//! SIGHUP: a running gateway reads its settings again and uses those that can change, all of them or none.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use fieldgate_protocol::error::Code;
use tempfile::TempDir;

use crate::http::request;
use crate::support::client::Link;
use crate::support::gateway::{Gateway, command};
use crate::support::{PATIENCE, eventually};

const FIRST: &str = "read 0123456789abcdef0123";
const SECOND: &str = "read abcdef0123456789abcd";

struct Site {
    dir: TempDir,
}

impl Site {
    fn new(settings: &str) -> Site {
        let site = Site {
            dir: TempDir::new().expect("a directory"),
        };
        site.set(settings);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn set(&self, settings: &str) {
        fs::write(self.path("gate.toml"), settings).expect("writes");
    }

    fn set_tokens(&self, lines: &str) {
        fs::write(self.path("tokens"), lines).expect("writes");
        fs::set_permissions(self.path("tokens"), Permissions::from_mode(0o600)).expect("chmod");
    }

    fn start(&self, flags: &[&str]) -> Gateway {
        let mut serve = command(&["serve", "--config"]);
        // It would override log-level.
        serve.arg(self.path("gate.toml")).env_remove("RUST_LOG");
        Gateway::start_by(serve, &self.path("data"), flags)
    }
}

/// Returns the number of frames that a new session may send.
fn window(gateway: &Gateway, name: &str) -> u64 {
    let (_link, welcomed) = Link::login(gateway.addr, &gateway.device(name));
    welcomed.limit_seq - welcomed.durable_seq
}

fn expect_refused(gateway: &Gateway, name: &str) {
    let login = gateway.device(name);
    let mut link = Link::open(gateway.addr);
    let transcript = link.challenge(&login);
    link.send(&login.auth(transcript).0);
    link.expect_bye(Code::Authentication);
}

#[test]
fn settings_change_while_a_gateway_runs() {
    let site = Site::new("window-frames = 16\ndevice-series-max = 9\n");
    let mut gateway = site.start(&[]);
    let (mut link, _) = gateway.connect("pump");
    assert_eq!(window(&gateway, "valve"), 16);
    site.set(
        "window-frames = 8\nregistration = 'closed'\ndevice-series-max = 10\nlog-level = 'debug'\n",
    );
    gateway.signal("HUP");
    gateway.wait_for_line("settings reloaded");
    gateway.wait_for_line("changed settings need a restart settings=\"device-series-max\"");
    link.ping();
    assert_eq!(window(&gateway, "valve"), 8);
    expect_refused(&gateway, "new");
    gateway.wait_for_line("DEBUG");
    // What is already in use is no change; what needs a restart still does.
    gateway.signal("HUP");
    gateway.wait_for_line("settings reloaded changed=\"\"");
    gateway.wait_for_line("changed settings need a restart");
    site.set("window-frames = 16\ndevice-series-max = 9\n");
    gateway.signal("HUP");
    gateway.wait_for_line("window-frames=16");
    assert_eq!(window(&gateway, "new"), 16);
    gateway.terminate();
    let ended = gateway.wait();
    assert_eq!(ended.stderr.matches("need a restart").count(), 2);
}

#[test]
fn an_invalid_file_changes_nothing() {
    let site = Site::new("window-frames = 16\ncommit-interval-quiet-ms = 2000\n");
    let mut gateway = site.start(&[]);
    let faults = [
        ("window-frames = 0", "must be from 1"),
        ("window-frames = 8\nkeepalive-s = 500", "idle-timeout-s"),
        ("window-frames = 8\nwindow-fames = 8", "unknown setting"),
        ("window-frames = 8\n[", "line 2"),
        // Fits the file, but not the commit interval in use.
        (
            "window-frames = 8\nack-timeout-s = 1\ncommit-interval-quiet-ms = 1",
            "ack-timeout-s",
        ),
        ("window-frames = 8\nhttp-token-file = 'none'", "none"),
    ];
    for (settings, _) in faults {
        site.set(settings);
        gateway.signal("HUP");
        gateway.wait_for_line("could not reload settings, keeping the old ones");
        assert_eq!(window(&gateway, "pump"), 16, "{settings}");
    }
    fs::remove_file(site.path("gate.toml")).expect("removes");
    gateway.signal("HUP");
    gateway.wait_for_line("could not read settings file");
    assert_eq!(window(&gateway, "pump"), 16);
    gateway.terminate();
    let ended = gateway.wait();
    for (_, reason) in faults {
        assert!(ended.stderr.contains(reason), "{reason}: {}", ended.stderr);
    }
}

#[test]
fn tokens_are_read_again() {
    let site = Site::new("");
    site.set_tokens(FIRST);
    let tokens = site.path("tokens");
    let tokens = tokens.to_str().expect("UTF-8");
    let mut gateway = site.start(&["--http", "127.0.0.1:0", "--http-token-file", tokens]);
    let status = |gateway: &Gateway, token: &str| {
        let token = token.trim_start_matches("read ");
        let header = format!("Authorization: Bearer {token}");
        request(gateway.http_addr(), "/metrics", &[&header]).status
    };
    assert_eq!(
        (status(&gateway, FIRST), status(&gateway, SECOND)),
        (200, 401)
    );
    site.set_tokens("read short");
    gateway.signal("HUP");
    gateway.wait_for_line("could not use token file");
    assert_eq!(status(&gateway, FIRST), 200);
    site.set_tokens(SECOND);
    gateway.signal("HUP");
    eventually("the new token", PATIENCE, || {
        status(&gateway, SECOND) == 200
    });
    assert_eq!(status(&gateway, FIRST), 401);
}
