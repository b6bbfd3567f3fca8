//! C and C++ programs: what compiles them against the libraries that cargo built, and runs them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub const C: [&str; 7] = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror", "-O1"];
/// A program that runs longer is taken to hang.
const LONGEST: Duration = Duration::from_secs(300);

/// The package's folder, where cargo starts tests.
pub fn root() -> PathBuf {
    std::env::current_dir().expect("the working folder")
}

pub struct Libraries {
    pub shared: PathBuf,
    pub archive: PathBuf,
    /// Holds the links that the linker and the loader look for.
    pub links: PathBuf,
}

/// The libraries that cargo built along with this test.
pub fn libraries() -> &'static Libraries {
    static LIBRARIES: OnceLock<Libraries> = OnceLock::new();
    LIBRARIES.get_or_init(|| {
        let links = scratch("links");
        let libraries = Libraries { shared: newest("so"), archive: newest("a"), links: links.clone() };
        fresh(&links);
        for link in ["libpartialfc.so", "libpartialfc.so.0"] {
            symlink(&libraries.shared, links.join(link)).expect("a link");
        }
        libraries
    })
}

/// Cargo leaves them beside this test's binary or one folder up, with or without a hash in the name: the newest is this build's.
fn newest(extension: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let beside = test.parent().expect("a folder");
    let above = beside.parent().expect("a folder");
    [beside, above]
        .into_iter()
        .flat_map(|folder| fs::read_dir(folder).expect("the folder can be read"))
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension() == Some(OsStr::new(extension)))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libpartialfc")))
        .max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).expect("a time of writing"))
        .unwrap_or_else(|| panic!("cargo left no libpartialfc*.{extension} in {} or above", beside.display()))
}

pub fn compile(compiler: &str) -> Command {
    assert!(on_path(compiler), "there is no {compiler} on PATH: on Debian, apt-get install g++");
    let mut command = Command::new(compiler);
    command.arg("-I").arg(root().join("include"));
    command
}

pub fn link_shared(command: &mut Command) {
    let links = &libraries().links;
    command.arg("-L").arg(links).arg("-lpartialfc").arg(format!("-Wl,-rpath,{}", links.display()));
}

/// A folder of this test suite's own, `<target>/tmp/<suite>/<name>`; the suite is `<target>/<profile>/deps/<suite>-<hash>`.
pub fn scratch(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let file = test.file_name().expect("a name").to_string_lossy();
    let suite = file.rsplit_once('-').map_or(&*file, |(suite, _)| suite);
    let directory = test.ancestors().nth(3).expect("cargo's target folder").join("tmp").join(suite).join(name);
    fs::create_dir_all(&directory).expect("a folder under target/tmp");
    directory
}

pub fn fresh(directory: &Path) {
    if directory.exists() {
        fs::remove_dir_all(directory).expect("the folder can be removed");
    }
    fs::create_dir_all(directory).expect("the folder can be made");
}

/// Whether a tool is there that a contributor may lack; under PFC_REQUIRE_TOOLS it must be.
pub fn tool(name: &str) -> bool {
    let found = on_path(name);
    if !found {
        assert!(std::env::var_os("PFC_REQUIRE_TOOLS").is_none(), "there is no {name} on PATH: on Debian, apt-get install {name}");
        eprintln!("no {name} on PATH: what needs it is left out");
    }
    found
}

pub fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Runs a command that must succeed; its standard output.
pub fn output(command: &mut Command) -> String {
    let result = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&result.stdout), String::from_utf8_lossy(&result.stderr));
    assert!(result.status.success(), "{command:?}: {}\n{stdout}{stderr}", result.status);
    stdout.into_owned()
}

/// Runs a program that must succeed within the time; what it printed.
pub fn run(program: &Path, arguments: &[&Path]) -> String {
    run_command(Command::new(program).args(arguments), &program.with_extension("log"))
}

/// The same with more than arguments. `log`: where it prints to.
pub fn run_command(command: &mut Command, log: &Path) -> String {
    let file = fs::File::create(log).expect("the log can be written");
    command.stdin(Stdio::null()).stderr(file.try_clone().expect("the log twice")).stdout(file);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the program's status") {
            break Some(status);
        }
        if started.elapsed() > LONGEST {
            child.kill().expect("the program can be stopped");
            child.wait().expect("the program's status");
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let printed = String::from_utf8_lossy(&fs::read(log).expect("the log")).into_owned();
    let status = status.unwrap_or_else(|| panic!("{command:?} did not end within {LONGEST:?}\n{printed}"));
    assert!(status.success(), "{command:?}: {status}\n{printed}");
    printed
}
