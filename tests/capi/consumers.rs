//! Programs of other projects: `ctests/consumers` has one in C and one in C++, which find the library by pkg-config, by CMake and by Meson
//! in an installed tree that was moved, and link the shared library and the static one.
//!
//! `PFC_REQUIRE_TOOLS=1` makes a missing tool a failure; without it what needs that tool is left out.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use partialfc_testing::programs::{fresh, libraries, output, root, run, scratch, tool};

/// `make` of the libraries that cargo built, by way of links in the directory.
pub(super) fn make(directory: &Path, target: &str, arguments: &[String]) {
    let build = directory.join("build");
    fresh(&build);
    symlink(&libraries().shared, build.join("libpartialfc.so")).expect("a link");
    symlink(&libraries().archive, build.join("libpartialfc.a")).expect("a link");
    output(Command::new("make").current_dir(root()).arg(target).arg(format!("BUILD={}", build.display())).args(arguments));
}

fn install(directory: &Path, arguments: &[String]) {
    make(directory, "install-files", arguments);
}

#[test]
fn programs_that_use_a_moved_installation() {
    if !tool("make") {
        return;
    }
    let directory = scratch("install");
    fresh(&directory);
    let prefix = directory.join("prefix");
    install(&directory, &[format!("PREFIX={}", prefix.display())]);
    let moved = directory.join("moved/elsewhere");
    fs::create_dir(directory.join("moved")).expect("a folder");
    fs::rename(&prefix, &moved).expect("the tree can be moved");
    build_consumers(&directory, &moved, "lib");
}

/// As packagers do it: below DESTDIR, in a folder of libraries that has the machine's name.
#[test]
fn programs_that_use_a_package_extracted_elsewhere() {
    if !tool("make") {
        return;
    }
    let directory = scratch("package");
    fresh(&directory);
    let staged = directory.join("staged");
    // Debian's compilers name a folder such as x86_64-linux-gnu, where CMake looks; others none.
    let machine = output(Command::new("cc").arg("-print-multiarch")).trim().to_owned();
    let lib = Path::new("lib").join(machine).display().to_string();
    install(&directory, &["PREFIX=/usr".to_owned(), format!("LIBDIR=/usr/{lib}"), format!("DESTDIR={}", staged.display())]);
    let mut installed: Vec<String> = fs::read_dir(&staged).expect("DESTDIR").map(|entry| name(&entry.expect("an entry"))).collect();
    assert_eq!(installed, ["usr"], "files outside PREFIX");
    installed = fs::read_dir(staged.join("usr/include")).expect("headers").map(|entry| name(&entry.expect("an entry"))).collect();
    let mut headers: Vec<String> =
        fs::read_dir(root().join("include")).expect("include").map(|entry| name(&entry.expect("an entry"))).collect();
    installed.sort();
    headers.sort();
    assert_eq!(installed, headers, "the headers that are installed (left) and that are there (right) differ");
    let extracted = directory.join("extracted");
    fs::rename(&staged, &extracted).expect("the tree can be moved");
    build_consumers(&directory, &extracted.join("usr"), &lib);
}

fn name(entry: &fs::DirEntry) -> String {
    entry.file_name().to_string_lossy().into_owned()
}

/// Builds the programs with all that finds libraries, and runs them. They know nothing but where the tree is now.
fn build_consumers(directory: &Path, prefix: &Path, lib: &str) {
    let consumers = root().join("ctests/consumers");
    let pkg_config = prefix.join(lib).join("pkgconfig");
    if tool("pkg-config") {
        let out = directory.join("pkg-config");
        fresh(&out);
        let mut make = Command::new("make");
        make.arg("-C").arg(consumers.join("pkg-config")).arg(format!("OUT={}", out.display()));
        output(make.env("PKG_CONFIG_PATH", &pkg_config));
        run_consumers(&out);
        if tool("meson") && tool("ninja") {
            let out = directory.join("meson");
            fresh(&out);
            output(Command::new("meson").arg("setup").arg(&out).arg(consumers.join("meson")).env("PKG_CONFIG_PATH", &pkg_config));
            output(Command::new("meson").args(["compile", "-C"]).arg(&out));
            run_consumers(&out);
        }
    }
    if tool("cmake") {
        let out = directory.join("cmake");
        fresh(&out);
        let mut cmake = Command::new("cmake");
        cmake.arg("-S").arg(consumers.join("cmake")).arg("-B").arg(&out);
        output(cmake.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display())));
        output(Command::new("cmake").arg("--build").arg(&out));
        run_consumers(&out);
    }
}

fn run_consumers(out: &Path) {
    for language in ["c", "cpp"] {
        for linkage in ["shared", "static"] {
            let program = out.join(format!("{linkage}-{language}"));
            let needs = output(Command::new("readelf").arg("-d").arg(&program)).contains("[libpartialfc.so.0]");
            assert_eq!(needs, linkage == "shared", "{} and the shared library", program.display());
            run(&program, &[]);
        }
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
    let project = "cmake_minimum_required(VERSION 3.13)\nproject(versions NONE)\nfind_package(partialfc ${WANTED} REQUIRED)\n";
    fs::write(directory.join("CMakeLists.txt"), project).expect("a project");
    let cases: [(&str, &[&str], &[&str]); 3] = [
        ("0.1.0", &["", "0", "0.1", "0.1.0"], &["0.1.1", "0.2", "1", "1.0"]),
        ("0.2.3", &["", "0", "0.1", "0.1.9", "0.2", "0.2.3"], &["0.2.4", "0.3", "1.0"]),
        ("1.0.0", &["", "1", "1.0"], &["0.1", "0.2", "1.1", "2"]),
    ];
    for (version, accepted, refused) in cases {
        let prefix = directory.join(version);
        install(&directory, &[format!("PREFIX={}", prefix.display()), format!("VERSION={version}")]);
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
