//! The stand-in for NCCL that tests run on: the library of `testing/nccl-standin`, built here and loaded after the driver, before anything
//! asks for NCCL.
//!
//! `PFC_STANDIN_LIBRARY` names one that is built already, for machines without a compiler. Processes that a test starts load it
//! from [`library`]'s path, or have its folder in `LD_LIBRARY_PATH`; testing/nccl-standin/standin.h says what their environment plans.

use std::cell::Cell;
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use partialfc::capi::comm as c_comm;

use crate::capi::{outcome, Comm};
use crate::emulator::{self, Turn};
use crate::gpu::gpu;

emulator::functions! {
    /// The stand-in's own functions; see testing/nccl-standin/standin.h.
    struct Functions {
        reset: "standin_reset" = fn(),
        plan: "standin_plan" = fn(c_int, c_int, c_int, c_int),
        findings: "standin_findings" = fn(*mut c_char, usize) -> usize,
        operations: "standin_operations" = fn(c_int) -> u64,
        live: "standin_live" = fn() -> c_int,
        slot: "standin_slot" = fn(u64),
        version: "standin_version" = fn(c_int),
        in_progress: "standin_in_progress" = fn(c_int),
        tell: "standin_tell" = fn(c_int),
        quiet: "standin_quiet" = fn(c_int),
    }
}

/// What goes wrong with an operation, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call gives this result and enqueues nothing.
    Enqueue(i32),
    /// When the stream comes to it, `ncclCommGetAsyncError` gives this result from then on, and the operation never completes.
    Async(i32),
    /// It never completes until the communicator is aborted.
    Hang,
    /// It completes so many milliseconds later.
    Delay(i32),
    /// All bits of this element of what arrives are inverted.
    Wrong(i32),
    /// The second half of the bytes does not arrive.
    Short,
}

impl Fault {
    /// As standin.h numbers and names it, and its value.
    fn parts(self) -> (c_int, &'static str, c_int) {
        match self {
            Fault::Enqueue(result) => (1, "enqueue", result),
            Fault::Async(result) => (2, "async", result),
            Fault::Hang => (3, "hang", 0),
            Fault::Delay(milliseconds) => (4, "delay", milliseconds),
            Fault::Wrong(element) => (5, "wrong", element),
            Fault::Short => (6, "short", 0),
        }
    }

    /// The same as part of `PFC_STANDIN_PLAN`, for a process that is started.
    pub fn planned(self, rank: i32, operation: i32) -> String {
        let (_, name, value) = self.parts();
        format!("{rank}:{operation}:{name}:{value}")
    }
}

/// The stand-in, for as long as a turn at the driver: its plans, findings and counts are the process's.
///
/// At its end there must be no finding but those that were taken, and no communicator.
pub struct Standin<'turn> {
    functions: &'static Functions,
    taken: Cell<usize>,
    _turn: &'turn Turn,
}

/// Loads the stand-in, once in a process; nothing is planned.
pub fn standin(turn: &Turn) -> Standin<'_> {
    let standin = Standin { functions: load(), taken: Cell::new(0), _turn: turn };
    standin.reset();
    standin
}

/// The stand-in, where the driver is the emulator: a real one has NCCL itself.
pub fn emulated(turn: &Turn) -> Option<Standin<'_>> {
    turn.is_emulator().then(|| standin(turn))
}

/// Ranks that can share GPU 0. NCCL itself takes one; from 2.30 on more, which `PFC_TEST_NCCL_RANKS` then says.
pub fn most_ranks(turn: &Turn) -> usize {
    match std::env::var("PFC_TEST_NCCL_RANKS") {
        _ if turn.is_emulator() => 4,
        Ok(most) => most.parse().expect("PFC_TEST_NCCL_RANKS is a number"),
        Err(_) => 1,
    }
}

/// A group of ranks on one GPU.
pub fn group(ranks: usize) -> Vec<Comm> {
    let mut id = [0u8; 128];
    // SAFETY: 128 bytes.
    outcome(unsafe { c_comm::pfc_nccl_unique_id(id.as_mut_ptr()) }).expect("an id");
    let join = |rank: usize| {
        let (device, mut raw) = (gpu(), std::ptr::null_mut());
        // SAFETY: 128 bytes, a living device, an output that outlives the call.
        let joined = unsafe { c_comm::pfc_comm_nccl(id.as_ptr(), rank as u32, ranks as u32, device.0, &mut raw) };
        outcome(joined).map(|()| Comm(raw)).expect("a communicator")
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || join(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// The stand-in's library, built where none is named.
pub fn library() -> PathBuf {
    std::env::var_os("PFC_STANDIN_LIBRARY").map_or_else(|| emulator::build("nccl-standin", "libnccl.so.2"), PathBuf::from)
}

/// Loads it without a turn, for what needs no more than that it is there.
pub fn ready() {
    load();
}

impl Standin<'_> {
    /// Forgets plans, findings and counts, and sets all that is set below to what it is unless told.
    pub fn reset(&self) {
        self.taken.set(0);
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.reset)() };
    }

    /// Plans a fault for a rank's `operation`-th collective (-1: its initialization). It happens once, to the first communicator
    /// that comes to it; a rank below 0: to whichever rank does.
    pub fn plan(&self, rank: i32, operation: i32, fault: Fault) {
        let (kind, _, value) = fault.parts();
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.plan)(rank, operation, kind, value) };
    }

    /// Lets every collective of a communicator that does not block be in progress for so many questions.
    pub fn in_progress(&self, polls: i32) {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.in_progress)(polls) };
    }

    /// Whether the peers of a rank that is lost are told.
    pub fn tell(&self, tell: bool) {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.tell)(c_int::from(tell)) };
    }

    /// Bytes of a rank's data under way at once.
    pub fn slot(&self, bytes: u64) {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.slot)(bytes) };
    }

    /// What `ncclGetVersion` tells.
    pub fn version(&self, version: i32) {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.version)(version) };
    }

    /// Whether findings are kept from stderr.
    pub fn quiet(&self, quiet: bool) {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.quiet)(c_int::from(quiet)) };
    }

    /// Communicators of this process that were neither destroyed nor aborted.
    pub fn live(&self) -> i32 {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.live)() }
    }

    /// Collectives that a rank has enqueued.
    pub fn operations(&self, rank: i32) -> u64 {
        // SAFETY: as standin.h declares it.
        unsafe { (self.functions.operations)(rank) }
    }

    /// What was found and not taken so far.
    pub fn findings(&self) -> String {
        self.all_findings().split_off(self.taken.get())
    }

    /// The same, for a test that provoked it: it is then no failure.
    pub fn take_findings(&self) -> String {
        let all = self.all_findings();
        all[self.taken.replace(all.len())..].to_owned()
    }

    fn all_findings(&self) -> String {
        // SAFETY: as standin.h declares it: at most as many bytes are written as there are. Another thread's finding may come
        // between the two calls: the text is then cut at the buffer's end.
        let mut text = vec![0u8; unsafe { (self.functions.findings)(std::ptr::null_mut(), 0) } + 1];
        // SAFETY: the same.
        let length = unsafe { (self.functions.findings)(text.as_mut_ptr().cast(), text.len()) };
        text.truncate(length.min(text.len() - 1));
        String::from_utf8(text).expect("findings are plain text")
    }
}

impl Drop for Standin<'_> {
    fn drop(&mut self) {
        let (findings, live) = (self.findings(), self.live());
        self.reset();
        // A second panic would hide the first.
        if !std::thread::panicking() {
            assert!(findings.is_empty(), "the findings of the stand-in for NCCL:\n{findings}");
            assert_eq!(live, 0, "communicators that were neither destroyed nor aborted");
        }
    }
}

fn load() -> &'static Functions {
    static LOADED: OnceLock<Functions> = OnceLock::new();
    LOADED.get_or_init(|| {
        // It takes the driver that is there.
        emulator::ready();
        let library = emulator::Loaded::open(&library()).unwrap_or_else(|error| panic!("the stand-in for NCCL: {error}"));
        // SAFETY: the functions are of these types, which standin.h declares.
        unsafe { Functions::of(library) }
    })
}
