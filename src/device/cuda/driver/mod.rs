//! The CUDA driver: found at run time, with owners that free what they have allocated and errors that name the failed call.
//!
//! cudarc gives the declarations and the lazy loading. Its safe layer is not used: it destroys a caller's context on drop, waits
//! where nothing asked it to, and synchronizes when it makes a stream. And its loader panics where the library or a function is
//! missing, so that [`driver`] looks for all of them before anything is called.

mod context;
mod memory;
mod module;
mod stream;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::{ensure, error, Error, Result};

pub(crate) use context::{Context, CurrentContext, MemorySpace};
pub(crate) use memory::{DeviceBuffer, PinnedBuffer};
pub(crate) use module::{Arguments, Grid, Kernel, Module};
pub(crate) use stream::{Event, EventPool, PooledEvent, Priority, Stream};

/// The least driver for images from the oldest nvcc that makes them, as cuDriverGetVersion counts: 1000 * major + 10 * minor. Images
/// from a later nvcc ask for more themselves.
const LEAST_VERSION: i32 = 12000;
/// The first driver that has it.
const LEAST_DRIVER: &str = "525";

/// Every function of the driver that is called here and that all of these drivers have; a test compares the lists with the sources.
const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxGetDevice",
    "cuCtxGetStreamPriorityRange",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuPointerGetAttribute",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamGetCtx",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// What is called where the driver has it: since CUDA 12.4.
const OPTIONAL_FUNCTIONS: &[&str] = &["cuFuncGetParamInfo"];

/// `call!(ordinal, cuName(arguments))`: a driver function's result as ours. Needs `unsafe`.
macro_rules! call {
    ($ordinal:expr, $function:ident ( $($argument:expr),* $(,)? )) => {
        $crate::device::cuda::driver::driver_result(sys::$function($($argument),*), stringify!($function), $ordinal)
    };
}
use call;

/// The driver's version, as cuDriverGetVersion counts, once it is loaded and initialized. What the first call finds holds for the
/// life of the process.
///
/// Errors: UNSUPPORTED, where there is no driver, it is too old, or it has no GPU.
pub(crate) fn driver() -> Result<i32> {
    static DRIVER: OnceLock<Result<i32>> = OnceLock::new();
    DRIVER.get_or_init(load).clone()
}

fn load() -> Result<i32> {
    // SAFETY: loading a library runs its initializers; the CUDA driver is made for that.
    require_library(unsafe { sys::is_culib_present() }, &cudarc::get_lib_name_candidates("cuda"))?;
    // SAFETY: the library is there; the function is looked up, not called.
    let has = |name: &str| unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_ok() };
    // The version first: an old driver lacks functions too, and its age says more.
    require_functions(&["cuDriverGetVersion"], has)?;
    let mut version = 0;
    // SAFETY: an output that outlives the call; needs no cuInit.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    ensure!(result == CUresult::CUDA_SUCCESS, Unsupported, "cuDriverGetVersion failed: {result:?}");
    require_version(version)?;
    require_functions(FUNCTIONS, has)?;
    // SAFETY: as above.
    let result = unsafe { sys::cuInit(0) };
    ensure!(result == CUresult::CUDA_SUCCESS, Unsupported, "the CUDA driver does not start: cuInit: {}", describe(result));
    Ok(version)
}

/// Whether the driver has one of the optional functions.
fn has_optional(name: &'static str) -> bool {
    debug_assert!(OPTIONAL_FUNCTIONS.contains(&name));
    // SAFETY: `driver` has found the library; the function is looked up, not called.
    driver().is_ok() && unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_ok() }
}

fn require_library(present: bool, names: &[String]) -> Result<()> {
    ensure!(present, Unsupported, "there is no CUDA driver: none of {} can be loaded", names.join(", "));
    Ok(())
}

fn require_functions(names: &[&str], has: impl Fn(&str) -> bool) -> Result<()> {
    let missing: Vec<&str> = names.iter().copied().filter(|name| !has(name)).collect();
    ensure!(missing.is_empty(), Unsupported, "the CUDA driver lacks {}", missing.join(", "));
    Ok(())
}

fn require_version(version: i32) -> Result<()> {
    let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    ensure!(
        version >= LEAST_VERSION,
        Unsupported,
        "the CUDA driver is for CUDA {}; the library needs CUDA {}, which is driver {LEAST_DRIVER} or later",
        text(version),
        text(LEAST_VERSION)
    );
    Ok(())
}

/// A driver function's result; `function` as the driver exports it.
fn driver_result(result: CUresult, function: &str, ordinal: i32) -> Result<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(failure(result, function, ordinal)),
    }
}

fn failure(result: CUresult, function: &str, ordinal: i32) -> Error {
    // The suffix is the function's binary version, which no documentation knows.
    let function = function.strip_suffix("_v2").unwrap_or(function);
    error!(Device, "{function} on GPU {ordinal}: {}", describe(result))
}

/// Name and sentence of a result, as the driver has them.
fn describe(result: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver's texts live for ever.
        let known = unsafe { get(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
        (Some(name), Some(sentence)) => format!("{name} ({sentence})"),
        (Some(name), None) => name,
        _ => format!("error {}", result as u32),
    }
}

/// A drop cannot return an error: it goes to the log.
fn log_failure(what: &str, outcome: Result<()>) {
    if let Err(error) = outcome {
        log::debug!("{what}: {error}");
    }
}
