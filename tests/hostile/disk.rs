//! Disks that fail. `ctests/disk_faults.c` saves or loads a checkpoint, or makes a step or other classes with its rows in a file, while
//! one call of the system goes wrong; here each of them does in turn, in every way. What a save leaves must be the checkpoint before or
//! the new one, never a mixture; a load gives what was saved or an error; a head has the classes it had or the new ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use partialfc_testing::capi::{options, Comm, Device, Head};
use partialfc_testing::programs::{compile, fresh, link_shared, output, root, scratch, C};

/// As the program has them.
const CLASSES: u64 = 1500;
const FEWER: u64 = 400;
const DIM: u32 = 512;
const KILLED: i32 = 77;

/// The program, which both tests run.
fn program() -> &'static Path {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
        let program = scratch("disk_faults").join("program");
        let mut build = compile("cc");
        build.args(C).arg(root().join("ctests/disk_faults.c")).arg("-o").arg(&program);
        link_shared(&mut build);
        // The library is to find the program's functions.
        output(build.args(["-rdynamic", "-ldl"]));
        program
    });
    &PROGRAM
}

/// What a run of the program came to.
struct Saved {
    killed: bool,
    calls: u64,
    status: String,
    text: String,
    /// The function that went wrong.
    function: String,
}

fn save(program: &Path, folder: &Path, fault: &str, number: u64) -> Saved {
    run(program, folder, "save", fault, number)
}

fn run(program: &Path, folder: &Path, when: &str, fault: &str, number: u64) -> Saved {
    let result = Command::new(program).arg(folder).arg(when).arg(fault).arg(number.to_string()).output().expect("the program runs");
    let (printed, errors) = (String::from_utf8_lossy(&result.stdout), String::from_utf8_lossy(&result.stderr));
    if result.status.code() == Some(KILLED) {
        return Saved { killed: true, calls: 0, status: String::new(), text: String::new(), function: String::new() };
    }
    assert!(result.status.success(), "{fault} {number}: {}\n{printed}{errors}", result.status);
    let fields: Vec<&str> = printed.trim_end_matches('\n').split('\t').collect();
    let [calls, status, text, function] = fields[..] else { panic!("{printed}") };
    Saved {
        killed: false,
        calls: calls.parse().expect("a number"),
        status: status.to_owned(),
        text: text.to_owned(),
        function: function.to_owned(),
    }
}

/// W of the checkpoint in a folder.
fn centers(folder: &Path) -> Vec<f32> {
    centers_of(folder, CLASSES)
}

fn centers_of(folder: &Path, classes: u64) -> Vec<f32> {
    let mut head = Head::new(&Device::cpu(1), &Comm::solo(), &options(classes, DIM, 0));
    head.load(folder).expect("a checkpoint that is whole");
    head.centers()
}

fn copy(from: &Path, to: &Path) {
    fresh(to);
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string().expect("a name");
    let mut names: Vec<String> = fs::read_dir(folder).expect("the folder").map(name).collect();
    names.sort();
    names
}

#[test]
fn whatever_fails_in_a_save_a_whole_checkpoint_is_left() {
    fail_in_a_save("save", &["killed", "half", "full", "broken", "interrupted", "indirect", "short"], 5);
}

/// The thread that writes goes the same ways.
#[test]
fn whatever_fails_in_a_save_beside_training_a_whole_checkpoint_is_left() {
    fail_in_a_save("beside", &["killed", "broken"], 2);
}

/// More than `least_new` of the faults come after the commit.
fn fail_in_a_save(when: &str, faults: &[&str], least_new: u32) {
    let (program, folders) = (program(), scratch(&format!("disk_{when}")));
    let (base, whole, folder) = (folders.join("base"), folders.join("whole"), folders.join("now"));
    fresh(&base);
    assert_eq!(save(program, &base, "none", 0).status, "PFC_OK");
    copy(&base, &whole);
    let sound = run(program, &whole, when, "none", 0);
    assert_eq!(sound.status, "PFC_OK");
    assert_eq!(names(&whole), ["manifest.json", "rows-2-0-of-1.safetensors"]);
    let (before, after) = (centers(&base), centers(&whole));
    assert!(before != after && sound.calls > 10, "{} calls", sound.calls);
    let (mut old, mut new) = (0, 0);
    for &fault in faults {
        for number in 1..=sound.calls {
            copy(&base, &folder);
            let Saved { killed, status, text, function, .. } = run(program, &folder, when, fault, number);
            let what = format!("{fault} {number} {function}: {status} {text}");
            let found = centers(&folder);
            assert!(found == before || found == after, "{what}: a mixture");
            let is_new = found == after;
            if is_new {
                new += 1;
            } else {
                old += 1;
            }
            match fault {
                "killed" | "half" => assert!(killed, "{what}"),
                "short" => assert!(status == "PFC_OK" && is_new, "{what}"),
                "indirect" if function == "pwrite64, direct" => assert!(status == "PFC_OK" && is_new, "{what}"),
                _ if status == "PFC_OK" => assert!(is_new, "{what}"),
                _ => {
                    assert!(status == "PFC_ERROR_IO" && text.contains(folder.to_str().expect("a path")), "{what}");
                    // Of a new checkpoint that is whole the system may not say that its names are on the disk.
                    assert!(!is_new || text.contains("cannot flush"), "{what}");
                }
            }
            if !killed {
                assert!(names(&folder).iter().all(|name| !name.ends_with(".tmp")), "{what}: {:?}", names(&folder));
            }
            // The next save finds its way, and tidies up.
            assert_eq!(save(program, &folder, "none", 0).status, "PFC_OK", "{what}, and again");
            assert_eq!(names(&folder).len(), 2, "{what}, and again: {:?}", names(&folder));
        }
    }
    assert!(old > 20 && new > least_new, "{old} times the checkpoint before, {new} times the new one");
}

#[test]
fn whatever_fails_in_a_load_it_is_what_was_saved_or_an_error() {
    let (program, folders) = (program(), scratch("disk_load"));
    let (base, whole, folder) = (folders.join("base"), folders.join("whole"), folders.join("now"));
    fresh(&base);
    assert_eq!(save(program, &base, "none", 0).status, "PFC_OK");
    copy(&base, &whole);
    let sound = run(program, &whole, "load", "none", 0);
    assert_eq!(sound.status, "PFC_OK");
    let (before, after) = (centers(&base), centers(&whole));
    assert!(before != after && sound.calls > 6, "{} calls", sound.calls);
    let (mut loaded, mut refused) = (0, 0);
    for fault in ["broken", "interrupted", "indirect", "short"] {
        for number in 1..=sound.calls {
            copy(&base, &folder);
            let Saved { status, text, .. } = run(program, &folder, "load", fault, number);
            let what = format!("{fault} {number}: {status} {text}");
            match status.as_str() {
                // A step, and a save.
                "PFC_OK" => {
                    assert!(fault != "broken" && centers(&folder) == after, "{what}");
                    loaded += 1;
                }
                _ => {
                    assert!(status == "PFC_ERROR_IO" && text.contains(folder.to_str().expect("a path")), "{what}");
                    assert!(fault != "short" && fault != "interrupted", "{what}");
                    refused += 1;
                }
            }
        }
    }
    assert!(loaded > 12 && refused > 5, "{loaded} loads, {refused} errors");
}

/// A call that fails is the error of its step, one that does less than it was asked for changes nothing.
#[test]
fn whatever_fails_in_a_step_on_a_file_it_is_told_and_no_row_is_lost() {
    let (program, folder) = (program(), scratch("disk_step").join("now"));
    fresh(&folder);
    let sound = run(program, &folder, "step", "none", 0);
    assert!(sound.status == "PFC_OK" && sound.calls > 20, "{} {}, {} calls", sound.status, sound.text, sound.calls);
    let after = centers(&folder);
    let (mut read, mut written) = (0, 0);
    for fault in ["broken", "full", "interrupted", "indirect", "short"] {
        for number in 1..=sound.calls {
            fresh(&folder);
            let Saved { status, text, function, .. } = run(program, &folder, "step", fault, number);
            let what = format!("{fault} {number} {function}: {status} {text}");
            let writes = function.starts_with("pwrite64");
            assert!(!function.is_empty(), "{what}: no such call");
            match fault {
                "interrupted" | "indirect" | "short" => assert_eq!(status, "PFC_OK", "{what}"),
                _ => {
                    let told = if writes { "cannot write" } else { "cannot read" };
                    assert!(status == "PFC_ERROR_IO" && text.contains(told) && text.contains("now/rows/rows-0-of-1"), "{what}");
                    *(if writes { &mut written } else { &mut read }) += 1;
                }
            }
            if !(writes && status != "PFC_OK") {
                assert!(centers(&folder) == after, "{what}: other rows");
            }
        }
    }
    assert!(read > 10 && written > 10, "{read} reads, {written} writes");
}

/// Either the head has all of its new classes, or all of those it had, and goes on.
#[test]
fn whatever_fails_while_classes_change_they_are_the_new_ones_or_those_before() {
    let (program, folder) = (program(), scratch("disk_classes").join("now"));
    let [new, old] = ["classes", "step"].map(|when| {
        fresh(&folder);
        let sound = run(program, &folder, when, "none", 0);
        assert_eq!(sound.status, "PFC_OK", "{}", sound.text);
        (centers_of(&folder, if when == "step" { CLASSES } else { FEWER }), sound.calls)
    });
    let (new, calls) = new;
    assert!(calls > 15, "{calls} calls");
    let (mut changed, mut refused) = (0, 0);
    for fault in ["broken", "short"] {
        for number in 1..=calls {
            fresh(&folder);
            let Saved { status, text, function, .. } = run(program, &folder, "classes", fault, number);
            let what = format!("{fault} {number} {function}: {status} {text}");
            assert!(!function.is_empty(), "{what}: no such call");
            if status == "PFC_OK" {
                // A head can do without knowing how large sectors are, and without another name for its file.
                assert!(centers_of(&folder, FEWER) == new, "{what}: other rows");
                changed += 1;
            } else {
                assert!(status == "PFC_ERROR_IO" && text.contains("now/rows/rows-0-of-1.partialfc"), "{what}");
                assert!(centers(&folder) == old.0, "{what}: other rows");
                refused += 1;
            }
        }
    }
    assert!(changed > 30 && refused > 20, "{changed} times the new ones, {refused} times those before");
    // What a process that is killed has left is in nobody's way, and does not stay.
    for when in ["classes", "step"] {
        fresh(&folder);
        // Its last call gives the new file the name of the old one.
        assert!(run(program, &folder, "classes", "killed", calls).killed);
        assert_eq!(names(&folder.join("rows")), ["rows-0-of-1.partialfc", "rows-0-of-1.partialfc.next"]);
        assert_eq!(run(program, &folder, when, "none", 0).status, "PFC_OK");
        assert!(!folder.join("rows").exists());
    }
}
