//! Fixtures for tests: a directory, the binary that runs in it, and a store with data.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use fieldgate::internals::{
    Admission, Batch, Content, Declare, DeclareOutcome, DeclaredChannel, DeviceEvent,
    DeviceEventKind, DeviceId, Entry, Login, LoginOutcome, Readings, SeriesId, Store, StreamId,
};
use fieldgate::internals::{BootClock, Origin, Quality, ResolvedTime};
use fieldgate::internals::{SqliteSettings, SqliteStore};
use fieldgate_protocol::frame::types;
use fieldgate_protocol::value::Kind;

use crate::support::gateway::command;
use crate::support::logs::{Stderr, by_default, collect, keep_of};

/// 2026-02-25T06:13:20Z
pub const AT_US: i64 = 1_772_000_000_000_000;
/// Path of the database in the working directory.
pub const DATABASE: &str = "fieldgate-data/fieldgate.db";

/// A working directory, and the output of a process in it.
pub struct Site {
    pub dir: tempfile::TempDir,
}

#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Site {
    pub fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        Site { dir }
    }

    /// Creates a store with a device that sent a frame of two readings, lost two frames, and sent one that could not
    /// be decoded; and with a second device that sent nothing. The store stays open, as under a
    /// running gateway.
    pub async fn with_readings() -> (Site, SqliteStore) {
        let site = Site::new();
        fs::create_dir(site.path("fieldgate-data")).unwrap();
        let path = site.path(DATABASE);
        let settings = SqliteSettings::default();
        let mut store = SqliteStore::open(&path, &settings).await.unwrap();
        let batch = Batch {
            logins: vec![login("pump-2"), login("pump-1")],
            ..Batch::default()
        };
        let mut committed = store.commit(&batch).await.unwrap();
        let Some(LoginOutcome::Admitted(pump)) = committed.logins.pop() else {
            panic!("{committed:?}");
        };
        let batch = Batch {
            declares: vec![declare(&pump)],
            ..Batch::default()
        };
        let mut committed = store.commit(&batch).await.unwrap();
        let Some(DeclareOutcome::Accepted(schema)) = committed.declares.pop() else {
            panic!("{committed:?}");
        };
        let readings = Readings {
            time: ResolvedTime {
                offset_us: 0,
                quality: Quality::Utc,
            },
            times_us: vec![AT_US - 1_000_000, AT_US],
            series: vec![schema.channels[0].series],
            values: vec![21.57, f64::NAN],
            too_old: 0,
        };
        let batch = Batch {
            entries: vec![
                entry(&pump, 1..=1, types::DATA, Content::Readings(readings)),
                entry(&pump, 2..=3, types::GAP, Content::Gap { reason: 0 }),
                entry(&pump, 4..=4, types::DATA, quarantined()),
            ],
            events: vec![DeviceEvent {
                device: pump.device,
                session: None,
                at_us: AT_US,
                kind: DeviceEventKind::Disconnected,
                code: 42,
                detail: "silent\u{1b}[2J".to_owned(),
            }],
            ..Batch::default()
        };
        store.commit(&batch).await.unwrap();
        (site, store)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = command(args);
        command.current_dir(self.dir.path());
        command
    }

    pub fn run(&self, args: &[&str]) -> Said {
        self.run_with(args, &[])
    }

    pub fn run_with(&self, args: &[&str], environment: &[(&str, &str)]) -> Said {
        let mut command = self.command(args);
        command.envs(environment.iter().copied());
        Said::of(command)
    }

    pub fn query(&self, sql: &str, format: &str) -> String {
        let said = self.run(&["query", sql, "--format", format]);
        assert_eq!((said.code, &*said.err), (0, ""), "{said:?}");
        said.out
    }
}

impl Said {
    /// Runs a process to its end and returns its output.
    pub fn of(mut command: Command) -> Said {
        let done = keep_of(command.output().unwrap());
        Said {
            code: done.status.code().unwrap(),
            out: String::from_utf8(done.stdout).unwrap(),
            err: String::from_utf8(done.stderr).unwrap(),
        }
    }

    /// Asserts that stderr is one line with all these words, and that there is no other output.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!((self.code, &*self.out), (code, ""), "{self:?}");
        let said = by_default(&self.err);
        assert!(said.starts_with("error: "), "{self:?}");
        assert_eq!(said.lines().count(), 1, "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "{word}: {self:?}");
        }
    }
}

fn login(device: &str) -> Login {
    Login {
        device: device.to_owned(),
        stream: 77,
        oldest_seq: 1,
        next_seq: 1,
        firmware: "1.2.0".to_owned(),
        schema: None,
        clock: BootClock {
            boot: 1,
            offset_us: AT_US,
            delay_us: 20_000,
            measured_at_us: AT_US,
            origin: Origin::NONE,
            valid_from_us: 0,
        },
        key_revision: 0,
        may_register: true,
        at_us: AT_US,
    }
}

fn declare(admission: &Admission) -> Declare {
    Declare {
        device: admission.device,
        schema: 1,
        hash: [1; 8],
        channels: vec![DeclaredChannel {
            id: 0,
            name: "temperature".to_owned(),
            unit: "Cel".to_owned(),
            kind: Kind::Integer,
            exp10: -2,
        }],
    }
}

fn entry(
    admission: &Admission,
    seqs: std::ops::RangeInclusive<u64>,
    frame_type: u8,
    content: Content,
) -> Entry {
    Entry {
        device: admission.device,
        stream: admission.receipt.stream(),
        first_seq: *seqs.start(),
        seq: *seqs.end(),
        frame_type,
        crc: None,
        received_at_us: AT_US,
        content,
        clock: None,
    }
}

/// Returns readings of the only series, in a frame of the device that sent some.
pub fn readings(seq: u64, rows: &[(i64, f64)]) -> Entry {
    let readings = Readings {
        time: ResolvedTime {
            offset_us: 0,
            quality: Quality::Utc,
        },
        times_us: rows.iter().map(|(ts_us, _)| *ts_us).collect(),
        series: vec![SeriesId(1)],
        values: rows.iter().map(|(_, value)| *value).collect(),
        too_old: 0,
    };
    Entry {
        device: DeviceId(2),
        stream: StreamId(2),
        first_seq: seq,
        seq,
        frame_type: types::DATA,
        crc: None,
        received_at_us: AT_US,
        content: Content::Readings(readings),
        clock: None,
    }
}

fn quarantined() -> Content {
    Content::Quarantined {
        code: 30,
        detail: "R21".to_owned(),
        bytes: (0xA0..0xC0).collect(),
        peer: "127.0.0.1:5".to_owned(),
    }
}

/// A gateway that runs until it is dropped.
pub struct Gateway {
    child: Child,
    stderr: Stderr,
    pub announced: Vec<String>,
}

impl Gateway {
    pub fn start(site: &Site) -> Gateway {
        let mut child = site
            .command(&["serve", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let announced = out.lines().map(Result::unwrap).take(4).collect();
        Gateway {
            stderr: collect(child.stderr.take().unwrap()),
            child,
            announced,
        }
    }

    /// Ends it like a service manager.
    pub fn terminate(mut self) -> (Option<i32>, String) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(status.success());
        let log = self.stderr.read_to_end().unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
