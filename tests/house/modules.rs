//! Which module of a crate uses which, read from the sources' `use` items and paths. Test modules do not count.

use std::collections::{BTreeMap, BTreeSet};

/// A module's path from the crate's root; the root's is empty.
type Path = Vec<String>;

/// Sources by their path beneath `src/`.
pub struct Sources(BTreeMap<Path, Module>);

struct Module {
    file: String,
    tokens: Vec<String>,
    /// A `mod.rs`, or its like, that only declares its children and hands on what they have.
    only_declares: bool,
}

/// The edges of a graph: from each node to those that it uses, with a file that does.
pub type Graph = BTreeMap<String, BTreeMap<String, String>>;

impl Sources {
    pub fn new<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Sources {
        let (mut modules, mut tests) = (BTreeMap::new(), BTreeSet::new());
        for (file, text) in files {
            let mut path: Path = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
            if matches!(path.last().map(String::as_str), Some("mod" | "lib")) {
                path.pop();
            }
            let (tokens, test_modules) = without_tests(tokens(text));
            tests.extend(test_modules.into_iter().map(|name| [&path[..], &[name]].concat()));
            let only_declares = statements(&tokens).iter().all(|statement| declares(statement));
            modules.insert(path, Module { file: file.to_owned(), tokens, only_declares });
        }
        modules.retain(|path: &Path, _: &mut Module| !(1..=path.len()).any(|len| tests.contains(&path[..len])));
        Sources(modules)
    }

    /// Who uses whom, among the nodes that `node` makes of modules. A module that only declares its children does not use them.
    pub fn graph(&self, node: impl Fn(&[String]) -> String) -> Graph {
        let mut graph = Graph::new();
        for (path, module) in self.0.iter().filter(|(path, _)| !path.is_empty()) {
            let from = node(path);
            let edges = graph.entry(from.clone()).or_default();
            for target in self.targets(path, module) {
                let to = node(&target);
                let own_child = module.only_declares && target.starts_with(path);
                if !target.is_empty() && to != from && !own_child {
                    edges.entry(to).or_insert_with(|| module.file.clone());
                }
            }
        }
        graph
    }

    /// The modules that a module names.
    fn targets(&self, path: &[String], module: &Module) -> BTreeSet<Path> {
        paths(&module.tokens).into_iter().filter_map(|(start, names)| self.resolve(path, &start, &names, 0)).collect()
    }

    /// The module that has what a path names, through what modules hand on with `pub use`. None: it is of another crate.
    fn resolve(&self, from: &[String], start: &str, names: &[String], depth: usize) -> Option<Path> {
        let (mut here, mut names): (Path, Vec<String>) = match start {
            "crate" => (Vec::new(), names.to_vec()),
            "self" => (from.to_vec(), names.to_vec()),
            "super" => (from.split_last()?.1.to_vec(), names.to_vec()),
            child if self.0.contains_key(&[from, &[child.to_owned()]].concat()) => {
                ([from, &[child.to_owned()]].concat(), names.to_vec())
            }
            _ => return None,
        };
        while let Some(name) = names.first().cloned() {
            names.remove(0);
            let deeper = [&here[..], std::slice::from_ref(&name)].concat();
            if name == "super" {
                here.pop();
            } else if self.0.contains_key(&deeper) {
                here = deeper;
            } else {
                let handed_on = self.handed_on(&here, &name).filter(|_| depth < 8);
                return match handed_on {
                    Some((start, rest)) => self.resolve(&here, &start, &[rest, names].concat(), depth + 1),
                    None => Some(here),
                };
            }
        }
        Some(here)
    }

    /// What `pub use` of a module has this name.
    fn handed_on(&self, path: &[String], name: &str) -> Option<(String, Vec<String>)> {
        let module = self.0.get(path)?;
        let uses = statements(&module.tokens).into_iter().filter(|statement| statement[0] == "pub" && statement.contains(&"use"));
        uses.flat_map(|statement| {
            let owned: Vec<String> = statement.iter().map(|&token| token.to_owned()).collect();
            paths(&owned)
        })
        .find(|(_, names)| names.last().is_some_and(|last| last == name))
    }
}

/// A cycle of the graph, from a node back to it, as lines that say who uses whom in which file.
pub fn cycle(graph: &Graph) -> Option<Vec<String>> {
    fn search<'a>(graph: &'a Graph, node: &'a str, trail: &mut Vec<&'a str>, done: &mut BTreeSet<&'a str>) -> Option<Vec<&'a str>> {
        if let Some(at) = trail.iter().position(|&seen| seen == node) {
            return Some([&trail[at..], &[node]].concat());
        }
        if !done.insert(node) {
            return None;
        }
        trail.push(node);
        let found = graph.get(node)?.keys().find_map(|next| search(graph, next, trail, done));
        trail.pop();
        found
    }
    let mut done = BTreeSet::new();
    let nodes = graph.keys().find_map(|node| search(graph, node, &mut Vec::new(), &mut done))?;
    Some(nodes.windows(2).map(|pair| format!("{} uses {} in {}", pair[0], pair[1], graph[pair[0]][pair[1]])).collect())
}

/// Names, `::` and single signs; no comment, text or lifetime.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (Vec::new(), 0);
    let starts = |at: usize, mark: &str| mark.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    while at < chars.len() {
        let c = chars[at];
        if starts(at, "//") {
            at += chars[at..].iter().position(|&c| c == '\n').unwrap_or(chars.len() - at);
        } else if starts(at, "/*") {
            at += 2;
            while at < chars.len() && !starts(at, "*/") {
                at += 1;
            }
            at += 2;
        } else if c == 'r' && (starts(at, "r\"") || starts(at, "r#\"")) {
            let hash = starts(at, "r#");
            at += if hash { 3 } else { 2 };
            while at < chars.len() && !starts(at, if hash { "\"#" } else { "\"" }) {
                at += 1;
            }
            at += if hash { 2 } else { 1 };
        } else if c == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                at += if chars[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if c == '\'' {
            // A character, or a lifetime.
            let escaped = chars.get(at + 1) == Some(&'\\');
            let close = (at + 2..at + 12).find(|&i| chars.get(i) == Some(&'\'') && (escaped || i == at + 2));
            at = close.map_or(at + 1, |close| close + 1);
        } else if c.is_alphanumeric() || c == '_' {
            let end = chars[at..].iter().position(|&c| !(c.is_alphanumeric() || c == '_')).map_or(chars.len(), |n| at + n);
            out.push(chars[at..end].iter().collect());
            at = end;
        } else {
            let mark = if starts(at, "::") { "::".to_owned() } else { c.to_string() };
            at += if mark == "::" { 2 } else { 1 };
            if !c.is_whitespace() {
                out.push(mark);
            }
        }
    }
    out
}

/// The end of what begins at `at`: a statement up to its `;`, or an item up to the brace that closes it.
fn end_of_item(tokens: &[String], at: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth -= 1;
                let ends_use = tokens.get(i + 1).is_some_and(|next| next == ";");
                if depth == 0 && token == "}" && !ends_use {
                    return i + 1;
                }
            }
            ";" if depth == 0 => return i + 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Takes out what is only for tests; the names of test modules that are files of their own are given.
fn without_tests(tokens: Vec<String>) -> (Vec<String>, Vec<String>) {
    let mark = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut out, mut modules, mut at) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        if tokens[at..].iter().take(mark.len()).eq(mark.iter()) {
            let mut begin = at + mark.len();
            while tokens.get(begin).is_some_and(|token| token == "#") {
                begin += tokens[begin..].iter().position(|token| token == "]").map_or(1, |n| n + 1);
            }
            let end = end_of_item(&tokens, begin);
            if let [before @ .., _] = &tokens[begin..end] {
                if let [.., keyword, name] = before {
                    if keyword == "mod" {
                        modules.push(name.clone());
                    }
                }
            }
            at = end;
        } else {
            out.push(tokens[at].clone());
            at += 1;
        }
    }
    (out, modules)
}

/// The items at a file's top, without the attributes.
fn statements(tokens: &[String]) -> Vec<Vec<&str>> {
    let (mut out, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        if tokens[at] == "#" {
            at += tokens[at..].iter().position(|token| token == "]").map_or(1, |n| n + 1);
            continue;
        }
        let end = end_of_item(tokens, at);
        out.push(tokens[at..end].iter().map(String::as_str).collect());
        at = end;
    }
    out
}

/// `mod x;`, `pub(crate) mod x;`, `use ..;`
fn declares(statement: &[&str]) -> bool {
    let rest = match statement {
        ["pub", "(", _, ")", rest @ ..] | ["pub", rest @ ..] => rest,
        rest => rest,
    };
    matches!(rest, ["mod", _, ";"] | ["use", ..])
}

/// Every path: what it begins with, and the names after that. Those of a `use` tree are told one by one.
fn paths(tokens: &[String]) -> Vec<(String, Vec<String>)> {
    let mut out = Vec::new();
    for at in 0..tokens.len() {
        let begins = tokens.get(at + 1).is_some_and(|next| next == "::") && (at == 0 || tokens[at - 1] != "::");
        if begins && is_name(&tokens[at]) {
            tree(tokens, at + 2, &mut Vec::new(), &mut |names| out.push((tokens[at].clone(), names.to_vec())));
        }
    }
    out
}

/// Reads what comes after `::`, a name or a group in braces; gives where it ends.
fn tree(tokens: &[String], at: usize, names: &mut Vec<String>, found: &mut impl FnMut(&[String])) -> usize {
    match tokens.get(at).map(String::as_str) {
        Some("{") => {
            let mut at = at + 1;
            while at < tokens.len() && tokens[at] != "}" {
                at = if tokens[at] == "," { at + 1 } else { tree(tokens, at, names, found).max(at + 1) };
            }
            at + 1
        }
        Some("self") => {
            found(names);
            at + 1
        }
        Some(name) if is_name(name) => {
            names.push(name.to_owned());
            let end = match tokens.get(at + 1).map(String::as_str) {
                Some("::") => tree(tokens, at + 2, names, found),
                _ => {
                    found(names);
                    at + 1
                }
            };
            names.pop();
            end
        }
        // A glob, or the arguments of a generic.
        _ => {
            found(names);
            at + 1
        }
    }
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}
