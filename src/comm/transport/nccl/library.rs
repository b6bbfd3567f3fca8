//! libnccl.so.2: found at run time, its version asked before anything else, its results made ours.

use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};
use nccl_sys::{ncclComm_t, ncclResult_t, Nccl};

use crate::{ensure, environment, error, Error, Result};

/// Names a library that is taken before all others.
const VARIABLE: &str = "PFC_NCCL_LIB";
/// The names that it has, in the order in which they are tried.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first with all that is called here and a configuration that bounds a communicator's thread blocks.
const LEAST_VERSION: u32 = 21800;

/// NCCL as it was loaded, for the life of the process.
pub(super) struct Library {
    pub nccl: Nccl,
    /// As ncclGetVersion counts: major * 10000 + minor * 100 + patch.
    pub version: u32,
    /// Where it came from, for messages.
    pub origin: String,
}

/// `call!(library, ncclName(arguments))`: what a function returns, or UNSUPPORTED where the library lacks it. Needs `unsafe`.
macro_rules! call {
    ($library:expr, $function:ident ( $($argument:expr),* $(,)? )) => {
        match &$library.nccl.$function {
            Ok(function) => Ok(function($($argument),*)),
            Err(_) => Err($crate::comm::nccl::library::missing($library, stringify!($function))),
        }
    };
}
pub(super) use call;

#[cold]
pub(super) fn missing(library: &Library, function: &str) -> Error {
    match library.version {
        0 => error!(Unsupported, "{} is not NCCL: it lacks {function}", library.origin),
        version => error!(Unsupported, "NCCL {} ({}) lacks {function}", Version(version), library.origin),
    }
}

/// The library. What could not be loaded is looked for again at the next call.
///
/// Errors: UNSUPPORTED, where there is none, it is too old, or it lacks a function.
pub(super) fn library() -> Result<&'static Library> {
    static LIBRARY: Mutex<Option<&'static Library>> = Mutex::new(None);
    let mut loaded = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    match *loaded {
        Some(library) => Ok(library),
        None => {
            // Never unloaded: its threads do not all end with their communicators.
            let library: &'static Library = Box::leak(Box::new(load()?));
            log::info!("NCCL {} from {}", Version(library.version), library.origin);
            *loaded = Some(library);
            Ok(library)
        }
    }
}

fn load() -> Result<Library> {
    let (opened, origin) = open()?;
    // SAFETY: symbols are looked up, nothing is called.
    let nccl = unsafe { Nccl::from_library(libloading::Library::from(opened)) };
    let nccl = nccl.map_err(|error| error!(Unsupported, "{origin}: {error}"))?;
    let mut library = Library { nccl, version: 0, origin };
    let mut version = 0;
    // SAFETY: an output that outlives the call.
    let result = unsafe { call!(&library, ncclGetVersion(&mut version)) }?;
    library.expect_success("ncclGetVersion", result, std::ptr::null_mut())?;
    library.version = version as u32;
    ensure!(
        library.version >= LEAST_VERSION,
        Unsupported,
        "NCCL must be {} or later, got {} ({})",
        Version(LEAST_VERSION),
        Version(library.version),
        library.origin
    );
    Ok(library)
}

/// What the environment names, or what the process has loaded already, or what the loader finds.
fn open() -> Result<(Opened, String)> {
    // SAFETY: loading a library runs its initializers; NCCL is made for that.
    let load = |name: &str, flags| unsafe { Opened::open(Some(name), flags) };
    if let Some(path) = environment::setting(VARIABLE) {
        // SAFETY: as above.
        return match unsafe { Opened::open(Some(&path), RTLD_NOW | RTLD_LOCAL) } {
            Ok(opened) => Ok((opened, path.to_string_lossy().into_owned())),
            Err(error) => Err(error!(Unsupported, "cannot load {path:?}, which {VARIABLE} names: {}", reason(&error))),
        };
    }
    // A framework's own NCCL rather than another beside it: two of different versions in one process do not get on.
    let loaded = load(NAMES[0], RTLD_NOW | libc::RTLD_NOLOAD).ok().map(|opened| (opened, format!("{}, already loaded", NAMES[0])));
    let found = loaded.or_else(|| {
        NAMES.iter().find_map(|name| load(name, RTLD_NOW | RTLD_LOCAL).ok().map(|opened| (opened, (*name).to_owned())))
    });
    found.ok_or_else(|| {
        error!(Unsupported, "cannot find NCCL: neither {} can be loaded; set {VARIABLE} to its path", NAMES.join(" nor "))
    })
}

/// What the loader says.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

impl Library {
    /// A result as ours; in progress counts as well. `comm` may be NULL.
    pub fn expect_success(&self, function: &str, result: ncclResult_t, comm: ncclComm_t) -> Result<()> {
        match result {
            ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
            result => Err(self.failure(function, result, comm)),
        }
    }

    pub fn failure(&self, function: &str, result: ncclResult_t, comm: ncclComm_t) -> Error {
        // SAFETY: NCCL's texts are static, or live until the thread's next call; both end in a zero.
        let text = |text: Result<*const std::ffi::c_char>| match text {
            Ok(text) if !text.is_null() => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
            _ => String::new(),
        };
        let what = text(unsafe { call!(self, ncclGetErrorString(result)) });
        let why = text(unsafe { call!(self, ncclGetLastError(comm)) });
        let why = if why.trim().is_empty() { why } else { format!("; {}", why.trim()) };
        error!(Comm, "{function} returned {} ({what}{why})", result.0)
    }
}

/// 23203 as 2.32.3.
struct Version(u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10000, self.0 / 100 % 100, self.0 % 100)
    }
}

#[cfg(test)]
mod tests;
