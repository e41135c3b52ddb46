//! Two gateways on one database: each frame of a device is stored once, in order, with its values, whichever gateway
//! the device uses, even both at the same time.

use std::thread;
use std::time::Duration;

use fieldgate_protocol::error::Code;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use crate::support::client::{Heard, Link};
use crate::support::database::PgDatabase;
use crate::support::fleet::check_ledger;
use crate::support::gateway::Gateway;
use crate::support::messages::readings;

const DEVICES: u64 = 8;
/// Number of moves between the gateways, before one is killed and after.
const HOPS: u64 = 40;

/// Two gateways with one fleet key, and their directories.
pub struct Pair {
    pub gateways: [Gateway; 2],
    _dirs: [TempDir; 2],
}

impl Pair {
    pub fn start(database: &PgDatabase) -> Pair {
        let dirs = [(); 2].map(|()| TempDir::new().expect("a directory"));
        let url = database.url();
        // Each has several writers, so that frames of different devices share transactions.
        let flags = ["--store", &url, "--postgres-writers", "3"];
        let first = Gateway::start_in(dirs[0].path(), &flags);
        let key = |dir: &TempDir| dir.path().join("fleet.key");
        std::fs::copy(key(&dirs[0]), key(&dirs[1])).expect("copies");
        let second = Gateway::start_in(dirs[1].path(), &flags);
        Pair {
            gateways: [first, second],
            _dirs: dirs,
        }
    }
}

/// A device that moves from gateway to gateway.
struct Nomad {
    name: String,
    dice: SmallRng,
    /// The highest number acknowledged.
    acked: u64,
    /// The previous connection, if it is still open.
    older: Option<Link>,
}

impl Nomad {
    fn new(seed: u64, number: u64) -> Nomad {
        Nomad {
            name: format!("nomad-{number}"),
            dice: SmallRng::seed_from_u64(seed ^ number),
            acked: 0,
            older: None,
        }
    }

    /// Connects, sends a few frames from the number in WELCOME, and mostly disconnects before their ACKs.
    fn visit(&mut self, gateway: &Gateway) {
        let (mut link, welcomed) = gateway.connect(&self.name);
        assert!(welcomed.durable_seq >= self.acked, "{}", self.name);
        self.acked = welcomed.durable_seq;
        let last = self.acked + self.dice.random_range(1..=12);
        for seq in self.acked + 1..=last {
            link.send(&readings(seq));
            // The previous connection sends the same frames, possibly at another gateway.
            if let Some(older) = &mut self.older {
                older.send_in_vain(&readings(seq));
            }
        }
        match self.dice.random_range(0..3) {
            0 => self.older = None,
            1 => self.older = Some(link),
            _ => self.acked = hear_until(&mut link, last).max(self.acked),
        }
    }

    /// Sends as much as may be in flight, and reads no answer.
    fn leave_in_flight(&mut self, gateway: &Gateway) -> Link {
        let (mut link, welcomed) = gateway.connect(&self.name);
        for seq in welcomed.durable_seq + 1..=welcomed.limit_seq {
            link.send(&readings(seq));
        }
        link
    }

    /// Sends a last frame and waits for its ACK; returns its number.
    fn settle(&mut self, gateway: &Gateway) -> u64 {
        let (mut link, welcomed) = gateway.connect(&self.name);
        assert!(welcomed.durable_seq >= self.acked, "{}", self.name);
        let last = welcomed.durable_seq + 1;
        link.send(&readings(last));
        link.expect_ack(last);
        last
    }
}

/// Returns the highest number acknowledged, up to `last` or until the gateway sends something else.
fn hear_until(link: &mut Link, last: u64) -> u64 {
    let mut acked = 0;
    while acked < last {
        match link.hear() {
            Heard::Ack { seq, .. } => acked = seq,
            // Queued frames of an older connection came in between: the device would reconnect.
            Heard::Nack { code, .. } if code == Code::SeqGap as u8 => break,
            other => panic!("{other:?} instead of ACK {last}"),
        }
    }
    acked
}

/// Asserts that numbers 1 to `last` are stored once, in order, each with its value.
fn assert_stored(database: &mut PgDatabase, name: &str, last: u64) {
    let numbers: Vec<_> = (1..=last as i64).map(|seq| (seq, 17)).collect();
    assert_eq!(database.frames(name), numbers, "{name}");
    let stored = database.readings(name);
    let stored: Vec<_> = stored.iter().map(|row| row.1).collect();
    let values: Vec<_> = (1..=last).map(|seq| Some(seq as f64 / 100.0)).collect();
    assert_eq!(stored, values, "{name}");
}

fn seed() -> u64 {
    let seed = rand::random();
    println!("seed: {seed}");
    seed
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn devices_may_move_between_gateways_at_any_time() {
    let mut database = PgDatabase::create();
    let Pair { gateways, _dirs } = Pair::start(&database);
    let seed = seed();
    let mut nomads: Vec<Nomad> = (0..DEVICES).map(|n| Nomad::new(seed, n)).collect();
    thread::scope(|scope| {
        for (nomad, number) in nomads.iter_mut().zip(0..) {
            let gateways = &gateways;
            scope.spawn(move || {
                for hop in 0..HOPS {
                    nomad.visit(&gateways[(hop as usize + number) % 2]);
                }
            });
        }
    });
    // One is killed with as much in flight as possible.
    let [dies, stays] = gateways;
    let in_flight: Vec<Link> = nomads
        .iter_mut()
        .map(|nomad| nomad.leave_in_flight(&dies))
        .collect();
    let moment_us = SmallRng::seed_from_u64(seed).random_range(0..20_000);
    thread::sleep(Duration::from_micros(moment_us));
    dies.kill();
    drop(in_flight);
    thread::scope(|scope| {
        for nomad in &mut nomads {
            let stays = &stays;
            scope.spawn(move || (0..HOPS).for_each(|_| nomad.visit(stays)));
        }
    });
    for nomad in &mut nomads {
        let last = nomad.settle(&stays);
        assert_stored(&mut database, &nomad.name, last);
    }
    check_ledger(&mut database);
}

/// Sends 1 to `last` like a device that has only this connection.
fn push(mut link: Link, last: u64, mut dice: SmallRng) {
    let mut acked = 0;
    while acked < last {
        let upto = (acked + dice.random_range(1..=20)).min(last);
        for seq in acked + 1..=upto {
            link.send(&readings(seq));
        }
        while acked < upto {
            match link.hear() {
                Heard::Ack { seq, .. } => acked = seq,
                Heard::Nack {
                    code, expected_seq, ..
                } if code == Code::SeqGap as u8 => {
                    for seq in expected_seq..=upto {
                        link.send(&readings(seq));
                    }
                }
                other => panic!("{other:?} instead of ACK {upto}"),
            }
        }
    }
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn sessions_of_one_device_at_both_gateways_store_each_frame_once() {
    const LAST: u64 = 500;
    let mut database = PgDatabase::create();
    let Pair { gateways, _dirs } = Pair::start(&database);
    let seed = seed();
    thread::scope(|scope| {
        for number in 0..2 * DEVICES {
            let name = format!("twin-{}", number / 2);
            // Both are welcomed before either sends.
            let (link, _) = gateways[number as usize % 2].connect(&name);
            let dice = SmallRng::seed_from_u64(seed ^ number);
            scope.spawn(move || push(link, LAST, dice));
        }
    });
    for number in 0..DEVICES {
        assert_stored(&mut database, &format!("twin-{number}"), LAST);
    }
    check_ledger(&mut database);
}
