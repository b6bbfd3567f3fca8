//! What programs are compiled with, as lines: constants, types, structs with their fields, functions. bindgen reads the header, and
//! libclang lays out its structs.
//!
//!     const PFC_OK 0
//!     type pfc_status i32
//!     struct pfc_matrix 40
//!     field pfc_matrix.data 0 8 *mut c_void
//!     fn pfc_version () -> u32

use std::collections::BTreeMap;

/// The lines of a header's text, in its order. None where there is no libclang, unless `PFC_REQUIRE_TOOLS` is set.
pub fn table(header: &str) -> Option<Vec<String>> {
    let generate = || {
        bindgen::Builder::default()
            .header_contents("partialfc.h", header)
            .allowlist_item("(pfc|PFC)_.*")
            .blocklist_item("PFC_VERSION.*")
            .generate_comments(false)
            .formatter(bindgen::Formatter::Prettyplease)
            .generate()
    };
    match std::panic::catch_unwind(generate) {
        Ok(bindings) => Some(lines(&bindings.expect("bindgen reads the header").to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            assert!(text.contains("libclang"), "{text}");
            assert!(std::env::var_os("PFC_REQUIRE_TOOLS").is_none(), "on Debian, apt-get install libclang-dev: {text}");
            eprintln!("no libclang: what needs it is left out");
            None
        }
    }
}

fn lines(bindings: &str) -> Vec<String> {
    let text: String = bindings.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = text.replace(", )", ")").replace("( ", "(").replace("::std::os::raw::", "");
    let text = text.replace("::std::option::Option< unsafe extern \"C\" fn", "fn").replace(", >", "");
    let numbers = numbers(&text);
    let mut constants = Vec::new();
    let mut types = Vec::new();
    let mut functions = Vec::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find("pub ") {
        let (kind, behind) = rest[at + 4..].split_once(' ').expect("a word behind pub");
        rest = behind;
        match kind {
            "const" => {
                let (name, value) = until(&mut rest, ";").split_once(": ").expect("a type");
                constants.push(format!("const {name} {}", value.split_once(" = ").expect("a value").1));
            }
            "type" => {
                let (name, what) = until(&mut rest, ";").split_once(" = ").expect("a type");
                types.push(format!("type {name} {}", without_names(what)));
            }
            "struct" => {
                let (name, fields) = until(&mut rest, " }").split_once(" {").expect("fields");
                // What the header keeps to itself has neither size nor fields.
                if let Some(size) = numbers.get(format!("Size of {name}").as_str()) {
                    types.push(format!("struct {name} {size}"));
                    types.extend(fields_of(name, *size, fields, &numbers));
                }
            }
            "fn" => {
                let (name, what) = until(&mut rest, ";").split_once('(').expect("arguments");
                functions.push(format!("fn {name} ({}", without_names(what)));
            }
            other => panic!("bindgen made of the header: pub {other}"),
        }
    }
    constants.into_iter().chain(types).chain(functions).collect()
}

/// Of `["Size of S"][size_of::<S>() - 48usize];`, and of `Offset of field: S::f`, the name and the number.
fn numbers(text: &str) -> BTreeMap<&str, usize> {
    let pieces: Vec<&str> = text.split('"').collect();
    let number = |behind: &str| behind.split_once(" - ")?.1.split_once("usize")?.0.parse().ok();
    pieces.windows(2).filter_map(|pair| Some((pair[0], number(pair[1])?))).collect()
}

/// Lines of a struct's fields. There is no padding, so that a field ends where the next one starts.
fn fields_of(name: &str, size: usize, fields: &str, numbers: &BTreeMap<&str, usize>) -> Vec<String> {
    let fields: Vec<(&str, String)> = fields
        .split("pub ")
        .skip(1)
        .map(|field| field.trim().trim_end_matches(',').split_once(": ").expect("a field's type"))
        .map(|(field, what)| (field, without_names(what)))
        .collect();
    let starts: Vec<usize> =
        fields.iter().map(|(field, _)| numbers[format!("Offset of field: {name}::{field}").as_str()]).collect();
    let ends = starts.iter().copied().skip(1).chain([size]);
    let placed = fields.iter().zip(&starts).zip(ends);
    placed.map(|(((field, what), start), end)| format!("field {name}.{field} {start} {} {what}", end - start)).collect()
}

/// The text up to `end`; what is behind it remains.
fn until<'a>(text: &mut &'a str, end: &str) -> &'a str {
    let (before, behind) = text.split_once(end).unwrap_or_else(|| panic!("no {end} in {text}"));
    *text = behind;
    before
}

/// A type without its parameters' names, which bind nobody.
fn without_names(what: &str) -> String {
    let mut pieces = what.split(": ").peekable();
    let mut out = String::new();
    while let Some(piece) = pieces.next() {
        let named = pieces.peek().is_some();
        out += if named { piece.trim_end_matches(|c: char| c.is_alphanumeric() || c == '_') } else { piece };
    }
    out
}

/// What a program that was compiled with `old` does not find in `new`, as sentences. Structs may have grown at their end if they
/// start with their size.
pub fn broken(old: &[String], new: &[String]) -> Vec<String> {
    let named = |lines: &[String]| -> BTreeMap<String, String> {
        lines.iter().map(|line| (name(line), line[name(line).len()..].trim().to_owned())).collect()
    };
    let (before, now) = (named(old), named(new));
    let sizes = |table: &BTreeMap<String, String>, key: &str| table.get(key).map(|size| size.parse::<usize>().expect("a size"));
    let mut found = Vec::new();
    for (key, was) in &before {
        match now.get(key) {
            None => found.push(format!("{key} is gone; it was {was}")),
            Some(is) if is == was => {}
            Some(is) => {
                let grown = key.strip_prefix("struct ").is_some_and(|name| {
                    before.contains_key(&format!("field {name}.struct_size")) && sizes(&now, key) > sizes(&before, key)
                });
                if !grown {
                    found.push(format!("{key} was {was} and is {is}"));
                }
            }
        }
    }
    for (key, is) in now.iter().filter(|(key, _)| !before.contains_key(*key)) {
        let owner = key.strip_prefix("field ").and_then(|field| field.split_once('.')).map(|(owner, _)| format!("struct {owner}"));
        if let Some(size) = owner.and_then(|owner| sizes(&before, &owner)) {
            let start: usize = is.split(' ').next().expect("an offset").parse().expect("an offset");
            if start < size {
                found.push(format!("{key} is new at byte {start} of a struct that had {size}"));
            }
        }
    }
    found
}

/// Kind and name, the first two words.
fn name(line: &str) -> String {
    line.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// The lines of these kinds.
pub fn of_kind<'a>(table: &'a [String], kinds: &'a [&str]) -> impl Iterator<Item = &'a String> {
    table.iter().filter(|line| kinds.iter().any(|kind| line.split(' ').next() == Some(kind)))
}
