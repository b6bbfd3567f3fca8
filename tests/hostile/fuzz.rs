//! Random calls of all functions, right and wrong ones: `ctests/fuzz` judges each. The same episodes in each run; `ctests/fuzz/run` tries
//! others, with sanitizers, for as long as one likes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use partialfc_testing::programs::{compile, link_shared, output, root, scratch, C};

const SOURCES: [&str; 7] = ["base.c", "transport.c", "options.c", "steps.c", "heads.c", "kernels.c", "main.c"];

fn build(name: &str, options: &[&str], more: &[&str]) -> PathBuf {
    let program = scratch("fuzz").join(name);
    let mut command = compile("cc");
    command.args(C).args(SOURCES.iter().chain(more).map(|source| root().join("ctests/fuzz").join(source)));
    link_shared(&mut command);
    output(command.args(options).args(["-lm", "-lpthread", "-o"]).arg(&program));
    program
}

fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| build("fuzz", &[], &[]))
}

fn episodes(mode: &str, first: u64, count: u64) -> String {
    output(Command::new(program()).args([mode, "--calls", "--seed", &first.to_string(), "--episodes", &count.to_string()]))
}

#[test]
fn random_calls_of_one_rank() {
    println!("{}", episodes("single", 1, 3000));
}

#[test]
fn random_calls_of_ranks() {
    println!("{}", episodes("ranks", 1, 900));
}

#[test]
fn random_calls_over_functions_of_the_caller() {
    println!("{}", episodes("custom", 1, 900));
}

#[test]
fn random_calls_over_functions_that_lie() {
    println!("{}", episodes("lies", 1, 900));
}

#[test]
fn random_calls_of_kernels() {
    println!("{}", episodes("kernels", 1, 3000));
}

#[test]
fn episodes_that_found_something() {
    let list = fs::read_to_string(root().join("ctests/fuzz/seeds.txt")).expect("ctests/fuzz/seeds.txt");
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.splitn(3, ' ').collect();
        let [mode, seed, _] = fields[..] else { panic!("not `mode seed what`: {line}") };
        episodes(mode, seed.parse().expect("a seed"), 1);
    }
}

#[test]
fn every_declared_function_is_called() {
    let header = fs::read_to_string(root().join("include/partialfc.h")).expect("the header");
    let starts = header.match_indices("pfc_").map(|(at, _)| &header[at..]);
    let names = starts.filter_map(|text| {
        let name = &text[..text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?];
        text[name.len()..].starts_with('(').then(|| name.trim_end_matches("_sized").to_owned())
    });
    let printed: String = [("single", 300), ("ranks", 60), ("custom", 20), ("kernels", 60)]
        .map(|(mode, count)| episodes(mode, 100_000, count))
        .concat();
    let called: BTreeSet<String> = printed
        .lines()
        .filter_map(|line| line.strip_prefix("called ")?.split(' ').next().map(str::to_owned))
        .chain(["pfc_last_error".to_owned()])
        .collect();
    let missing: BTreeSet<String> = names.filter(|name| !called.contains(name)).collect();
    assert!(missing.is_empty(), "never called: {missing:?}");
}

#[test]
fn a_planted_fault_is_found() {
    let program = build("planted", &["-Wl,--wrap=pfc_head_sample_ids"], &["planted.c"]);
    let result = Command::new(program).args(["single", "--episodes", "50"]).output().expect("the program runs");
    let printed = String::from_utf8_lossy(&result.stderr);
    assert!(!result.status.success() && printed.contains("byte 0 after a buffer was written"), "{}: {printed}", result.status);
}
