//! What is released: the tree that `make install` makes, which goes by `make uninstall`, its tarball, and the version that all say.

use std::fs;
use std::path::Path;
use std::process::Command;

use partialfc_testing::programs::{fresh, libraries, output, root, scratch, tool};

use super::consumers::make;

/// Below DESTDIR, as packagers do it. Moved, it serves; what was installed goes, also of earlier versions, and what else is there stays.
#[test]
fn an_installation_is_complete_and_goes_again() {
    if !tool("make") {
        return;
    }
    let directory = scratch("uninstall");
    fresh(&directory);
    let below = |folder: &str| {
        let folder = directory.join(folder).display().to_string();
        ["PREFIX=/usr".to_owned(), "LIBDIR=/usr/lib/x86_64-linux-gnu".to_owned(), format!("DESTDIR={folder}")]
    };
    make(&directory, "install-files", &below("staged"));
    let staged = directory.join("staged");
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
            command.arg(root().join("ctests/consumers/main.c")).args(flags.split_whitespace()).arg("-o").arg(&program);
            output(&mut command);
            output(Command::new(&program).env("LD_LIBRARY_PATH", carried.join("usr/lib/x86_64-linux-gnu")));
        }
    }
    let others = ["include/other.h", "lib/x86_64-linux-gnu/libother.so"];
    let earlier = "lib/x86_64-linux-gnu/libpartialfc.so.0.1.0";
    others.iter().chain([&earlier]).for_each(|file| fs::write(carried.join("usr").join(file), "").expect("a file"));
    make(&directory, "uninstall", &below("carried"));
    let mut left = files_below(&carried.join("usr"));
    left.sort();
    assert_eq!(left, others);
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
