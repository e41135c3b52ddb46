//! Measures the free space of each disk that the gateway writes to. Below a level the gateway warns, below another one
//! sessions stop storing readings until there is space again.
//!
//! A disk that does not answer blocks only its own measurement.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::config::Config;
use crate::config::store_url::StoreUrl;
use crate::ingest::registry::{Obstacle, Registry};
use crate::metrics::Metrics;
use crate::sys::disk::{Level, Levels, Space};

/// Interval between two measurements of a disk.
const INTERVAL: Duration = Duration::from_secs(1);

/// What the gateway keeps on a disk. A disk that holds several of them counts as the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Store,
    Spool,
    Data,
}

impl Place {
    /// Every place.
    pub const ALL: [Place; 3] = [Place::Store, Place::Spool, Place::Data];

    /// Returns the label in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Place::Store => "store",
            Place::Spool => "spool",
            Place::Data => "data",
        }
    }

    /// Returns what is there, for operators.
    pub fn purpose(self) -> &'static str {
        match self {
            Place::Store => "the store",
            Place::Spool => "the spool",
            Place::Data => "the data directory",
        }
    }

    /// Returns whether readings are stored there.
    pub fn holds_readings(self) -> bool {
        self != Place::Data
    }
}

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

/// Watches one disk.
pub struct DiskWatch {
    place: Place,
    path: PathBuf,
    levels: watch::Receiver<Levels>,
    level: Level,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
}

impl DiskWatch {
    /// Creates a watch that has not measured the disk yet.
    pub fn new(
        (place, path): (Place, PathBuf),
        levels: watch::Receiver<Levels>,
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
    ) -> DiskWatch {
        DiskWatch {
            place,
            path,
            levels,
            level: Level::default(),
            registry,
            metrics,
        }
    }

    /// Measures the disk at intervals. Never returns.
    pub async fn run(mut self) {
        loop {
            self.measure().await;
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Measures the disk once and applies its level.
    ///
    /// # Cancel safety
    /// Nothing is applied before the disk has answered.
    pub async fn measure(&mut self) {
        let path = self.path.clone();
        let measured = tokio::task::spawn_blocking(move || Space::of(&path)).await;
        // A disk that cannot be measured keeps its level; the store reports its errors.
        if let Ok(Ok(space)) = measured {
            self.apply(space);
        }
    }

    fn apply(&mut self, space: Space) {
        let before = self.level;
        let level = self.levels.borrow().level(space, before);
        let is_low = level != Level::Enough;
        self.metrics.set_disk(self.place.name(), space, is_low);
        if level == before {
            return;
        }
        self.level = level;
        if self.place.holds_readings() {
            let obstacle = Obstacle::Disk(self.place.name());
            self.registry.announce(obstacle, level == Level::Full);
            self.metrics.set_disk_stopped(self.registry.is_disk_full());
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
