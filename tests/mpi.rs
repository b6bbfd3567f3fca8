//! `include/partialfc_mpi.h` and what is built on it, with each MPI that is here: the programs of `ctests/mpi` and the trainer of
//! `examples/mpi_trainer`, started by that MPI's own launcher.
//!
//! `PFC_REQUIRE_TOOLS=1` makes a missing Open MPI or MPICH a failure; without it the tests take those that are found.
//! `PFC_GLYPHS=file`, of `glyphs --export`, is what the trainer trains on; without it, shapes that are drawn here.

#[path = "common/programs.rs"]
mod programs;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use programs::{fresh, link_shared, on_path, output, root, scratch, tool, C};

/// A run that takes longer is taken to hang.
const LONGEST: Duration = Duration::from_secs(240);
/// In the environment of every process that a run starts.
const TOKEN: &str = "PFC_TEST_RUN";
/// How long ranks wait for one that is lost: long beside what a busy machine may take between two messages.
const PATIENCE_MS: u64 = 5000;

/// An MPI and its commands.
#[derive(Clone, Copy, Debug)]
struct Mpi {
    name: &'static str,
    cc: &'static str,
    cpp: &'static str,
    run: &'static str,
}

/// Debian's names, where both can be installed.
const DEBIAN: [Mpi; 2] = [
    Mpi { name: "openmpi", cc: "mpicc.openmpi", cpp: "mpicxx.openmpi", run: "mpirun.openmpi" },
    Mpi { name: "mpich", cc: "mpicc.mpich", cpp: "mpicxx.mpich", run: "mpirun.mpich" },
];

/// Those that are here.
fn mpis() -> Vec<Mpi> {
    let plain = (on_path("mpicc") && on_path("mpirun")).then(|| {
        let version = output(Command::new("mpirun").arg("--version"));
        if version.contains("Open MPI") {
            "openmpi"
        } else {
            "mpich"
        }
    });
    let found = DEBIAN.into_iter().filter_map(|mpi| match plain {
        Some(name) if name == mpi.name && !on_path(mpi.cc) => Some(Mpi { name, cc: "mpicc", cpp: "mpicxx", run: "mpirun" }),
        _ => tool(mpi.cc).then_some(mpi),
    });
    found.collect()
}

impl Mpi {
    /// Compiles a program with warnings as errors.
    fn build(&self, name: &str, source: &str, defines: &[&str]) -> PathBuf {
        let program = scratch(self.name).join(name);
        let mut command = Command::new(self.cc);
        command.args(C).args(defines).arg("-I").arg(root().join("include")).arg(root().join(source));
        link_shared(&mut command);
        output(command.args(["-lm", "-lpthread", "-o"]).arg(&program));
        program
    }

    /// The launcher, for a machine with fewer cores than ranks, and for root in a container; nothing leaves the machine.
    fn launcher(&self, ranks: usize, options: &[&str]) -> Command {
        let mut command = Command::new(self.run);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
        command.env("OMPI_MCA_btl_tcp_if_include", "lo").env("OMPI_MCA_oob_tcp_if_include", "lo").env("UCX_NET_DEVICES", "lo");
        command.args(options).arg("-n").arg(ranks.to_string());
        command
    }

    /// A launcher that does not end the others when a rank dies.
    fn careless_launcher(&self, ranks: usize) -> Command {
        match self.name {
            "openmpi" => {
                self.launcher(ranks, &["--mca", "orte_enable_recovery", "1", "--mca", "orte_abort_on_non_zero_status", "0"])
            }
            // It still kills its ranks' process groups when one of them hangs up: they go into groups of their own.
            _ => {
                let mut command = self.launcher(ranks, &["-disable-auto-cleanup"]);
                command.args(["setsid", "--wait"]);
                command
            }
        }
    }
}

/// A command with all that it starts, ended with it.
struct Run {
    child: Child,
    token: String,
    log: PathBuf,
    what: String,
}

impl Run {
    fn start(command: &mut Command, log: PathBuf) -> Run {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let token = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        let file = fs::File::create(&log).expect("the log can be written");
        command.env(TOKEN, &token).stdin(Stdio::null()).stdout(file.try_clone().expect("the log twice")).stderr(file);
        let what = format!("{command:?}");
        let child = command.process_group(0).spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        Run { child, token, log, what }
    }

    fn printed(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("the log")).into_owned()
    }

    /// Waits until `done` or until the launcher has ended.
    fn wait_for(&mut self, done: impl Fn() -> bool) {
        let started = Instant::now();
        while !done() && self.child.try_wait().expect("the launcher's status").is_none() {
            assert!(started.elapsed() < LONGEST, "{} did not get on within {LONGEST:?}\n{}", self.what, self.printed());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the launcher's end and for that of all it started; whether it succeeded, and what was printed.
    fn finish(mut self) -> (bool, String) {
        self.wait_for(|| false);
        let success = self.child.wait().expect("the launcher's status").success();
        let started = Instant::now();
        while !processes(&self.token).is_empty() {
            assert!(started.elapsed() < LONGEST / 4, "{} left processes behind\n{}", self.what, self.printed());
            std::thread::sleep(Duration::from_millis(10));
        }
        (success, self.printed())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.try_wait();
        processes(&self.token).into_iter().for_each(kill);
        let _ = self.child.wait();
    }
}

/// The living processes with a token in their environment.
fn processes(token: &str) -> Vec<i32> {
    let mark = format!("{TOKEN}={token}\0");
    let ids = fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.windows(mark.len()).any(|bytes| bytes == mark.as_bytes())
    })
    .collect()
}

fn kill(id: i32) {
    // SAFETY: sends a signal to a process that this test started.
    unsafe { libc::kill(id, libc::SIGKILL) };
}

/// Runs a program on MPI's ranks; it must succeed.
fn run<A: AsRef<OsStr>>(mpi: &Mpi, ranks: usize, program: &Path, arguments: &[A]) -> String {
    let log = program.with_extension(format!("{ranks}.log"));
    let run = Run::start(mpi.launcher(ranks, &[]).arg(program).args(arguments), log);
    let what = run.what.clone();
    let (success, printed) = run.finish();
    assert!(success, "{what} failed\n{printed}");
    printed
}

/// Included twice, from two files, in every language version, with no warning.
#[test]
fn the_header_in_all_languages() {
    for mpi in mpis() {
        let folder = scratch("languages");
        let c = ["c99", "c11", "c17"].map(|version| (mpi.cc, "c", version));
        let cpp = ["c++11", "c++14", "c++17", "c++20"].map(|version| (mpi.cpp, "c++", version));
        for (compiler, language, version) in c.into_iter().chain(cpp) {
            let mut command = Command::new(compiler);
            command.args(["-x", language, &format!("-std={version}"), "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Wconversion"]);
            command.args(["-Werror", "-O2", "-I"]).arg(root().join("include"));
            command.args(["one.c", "two.c"].map(|file| root().join("ctests/mpi/header").join(file)));
            link_shared(&mut command);
            output(command.arg("-o").arg(folder.join(format!("{}-{version}", mpi.name))));
        }
    }
}

#[test]
fn collectives() {
    for mpi in mpis() {
        let program = mpi.build("collectives", "ctests/mpi/collectives.c", &[]);
        for ranks in [1, 2, 4] {
            assert!(run::<&str>(&mpi, ranks, &program, &[]).contains(&format!("all collectives over {ranks} ranks")));
        }
    }
}

#[test]
fn collectives_in_many_pieces() {
    for mpi in mpis() {
        let program = mpi.build("pieces", "ctests/mpi/collectives.c", &["-DPFC_MPI_STAGE=65536"]);
        run::<&str>(&mpi, 3, &program, &[]);
    }
}

/// With the compiler's own checks, of memory and of undefined behaviour. What MPI itself never frees is not looked for.
#[test]
fn collectives_touch_no_foreign_memory() {
    for mpi in mpis() {
        let checks = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DPFC_MPI_STAGE=65536"];
        let program = mpi.build("sanitized", "ctests/mpi/collectives.c", &checks);
        let mut launcher = mpi.launcher(2, &[]);
        launcher.env("ASAN_OPTIONS", "detect_leaks=0").arg(&program);
        let (success, printed) = Run::start(&mut launcher, program.with_extension("log")).finish();
        assert!(success, "{}\n{printed}", mpi.name);
    }
}

/// The program that holds the collectives to their rules would notice: here with a copy of the header in which a NaN loses.
#[test]
fn a_wrong_reduction_is_noticed() {
    let rule = "to[i] > from[i] || to[i] != to[i]";
    let header = fs::read_to_string(root().join("include/partialfc_mpi.h")).expect("include/partialfc_mpi.h");
    assert_eq!(header.matches(rule).count(), 2, "the rule for f32 and for f64");
    let folder = scratch("wrong");
    fs::write(folder.join("partialfc_mpi.h"), header.replace(rule, "to[i] > from[i]")).expect("the wrong header");
    for mpi in mpis() {
        let first = format!("-I{}", folder.display());
        let program = mpi.build("wrong", "ctests/mpi/collectives.c", &[&first]);
        let (success, printed) = Run::start(mpi.launcher(2, &[]).arg(&program), program.with_extension("log")).finish();
        assert!(!success && printed.contains("wrong result"), "{printed}");
    }
}

/// Bits as on threads, traffic as planned: the program compares them.
#[test]
fn placements() {
    for mpi in mpis() {
        let program = mpi.build("placements", "ctests/mpi/placements.c", &[]);
        for ranks in [2, 3] {
            run::<&str>(&mpi, ranks, &program, &[]);
        }
    }
}

#[test]
fn the_bench_of_a_step() {
    for mpi in mpis() {
        let program = mpi.build("mpi_step", "benches/mpi_step.c", &[]);
        let printed = run(&mpi, 2, &program, &["8", "500", "0.2", "16", "2"]);
        assert!(printed.contains("2 ranks, batch 8 on each, C 500, rate 0.2, d 16"), "{printed}");
    }
}

/// The same loss curve, to the last bit, from threads and from the processes of each MPI.
#[test]
fn the_trainer_on_four_ranks() {
    let data = glyphs();
    for mpi in mpis() {
        let program = mpi.build("trainer", "examples/mpi_trainer/trainer.c", &[]);
        for options in [&["--steps", "60", "--batch", "128"][..], &["--steps", "4", "--batch", "30", "--replicated"]] {
            let curve = |name: &str, command: &mut Command| {
                let file = scratch(mpi.name).join(format!("{name}.loss"));
                command.arg("--data").arg(&data).args(options).arg("--loss").arg(&file);
                let (success, printed) = Run::start(command, scratch(mpi.name).join(format!("{name}.log"))).finish();
                assert!(success, "{command:?} failed\n{printed}");
                (fs::read_to_string(file).expect("the loss curve"), printed)
            };
            let (threads, _) = curve("threads", Command::new(&program).args(["--threads", "4"]));
            let (processes, printed) = curve("processes", mpi.launcher(4, &[]).arg(&program));
            assert!(printed.contains("4 ranks"), "{printed}");
            assert_eq!(threads, processes, "{}: the losses of threads (left) and processes (right)", mpi.name);
            let losses: Vec<f64> =
                threads.lines().map(|line| line.split(' ').nth(1).and_then(|loss| loss.parse().ok()).expect("a loss")).collect();
            assert!(losses.len() < 60 || losses[59] < 0.7 * losses[0], "{losses:?}");
        }
    }
}

#[test]
fn the_trainer_says_what_is_wrong() {
    let data = glyphs();
    let data = data.to_str().expect("a path in UTF-8");
    let broken = scratch("data").join("broken.bin");
    fs::write(&broken, &fs::read(data).expect("the images")[..1000]).expect("a damaged file");
    let broken = broken.to_str().expect("a path in UTF-8");
    for mpi in mpis() {
        let program = mpi.build("trainer_errors", "examples/mpi_trainer/trainer.c", &[]);
        let cases: [(&[&str], &str); 7] = [
            (&[], "--data FILE is missing"),
            (&["--data", "nowhere.bin"], "nowhere.bin: No such file"),
            (&["--data", broken], "not as long as it says"),
            (&["--data", data, "--step", "3"], "'--step' is no option"),
            (&["--data", data, "--steps", "3.5"], "--steps is '3.5', not a whole number"),
            (&["--data", data, "--sample-rate", "2"], "--sample-rate is '2', not a number from 0 to 1"),
            (&["--data", data, "--steps"], "--steps needs a value"),
        ];
        for (arguments, text) in cases {
            let mut command = Command::new(&program);
            let log = scratch(mpi.name).join("trainer_errors.log");
            let (success, printed) = Run::start(command.arg("--threads").arg("2").args(arguments), log).finish();
            assert!(!success && printed.contains(text), "{arguments:?}: {printed}");
        }
        let help = output(Command::new(&program).arg("--help"));
        assert!(help.contains("--device cpu|cuda"), "{help}");
    }
    // Without a driver the library's own text comes through; the launcher is told by the status.
    if let (Some(mpi), false) = (mpis().first(), Path::new("/dev/nvidiactl").exists()) {
        let mut launcher = mpi.launcher(2, &[]);
        launcher.arg(scratch(mpi.name).join("trainer_errors")).args(["--data", data, "--device", "cuda"]);
        let (success, printed) = Run::start(&mut launcher, scratch(mpi.name).join("trainer_cuda.log")).finish();
        assert!(!success && printed.contains("PFC_ERROR_UNSUPPORTED: "), "{printed}");
    }
    // A program of one MPI under the launcher of the other is alone, as often as there are ranks.
    if let [open, other] = mpis()[..] {
        for (program, launcher) in [(open, other), (other, open)] {
            let mut launcher = launcher.launcher(2, &[]);
            launcher.arg(scratch(program.name).join("trainer_errors")).args(["--data", data]);
            let (success, printed) = Run::start(&mut launcher, scratch(program.name).join("trainer_alone.log")).finish();
            assert!(!success && printed.contains("was built with another MPI"), "{printed}");
        }
    }
}

/// What becomes of rank 1, and at which of its operations.
#[derive(Clone, Copy, Debug)]
struct Fault {
    kind: &'static str,
    operation: usize,
}

/// The operations of a step, then the first of the next one.
const OPERATIONS: [&str; 5] = ["all_gather", "all_gather", "all_reduce", "reduce_scatter", "all_gather"];

/// With the launcher's own clean-up switched off, the other ranks end by themselves, with an error that names the lost one.
#[test]
fn a_rank_that_is_lost() {
    let kinds = ["kill", "stop"].into_iter();
    let faults = kinds.flat_map(|kind| (1..=OPERATIONS.len()).map(move |operation| Fault { kind, operation }));
    faulty(faults.collect(), |fault, ends| {
        let operation = format!("{} #{}", OPERATIONS[fault.operation - 1], fault.operation + 1);
        for rank in [0, 2] {
            let end = ends[rank].as_deref().unwrap_or("nothing");
            let status = ["PFC_ERROR_TIMEOUT: ", "PFC_ERROR_COMM: "].iter().any(|status| end.starts_with(status));
            assert!(
                status && end.contains(&operation) && end.contains("waits for rank 1"),
                "{fault:?}: rank {rank} ended with {end}"
            );
        }
        assert_eq!(ends[1], None, "{fault:?}: rank 1 was to be gone");
    });
}

/// A rank that ends or leaves the order of operations is named at once, long before a timeout.
#[test]
fn a_rank_that_gives_up_or_parts() {
    let faults = ["abort", "part", "length"].map(|kind| Fault { kind, operation: 5 });
    faulty(faults.to_vec(), |fault, ends| {
        let text = match fault.kind {
            "abort" => "rank 1 has ended the communicator",
            "part" => "rank 1 is in barrier",
            _ => "rank 1 sends 80 bytes to this all_gather",
        };
        for rank in [0, 2] {
            let end = ends[rank].as_deref().unwrap_or("nothing");
            assert!(end.starts_with("PFC_ERROR_COMM: all_gather #6: "), "{fault:?}: rank {rank} ended with {end}");
            // The one that hears of it from the other is told who it was, too.
            assert!(end.contains(text) || end.contains("rank 1 waits for 80"), "{fault:?}: rank {rank} ended with {end}");
        }
        let own = ends[1].as_deref().unwrap_or("nothing");
        let expected = if fault.kind == "abort" { "PFC_ERROR_ABORTED: " } else { "PFC_ERROR_COMM: " };
        assert!(own.starts_with(expected), "{fault:?}: rank 1 ended with {own}");
    });
}

/// Runs `ctests/mpi/faults.c` on three ranks for each fault and hands what the ranks wrote to `judge`; a few runs at a time, since
/// most of each is waiting.
fn faulty(faults: Vec<Fault>, judge: impl Fn(Fault, [Option<String>; 3]) + Sync) {
    for mpi in mpis() {
        let program = mpi.build(&format!("faults_{}", faults[0].kind), "ctests/mpi/faults.c", &[]);
        let left = Mutex::new(faults.clone());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| loop {
                    let Some(fault) = left.lock().unwrap_or_else(|e| e.into_inner()).pop() else { break };
                    judge(fault, one_fault(&mpi, &program, fault));
                });
            }
        });
    }
}

fn one_fault(mpi: &Mpi, program: &Path, fault: Fault) -> [Option<String>; 3] {
    let folder = scratch(mpi.name).join(format!("{}-{}", fault.kind, fault.operation));
    fresh(&folder);
    let read = |rank: usize, kind: &str| fs::read_to_string(folder.join(format!("{rank}.{kind}"))).ok();
    let mut launcher = mpi.careless_launcher(3);
    launcher.arg(program).args([fault.kind, &fault.operation.to_string(), &PATIENCE_MS.to_string()]).arg(&folder);
    let mut run = Run::start(&mut launcher, folder.join("log"));
    if fault.kind == "stop" {
        // The stopped rank never ends by itself.
        run.wait_for(|| read(0, "end").is_some() && read(2, "end").is_some());
        let stopped = read(1, "pid").and_then(|id| id.trim().parse().ok());
        kill(stopped.unwrap_or_else(|| panic!("rank 1 did not start\n{}", run.printed())));
    }
    run.finish();
    [0, 1, 2].map(|rank| read(rank, "end"))
}

/// Images for the trainer: those of `PFC_GLYPHS`, or shapes that are drawn here, in the same file format.
fn glyphs() -> PathBuf {
    static DRAWN: OnceLock<PathBuf> = OnceLock::new();
    match std::env::var_os("PFC_GLYPHS") {
        Some(path) => PathBuf::from(path),
        None => DRAWN.get_or_init(shapes).clone(),
    }
}

fn shapes() -> PathBuf {
    const CLASSES: u64 = 40;
    const PIXELS: usize = 144;
    let mut random = 1u64;
    let mut draw = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 56) as u8
    };
    let shapes: Vec<Vec<u8>> = (0..CLASSES).map(|_| (0..PIXELS).map(|_| if draw() < 80 { 255 } else { 0 }).collect()).collect();
    let (training, held_out) = (12 * CLASSES, 2 * CLASSES);
    let mut file = b"pfcimage".to_vec();
    [CLASSES, PIXELS as u64, training, held_out].iter().for_each(|count| file.extend(count.to_le_bytes()));
    (0..training + held_out).for_each(|image| file.extend((image % CLASSES).to_le_bytes()));
    for image in 0..training + held_out {
        let shape = &shapes[(image % CLASSES) as usize];
        file.extend(shape.iter().map(|&ink| if draw() < 40 { 255 - ink } else { ink }));
    }
    let path = scratch("data").join("shapes.bin");
    fs::write(&path, file).expect("the shapes can be written");
    path
}
