//! What compiled programs know of the library, its ABI: held to Rust's own layouts, to tables of what there was, and to the headers
//! that programs were compiled with.
//!
//! `ctests/abi/symbols.txt` and `ctests/abi/layout.txt` have what there is. `PFC_BLESS=1 cargo test --release --test capi abi` adds
//! to them. It refuses to take from them or to change them, unless the SONAME on their first line is no longer the library's.
//! `ctests/abi/<version>` has the header of an earlier version, a baseline: docs/releasing.md says when there is a new one.

mod layouts;
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use partialfc_testing::programs::{fresh, libraries, link_shared, output, root, run, scratch, tool, C};

use self::table::{broken, of_kind, table};
use crate::header::header;
use crate::programs::exported;

/// Names that sources have today for fields of earlier headers. Programs that are compiled know only where a field is.
const RENAMED: [(&str, &str); 1] = [("pfc_metrics.samples", "pfc_metrics.draws")];

/// In C by bindgen and in Python by ctypes, against Rust.
#[test]
fn structs_and_constants_are_in_c_and_python_as_in_rust() {
    let (structs, constants) = (layouts::structs(), layouts::constants());
    if let Some(table) = table(&header()) {
        // Without the fields' types.
        let in_c: BTreeSet<String> = of_kind(&table, &["struct", "field"]).map(|line| words(line, 4)).collect();
        assert_same(&in_c, &structs);
        let in_c: BTreeSet<String> = of_kind(&table, &["const"]).cloned().collect();
        assert_same(&in_c, &constants);
    }
    if tool("python3") {
        let names = scratch("layouts").join("names.txt");
        fs::write(&names, structs.iter().chain(&constants).map(|line| words(line, 2) + "\n").collect::<String>())
            .expect("names.txt");
        let mut command = Command::new("python3");
        command.args(["ctests/layouts.py", "python/partialfc/_abi.py"].map(|file| root().join(file))).arg(names);
        let in_python: Vec<String> = output(&mut command).lines().map(str::to_owned).collect();
        let in_rust: Vec<String> = structs.into_iter().chain(constants).collect();
        assert_eq!(in_python, in_rust, "Python (left) and Rust (right) differ");
    }
}

#[test]
fn symbols_and_layouts_are_only_added_to() {
    let symbols: Vec<String> = exported().into_iter().map(|name| format!("symbol {name}")).collect();
    only_added("symbols.txt", &symbols);
    if let Some(layout) = table(&header()) {
        only_added("layout.txt", &layout);
    }
}

fn assert_same(in_c: &BTreeSet<String>, in_rust: &[String]) {
    let in_rust: BTreeSet<String> = in_rust.iter().cloned().collect();
    let (c, rust): (Vec<_>, Vec<_>) = (in_c.difference(&in_rust).collect(), in_rust.difference(in_c).collect());
    assert!(c.is_empty() && rust.is_empty(), "C has {c:#?}\nRust has {rust:#?}");
}

/// Programs that were compiled with a baseline's header find all that it has.
#[test]
fn nothing_of_a_baseline_is_gone_or_changed() {
    let baselines = baselines();
    assert!(!baselines.is_empty(), "ctests/abi has no baseline");
    let Some(now) = table(&header()) else { return };
    let symbols = exported();
    for folder in baselines {
        let then = baseline(&folder).expect("libclang has been found");
        let found = broken(&then, &now);
        assert!(found.is_empty(), "of {}:\n{}", folder.display(), found.join("\n"));
        for name in functions(&then) {
            assert!(symbols.contains(&name), "the library does not export {name} of {}", folder.display());
        }
    }
}

/// A second opinion on the last baseline, by another reader of types. It knows no constants. It is not asked of structs that have
/// grown, which it cannot tell from changed ones: `broken` alone holds these.
#[test]
fn abidiff_finds_no_change_since_the_last_baseline() {
    let last = baselines().pop().expect("a baseline");
    let (Some(then), Some(now)) = (baseline(&last), table(&header())) else { return };
    if !tool("abidiff") {
        return;
    }
    let grown: Vec<&str> =
        of_kind(&then, &["struct"]).filter(|line| !now.contains(line)).filter_map(|line| line.split(' ').nth(1)).collect();
    let directory = scratch("abidiff");
    fresh(&directory);
    let suppressed = directory.join("grown.abignore");
    let rule = if grown.is_empty() { String::new() } else { format!("[suppress_type]\n  name_regexp = ^({})$\n", grown.join("|")) };
    fs::write(&suppressed, rule).expect("grown.abignore");
    let old = types(&directory, "then", &fs::read_to_string(last.join("partialfc.h")).expect("a header"), &functions(&then));
    let report = |name: &str, header: &str, functions: &[String]| {
        let new = types(&directory, name, header, functions);
        let result =
            Command::new("abidiff").args(["--no-added-syms", "--suppressions"]).arg(&suppressed).args([&old, &new]).output();
        let result = result.expect("abidiff runs");
        (result.status.code(), String::from_utf8_lossy(&result.stdout).into_owned())
    };
    let (status, text) = report("now", &header(), &functions(&now));
    assert_eq!(status, Some(0), "since {}: {text}", last.display());

    // What it is to find.
    let planted = [
        ("moved", "  void *data;\n", "  uint64_t later;\n  void *data;\n", "pfc_matrix"),
        ("another_type", "pfc_device_cpu(uint32_t", "pfc_device_cpu(uint64_t", "pfc_device_cpu"),
        ("another_callback", "(*pfc_log_fn)(void *user, int32_t", "(*pfc_log_fn)(void *user, int64_t", "pfc_set_log"),
    ];
    for (name, is, becomes, named) in planted {
        let (status, text) = report(name, &replaced(&header(), is, becomes), &functions(&now));
        assert!(status.is_some_and(|status| status & 4 != 0) && text.contains(named), "{name}: {status:?} {text}");
    }
    let without: Vec<String> = functions(&now).into_iter().filter(|name| name != "pfc_comm_self").collect();
    let (status, text) = report("removed", &header(), &without);
    assert!(status.is_some_and(|status| status & 8 != 0) && text.contains("pfc_comm_self"), "removed: {status:?} {text}");
}

/// What `broken` is to find, and what it is to let pass.
#[test]
fn planted_changes_are_found() {
    let now = header();
    let Some(table_now) = table(&now) else { return };
    let cases: [(&str, &str, &[&str]); 9] = [
        // A field moved, by another before it; a field of another type in the same place; one in place of another.
        (
            "  int32_t placement;\n",
            "  int32_t later;\n  int32_t placement;\n",
            &["field pfc_head_options.placement was 20", "byte 20"],
        ),
        (
            "  uint64_t num_classes;\n",
            "  int64_t num_classes;\n",
            &["field pfc_head_options.num_classes was 8 8 u64 and is 8 8 i64"],
        ),
        (
            "  uint64_t draws;\n",
            "  uint64_t samples;\n",
            &["field pfc_metrics.draws is gone", "field pfc_metrics.samples is new at byte 16"],
        ),
        // A function removed, and one with another argument.
        ("pfc_status pfc_comm_self(pfc_comm **out);\n", "", &["fn pfc_comm_self is gone"]),
        ("pfc_device_cpu(uint32_t threads", "pfc_device_cpu(uint64_t threads", &["fn pfc_device_cpu was (u32"]),
        // A constant renumbered.
        ("#define PFC_ROW_TERMS_ON 2", "#define PFC_ROW_TERMS_ON 3", &["const PFC_ROW_TERMS_ON was 2 and is 3"]),
        // A struct without struct_size that has grown; one with it may.
        ("} pfc_matrix;\n", "  uint64_t later;\n} pfc_matrix;\n", &["struct pfc_matrix was 40 and is 48"]),
        ("} pfc_margin;\n", "  uint64_t later;\n} pfc_margin;\n", &[]),
        ("pfc_status pfc_comm_self(", "void pfc_later(void);\npfc_status pfc_comm_self(", &[]),
    ];
    for (is, becomes, expected) in cases {
        let found = broken(&table_now, &table(&replaced(&now, is, becomes)).expect("a header")).join("\n");
        expected.iter().for_each(|text| assert!(found.contains(text), "{is} -> {becomes}: {found}"));
        assert_eq!(found.is_empty(), expected.is_empty(), "{is} -> {becomes}: {found}");
    }
}

/// Compiled with a baseline's header, whose structs are shorter, and run with today's library.
#[test]
fn programs_of_the_baselines_run() {
    for folder in baselines() {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        let version: Vec<u32> = name.split('.').map(|part| part.parse().expect("a folder's name is a version")).collect();
        program(&name, &folder, &[], version[0] << 16 | version[1] << 8);
    }
}

/// Compiled with a header of which every struct that may grow has one field more than today.
#[test]
fn a_program_of_a_later_version_runs() {
    let mut text = header();
    for line in layouts::structs().iter().filter(|line| line.ends_with(".struct_size 0 8")) {
        let (name, _) = line["field ".len()..].split_once('.').expect("a field");
        text = replaced(&text, &format!("}} {name};"), &format!("  uint64_t later;\n}} {name};"));
    }
    let folder = scratch("later_header");
    fs::write(folder.join("partialfc.h"), text).expect("a header");
    let part = |text: &str| text.parse::<u32>().expect("a number");
    let [major, minor, patch] =
        [env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"), env!("CARGO_PKG_VERSION_PATCH")].map(part);
    program("later", &folder, &["-DLATER"], major << 16 | minor << 8 | patch);
}

/// Compiles ctests/abi/program.c with the header of a folder, and runs it.
fn program(name: &str, folder: &Path, more: &[&str], version: u32) {
    let directory = scratch("program").join(name);
    fresh(&directory);
    let program = directory.join("program");
    let mut command = Command::new("cc");
    command.args(C).args(more).arg("-I").arg(folder).arg(root().join("ctests/abi/program.c"));
    link_shared(&mut command);
    output(command.arg("-lm").arg("-o").arg(&program));
    run(&program, &[Path::new(&version.to_string()), &directory.join("checkpoint")]);
}

/// The folders of `ctests/abi`, the oldest first.
fn baselines() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = fs::read_dir(root().join("ctests/abi"))
        .expect("ctests/abi")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .collect();
    let version = |path: &PathBuf| -> Vec<u32> {
        path.file_name().expect("a name").to_string_lossy().split('.').filter_map(|part| part.parse().ok()).collect()
    };
    folders.sort_by_key(version);
    folders
}

/// The table of a baseline's header, with the names that fields have today.
fn baseline(folder: &Path) -> Option<Vec<String>> {
    let text = fs::read_to_string(folder.join("partialfc.h")).expect("a baseline's header");
    let named_today =
        |line: String| RENAMED.iter().fold(line, |line, (was, is)| line.replace(&format!("{was} "), &format!("{is} ")));
    Some(table(&text)?.into_iter().map(named_today).collect())
}

/// Compares with a file of ctests/abi that only grows; `PFC_BLESS` adds what is new.
fn only_added(file: &str, now: &[String]) {
    let path = root().join("ctests/abi").join(file);
    let fresh = format!("soname {}\n{}\n", soname(), now.join("\n"));
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let (name, lines) = committed.split_once('\n').unwrap_or_default();
    if fresh.starts_with(&format!("{name}\n")) {
        let then: Vec<String> = lines.lines().map(str::to_owned).collect();
        let found = broken(&then, now);
        assert!(
            found.is_empty(),
            "within a SONAME nothing goes and nothing changes, but of ctests/abi/{file}\n{}\nA bless refuses this, too",
            found.join("\n")
        );
    }
    if std::env::var_os("PFC_BLESS").is_some() {
        fs::write(&path, &fresh).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    } else {
        assert_eq!(
            committed, fresh,
            "ctests/abi/{file} (left) lacks what is new: PFC_BLESS=1 cargo test --release --test capi abi adds it"
        );
    }
}

/// The name that programs record of the library.
fn soname() -> String {
    let dynamic = output(Command::new("readelf").arg("-d").arg(&libraries().shared));
    let name = dynamic.split("soname: [").nth(1).and_then(|rest| rest.split(']').next());
    name.expect("the library has a SONAME").to_owned()
}

/// An object of ctests/abi/types.c for abidiff.
fn types(directory: &Path, name: &str, header: &str, functions: &[String]) -> PathBuf {
    let folder = directory.join(name);
    fresh(&folder);
    fs::write(folder.join("partialfc.h"), header).expect("a header");
    let list: String = functions.iter().map(|name| format!("FUNCTION({name})\n")).collect();
    fs::write(folder.join("functions.inc"), list).expect("functions.inc");
    let object = folder.join("types.so");
    let mut command = Command::new("cc");
    command.args(["-g", "-shared", "-fPIC"]).arg("-I").arg(&folder).arg(root().join("ctests/abi/types.c"));
    output(command.arg("-o").arg(&object));
    object
}

fn functions(table: &[String]) -> Vec<String> {
    of_kind(table, &["fn"]).filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect()
}

/// The text with the first `is` replaced.
fn replaced(text: &str, is: &str, becomes: &str) -> String {
    assert!(text.contains(is), "the header has no {is}");
    text.replacen(is, becomes, 1)
}

/// The first words of a line.
fn words(line: &str, count: usize) -> String {
    line.split(' ').take(count).collect::<Vec<_>>().join(" ")
}
