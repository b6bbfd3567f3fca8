//! The caller's side of a GPU, as a trainer has it: a context, a stream, memory and events. An error of the driver ends the program.

use std::ffi::c_void;

use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUevent, CUresult, CUstream};

/// Events that can be timed, and that a wait sleeps for.
const TIMED: u32 = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
const NON_BLOCKING: u32 = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;

#[track_caller]
fn check(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS, "the CUDA driver failed");
}

/// Makes the primary context of GPU 0 this thread's; what else there is here is made in it. Fails without a driver, with what to do.
pub fn enter() -> Result<(), String> {
    // SAFETY: looks for the library's file.
    if !unsafe { sys::is_culib_present() } {
        return Err("no CUDA driver: no libcuda.so or libcuda.so.1 is found; PFC_TEST_DRIVER=simt runs on the emulator".to_owned());
    }
    let mut context: CUcontext = std::ptr::null_mut();
    // SAFETY: outputs that outlive the calls; the context is never released.
    unsafe {
        check(sys::cuInit(0));
        check(sys::cuDevicePrimaryCtxRetain(&mut context, 0));
        check(sys::cuCtxSetCurrent(context));
    }
    Ok(())
}

/// Waits for all streams.
pub fn synchronize() {
    // SAFETY: the context is current.
    check(unsafe { sys::cuCtxSynchronize() });
}

/// Bytes of device memory that are free.
pub fn free_memory() -> usize {
    let (mut free, mut total) = (0, 0);
    // SAFETY: outputs that outlive the call.
    check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) });
    free
}

pub struct Stream(CUstream);

impl Stream {
    pub fn new() -> Stream {
        let mut stream = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        check(unsafe { sys::cuStreamCreate(&mut stream, NON_BLOCKING) });
        Stream(stream)
    }

    pub fn raw(&self) -> *mut c_void {
        self.0.cast()
    }

    /// Microseconds from one event on this stream to the other, around what `enqueue` puts there. Waits for it.
    pub fn time(&self, enqueue: impl FnOnce()) -> f64 {
        let (start, end) = (Event::new(), Event::new());
        let mut milliseconds = 0.0f32;
        // SAFETY: live events and a live stream.
        unsafe {
            check(sys::cuEventRecord(start.0, self.0));
            enqueue();
            check(sys::cuEventRecord(end.0, self.0));
            check(sys::cuEventSynchronize(end.0));
            check(sys::cuEventElapsedTime(&mut milliseconds, start.0, end.0));
        }
        1e3 * f64::from(milliseconds)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        check(unsafe { sys::cuStreamDestroy_v2(self.0) });
    }
}

struct Event(CUevent);

impl Event {
    fn new() -> Event {
        let mut event = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        check(unsafe { sys::cuEventCreate(&mut event, TIMED) });
        Event(event)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        check(unsafe { sys::cuEventDestroy_v2(self.0) });
    }
}

/// Device memory.
pub struct Memory {
    address: CUdeviceptr,
    bytes: usize,
}

impl Memory {
    pub fn of<T: Copy>(values: &[T]) -> Memory {
        let bytes = std::mem::size_of_val(values);
        let mut address = 0;
        // SAFETY: an output that outlives the call; as many bytes on both sides.
        unsafe {
            check(sys::cuMemAlloc_v2(&mut address, bytes));
            check(sys::cuMemcpyHtoD_v2(address, values.as_ptr().cast(), bytes));
        }
        Memory { address, bytes }
    }

    /// The first value.
    pub fn read<T: Copy + Default>(&self) -> T {
        let mut value = T::default();
        let bytes = std::mem::size_of::<T>();
        assert!(bytes <= self.bytes);
        // SAFETY: as many bytes as T has; all of the types read are plain numbers.
        check(unsafe { sys::cuMemcpyDtoH_v2(std::ptr::from_mut(&mut value).cast(), self.address, bytes) });
        value
    }

    pub fn pointer<T>(&self) -> *mut T {
        self.address as *mut T
    }

    /// Enqueues a copy of the whole of `from`, which is as large.
    pub fn copy(&self, from: &Memory, stream: &Stream) {
        assert_eq!(self.bytes, from.bytes);
        // SAFETY: both are as large.
        check(unsafe { sys::cuMemcpyDtoDAsync_v2(self.address, from.address, self.bytes, stream.0) });
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `of`, freed once; the bench waits before it drops.
        check(unsafe { sys::cuMemFree_v2(self.address) });
    }
}
