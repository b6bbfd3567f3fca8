//! The kernels without a head, each against straightforward float64 loops.

mod fused;
mod margin;
mod normalize;
mod sample;
mod update;

use std::cell::Cell;
use std::ffi::c_void;

use partialfc::capi::types::{pfc_margin, pfc_margin_init_sized, pfc_matrix};
use partialfc_testing::capi::{on_cuda, outcome, Device, Outcome, Rows};
use partialfc_testing::gpu::{self, Remote};
use partialfc_testing::numbers::Random;

/// A margin with defaults, before a test sets fields.
fn margin() -> pfc_margin {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut margin: pfc_margin = std::mem::zeroed();
        outcome(pfc_margin_init_sized(&mut margin, std::mem::size_of::<pfc_margin>() as u64)).expect("defaults");
        margin
    }
}

/// A caller's workspace of exactly as many bytes as asked for, with marks behind it that no kernel may touch: a CUDA device's in its
/// own memory.
struct Workspace {
    words: Vec<u64>,
    remote: Option<Remote>,
    bytes: u64,
}

const MARK: u64 = 0x5bad_c0de_5bad_c0de;

impl Workspace {
    /// What the query function says, through `ask`.
    fn asked(ask: impl FnOnce(*mut u64) -> i32) -> Workspace {
        let mut bytes = u64::MAX;
        outcome(ask(&mut bytes)).expect("a size");
        let words = vec![MARK; bytes.div_ceil(8) as usize + 8];
        let remote = on_cuda().then(|| Remote::of(&words));
        Workspace { words, remote, bytes }
    }

    fn pointer(&mut self) -> *mut c_void {
        self.remote.as_ref().map_or(self.words.as_mut_ptr().cast(), Remote::pointer)
    }

    fn check(&self) {
        let words = self.remote.as_ref().map_or_else(|| self.words.clone(), Remote::read);
        let behind = (self.bytes % 8) as u32 * 8;
        let used = (self.bytes / 8) as usize;
        assert!(
            words[used] >> behind == MARK >> behind && words[used + 1..].iter().all(|&word| word == MARK),
            "written behind the workspace of {} bytes",
            self.bytes
        );
    }
}

/// What a call gets of the caller's memory. On a CUDA device each argument lies now in its memory, now in the host's.
struct Loan {
    placed: Random,
    /// What may have been written, and where it belongs.
    remote: Vec<(Remote, Option<*mut c_void>)>,
}

/// Makes a call with arguments that are lent to it; then they are back in their owners' memory.
fn lend<R>(call: impl FnOnce(&mut Loan) -> R) -> R {
    thread_local! { static LOANS: Cell<u64> = const { Cell::new(0) } }
    let number = LOANS.replace(LOANS.get() + 1);
    let mut loan = Loan { placed: Random(number), remote: Vec::new() };
    let result = call(&mut loan);
    for (remote, home) in &loan.remote {
        if let Some(home) = *home {
            // SAFETY: the owner's memory, of this size; `call` has borrowed it until now.
            unsafe { remote.copy_to(home) };
        }
    }
    result
}

impl Loan {
    fn place(&mut self, at: *mut c_void, bytes: usize, home: bool) -> *mut c_void {
        // One in four stays on the host.
        if !on_cuda() || bytes == 0 || self.placed.below(4) == 0 {
            return at;
        }
        // SAFETY: the owner's memory, of this size.
        let remote = unsafe { Remote::copy(at, bytes) };
        let pointer = remote.pointer();
        self.remote.push((remote, home.then_some(at)));
        pointer
    }

    fn matrix(&mut self, rows: &mut Rows) -> pfc_matrix {
        let mut view = rows.view();
        view.data = self.place(view.data, rows.rows * rows.stride * rows.dtype().size(), true);
        view
    }

    fn array<T>(&mut self, values: &mut [T]) -> *mut T {
        self.place(values.as_mut_ptr().cast(), std::mem::size_of_val(values), true).cast()
    }

    /// An array that is only read.
    fn list<T>(&mut self, values: &[T]) -> *const T {
        self.place(values.as_ptr().cast_mut().cast(), std::mem::size_of_val(values), false).cast_const().cast()
    }
}

fn device(threads: u32) -> Device {
    if on_cuda() {
        gpu::enter();
    }
    Device::under_test(threads)
}

#[track_caller]
fn assert_refused(what: &str, result: Outcome<()>, words: &[&str]) {
    let failure = result.expect_err(what);
    assert_eq!(failure.status, partialfc::Status::InvalidArgument as i32, "{what}: {failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{what}: the text does not say {word:?}: {failure:?}");
    }
}
