//! A stderr that accepts nothing: the reader of the log has exited or stalls, or the disk is full. The gateway
//! continues to serve, handles signals, and exits normally.

use std::fs::OpenOptions;
use std::io::{PipeReader, Read, pipe};
use std::process::Stdio;

use fieldgate_protocol::error::Code;
use fieldgate_protocol::frame::types;

use crate::malformed::assert_serves;
use crate::support::client::Link;
use crate::support::gateway::{Ended, Gateway, command, run};
use crate::support::messages::{header, sealed};

/// Number of rejected peers whose log lines fill more than a pipe.
const STRANGERS: usize = 1000;

fn full_disk() -> Stdio {
    let full = OpenOptions::new().write(true).open("/dev/full");
    full.expect("Linux has /dev/full").into()
}

fn reader_gone() -> Stdio {
    pipe().expect("a pipe").1.into()
}

/// Returns a pipe whose reader never reads.
fn stalled() -> (PipeReader, Stdio) {
    let (reader, writer) = pipe().expect("a pipe");
    (reader, writer.into())
}

fn be_refused(gateway: &Gateway) {
    let mut link = Link::open(gateway.addr);
    link.send(&sealed(header(types::AUTH, 0), &[0; 34]));
    link.expect_bye(Code::Authentication);
}

/// Triggers all kinds of log lines, then ends the gateway normally.
fn assert_survives(mut gateway: Gateway) -> Ended {
    for _ in 0..3 {
        be_refused(&gateway);
        assert_serves(&gateway, "good");
    }
    gateway.signal("HUP");
    assert_serves(&gateway, "better");
    gateway.terminate();
    let ended = gateway.wait();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    ended
}

#[test]
fn a_log_that_cannot_be_written_does_not_affect_the_gateway() {
    for stderr in [full_disk(), reader_gone()] {
        assert_survives(Gateway::start_logging_to(stderr, &[]));
    }
}

#[test]
fn a_log_whose_reader_stalls_blocks_nothing() {
    let (mut reader, stderr) = stalled();
    let flags = [
        "--failure-delay-max-ms",
        "0",
        "--log-lines-per-address-max",
        "100000",
    ];
    let gateway = Gateway::start_logging_to(stderr, &flags);
    for _ in 0..STRANGERS {
        be_refused(&gateway);
    }
    assert_survives(gateway);
    let mut log = String::new();
    reader.read_to_string(&mut log).expect("text");
    // Otherwise the reader has not stalled.
    assert!(log.len() >= 48 << 10, "{} bytes", log.len());
}

#[test]
fn commands_return_an_exit_code_even_if_their_output_fails() {
    let gateway = Gateway::start(&[]);
    assert_serves(&gateway, "good");
    let data_dir = gateway.data_dir().to_str().expect("UTF-8");
    let added = run(&["device", "add", "own", "--own-key", "--data-dir", data_dir]);
    assert!(added.status.success(), "{}", added.stderr);
    let commands: [&[&str]; 12] = [
        &["--help"],
        &["no-such-command"],
        &["serve", "--listen", "nowhere"],
        &["serve"],
        &["query", "SELECT * FROM devices"],
        &["query", "SELECT"],
        &["device", "list"],
        &["device", "show", "good"],
        &["device", "key", "good", "better"],
        &["device", "export"],
        &["quarantine", "list"],
        &["status"],
    ];
    for args in commands {
        for dead in [full_disk, reader_gone] {
            let mut command = command(args);
            command.env("FIELDGATE_DATA_DIR", data_dir);
            let status = command.stdout(dead()).stderr(dead()).status();
            let code = status.expect("starts").code();
            assert!(matches!(code, Some(0..=2)), "{args:?}: {code:?}");
        }
    }
}

#[test]
fn a_fatal_error_reaches_a_reader_that_reads_late() {
    let (mut reader, stderr) = stalled();
    let mut command = command(&["serve", "--store", "mysql://nowhere"]);
    let mut process = command.stderr(stderr).spawn().expect("starts");
    drop(command);
    let mut log = String::new();
    reader.read_to_string(&mut log).expect("text");
    assert_eq!(process.wait().expect("a child").code(), Some(2));
    assert!(log.starts_with("error: "), "{log}");
}
