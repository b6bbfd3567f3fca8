//! Memory that is short. `ctests/out_of_memory.c` lets each allocation of a scenario fail in turn; here its addresses become functions, and
//! what became of each is judged: a status that fits and outputs that are as they were, or an abort at a place of
//! `ctests/out_of_memory.txt`. That list may only get shorter: a place that no longer aborts must go from it, which `PFC_BLESS=1` does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use partialfc_testing::programs::{compile, libraries, link_shared, output, root, scratch, tool, C};

const ALLOWED: &str = "ctests/out_of_memory.txt";
/// Where no function of the library stands.
const STARTING_THREAD: &str = "(a thread that starts, or the C library)";
const SCENARIOS: [&str; 5] = ["sharded", "dense", "replicated", "two_ranks", "kernels"];

/// An allocation that was refused, and what became of it.
struct Refused {
    scenario: &'static str,
    outcome: String,
    call: String,
    text: String,
    place: Place,
}

/// The innermost function of `src/` that asked for memory. The line is for a reader: it changes with each edit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    function: String,
    line: String,
}

impl Place {
    /// Aborts where a handle is made are told apart from those that lose a training under way.
    fn when(&self, call: &str) -> &'static str {
        match call {
            // A thread of the library starts when the machine lets it, whatever call there is by then.
            _ if self.function == STARTING_THREAD => "any",
            "pfc_device_cpu" | "pfc_device_cuda" | "pfc_comm_self" | "pfc_comm_threads" | "pfc_comm_custom" | "pfc_head_create" => {
                "create"
            }
            "pfc_head_prepare"
            | "pfc_head_forward"
            | "pfc_head_forward_with"
            | "pfc_head_backward"
            | "pfc_head_backward_with"
            | "pfc_head_update"
            | "pfc_head_accumulate"
            | "pfc_head_step" => "step",
            _ => "other",
        }
    }
}

fn run(program: &Path, scenario: &'static str) -> Vec<Refused> {
    let printed = output(Command::new(program).arg(scenario));
    let lines: Vec<Vec<&str>> = printed.lines().map(|line| line.split('\t').collect()).collect();
    let addresses: BTreeSet<&str> =
        lines.iter().filter_map(|fields| fields.get(3)).flat_map(|field| field.split_whitespace()).collect();
    let frames = frames(&addresses);
    let refused = lines.iter().map(|fields| {
        let [outcome, call, text] = [0, 1, 2].map(|at| fields.get(at).copied().unwrap_or("").to_owned());
        let place = place(fields.get(3).copied().unwrap_or(""), &frames);
        Refused { scenario, outcome, call, text, place }
    });
    refused.collect()
}

/// For each address the functions that stand there, the innermost first, each with its file and line.
fn frames(addresses: &BTreeSet<&str>) -> BTreeMap<u64, Vec<Place>> {
    let mut command = Command::new("addr2line");
    command.args(["-a", "-f", "-i", "-C", "-e"]).arg(&libraries().shared);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("addr2line");
    let mut questions = child.stdin.take().expect("a pipe");
    let asked: String = addresses.iter().map(|address| format!("{address}\n")).collect();
    let asking = std::thread::spawn(move || questions.write_all(asked.as_bytes()).expect("addr2line reads"));
    let answer = child.wait_with_output().expect("addr2line");
    asking.join().expect("addr2line reads");
    let answer = String::from_utf8_lossy(&answer.stdout).into_owned();

    let mut frames: BTreeMap<u64, Vec<Place>> = BTreeMap::new();
    let mut of = 0;
    let mut lines = answer.lines();
    while let Some(line) = lines.next() {
        if let Some(address) = line.strip_prefix("0x") {
            of = u64::from_str_radix(address, 16).expect("an address");
        } else {
            let at = lines.next().unwrap_or("").split(" (discriminator").next().unwrap_or("").to_owned();
            frames.entry(of).or_default().push(Place { function: line.to_owned(), line: at });
        }
    }
    frames
}

fn place(addresses: &str, frames: &BTreeMap<u64, Vec<Place>>) -> Place {
    let numbers = addresses.split_whitespace().filter_map(|address| u64::from_str_radix(address, 16).ok());
    let all = numbers.filter_map(|number| frames.get(&number)).flatten();
    let of_the_library = |place: &&Place| place.function.trim_start_matches('<').starts_with("partialfc::");
    match all.clone().find(of_the_library) {
        Some(Place { function, line }) => {
            let function = function.split("::{{closure}}").next().unwrap_or("").split("::{closure").next().unwrap_or("").to_owned();
            Place { function, line: line.rsplit_once("/src/").map_or(line.as_str(), |(_, line)| line).to_owned() }
        }
        None => Place { function: STARTING_THREAD.to_owned(), line: String::new() },
    }
}

/// (when, function) and the reason, in the file's order; and what stands above the list.
fn allowed() -> (String, Vec<(String, String, String)>) {
    let text = fs::read_to_string(root().join(ALLOWED)).unwrap_or_default();
    let (comment, lines): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.starts_with('#'));
    let list = lines.iter().filter(|line| !line.is_empty()).map(|line| {
        let fields: Vec<&str> = line.splitn(3, " | ").collect();
        let [when, function, reason] = fields[..] else { panic!("{ALLOWED}: not `when | function | why`: {line}") };
        (when.to_owned(), function.to_owned(), reason.to_owned())
    });
    (comment.iter().map(|line| format!("{line}\n")).collect(), list.collect())
}

/// How often a place aborts, its lines, and the calls under which it does.
type Aborts<'a> = (usize, BTreeSet<&'a str>, BTreeSet<&'a str>);

#[test]
fn every_allocation_may_fail() {
    if !tool("addr2line") {
        return;
    }
    let program = scratch("out_of_memory").join("out_of_memory");
    let mut command = compile("cc");
    command.args(C).arg(root().join("ctests/out_of_memory.c"));
    link_shared(&mut command);
    output(command.args(["-ldl", "-lpthread", "-o"]).arg(&program));
    let refused: Vec<Refused> = SCENARIOS.iter().flat_map(|scenario| run(&program, scenario)).collect();

    let mut aborts: BTreeMap<(&str, &str), Aborts<'_>> = BTreeMap::new();
    let mut wrong = String::new();
    let mut table = String::new();
    for scenario in SCENARIOS {
        let of = |outcome: &str| refused.iter().filter(|r| r.scenario == scenario && r.outcome == outcome).count();
        let all = refused.iter().filter(|r| r.scenario == scenario).count();
        let (fine, aborted) = (of("fine"), of("abort"));
        writeln!(table, "{scenario}: {all} allocations, {fine} fine, {aborted} aborts, {} other", all - fine - aborted)
            .expect("a text");
    }
    for one in &refused {
        match one.outcome.as_str() {
            "fine" => {}
            "abort" => {
                let entry = aborts.entry((one.place.when(&one.call), &one.place.function)).or_default();
                entry.0 += 1;
                entry.1.insert(&one.place.line);
                entry.2.insert(&one.call);
            }
            outcome => {
                writeln!(wrong, "{}: {outcome}: {} in {} ({})", one.scenario, one.text, one.place.function, one.place.line)
                    .expect("a text");
            }
        }
    }
    for ((when, function), (count, lines, calls)) in &aborts {
        let (lines, calls) = (lines.iter().copied().collect::<Vec<_>>(), calls.iter().copied().collect::<Vec<_>>());
        writeln!(table, "{when:6} {count:4}  {function}  [{}]  under {}", lines.join(", "), calls.join(", ")).expect("a text");
    }
    fs::write(scratch("out_of_memory").join("table.txt"), &table).expect("the table can be written");
    println!("{table}");
    assert!(wrong.is_empty(), "what memory that is short must not lead to:\n{wrong}\n{table}");

    let (comment, list) = allowed();
    let is_listed = |key: &(&str, &str)| list.iter().any(|(when, function, _)| (when.as_str(), function.as_str()) == *key);
    let more: Vec<_> = aborts.keys().filter(|key| !is_listed(key)).collect();
    assert!(more.is_empty(), "aborts that {ALLOWED} does not list: {more:#?}\n{table}");
    // Whether one of a thread that starts is found depends on how busy the machine is.
    let (kept, stale): (Vec<_>, Vec<_>) =
        list.iter().partition(|(when, function, _)| when == "any" || aborts.contains_key(&(when.as_str(), function.as_str())));
    if std::env::var_os("PFC_BLESS").is_some() {
        let lines: String = kept.iter().map(|(when, function, why)| format!("{when} | {function} | {why}\n")).collect();
        fs::write(root().join(ALLOWED), comment + &lines).expect("the list can be written");
    } else {
        assert!(stale.is_empty(), "{ALLOWED} lists what no longer aborts; PFC_BLESS=1 takes it from the list: {stale:#?}");
    }
}
