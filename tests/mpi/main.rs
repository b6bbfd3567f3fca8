//! `include/partialfc_mpi.h` and what is built on it, with each MPI that is here: the programs of `ctests/mpi` and the trainer of
//! `examples/05_mpi`, started by that MPI's own launcher.
//!
//! `PFC_REQUIRE_TOOLS=1` makes a missing Open MPI or MPICH a failure; without it the tests take those that are found.
//! `PFC_GLYPHS=file`, of `glyphs --export`, is what the trainer trains on; without it, shapes that are drawn here.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use partialfc_testing::processes::{assert_no_findings, kill, on_emulated_gpus, Run};
use partialfc_testing::programs::{fresh, link_shared, on_path, output, root, scratch, tool, C};

/// How long ranks wait for one that is lost: long beside what a busy machine may take between two messages.
const PATIENCE_MS: u64 = 5000;
/// The same where the ranks' GPUs are emulated, a few milliseconds from one message to the next.
const NCCL_PATIENCE_MS: u64 = 5000;

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

/// Before a program that is to fail: the ranks write to the log themselves. Where one aborts, MPICH's launcher may end before it has
/// passed on what they printed.
const TO_THE_LOG: [&str; 4] = ["sh", "-c", "exec \"$@\" >>\"$PFC_TEST_LOG\" 2>&1", "rank"];

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
        let session = self.session();
        command.env("OMPI_MCA_orte_tmpdir_base", &session).env("PRTE_MCA_prte_tmpdir_base", &session);
        command.args(options).arg("-n").arg(ranks.to_string());
        command
    }

    /// A folder for Open MPI's own files of one run. Those of all runs of a user are in one folder else, which a run that ends removes
    /// while another begins: "A call to mkdir was unable to create the desired directory: File exists".
    fn session(&self) -> PathBuf {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let folder = scratch(self.name).join(format!("session-{}", RUNS.fetch_add(1, Ordering::Relaxed)));
        fresh(&folder);
        folder
    }

    /// The launcher of a program that is to fail.
    fn launcher_of_a_failure(&self, ranks: usize) -> Command {
        let mut command = self.launcher(ranks, &[]);
        command.args(TO_THE_LOG);
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
            command.args(["mpi_main.c", "mpi_other.c"].map(|file| root().join("ctests/headers").join(file)));
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

/// With the compiler's own checks, of memory and of undefined behavior. What MPI itself never frees is not looked for.
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
        let (success, printed) = Run::start(mpi.launcher_of_a_failure(2).arg(&program), program.with_extension("log")).finish();
        assert!(!success && printed.contains("wrong result"), "{printed}");
    }
}

/// Programs that were not compiled alike, in one group.
fn run_apart(mpi: &Mpi, programs: [&Path; 2]) -> String {
    let mut launcher = mpi.launcher(1, &[]);
    launcher.arg(programs[0]).args([":", "-n", "1"]).arg(programs[1]);
    let (success, printed) = Run::start(&mut launcher, programs[1].with_extension("log")).finish();
    assert!(success, "{}\n{printed}", mpi.name);
    printed
}

#[test]
fn ranks_with_another_stage_or_header_are_told() {
    let header = fs::read_to_string(root().join("include/partialfc_mpi.h")).expect("include/partialfc_mpi.h");
    let version = "PFC_MPI_MESSAGES_ = 1 }";
    assert_eq!(header.matches(version).count(), 1, "the header's version");
    let folder = scratch("later");
    fs::write(folder.join("partialfc_mpi.h"), header.replace(version, "PFC_MPI_MESSAGES_ = 2 }")).expect("a later header");
    for mpi in mpis() {
        let usual = mpi.build("usual", "ctests/mpi/stages.c", &[]);
        let small = mpi.build("small", "ctests/mpi/stages.c", &["-DPFC_MPI_STAGE=65536"]);
        let later = mpi.build("later", "ctests/mpi/stages.c", &[&format!("-I{}", folder.display())]);
        for (other, what) in [(&small, "PFC_MPI_STAGE"), (&later, "the version of partialfc_mpi.h")] {
            let printed = run_apart(&mpi, [&usual, other]);
            for rank in 0..2 {
                let told = format!("rank {rank} of 2: PFC_ERROR_MISMATCH: {what} must be the same on all ranks");
                assert!(printed.contains(&told), "{}: {printed}", mpi.name);
            }
        }
        let printed = run_apart(&mpi, [&usual, &usual]);
        assert!(printed.contains("rank 0 of 2: PFC_OK") && printed.contains("rank 1 of 2: PFC_OK"), "{}: {printed}", mpi.name);
    }
}

/// A message that MPI itself finds wrong: here rank 1 has a header that leaves less room for it than comes.
#[test]
fn an_error_of_mpi_is_a_status_and_no_end_of_the_process() {
    let header = fs::read_to_string(root().join("include/partialfc_mpi.h")).expect("include/partialfc_mpi.h");
    let room = "self->in + (size_t)r * self->slot, (int)self->slot, MPI_BYTE, r, MPI_ANY_TAG";
    assert_eq!(header.matches(room).count(), 1, "the room for a message");
    let folder = scratch("narrow");
    let narrow = header.replace(room, &room.replace("(int)self->slot, MPI_BYTE", "4, MPI_BYTE"));
    fs::write(folder.join("partialfc_mpi.h"), narrow).expect("the wrong header");
    for mpi in mpis() {
        let program = mpi.build("narrow", "ctests/mpi/placements.c", &[&format!("-I{}", folder.display())]);
        let (success, printed) = Run::start(mpi.launcher_of_a_failure(2).arg(&program), program.with_extension("log")).finish();
        assert!(!success && printed.contains("the message of rank"), "{}: {printed}", mpi.name);
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
        let program = mpi.build("trainer", "examples/05_mpi/trainer.c", &[]);
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

/// The head's messages over NCCL's stand-in, from one emulated GPU to another: the losses of threads that share one, to the last bit.
/// The sums are in the ranks' order in both; NCCL itself has an order of its own.
#[test]
fn the_trainer_on_four_emulated_gpus() {
    let data = shapes();
    for mpi in mpis() {
        let program = mpi.build("trainer_nccl", "examples/05_mpi/trainer.c", &[]);
        for (name, options) in [("sampled", &["--sample-rate", "0.3"][..]), ("replicated", &["--replicated", "--sample-rate", "1"])]
        {
            let curve = |ranks: &str, command: &mut Command| {
                let file = scratch(mpi.name).join(format!("nccl_{name}_{ranks}.loss"));
                command.arg("--data").arg(data).args(["--device", "cuda", "--steps", "6", "--batch", "30", "--dim", "24"]);
                command.args(options).arg("--loss").arg(&file);
                let log = file.with_extension("log");
                let (success, printed) = Run::start(on_emulated_gpus(command, 4), log).finish();
                assert!(success && printed.contains("4 ranks, cuda: SIMT emulator"), "{command:?}\n{printed}");
                assert_no_findings(&printed);
                fs::read_to_string(file).expect("the loss curve")
            };
            let threads = curve("threads", Command::new(&program).args(["--threads", "4"]));
            let processes = curve("processes", mpi.launcher(4, &[]).arg(&program));
            assert_eq!(threads.lines().count(), 6, "{threads}");
            assert_eq!(threads, processes, "{}, {name}: the losses of threads (left) and processes (right)", mpi.name);
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
        let program = mpi.build("trainer_errors", "examples/05_mpi/trainer.c", &[]);
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
        let mut launcher = mpi.launcher_of_a_failure(2);
        launcher.arg(scratch(mpi.name).join("trainer_errors")).args(["--data", data, "--device", "cuda"]);
        let (success, printed) = Run::start(&mut launcher, scratch(mpi.name).join("trainer_cuda.log")).finish();
        assert!(!success && printed.contains("PFC_ERROR_UNSUPPORTED: "), "{printed}");
    }
    // A program of one MPI under the launcher of the other is alone, as often as there are ranks.
    if let [open, other] = mpis()[..] {
        for (program, launcher) in [(open, other), (other, open)] {
            let mut launcher = launcher.launcher_of_a_failure(2);
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
            _ => "rank 1 sends ",
        };
        for rank in [0, 2] {
            let end = ends[rank].as_deref().unwrap_or("nothing");
            assert!(end.starts_with("PFC_ERROR_COMM: all_gather #6: "), "{fault:?}: rank {rank} ended with {end}");
            // The one that hears of it from the other is told who it was, too.
            assert!(end.contains(text) || end.contains("rank 1 waits for "), "{fault:?}: rank {rank} ended with {end}");
        }
        let own = ends[1].as_deref().unwrap_or("nothing");
        let expected = if fault.kind == "abort" { "PFC_ERROR_ABORTED: " } else { "PFC_ERROR_COMM: " };
        assert!(own.starts_with(expected), "{fault:?}: rank 1 ended with {own}");
    });
}

/// A rank of a group that NCCL joins, which does not tell who is missing: the others end by themselves all the same, at their own
/// timeout, or at once where NCCL notices (the stand-in told to) that a process is gone.
#[test]
fn a_rank_that_nccl_loses() {
    for mpi in mpis() {
        let program = mpi.build("nccl_faults", "ctests/mpi/nccl_faults.c", &["-lpthread"]);
        let kinds = [("kill", false), ("kill", true), ("stop", false)].into_iter();
        let cases = kinds.flat_map(|(kind, told)| ["before", "between", "amid"].map(|moment| (kind, told, moment)));
        a_few_at_once(cases.collect(), |(kind, told, moment)| {
            let folder = scratch(mpi.name).join(format!("nccl-{kind}-{moment}-{told}"));
            let mut launcher = mpi.careless_launcher(3);
            on_emulated_gpus(&mut launcher, 3).env("PFC_STANDIN_TELL", if told { "1" } else { "0" });
            // Where the others are told they do not wait so long.
            let patience = if told { 240_000 } else { NCCL_PATIENCE_MS };
            launcher.arg(&program).args([kind, moment, &patience.to_string()]).arg(&folder);
            let (ends, printed) = lose_a_rank(launcher, &folder, kind == "stop");
            assert_no_findings(&printed);
            let what = format!("{}, {kind}, {moment}, told: {told}", mpi.name);
            for rank in [0, 2] {
                let end = ends[rank].as_deref().unwrap_or("nothing");
                let (status, words) = match told {
                    false => ("PFC_ERROR_TIMEOUT: ", format!("within {NCCL_PATIENCE_MS} ms (this is rank {rank})")),
                    true => ("PFC_ERROR_COMM: ", "remote process exited".to_owned()),
                };
                assert!(end.starts_with(status) && end.contains(&words), "{what}: rank {rank} ended with {end}\n{printed}");
            }
            assert_eq!(ends[1], None, "{what}: rank 1 was to be gone");
        });
    }
}

/// Runs `ctests/mpi/faults.c` on three ranks for each fault and hands what the ranks wrote to `judge`.
fn faulty(faults: Vec<Fault>, judge: impl Fn(Fault, [Option<String>; 3]) + Sync) {
    for mpi in mpis() {
        let program = mpi.build(&format!("faults_{}", faults[0].kind), "ctests/mpi/faults.c", &[]);
        a_few_at_once(faults.clone(), |fault| judge(fault, one_fault(&mpi, &program, fault)));
    }
}

/// For what mostly waits.
fn a_few_at_once<T: Send>(cases: Vec<T>, run: impl Fn(T) + Sync) {
    let left = Mutex::new(cases);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| loop {
                let Some(case) = left.lock().unwrap_or_else(|e| e.into_inner()).pop() else { break };
                run(case);
            });
        }
    });
}

fn one_fault(mpi: &Mpi, program: &Path, fault: Fault) -> [Option<String>; 3] {
    let folder = scratch(mpi.name).join(format!("{}-{}", fault.kind, fault.operation));
    let mut launcher = mpi.careless_launcher(3);
    launcher.arg(program).args([fault.kind, &fault.operation.to_string(), &PATIENCE_MS.to_string()]).arg(&folder);
    lose_a_rank(launcher, &folder, fault.kind == "stop").0
}

/// Runs three ranks that note in a folder what becomes of them, to their ends; and what was printed.
fn lose_a_rank(mut launcher: Command, folder: &Path, stopped: bool) -> ([Option<String>; 3], String) {
    fresh(folder);
    let read = |rank: usize, kind: &str| fs::read_to_string(folder.join(format!("{rank}.{kind}"))).ok();
    let mut run = Run::start(&mut launcher, folder.join("log"));
    if stopped {
        // The stopped rank never ends by itself.
        run.wait_for(|| read(0, "end").is_some() && read(2, "end").is_some());
        let stopped = read(1, "pid").and_then(|id| id.trim().parse().ok());
        kill(stopped.unwrap_or_else(|| panic!("rank 1 did not start\n{}", run.printed())));
    }
    let (_, printed) = run.finish();
    ([0, 1, 2].map(|rank| read(rank, "end")), printed)
}

/// Images for the trainer: those of `PFC_GLYPHS`, or shapes that are drawn here, in the same file format.
fn glyphs() -> PathBuf {
    std::env::var_os("PFC_GLYPHS").map_or_else(|| shapes().to_owned(), PathBuf::from)
}

fn shapes() -> &'static Path {
    static DRAWN: OnceLock<PathBuf> = OnceLock::new();
    DRAWN.get_or_init(draw_shapes)
}

fn draw_shapes() -> PathBuf {
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
