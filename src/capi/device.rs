//! Devices.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::status::pfc_status;
use super::{boundary, output, required};
use crate::device::{self, Device};

/// Where a head's rows live and its arithmetic runs. Made by pfc_device_cpu or pfc_device_cuda.
pub struct pfc_device {
    pub(super) device: Arc<dyn Device>,
}

/// Makes a CPU device with a pool of threads of its own, which start with the first step.
///
/// Results have the same bits whatever the number of threads.
///
/// @param threads threads that compute, the calling one among them; 0: one for each core this process may use
/// @param out the device; free with pfc_device_free
#[no_mangle]
pub unsafe extern "C" fn pfc_device_cpu(threads: u32, out: *mut *mut pfc_device) -> pfc_status {
    boundary(|| {
        let out = output("out", out)?;
        let device = device::cpu(threads)?;
        *out = Box::into_raw(Box::new(pfc_device { device }));
        Ok(())
    })
}

/// Makes a CUDA device on the caller's stream and its context. All work is enqueued there, or on streams that wait for it.
///
/// Embeddings, labels, gradients and the loss may be in the GPU's memory or in the host's; a call waits for what it writes to the
/// host's. With a loss in the GPU's memory pfc_head_forward returns once all is enqueued: a failure then leaves rows and state alone,
/// makes the loss NaN and the gradients zero, and comes from pfc_head_wait, with the step's number.
///
/// @param ordinal the GPU, as the CUDA driver numbers it
/// @param stream a cudaStream_t or CUstream, which outlives the device; NULL: the legacy default stream;
///   CU_STREAM_PER_THREAD, which is another one in each thread, is refused
/// @param out the device; free with pfc_device_free
/// @return UNSUPPORTED without a driver, with one older than 580, or in a build without kernels for this GPU
#[no_mangle]
pub unsafe extern "C" fn pfc_device_cuda(ordinal: i32, stream: *mut c_void, out: *mut *mut pfc_device) -> pfc_status {
    boundary(|| {
        let out = output("out", out)?;
        let device = device::cuda(ordinal, stream)?;
        *out = Box::into_raw(Box::new(pfc_device { device }));
        Ok(())
    })
}

/// One line about the device, such as "cpu: 2 threads, avx512", valid until the device is freed; NULL if device is NULL.
#[no_mangle]
pub unsafe extern "C" fn pfc_device_info(device: *const pfc_device) -> *const c_char {
    match required("device", device) {
        Ok(handle) => handle.device.info().as_ptr(),
        Err(_) => std::ptr::null(),
    }
}

/// Gives the device back. Heads on it keep it alive. NULL is fine.
#[no_mangle]
pub unsafe extern "C" fn pfc_device_free(device: *mut pfc_device) {
    if !device.is_null() {
        boundary(|| {
            drop(Box::from_raw(device));
            Ok(())
        });
    }
}
