//! No module uses one that uses it, straight or through others.

use std::fs;
use std::path::Path;

use crate::modules::{cycle, Graph, Sources};

/// A node is a module at the top of `src/`; these are nodes of their own, apart from what is above them.
const APART: [[&str; 2]; 3] = [["comm", "transport"], ["device", "cpu"], ["device", "cuda"]];

fn node(path: &[String]) -> String {
    match path {
        [top, below, ..] if APART.contains(&[top, below]) => format!("{top}::{below}"),
        [top, ..] => top.clone(),
        [] => "lib".to_owned(),
    }
}

fn graph(files: &[(&str, &str)]) -> Graph {
    Sources::new(files.iter().copied()).graph(node)
}

fn read(folder: &Path, below: &str, files: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("src") {
        let path = entry.expect("an entry").path();
        let name = format!("{below}{}", path.file_name().expect("a name").to_string_lossy());
        if path.is_dir() {
            read(&path, &format!("{name}/"), files);
        } else if name.ends_with(".rs") {
            files.push((name, fs::read_to_string(&path).expect("a source")));
        }
    }
}

#[test]
fn there_is_none() {
    let mut files = Vec::new();
    read(Path::new("src"), "", &mut files);
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let graph = graph(&files);
    assert!(graph.contains_key("head") && graph["head"].contains_key("device"), "the sources were not understood: {graph:?}");
    if let Some(cycle) = cycle(&graph) {
        panic!("a cycle among the modules of src/:\n{}", cycle.join("\n"));
    }
}

const SOUND: [(&str, &str); 6] = [
    ("lib.rs", "mod a; mod comm; mod error; mod head; pub use error::{Error, Status};"),
    ("a.rs", "use crate::{Error, head::{self}}; fn f() -> crate::Status { '\"'; crate::comm::go::<u8>() }"),
    ("comm/mod.rs", "//! crate::a\nmod transport;\npub use self::transport::go;"),
    ("comm/transport.rs", "use std::fs; use crate::error::Error; const TEXT: &str = \"crate::head\";"),
    ("error.rs", "#[cfg(test)] mod tests { use crate::a; } #[cfg(test)] mod far; pub struct Error;"),
    ("error/far.rs", "use crate::head;"),
];

/// A source more, and the cycle that it makes.
fn planted(file: &'static str, text: &'static str) -> Option<Vec<String>> {
    let files: Vec<_> =
        SOUND.into_iter().filter(|(name, _)| *name != file).chain([("head.rs", "pub fn f() {}"), (file, text)]).collect();
    cycle(&graph(&files))
}

#[test]
fn what_is_no_cycle_is_none() {
    let graph = graph(&SOUND);
    assert_eq!(graph["a"].keys().collect::<Vec<_>>(), ["comm::transport", "error"], "{graph:?}");
    assert!(graph["comm"].is_empty() && graph["error"].is_empty(), "{graph:?}");
    assert_eq!(cycle(&graph), None);
    assert_eq!(planted("b.rs", "use crate::{a, comm, head};"), None);
}

#[test]
fn a_planted_cycle_is_found() {
    let cases = [
        ("error.rs", "use crate::a;", "error uses a in error.rs"),
        ("head.rs", "fn f() { crate::a::g() }", "head uses a in head.rs"),
        // Handed on by a module, it is still the one below that is used.
        ("comm/transport.rs", "use crate::{b::{c, d}, a::X};", "a uses comm::transport in a.rs"),
        ("comm/transport.rs", "use super::*;\nfn f() { super::super::a::g() }", "comm::transport uses a in comm/transport.rs"),
    ];
    for (file, text, line) in cases {
        let found = planted(file, text).unwrap_or_else(|| panic!("{file}: {text}: no cycle"));
        assert!(found.iter().any(|found| found == line), "{file}: {text}: {found:?}");
    }
    // Above and below, where above does more than declare.
    let above = [
        ("lib.rs", "mod comm;"),
        ("comm/mod.rs", "mod transport; fn f() { transport::go() }"),
        ("comm/transport.rs", "use super::f;"),
    ];
    let found = cycle(&graph(&above)).expect("a cycle");
    assert_eq!(found.len(), 2, "{found:?}");
}
