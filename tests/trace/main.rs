//! What the trace says of steps: the phases on the host, what runs beside what on a GPU, and the file.

use std::path::{Path, PathBuf};
use std::process::Command;

use partialfc::options::{HeadOptions, Placement};
use partialfc::trace::{self, Span};
use partialfc_testing::capi::{options, Comm, Device, Head, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu_apart;
use partialfc_testing::nccl;
use partialfc_testing::ranks::on_comms;
use partialfc_testing::training::{learning_rate, Batch};

const BATCH: usize = 40;

fn small() -> HeadOptions {
    HeadOptions { sample_rate: 0.5, ..options(600, 24, BATCH as u64) }
}

/// Two ranks, two steps in three calls each, the second prepared in the middle of the first, and a third in one call.
fn train(comms: Vec<Comm>, options: &HeadOptions, device: impl Fn() -> Device + Sync) {
    on_comms(comms, |place| {
        let mut head = Head::new(&device(), &place.comm, options);
        let batch = |step| Batch::draw(options, place.rank, step, BATCH);
        let mut grad = Rows::output(BATCH, head.dim);
        for step in 0..2 {
            let labels = if step == 0 { Some(batch(0).labels) } else { None };
            head.forward(&mut batch(step).rows(head.dim), labels.as_deref()).expect("forward");
            if step == 0 {
                head.prepare(&batch(1).labels).expect("prepare");
            }
            head.backward(1.0, 1.0, &mut grad).expect("backward");
            head.update(learning_rate(step)).expect("update");
        }
        head.step(&mut batch(2).rows(head.dim), &batch(2).labels, 0.1, &mut grad).expect("step");
    });
}

fn end(span: &Span) -> f64 {
    span.start_us + span.duration_us
}

fn intersect(a: &Span, b: &Span) -> bool {
    a.start_us < end(b) && b.start_us < end(a)
}

/// A rank's span of a step; the first of several.
fn find<'a>(spans: &'a [Span], rank: u32, step: u64, track: &str, name: &str) -> &'a Span {
    let mut found: Vec<&Span> = spans
        .iter()
        .filter(|span| (span.rank, span.step, span.track.as_str(), span.name.as_str()) == (rank, step, track, name))
        .collect();
    found.sort_by(|a, b| a.start_us.total_cmp(&b.start_us));
    found.first().unwrap_or_else(|| panic!("no {name} of step {step} on the {track} of rank {rank}"))
}

/// Traces what runs in its turn: the trace and the emulator are the process's.
fn traced(run: impl FnOnce()) -> Vec<Span> {
    trace::start();
    trace::take();
    run();
    trace::take()
}

#[test]
fn the_host_s_phases_follow_each_other() {
    let _turn = emulator::turn(3);
    for placement in [Placement::Sharded, Placement::Replicated] {
        let spans = traced(|| train(Comm::threads(2), &HeadOptions { placement, ..small() }, || Device::cpu(1)));
        let phases: &[&str] = match placement {
            Placement::Sharded => {
                &["all_gather labels", "sample", "all_gather embeddings", "forward", "all_reduce sums", "loss", "backward"]
            }
            Placement::Replicated => {
                &["all_gather labels", "sample", "forward", "all_reduce sums", "loss", "backward", "center gradient", "update"]
            }
        };
        for (rank, step) in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let ends = phases.iter().map(|phase| find(&spans, rank, step, "host", phase));
            let ends: Vec<(f64, f64)> = ends.map(|span| (span.start_us, end(span))).collect();
            assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{phases:?} of step {step} on rank {rank}: {ends:?}");
        }
        assert!(spans.iter().all(|span| span.ranks == 2 && span.duration_us >= 0.0));
    }
}

/// The emulator's clock is that of a GPU with room for everything: what overlaps there is what nothing orders. On a GPU it would be
/// a matter of timing.
#[test]
fn collectives_and_the_next_draw_run_beside_the_products() {
    let turn = emulator::turn(3);
    let spans = traced(|| train(Comm::threads(2), &small(), gpu_apart));
    if turn.is_emulator() {
        assert_overlaps(&spans);
    }
}

/// An operation of NCCL's ends when the other rank's host has come to it, too: what overlaps is a matter of timing here. What is not: what
/// is meant to run beside the exchanges is on other streams, and events order what must be.
#[test]
fn over_nccl_events_order_what_must_be() {
    let turn = emulator::turn(4);
    let Some(_standin) = nccl::emulated(&turn) else { return };
    let spans = traced(|| train(nccl::group(2), &small(), gpu_apart));
    for rank in 0..2 {
        for step in 0..3 {
            assert_ordered(&spans, rank, step);
        }
    }
}

fn assert_ordered(spans: &[Span], rank: u32, step: u64) {
    // Each ends before the next begins.
    let chains: [&[(&str, &str)]; 4] = [
        &[
            ("draw stream", "pack_labels"),
            ("exchange stream", "all_gather labels"),
            ("draw stream", "judge_labels"),
            ("draw stream", "list_sample"),
            ("centers stream", "gather_centers"),
            ("main stream", "gemm_numerators"),
        ],
        &[
            ("main stream", "pack_embeddings"),
            ("exchange stream", "all_gather embeddings"),
            ("main stream", "normalize_embeddings"),
            ("main stream", "gemm_numerators"),
            ("main stream", "pack_sums"),
            ("exchange stream", "all_reduce sums"),
            ("main stream", "judge_sums"),
            ("main stream", "embedding_gradient"),
            ("exchange stream", "reduce_scatter gradient"),
            ("main stream", "finish_gradient"),
        ],
        // Beside the exchange of the sums, of which it needs nothing.
        &[("main stream", "gemm_numerators"), ("main stream", "gemm_weighted_centers"), ("main stream", "judge_sums")],
        &[("main stream", "judge_sums"), ("centers stream", "gemm_center_gradient"), ("centers stream", "end_update")],
    ];
    for chain in chains {
        for pair in chain.windows(2) {
            let [before, after] = [pair[0], pair[1]].map(|(track, name)| find(spans, rank, step, track, name));
            // The driver counts in float32 milliseconds.
            assert!(end(before) <= after.start_us + 0.1, "step {step} on rank {rank}: {before:?}, {after:?}");
        }
    }
    let all = |track| spans.iter().filter(move |span| (span.rank, span.step, span.track.as_str()) == (rank, step, track));
    let gathers = |track| all(track).filter(|span| span.name == "gather_centers").count();
    assert_eq!((gathers("centers stream"), gathers("main stream")), (1, 0), "step {step} on rank {rank}");
    // What is on the exchange stream holds up nothing that is on another.
    let exchanges = ["all_gather labels", "all_gather embeddings", "all_reduce sums", "reduce_scatter gradient"];
    let mut found: Vec<&str> = all("exchange stream").map(|span| span.name.as_str()).collect();
    found.sort_unstable();
    let mut expected = exchanges.to_vec();
    expected.sort_unstable();
    assert_eq!(found, expected, "step {step} on rank {rank}");
}

fn assert_overlaps(spans: &[Span]) {
    for rank in 0..2 {
        let on = |step, track: &str, name: &str| find(spans, rank, step, track, name).clone();
        let all = |step, track| spans.iter().filter(move |span| (span.rank, span.step, span.track.as_str()) == (rank, step, track));
        for step in 0..3 {
            let (reduce, weighted) =
                (on(step, "exchange stream", "all_reduce sums"), on(step, "main stream", "gemm_weighted_centers"));
            assert!(intersect(&reduce, &weighted), "{reduce:?}, {weighted:?}");
        }
        // One call: the embeddings' gradient is exchanged beside what makes the class centers'.
        let scatter = on(2, "exchange stream", "reduce_scatter gradient");
        assert!(all(2, "centers stream").any(|span| intersect(&scatter, span)), "{scatter:?}");
        // Prepared in the middle of step 0: drawn beside its update, gathered before its own embeddings are.
        assert!(all(1, "draw stream").any(|draw| all(0, "centers stream").any(|update| intersect(draw, update))));
        for step in 0..3 {
            let gathers = |track| all(step, track).filter(|span| span.name == "gather_centers").count();
            assert_eq!((gathers("centers stream"), gathers("main stream")), (1, 0), "step {step}");
        }
    }
}

/// Runs a test of this file again in a process of its own, with a file for its trace; what it printed on its standard error.
fn in_a_traced_process(test: &str, file: &Path) -> String {
    let program = std::env::current_exe().expect("this program's path");
    let mut command = Command::new(program);
    let output = command.args(["--exact", test, "--test-threads=1"]).env("PFC_TRACE", file).output().expect("this program");
    let (printed, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}{errors}");
    errors.into_owned()
}

fn is_traced() -> bool {
    std::env::var_os("PFC_TRACE").is_some()
}

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = std::env::temp_dir().join(format!("pfc-trace-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("the folder goes");
    }
}

/// The complete events of a trace, which is JSON to the last byte: (name, rank, step).
fn events(file: &Path) -> Vec<(String, u64, u64)> {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let trace: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let all = trace["traceEvents"].as_array().expect("events").iter().filter(|event| event["ph"] == "X");
    let number = |value: &serde_json::Value| value.as_u64().expect("a number");
    all.map(|event| (event["name"].as_str().expect("a name").into(), number(&event["pid"]), number(&event["args"]["step"])))
        .collect()
}

#[track_caller]
fn assert_steps(events: &[(String, u64, u64)], ranks: u64, steps: u64) {
    for rank in 0..ranks {
        for step in 0..steps {
            let of_step = events.iter().filter(|(name, r, s)| (name.as_str(), *r, *s) == ("forward", rank, step));
            assert_eq!(of_step.count(), 1, "forward of step {step} on rank {rank}: {events:?}");
        }
    }
}

/// In a process of its own, which reads PFC_TRACE when its first head is made.
#[test]
fn the_file_holds_the_spans_of_all_heads() {
    if is_traced() {
        let file = PathBuf::from(std::env::var_os("PFC_TRACE").expect("the file"));
        train(Comm::threads(2), &small(), || Device::cpu(1));
        let first = events(&file);
        assert_steps(&first, 2, 3);
        // Other heads add to it.
        drop(Head::new(&Device::cpu(1), &Comm::solo(), &small()));
        assert_eq!(events(&file), first);
        let mut head = Head::new(&Device::cpu(1), &Comm::solo(), &small());
        head.prepare(&[1, 2]).expect("labels");
        assert_eq!(events(&file), first);
        drop(head);
        let second = events(&file);
        assert_eq!(second[..first.len()], first);
        assert_eq!(second.len(), first.len() + 2, "the gather of labels and the draw: {second:?}");
        return;
    }
    let folder = Folder::new("heads");
    let errors = in_a_traced_process("the_file_holds_the_spans_of_all_heads", &folder.0.join("trace.json"));
    assert_eq!(errors, "");
}

/// A script that ends, or an exit after an error: nothing is freed.
#[test]
fn a_program_that_ends_without_freeing_its_head_leaves_its_trace() {
    if is_traced() {
        let mut head = Head::new(&Device::cpu(1), &Comm::solo(), &small());
        let batch = Batch::draw(&small(), 0, 0, BATCH);
        for _ in 0..3 {
            head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut Rows::output(BATCH, head.dim)).expect("a step");
        }
        // A child of a fork ends, too: its parent's trace is none of its own.
        let child = unsafe { libc::fork() };
        if child == 0 {
            unsafe { libc::exit(0) };
        }
        let mut status = 0;
        assert_eq!((unsafe { libc::waitpid(child, &mut status, 0) }, status), (child, 0));
        let file = PathBuf::from(std::env::var_os("PFC_TRACE").expect("the file"));
        assert_eq!(events(&file), [], "the child has written");
        std::mem::forget(head);
        return;
    }
    let folder = Folder::new("end");
    let file = folder.0.join("trace.json");
    let errors = in_a_traced_process("a_program_that_ends_without_freeing_its_head_leaves_its_trace", &file);
    assert_eq!(errors, "");
    assert_steps(&events(&file), 1, 3);
}

#[test]
fn a_file_that_cannot_be_written_is_told_once() {
    if is_traced() {
        train(Comm::threads(2), &small(), || Device::cpu(1));
        return;
    }
    let folder = Folder::new("refused");
    let link = folder.0.join("link.json");
    std::fs::write(folder.0.join("target"), "precious").expect("a file");
    std::os::unix::fs::symlink(folder.0.join("target"), &link).expect("a link");
    for file in [folder.0.join("no/such/folder/trace.json"), link] {
        let errors = in_a_traced_process("a_file_that_cannot_be_written_is_told_once", &file);
        let told: Vec<&str> = errors.lines().filter(|line| line.contains("PFC_TRACE")).collect();
        assert_eq!(told.len(), 1, "{errors}");
        assert!(told[0].contains(&*file.to_string_lossy()), "{errors}");
    }
    assert_eq!(std::fs::read_to_string(folder.0.join("target")).expect("the file"), "precious");
}
