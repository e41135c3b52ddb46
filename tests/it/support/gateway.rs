//! A gateway for tests: the real binary in a private directory, on a private port.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;

use fieldgate::internals::{Access, Purpose, open_existing};
use fieldgate_protocol::auth::{KEY_BYTES, NO_CHANNEL_BINDING, derive_device_key};
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, FromRow, SqliteConnection};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::support::PATIENCE;
use crate::support::client::{Link, Login, Welcomed};
use crate::support::logs::{Stderr, collect, keep_key};
use crate::support::messages::declare;

/// Returns `fieldgate` with `args`, not started yet, in a clean environment.
pub fn command(args: &[&str]) -> Command {
    let mut command = clean(env!("CARGO_BIN_EXE_fieldgate"));
    command.args(args);
    command
}

/// Returns a program in a clean environment that logs at the lowest level.
pub fn clean(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FIELDGATE_") {
            command.env_remove(name);
        }
    }
    // Gateways run side by side, and most tests need no HTTP.
    command.env("FIELDGATE_HTTP", "off");
    command.env("RUST_LOG", "debug").stdin(Stdio::null());
    command
}

#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stderr: String,
}

/// A running gateway. On drop it is killed, and must not have panicked.
#[derive(Debug)]
pub struct Gateway {
    pub addr: SocketAddr,
    tls_addr: Option<SocketAddr>,
    http_addr: Option<SocketAddr>,
    process: Child,
    /// In a lock, so that threads can share a gateway.
    stderr: Mutex<Stderr>,
    ended: Option<ExitStatus>,
    data_dir: PathBuf,
    /// Removed with the gateway that created it.
    _dir: Option<TempDir>,
}

impl Gateway {
    /// Starts a gateway in a new directory, with further `flags`.
    pub fn start(flags: &[&str]) -> Gateway {
        let dir = TempDir::new().expect("a directory");
        let mut gateway = Gateway::start_in(dir.path(), flags);
        gateway._dir = Some(dir);
        gateway
    }

    /// Starts a gateway in an existing `data_dir`.
    pub fn start_in(data_dir: &Path, flags: &[&str]) -> Gateway {
        Gateway::start_by(command(&["serve"]), data_dir, flags)
    }

    /// Starts a gateway with this limit on open files.
    pub fn start_with_files(open_files: u32, flags: &[&str]) -> Gateway {
        let dir = TempDir::new().expect("a directory");
        let binary = env!("CARGO_BIN_EXE_fieldgate");
        let script = format!("ulimit -n {open_files}; exec {binary} serve \"$@\"");
        let mut limited = clean("sh");
        limited.args(["-c", &script, "sh"]);
        let mut gateway = Gateway::start_by(limited, dir.path(), flags);
        gateway._dir = Some(dir);
        gateway
    }

    /// Starts a gateway in a new directory whose log goes to `stderr`.
    pub fn start_logging_to(stderr: Stdio, flags: &[&str]) -> Gateway {
        let dir = TempDir::new().expect("a directory");
        let mut gateway =
            Gateway::start_with(command(&["serve"]), stderr, dir.path(), dir.path(), flags);
        gateway._dir = Some(dir);
        gateway
    }

    /// Starts a gateway by a command that ends with `serve`.
    pub fn start_by(serve: Command, data_dir: &Path, flags: &[&str]) -> Gateway {
        Gateway::start_with(serve, Stdio::piped(), data_dir, data_dir, flags)
    }

    /// Starts a gateway whose data directory this process sees at `files`.
    pub fn start_apart(serve: Command, data_dir: &Path, files: &Path, flags: &[&str]) -> Gateway {
        Gateway::start_with(serve, Stdio::piped(), data_dir, files, flags)
    }

    fn start_with(
        mut serve: Command,
        stderr: Stdio,
        data_dir: &Path,
        files: &Path,
        flags: &[&str],
    ) -> Gateway {
        serve.arg("--data-dir").arg(data_dir).args(flags);
        if !flags.contains(&"--listen") {
            serve.args(["--listen", "127.0.0.1:0"]);
        }
        let mut process = serve
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("starts");
        let mut stderr = match process.stderr.take() {
            Some(pipe) => collect(pipe),
            None => collect(std::io::empty()),
        };
        // The command holds the other end of the pipe, too.
        drop(serve);
        let stdout = process.stdout.take().expect("piped");
        let (sender, listening) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let addr = ["listening on    ", "TLS on          ", "HTTP on         "]
                    .into_iter()
                    .find_map(|start| line.strip_prefix(start));
                if let Some(addr) = addr {
                    let _ = sender.send(addr.parse().expect("an address"));
                }
            }
        });
        let mut listens = || {
            let Ok(addr) = listening.recv_timeout(PATIENCE) else {
                let _ = process.kill();
                panic!(
                    "not listening: {}",
                    stderr.read_to_end().unwrap_or_default()
                );
            };
            addr
        };
        let addr = listens();
        let tls_addr = flags.contains(&"--tls-listen").then(&mut listens);
        let http_addr = flags.contains(&"--http").then(listens);
        let gateway = Gateway {
            addr,
            tls_addr,
            http_addr,
            process,
            stderr: Mutex::new(stderr),
            ended: None,
            data_dir: files.to_owned(),
            _dir: None,
        };
        keep_key(&gateway.fleet_key());
        gateway
    }

    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr.expect("started with --http")
    }

    pub fn tls_addr(&self) -> SocketAddr {
        self.tls_addr.expect("started with --tls-listen")
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Returns a device of this fleet that has never connected.
    pub fn device(&self, name: &str) -> Login {
        Login {
            name: name.to_owned(),
            key: derive_device_key(&self.fleet_key(), name, 0),
            stream: 0x1122_3344_5566_7788,
            oldest_seq: 1,
            next_seq: 1_000_000,
            boot: 7,
            mono_us: 1_000_000,
            firmware: "2.4.1".to_owned(),
            schema: 0,
            schema_hash: [0; 8],
            versions: (1, 1),
            binding: NO_CHANNEL_BINDING,
        }
    }

    /// Logs in as a device and declares its schema.
    pub fn connect(&self, name: &str) -> (Link, Welcomed) {
        let (mut link, welcomed) = Link::login(self.addr, &self.device(name));
        link.send(&declare(crate::support::messages::SCHEMA));
        (link, welcomed)
    }

    pub fn fleet_key(&self) -> [u8; KEY_BYTES] {
        let digits = std::fs::read_to_string(self.data_dir.join("fleet.key")).expect("a key");
        let digits = digits.trim();
        std::array::from_fn(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).expect("hex"))
    }

    /// Opens a reader of this gateway's database.
    pub fn database(&self) -> Database {
        Database::open(&self.data_dir.join("fieldgate.db"))
    }

    pub fn is_alive(&mut self) -> bool {
        self.process.try_wait().expect("a child").is_none()
    }

    /// Returns the resident memory of the process; Linux only.
    pub fn memory_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(path).expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: u64 = kib.and_then(|kib| kib.parse().ok()).expect("a size");
        kib * 1024
    }

    /// Kills the process with SIGKILL.
    pub fn kill(mut self) -> Ended {
        self.process.kill().expect("kills");
        self.wait()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.process.id());
        let status = Command::new("sh").args(["-c", &kill]).status();
        assert!(status.expect("sh").success());
    }

    /// Waits until the log has a line with `what`.
    pub fn wait_for_line(&mut self, what: &str) {
        self.stderr.get_mut().expect("no panic").wait_for(what);
    }

    pub fn wait(&mut self) -> Ended {
        let stderr = self.stderr.get_mut().expect("no panic");
        let stderr = stderr.read_to_end().expect("an end");
        let status = self.process.wait().expect("a child");
        self.ended = Some(status);
        assert!(!stderr.contains("panicked"), "{stderr}");
        Ended { status, stderr }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let stderr = self.stderr.get_mut().expect("no panic");
        let stderr = stderr.read_to_end().unwrap_or_default();
        if thread::panicking() {
            eprintln!("--- stderr of the gateway\n{stderr}");
        } else {
            assert!(!stderr.contains("panicked"), "{stderr}");
        }
    }
}

/// Runs `fieldgate` with `args`, which must exit on its own.
pub fn run(args: &[&str]) -> Ended {
    let mut process = command(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stderr = collect(process.stderr.take().expect("piped"));
    match stderr.read_to_end() {
        Some(stderr) => Ended {
            status: process.wait().expect("a child"),
            stderr,
        },
        None => {
            let _ = process.kill();
            panic!("{args:?} does not exit");
        }
    }
}

/// The stored data, as another connection sees it.
pub struct Database {
    runtime: Runtime,
    connection: SqliteConnection,
}

impl Database {
    pub fn open(path: &Path) -> Database {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let opened = open_existing(path, Purpose::Store, Access::Read);
        let connection = runtime.block_on(opened).expect("a database");
        Database {
            runtime,
            connection,
        }
    }

    pub fn rows<T>(&mut self, sql: &str) -> Vec<T>
    where
        T: for<'r> FromRow<'r, SqliteRow> + Send + Unpin,
    {
        let query = sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_all(&mut self.connection);
        self.runtime.block_on(query).expect(sql)
    }

    /// Returns the one number that a query returns.
    pub fn count(&mut self, sql: &str) -> i64 {
        self.rows::<(i64,)>(sql)[0].0
    }

    /// Returns the stored frames of a device's stream, in order, with their types.
    pub fn frames(&mut self, device: &str) -> Vec<(i64, i64)> {
        self.rows(&format!(
            "SELECT f.seq, f.type FROM frames f JOIN streams s ON s.id = f.stream_id \
             JOIN devices d ON d.id = s.device_id WHERE d.name = '{device}' ORDER BY f.seq, f.id"
        ))
    }

    /// Returns a device's readings as (time, value), in time order.
    pub fn readings(&mut self, device: &str) -> Vec<(i64, Option<f64>)> {
        self.rows(&format!(
            "SELECT r.ts, r.value FROM readings r JOIN series s ON s.id = r.series_id \
             JOIN devices d ON d.id = s.device_id WHERE d.name = '{device}' \
             ORDER BY r.ts, s.channel, r.frame_id"
        ))
    }

    /// Returns a device's quarantined frames, as (number, code, bytes).
    pub fn quarantine(&mut self, device: &str) -> Vec<(i64, i64, Vec<u8>)> {
        self.rows(&format!(
            "SELECT q.seq, q.code, q.bytes FROM quarantine q JOIN devices d ON d.id = q.device_id \
             WHERE d.name = '{device}' ORDER BY q.seq"
        ))
    }

    /// Returns the durable number of a device's only stream.
    pub fn durable_seq(&mut self, device: &str) -> i64 {
        self.count(&format!(
            "SELECT max(durable_seq) FROM streams s JOIN devices d ON d.id = s.device_id \
             WHERE d.name = '{device}'"
        ))
    }
}

/// Changes a database without the gateway's knowledge.
pub fn meddle(path: &Path, sql: &str) {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut connection = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .busy_timeout(PATIENCE)
            .connect()
            .await
            .expect("a database");
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
            .execute(&mut connection)
            .await
            .expect(sql);
        sqlx::Connection::close(connection).await.expect("closes");
    });
}
