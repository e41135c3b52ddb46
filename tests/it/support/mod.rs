//! Shared by the tests: programs, devices, databases and clusters.

use std::thread;
use std::time::{Duration, Instant};

pub mod client;
pub mod cluster;
pub mod database;
pub mod fleet;
pub mod gateway;
pub mod http;
pub mod logs;
pub mod messages;
pub mod site;
pub mod small_disk;
pub mod wire;

/// Maximum wait for an event that has no deadline of its own.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Poll interval for an event that cannot be waited for.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `has_happened` returns true; fails the test after `within`.
pub fn eventually(what: &str, within: Duration, mut has_happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !has_happened() {
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        thread::sleep(LOOK_INTERVAL);
    }
}
