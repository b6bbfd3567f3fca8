//! C and C++ programs that use the library as its users do, compiled by the system's compilers, linked with the shared library and
//! with the static one, and run. The programs are in `ctests/` and `examples/`; what they print is shown when they fail.
//!
//! `PFC_REQUIRE_TOOLS=1` makes a missing pkg-config, cmake or make a failure; without it what needs them is left out.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
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

/// Installs into a directory, moves it, and builds two programs that know nothing but where it is now.
#[test]
fn programs_that_use_the_installed_library() {
    let directory = scratch("install");
    fresh(&directory);
    let prefix = directory.join("prefix");
    let build = directory.join("build");
    fresh(&build);
    symlink(&libraries().shared, build.join("libpartialfc.so")).expect("a link");
    symlink(&libraries().archive, build.join("libpartialfc.a")).expect("a link");
    if !tool("make") {
        return;
    }
    let consumers = root().join("ctests/consumers");
    let make = |target: &str, arguments: &[String]| {
        output(Command::new("make").current_dir(root()).arg(target).arg(format!("BUILD={}", build.display())).args(arguments))
    };
    make("install-files", &[format!("PREFIX={}", prefix.display())]);

    // Staged, as packagers do it: the same files, and none but below DESTDIR.
    let staged = directory.join("staged");
    let debian = ["PREFIX=/usr".to_owned(), "LIBDIR=/usr/lib/x86_64-linux-gnu".to_owned()];
    let below = |folder: &Path| [&debian[..], &[format!("DESTDIR={}", folder.display())]].concat();
    make("install-files", &below(&staged));
    let mut installed = files_below(&staged.join("usr"));
    let version = env!("CARGO_PKG_VERSION");
    let headers = fs::read_dir(root().join("include")).expect("include");
    let mut expected: Vec<String> =
        headers.map(|entry| format!("include/{}", entry.expect("an entry").file_name().to_string_lossy())).collect();
    for file in [
        "libpartialfc.a",
        "libpartialfc.so",
        "libpartialfc.so.0",
        &format!("libpartialfc.so.{version}"),
        "pkgconfig/partialfc.pc",
        "cmake/partialfc/partialfcConfig.cmake",
        "cmake/partialfc/partialfcConfigVersion.cmake",
    ] {
        expected.push(format!("lib/x86_64-linux-gnu/{file}"));
    }
    installed.sort();
    expected.sort();
    assert_eq!(installed, expected, "installed (left) and meant (right)");
    let config = staged.join("usr/lib/x86_64-linux-gnu/cmake/partialfc/partialfcConfig.cmake");
    let config = fs::read_to_string(config).expect("the CMake package");
    assert!(config.contains("${_partialfc_lib}/../../include"), "{config}");

    // Moved, it serves; what was installed goes, also of earlier versions, and what else is there stays.
    let carried = directory.join("carried");
    fs::rename(&staged, &carried).expect("the tree can be moved");
    if tool("pkg-config") {
        let pc = carried.join("usr/lib/x86_64-linux-gnu/pkgconfig");
        for define_prefix in ["--define-prefix", "--dont-define-prefix"] {
            let ask = |questions: &[&str]| {
                let mut command = Command::new("pkg-config");
                output(command.arg(define_prefix).args(questions).arg("partialfc").env("PKG_CONFIG_PATH", &pc))
            };
            assert_eq!(ask(&["--modversion"]).trim(), version);
            let flags = ask(&["--cflags", "--libs"]);
            let program = directory.join("consumer");
            let mut command = Command::new("cc");
            command.arg(consumers.join("main.c")).args(flags.split_whitespace()).arg("-o").arg(&program);
            output(&mut command);
            output(Command::new(&program).env("LD_LIBRARY_PATH", carried.join("usr/lib/x86_64-linux-gnu")));
        }
    }
    let others = ["include/other.h", "lib/x86_64-linux-gnu/libother.so"];
    let earlier = "lib/x86_64-linux-gnu/libpartialfc.so.0.1.0";
    others.iter().chain([&earlier]).for_each(|file| fs::write(carried.join("usr").join(file), "").expect("a file"));
    make("uninstall", &below(&carried));
    let mut left = files_below(&carried.join("usr"));
    left.sort();
    assert_eq!(left, others);

    let moved = directory.join("moved/elsewhere");
    fs::create_dir(directory.join("moved")).expect("a folder");
    fs::rename(&prefix, &moved).expect("the tree can be moved");
    if tool("pkg-config") {
        let out = directory.join("pkg-config");
        fresh(&out);
        output(
            Command::new("make")
                .arg("-C")
                .arg(consumers.join("pkg-config"))
                .arg(format!("OUT={}", out.display()))
                .env("PKG_CONFIG_PATH", moved.join("lib/pkgconfig")),
        );
        run(&out.join("shared"), &[]);
        run(&out.join("static"), &[]);
    }
    if tool("cmake") {
        let out = directory.join("cmake");
        fresh(&out);
        output(
            Command::new("cmake")
                .arg("-S")
                .arg(consumers.join("cmake"))
                .arg("-B")
                .arg(&out)
                .arg(format!("-DCMAKE_PREFIX_PATH={}", moved.display())),
        );
        output(Command::new("cmake").arg("--build").arg(&out));
        run(&out.join("shared"), &[]);
        run(&out.join("static"), &[]);
    }
}

/// The files below a folder, links too.
fn files_below(folder: &Path) -> Vec<String> {
    let found = output(Command::new("find").args([".", "-not", "-type", "d"]).current_dir(folder));
    found.lines().map(|line| line.trim_start_matches("./").to_owned()).collect()
}

/// The tarball holds what `make install` installs, and its bytes do not depend on who packs it and when.
#[test]
fn the_tarball_of_the_installed_tree() {
    if !tool("make") {
        return;
    }
    let directory = scratch("dist");
    let name = format!("partialfc-{}-{}-linux-gnu", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
    let pack = |mask: &str| {
        let folder = directory.join(mask);
        fresh(&folder);
        fs::copy(&libraries().shared, folder.join("libpartialfc.so")).expect("a copy");
        fs::write(folder.join("libpartialfc.a"), "in place of the archive, which takes long to pack").expect("a file");
        let make = format!("umask {mask} && make -s dist-files BUILD='{0}' DIST='{0}/dist'", folder.display());
        output(Command::new("sh").arg("-c").arg(make).current_dir(root()));
        folder.join("dist").join(format!("{name}.tar.gz"))
    };
    let [first, second] = ["022", "077"].map(pack);
    assert!(fs::read(&first).expect("a tarball") == fs::read(&second).expect("a tarball"), "{} differs", second.display());

    let folder = directory.join("tree");
    fresh(&folder);
    output(Command::new("tar").arg("xzf").arg(&first).arg("-C").arg(&folder));
    let tree = folder.join(&name);
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "README.md", "CHANGELOG.md", "lib/libpartialfc.so.0", "include/partialfc.h"] {
        assert!(tree.join(file).exists(), "the tarball lacks {file}");
    }
    let program = directory.join("consumer");
    let mut command = Command::new("cc");
    command.arg(root().join("ctests/consumers/main.c")).arg("-I").arg(tree.join("include")).arg("-L").arg(tree.join("lib"));
    output(command.arg("-lpartialfc").arg(format!("-Wl,-rpath,{}", tree.join("lib").display())).arg("-o").arg(&program));
    output(&mut Command::new(&program));
    fs::remove_dir_all(&directory).expect("the folder goes");
}

/// Crate, wheel, tarball, header and documents say one version: that of Cargo.toml's workspace. The header's and what is installed
/// have their own tests, the wheel's is in .ci/python.
#[test]
fn one_version() {
    let version = env!("CARGO_PKG_VERSION");
    let text = |file: &str| fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    // The Makefile and pyproject.toml take the first such line, and there is no other.
    let cargo = text("Cargo.toml");
    let lines: Vec<&str> = cargo.lines().filter(|line| line.starts_with("version = ")).collect();
    assert_eq!(lines, [format!("version = \"{version}\"")]);
    assert!(cargo.contains(&format!("nccl-sys = {{ version = \"{version}\", path")), "Cargo.toml wants another nccl-sys");
    assert!(text("pyproject.toml").contains("path = \"Cargo.toml\""), "the wheel has a version of its own");
    let changes = text("CHANGELOG.md");
    let newest = changes.lines().find_map(|line| line.strip_prefix("## "));
    assert_eq!(newest, Some(version), "CHANGELOG.md's newest version");
    let (short, _) = version.rsplit_once('.').expect("a patch version");
    assert!(text("README.md").contains(&format!("| version {short} |")), "README.md's table is of another version");
}

/// CMake takes a later version with the same SONAME, that is of the same major version.
#[test]
fn versions_that_cmake_accepts() {
    if !tool("make") || !tool("cmake") {
        return;
    }
    let directory = scratch("versions");
    fresh(&directory);
    let build = directory.join("build");
    fresh(&build);
    symlink(&libraries().shared, build.join("libpartialfc.so")).expect("a link");
    symlink(&libraries().archive, build.join("libpartialfc.a")).expect("a link");
    let project = "cmake_minimum_required(VERSION 3.13)\nproject(versions NONE)\nfind_package(partialfc ${WANTED} REQUIRED)\n";
    fs::write(directory.join("CMakeLists.txt"), project).expect("a project");
    let cases: [(&str, &[&str], &[&str]); 3] = [
        ("0.1.0", &["", "0", "0.1", "0.1.0"], &["0.1.1", "0.2", "1", "1.0"]),
        ("0.2.3", &["", "0", "0.1", "0.1.9", "0.2", "0.2.3"], &["0.2.4", "0.3", "1.0"]),
        ("1.0.0", &["", "1", "1.0"], &["0.1", "0.2", "1.1", "2"]),
    ];
    for (version, accepted, refused) in cases {
        let prefix = directory.join(version);
        output(Command::new("make").current_dir(root()).arg("install-files").args([
            format!("BUILD={}", build.display()),
            format!("PREFIX={}", prefix.display()),
            format!("VERSION={version}"),
        ]));
        for (wanted, works) in accepted.iter().map(|wanted| (wanted, true)).chain(refused.iter().map(|wanted| (wanted, false))) {
            let out = directory.join("out");
            fresh(&out);
            let result = Command::new("cmake")
                .arg("-S")
                .arg(&directory)
                .arg("-B")
                .arg(&out)
                .args([format!("-DCMAKE_PREFIX_PATH={}", prefix.display()), format!("-DWANTED={wanted}")])
                .output()
                .expect("cmake runs");
            let stderr = String::from_utf8_lossy(&result.stderr);
            assert_eq!(result.status.success(), works, "{version} for find_package(partialfc {wanted}): {stderr}");
            assert!(works || stderr.contains("compatible with requested version"), "{stderr}");
        }
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
fn declared_functions() -> Vec<(String, bool)> {
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
fn build(name: &str, sources: &[&str]) -> [PathBuf; 2] {
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
