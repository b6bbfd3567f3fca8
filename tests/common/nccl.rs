//! The stand-in for NCCL of `ctests/nccl`, built here and named by `PFC_NCCL_LIB`, and groups of ranks that it joins.
//!
//! `PFC_STANDIN_LIBRARY` names one that is built already, for machines without a compiler. With `PFC_TEST_DRIVER=real` the tests take
//! the machine's own NCCL.

use std::ffi::{c_char, c_void, CString};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use partialfc::capi::comm as c_comm;

use super::ffi::{outcome, Comm, Outcome};
use super::gpu::gpu;
use super::simt;

/// What a rank's operation comes to; see ctests/nccl/standin.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call gives this code.
    Enqueue(i32),
    /// The communicator fails with this code once the stream is there.
    Async(i32),
    /// It never ends by itself.
    Hang,
    /// It ends so many milliseconds later.
    Delay(i32),
    /// This element of what comes is another.
    Wrong(i32),
    /// Half of what should come comes.
    Short,
}

pub const SYSTEM_ERROR: i32 = 2;
pub const REMOTE_ERROR: i32 = 6;

/// The stand-in's own functions.
pub struct StandIn {
    version: unsafe extern "C" fn(i32),
    reset: unsafe extern "C" fn(),
    plan: unsafe extern "C" fn(i32, i32, i32, i32),
    in_progress: unsafe extern "C" fn(i32),
    tell: unsafe extern "C" fn(i32),
    live: unsafe extern "C" fn() -> i32,
    operations: unsafe extern "C" fn(i32) -> u64,
    findings: unsafe extern "C" fn(*mut c_char, usize) -> usize,
}

// SAFETY of all methods: as standin.h declares the functions.
impl StandIn {
    pub fn version(&self, version: i32) {
        unsafe { (self.version)(version) };
    }

    pub fn plan(&self, rank: usize, operation: i64, fault: Fault) {
        let (kind, value) = match fault {
            Fault::Enqueue(code) => (1, code),
            Fault::Async(code) => (2, code),
            Fault::Hang => (3, 0),
            Fault::Delay(milliseconds) => (4, milliseconds),
            Fault::Wrong(element) => (5, element),
            Fault::Short => (6, 0),
        };
        unsafe { (self.plan)(rank as i32, operation as i32, kind, value) };
    }

    /// Operations are in progress for so many questions after them.
    pub fn in_progress(&self, polls: i32) {
        unsafe { (self.in_progress)(polls) };
    }

    /// A rank that has gone is an error of its peers'.
    pub fn tell(&self) {
        unsafe { (self.tell)(1) };
    }

    pub fn operations(&self, rank: usize) -> u64 {
        unsafe { (self.operations)(rank as i32) }
    }

    fn findings(&self) -> String {
        unsafe {
            let mut text = vec![0u8; (self.findings)(std::ptr::null_mut(), 0) + 1];
            let length = (self.findings)(text.as_mut_ptr().cast(), text.len());
            text.truncate(length.min(text.len() - 1));
            String::from_utf8_lossy(&text).into_owned()
        }
    }
}

/// A turn at the driver and at NCCL: no plans at its beginning; no findings and no communicators left at its end.
pub struct Turn {
    standin: Option<&'static StandIn>,
    pub driver: simt::Turn,
}

pub fn turn(seed: u64) -> Turn {
    let driver = simt::turn(seed);
    let turn = Turn { standin: if driver.is_emulator() { Some(load()) } else { None }, driver };
    if let Some(standin) = turn.standin {
        unsafe { (standin.reset)() };
    }
    turn
}

impl Turn {
    /// None: this is NCCL itself.
    pub fn standin(&self) -> Option<&'static StandIn> {
        self.standin
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let (Some(standin), false) = (self.standin, std::thread::panicking()) {
            assert_eq!(standin.findings(), "", "the stand-in's findings");
            assert_eq!(unsafe { (standin.live)() }, 0, "communicators are left");
        }
    }
}

fn load() -> &'static StandIn {
    static LOADED: OnceLock<StandIn> = OnceLock::new();
    LOADED.get_or_init(|| {
        let library = std::env::var_os("PFC_STANDIN_LIBRARY").map_or_else(build, PathBuf::from);
        // The library under test looks there first.
        std::env::set_var("PFC_NCCL_LIB", &library);
        let name = CString::new(library.as_os_str().as_encoded_bytes()).expect("a path without zeros");
        // SAFETY: the stand-in has no initialisers that do anything; its functions are of the types that standin.h declares.
        unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!handle.is_null(), "{}", library.display());
            let find = |name: &str| {
                let symbol = CString::new(name).expect("a name without zeros");
                let found = libc::dlsym(handle, symbol.as_ptr());
                assert!(!found.is_null(), "the stand-in lacks {name}");
                found
            };
            StandIn {
                version: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32)>(find("standin_version")),
                reset: std::mem::transmute::<*mut c_void, unsafe extern "C" fn()>(find("standin_reset")),
                plan: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32, i32, i32, i32)>(find("standin_plan")),
                in_progress: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32)>(find("standin_in_progress")),
                tell: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32)>(find("standin_tell")),
                live: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> i32>(find("standin_live")),
                operations: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32) -> u64>(find("standin_operations")),
                findings: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_char, usize) -> usize>(find(
                    "standin_findings",
                )),
            }
        }
    })
}

/// Builds the stand-in beside the emulator. Programs that run at once take turns.
fn build() -> PathBuf {
    let program = std::env::current_exe().expect("this program's path");
    let folder = program.ancestors().nth(2).expect("a folder of cargo's").join("nccl");
    std::fs::create_dir_all(&folder).expect("a folder for the stand-in");
    let lock = File::create(folder.join("lock")).expect("a lock for the stand-in");
    // SAFETY: an open file; the lock goes with it.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0, "{}", std::io::Error::last_os_error());
    let made = Command::new("make")
        .args(["-s", "-C", "ctests/nccl"])
        .arg(format!("OUT={}", folder.display()))
        .arg("library")
        // Cargo's jobserver is not make's to share here.
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .output()
        .expect("make");
    assert!(made.status.success(), "the stand-in does not build:\n{}", String::from_utf8_lossy(&made.stderr));
    folder.join("libnccl.so.2")
}

/// A group of ranks on one GPU, each with a device of its own.
pub fn group(ranks: usize) -> Vec<Comm> {
    try_group(ranks).into_iter().map(|joined| joined.expect("a communicator")).collect()
}

/// What came of joining, for each rank.
pub fn try_group(ranks: usize) -> Vec<Outcome<Comm>> {
    let mut id = [0u8; 128];
    // SAFETY: 128 bytes.
    outcome(unsafe { c_comm::pfc_nccl_unique_id(id.as_mut_ptr()) }).expect("an id");
    let join = |rank: usize| {
        let (device, mut raw) = (gpu(), std::ptr::null_mut());
        // SAFETY: 128 bytes, a living device, an output that outlives the call.
        outcome(unsafe { c_comm::pfc_comm_nccl(id.as_ptr(), rank as u32, ranks as u32, device.0, &mut raw) }).map(|()| Comm(raw))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || join(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}
