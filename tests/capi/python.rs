//! `python/partialfc/_abi.py` is what the header says, as ctypes declarations: generated anew, it must equal the committed file.
//!
//! `PFC_BLESS=1 cargo test --release --test capi python` writes it.

use std::fs;

use partialfc_testing::programs::root;

use crate::header::header;

const FILE: &str = "python/partialfc/_abi.py";

const TOP: &str = r#""""The C interface as ctypes declarations: constants, structs, and the functions of libpartialfc.

Generated from include/partialfc.h by tests/capi/python.rs; do not edit.
"""

from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
"#;

#[test]
fn the_committed_declarations_are_what_the_header_says() {
    let path = root().join(FILE);
    let fresh = declarations(&header());
    if std::env::var_os("PFC_BLESS").is_some() {
        fs::write(&path, &fresh).unwrap_or_else(|error| panic!("{FILE}: {error}"));
    }
    let committed = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{FILE}: {error}"));
    if let Some((number, (is, should))) = committed.lines().zip(fresh.lines()).enumerate().find(|(_, (is, should))| is != should) {
        panic!(
            "{FILE}:{} is\n  {is}\nand should be\n  {should}\nPFC_BLESS=1 cargo test --release --test capi writes it",
            number + 1
        );
    }
    assert_eq!(committed.len(), fresh.len(), "{FILE} has more or fewer lines than the header says; PFC_BLESS=1 writes it");
}

/// The whole file.
fn declarations(header: &str) -> String {
    let mut constants = String::new();
    let mut types = String::new();
    let mut functions = String::new();
    let mut exported = 0;
    let mut words: Vec<&str> = Vec::new();
    let mut lines = header.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix("//") {
            words.push(text.strip_prefix(' ').unwrap_or(text));
            continue;
        }
        let text = std::mem::take(&mut words);
        if let Some(constant) = line.strip_prefix("#define PFC_").filter(|rest| rest.contains(' ') && !rest.starts_with("VERSION"))
        {
            let (constant, behind) = constant.split_once("//").map_or((constant, None), |(code, text)| (code, Some(text.trim())));
            let (name, value) = constant.split_once(' ').expect("a value");
            for line in behind.into_iter().chain(text) {
                constants += &format!("#: {line}\n");
            }
            constants += &format!("PFC_{name} = {}\n", value.trim());
        } else if let Some(name) = line.strip_prefix("typedef struct ").and_then(|rest| rest.strip_suffix(" {")) {
            types += &structure(name, &text, &mut lines);
        } else if line.starts_with("typedef void (*") {
            let code = statement(line, &mut lines);
            let name = code.strip_prefix("typedef void (*").and_then(|rest| rest.split_once(')')).expect("a name").0;
            types += &format!("\n\n{}{name} = {}\n", comment(&text), callback(&code["typedef ".len()..]));
        } else if line.starts_with("static inline") {
            lines.by_ref().find(|line| *line == "}");
        } else if line.starts_with(|c: char| c.is_ascii_lowercase()) && line.contains("pfc_") && line.contains('(') {
            let code = statement(line, &mut lines);
            let (before, arguments) = code.split_once('(').expect("arguments");
            let (result, name) = split_name(before);
            exported += 1;
            let arguments = arguments.trim_end_matches(");");
            let arguments: Vec<&str> = arguments.split(", ").filter(|argument| *argument != "void").collect();
            let types: Vec<String> = arguments.iter().map(|argument| ctype(split_name(argument).0)).collect();
            let names: Vec<&str> = arguments.iter().map(|argument| split_name(argument).1).collect();
            functions += &format!(
                "    function = library.{name}\n    function.restype = {}\n    function.argtypes = [{}]\n    function.__doc__ = \
                 \"\"\"{name}({})\n\n{}    \"\"\"\n\n",
                if result == "void" { "None".to_owned() } else { ctype(result) },
                types.join(", "),
                names.join(", "),
                text.iter().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect::<String>(),
            );
        }
    }
    assert!(exported > 50 && constants.lines().count() > 60, "the header is not understood");
    format!(
        "{TOP}\n{constants}{types}\n\ndef declare(library):\n    \"\"\"Sets the result, the arguments and the text of each function of a \
         ctypes.CDLL.\"\"\"\n{}",
        functions.trim_end().to_owned() + "\n"
    )
}

/// A statement that may go on over several lines, as one.
fn statement<'a>(first: &str, lines: &mut impl Iterator<Item = &'a str>) -> String {
    let mut code = first.trim().to_owned();
    while !code.ends_with(';') {
        code += " ";
        code += lines.next().expect("an end of the statement").trim();
    }
    code
}

/// The type and the name of a declaration such as `const pfc_head *head`.
fn split_name(declaration: &str) -> (&str, &str) {
    let at = declaration.rfind([' ', '*']).expect("a type and a name") + 1;
    (declaration[..at].trim_end(), declaration[at..].trim())
}

/// A handle and memory are addresses; a struct is a pointer to one, so that ctypes refuses another.
fn ctype(c: &str) -> String {
    let plain = c.replace("const ", "");
    match plain.as_str() {
        "void *" | "int64_t *" | "float *" | "double *" | "uint64_t *" | "uint8_t *" | "int32_t *" => "c_void_p".to_owned(),
        "char *" if c.starts_with("const ") => "c_char_p".to_owned(),
        "char *" => "c_void_p".to_owned(),
        "pfc_status" => "c_int32".to_owned(),
        "int32_t" | "int64_t" | "uint32_t" | "uint64_t" => format!("c_{}", plain.trim_end_matches("_t")),
        "double" => "c_double".to_owned(),
        "pfc_head *" | "pfc_comm *" | "pfc_device *" => "c_void_p".to_owned(),
        "pfc_head **" | "pfc_comm **" | "pfc_device **" => "POINTER(c_void_p)".to_owned(),
        name if name.starts_with("pfc_") && name.ends_with("_fn") => name.to_owned(),
        name if name.starts_with("pfc_") && name.ends_with(" *") => format!("POINTER({})", &name[..name.len() - 2]),
        other => panic!("{other} has no ctypes type here"),
    }
}

/// The type of a function pointer such as `void (*abort)(void *ctx)`.
fn callback(code: &str) -> String {
    let (result, rest) = code.split_once(" (*").expect("a function pointer");
    let arguments = rest.split_once(")(").expect("arguments").1.trim_end_matches(");");
    let types = arguments.split(", ").map(|argument| match split_name(argument).0 {
        // Text to read as it is, and memory to write to.
        "const char *" => "c_char_p".to_owned(),
        c => ctype(c),
    });
    let result = if result == "void" { "None".to_owned() } else { ctype(result) };
    format!("CFUNCTYPE({})", std::iter::once(result).chain(types).collect::<Vec<_>>().join(", "))
}

fn structure<'a>(name: &str, text: &[&str], lines: &mut impl Iterator<Item = &'a str>) -> String {
    let mut fields = String::new();
    let end = format!("}} {name};");
    while let Some(line) = lines.next().filter(|line| *line != end) {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("//") {
            fields += &format!("        #{text}\n");
            continue;
        }
        let code = statement(line, lines);
        if code.contains("(*") {
            let field = code.split_once("(*").and_then(|(_, rest)| rest.split_once(')')).expect("a name").0;
            fields += &format!("        (\"{field}\", {}),\n", callback(&code));
        } else {
            let (c, field) = split_name(code.trim_end_matches(';'));
            fields += &format!("        (\"{field}\", {}),\n", ctype(c));
        }
    }
    let text: String = text.iter().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect();
    format!("\n\nclass {name}(Structure):\n    \"\"\"{}\n    \"\"\"\n\n    _fields_ = [\n{fields}    ]\n", text.trim())
}

fn comment(text: &[&str]) -> String {
    text.iter().map(|line| format!("# {line}\n")).collect()
}
