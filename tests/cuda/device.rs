//! What goes wrong with a GPU itself: no memory left, work that it refuses or that fails, a stream, a context or an ordinal that is not
//! what it should be, a driver too old. Every one is a status that says so, on the rank that has it; the others hear of it.
//!
//! Most of it is planned with the emulator; with `PFC_TEST_DRIVER=real` on a GPU what a driver cannot be made to do is left out.

use std::ffi::c_void;
use std::ptr::null_mut;

use partialfc::capi::device::pfc_device_cuda;
use partialfc::capi::head as c_head;
use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, status_name, Comm, Device, Failure, Head, Outcome, Rows};
use partialfc_testing::driver;
use partialfc_testing::emulator::{self, Turn};
use partialfc_testing::gpu::{free_memory, gpu, Remote};
use partialfc_testing::numbers::{assert_close, widen};
use partialfc_testing::processes::run_alone;
use partialfc_testing::ranks::on_ranks;

const ROWS: usize = 3;
const DIM: usize = 6;
const CLASSES: u64 = 600;
const LABELS: [i64; ROWS] = [5, 17, 400];
/// CUDA_ERROR_OUT_OF_MEMORY, _INVALID_HANDLE, _LAUNCH_OUT_OF_RESOURCES, _LAUNCH_FAILED.
const OUT_OF_MEMORY: i32 = 2;
const INVALID_HANDLE: i32 = 400;
const OUT_OF_RESOURCES: i32 = 701;
const LAUNCH_FAILED: i32 = 719;
/// CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
const LEGACY: usize = 1;
const OF_EACH_THREAD: usize = 2;

fn small() -> HeadOptions {
    HeadOptions { sample_rate: 0.1, ..options(CLASSES, DIM as u32, ROWS as u64) }
}

fn embeddings() -> Rows {
    Rows::f32(&(0..ROWS * DIM).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>(), DIM)
}

#[track_caller]
fn assert_told<T: std::fmt::Debug>(what: &str, result: Outcome<T>, status: Status, words: &[&str]) -> Failure {
    let failure = result.expect_err(what);
    assert_eq!(status_name(failure.status), format!("PFC_ERROR_{status}"), "{what}: {failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{what}: the text does not say {word:?}: {failure:?}");
    }
    failure
}

fn device_on(ordinal: i32, stream: *mut c_void) -> Outcome<Device> {
    let mut raw = null_mut();
    // SAFETY: an output that outlives the call; a stream of the driver's, or what a test passes for one.
    let made = outcome(unsafe { pfc_device_cuda(ordinal, stream, &mut raw) });
    assert_eq!(made.is_ok(), !raw.is_null(), "an output is written on success only");
    made.map(|()| Device(raw))
}

/// A step with everything on the host.
fn step(head: &mut Head) -> Outcome<f64> {
    let mut gradient = Rows::output(ROWS, DIM);
    let loss = head.forward(&mut embeddings(), Some(&LABELS))?;
    head.backward(1.0, 1.0, &mut gradient)?;
    head.update(0.1)?;
    Ok(loss)
}

/// What the driver holds for the process: free device memory, and how many of each thing there are that a call makes and another gives
/// back.
fn held(turn: &Turn) -> (usize, Vec<i64>) {
    let pairs = [
        ("cuMemHostAlloc", "cuMemFreeHost"),
        ("cuStreamCreateWithPriority", "cuStreamDestroy_v2"),
        ("cuEventCreate", "cuEventDestroy_v2"),
        ("cuModuleLoadData", "cuModuleUnload"),
    ];
    let calls = |name: &str| turn.calls(name).map_or(0, |count| count as i64);
    (free_memory(), pairs.iter().map(|(make, free)| calls(make) - calls(free)).collect())
}

/// The first number after `words`.
fn number_after(words: &str, text: &str) -> u64 {
    let rest = text.split(words).nth(1).unwrap_or_else(|| panic!("{words:?} is not in: {text}"));
    let digits: String = rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|e| panic!("{e} after {words:?} in: {text}"))
}

#[test]
fn a_driver_too_old_is_refused_with_both_versions() {
    // The driver is asked once in a process: another one is for this.
    if std::env::var_os("PFC_TEST_OLD_DRIVER").is_none() {
        return run_alone(module_path!(), "a_driver_too_old_is_refused_with_both_versions", "PFC_TEST_OLD_DRIVER", "1");
    }
    let turn = emulator::turn(1);
    turn.driver_version(12080);
    if turn.is_emulator() {
        let refused = device_on(0, null_mut()).map(|_| ());
        assert_told("a driver of CUDA 12.8", refused, Status::Unsupported, &["12.8", "13.0", "580"]);
    }
}

#[test]
fn an_ordinal_that_is_not_there_is_named() {
    let turn = emulator::turn(2);
    drop(gpu());
    for ordinal in [-1, i32::MIN, i32::MAX, 8] {
        let refused = device_on(ordinal, null_mut()).map(|_| ());
        assert_told("an ordinal", refused, Status::InvalidArgument, &["ordinal", &ordinal.to_string(), "GPUs"]);
    }
    if turn.is_emulator() {
        assert_told("of one", device_on(1, null_mut()).map(|_| ()), Status::InvalidArgument, &["ordinal", "below 1", "got 1"]);
    }
}

/// A context of its own, and a stream in it.
struct Foreign {
    context: *mut c_void,
    stream: *mut c_void,
}

impl Foreign {
    /// On GPU `ordinal`; the thread's current context is left as it was.
    fn new(ordinal: i32) -> Foreign {
        let (mut context, mut stream, mut popped) = (null_mut(), null_mut(), null_mut());
        // SAFETY: the driver's functions, of these types; outputs that outlive the calls.
        unsafe {
            let create = driver!(c"cuCtxCreate_v4", unsafe extern "C" fn(*mut *mut c_void, *mut c_void, u32, i32) -> i32);
            let stream_of = driver!(c"cuStreamCreate", unsafe extern "C" fn(*mut *mut c_void, u32) -> i32);
            let pop = driver!(c"cuCtxPopCurrent_v2", unsafe extern "C" fn(*mut *mut c_void) -> i32);
            assert_eq!((create(&mut context, null_mut(), 0, ordinal), stream_of(&mut stream, 1), pop(&mut popped)), (0, 0, 0));
        }
        Foreign { context, stream }
    }

    /// Runs `body` with the context current.
    fn within<T>(&self, body: impl FnOnce() -> T) -> T {
        let mut popped = null_mut();
        // SAFETY: the driver's functions, of these types; a live context.
        unsafe {
            assert_eq!(driver!(c"cuCtxPushCurrent_v2", unsafe extern "C" fn(*mut c_void) -> i32)(self.context), 0);
            let value = body();
            assert_eq!(driver!(c"cuCtxPopCurrent_v2", unsafe extern "C" fn(*mut *mut c_void) -> i32)(&mut popped), 0);
            assert_eq!(popped, self.context, "a call has left another context current");
            value
        }
    }

    fn destroy_stream(&self) {
        // SAFETY: a live stream, destroyed once.
        self.within(|| unsafe {
            assert_eq!(driver!(c"cuStreamDestroy_v2", unsafe extern "C" fn(*mut c_void) -> i32)(self.stream), 0)
        });
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe { driver!(c"cuCtxDestroy_v2", unsafe extern "C" fn(*mut c_void) -> i32)(self.context) };
    }
}

#[test]
fn a_stream_or_a_context_of_another_gpu_is_refused_with_both_ordinals() {
    let turn = emulator::turn(3);
    if !turn.is_emulator() {
        return;
    }
    turn.devices(2);
    drop(gpu());
    let other = Foreign::new(1);
    let refused = device_on(0, other.stream).map(|_| ());
    assert_told("another GPU's stream", refused, Status::InvalidArgument, &["ordinal must be 1", "stream", "got 0"]);
    let refused = other.within(|| device_on(0, null_mut())).map(|_| ());
    assert_told("another GPU's context", refused, Status::InvalidArgument, &["ordinal must be 1", "context", "got 0"]);
    // Where they belong together the second GPU is as good.
    let mut head = Head::new(&device_on(1, other.stream).expect("GPU 1"), &Comm::solo(), &small());
    step(&mut head).expect("a step on GPU 1");
    let there = Remote::of(&[1f32; ROWS * DIM]);
    assert_told(
        "memory of GPU 0",
        forward(&head, &there, &LABELS, &mut 0.0),
        Status::InvalidArgument,
        &["embeddings", "GPU 0", "GPU 1"],
    );
    drop(head);
    turn.devices(1);
}

/// A forward of embeddings on a GPU.
fn forward(head: &Head, rows: &Remote, labels: *const [i64; ROWS], loss: *mut f64) -> Outcome<()> {
    // SAFETY: a live head; arrays of the sizes that it takes.
    outcome(unsafe { c_head::pfc_head_forward(head.raw, &rows.matrix(DIM), labels.cast(), loss) })
}

#[test]
fn a_device_is_in_its_streams_context_whatever_the_threads_own_is() {
    let _turn = emulator::turn(4);
    drop(gpu());
    let other = Foreign::new(0);
    let mut head = Head::new(&device_on(0, other.stream).expect("the stream's context"), &Comm::solo(), &small());
    let before = step(&mut head).expect("a step");
    other.within(|| step(&mut head)).expect("from within the context, too");
    let centers = head.centers();
    // This memory is of the thread's context, which is not the head's.
    let (rows, labels, loss) = (Remote::of(&[1f32; ROWS * DIM]), Remote::of(&LABELS), Remote::of(&[0f64]));
    let words = |name: &'static str| [name, "another context", "rank 0"];
    let mut host = 0.0;
    let mut forward_of = |embeddings: *const partialfc::capi::types::pfc_matrix, labels, loss: *mut f64| {
        let loss = if loss.is_null() { &mut host } else { loss };
        // SAFETY: a live head; arrays of the sizes that it takes.
        outcome(unsafe { c_head::pfc_head_forward(head.raw, embeddings, labels, loss) })
    };
    let (mut good, bad) = (embeddings(), rows.matrix(DIM));
    let good = good.view();
    let invalid = Status::InvalidArgument;
    assert_told("embeddings", forward_of(&bad, LABELS.as_ptr(), null_mut()), invalid, &words("embeddings"));
    assert_told("labels", forward_of(&good, labels.address as *const i64, null_mut()), invalid, &words("labels"));
    assert_told("loss", forward_of(&good, LABELS.as_ptr(), loss.address as *mut f64), invalid, &words("loss"));
    // SAFETY: as above.
    unsafe {
        let step = outcome(c_head::pfc_head_step(head.raw, &good, LABELS.as_ptr(), 0.1, &bad, &mut host));
        assert_told("a step's gradient", step, invalid, &words("grad_embeddings"));
        outcome(c_head::pfc_head_forward(head.raw, &good, LABELS.as_ptr(), &mut host)).expect("forward");
        let backward = outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &bad));
        assert_told("a gradient", backward, invalid, &words("grad_embeddings"));
        let read = outcome(c_head::pfc_head_read_centers(head.raw, 0, ROWS as u64, &bad));
        assert_told("rows", read, invalid, &["another context"]);
        let mut ids = [0i64; ROWS];
        let top = outcome(c_head::pfc_head_top_k(head.raw, &bad, 1, ids.as_mut_ptr(), [0f32; ROWS].as_mut_ptr()));
        assert_told("top_k", top, invalid, &words("embeddings"));
    }
    assert_eq!(rows.read::<f32>(), [1.0; ROWS * DIM], "written");
    assert_eq!(head.centers(), centers, "rows have moved");
    assert!(step(&mut head).expect("the head works on") < before);
}

/// Which stream it is depends on the thread that asks: a head's work would have no order.
#[test]
fn the_stream_of_each_thread_is_refused() {
    let _turn = emulator::turn(16);
    drop(gpu());
    let refused = device_on(0, OF_EACH_THREAD as *mut c_void).map(|_| ());
    assert_told("CU_STREAM_PER_THREAD", refused, Status::InvalidArgument, &["stream", "CU_STREAM_PER_THREAD", "thread"]);
    device_on(0, LEGACY as *mut c_void).expect("the legacy default stream is one and the same for all threads");
}

#[test]
fn a_stream_that_is_destroyed_is_an_error_and_no_crash() {
    let turn = emulator::turn(5);
    if !turn.is_emulator() {
        return;
    }
    drop(gpu());
    let other = Foreign::new(0);
    let device = device_on(0, other.stream).expect("a device");
    let (mut head, mut unused) = (Head::new(&device, &Comm::solo(), &small()), Head::new(&device, &Comm::solo(), &small()));
    step(&mut head).expect("a step");
    other.destroy_stream();
    assert_told("a device", device_on(0, other.stream).map(|_| ()), Status::InvalidArgument, &["stream", "INVALID_HANDLE"]);
    assert_told("a step", step(&mut head), Status::Device, &["GPU 0", "INVALID_HANDLE"]);
    assert_told("poisoned", head.wait(), Status::Poisoned, &["INVALID_HANDLE"]);
    assert_told("rows", unused.read_centers(0, 1), Status::Device, &["INVALID_HANDLE"]);
    assert_told("a head", Head::with(&device, &Comm::solo(), &small()).map(|_| ()), Status::Device, &["INVALID_HANDLE"]);
}

/// Tries `attempt` with the first, the second, the third .. call of a driver function failing for want of memory, until there are no
/// more such calls: at least `least`. What each failure said goes to `judge`.
fn starve(turn: &Turn, function: &str, least: u64, mut attempt: impl FnMut() -> Outcome<()>, judge: impl Fn(&str, Failure)) {
    let mut nth = 1;
    loop {
        turn.fail(function, nth, OUT_OF_MEMORY);
        match attempt() {
            Ok(()) => break,
            Err(failure) => judge(&format!("{function} {nth}"), failure),
        }
        nth += 1;
        assert!(nth < 500, "{function} is called for ever");
    }
    turn.fail("", 0, 0);
    assert!(nth > least, "{function} failed {} times", nth - 1);
}

#[test]
fn a_head_for_which_there_is_no_memory_leaves_nothing_behind() {
    let turn = emulator::turn(6);
    if !turn.is_emulator() {
        return;
    }
    let device = gpu();
    for (function, of_the_gpu, least) in [("cuMemAlloc_v2", true, 50), ("cuMemHostAlloc", false, 5)] {
        for placement in [Placement::Sharded, Placement::Replicated] {
            let options = HeadOptions { placement, ..small() };
            let before = held(&turn);
            let create = || Head::with(&device, &Comm::solo(), &options).map(drop);
            starve(&turn, function, least, create, |what, failure| {
                assert_told::<()>(what, Err(failure.clone()), Status::OutOfMemory, &["bytes", "rank 0"]);
                if of_the_gpu {
                    let free = number_after("GPU 0,", &failure.message);
                    assert!(free > 0 && free <= before.0 as u64, "{what}: {failure:?}");
                }
                assert_eq!(held(&turn), before, "{what}: something is left");
            });
            assert_eq!(held(&turn), before, "{function}: something is left");
        }
    }
    // And where there really is no more: what was wanted and what was there.
    let limit = 100_000;
    turn.memory(limit);
    let refused = Head::with(&device, &Comm::solo(), &small()).map(drop);
    turn.memory(1 << 30);
    let failure = assert_told("100 kB", refused, Status::OutOfMemory, &["bytes", "GPU 0", "are free"]);
    let (wanted, free) = (number_after("allocate ", &failure.message), number_after("GPU 0,", &failure.message));
    assert!(wanted > free && free < limit, "{failure:?}");
}

/// Of several ranks on one GPU one is refused its memory: it says so, and the others that it did.
#[test]
fn a_rank_without_memory_is_heard_of_on_all() {
    let turn = emulator::turn(7);
    if !turn.is_emulator() {
        return;
    }
    drop(gpu());
    let before = held(&turn);
    turn.fail("cuMemAlloc_v2", 25, OUT_OF_MEMORY);
    let told = on_ranks(3, |place| {
        let device = gpu();
        let refused = Head::with(&device, &place.comm, &small()).map(drop).expect_err("memory for two");
        Head::new(&device, &place.comm, &small());
        refused
    });
    assert_one_of_all(&told, Status::OutOfMemory, &["bytes", "are free"]);
    assert_eq!(held(&turn), before, "something is left");
}

/// One rank has the status and the words, the others REMOTE with its number.
#[track_caller]
fn assert_one_of_all(told: &[Failure], status: Status, words: &[&str]) {
    let own = told.iter().position(|failure| failure.status == status as i32).unwrap_or_else(|| panic!("{told:?}"));
    let name = format!("rank {own}");
    let named = [name.as_str()];
    for (rank, failure) in told.iter().enumerate() {
        let (status, words) = if rank == own { (status, words) } else { (Status::Remote, named.as_slice()) };
        assert_told::<()>(&format!("rank {rank} of {told:?}"), Err(failure.clone()), status, words);
    }
}

/// Memory that a step asks for: the host's matrices and a caller's sample pass through it.
#[test]
fn a_step_for_which_there_is_no_memory_is_told_and_the_head_works_on() {
    let turn = emulator::turn(8);
    if !turn.is_emulator() {
        return;
    }
    let device = gpu();
    let mut expected = None;
    for placement in [Placement::Sharded, Placement::Replicated] {
        // A sharded head's rows travel as a replicated one has them.
        let options = HeadOptions { placement, gather_dtype: Some(DType::F32), ..small() };
        let mut head = Head::new(&device, &Comm::solo(), &options);
        let (before, mut gradient) = (head.centers(), Rows::output(ROWS, DIM));
        // Reading has made room for rows, which is too little for a batch in float32 once there is none.
        let forward = |head: &mut Head| {
            let ids: Vec<i64> = (0..CLASSES as i64).step_by(2).collect();
            head.set_sample(&ids)?;
            head.forward(&mut embeddings(), Some(&LABELS)).map(drop)
        };
        let tell = |what: &str, failure: Failure| {
            assert_told::<()>(what, Err(failure), Status::OutOfMemory, &["bytes", "are free", "rank 0"]);
        };
        starve(&turn, "cuMemAlloc_v2", 10, || forward(&mut head), tell);
        assert_eq!(head.centers(), before, "{placement:?}: rows have moved");
        head.backward(1.0, 1.0, &mut gradient).expect("backward");
        head.update(0.1).expect("update");
        let (after, drawn) = (head.centers(), head.sample_ids().expect("ids"));
        assert_eq!(drawn.len(), CLASSES as usize / 2 + 2, "the sample with two positives that it lacks");
        // As in a head that was never refused anything, and on both placements, of one rank, but for roundings.
        let mut easy = Head::new(&device, &Comm::solo(), &options);
        forward(&mut easy).expect("forward");
        easy.backward(1.0, 1.0, &mut gradient).expect("backward");
        easy.update(0.1).expect("update");
        assert_eq!(easy.centers(), after, "{placement:?}");
        assert_close("both placements", &widen(&after), &widen(expected.get_or_insert(after.clone())), 1e-6);
    }
}

/// A gradient for which there is no room is that rank's alone, and the class centers move all the same.
#[test]
fn a_gradient_for_which_there_is_no_memory_does_not_end_the_step() {
    let turn = emulator::turn(9);
    if !turn.is_emulator() {
        return;
    }
    let mut head = Head::new(&gpu(), &Comm::solo(), &small());
    let before = head.read_centers(LABELS[0] as u64, 1).expect("a row");
    let (values, mut gradient) = (embeddings().values(), Rows::output(ROWS, DIM));
    // Half the size, so that the gradient does not fit where they were.
    let mut narrow = Rows::new(&values, DIM, DType::F16, 0);
    head.forward(&mut narrow, Some(&LABELS)).expect("forward");
    turn.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY);
    let words = ["matrix", "bytes", "are free", "rank 0"];
    assert_told("a gradient", head.backward(1.0, 1.0, &mut gradient), Status::OutOfMemory, &words);
    assert_eq!(gradient.values(), [-123.0; ROWS * DIM], "written");
    head.update(0.1).expect("update");
    assert_eq!(head.metrics().expect("metrics").updates, 1);
    assert!(head.metrics().expect("metrics").grad_embeddings_norm > 0.0);
    assert_ne!(head.read_centers(LABELS[0] as u64, 1).expect("a row"), before);
    step(&mut head).expect("the head works on");
}

/// The embeddings' way to the GPU on several ranks, with the loss on the host and on the GPU.
#[test]
fn a_rank_whose_step_finds_no_memory_fails_the_step_on_all() {
    let turn = emulator::turn(10);
    if !turn.is_emulator() {
        return;
    }
    for placement in [Placement::Sharded, Placement::Replicated] {
        for late in [false, true] {
            // The first rank that asks is refused: which one that is the threads decide.
            let told = on_ranks(3, |place| {
                let head = Head::new(&gpu(), &place.comm, &HeadOptions { placement, ..small() });
                let (mut rows, mut gradient) = (embeddings(), Rows::output(ROWS, DIM));
                let (rows, gradient) = (rows.view(), gradient.view());
                let (loss, mut host) = (Remote::of(&[0f64]), 0.0);
                let loss = if late { loss.address as *mut f64 } else { &mut host };
                let refuse_one = || {
                    place.comm.barrier().expect("all are there");
                    if place.rank == 0 {
                        turn.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY);
                    }
                    place.comm.barrier().expect("all are there");
                };
                refuse_one();
                let mut failure = None;
                for round in 0..2 {
                    // SAFETY: a live head; arrays of the sizes that it takes, until after the wait.
                    unsafe {
                        let told = outcome(c_head::pfc_head_forward(head.raw, &rows, LABELS.as_ptr(), loss));
                        if told.is_ok() || late {
                            let backward = outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &gradient));
                            assert_eq!(backward, told, "round {round}");
                            assert_eq!(outcome(c_head::pfc_head_update(head.raw, 0.1)), told, "round {round}");
                        }
                        let waited = outcome(c_head::pfc_head_wait(head.raw));
                        let verdict = if late { waited } else { told.and(waited) };
                        assert_eq!(verdict.is_err(), round == 0, "round {round}: {verdict:?}");
                        failure = failure.or(verdict.err());
                    }
                }
                failure.expect("the first round's")
            });
            assert_one_of_all(&told, Status::OutOfMemory, &["a matrix", "bytes", "are free"]);
        }
    }
}

/// A sample beyond every draw for which one rank has no room: its own failure, which its peers hear of.
#[test]
fn a_rank_that_has_no_room_for_a_large_sample_fails_the_step_on_all() {
    let turn = emulator::turn(13);
    if !turn.is_emulator() {
        return;
    }
    for placement in [Placement::Sharded, Placement::Replicated] {
        for late in [false, true] {
            let told = on_ranks(3, |place| {
                let mut head = Head::new(&gpu(), &place.comm, &HeadOptions { placement, sample_rate: 0.0, ..small() });
                let (rows, gradient) = (Remote::of(&embeddings().values_f32()), Remote::of(&[0f32; ROWS * DIM]));
                let (loss, mut host) = (Remote::of(&[0f64]), 0.0);
                let loss = if late { loss.address as *mut f64 } else { &mut host };
                let (first, count) = head.shard();
                let ids: Vec<i64> = (first as i64..(first + count) as i64).step_by(2).collect();
                place.comm.barrier().expect("all are there");
                if place.rank == 0 {
                    // Who asks first, and is refused, the threads decide.
                    turn.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY);
                }
                place.comm.barrier().expect("all are there");
                let mut failure = None;
                for round in 0..2 {
                    head.set_sample(&ids).expect("a sample by itself");
                    let forward = forward(&head, &rows, &LABELS, loss);
                    if forward.is_ok() || late {
                        // SAFETY: a live head; an array of the size that it takes, until after the wait.
                        unsafe {
                            let backward = outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &gradient.matrix(DIM)));
                            assert_eq!(backward, forward, "round {round}");
                        }
                        assert_eq!(head.update(0.1), forward, "round {round}");
                    }
                    let waited = head.wait();
                    let verdict = if late { waited } else { forward.and(waited) };
                    assert_eq!(verdict.is_err(), round == 0, "{placement:?}, round {round}: {verdict:?}");
                    failure = failure.or(verdict.err());
                }
                failure.expect("the first round's")
            });
            assert_one_of_all(&told, Status::OutOfMemory, &["bytes", "are free"]);
        }
    }
}

/// Rows on the GPU are judged many at a time: whoever asks for the verdict on each waits for each.
#[test]
fn rows_on_the_gpu_are_judged_with_few_waits() {
    let turn = emulator::turn(14);
    let mut head = Head::new(&gpu(), &Comm::solo(), &small());
    let before = head.centers();
    let waits = || turn.calls("cuStreamSynchronize").unwrap_or(0);
    let write = |values: &[f32], stride: usize| {
        let rows = Remote::of(values);
        let view = partialfc::capi::types::pfc_matrix { rows: CLASSES, row_stride: stride as u64, ..rows.matrix(DIM) };
        let so_far = waits();
        // SAFETY: a live head; a matrix of the size that it says.
        let written = outcome(unsafe { c_head::pfc_head_write_centers(head.raw, 0, CLASSES, &view) });
        assert!(waits() - so_far <= 4, "{} waits for {CLASSES} rows", waits() - so_far);
        written
    };
    // What lies between the rows is nobody's.
    let stride = DIM + 2;
    let mut values: Vec<f32> =
        (0..CLASSES as usize * stride).map(|i| if i % stride < DIM { (i as f32 * 0.3).cos() } else { f32::NAN }).collect();
    values.truncate(values.len() - 2);
    let mut bad = values.clone();
    bad[599 * stride + 5] = f32::NAN;
    let words = ["row 599 (class 599)", "NaN"];
    assert_told("the last row", write(&bad, stride), Status::InvalidArgument, &words);
    write(&values, stride).expect("finite rows");
    let expected: Vec<f32> = values.chunks(stride).flat_map(|row| &row[..DIM]).copied().collect();
    assert_ne!(before, expected);
    assert_eq!(head.centers(), expected);
}

/// Of many rows a part may be written when the GPU fails: no way on from there. What is wrong with the rows is known before.
#[test]
fn rows_are_written_whole_or_the_head_says_that_they_are_not() {
    let turn = emulator::turn(15);
    if !turn.is_emulator() {
        return;
    }
    // A piece of 16 MiB, and a row.
    let (dim, classes) = (1024usize, 4096 + 1);
    let options = HeadOptions { sample_rate: 0.0, ..options(classes as u64, dim as u32, 1) };
    let device = gpu();
    let mut head = Head::new(&device, &Comm::solo(), &options);
    let ends = |head: &mut Head| [0, 4096].map(|class| head.read_centers(class, 1).expect("a row"));
    let before = ends(&mut head);
    let mut values = vec![0.25f32; classes * dim];
    values[4096 * dim + 7] = f32::INFINITY;
    assert_told("the last row", head.write_centers(0, &values), Status::InvalidArgument, &["row 4096 (class 4096)"]);
    assert_eq!(ends(&mut head), before, "written");
    values[4096 * dim + 7] = 0.25;
    let mut one = Rows::f32(&vec![1.0; dim], dim);
    head.forward(&mut one, Some(&[5])).expect("forward");
    // The step under way is none the worse for rows that are refused.
    let mut gradient = Rows::output(1, dim);
    assert_told("no such rows", head.write_centers(1, &values), Status::InvalidArgument, &["got 1 to"]);
    head.backward(1.0, 1.0, &mut gradient).expect("backward");
    turn.fail("cuMemcpyHtoDAsync_v2", 2, INVALID_HANDLE);
    let failed = head.write_centers(0, &values);
    turn.fail("", 0, 0);
    let words = ["cuMemcpyHtoDAsync", "classes 0 to 4095 were written"];
    assert_told("the second piece", failed, Status::Device, &words);
    assert_told("poisoned", head.update(0.1), Status::Poisoned, &["cuMemcpyHtoDAsync"]);
}

/// Kernels of every part of a step, and driver functions that it calls.
const KERNELS: [&str; 12] = [
    "pack_labels",
    "judge_labels",
    "sort_labels_scan",
    "find_target_columns",
    "pack_embeddings",
    "normalize_embeddings",
    "gemm_numerators_f32",
    "judge_sums",
    "embedding_gradient",
    "finish_gradient",
    "begin_update",
    "end_update",
];
const FUNCTIONS: [&str; 6] = [
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuStreamSynchronize",
];

/// A launch that the driver refuses, a kernel that fails when it runs, a call that fails: DEVICE with what it was, and no way on.
#[test]
fn work_that_fails_poisons_the_head() {
    let turn = emulator::turn(11);
    if !turn.is_emulator() {
        return;
    }
    let device = gpu();
    let mut options = small();
    options.precision = partialfc::options::Precision::F32;
    let kernels = KERNELS.into_iter().flat_map(|kernel| [(kernel, OUT_OF_RESOURCES), (kernel, LAUNCH_FAILED)]);
    let functions = FUNCTIONS.into_iter().map(|function| (function, INVALID_HANDLE));
    for (name, result) in kernels.chain(functions) {
        let what = format!("{name} {result}");
        let mut head = Head::new(&device, &Comm::solo(), &options);
        turn.fail(name, 1, result);
        let failed = step(&mut head).map(drop).and_then(|()| head.wait());
        turn.fail("", 0, 0);
        let word = match result {
            // Where the host next waits for the device, which then does not know what it was.
            LAUNCH_FAILED => "LAUNCH_FAILED",
            _ if name.starts_with("cu") => name.trim_end_matches("_v2"),
            _ => name,
        };
        assert_told(&what, failed, Status::Device, &[word, "GPU 0", "rank 0"]);
        for (call, refused) in
            [("wait", head.wait()), ("step", step(&mut head).map(drop)), ("rows", head.read_centers(0, 1).map(drop))]
        {
            assert_told(&format!("{what}, {call}"), refused, Status::Poisoned, &[word]);
        }
        assert_eq!(turn.findings().contains("as planned"), result == LAUNCH_FAILED, "{what}: {}", turn.findings());
        turn.forget_findings();
    }
    // The device itself is none the worse.
    step(&mut Head::new(&device, &Comm::solo(), &options)).expect("another head");
}

#[test]
fn a_rank_whose_work_fails_does_not_leave_the_others_waiting() {
    let turn = emulator::turn(12);
    if !turn.is_emulator() {
        return;
    }
    for name in ["judge_labels", "pack_sums", "embedding_gradient", "begin_update"] {
        let told = on_ranks(3, |place| {
            let mut head = Head::new(&gpu(), &place.comm, &small());
            place.comm.barrier().expect("all are there");
            if place.rank == 0 {
                turn.fail(name, 1, OUT_OF_RESOURCES);
            }
            place.comm.barrier().expect("all are there");
            let mut failed = step(&mut head);
            if failed.is_ok() {
                // Whoever had done its part of the step hears in the next one.
                failed = step(&mut head);
            }
            let failure = failed.expect_err(name);
            assert_told(name, head.wait(), Status::Poisoned, &[]);
            failure
        });
        let own: Vec<_> = told.iter().filter(|failure| failure.status == Status::Device as i32).collect();
        assert!(own.len() == 1 && own[0].message.contains(name), "{name}: {told:?}");
        let others = [Status::Device, Status::Aborted, Status::Remote].map(|status| status as i32);
        assert!(told.iter().all(|failure| others.contains(&failure.status)), "{name}: {told:?}");
    }
}
