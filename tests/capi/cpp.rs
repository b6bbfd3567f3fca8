//! The C++ header: it leaves out no function, compiles in every standard by both compilers, and does what its program expects.

use std::fs;
use std::process::Command;
use std::thread;

use partialfc_testing::programs::{compile, fresh, link_shared, output, root, run, scratch, tool};

use super::programs::{build, declared_functions};

/// Functions that the C++ header does without, and why.
const NOT_WRAPPED: [(&str, &str); 1] =
    [("pfc_last_error_copy", "for managed languages, which cannot hold what pfc_last_error returns")];
const STANDARDS: [&str; 3] = ["c++17", "c++20", "c++2b"];
const WITHOUT: [&str; 3] = ["", "-fno-exceptions", "-fno-rtti"];

fn header() -> String {
    fs::read_to_string(root().join("include/partialfc.hpp")).expect("include/partialfc.hpp")
}

/// A header without its comments.
fn code(header: &str) -> String {
    header.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// Whether a name stands in a text as a whole word.
fn uses(text: &str, name: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| !text[..at].ends_with(part) && !text[at + name.len()..].starts_with(part))
}

/// An inline `pfc_x_init` of C is `pfc_x_init_sized` with C's own sizeof, which C++ calls itself.
#[test]
fn every_function_is_there_in_cpp() {
    let code = code(&header());
    let functions = declared_functions();
    for (name, inline) in &functions {
        let excused = NOT_WRAPPED.iter().any(|(excused, _)| excused == name);
        assert_ne!(uses(&code, name), excused || *inline, "{name}: wrapped in partialfc.hpp, or excused in tests/capi/cpp.rs");
    }
    for (excused, why) in NOT_WRAPPED {
        assert!(!why.is_empty() && functions.iter().any(|(name, _)| name == excused), "{excused} is no function of partialfc.h");
    }
}

/// With no warning, and together with a second translation unit of C++17 that has exceptions; every one of the programs runs.
#[test]
fn in_all_standards_by_both_compilers() {
    let directory = scratch("cpp");
    fresh(&directory);
    let compilers: Vec<&str> = ["g++", "clang++"].into_iter().filter(|compiler| tool(compiler)).collect();
    let warned = |compiler: &str, standard: &str, file: &str| {
        let mut command = compile(compiler);
        command.arg(format!("-std={standard}")).args([
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Wshadow",
            "-Wconversion",
            "-Wold-style-cast",
        ]);
        command.arg("-Werror").arg(root().join("ctests/cpp").join(file));
        command
    };
    let each = |compiler: &str| {
        let other = directory.join(format!("{compiler}.o"));
        output(warned(compiler, "c++17", "other.cpp").arg("-c").arg("-o").arg(&other));
        for standard in STANDARDS {
            for without in WITHOUT {
                let program = directory.join(format!("{compiler}{standard}{without}"));
                let mut command = warned(compiler, standard, "main.cpp");
                command.args([without].iter().filter(|flag| !flag.is_empty())).arg(&other);
                link_shared(&mut command);
                output(command.args(["-pthread", "-o"]).arg(&program));
                run(&program, &[&program.with_extension("checkpoint")]);
            }
        }
    };
    thread::scope(|scope| compilers.iter().for_each(|compiler| drop(scope.spawn(|| each(compiler)))));
}

/// Every handle is freed with all that it holds, and nothing is used after it.
#[test]
fn nothing_leaks_in_cpp() {
    let program = scratch("cpp_sanitized").join("program");
    let mut command = compile("c++");
    command.args(["-std=c++17", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]);
    command.args(["main.cpp", "other.cpp"].map(|file| root().join("ctests/cpp").join(file)));
    link_shared(&mut command);
    output(command.args(["-pthread", "-o"]).arg(&program));
    run(&program, &[&program.with_extension("checkpoint")]);
}

#[test]
fn the_bench_of_a_step_in_cpp() {
    for program in build("cpp_step", &["benches/cpp_step.cpp"]) {
        let printed = output(Command::new(&program).arg("20"));
        assert!(printed.starts_with("step") && printed.contains("times that"), "{printed}");
    }
}
