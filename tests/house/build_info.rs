//! What `pfc_build_info` tells of the commit that the sources are of.

#[path = "../../build/commit.rs"]
mod commit;

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use commit::commit;
use partialfc::capi::status::pfc_build_info;

fn fresh(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME")).join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).expect("the folder can be removed");
    }
    fs::create_dir_all(&folder).expect("the folder can be made");
    folder
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    let author = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "init.defaultBranch=main"];
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(author)
        .args(arguments)
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .output()
        .expect("git runs");
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

/// A repository with one commit.
fn repository(name: &str) -> PathBuf {
    let folder = fresh(name);
    git(&folder, &["init", "--quiet"]);
    git(&folder, &["commit", "--quiet", "--allow-empty", "--message", "first"]);
    folder
}

fn head(folder: &Path) -> String {
    git(folder, &["rev-parse", "--short=12", "HEAD"])
}

#[test]
fn the_library_tells_the_commit_of_its_sources() {
    // SAFETY: a C string that lives for ever.
    let told = unsafe { CStr::from_ptr(pfc_build_info()) }.to_str().expect("UTF-8");
    let name = commit(Path::new(env!("CARGO_MANIFEST_DIR"))).name;
    assert!(told.contains(&format!("({name}, ")), "{told}: the sources are of {name}");
}

#[test]
fn a_crate_inside_another_repository_is_not_of_its_commit() {
    let package = repository("other").join("vendor/partialfc");
    fs::create_dir_all(&package).expect("a folder");
    let unknown = commit(&package);
    assert_eq!((unknown.name.as_str(), unknown.watched.len()), ("release", 0));
    let packed = r#"{ "git": { "sha1": "0123456789abcdef0123456789abcdef01234567", "dirty": true }, "path_in_vcs": "" }"#;
    fs::write(package.join(".cargo_vcs_info.json"), packed).expect("what cargo writes");
    assert_eq!(commit(&package).name, "0123456789ab");
}

#[test]
fn a_checkout_is_watched_for_the_next_commit() {
    let main = repository("checkout");
    let tree = main.parent().expect("a folder").join("worktree");
    if tree.exists() {
        fs::remove_dir_all(&tree).expect("the folder can be removed");
    }
    git(&main, &["worktree", "add", "--quiet", tree.to_str().expect("UTF-8")]);
    assert!(tree.join(".git").is_file());
    for folder in [main, tree] {
        let before = commit(&folder);
        assert_eq!(before.name, head(&folder));
        let read = |files: &[PathBuf]| -> Vec<String> {
            files.iter().map(|file| fs::read_to_string(file).expect("a file that is there")).collect()
        };
        let contents = read(&before.watched);
        git(&folder, &["commit", "--quiet", "--allow-empty", "--message", "second"]);
        let after = commit(&folder);
        assert!(after.name == head(&folder) && after.name != before.name);
        assert_ne!(read(&before.watched), contents, "{folder:?}: no watched file tells of the new commit");
    }
}
