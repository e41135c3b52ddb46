//! A small disk of its own for a test.

use std::path::PathBuf;
use std::process::{Child, Command};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use tempfile::TempDir;

use crate::support::gateway::{Gateway, clean};
use crate::support::{PATIENCE, eventually};

/// A disk that only its programs have mounted.
pub struct SmallDisk {
    /// Keeps the disk mounted.
    holder: Child,
    dir: TempDir,
}

impl SmallDisk {
    /// Mounts an empty disk of this size. Returns `None`, and says so, where users cannot mount.
    pub fn mount(mebibytes: u32) -> Option<SmallDisk> {
        let dir = TempDir::new().expect("a directory");
        let script = format!(
            "mount -t tmpfs -o size={mebibytes}m,mode=700 disk \"$0\" || exit 77; \
             touch \"$0/mounted\"; exec sleep 3600"
        );
        let mut unshare = clean("unshare");
        unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
        let holder = unshare.arg(dir.path()).spawn().expect("unshare");
        let mut disk = SmallDisk { holder, dir };
        let mut ended = None;
        eventually("a disk is mounted or refused", PATIENCE, || {
            ended = disk.holder.try_wait().expect("a child");
            ended.is_some() || disk.files().join("mounted").exists()
        });
        if ended.is_some() {
            eprintln!("not tested: this system does not let its users mount");
            return None;
        }
        Some(disk)
    }

    /// Returns the path of the disk for this process, which cannot open databases there.
    pub fn files(&self) -> PathBuf {
        let dir = self.dir.path().display();
        format!("/proc/{}/root{dir}", self.holder.id()).into()
    }

    /// Returns `fieldgate` with `args`, among the programs that have mounted the disk.
    fn command(&self, args: &[&str]) -> Command {
        let target = self.holder.id().to_string();
        let mut command = clean("nsenter");
        command.args(["--user", "--mount", "--preserve-credentials", "--target"]);
        command
            .arg(target)
            .arg(env!("CARGO_BIN_EXE_fieldgate"))
            .args(args);
        command
    }

    /// Starts a gateway with its data directory on the disk.
    pub fn start(&self, flags: &[&str]) -> Gateway {
        let serve = self.command(&["serve"]);
        Gateway::start_apart(serve, self.dir.path(), &self.files(), flags)
    }

    /// Returns the numbers in the single row that a query finds.
    pub fn query(&self, sql: &str) -> Vec<i64> {
        let mut query = self.command(&["query", sql, "--format", "csv", "--data-dir"]);
        let found = query.arg(self.dir.path()).output().expect("runs");
        let text = String::from_utf8(found.stdout).expect("text");
        let row = text.lines().nth(1).map(|line| line.split(','));
        let row = row.and_then(|row| row.map(|number| number.parse().ok()).collect());
        row.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&found.stderr)))
    }

    pub fn free_bytes(&self) -> u64 {
        let disk = statvfs(self.files()).expect("a disk");
        disk.f_bavail * disk.f_frsize
    }

    /// Takes space away until this much is left.
    pub fn leave(&self, free_bytes: u64) -> Ballast {
        let path = self.files().join("ballast");
        let file = std::fs::File::create(&path).expect("a file");
        // Other programs write meanwhile.
        eventually("the disk is filled", PATIENCE, || {
            let bytes = self.free_bytes().saturating_sub(free_bytes);
            bytes == 0 || fallocate(&file, FallocateFlags::empty(), 0, bytes).is_ok()
        });
        Ballast(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A file that takes space away until it is dropped.
pub struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
