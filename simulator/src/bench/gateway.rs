//! The gateway process and the stores it uses.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use fieldgate::auth::fleet_key::{FleetKey, KEY_FILE};
use fieldgate::config::store_url::{PostgresUrl, StoreUrl};
use fieldgate::config::{DATABASE_FILE, PostgresOptions};
use fieldgate::sys::secret_file::SecretReaders;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::baseline::Job;
use super::postgres::Database;
use super::{BenchError, machine, postgres, sqlite};
use crate::fleet::{FleetTls, TlsError};

/// Maximum time to exit: a gateway needs some seconds to drain and to checkpoint its log into the database.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Selects one of the stores of a site.
#[derive(Clone, Copy, Debug)]
pub(super) enum Which {
    /// Created for each measurement.
    Fresh,
    /// Kept while it is compared with fresh ones.
    Stored,
}

impl Which {
    const ALL: [Which; 2] = [Which::Fresh, Which::Stored];

    fn name(self) -> &'static str {
        match self {
            Which::Fresh => "fresh",
            Which::Stored => "stored",
        }
    }
}

/// Location of the measurements: a directory, and databases if it is on Postgres.
pub(super) struct Site {
    pub(super) dir: PathBuf,
    server: Option<PostgresUrl>,
}

impl Site {
    pub(super) fn make(store: &StoreUrl) -> io::Result<Site> {
        let (parent, server) = match store {
            StoreUrl::Sqlite(path) => {
                let parent = path.parent().map(Path::to_owned).unwrap_or_default();
                (parent, None)
            }
            StoreUrl::Postgres(url) => (std::env::temp_dir(), Some(url.clone())),
        };
        let dir = parent.join(format!(".fieldgate-bench-{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        Ok(Site { dir, server })
    }

    pub(super) fn is_postgres(&self) -> bool {
        self.server.is_some()
    }

    fn store(&self, which: Which) -> Store {
        let server = self.server.as_ref();
        Store {
            dir: self.dir.join(which.name()),
            database: server.map(|server| Database::on(server, which.name())),
        }
    }

    pub(super) async fn new_store(&self, which: Which) -> Result<Store, BenchError> {
        let store = self.store(which);
        std::fs::create_dir(&store.dir)?;
        if let Some(database) = &store.database {
            database.recreate().await?;
        }
        Ok(store)
    }

    pub(super) async fn remove(self) -> Result<(), BenchError> {
        let mut removed = Ok(());
        for which in Which::ALL {
            if let Some(database) = self.store(which).database {
                removed = removed.and(database.remove().await);
            }
        }
        std::fs::remove_dir_all(&self.dir)?;
        removed
    }
}

/// A gateway's data directory and its store.
pub(super) struct Store {
    dir: PathBuf,
    database: Option<Database>,
}

impl Store {
    /// Fills the store without a gateway; returns readings per second.
    pub(super) async fn baseline(&self, job: &Job) -> Result<f64, BenchError> {
        match &self.database {
            None => sqlite::baseline(&self.dir.join(DATABASE_FILE), job).await,
            Some(database) => {
                let connections = PostgresOptions::default().postgres_writers;
                postgres::baseline(database.url(), connections, job).await
            }
        }
    }

    /// Returns the store's size on disk after the gateway has exited, including the ledger and the indexes.
    pub(super) async fn disk_bytes(&self) -> Result<u64, BenchError> {
        match &self.database {
            None => Ok(std::fs::metadata(self.dir.join(DATABASE_FILE))?.len()),
            Some(database) => database.disk_bytes().await,
        }
    }

    pub(super) async fn remove(self) -> Result<(), BenchError> {
        std::fs::remove_dir_all(&self.dir)?;
        match self.database {
            Some(database) => database.remove().await,
            None => Ok(()),
        }
    }

    fn address(&self) -> String {
        match &self.database {
            None => format!("sqlite://{}", self.dir.join(DATABASE_FILE).display()),
            Some(database) => database.url().with_password().to_owned(),
        }
    }
}

pub(super) struct Gateway {
    child: Child,
    pid: u32,
    pub(super) address: SocketAddr,
    pub(super) tls_address: SocketAddr,
    ca: PathBuf,
    pub(super) fleet_key: [u8; 32],
    // Kept open, because the gateway may write more.
    _stdout: Lines<BufReader<ChildStdout>>,
}

impl Gateway {
    /// Starts a gateway on a free port and waits until it listens.
    pub(super) async fn start(
        binary: &Path,
        store: &Store,
        flags: &[&str],
    ) -> Result<Gateway, BenchError> {
        let init = Command::new(binary)
            .args(["tls", "init", "--data-dir"])
            .arg(&store.dir)
            .stdout(Stdio::null())
            .status();
        if !init.await?.success() {
            return Err(BenchError::NotStarted("it has no certificate".into()));
        }
        let mut child = Command::new(binary)
            .args(["serve", "--listen", "127.0.0.1:0", "--http", "off"])
            .args(["--tls-listen", "127.0.0.1:0", "--data-dir"])
            .arg(&store.dir)
            .args(flags)
            // Not as an argument: it may contain a password, and every user of the machine can read arguments.
            .env("FIELDGATE_STORE", store.address())
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let missing = |what: &str| io::Error::other(format!("the gateway has no {what}"));
        let stdout = child.stdout.take().ok_or_else(|| missing("stdout"))?;
        let pid = child.id().ok_or_else(|| missing("process id"))?;
        let mut lines = BufReader::new(stdout).lines();
        let mut said = String::new();
        let mut address = None;
        while let Some(line) = lines.next_line().await? {
            let after = |what| line.strip_prefix(what).map(str::trim).map(str::parse);
            if let Some(Ok(listening_on)) = after("listening on") {
                address = Some(listening_on);
            }
            if let (Some(address), Some(Ok(tls_address))) = (address, after("TLS on")) {
                return Ok(Gateway {
                    child,
                    pid,
                    address,
                    tls_address,
                    ca: store.dir.join("tls/ca.pem"),
                    fleet_key: *FleetKey::load(&store.dir.join(KEY_FILE), SecretReaders::Owner)?
                        .as_bytes(),
                    _stdout: lines,
                });
            }
            said = line;
        }
        Err(BenchError::NotStarted(said))
    }

    pub(super) fn fleet_tls(&self) -> Result<FleetTls, TlsError> {
        FleetTls::new("localhost", &self.ca, None)
    }

    pub(super) fn cpu_s(&self) -> io::Result<f64> {
        machine::cpu_s(self.pid)
    }

    pub(super) fn resident_bytes(&self) -> io::Result<u64> {
        machine::resident_bytes(self.pid)
    }

    /// Ends the gateway with SIGTERM, so that the log is in the database afterwards.
    pub(super) async fn leave(mut self) -> Result<(), BenchError> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("not a process id"))?;
        kill_process(pid, Signal::TERM).map_err(io::Error::from)?;
        match tokio::time::timeout(LEAVE_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Err(error)) => Err(error.into()),
            _ => Err(BenchError::NotLeft),
        }
    }
}
