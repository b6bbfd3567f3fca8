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
