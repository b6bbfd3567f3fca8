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
mod tests {
    use super::*;
    use crate::error;

    /// A tree of control groups, and what the process may still have in it.
    fn left(groups: &str, files: &[(&str, &str)]) -> u64 {
        let root = std::env::temp_dir().join(format!("partialfc-groups-{}-{}", std::process::id(), groups.len()));
        for (name, text) in files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let left = left_in_groups(&root, groups);
        if root.exists() {
            std::fs::remove_dir_all(&root).unwrap();
        }
        left
    }

    #[test]
    fn the_tightest_group_decides() {
        let files = [
            ("jobs/memory.max", "1000\n"),
            ("jobs/memory.current", "400\n"),
            ("jobs/train/memory.max", "max\n"),
            ("jobs/train/memory.current", "300\n"),
        ];
        assert_eq!(left("0::/jobs/train\n", &files), 600);
        let cached = [&files[..], &[("jobs/memory.stat", "anon 300\ninactive_file 100\n")]].concat();
        assert_eq!(left("0::/jobs/train/\n", &cached), 700);
        assert_eq!(left("0::/\n", &files), u64::MAX);
    }

    #[test]
    fn version_1_has_a_folder_for_memory() {
        let files = [("memory/a/memory.limit_in_bytes", "500\n"), ("memory/a/memory.usage_in_bytes", "600\n")];
        assert_eq!(left("5:cpu,cpuacct:/a\n4:memory:/a\n", &files), 0);
        assert_eq!(left("5:cpu,cpuacct:/a\n", &files), u64::MAX);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_figures() {
        let memory = AvailableMemory { machine: 1000, control_group: 700 };
        assert_eq!(memory.require(700, "a head"), Ok(()));
        let refused = memory.require(701, "a head").unwrap_err();
        let text = "cannot allocate 701 bytes for a head: the machine has 1000 bytes left, \
                    the process's control group has 700 bytes left";
        assert_eq!(refused, error!(OutOfMemory, "{text}"));
        let free = AvailableMemory { machine: 10, control_group: u64::MAX }.require(11, "a head").unwrap_err();
        assert!(free.message.ends_with("the process's control group has no limit"), "{free:?}");
    }
}
