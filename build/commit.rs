//! The commit that a package's sources are of.

use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Commit {
    /// Its first 12 digits, or "release" where it is not known.
    pub name: String,
    /// Files that change when another commit is checked out or made.
    pub watched: Vec<PathBuf>,
}

/// A packed crate says itself what it was packed from. Of git the answer counts only where the package is the repository's top
/// folder: a crate whose sources lie inside another project's repository is not of that project's commit.
pub fn commit(package: &Path) -> Commit {
    if let Some(digits) = packed_from(package) {
        return Commit { name: first(&digits), watched: Vec::new() };
    }
    checked_out(package).unwrap_or_else(|| Commit { name: "release".to_owned(), watched: Vec::new() })
}

fn first(digits: &str) -> String {
    digits.chars().take(12).collect()
}

/// What cargo wrote beside the sources that it packed.
fn packed_from(package: &Path) -> Option<String> {
    let text = std::fs::read_to_string(package.join(".cargo_vcs_info.json")).ok()?;
    let (_, rest) = text.split_once("\"sha1\"")?;
    rest.split('"').nth(1).map(str::to_owned)
}

fn checked_out(package: &Path) -> Option<Commit> {
    // In a worktree .git is a file: git knows where HEAD is. HEAD itself names a branch; its log grows with each commit.
    let output = Command::new("git")
        .arg("-C")
        .arg(package)
        .args(["rev-parse", "--show-toplevel", "--git-path", "HEAD", "--git-path", "logs/HEAD", "HEAD"])
        .env_remove("GIT_DIR") // A hook's is of whatever repository it runs for.
        .env_remove("GIT_WORK_TREE")
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    let [top, head, log, digits] = text.lines().collect::<Vec<_>>().try_into().ok()?;
    let same = Path::new(top).canonicalize().ok()? == package.canonicalize().ok()?;
    same.then(|| Commit {
        name: first(digits),
        watched: [head, log].map(|file| package.join(file)).into_iter().filter(|file| file.exists()).collect(),
    })
}
