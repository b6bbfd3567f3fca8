//! `include/partialfc_nccl.h` without NCCL, CUDA or a GPU: compiled with the headers of `testing/nccl-standin/shim`, which have as much of
//! both as it takes, and run over the stand-in for NCCL on the emulated GPU. `.ci/run` compiles it with the real ones.

use partialfc_testing::emulator;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use partialfc_testing::programs::{compile, link_shared, output, root, run, run_command, scratch, C};

/// Links with the stand-in and the emulator, which the program finds where they were built.
fn link_standin(command: &mut Command) {
    let built =
        [("nccl-standin", "libnccl.so.2"), ("cuda-emulator", "libcuda.so")].map(|(name, library)| emulator::build(name, library));
    for library in &built {
        let folder = library.parent().expect("a folder").display();
        command.arg(library).arg(format!("-Wl,-rpath,{folder}"));
    }
    command.args(["-ldl", "-lpthread", "-lm"]);
}

/// The program that trains over it, with the header of `include` or of a folder that goes before.
fn wrapped(name: &str, before: Option<&Path>) -> PathBuf {
    let program = scratch("programs").join(name);
    let mut command = Command::new("cc");
    command.args(C);
    command.args(before.map(|folder| format!("-I{}", folder.display())));
    command.args(
        ["include", "testing/nccl-standin/shim", "testing/nccl-standin", "testing/cuda-emulator"]
            .map(|folder| format!("-I{}", root().join(folder).display())),
    );
    command.arg(root().join("ctests/wrapped_nccl.c"));
    link_shared(&mut command);
    link_standin(&mut command);
    output(command.arg("-o").arg(&program));
    program
}

/// Included twice, from two files, in every language version, with no warning.
#[test]
fn the_header_in_all_languages() {
    let c = ["c99", "c11", "c17"].map(|version| ("cc", "c", version));
    let cpp = ["c++11", "c++14", "c++17", "c++20"].map(|version| ("c++", "c++", version));
    for (compiler, language, version) in c.into_iter().chain(cpp) {
        let program = scratch("languages").join(version);
        let mut command = compile(compiler);
        command.args(["-x", language, &format!("-std={version}"), "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Wconversion"]);
        command.args(["-Werror", "-O2", "-I"]).arg(root().join("testing/nccl-standin/shim"));
        command.args(["nccl_main.c", "nccl_other.c"].map(|file| root().join("ctests/headers").join(file))).args(["-x", "none"]);
        link_shared(&mut command);
        link_standin(&mut command);
        output(command.arg("-o").arg(&program));
        run(&program, &[]);
    }
}

/// One that is too old is refused by name, not by whatever it lacks.
#[test]
fn an_old_nccl_is_refused() {
    let folder = scratch("old");
    let header = fs::read_to_string(root().join("testing/nccl-standin/shim/nccl.h")).expect("the shim");
    let version = "#define NCCL_VERSION_CODE 23203";
    assert_eq!(header.matches(version).count(), 1);
    fs::write(folder.join("nccl.h"), header.replace(version, "#define NCCL_VERSION_CODE 21304")).expect("an old header");
    let mut command = Command::new("cc");
    command.args(["-fsyntax-only", "-std=c99", "-I"]).arg(&folder);
    command.args(["include", "testing/nccl-standin/shim"].map(|folder| format!("-I{}", root().join(folder).display())));
    let result = command.arg(root().join("ctests/headers/nccl_other.c")).output().expect("a compiler");
    let told = String::from_utf8_lossy(&result.stderr).into_owned();
    assert!(!result.status.success() && told.contains("partialfc_nccl.h needs NCCL 2.14 or later"), "{told}");
}

#[test]
fn heads_collectives_and_hangs_over_a_trainers_own_communicator() {
    let program = wrapped("wrapped", None);
    let printed = run_command(emulator::emulate(&mut Command::new(&program), 1), &program.with_extension("log"));
    assert!(printed.contains("every hang ended"), "{printed}");
}

/// The program would notice: here with a copy of the header in which a NaN loses.
#[test]
fn a_wrong_maximum_is_noticed() {
    let rule = "value > other || value != value";
    let header = fs::read_to_string(root().join("include/partialfc_nccl.h")).expect("include/partialfc_nccl.h");
    assert_eq!(header.matches(rule).count(), 1);
    let folder = scratch("wrong");
    fs::write(folder.join("partialfc_nccl.h"), header.replace(rule, "value > other")).expect("the wrong header");
    let result = emulator::emulate(&mut Command::new(wrapped("wrong", Some(&folder))), 1).output().expect("the program runs");
    let told = String::from_utf8_lossy(&result.stderr).into_owned();
    assert!(!result.status.success() && told.contains("all_reduce: wrong result"), "{told}");
}
