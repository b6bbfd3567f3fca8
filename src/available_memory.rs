//! How much memory the machine and the process's control groups have left.

use std::path::Path;

use crate::{ensure, Result};

/// Bytes that can be had without swapping, on the machine and in the process's control groups; unbounded where the system does not
/// tell.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvailableMemory {
    pub machine: u64,
    pub control_group: u64,
}

impl AvailableMemory {
    pub fn now() -> AvailableMemory {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kilobytes = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        AvailableMemory {
            machine: kilobytes.map_or(u64::MAX, |kilobytes| kilobytes << 10),
            control_group: left_in_groups(Path::new("/sys/fs/cgroup"), &groups),
        }
    }

    pub fn least(self) -> u64 {
        self.machine.min(self.control_group)
    }

    /// Refuses what would end in swapping or in the process being killed.
    pub fn require(self, bytes: u64, what: &str) -> Result<()> {
        let shown = |bytes: u64| if bytes == u64::MAX { "no limit".to_owned() } else { format!("{bytes} bytes left") };
        ensure!(
            bytes <= self.least(),
            OutOfMemory,
            "cannot allocate {bytes} bytes for {what}: the machine has {}, the process's control group has {}",
            shown(self.machine),
            shown(self.control_group)
        );
        Ok(())
    }
}

/// What the control groups of a /proc/self/cgroup let the process have: the least of its own and those around it.
fn left_in_groups(root: &Path, groups: &str) -> u64 {
    // Version 2 has one line "0::/path"; version 1 one for each controller, "4:memory:/path", in a folder of its own.
    let group = |line: &str| {
        let (controllers, path) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':'))?;
        let path = path.trim_start_matches('/').to_owned();
        match controllers {
            "" => Some((root.to_owned(), path, "memory.max", "memory.current")),
            "memory" => Some((root.join("memory"), path, "memory.limit_in_bytes", "memory.usage_in_bytes")),
            _ => None,
        }
    };
    let left = |folder: &Path, limit: &str, usage: &str| {
        let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number, and no limit.
        let limit = number(limit)?;
        let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        // Of files that are not in use: given back when memory is short.
        let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
        Some(limit.saturating_sub(number(usage)?.saturating_sub(files.unwrap_or(0))))
    };
    let mut least = u64::MAX;
    for (mount, path, limit, usage) in groups.lines().filter_map(group) {
        // A container may see its own group as the root, whatever the path says.
        for folder in mount.join(&path).ancestors().take_while(|folder| folder.starts_with(&mount)) {
            least = least.min(left(folder, limit, usage).unwrap_or(u64::MAX));
        }
    }
    least
}

#[cfg(test)]
mod tests;
