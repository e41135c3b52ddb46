//! Metrics of the process, under the names that the Prometheus clients of all languages use.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::process::{Resource, getrlimit};

/// Reads `/proc` at each scrape. Exports nothing on systems without it.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(usage) = Usage::read() else {
            return Ok(());
        };
        encode(
            &mut encoder,
            "process_cpu_seconds",
            "Total user and system CPU time spent in seconds",
            &ConstCounter::new(usage.cpu_s),
        )?;
        let max_fds = getrlimit(Resource::Nofile).current;
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
                usage.resident_bytes,
            ),
            (
                "process_virtual_memory_bytes",
                "Virtual memory size in bytes",
                usage.virtual_bytes,
            ),
            (
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds",
                usage.started_at_s,
            ),
            (
                "process_open_fds",
                "Number of open file descriptors",
                usage.open_files,
            ),
            (
                "process_max_fds",
                "Maximum number of open file descriptors",
                max_fds.map_or(-1.0, |max| max as f64),
            ),
            (
                "process_threads",
                "Number of OS threads in the process",
                usage.threads,
            ),
        ] {
            encode(&mut encoder, name, help, &ConstGauge::new(value))?;
        }
        Ok(())
    }
}

fn encode(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    metric: &impl EncodeMetric,
) -> Result<(), fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

struct Usage {
    cpu_s: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    started_at_s: f64,
    open_files: f64,
    threads: f64,
}

impl Usage {
    /// Reads the usage from `/proc/self/stat` (proc(5)), or returns `None` without it.
    fn read() -> Option<Usage> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name before the last bracket may contain spaces; the fields after it are numbered from 3.
        let (_, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let ticks_per_s = rustix::param::clock_ticks_per_second() as f64;
        let booted = fs::read_to_string("/proc/stat").ok()?;
        let booted = booted
            .lines()
            .find_map(|line| line.strip_prefix("btime "))?;
        Some(Usage {
            cpu_s: (field(14)? + field(15)?) / ticks_per_s,
            threads: field(20)?,
            started_at_s: booted.parse::<f64>().ok()? + field(22)? / ticks_per_s,
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * rustix::param::page_size() as f64,
            open_files: fs::read_dir("/proc/self/fd").ok()?.count() as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Usage;

    #[test]
    fn the_usage_of_this_process_is_plausible() {
        let usage = Usage::read().expect("Linux");
        assert!(usage.resident_bytes > 1e6 && usage.resident_bytes < usage.virtual_bytes);
        assert!(usage.open_files >= 3.0 && usage.threads >= 1.0);
        // Started within the last day, by a clock that is right.
        let now_s = crate::time::utc_now().as_second() as f64;
        assert!(
            (now_s - usage.started_at_s).abs() < 86_400.0,
            "{}",
            usage.started_at_s
        );
    }
}
