//! `examples/06_nccl/train.c`: processes that NCCL joins without MPI, told their rank by the environment as launchers do it. On
//! emulated GPUs and the stand-in for NCCL, whatever the machine has.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use partialfc_testing::processes::{assert_no_findings, on_emulated_gpus, send, Run};
use partialfc_testing::programs::{compile, fresh, link_shared, output, root, scratch, C};

/// What launchers call a rank, the number of ranks, and the rank's number on its machine.
const LAUNCHERS: [(&str, [&str; 3]); 4] = [
    ("torchrun", ["RANK", "WORLD_SIZE", "LOCAL_RANK"]),
    ("slurm", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]),
    ("openmpi", ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"]),
    ("mpich", ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"]),
];
const TORCHRUN: [&str; 3] = LAUNCHERS[0].1;

fn program() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let program = scratch("program").join("train");
        let mut command = compile("cc");
        command.args(C).arg(root().join("examples/06_nccl/train.c"));
        link_shared(&mut command);
        output(command.args(["-lm", "-lpthread", "-o"]).arg(&program));
        program
    })
}

/// The program on emulated GPUs, with none of a launcher's variables.
fn train(gpus: usize) -> Command {
    let mut command = Command::new(program());
    for variable in LAUNCHERS.iter().flat_map(|(_, variables)| variables) {
        command.env_remove(variable);
    }
    on_emulated_gpus(&mut command, gpus);
    command
}

/// The same as one of the ranks that a launcher starts on one machine, which leave NCCL's id in a folder.
fn train_as(variables: [&str; 3], rank: usize, size: usize, folder: &Path) -> Command {
    let mut command = train(size);
    command.envs(variables.into_iter().zip([rank, size, rank].map(|number| number.to_string())));
    command.arg("--id").arg(folder.join("id"));
    command
}

fn losses(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The losses of ranks that are threads of one process.
fn losses_of_threads(size: usize, steps: &str) -> String {
    let file = scratch("threads").join(format!("{size}-{steps}.loss"));
    let mut command = train(1);
    command.args(["--threads", &size.to_string(), "--steps", steps, "--loss"]).arg(&file);
    let (success, printed) = Run::start(&mut command, file.with_extension("log")).finish();
    assert!(success && printed.contains(&format!("{size} ranks, cuda: SIMT emulator")), "{printed}");
    assert_no_findings(&printed);
    losses(&file)
}

/// Waits until rank 0 says that the ranks train, and a little more.
fn amid_training(rank_0: &mut Run) {
    let log = rank_0.log.clone();
    rank_0.wait_for(|| fs::read_to_string(&log).is_ok_and(|printed| printed.contains("ranks, cuda: SIMT emulator")));
    std::thread::sleep(Duration::from_millis(200));
}

/// Two processes by each launcher's variables, and three, whose sums have an order. The stand-in's is that of threads.
#[test]
fn processes_have_the_losses_of_threads() {
    let expected = [2, 3].map(|size| losses_of_threads(size, "12"));
    let on_two = LAUNCHERS.into_iter().map(|launcher| (launcher, 2));
    for ((name, variables), size) in on_two.chain([(LAUNCHERS[0], 3)]) {
        let folder = scratch(&format!("{name}-{size}"));
        fresh(&folder);
        let file = folder.join("loss");
        let start = |rank: usize| {
            let mut command = train_as(variables, rank, size, &folder);
            Run::start(command.args(["--steps", "12", "--loss"]).arg(&file), folder.join(format!("{rank}.log")))
        };
        // Rank 0 last: the others wait for the id.
        let runs: Vec<Run> = (0..size).rev().map(start).collect();
        for run in runs {
            let (success, printed) = run.finish();
            assert!(success, "{name}: {printed}");
            assert_no_findings(&printed);
        }
        assert_eq!(losses(&file).lines().count(), 12);
        assert_eq!(losses(&file), expected[size - 2], "{name}, {size} ranks: processes (left) and threads (right)");
        assert!(!folder.join("id").exists(), "{name}: the id is left behind");
    }
}

/// A rank that is stopped for less than the timeout is late, no more.
#[test]
fn a_process_that_pauses() {
    let folder = scratch("pause");
    fresh(&folder);
    let file = folder.join("loss");
    let start = |rank: usize| {
        let mut command = train_as(TORCHRUN, rank, 2, &folder);
        Run::start(command.args(["--steps", "30", "--loss"]).arg(&file), folder.join(format!("{rank}.log")))
    };
    let mut runs = [0, 1].map(start);
    amid_training(&mut runs[0]);
    send(runs[1].id(), libc::SIGSTOP);
    std::thread::sleep(Duration::from_millis(500));
    send(runs[1].id(), libc::SIGCONT);
    for run in runs {
        let (success, printed) = run.finish();
        assert!(success, "{printed}");
        assert_no_findings(&printed);
    }
    assert_eq!(losses(&file), losses_of_threads(2, "30"), "processes (left) and threads (right)");
}

/// No launcher looks after them: the others end by themselves, and so does one that was stopped and goes on when they are gone.
#[test]
fn a_process_that_is_lost() {
    for signal in [libc::SIGKILL, libc::SIGSTOP] {
        let folder = scratch(&format!("lost-{signal}"));
        fresh(&folder);
        let start = |rank: usize| {
            let mut command = train_as(TORCHRUN, rank, 3, &folder);
            command.args(["--steps", "1000000", "--timeout", "2"]);
            Run::start(&mut command, folder.join(format!("{rank}.log")))
        };
        let mut runs: Vec<Run> = (0..3).map(start).collect();
        amid_training(&mut runs[0]);
        let lost = runs.remove(1);
        send(lost.id(), signal);
        for run in runs {
            let (success, printed) = run.finish();
            assert!(!success && printed.contains("PFC_ERROR_TIMEOUT: "), "signal {signal}: {printed}");
            assert_no_findings(&printed);
        }
        send(lost.id(), libc::SIGCONT);
        let (success, printed) = lost.finish();
        assert!(!success && printed.contains("PFC_ERROR_TIMEOUT: ") == (signal == libc::SIGSTOP), "signal {signal}: {printed}");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let folder = scratch("refused");
    fresh(&folder);
    let refused = |name: &str, command: &mut Command, text: &str| {
        let (success, printed) = Run::start(command, folder.join(format!("{name}.log"))).finish();
        assert!(!success && printed.contains(text), "{name}: {printed}");
    };
    let id = folder.join("id");
    refused("alone", train(1).arg("--id").arg(&id), "neither RANK, WORLD_SIZE and LOCAL_RANK nor");
    refused("nothing", &mut train(1), "one of --id FILE and --threads N is needed");
    refused("both", train_as(TORCHRUN, 0, 1, &folder).args(["--threads", "2"]), "one of --id FILE and --threads N");
    refused("option", train(1).args(["--step", "3"]), "'--step' is no option");
    refused("value", train(1).args(["--threads", "2", "--steps"]), "--steps needs a value");
    refused("number", train(1).args(["--steps", "many"]), "--steps is 'many', not a whole number from 1");
    refused("rank", &mut train_as(TORCHRUN, 2, 2, &folder), "RANK is '2', not a whole number from 0 to 1");
    refused("no GPU", train_as(TORCHRUN, 0, 1, &folder).args(["--gpu", "1"]), "ordinal");
    refused("late", train_as(TORCHRUN, 1, 2, &folder).args(["--timeout", "1"]), "rank 0 has left no id there in time");
    refused("devices", train_as(TORCHRUN, 0, 1, &folder).env("PFC_SIMT_DEVICES", "no"), "PFC_SIMT_DEVICES is \"no\"");
    let mut without = train_as(TORCHRUN, 0, 1, &folder);
    refused(
        "no NCCL",
        without.env("PFC_NCCL_LIB", "/nowhere/libnccl.so.2"),
        "PFC_ERROR_UNSUPPORTED: cannot load \"/nowhere/libnccl.so.2\"",
    );
    assert!(!id.exists(), "an id that nobody made");
    fs::write(&id, "of another run").expect("a file");
    refused("left", &mut train_as(TORCHRUN, 0, 1, &folder), "is there already; each run needs its own name");
    refused("short", &mut train_as(TORCHRUN, 1, 2, &folder), "not an id of NCCL's");
    assert_eq!(fs::read(&id).expect("the other run's"), b"of another run");
    assert!(output(train(1).arg("--help")).contains("--id FILE"));
}
