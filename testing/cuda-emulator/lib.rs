//! The CUDA driver that tests run on: the emulator beside this file, built and loaded before anything asks for a driver, or the
//! machine's own.
//!
//! `PFC_TEST_DRIVER` is `simt` (also if it is not set) or `real`; with `real` a test fails where the driver is the emulator or there
//! is none. `PFC_SIMT_LIBRARY` names an emulator that is built already, for machines without a compiler.
//!
//! The library under test needs not know of it: `PFC_KERNEL_IMAGES` hands it an image of each kernel source. These are empty, because
//! the emulator has the kernels in itself, by name.

use std::ffi::{c_char, c_void, CString};
use std::fs::File;
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const IMAGES: &str = "PFC_KERNEL_IMAGES";

/// Where kernels that are compiled for the host find `pfc_host_device.h`, from the package's folder on.
pub const HEADERS: &str = "testing/cuda-emulator";

/// Declares a structure of a library's functions, and how to look them up in a loaded library.
#[macro_export]
macro_rules! functions {
    ($(#[$doc:meta])* struct $name:ident { $($field:ident: $symbol:literal = fn($($argument:ty),*) $(-> $result:ty)?,)* }) => {
        $(#[$doc])*
        struct $name {
            $($field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $name {
            /// # Safety
            /// The library has these functions with these types.
            unsafe fn of(library: $crate::Loaded) -> $name {
                $name {
                    $($field: std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(
                        library.required($symbol),
                    ),)*
                }
            }
        }
    };
}

functions! {
    /// The emulator's own functions; see simt.h.
    struct Simt {
        seed: "simt_seed" = fn(u64),
        report: "simt_report" = fn(*mut c_char, usize) -> usize,
        forget: "simt_forgive" = fn(),
        count: "simt_count" = fn(*const c_char) -> u64,
        memory: "simt_memory" = fn(u64),
        profile: "simt_profile" = fn(i32, i32),
        multiprocessors: "simt_multiprocessors" = fn(i32),
        devices: "simt_devices" = fn(i32),
        driver_version: "simt_driver_version" = fn(i32),
        fail: "simt_fail" = fn(*const c_char, u64, i32),
    }
}

/// A turn at the driver. Turns do not overlap within a process: the emulator's seed, findings and counts are the process's.
///
/// At its end there must be no finding, but what was forgotten.
pub struct Turn {
    simt: Option<&'static Simt>,
    _alone: MutexGuard<'static, ()>,
}

/// Waits for a turn. The emulator's choices begin anew from `seed`.
pub fn turn(seed: u64) -> Turn {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed in its turn has told so itself.
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let turn = Turn { simt: load(), _alone: alone };
    turn.forget_findings();
    turn.seed(seed);
    turn
}

impl Turn {
    pub fn is_emulator(&self) -> bool {
        self.simt.is_some()
    }

    pub fn seed(&self, seed: u64) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.seed)(seed) };
        }
    }

    /// What the emulator has found so far; empty on a real driver.
    pub fn findings(&self) -> String {
        self.simt.map_or_else(String::new, findings_of)
    }

    /// Forgets the findings, and the error that they left in the context.
    pub fn forget_findings(&self) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.forget)() };
        }
    }

    /// How often a driver function was called in this process so far; None on a real driver.
    pub fn calls(&self, function: &str) -> Option<u64> {
        let name = CString::new(function).expect("a name without zeros");
        // SAFETY: as simt.h declares it.
        self.simt.map(|simt| unsafe { (simt.count)(name.as_ptr()) })
    }

    /// Device memory that can be allocated together from now on.
    pub fn memory(&self, bytes: u64) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.memory)(bytes) };
        }
    }

    /// The device's compute capability from now on.
    pub fn profile(&self, major: i32, minor: i32) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.profile)(major, minor) };
        }
    }

    /// The device's multiprocessors from now on; 0: the seed decides.
    pub fn multiprocessors(&self, count: i32) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.multiprocessors)(count) };
        }
    }

    /// How many devices there are from now on, 8 at most.
    pub fn devices(&self, count: i32) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.devices)(count) };
        }
    }

    /// What cuDriverGetVersion tells from now on.
    pub fn driver_version(&self, version: i32) {
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.driver_version)(version) };
        }
    }

    /// Lets the `nth` call from now (1: the next; 0: none) of a driver function or launch of a kernel give `result`; a kernel with 719
    /// fails when it runs.
    pub fn fail(&self, name: &str, nth: u64, result: i32) {
        let name = CString::new(name).expect("a name without zeros");
        if let Some(simt) = self.simt {
            // SAFETY: as simt.h declares it.
            unsafe { (simt.fail)(name.as_ptr(), nth, result) };
        }
    }
}

fn findings_of(simt: &Simt) -> String {
    // SAFETY: as simt.h declares it: at most as many bytes are written as there are.
    unsafe {
        let mut text = vec![0u8; (simt.report)(std::ptr::null_mut(), 0) + 1];
        let length = (simt.report)(text.as_mut_ptr().cast(), text.len());
        text.truncate(length.min(text.len() - 1));
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let findings = self.findings();
        self.forget_findings();
        self.fail("", 0, 0);
        self.profile(8, 0);
        self.multiprocessors(0);
        // A second panic would hide the first.
        if !std::thread::panicking() {
            assert!(findings.is_empty(), "the emulator's findings:\n{findings}");
        }
    }
}

/// Loads the driver that `PFC_TEST_DRIVER` asks for, once in a process.
pub fn ready() {
    load();
}

/// What the emulator has found in this process so far; empty on a real driver.
pub fn findings() -> String {
    load().map_or_else(String::new, findings_of)
}

fn load() -> Option<&'static Simt> {
    static LOADED: OnceLock<Option<Simt>> = OnceLock::new();
    LOADED
        .get_or_init(|| match std::env::var("PFC_TEST_DRIVER").as_deref() {
            Ok("real") => {
                let names = ["libcuda.so", "libcuda.so.1"];
                let driver = names.iter().find_map(|name| Loaded::open(Path::new(name)).ok());
                let driver = driver.expect("PFC_TEST_DRIVER is real, but there is no CUDA driver");
                assert!(driver.symbol("simt_seed").is_null(), "PFC_TEST_DRIVER is real, but the driver is the emulator");
                None
            }
            Ok("simt") | Err(std::env::VarError::NotPresent) => {
                let library = library();
                offer_images(&library);
                let library = Loaded::open(&library).unwrap_or_else(|error| panic!("the emulator: {error}"));
                // SAFETY: the functions are of these types, which simt.h declares.
                Some(unsafe { Simt::of(library) })
            }
            other => panic!("PFC_TEST_DRIVER must be simt or real, got {other:?}"),
        })
        .as_ref()
}

/// The emulator's library, built where none is named.
fn library() -> PathBuf {
    std::env::var_os("PFC_SIMT_LIBRARY").map_or_else(|| build("cuda-emulator", "libcuda.so"), PathBuf::from)
}

/// Lets this process load an emulator that has only what drivers of CUDA 12.0 have. To be called before anything asks for a driver.
pub fn choose_old_driver() {
    std::env::set_var("PFC_SIMT_LIBRARY", build("cuda-emulator", "old/libcuda.so"));
}

/// In this process the library under test takes the images that were made with the emulator, unless others are named.
fn offer_images(library: &Path) {
    if std::env::var_os(IMAGES).is_none() {
        std::env::set_var(IMAGES, images_of(library));
    }
}

fn images_of(library: &Path) -> PathBuf {
    library.parent().expect("its folder").join("images")
}

/// Gives what a command starts the emulator, with so many GPUs. It is not loaded into this process.
pub fn emulate(command: &mut Command, devices: usize) -> &mut Command {
    let driver = library();
    let mut folders = vec![driver.parent().expect("its folder").to_owned()];
    folders.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(folders).expect("folders without colons"));
    command.env(IMAGES, images_of(&driver)).env("PFC_SIMT_DEVICES", devices.to_string())
}

/// A library that is loaded, for the rest of the process.
#[derive(Clone, Copy)]
pub struct Loaded(*mut c_void);

impl Loaded {
    /// Once loaded by its path, the emulator is what every later look for `libcuda.so` finds: it has that name inside.
    pub fn open(library: &Path) -> Result<Loaded, String> {
        let name = CString::new(library.as_os_str().as_encoded_bytes()).expect("a path without zeros");
        // SAFETY: a driver's initializers may run; the error's text is read before the next call.
        unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
            match handle.is_null() {
                false => Ok(Loaded(handle)),
                true => Err(std::ffi::CStr::from_ptr(libc::dlerror()).to_string_lossy().into_owned()),
            }
        }
    }

    /// A function, or NULL.
    pub fn symbol(self, name: &str) -> *mut c_void {
        let name = CString::new(name).expect("a name without zeros");
        // SAFETY: a handle from dlopen.
        unsafe { libc::dlsym(self.0, name.as_ptr()) }
    }

    /// A function that the library must have.
    pub fn required(self, name: &str) -> *mut c_void {
        let found = self.symbol(name);
        assert!(!found.is_null(), "the library lacks {name}");
        found
    }
}

/// Builds the library of a folder of `testing` beside this program's own folder, as far as it is out of date. Programs that run at once
/// take turns.
pub fn build(name: &str, library: &str) -> PathBuf {
    let program = std::env::current_exe().expect("this program's path");
    let folder = program.ancestors().nth(2).expect("a folder of cargo's").join(name);
    std::fs::create_dir_all(&folder).expect("a folder for what is built");
    let lock = File::create(folder.join("lock")).expect("a lock for what is built");
    // SAFETY: an open file; the lock goes with it.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0, "{}", std::io::Error::last_os_error());
    // Cargo starts test programs in the package's folder.
    let made = Command::new("make")
        .args(["-s", "-C", &format!("testing/{name}")])
        .arg(format!("-j{}", std::thread::available_parallelism().map_or(1, NonZero::get)))
        .arg(format!("OUT={}", folder.display()))
        .arg("library")
        // Cargo's jobserver is not make's to share here.
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .output()
        .expect("make");
    assert!(made.status.success(), "{library} does not build:\n{}", String::from_utf8_lossy(&made.stderr));
    folder.join(library)
}
