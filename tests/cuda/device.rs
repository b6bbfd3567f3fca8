//! What goes wrong with a GPU itself: work that it refuses or that fails, a stream, a context or an ordinal that is not what it should
//! be, a driver too old. Every one is a status that says so, on the rank that has it; the others hear of it.
//!
//! Most of it is planned with the emulator; with `PFC_TEST_DRIVER=real` on a GPU what a driver cannot be made to do is left out.

use std::ffi::c_void;
use std::ptr::null_mut;

use partialfc::capi::device::pfc_device_cuda;
use partialfc::capi::head as c_head;
use partialfc::options::HeadOptions;
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, status_name, Comm, Device, Failure, Head, Outcome, Rows};
use partialfc_testing::driver;
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, Remote};
use partialfc_testing::processes::run_alone;
use partialfc_testing::ranks::on_ranks;

pub(super) const ROWS: usize = 3;
pub(super) const DIM: usize = 6;
pub(super) const CLASSES: u64 = 600;
pub(super) const LABELS: [i64; ROWS] = [5, 17, 400];
/// CUDA_ERROR_OUT_OF_MEMORY, _INVALID_HANDLE, _LAUNCH_OUT_OF_RESOURCES, _LAUNCH_FAILED.
pub(super) const OUT_OF_MEMORY: i32 = 2;
const INVALID_HANDLE: i32 = 400;
const OUT_OF_RESOURCES: i32 = 701;
const LAUNCH_FAILED: i32 = 719;
/// CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
const LEGACY: usize = 1;
const OF_EACH_THREAD: usize = 2;

pub(super) fn small() -> HeadOptions {
    HeadOptions { sample_rate: 0.1, ..options(CLASSES, DIM as u32, ROWS as u64) }
}

pub(super) fn embeddings() -> Rows {
    Rows::f32(&(0..ROWS * DIM).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>(), DIM)
}

#[track_caller]
pub(super) fn assert_told<T: std::fmt::Debug>(what: &str, result: Outcome<T>, status: Status, words: &[&str]) -> Failure {
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
pub(super) fn step(head: &mut Head) -> Outcome<f64> {
    let mut gradient = Rows::output(ROWS, DIM);
    let loss = head.forward(&mut embeddings(), Some(&LABELS))?;
    head.backward(1.0, 1.0, &mut gradient)?;
    head.update(0.1)?;
    Ok(loss)
}

#[test]
fn a_driver_too_old_is_refused_with_both_versions() {
    // The driver is asked once in a process: another one is for this.
    if std::env::var_os("PFC_TEST_OLD_DRIVER").is_none() {
        return run_alone(module_path!(), "a_driver_too_old_is_refused_with_both_versions", "PFC_TEST_OLD_DRIVER", "1");
    }
    let turn = emulator::turn(1);
    turn.driver_version(11080);
    if turn.is_emulator() {
        let refused = device_on(0, null_mut()).map(|_| ());
        assert_told("a driver of CUDA 11.8", refused, Status::Unsupported, &["11.8", "12.0", "525"]);
    }
}

/// From 525 on, which has not all of the driver's functions of today: on an emulator without them a head steps, and its time is taken.
#[test]
fn the_drivers_of_cuda_12_make_steps() {
    // The driver is asked once in a process: another one is for each.
    let Ok(version) = std::env::var("PFC_TEST_CUDA_12") else {
        for version in ["12000", "12020", "12090"] {
            run_alone(module_path!(), "the_drivers_of_cuda_12_make_steps", "PFC_TEST_CUDA_12", version);
        }
        return;
    };
    if std::env::var("PFC_TEST_DRIVER").is_ok_and(|driver| driver == "real") || std::env::var_os("PFC_SIMT_LIBRARY").is_some() {
        return;
    }
    emulator::choose_old_driver();
    let trace = std::env::temp_dir().join(format!("partialfc-cuda-12-{}.json", std::process::id()));
    std::env::set_var("PFC_TRACE", &trace);
    let turn = emulator::turn(1);
    turn.driver_version(version.parse().expect("a version"));
    let mut head = Head::new(&gpu(), &Comm::solo(), &small());
    let losses = [(); 3].map(|()| step(&mut head).expect("a step"));
    assert!(losses[2] < losses[0], "{losses:?}");
    assert_eq!(turn.calls("cuFuncGetParamInfo"), Some(0));
    drop(head);
    let written = std::fs::read_to_string(&trace);
    std::fs::remove_file(&trace).expect("the trace");
    assert!(written.expect("the trace").contains("gather_centers"));
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
pub(super) fn forward(head: &Head, rows: &Remote, labels: *const [i64; ROWS], loss: *mut f64) -> Outcome<()> {
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
    // No call gets as far as the head's rows.
    assert_told("a step", step(&mut head), Status::Device, &["GPU 0", "INVALID_HANDLE"]);
    assert_told("a wait", head.wait(), Status::Device, &["GPU 0", "INVALID_HANDLE"]);
    assert_told("rows", unused.read_centers(0, 1), Status::Device, &["INVALID_HANDLE"]);
    assert_told("a head", Head::with(&device, &Comm::solo(), &small()).map(|_| ()), Status::Device, &["INVALID_HANDLE"]);
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
    "sort_labels",
    "list_sample",
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
