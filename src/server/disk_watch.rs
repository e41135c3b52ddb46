//! Measures the free space of each disk that the gateway writes to. Below one level the gateway warns. Below a lower one,
//! it accepts no readings until there is space again.
//!
//! A disk that does not answer blocks only its own measurement.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::config::Config;
use crate::config::store_url::StoreUrl;
use crate::ingest::registry::{Obstacle, Registry};
use crate::metrics::Metrics;
use crate::store::spool;
use crate::store::sqlite::LogMover;
use crate::sys::disk::{Level, Levels, Place, Space};

/// Interval between two measurements of a disk.
const INTERVAL: Duration = Duration::from_secs(1);

/// Returns a directory on each disk that the gateway writes to, each disk once. Leaves out directories that do not
/// exist yet.
pub fn places(config: &Config) -> Vec<(Place, PathBuf)> {
    let store = match &config.store {
        StoreUrl::Sqlite(path) => Some((Place::Store, directory_of(path))),
        StoreUrl::Postgres(_) => None,
    };
    let spool = config.spool();
    let spool = spool.map(|path| (Place::Spool, directory_of(&path)));
    let data = (Place::Data, config.location.data_dir.clone());
    let mut places: Vec<(Place, PathBuf)> = Vec::new();
    let mut disks = Vec::new();
    for (place, dir) in { store.into_iter() }.chain(spool).chain([data]) {
        let Ok(found) = dir.metadata() else { continue };
        if !disks.contains(&found.dev()) {
            disks.push(found.dev());
            places.push((place, dir));
        }
    }
    places
}

/// Returns the directory that holds a file, after following a link.
fn directory_of(path: &Path) -> PathBuf {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    dir.unwrap_or(Path::new(".")).to_owned()
}

/// What all watches use.
#[derive(Clone)]
pub struct DiskUsers {
    /// Percentages at which the gateway reacts.
    pub levels: watch::Receiver<Levels>,
    /// Sessions, which stop storing.
    pub registry: Arc<Registry>,
    pub metrics: Arc<Metrics>,
    /// Held while a watch announces a change.
    pub turn: Arc<Mutex<()>>,
    /// Write-ahead log of a SQLite store. Commits move it, and there are none while the disk is full.
    pub log: Option<LogMover>,
    /// Path of the spool, if there is one.
    pub spool: Option<PathBuf>,
    /// Notified when a disk becomes low, so that retention deletes at once.
    pub retention: Arc<Notify>,
}

/// Watches one disk.
pub struct DiskWatch {
    place: Place,
    path: PathBuf,
    level: Level,
    users: DiskUsers,
}

impl DiskWatch {
    /// Creates a watch that has not measured the disk yet.
    pub fn new((place, path): (Place, PathBuf), users: DiskUsers) -> DiskWatch {
        DiskWatch {
            place,
            path,
            level: Level::default(),
            users,
        }
    }

    /// Measures the disk at intervals. Never returns.
    pub async fn run(mut self) {
        loop {
            self.measure().await;
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Measures the disk once and applies its level. A disk that cannot be measured keeps its level; the store reports
    /// its errors.
    ///
    /// # Cancel safety
    /// Nothing is applied before the disk has answered.
    pub async fn measure(&mut self) {
        let path = self.path.clone();
        let measured = tokio::task::spawn_blocking(move || Space::of(&path)).await;
        let Ok(Ok(space)) = measured else { return };
        let (space, level) = self.judged(space).await;
        self.apply(space, level);
        if let (Level::Full, Place::Store, Some(log)) = (level, self.place, &self.users.log) {
            log.move_log().await;
        }
    }

    /// Returns the space of the disk and its level. The file of a spool does not shrink when it is drained, so its free
    /// pages count as free space on a low disk.
    async fn judged(&self, mut space: Space) -> (Space, Level) {
        let levels = *self.users.levels.borrow();
        let level = levels.level(space, self.level);
        if let (Place::Spool, Some(spool)) = (self.place, &self.users.spool)
            && level != Level::Enough
        {
            space.free_bytes += spool::reusable_bytes(spool).await.unwrap_or(0);
            return (space, levels.level(space, self.level));
        }
        (space, level)
    }

    fn apply(&mut self, space: Space, level: Level) {
        let DiskUsers {
            registry,
            metrics,
            turn,
            ..
        } = &self.users;
        let place = self.place.name();
        metrics.set_disk(self.place, space, level != Level::Enough);
        let before = std::mem::replace(&mut self.level, level);
        if level == before {
            return;
        }
        if self.place.holds_readings() {
            // Otherwise another watch could overwrite the metric with an older state.
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            registry.announce(Obstacle::Disk(place), level == Level::Full);
            metrics.set_disk_stopped(registry.is_disk_full());
        }
        if level > before {
            self.users.retention.notify_one();
        }
        self.log(space, before, level);
    }

    fn log(&self, space: Space, before: Level, level: Level) {
        let path = self.path.display();
        let (free_bytes, free_percent) = (space.free_bytes, space.free_percent());
        let stops = |level| level == Level::Full && self.place.holds_readings();
        if stops(level) {
            tracing::error!(%path, free_bytes, free_percent, "disk full, storing no readings until there is space");
        } else if stops(before) {
            tracing::info!(%path, free_bytes, free_percent, "disk has space again, storing readings");
        } else if level == Level::Enough {
            tracing::info!(%path, free_bytes, free_percent, "disk has enough space again");
        } else if before == Level::Enough {
            tracing::warn!(%path, free_bytes, free_percent, "disk space low");
        }
    }
}
