//! No module of `src/` uses one that uses it, straight or through others.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Who uses whom, each with a file that does.
type Graph = BTreeMap<String, BTreeMap<String, String>>;

/// A node is a module at the top of `src/`; these are nodes of their own, apart from what is above them.
const INNER: [&str; 3] = ["comm::transport", "device::cpu", "device::cuda"];

fn node(path: &[String]) -> String {
    let inner = path.iter().take(2).cloned().collect::<Vec<_>>().join("::");
    if INNER.contains(&inner.as_str()) {
        inner
    } else {
        path[0].clone()
    }
}

/// The module that a file is: `device/cpu/mod.rs` is device::cpu.
fn module(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').map(str::to_owned).collect()
}

/// Adds the paths of a `use` tree that begins at `text` to `found`.
fn tree(text: &str, prefix: &[String], found: &mut Vec<Vec<String>>) {
    let text = text.trim_start();
    if let Some(group) = text.strip_prefix('{') {
        let (mut depth, mut start) = (0, 0);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    tree(&group[start..at], prefix, found);
                    start = at + 1;
                    if c == '}' {
                        return;
                    }
                }
                _ => (),
            }
        }
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let path = [prefix, &[text[..end].to_owned()]].concat();
    match text[end..].strip_prefix("::") {
        Some(rest) => tree(rest, &path, found),
        None => found.push(path),
    }
}

/// The paths that a file names from the crate's root or from the module above it; comments and tests do not count.
fn paths(file: &str, text: &str) -> Vec<Vec<String>> {
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
    let code = code.join("\n");
    let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or("");
    let mut found = Vec::new();
    for (start, above) in [("crate::", None), ("super::", Some(1)), ("super::super::", Some(2))] {
        let own = module(file);
        let prefix = above.map_or(&[][..], |above| &own[..own.len().saturating_sub(above)]);
        for (at, _) in code.match_indices(start) {
            let inside = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '$');
            if !inside && !code[at + start.len()..].starts_with("super::") {
                tree(&code[at + start.len()..], prefix, &mut found);
            }
        }
    }
    found
}

fn graph(files: &[(String, String)]) -> Graph {
    let known: BTreeSet<String> = files.iter().map(|(file, _)| module(file)[0].clone()).collect();
    let mut graph = Graph::new();
    for (file, text) in files.iter().filter(|(file, _)| file != "lib.rs") {
        let from = node(&module(file));
        for path in paths(file, text).iter().filter(|path| known.contains(&path[0])) {
            let to = node(path);
            // A `mod.rs` is the door to its inner modules: it makes their devices and hands on what they have.
            let door = file.ends_with("mod.rs") && to.starts_with(&format!("{from}::"));
            if to != from && !door {
                graph.entry(from.clone()).or_default().entry(to).or_insert_with(|| file.clone());
            }
        }
    }
    graph
}

/// What is left when modules that use none of the rest, or that none of the rest uses, are taken away again and again.
fn tangle(mut graph: Graph) -> Vec<String> {
    let free = |graph: &Graph| {
        let used = |module: &String| graph.values().any(|uses| uses.contains_key(module));
        let found = graph.iter().find(|(from, uses)| !used(from) || !uses.keys().any(|to| graph.contains_key(to)));
        found.map(|(from, _)| from.clone())
    };
    while let Some(module) = free(&graph) {
        graph.remove(&module);
    }
    let lines = graph.iter().flat_map(|(from, uses)| {
        uses.iter().filter(|(to, _)| graph.contains_key(*to)).map(move |(to, file)| format!("{from} uses {to} in {file}"))
    });
    lines.collect()
}

fn read(folder: &Path, below: &str, files: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("src") {
        let path = entry.expect("an entry").path();
        let name = format!("{below}{}", path.file_name().expect("a name").to_string_lossy());
        match path.is_dir() {
            true => read(&path, &format!("{name}/"), files),
            false => files.push((name, fs::read_to_string(&path).expect("a source"))),
        }
    }
}

#[test]
fn there_is_none() {
    let mut files = Vec::new();
    read(Path::new("src"), "", &mut files);
    let graph = graph(&files);
    let uses = |from: &str, to: &str| graph.get(from).is_some_and(|uses| uses.contains_key(to));
    assert!(uses("capi", "head") && uses("head", "device") && uses("device::cuda", "stream"), "not understood: {graph:?}");
    let tangle = tangle(graph);
    assert!(tangle.is_empty(), "a cycle among the modules of src/:\n{}", tangle.join("\n"));
}

#[test]
fn a_planted_cycle_is_found() {
    let planted = |more: &[(&str, &str)]| {
        let sound = [
            ("a.rs", "use crate::{b::{self, B}, Error};\n#[cfg(test)]\nmod tests { use crate::c; }"),
            ("b.rs", "// crate::a\nuse std::fs;"),
            ("c.rs", "fn f() -> crate::a::A { crate::device::cpu::new() }"),
            ("device/mod.rs", "mod cpu;\npub use self::cpu::Cpu;\nuse super::b;"),
            ("device/cpu/mod.rs", "use crate::b;"),
        ];
        let files: Vec<_> = sound.iter().chain(more).map(|(file, text)| (file.to_string(), text.to_string())).collect();
        tangle(graph(&files))
    };
    assert_eq!(planted(&[]), [""; 0]);
    assert_eq!(planted(&[("b/deep.rs", "use crate::{a::A};")]), ["a uses b in a.rs", "b uses a in b/deep.rs"]);
    assert_eq!(
        planted(&[("device/nearest.rs", "use super::cpu::x;"), ("device/cpu/x.rs", "use super::super::Device;")]),
        ["device uses device::cpu in device/nearest.rs", "device::cpu uses device in device/cpu/x.rs"]
    );
}
