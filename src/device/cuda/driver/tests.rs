//! Over the emulator, or with `PFC_TEST_DRIVER=real` over a GPU.

use std::ffi::c_void;
use std::sync::Arc;

use cuda_emulator::{turn, Turn};
use cudarc::driver::sys;

use super::context::Pointer;
use super::*;
use crate::Status;

/// The emulator's trivial.cu for a real driver; the emulator knows its kernels by name, whatever the image.
const TRIVIAL: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry trivial_scale(.param .u64 from, .param .u64 to, .param .align 8 .b8 rule[16], .param .u32 count)
{
    .reg .pred %past;
    .reg .b32 %i, %step, %count, %add, %block, %thread;
    .reg .b64 %from, %to, %offset, %at;
    .reg .f32 %value;
    .reg .f64 %factor, %wide, %more;
    ld.param.u64 %from, [from];
    ld.param.u64 %to, [to];
    ld.param.f64 %factor, [rule];
    ld.param.u32 %add, [rule+8];
    ld.param.u32 %count, [count];
    cvta.to.global.u64 %from, %from;
    cvta.to.global.u64 %to, %to;
    cvt.rn.f64.u32 %more, %add;
    mov.u32 %block, %ctaid.x;
    mov.u32 %step, %ntid.x;
    mov.u32 %thread, %tid.x;
    mad.lo.u32 %i, %block, %step, %thread;
    mov.u32 %block, %nctaid.x;
    mul.lo.u32 %step, %step, %block;
loop:
    setp.ge.u32 %past, %i, %count;
    @%past bra done;
    mul.wide.u32 %offset, %i, 4;
    add.u64 %at, %from, %offset;
    ld.global.f32 %value, [%at];
    cvt.f64.f32 %wide, %value;
    fma.rn.f64 %wide, %wide, %factor, %more;
    cvt.rn.f32.f64 %value, %wide;
    add.u64 %at, %to, %offset;
    st.global.f32 [%at], %value;
    add.u32 %i, %i, %step;
    bra loop;
done:
    ret;
}
";

#[derive(Clone, Copy)]
#[repr(C)]
struct TrivialRule {
    factor: f64,
    add: u32,
    reserved: u32,
}

type TrivialScale = (*const f32, *mut f32, TrivialRule, u32);

fn context() -> Arc<Context> {
    // SAFETY: the default stream.
    unsafe { Context::of(0, std::ptr::null_mut()) }.expect("GPU 0")
}

fn trivial(context: &Arc<Context>) -> Kernel<TrivialScale> {
    let module = Module::load(context, "trivial", TRIVIAL.as_bytes()).expect("the image");
    module.kernel("trivial_scale").expect("the kernel")
}

fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|index| index as f32).collect()
}

fn error_of<T>(outcome: Result<T>, status: Status) -> String {
    match outcome {
        Ok(_) => panic!("{status} was expected"),
        Err(error) => {
            assert_eq!(error.status, status, "{}", error.message);
            error.message
        }
    }
}

fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[test]
fn every_function_that_is_called_is_looked_for() {
    let sources = [
        include_str!("mod.rs"),
        include_str!("context.rs"),
        include_str!("stream.rs"),
        include_str!("memory.rs"),
        include_str!("module.rs"),
    ];
    let mut called: Vec<&str> = Vec::new();
    for source in sources {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        // Names in calls, and as values: `cuName(` and `sys::cuName`.
        for (at, _) in source.match_indices("cu") {
            let name = source[at..].split(|c| !is_name(c)).next().unwrap_or("");
            let (before, after) = (&source[..at], &source[at + name.len()..]);
            let is_function = name.len() > 3 && name.as_bytes()[2].is_ascii_uppercase() && !before.ends_with(is_name);
            if is_function && !before.ends_with('"') && (after.starts_with('(') || before.ends_with("sys::")) {
                called.push(name);
            }
        }
    }
    called.sort_unstable();
    called.dedup();
    // "cuName(" stands for any of them where the macro is described.
    called.retain(|&name| name != "cuName");
    let mut listed = [FUNCTIONS, OPTIONAL_FUNCTIONS].concat();
    listed.sort_unstable();
    assert_eq!(called, listed);
}

#[test]
fn what_is_missing_is_named() {
    let names = ["libcuda.so".to_string(), "libcuda.so.1".to_string()];
    let message = error_of(require_library(false, &names), Status::Unsupported);
    assert_names(&message, &["no CUDA driver", "libcuda.so, libcuda.so.1"]);
    require_library(true, &names).expect("a driver");
    let message = error_of(require_functions(&["cuA", "cuB", "cuC"], |name| name == "cuB"), Status::Unsupported);
    assert_names(&message, &["cuA, cuC"]);
    let message = error_of(require_version(11080), Status::Unsupported);
    assert_names(&message, &["11.8", "12.0", "525"]);
    for version in [12000, 12040, 12090, 13010] {
        require_version(version).expect("new enough");
    }
}

/// In a process of its own, in which nothing has loaded the emulator.
#[test]
fn without_a_driver_there_is_an_error_and_no_panic() {
    const ALONE: &str = "PFC_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        match driver() {
            // The machine has one.
            Ok(version) => assert!(version >= LEAST_VERSION),
            Err(error) => assert_eq!(error.status, Status::Unsupported, "{}", error.message),
        }
        // SAFETY: the default stream.
        let made = unsafe { Context::of(0, std::ptr::null_mut()) };
        assert_eq!(made.map(|_| ()).err(), driver().err());
        if !unsafe { sys::is_culib_present() } {
            assert_names(&error_of(driver(), Status::Unsupported), &["libcuda.so", "libcuda.so.1"]);
        }
        return;
    }
    let name = "device::cuda::driver::tests::without_a_driver_there_is_an_error_and_no_panic";
    let child = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", name])
        .env(ALONE, "1")
        .output()
        .expect("a child");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&child.stderr));
}

#[test]
fn memory_is_zeroed_written_read_and_copied() {
    let _turn = turn(1);
    let context = context();
    for priority in [Priority::Least, Priority::Greatest] {
        let stream = Stream::new(&context, priority).expect("a stream");
        let buffer = DeviceBuffer::<f32>::zeroed(&stream, 1000, "test").expect("memory");
        assert_eq!((buffer.len(), buffer.bytes()), (1000, 4000));
        let mut values = vec![1.0; 1000];
        buffer.read(&stream, 0, &mut values).expect("to read");
        assert_eq!(values, vec![0.0; 1000]);
        buffer.write(&stream, 100, &ramp(300)).expect("to write");
        buffer.read(&stream, 100, &mut values[..300]).expect("to read");
        assert_eq!(values[..300], ramp(300));
        let other = DeviceBuffer::<f32>::zeroed(&stream, 1000, "test").expect("memory");
        let mut pinned = PinnedBuffer::<f32>::zeroed(&context, 300, "test").expect("memory");
        assert_eq!(*pinned, *vec![0.0; 300]);
        // SAFETY: within the arrays, which live until the synchronize.
        unsafe {
            stream.copy(other.as_mut_ptr().cast(), buffer.as_mut_ptr().cast(), 4000).expect("to copy");
            stream.fill(other.as_mut_ptr().add(100).cast(), 0xff, 4).expect("to fill");
            other.download(&stream, 100, &pinned, 300).expect("to download");
        }
        stream.synchronize().expect("the copies");
        assert!(pinned[0].is_nan());
        assert_eq!(pinned[1..], ramp(300)[1..]);
        pinned.fill(7.0);
        // SAFETY: the values stay as they are until the read, which waits.
        unsafe { buffer.upload(&stream, 700, &pinned, 300) }.expect("to upload");
        buffer.read(&stream, 600, &mut values[..400]).expect("to read");
        assert_eq!(values[..100], [0.0; 100]);
        assert_eq!(values[100..400], [7.0; 300]);
    }
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    let empty = DeviceBuffer::<u64>::zeroed(&stream, 0, "test").expect("nothing");
    assert!(empty.as_mut_ptr().is_null());
    empty.write(&stream, 0, &[]).expect("nothing");
    empty.read(&stream, 0, &mut []).expect("nothing");
    assert!(PinnedBuffer::<u64>::zeroed(&context, 0, "test").expect("nothing").is_empty());
}

#[test]
fn events_order_streams() {
    for seed in 1..=8 {
        let _turn = turn(seed);
        let context = context();
        let kernel = trivial(&context);
        let (first, second) =
            (Stream::new(&context, Priority::Least).expect("one"), Stream::new(&context, Priority::Greatest).expect("two"));
        let (made, used) = (Event::new(&context).expect("an event"), Event::new(&context).expect("an event"));
        assert!(made.is_over().expect("an answer"));
        let a = DeviceBuffer::<f32>::zeroed(&first, 1000, "a").expect("memory");
        let b = DeviceBuffer::<f32>::zeroed(&first, 1000, "b").expect("memory");
        a.write(&first, 0, &ramp(1000)).expect("to write");
        let double = TrivialRule { factor: 2.0, add: 1, reserved: 0 };
        for _ in 0..4 {
            // SAFETY: within the arrays, which outlive the streams' work.
            unsafe {
                kernel
                    .launch(&first, Grid::of(3, 64), (a.as_mut_ptr().cast_const(), b.as_mut_ptr(), double, 1000))
                    .expect("a launch");
                made.record(&first).expect("a record");
                second.wait(&made).expect("a wait");
                kernel
                    .launch(&second, Grid::of(2, 96), (b.as_mut_ptr().cast_const(), a.as_mut_ptr(), double, 1000))
                    .expect("a launch");
                used.record(&second).expect("a record");
                first.wait(&used).expect("a wait");
            }
        }
        used.synchronize().expect("the work");
        assert!(used.is_over().expect("an answer"));
        let mut values = vec![0.0; 1000];
        a.read(&first, 0, &mut values).expect("to read");
        assert!(values.iter().enumerate().all(|(index, &value)| value == index as f32 * 256.0 + 255.0));
    }
}

#[test]
fn events_of_a_pool_are_used_again() {
    let turn = turn(3);
    let context = context();
    let kernel = trivial(&context);
    let pool = EventPool::new(&context);
    let (first, second) =
        (Stream::new(&context, Priority::Least).expect("one"), Stream::new(&context, Priority::Greatest).expect("two"));
    let a = DeviceBuffer::<f32>::zeroed(&first, 1000, "a").expect("memory");
    let b = DeviceBuffer::<f32>::zeroed(&first, 1000, "b").expect("memory");
    let count = |function: &str| turn.calls(function).unwrap_or(0);
    let [made, gone] = ["cuEventCreate", "cuEventDestroy_v2"].map(count);
    let add = TrivialRule { factor: 1.0, add: 1, reserved: 0 };
    for _ in 0..4 {
        // SAFETY: within the arrays, which outlive the streams' work.
        let launch = |stream: &Stream, from: &DeviceBuffer<f32>, to: &DeviceBuffer<f32>| unsafe {
            let arguments = (from.as_mut_ptr().cast_const(), to.as_mut_ptr(), add, 1000);
            kernel.launch(stream, Grid::of(3, 64), arguments).expect("a launch");
        };
        launch(&first, &a, &b);
        // The next record may come before the second stream has waited for this one.
        second.wait(&pool.record(&first).expect("a record")).expect("a wait");
        launch(&second, &b, &a);
        first.wait(&pool.record(&second).expect("a record")).expect("a wait");
    }
    let both = [pool.record(&first).expect("a record"), pool.record(&second).expect("a record")];
    both.iter().for_each(|event| event.synchronize().expect("the work"));
    let mut values = vec![0.0; 1000];
    a.read(&first, 0, &mut values).expect("to read");
    assert_eq!(values, vec![8.0; 1000]);
    drop((both, pool));
    if turn.is_emulator() {
        assert_eq!((count("cuEventCreate") - made, count("cuEventDestroy_v2") - gone), (2, 2));
    }
}

#[test]
fn kernels_are_checked_when_they_are_loaded() {
    let _turn = turn(2);
    let context = context();
    let module = Module::load(&context, "trivial", TRIVIAL.as_bytes()).expect("the image");
    let kernel = module.kernel::<TrivialScale>("trivial_scale").expect("the kernel");
    assert!(kernel.blocks_per_multiprocessor(128, 0).expect("a number") >= 1);
    assert!((32..=1024).contains(&kernel.largest_block().expect("a number")));
    kernel.allow_shared(64 << 10).expect("shared memory");
    kernel.prefer_shared().expect("a preference");
    let largest = context.largest_shared().expect("a number");
    let message = error_of(kernel.allow_shared(largest + 1), Status::Unsupported);
    assert_names(&message, &["trivial_scale", &largest.to_string(), &(largest + 1).to_string()]);

    let message = error_of(module.kernel::<(u32,)>("trivial_nothing"), Status::Device);
    assert_names(&message, &["trivial_nothing", "cuModuleGetFunction", "GPU 0"]);
    let message = error_of(module.kernel::<(u64, u64, u32, u32)>("trivial_scale"), Status::Device);
    assert_names(&message, &["trivial_scale", "[8, 8, 16, 4]", "[8, 8, 4, 4]"]);
    error_of(module.kernel::<(u64, u64, TrivialRule)>("trivial_scale"), Status::Device);
    error_of(module.kernel::<(u64, u64, TrivialRule, u32, u32)>("trivial_scale"), Status::Device);
}

#[test]
fn launches_that_cannot_be_are_errors() {
    let _turn = turn(3);
    let context = context();
    let kernel = trivial(&context);
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    let rule = TrivialRule { factor: 1.0, add: 0, reserved: 0 };
    let nothing = (std::ptr::null(), std::ptr::null_mut(), rule, 0);
    // SAFETY: a count of 0: nothing is read.
    unsafe {
        kernel.launch(&stream, Grid::of(0, 64), nothing).expect("nothing to do");
        kernel.launch(&stream, Grid::of(1, 64), nothing).expect("a launch");
        let message = error_of(kernel.launch(&stream, Grid::of(1, 2048), nothing), Status::Device);
        assert_names(&message, &["trivial_scale", "2048", "cuLaunchKernel", "CUDA_ERROR_"]);
        let largest = context.largest_shared().expect("a number");
        let grid = Grid { blocks: 1, threads: 64, shared: largest + 1 };
        error_of(kernel.launch(&stream, grid, nothing), Status::Device);
    }
    stream.synchronize().expect("the launch");
}

#[test]
fn the_failure_of_a_kernel_comes_with_the_call_that_waits() {
    let turn = turn(4);
    // What is dropped after this needs a turn of its own.
    let _after: Turn;
    if !turn.is_emulator() {
        // On a GPU it would end the process's use of it.
        return;
    }
    let context = context();
    let kernel = trivial(&context);
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    let buffer = DeviceBuffer::<f32>::zeroed(&stream, 100, "test").expect("memory");
    let rule = TrivialRule { factor: 1.0, add: 0, reserved: 0 };
    // SAFETY: none: the emulator is to find that the array ends before element 100.
    unsafe {
        let arguments = (buffer.as_mut_ptr().cast_const(), buffer.as_mut_ptr(), rule, 101);
        kernel.launch(&stream, Grid::of(1, 128), arguments).expect("a launch");
    }
    let message = error_of(stream.synchronize(), Status::Device);
    assert_names(&message, &["cuStreamSynchronize", "GPU 0", "CUDA_ERROR_LAUNCH_FAILED"]);
    assert_names(&turn.findings(), &["trivial_scale", "out of bounds"]);
    // A turn with a finding does not end well, and the next begins without.
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(turn)));
    assert!(end.is_err());
    _after = cuda_emulator::turn(4);
    assert_eq!(_after.findings(), "");
}

/// The emulator delays streams as long as it may, in an order that only events bind: here is none.
#[test]
fn a_missing_event_is_found() {
    let turn = turn(13);
    if !turn.is_emulator() {
        return;
    }
    let context = context();
    let kernel = trivial(&context);
    let first = Stream::new(&context, Priority::Least).expect("a stream");
    let second = Stream::new(&context, Priority::Least).expect("a stream");
    let buffer = DeviceBuffer::<f32>::zeroed(&first, 1000, "test").expect("memory");
    first.synchronize().expect("the zeros");
    let rule = TrivialRule { factor: 1.0, add: 1, reserved: 0 };
    for stream in [&first, &second] {
        let arguments = (buffer.as_mut_ptr().cast_const(), buffer.as_mut_ptr(), rule, 1000);
        // SAFETY: within the array, which outlives the streams' work; the race is what the emulator is to find.
        unsafe { kernel.launch(stream, Grid::of(1, 128), arguments) }.expect("a launch");
    }
    error_of(context.synchronize(), Status::Device);
    assert_names(&turn.findings(), &["trivial_scale", "stream"]);
    turn.forget_findings();
}

#[test]
fn memory_that_is_not_to_be_had_is_an_error_and_nothing_is_lost() {
    let turn = turn(5);
    let context = context();
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    let before = context.free_memory().expect("a number");
    let wanted = before as usize + (1 << 30);
    let message = error_of(DeviceBuffer::<u8>::zeroed(&stream, wanted, "numerators"), Status::OutOfMemory);
    assert_names(&message, &["numerators", &wanted.to_string(), "GPU 0", "free"]);
    if turn.is_emulator() {
        assert_names(&message, &[&before.to_string()]);
        assert_eq!(context.free_memory().expect("a number"), before);
    }
    error_of(DeviceBuffer::<u64>::zeroed(&stream, usize::MAX / 4, "numerators"), Status::OutOfMemory);
    error_of(PinnedBuffer::<u64>::zeroed(&context, usize::MAX / 4, "numerators"), Status::OutOfMemory);
    // What is had is given back.
    drop(DeviceBuffer::<u8>::zeroed(&stream, 1 << 20, "test").expect("memory"));
    if turn.is_emulator() {
        assert_eq!(context.free_memory().expect("a number"), before);
    }
}

#[test]
fn ordinals_are_checked() {
    let _turn = turn(6);
    let mut count = 0;
    driver().expect("a driver");
    // SAFETY: an output that outlives the call.
    unsafe { call!(0, cuDeviceGetCount(&mut count)) }.expect("a count");
    for ordinal in [-1, count, i32::MAX] {
        // SAFETY: the default stream.
        let message = error_of(unsafe { Context::of(ordinal, std::ptr::null_mut()) }, Status::InvalidArgument);
        assert_names(&message, &["ordinal", &format!("below {count}"), &format!("got {ordinal}")]);
    }
    let context = context();
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    // SAFETY: a living stream.
    let same = unsafe { Context::of(0, stream.raw()) }.expect("the stream's context");
    assert_eq!(same.ordinal(), 0);
    if count > 1 {
        // SAFETY: a living stream.
        let message = error_of(unsafe { Context::of(1, stream.raw()) }, Status::InvalidArgument);
        assert_names(&message, &["ordinal must be 0", "GPU 0", "got 1"]);
    }
    assert!(!same.name().expect("a name").is_empty());
    assert!(same.multiprocessors().expect("a number") > 0);
    assert!(same.compute_capability().expect("numbers") >= (8, 0));
}

#[test]
fn a_thread_has_its_context_back() {
    let _turn = turn(7);
    let context = context();
    let current = || {
        let mut current = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        unsafe { call!(0, cuCtxGetCurrent(&mut current)) }.expect("an answer");
        current
    };
    let of_a_thread = || {
        let none = current();
        let outer = context.enter().expect("to enter");
        let ours = current();
        assert!(!ours.is_null());
        {
            let _inner = context.enter().expect("to enter again");
            assert_eq!(current(), ours);
        }
        assert_eq!(current(), ours);
        let stream = Stream::new(&context, Priority::Least).expect("a stream");
        DeviceBuffer::<f32>::zeroed(&stream, 10, "test").expect("memory").write(&stream, 0, &ramp(10)).expect("to write");
        drop(stream);
        assert_eq!(current(), ours);
        drop(outer);
        assert_eq!(current(), none);
    };
    std::thread::scope(|threads| {
        threads.spawn(of_a_thread).join().expect("a thread");
    });
    of_a_thread();
}

#[test]
fn pointers_are_the_hosts_or_the_devices() {
    let _turn = turn(8);
    let context = context();
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    let space = |pointer: *const c_void| context.memory_space("rows.data", pointer).expect("a memory space");
    let host = [0f32; 4];
    assert_eq!(space(host.as_ptr().cast()), MemorySpace::Host);
    let device = DeviceBuffer::<f32>::zeroed(&stream, 100, "test").expect("memory");
    assert_eq!(space(device.as_mut_ptr().cast()), MemorySpace::Device);
    assert_eq!(space(device.as_mut_ptr().wrapping_add(99).cast()), MemorySpace::Device);
    let pinned = PinnedBuffer::<f32>::zeroed(&context, 100, "test").expect("memory");
    assert_eq!(space(pinned.as_raw().cast()), MemorySpace::Host);
}

#[test]
fn foreign_memory_is_refused() {
    let _turn = turn(12);
    let context = context();
    let (_current, mut ours) = (context.enter().expect("to enter"), std::ptr::null_mut());
    // SAFETY: an output that outlives the call.
    unsafe { call!(0, cuCtxGetCurrent(&mut ours)) }.expect("an answer");
    let other = std::ptr::dangling_mut::<u64>().cast();
    let own = Pointer { on_device: true, managed: false, ordinal: 0, context: ours };
    let judge = |pointer| context.judge_pointer("rows.data", pointer);
    assert_eq!(judge(own), Ok(MemorySpace::Device));
    assert_eq!(judge(Pointer { context: std::ptr::null_mut(), ..own }), Ok(MemorySpace::Device));
    assert_eq!(judge(Pointer { on_device: false, ordinal: 3, context: other, ..own }), Ok(MemorySpace::Host));
    assert_eq!(judge(Pointer { on_device: false, managed: true, ordinal: 3, context: other }), Ok(MemorySpace::Device));
    let message = error_of(judge(Pointer { ordinal: 3, context: other, ..own }), Status::InvalidArgument);
    assert_names(&message, &["rows.data", "GPU 3", "GPU 0"]);
    let message = error_of(judge(Pointer { context: other, ..own }), Status::InvalidArgument);
    assert_names(&message, &["rows.data", "another context", "GPU 0"]);
}

/// As above, with a context that there is.
#[test]
fn memory_of_another_context_is_refused() {
    let _turn = turn(9);
    let context = context();
    let mut other = std::ptr::null_mut();
    let mut data = 0;
    // SAFETY: outputs that outlive the calls; the new context is popped, and destroyed in the end with its memory.
    unsafe {
        assert_eq!(sys::cuCtxCreate_v2(&mut other, 0, 0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemAlloc_v2(&mut data, 4096), CUresult::CUDA_SUCCESS);
        let mut popped = std::ptr::null_mut();
        assert_eq!(sys::cuCtxPopCurrent_v2(&mut popped), CUresult::CUDA_SUCCESS);
    }
    let message = error_of(context.memory_space("rows.data", data as *const c_void), Status::InvalidArgument);
    assert_names(&message, &["rows.data", "another context", "GPU 0"]);
    // SAFETY: made above.
    unsafe { assert_eq!(sys::cuCtxDestroy_v2(other), CUresult::CUDA_SUCCESS) };
}

/// The default stream is the caller's thread's context, and a stream's owner stays its owner.
#[test]
fn borrowed_streams_are_not_destroyed() {
    let turn = turn(10);
    let context = context();
    let own = Stream::new(&context, Priority::Least).expect("a stream");
    for raw in [own.raw(), std::ptr::null_mut()] {
        let before = turn.calls("cuStreamDestroy_v2");
        // SAFETY: it outlives the borrow.
        let stream = unsafe { Stream::borrowed(&context, raw) };
        let buffer = DeviceBuffer::<f32>::zeroed(&stream, 10, "test").expect("memory");
        buffer.write(&stream, 0, &ramp(10)).expect("to write");
        drop(stream);
        assert_eq!(turn.calls("cuStreamDestroy_v2"), before);
    }
    own.synchronize().expect("the stream lives");
}

#[test]
fn a_turn_is_of_the_driver_that_was_asked_for() {
    let turn: Turn = turn(11);
    let real = std::env::var("PFC_TEST_DRIVER").is_ok_and(|driver| driver == "real");
    assert_eq!(turn.is_emulator(), !real);
    driver().expect("a driver");
    assert_eq!(turn.calls("cuInit").is_none(), real);
    assert_ne!(turn.calls("cuInit"), Some(0));
}
