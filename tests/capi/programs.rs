//! C and C++ programs that use the library as its users do, compiled by the system's compilers, linked with the shared library and
//! with the static one, and run. The programs are in `ctests/` and `examples/`; what they print is shown when they fail.
//!
//! `PFC_REQUIRE_TOOLS=1` makes a missing pkg-config, cmake, make or clang++ a failure; without it what needs them is left out.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use partialfc_testing::programs::{compile, fresh, libraries, link_shared, output, root, run, scratch, tool, C};

/// What the static library needs, as packaging/partialfc.pc.in tells users.
const NATIVE_LIBRARIES: [&str; 7] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lc"];
const CPP: [&str; 6] = ["-std=c++17", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1"];

#[test]
fn train_in_c() {
    for program in build("train", &["examples/01_c/train.c"]) {
        run(&program, &[]);
    }
}

#[test]
fn train_in_cpp_on_two_ranks() {
    for program in build("train_cpp", &["examples/02_cpp/train.cpp"]) {
        run(&program, &[]);
    }
}

#[test]
fn train_over_a_communicator_of_the_callers_own() {
    for program in build("custom_comm", &["examples/03_custom_comm/custom_comm.c"]) {
        run(&program, &[]);
    }
}

#[test]
fn a_step_made_of_kernels() {
    for program in build("kernels", &["examples/04_kernels/kernels.c"]) {
        run(&program, &[]);
    }
}

/// The published figures stand as they are; ours follow the options, by the formulas that are printed.
#[test]
fn the_published_table_beside_ours() {
    for program in build("plan", &["examples/07_plan/plan.c"]) {
        let published = ["19.07 GB", "298 MB", "156 GB", "2.44 GB", "250 MB", "384 KB", "32 KB", "38 GB", "505 MB", "488 MB"];
        for (ranks, batch, dim, classes) in [(64u64, 64u64, 512u64, 10_000_000u64), (8, 16, 100, 999_999)] {
            let options = [("--ranks", ranks), ("--batch", batch), ("--dim", dim), ("--classes", classes)];
            let text =
                output(Command::new(&program).args(options.iter().flat_map(|(name, value)| [name.to_string(), value.to_string()])));
            published.iter().for_each(|figure| assert!(text.contains(figure), "{figure}: {text}"));
            let (rows, shard) = (ranks * batch, classes.div_ceil(ranks));
            let (labels, embeddings, sums) = (8 * (batch + 12), 4 * batch * dim, 4 * (2 * rows + 4));
            for ours in [
                format!("{} = 4 C d", 4 * classes * dim),
                format!("{} = 4 c d", 4 * shard * dim),
                format!("{} = 8 (b + 12) + 4 b d", labels + embeddings),
                format!("{sums} = 4 (2 B + 4)"),
                format!("{} = 4 B d", 4 * rows * dim),
                format!("{} = 8 (b + 12) + 4 b d + 4 (2 B + 4) + 4 B d", labels + embeddings + sums + 4 * rows * dim),
            ] {
                assert!(text.contains(&ours), "{ours}: {text}");
            }
        }
        let refused = Command::new(&program).args(["--ranks", "many"]).output().expect("the program runs");
        assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--ranks is 'many'"));
    }
}

#[test]
fn errors_as_a_c_program_sees_them() {
    for program in build("errors", &["ctests/errors.c"]) {
        run(&program, &[]);
    }
}

#[test]
fn errors_as_two_ranks_see_them() {
    for program in build("errors_ranks", &["ctests/errors_ranks.c"]) {
        run(&program, &[]);
    }
}

/// Destructors of pthread keys and of C++'s thread_local objects call the library when its own thread-local data are gone.
#[test]
fn calls_on_a_thread_that_is_ending() {
    for source in ["ctests/ending_thread.c", "ctests/ending_thread.cpp"] {
        for program in build(&source.replace(['/', '.'], "_"), &[source]) {
            run(&program, &[]);
        }
    }
}

#[test]
fn the_callers_functions_are_left_to_end_and_never_called_for_nothing() {
    for program in build("callers_functions", &["ctests/callers_functions.c"]) {
        run(&program, &[]);
    }
}

#[test]
fn the_callers_rounding_changes_no_bit() {
    for program in build("float_settings", &["ctests/float_settings.c"]) {
        run(&program, &[]);
    }
}

#[test]
fn a_head_of_many_classes_is_made_at_once() {
    for program in build("many_classes", &["ctests/many_classes.c"]) {
        run(&program, &[]);
    }
}

/// The user of a set-user-ID program chooses its environment, but not what it loads and writes.
#[test]
fn a_program_with_more_rights_than_its_user_ignores_the_environment() {
    let [_, program] = build("privileged", &["ctests/privileged.c"]);
    let folder = std::env::temp_dir().join(format!("pfc-privileged-{}", std::process::id()));
    fresh(&folder);
    let (copy, trace) = (folder.join("program"), folder.join("trace.json"));
    fs::copy(program, &copy).expect("a copy");
    let settings = |command: &mut Command| {
        let library = folder.join("no_library_here.so");
        output(command.env("PFC_CHECK", "perhaps").env("PFC_CPU", "perhaps").env("PFC_TRACE", &trace).env("PFC_NCCL_LIB", library))
    };
    let plain = settings(&mut Command::new(&copy));
    assert!(plain.starts_with("privileged 0\nPFC_CHECK PFC_CHECK must be") && plain.contains("PFC_NCCL_LIB is loaded"), "{plain}");

    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("a folder for all");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755)).expect("a set-user-ID program");
    // SAFETY: a question.
    let root = unsafe { libc::geteuid() } == 0;
    if root && tool("setpriv") {
        let as_nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        let told = settings(Command::new("setpriv").args(as_nobody).arg(&copy));
        if told.starts_with("privileged 1\n") {
            assert_eq!(told, "privileged 1\nPFC_CHECK is ignored\nPFC_NCCL_LIB is ignored\n");
            assert!(!trace.exists(), "a trace where the user wants one");
        } else {
            eprintln!("set-user-ID programs get no rights in {}: left out", folder.display());
        }
    } else {
        eprintln!("a set-user-ID program of another user needs root and setpriv: left out");
    }
    fs::remove_dir_all(&folder).expect("the folder goes");
}

#[test]
fn conformance_vectors_through_the_c_interface() {
    let mut files: Vec<PathBuf> = fs::read_dir(root().join("testing/vectors"))
        .expect("testing/vectors")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension() == Some(OsStr::new("safetensors")))
        .collect();
    files.sort();
    assert_eq!(files.len(), 8, "the conformance files");
    for program in build("conformance", &["ctests/conformance.c"]) {
        for file in &files {
            run(&program, &[file]);
        }
    }
}

/// With the compiler's own checks: every handle is freed with all that it holds, and no buffer of a program is overrun.
#[test]
fn nothing_leaks() {
    let sources =
        ["ctests/errors.c", "ctests/errors_ranks.c", "examples/03_custom_comm/custom_comm.c", "examples/04_kernels/kernels.c"];
    for source in sources {
        let program = scratch("sanitized").join(source.replace('/', "_"));
        let mut command = compile("cc");
        command.args(C).args(["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]);
        command.arg(root().join(source));
        link_shared(&mut command);
        output(command.args(["-lm", "-lpthread", "-o"]).arg(&program));
        run(&program, &[]);
    }
}

/// The program that holds the head to the vectors would notice: here one setting of a file is not what its tensors were made with.
#[test]
fn a_wrong_conformance_file_is_noticed() {
    let mut file = fs::read(root().join("testing/vectors/sphereface_one_rank.safetensors")).expect("a conformance file");
    let setting = b"\"lr\":\"0.1\"";
    let at = file.windows(setting.len()).position(|bytes| bytes == setting).expect("the file's learning rate");
    file[at + setting.len() - 2] = b'3';
    let wrong = scratch("conformance_wrong").join("wrong.safetensors");
    fs::write(&wrong, file).expect("the wrong file can be written");
    let [shared, _] = build("conformance_wrong", &["ctests/conformance.c"]);
    let result = Command::new(shared).arg(wrong).output().expect("the program runs");
    let stderr = String::from_utf8_lossy(&result.stderr);
    assert!(!result.status.success() && stderr.contains("weight_final differs by"), "{stderr}");
}

#[test]
fn the_example_of_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let example = readme.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).expect("README.md has a C example");
    let source = scratch("readme").join("example.c");
    fs::write(&source, example).expect("the example can be written");
    for program in build("readme", &[source.to_str().expect("a path in UTF-8")]) {
        run(&program, &[]);
    }
}

#[test]
fn every_declared_function_links() {
    let functions: String = declared_functions().iter().map(|(name, _)| format!("FUNCTION({name})\n")).collect();
    fs::write(scratch("symbols").join("functions.inc"), functions).expect("functions.inc can be written");
    for program in build("symbols", &["ctests/symbols.c"]) {
        run(&program, &[]);
    }
}

#[test]
fn only_the_headers_functions_are_exported() {
    let exported = exported();
    let declared: BTreeSet<String> = declared_functions().into_iter().filter(|(_, inline)| !inline).map(|(name, _)| name).collect();
    assert_eq!(exported, declared, "exported (left) and declared (right) differ");
}

#[test]
fn the_shared_library_has_its_name_and_stays_loaded() {
    let dynamic = output(Command::new("readelf").arg("-d").arg(&libraries().shared));
    assert!(dynamic.contains("soname: [libpartialfc.so.0]"), "{dynamic}");
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
    let makefile = fs::read_to_string(root().join("Makefile")).expect("Makefile");
    assert!(makefile.contains("SONAME  := libpartialfc.so.0\n"), "the Makefile and build.rs name different SONAMEs");
}

#[test]
fn no_gpu_or_mpi_library_is_needed() {
    let needed = output(Command::new("ldd").arg(&libraries().shared)).to_lowercase();
    for name in ["cuda", "cudart", "cublas", "nccl", "mpi", "nvrtc"] {
        assert!(!needed.contains(&format!("lib{name}")), "{needed}");
    }
}

/// Included twice, from two files, in every language version, with no warning.
#[test]
fn the_header_in_all_languages() {
    let directory = scratch("languages");
    let c = ["c99", "c11", "c17", "c2x"].map(|version| ("cc", "c", version));
    let cpp = ["c++11", "c++14", "c++17", "c++20"].map(|version| ("c++", "c++", version));
    for (compiler, language, version) in c.into_iter().chain(cpp) {
        let program = directory.join(version);
        let mut command = compile(compiler);
        command.args([
            "-x",
            language,
            &format!("-std={version}"),
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Wshadow",
            "-Wconversion",
            "-Werror",
        ]);
        command.arg(if language == "c" { "-Wstrict-prototypes" } else { "-Wold-style-cast" });
        command.args(["partialfc_main.c", "partialfc_other.c"].map(|file| root().join("ctests/headers").join(file)));
        link_shared(&mut command);
        output(command.arg("-o").arg(&program));
        run(&program, &[]);
    }
}

/// The symbols of the shared library.
pub fn exported() -> BTreeSet<String> {
    let listing = output(Command::new("nm").args(["-D", "--defined-only"]).arg(&libraries().shared));
    listing.lines().filter_map(|line| line.split(' ').nth(2)).map(str::to_owned).collect()
}

fn header() -> String {
    fs::read_to_string(root().join("include/partialfc.h")).expect("include/partialfc.h")
}

/// Names of the functions that the header declares, and whether they are inline.
pub fn declared_functions() -> Vec<(String, bool)> {
    let functions: Vec<(String, bool)> = header()
        .lines()
        .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()) && !line.starts_with("typedef"))
        .filter_map(|line| {
            let (before, _) = line.split_once('(')?;
            let name = before.rsplit([' ', '*']).next()?;
            name.starts_with("pfc_").then(|| (name.to_owned(), line.starts_with("static inline")))
        })
        .collect();
    assert!(functions.len() > 50, "found {} functions in the header", functions.len());
    functions
}

/// Compiles a program twice: against the shared library and against the static one.
pub fn build(name: &str, sources: &[&str]) -> [PathBuf; 2] {
    let directory = scratch(name);
    let cpp = sources[0].ends_with(".cpp");
    ["shared", "static"].map(|linkage| {
        let program = directory.join(linkage);
        let mut command = compile(if cpp { "c++" } else { "cc" });
        command.args(if cpp { &CPP[..] } else { &C[..] }).arg("-I").arg(&directory);
        command.args(sources.iter().map(|source| root().join(source)));
        if linkage == "shared" {
            link_shared(&mut command);
        } else {
            command.arg(&libraries().archive).args(NATIVE_LIBRARIES);
        }
        output(command.args(["-lm", "-lpthread", "-o"]).arg(&program));
        program
    })
}
