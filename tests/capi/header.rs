//! `include/partialfc.h` is what `src/capi` says: generated anew, it must equal the committed file.
//!
//! `PFC_BLESS=1 cargo test --release --test header` writes it.
//!
//! cbindgen writes each file of `src/capi` as a section of its own (constants, types, functions of one object together, under the
//! file's own introduction); what is here puts the sections together and sets the lines to a width that C users read.

use std::fs;
use std::path::Path;

use partialfc_testing::programs::root;

/// The sections, so that each names only what stands above it.
const SECTIONS: [&str; 13] = [
    "status",
    "types",
    "device",
    "comm",
    "head",
    "forward",
    "update",
    "metrics",
    "checkpoint",
    "classes",
    "kernels",
    "plan",
    "log",
];

/// Columns of the header.
const WIDTH: usize = 100;

#[test]
fn the_committed_header_is_what_the_sources_say() {
    let path = root().join("include/partialfc.h");
    let fresh = header();
    if std::env::var_os("PFC_BLESS").is_some() {
        fs::write(&path, &fresh).expect("include/partialfc.h can be written");
    }
    let committed = fs::read_to_string(&path).expect("include/partialfc.h can be read");
    if let Some((number, (is, should))) = committed.lines().zip(fresh.lines()).enumerate().find(|(_, (a, b))| a != b) {
        let line = number + 1;
        panic!("include/partialfc.h:{line} is\n  {is}\nand should be\n  {should}\nPFC_BLESS=1 cargo test --release --test capi header writes it");
    }
    assert_eq!(
        committed.len(),
        fresh.len(),
        "include/partialfc.h has more or fewer lines than src/capi says; PFC_BLESS=1 writes it"
    );
}

#[test]
fn every_file_of_capi_is_a_section() {
    let mut files: Vec<String> = fs::read_dir(root().join("src/capi"))
        .expect("src/capi")
        .map(|entry| entry.expect("an entry").path())
        // The folder of a file's modules has nothing of the header.
        .filter(|path| path.is_file())
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .filter(|name| name != "mod")
        .collect();
    files.sort();
    let mut sections = SECTIONS.map(str::to_owned);
    sections.sort();
    assert_eq!(files, sections, "a new file of src/capi needs a place in SECTIONS");
}

#[test]
fn names_have_the_prefix_and_lines_the_width() {
    for (number, line) in header().lines().enumerate() {
        assert!(line.chars().count() <= WIDTH, "line {}: {line}", number + 1);
        if let Some(name) = line.strip_prefix("#define ").map(|rest| rest.split([' ', '(']).next().unwrap_or(rest)) {
            assert!(name.starts_with("PFC_") || name == "PARTIALFC_H", "line {}: {line}", number + 1);
        }
        if line.starts_with("typedef struct ") {
            assert!(line.starts_with("typedef struct pfc_"), "line {}: {line}", number + 1);
        }
        assert!(!line.starts_with("enum ") && !line.starts_with("struct "), "line {}: {line}", number + 1);
    }
}

#[test]
fn every_function_has_a_comment_above_it() {
    let header = header();
    let lines: Vec<&str> = header.lines().collect();
    let mut functions = 0;
    for (number, line) in lines.iter().enumerate() {
        let starts =
            !line.starts_with([' ', '/', '#', '}']) && line.contains("pfc_") && line.contains('(') && !line.starts_with("typedef");
        if starts {
            functions += 1;
            assert!(lines[number - 1].starts_with("//"), "no comment above {line}");
        }
    }
    assert!(functions > 50, "found {functions} functions");
}

/// The whole header.
pub fn header() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml is valid");
    let introduction = config.header.clone().expect("cbindgen.toml has the text on top");
    let mut out = comment(introduction.trim());
    out += "\n#ifndef PARTIALFC_H\n#define PARTIALFC_H\n\n#include <stddef.h>\n#include <stdint.h>\n";
    out += "\n// The version of this header; pfc_version() returns that of the library.\n";
    for (part, value) in [
        ("MAJOR", env!("CARGO_PKG_VERSION_MAJOR")),
        ("MINOR", env!("CARGO_PKG_VERSION_MINOR")),
        ("PATCH", env!("CARGO_PKG_VERSION_PATCH")),
    ] {
        out += &format!("#define PFC_VERSION_{part} {value}\n");
    }
    out += "#define PFC_VERSION ((PFC_VERSION_MAJOR << 16) | (PFC_VERSION_MINOR << 8) | PFC_VERSION_PATCH)\n";
    out += "\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n";
    for name in SECTIONS {
        out += &section(&root().join(format!("src/capi/{name}.rs")), &config);
    }
    out += "\n#ifdef __cplusplus\n}  // extern \"C\"\n#endif\n\n#endif  // PARTIALFC_H\n";
    out
}

/// One file of `src/capi`: its introduction, then what cbindgen makes of it.
fn section(path: &Path, config: &cbindgen::Config) -> String {
    let source = fs::read_to_string(path).expect("a file of src/capi");
    let mut config = config.clone();
    config.header = None;
    // Structs that only other files' functions take.
    config.export.include = words_after(&source, "pub struct ").filter(|name| name.starts_with("pfc_")).collect();
    let bindings = cbindgen::Builder::new().with_config(config).with_src(path).generate().expect("cbindgen reads src/capi");
    let mut generated = Vec::new();
    bindings.write(&mut generated);
    let generated = String::from_utf8(generated).expect("cbindgen writes UTF-8");

    let introduction: Vec<&str> = source.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim).collect();
    format!("\n{}\n{}{}", "/".repeat(WIDTH), comment(&introduction.join("\n")), body(&generated, &source))
}

/// cbindgen's text with lines set, constants in tables, and after each pfc_x_init_sized the inline function that C programs call.
fn body(generated: &str, source: &str) -> String {
    let mut out = String::new();
    let mut blank = true;
    let mut words: Vec<&str> = Vec::new();
    let mut indent = "";
    let mut constants: Vec<(String, String)> = Vec::new();
    for line in generated.lines() {
        let code = line.trim_start();
        if let Some(text) = code.strip_prefix("//") {
            indent = &line[..line.len() - code.len()];
            words.push(text.trim());
            continue;
        }
        let text = words.join("\n");
        words.clear();
        if line.is_empty() {
            blank = true;
            continue;
        }
        if let Some(define) = line.strip_prefix("#define ") {
            if begins_group(source, define.split(' ').next().unwrap_or(define)) {
                out += &table(&std::mem::take(&mut constants));
            }
            constants.push((line.to_owned(), text));
            continue;
        }
        out += &table(&std::mem::take(&mut constants));
        if blank {
            out.push('\n');
        }
        blank = false;
        if !text.is_empty() {
            out += &indented(&comment(&text), indent);
        }
        out += &broken(&if line.starts_with("typedef") { line.to_owned() } else { line.replace("struct pfc_", "pfc_") });
        if let Some(name) = line.strip_prefix("pfc_status ").and_then(|rest| rest.split_once("_init_sized(")).map(|(name, _)| name)
        {
            out += &inline_init(name);
        }
    }
    out += &table(&constants);
    out
}

/// Whether a constant stands after a blank line in the Rust source.
fn begins_group(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().collect();
    let at = lines.iter().position(|line| line.starts_with(&format!("pub const {name}:"))).expect("the constant's own line");
    let above = lines[..at].iter().rposition(|line| !line.starts_with("///")).expect("something above the constant");
    lines[above].is_empty()
}

/// A group of constants: comments behind them where all fit, else above.
fn table(constants: &[(String, String)]) -> String {
    let Some(longest) = constants.iter().map(|(line, _)| line.len()).max() else { return String::new() };
    let behind = constants.iter().all(|(_, text)| longest + 5 + text.len() <= WIDTH && !text.contains('\n'));
    let mut out = "\n".to_owned();
    for (line, text) in constants {
        out += &if behind { format!("{line:<longest$}  // {text}\n") } else { format!("{}{line}\n", comment(text)) };
    }
    out
}

fn inline_init(name: &str) -> String {
    let argument = name.strip_prefix("pfc_").unwrap_or(name).rsplit('_').next().unwrap_or(name);
    format!(
        "\n{}static inline pfc_status {name}_init({name} *{argument}) {{\n  return {name}_init_sized({argument}, sizeof({name}));\n}}\n",
        comment(&format!("{name}_init_sized for this header's {name}: what C and C++ programs call."))
    )
}

/// Text as // lines of the header's width. Paragraphs end at an empty line, and where the next starts with @ or -.
fn comment(text: &str) -> String {
    let mut out = String::new();
    let mut column = 0;
    let mut hanging = "";
    for line in text.lines() {
        let starts = line.is_empty() || line.starts_with(['@', '-']);
        if column > 0 && starts {
            out.push('\n');
            column = 0;
        }
        if line.is_empty() {
            out += "//\n";
            hanging = "";
        }
        if starts && !line.is_empty() {
            hanging = "  ";
        }
        for word in line.split(' ').filter(|word| !word.is_empty()) {
            // Comments of fields are indented by two.
            if column > 0 && column + 1 + word.chars().count() > WIDTH - 2 {
                out += "\n//";
                out += hanging;
                column = 2 + hanging.len();
            } else if column == 0 {
                out += "//";
                column = 2;
            }
            out.push(' ');
            out += word;
            column += 1 + word.chars().count();
        }
    }
    if column > 0 {
        out.push('\n');
    }
    out
}

fn indented(text: &str, indent: &str) -> String {
    text.lines().map(|line| format!("{indent}{line}\n")).collect()
}

/// A declaration broken at its commas, aligned behind the parenthesis of its arguments.
fn broken(line: &str) -> String {
    if line.len() <= WIDTH {
        return format!("{line}\n");
    }
    let arguments = if line.contains("(*") { line.find(")(").map(|at| at + 2) } else { line.find('(').map(|at| at + 1) };
    let arguments = arguments.expect("a long line is a function's");
    let mut out = String::new();
    let mut current = line[..arguments].to_owned();
    for (index, argument) in line[arguments..].split(", ").enumerate() {
        if index > 0 {
            current.push(',');
            if current.len() + 1 + argument.len() + 1 > WIDTH {
                out += &current;
                out.push('\n');
                current = " ".repeat(arguments);
            } else {
                current.push(' ');
            }
        }
        current += argument;
    }
    out + &current + "\n"
}

fn words_after<'a>(source: &'a str, prefix: &'a str) -> impl Iterator<Item = String> + 'a {
    source
        .lines()
        .filter_map(move |line| line.strip_prefix(prefix))
        .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
}
