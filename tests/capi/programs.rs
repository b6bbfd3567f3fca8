//! C and C++ programs that use the library as its users do, compiled by the system's compilers, linked with the shared library and
//! with the static one, and run. The programs are in `ctests/` and `examples/`; what they print is shown when they fail.
//!
//! `PFC_REQUIRE_TOOLS=1` makes a missing pkg-config, cmake, make or clang++ a failure; without it what needs them is left out.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;

use partialfc::capi::checkpoint::{pfc_load_options, pfc_save_options};
use partialfc::capi::classes::pfc_remap_options;
use partialfc::capi::comm::{pfc_comm_ops, pfc_traffic};
use partialfc::capi::forward::{pfc_backward_options, pfc_forward_options};
use partialfc::capi::metrics::pfc_metrics;
use partialfc::capi::plan::pfc_plan_report;
use partialfc::capi::types::{pfc_head_options, pfc_margin, pfc_matrix, pfc_optimizer};
use partialfc::capi::update::pfc_update_options;
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
    let listing = output(Command::new("nm").args(["-D", "--defined-only"]).arg(&libraries().shared));
    let exported: BTreeSet<String> = listing.lines().filter_map(|line| line.split(' ').nth(2)).map(str::to_owned).collect();
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

macro_rules! layouts {
    ($($type:ident { $($field:ident),* $(,)? })*) => {{
        let mut lines: Vec<(String, String)> = Vec::new();
        $(
            // Names every field, so that a new one does not compile until it stands in the list.
            let _ = |value: $type| { let $type { $($field: _),* } = value; };
            lines.push((
                format!("STRUCT({})", stringify!($type)),
                format!("{} {}", stringify!($type), std::mem::size_of::<$type>()),
            ));
            $(lines.push((
                format!("FIELD({}, {})", stringify!($type), stringify!($field)),
                format!(
                    "{}.{} {} {}",
                    stringify!($type),
                    stringify!($field),
                    std::mem::offset_of!($type, $field),
                    size_of_field(|value: &$type| &value.$field),
                ),
            ));)*
        )*
        lines
    }};
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    std::mem::size_of::<F>()
}

#[test]
fn structs_lie_in_c_and_python_as_in_rust() {
    let lines = layouts! {
        pfc_matrix { data, dtype, reserved, rows, cols, row_stride }
        pfc_head_options {
            struct_size, num_classes, embedding_dim, placement, sample_rate, seed, max_batch, scale, m1, m2, m3, interclass_filter,
            margin_gradient, margin_guard, optimizer, row_update, momentum, weight_decay, beta1, beta2, epsilon, gradient_scale,
            init_std, ignore_label, precision, gather_dtype, weight_dtype, state_dtype, residency, reserved, workspace_limit,
            storage_path, row_terms, sample_block, storage_cache,
        }
        pfc_margin { struct_size, scale, m1, m2, m3, interclass_filter, margin_gradient, margin_guard }
        pfc_optimizer { struct_size, kind, reserved, momentum, weight_decay, beta1, beta2, epsilon }
        pfc_comm_ops {
            struct_size, ctx, rank, size, flags, reserved, all_gather, all_reduce, reduce_scatter, broadcast, barrier, abort,
            async_error, error_string, free,
        }
        pfc_traffic {
            all_gather_calls, all_gather_bytes, all_reduce_calls, all_reduce_bytes, reduce_scatter_calls, reduce_scatter_bytes,
            broadcast_calls, broadcast_bytes, barrier_calls,
        }
        pfc_metrics {
            struct_size, updates, draws, rows, valid_rows, sample_size, loss, top1, mean_target_cosine, grad_embeddings_norm,
            grad_centers_norm, seconds_gather, seconds_sample, seconds_forward, seconds_reduce, seconds_backward, seconds_update,
            skipped_updates,
        }
        pfc_update_options { struct_size, learning_rate, factor, device_factor, reserved }
        pfc_forward_options { struct_size, m2, m3, weight, reserved }
        pfc_backward_options { struct_size, loss_weight, loss_scale, grad_m2, grad_m3, reserved }
        pfc_save_options { struct_size, progress, user }
        pfc_load_options { struct_size, progress, user, class_map, class_map_count, class_weights, class_weights_count }
        pfc_remap_options { struct_size, progress, user, class_weights, class_weights_count }
        pfc_plan_report {
            struct_size, shard_rows, sample_capacity, weight_bytes, state_bytes, activation_bytes, probability_bytes, total_bytes,
            labels_bytes, embeddings_bytes, sums_bytes, grad_embeddings_bytes, grad_centers_bytes, traffic_bytes, storage_bytes, host_bytes,
        }
    };
    let listed: BTreeSet<&str> =
        lines.iter().filter(|(c, _)| c.starts_with("STRUCT")).filter_map(|(_, r)| r.split(' ').next()).collect();
    let header = header();
    let declared: BTreeSet<&str> =
        header.lines().filter_map(|line| line.strip_prefix("typedef struct ")?.strip_suffix(" {")).collect();
    assert_eq!(listed, declared, "structs of this list (left) and of the header (right) differ");

    let requests: String = lines.iter().map(|(request, _)| format!("{request}\n")).collect();
    let fields = scratch("offsets").join("fields.inc");
    fs::write(&fields, requests).expect("fields.inc can be written");
    let expected: Vec<&str> = lines.iter().map(|(_, layout)| layout.as_str()).collect();
    for program in build("offsets", &["ctests/offsets.c"]) {
        let printed = run(&program, &[]);
        assert_eq!(printed.lines().collect::<Vec<_>>(), expected, "C (left) and Rust (right) differ");
    }
    if tool("python3") {
        let mut command = Command::new("python3");
        command.args(["ctests/offsets.py", "python/partialfc/_abi.py"].map(|file| root().join(file))).arg(fields);
        assert_eq!(output(&mut command).lines().collect::<Vec<_>>(), expected, "Python (left) and Rust (right) differ");
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
    let make = |arguments: &[String]| {
        output(
            Command::new("make").current_dir(root()).arg("install-files").arg(format!("BUILD={}", build.display())).args(arguments),
        )
    };
    make(&[format!("PREFIX={}", prefix.display())]);

    // Staged, as packagers do it: the same files, and none but below DESTDIR.
    let staged = directory.join("staged");
    make(&["PREFIX=/usr".to_owned(), format!("DESTDIR={}", staged.display()), "LIBDIR=/usr/lib/here".to_owned()]);
    for file in [
        "include/partialfc.h",
        "include/partialfc.hpp",
        "include/partialfc_mpi.h",
        "include/partialfc_nccl.h",
        "lib/here/libpartialfc.so.0",
        "lib/here/libpartialfc.a",
        "lib/here/pkgconfig/partialfc.pc",
    ] {
        assert!(staged.join("usr").join(file).exists(), "{file} was not installed");
    }
    let config = fs::read_to_string(staged.join("usr/lib/here/cmake/partialfc/partialfcConfig.cmake")).expect("the CMake package");
    assert!(config.contains("${_partialfc_lib}/../../include"), "{config}");

    let moved = directory.join("moved/elsewhere");
    fs::create_dir(directory.join("moved")).expect("a folder");
    fs::rename(&prefix, &moved).expect("the tree can be moved");
    let consumers = root().join("ctests/consumers");
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
