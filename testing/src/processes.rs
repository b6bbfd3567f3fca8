//! Commands that start processes of their own: watched, and ended with all that they started; and the environment in which they find
//! emulated GPUs and the stand-in for NCCL.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::{emulator, nccl};

/// A run that takes longer is taken to hang.
const LONGEST: Duration = Duration::from_secs(240);
/// In the environment of every process that a run starts.
const TOKEN: &str = "PFC_TEST_RUN";
/// The same: where they may append what their parent might lose.
const LOG: &str = "PFC_TEST_LOG";

/// What the stand-in for NCCL and the emulator say of a program that does what NCCL or CUDA forbid.
const FINDINGS: [&str; 2] = ["standin: ", "simt: "];

/// Gives what a command starts that many emulated GPUs each, and the stand-in for NCCL. Neither is loaded into this process.
pub fn on_emulated_gpus(command: &mut Command, count: usize) -> &mut Command {
    emulator::emulate(command, count).env("PFC_NCCL_LIB", nccl::library())
}

/// What was printed must hold no finding.
pub fn assert_no_findings(printed: &str) {
    assert!(!FINDINGS.iter().any(|mark| printed.contains(mark)), "{printed}");
}

/// A command with all that it starts, ended with it.
pub struct Run {
    child: Child,
    token: String,
    pub log: PathBuf,
    pub what: String,
}

impl Run {
    pub fn start(command: &mut Command, log: PathBuf) -> Run {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let token = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        fs::File::create(&log).expect("the log can be written");
        let file = fs::File::options().append(true).open(&log).expect("the log");
        command
            .env(TOKEN, &token)
            .env(LOG, &log)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("the log twice"))
            .stderr(file);
        let what = format!("{command:?}");
        let child = command.process_group(0).spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        Run { child, token, log, what }
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn printed(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("the log")).into_owned()
    }

    /// Waits until `done` or until the launcher has ended.
    pub fn wait_for(&mut self, done: impl Fn() -> bool) {
        let started = Instant::now();
        while !done() && self.child.try_wait().expect("the launcher's status").is_none() {
            assert!(started.elapsed() < LONGEST, "{} did not get on within {LONGEST:?}\n{}", self.what, self.printed());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the launcher's end and for that of all it started; whether it succeeded, and what was printed.
    pub fn finish(mut self) -> (bool, String) {
        self.wait_for(|| false);
        let success = self.child.wait().expect("the launcher's status").success();
        let started = Instant::now();
        while !living(&self.token).is_empty() {
            assert!(started.elapsed() < LONGEST / 4, "{} left processes behind\n{}", self.what, self.printed());
            std::thread::sleep(Duration::from_millis(10));
        }
        (success, self.printed())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.try_wait();
        living(&self.token).into_iter().for_each(kill);
        let _ = self.child.wait();
    }
}

/// The living processes with a token in their environment.
fn living(token: &str) -> Vec<i32> {
    let mark = format!("{TOKEN}={token}\0");
    let ids = fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.windows(mark.len()).any(|bytes| bytes == mark.as_bytes())
    })
    .collect()
}

pub fn kill(id: i32) {
    send(id, libc::SIGKILL);
}

pub fn send(id: i32, signal: i32) {
    // SAFETY: sends a signal to a process that this test started.
    unsafe { libc::kill(id, signal) };
}

/// Runs one test of this program in a process of its own, with more in its environment. `module` is the test's `module_path!()`.
pub fn run_alone(module: &str, test: &str, variable: &str, value: impl AsRef<OsStr>) {
    // The first part is the program's name.
    let name = module.split("::").skip(1).chain([test]).collect::<Vec<_>>().join("::");
    let program = std::env::current_exe().expect("this program's path");
    let mut command = Command::new(program);
    let output = command.args(["--exact", &name, "--test-threads=1"]).env(variable, value).output().expect("this program");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}{}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a test's body in a process of its own: the child of a fork has only the thread that forked, so no other test may run
/// beside.
pub fn in_a_process_of_its_own(module: &str, test: &str, body: impl FnOnce()) {
    const MARK: &str = "PARTIALFC_TEST_ALONE";
    match std::env::var_os(MARK) {
        Some(_) => body(),
        None => run_alone(module, test, MARK, "1"),
    }
}

/// Forks, and asserts that the child's body gave true. A child that hangs is killed.
pub fn in_a_forked_child(body: impl FnOnce() -> bool) {
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork");
    if child == 0 {
        unsafe {
            libc::alarm(20);
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
            libc::_exit(if good { 0 } else { 1 })
        }
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child's wait status");
}
