//! A private Postgres cluster for a test, which the test can stop, freeze and start.
//!
//! `tests/postgres` prints the directory of the server programs, and the user to run them.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rand::RngExt;
use tempfile::TempDir;

use crate::support::database::{PgDatabase, Session};
use crate::support::{PATIENCE, eventually};

struct Programs {
    dir: PathBuf,
    /// User who runs them, if not the current one.
    user: Option<(u32, u32)>,
}

impl Programs {
    fn find() -> Programs {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/postgres");
        let found = Command::new(script).arg("find").output().expect("bash");
        let said = String::from_utf8_lossy(&found.stderr);
        assert!(found.status.success(), "{said}");
        let found = String::from_utf8(found.stdout).expect("text");
        let mut lines = found.lines();
        let dir = PathBuf::from(lines.next().expect("a directory"));
        let user = lines.next().map(|user| (id("-u", user), id("-g", user)));
        Programs { dir, user }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.dir.join(program));
        command.stdin(Stdio::null());
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        command
    }
}

fn id(which: &str, user: &str) -> u32 {
    let output = Command::new("id").args([which, user]).output().expect("id");
    let number = String::from_utf8(output.stdout).expect("text");
    number.trim().parse().expect("a number")
}

/// A cluster, which is removed on drop.
pub struct Cluster {
    programs: Programs,
    dir: TempDir,
    port: u16,
    settings: Vec<String>,
    /// `None` while it is stopped.
    postmaster: Option<Child>,
    /// All processes except the postmaster, while they are frozen.
    frozen: Vec<i32>,
}

impl Cluster {
    /// Starts a new cluster with `settings` such as `fsync=off`.
    pub fn start(settings: &[&str]) -> Cluster {
        let programs = Programs::find();
        let dir = TempDir::new().expect("a directory");
        if let Some((user, group)) = programs.user {
            chown(dir.path(), Some(user), Some(group)).expect("root");
        }
        let made = programs
            .command("initdb")
            .args(["-U", "fieldgate", "-A", "trust", "-E", "UTF8", "--locale=C"])
            // The cluster is discarded if the machine crashes now. It syncs while it runs.
            .args(["--no-sync", "-D"])
            .arg(dir.path().join("data"))
            .current_dir(dir.path())
            .output()
            .expect("starts");
        let said = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{said}");
        let mut cluster = Cluster {
            programs,
            dir,
            port: free_port(),
            settings: settings.iter().map(|&setting| setting.into()).collect(),
            postmaster: None,
            frozen: Vec::new(),
        };
        cluster.run();
        cluster
    }

    /// Returns the URL of its maintenance database.
    pub fn url(&self) -> String {
        format!("postgres://fieldgate@127.0.0.1:{}/postgres", self.port)
    }

    pub fn database(&self) -> PgDatabase {
        PgDatabase::create_on(&self.url())
    }

    /// Requires a password from `user`.
    pub fn ask_for_password(&self, user: &str) {
        let path = self.dir.path().join("data/pg_hba.conf");
        let rules = std::fs::read_to_string(&path).expect("rules");
        let first = format!("host all {user} 127.0.0.1/32 scram-sha-256\n");
        std::fs::write(&path, first + &rules).expect("writes");
        Session::open(&self.url()).execute("SELECT pg_reload_conf()");
    }

    /// Starts it again, and waits until it accepts clients.
    pub fn run(&mut self) {
        let path = self.dir.path().join("log");
        let log = File::options().create(true).append(true).open(&path);
        let log = log.expect("a log");
        let mut command = self.programs.command("postgres");
        command.current_dir(self.dir.path());
        command.arg("-D").arg(self.dir.path().join("data"));
        command.args(["-p", &self.port.to_string()]);
        command.args(["-c", "listen_addresses=127.0.0.1"]);
        command.args(["-c", "unix_socket_directories="]);
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        let mut postmaster = command.spawn().expect("starts");
        eventually("Postgres starts", PATIENCE, || {
            if let Some(status) = postmaster.try_wait().expect("a child") {
                let said = std::fs::read_to_string(&path).unwrap_or_default();
                panic!("Postgres does not start, {status}: {said}");
            }
            Session::try_open(&self.url()).is_some()
        });
        self.postmaster = Some(postmaster);
    }

    /// Stops it like `pg_ctl stop -m immediate`: every process ends immediately, as in a crash, and the next start
    /// recovers.
    pub fn stop_immediately(&mut self) {
        let mut postmaster = self.postmaster.take().expect("it runs");
        signal("QUIT", &[postmaster.id() as i32]);
        postmaster.wait().expect("a child");
    }

    /// Halts all its processes; clients see a server that does not respond.
    pub fn freeze(&mut self) {
        let mut session = Session::open(&self.url());
        // The postmaster first: then it cannot create new ones.
        signal("STOP", &[self.postmaster_id()]);
        let pids: Vec<(i32,)> = session.rows("SELECT pid FROM pg_stat_activity");
        self.frozen = pids.into_iter().map(|(pid,)| pid).collect();
        signal("STOP", &self.frozen);
    }

    /// Resumes its processes.
    pub fn thaw(&mut self) {
        signal("CONT", &std::mem::take(&mut self.frozen));
        signal("CONT", &[self.postmaster_id()]);
    }

    fn postmaster_id(&self) -> i32 {
        self.postmaster.as_ref().expect("it runs").id() as i32
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.postmaster.is_some() {
            self.thaw();
            self.stop_immediately();
        }
    }
}

fn signal(name: &str, pids: &[i32]) {
    if pids.is_empty() {
        return;
    }
    let pids = pids.iter().map(i32::to_string);
    // One of them may have exited on its own; if the others miss the signal, the test fails soon enough.
    let _ = Command::new("kill")
        .arg(format!("-{name}"))
        .args(pids)
        .stderr(Stdio::null())
        .status()
        .expect("kill");
}

/// Returns a port below the client ports of common systems: while the cluster is stopped, no connection of
/// another test may use it by chance.
fn free_port() -> u16 {
    loop {
        let port = rand::rng().random_range(20_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
