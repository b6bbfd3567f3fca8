//! Devices.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::status::pfc_status;
use super::{boundary, output, required};
use crate::device::{self, Device};

/// Where the rows of a head live and where it computes. Made by pfc_device_cpu or pfc_device_cuda.
pub struct pfc_device {
    pub(super) device: Arc<dyn Device>,
}

/// Makes a CPU device with its own pool of threads, which start with the first step.
///
/// Results have the same bits with any number of threads.
///
/// @param threads number of computing threads, 0 to 4096, including the calling one; 0: one for each core this process may use
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

/// Makes a CUDA device on the caller's stream and in its context. All work is enqueued on that stream, or on the device's own
/// streams, which are ordered with it.
///
/// Embeddings, labels, gradients and the loss may be in the GPU's memory or in host memory. A call that writes to host memory waits
/// for the result. With a loss in the GPU's memory pfc_head_forward returns once its work is enqueued. A step that fails then
/// updates nothing, writes NaN to the loss and zeros to the gradients, and pfc_head_wait reports it with the step's number.
///
/// @param ordinal the GPU, as the CUDA driver numbers it
/// @param stream a cudaStream_t or CUstream that outlives the device; NULL: the legacy default stream. CU_STREAM_PER_THREAD is
///   refused, because it is a different stream in each thread. While the stream is captured into a CUDA graph, calls that would
///   work on the device are INVALID_ARGUMENT and count as not made; pfc_head_create fails on all ranks. A capture of another stream
///   does not matter, but to the legacy default stream, if that waits for it.
/// @param out the device; free with pfc_device_free
/// @return UNSUPPORTED without a driver, with a driver older than 525 or than the nvcc that built the kernels (nvcc 13: 580), or in
///   a build without kernels for this GPU
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

/// Frees the device. Heads on it keep it alive until they are freed. NULL is fine.
#[no_mangle]
pub unsafe extern "C" fn pfc_device_free(device: *mut pfc_device) {
    if !device.is_null() {
        boundary(|| {
            drop(Box::from_raw(device));
            Ok(())
        });
    }
}
