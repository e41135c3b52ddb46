//! Information from Linux about processes and the machine, from /proc.

use std::io;
use std::path::Path;

use serde::Serialize;

pub(super) fn cpu_s(pid: u32) -> io::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = cpu_ticks(&stat).ok_or_else(|| io::Error::other("/proc/PID/stat has no times"))?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

pub(super) fn resident_bytes(pid: u32) -> io::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = kib_of(&status, "VmRSS:");
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| io::Error::other("/proc/PID/status has no VmRSS"))
}

/// Returns the ticks in user mode and in the kernel. The second field is the program's name, which may hold any bytes.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn kib_of(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    cpu: String,
    cores: usize,
    ram_bytes: u64,
    kernel: String,
    /// File system of the directory with the measured files.
    file_system: String,
}

impl Machine {
    /// Describes this machine, with "unknown" for values that could not be determined.
    pub(super) fn this(dir: &Path) -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let unknown = || "unknown".to_owned();
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        Machine {
            cpu: cpu_model(&read("/proc/cpuinfo")).unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            ram_bytes: kib_of(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0) * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            file_system: mount_of(&read("/proc/mounts"), &dir).unwrap_or_else(unknown),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ram_gib = self.ram_bytes as f64 / f64::from(1 << 30);
        write!(
            f,
            "{}, {} cores, {ram_gib:.0} GiB RAM, Linux {}, {}",
            self.cpu, self.cores, self.kernel, self.file_system
        )
    }
}

fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Returns file system and device of the longest mount point above `dir`.
fn mount_of(mounts: &str, dir: &Path) -> Option<String> {
    let fields = mounts.lines().map(|line| line.split(' '));
    let mounts = fields.filter_map(|mut fields| {
        let (device, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        dir.starts_with(point).then_some((point, device, kind))
    });
    // Of two mounts on one point, the later one counts.
    let (_, device, kind) = mounts.max_by_key(|(point, ..)| point.len())?;
    Some(format!("{kind} on {device}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_after_any_program_name() {
        let stat = "12 (a) R 9 (b) S 1 2 3 4 5 6 7 8 9 10 250 31 0 0 20 0 4";
        assert_eq!(cpu_ticks(stat), Some(281));
        assert_eq!(cpu_ticks("12 (a) S 1 2"), None);
    }

    #[test]
    fn memory_is_the_resident_part() {
        let status = "Name:\tx\nVmHWM:\t 900 kB\nVmRSS:\t 512 kB\nRssAnon:\t 1 kB\n";
        assert_eq!(kib_of(status, "VmRSS:"), Some(512));
        assert_eq!(kib_of(status, "VmSwap:"), None);
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        let pid = std::process::id();
        assert!(resident_bytes(pid).unwrap() > 100_000);
        let before_s = cpu_s(pid).unwrap();
        let started = std::time::Instant::now();
        while cpu_s(pid).unwrap() < before_s + 0.05 {
            assert!(started.elapsed().as_secs() < 20, "no CPU time is counted");
        }
    }

    #[test]
    fn the_file_system_is_that_of_the_nearest_mount() {
        let mounts = "rootfs / rootfs rw 0 0\n/dev/a / ext4 rw 0 0\n/dev/b /data xfs rw 0 0\n";
        let of = |dir| mount_of(mounts, Path::new(dir));
        assert_eq!(of("/data/bench").as_deref(), Some("xfs on /dev/b"));
        assert_eq!(of("/database").as_deref(), Some("ext4 on /dev/a"));
    }

    #[test]
    fn the_model_is_that_of_the_first_processor() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Fast CPU @ 3: GHz\nmodel name\t: Other\n";
        assert_eq!(cpu_model(cpuinfo).as_deref(), Some("Fast CPU @ 3: GHz"));
        assert_eq!(cpu_model("processor : 0\n"), None);
    }
}
