//! A GPU through the driver's own functions: memory as callers have it, and a device for this thread.

use std::ffi::{c_char, c_void, CStr};

use partialfc::capi::device::pfc_device_cuda;
use partialfc::capi::types::pfc_matrix;
use partialfc::matrix::DType;

use crate::capi::{outcome, Device};
use crate::emulator;

/// `driver!(c"cuName", unsafe extern "C" fn(..) -> i32)`: a function of the driver's, to be called as such.
#[macro_export]
macro_rules! driver {
    ($name:literal, $type:ty) => {
        std::mem::transmute::<*mut std::ffi::c_void, $type>($crate::gpu::driver_function($name))
    };
}

pub fn driver_function(name: &CStr) -> *mut c_void {
    emulator::ready();
    // SAFETY: a name that ends; the driver is loaded for everyone to see.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr().cast::<c_char>()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

/// Makes the primary context of GPU 0 this thread's current one.
pub fn enter() {
    enter_number(0);
}

fn enter_number(ordinal: i32) {
    // SAFETY: the driver's functions, of these types; an output that outlives the call.
    unsafe {
        let init = driver!(c"cuInit", unsafe extern "C" fn(u32) -> i32);
        let retain = driver!(c"cuDevicePrimaryCtxRetain", unsafe extern "C" fn(*mut *mut c_void, i32) -> i32);
        let set = driver!(c"cuCtxSetCurrent", unsafe extern "C" fn(*mut c_void) -> i32);
        let mut context = std::ptr::null_mut();
        assert_eq!((init(0), retain(&mut context, ordinal), set(context)), (0, 0, 0));
    }
}

/// GPU 0 with the default stream, its primary context current on this thread.
pub fn gpu() -> Device {
    gpu_number(0)
}

/// This GPU with its default stream, whose primary context is then this thread's current one.
pub fn gpu_number(ordinal: i32) -> Device {
    enter_number(ordinal);
    let mut raw = std::ptr::null_mut();
    // SAFETY: an output that outlives the call; the default stream.
    outcome(unsafe { pfc_device_cuda(ordinal, std::ptr::null_mut(), &mut raw) }).expect("a GPU");
    Device(raw)
}

/// GPU 0 with a stream of this device's own, which goes with the process.
pub fn gpu_apart() -> Device {
    gpu_on(new_stream())
}

/// GPU 0 with this stream.
pub fn gpu_on(stream: Stream) -> Device {
    enter();
    let mut raw = std::ptr::null_mut();
    // SAFETY: an output that outlives the call; a living stream.
    outcome(unsafe { pfc_device_cuda(0, stream.0 as *mut c_void, &mut raw) }).expect("GPU 0");
    Device(raw)
}

/// A stream of GPU 0, which goes with the process.
#[derive(Clone, Copy)]
pub struct Stream(usize);

/// One that waits for no default stream.
pub fn new_stream() -> Stream {
    const NON_BLOCKING: u32 = 1;
    stream_with(NON_BLOCKING)
}

/// One that the legacy default stream waits for.
pub fn new_blocking_stream() -> Stream {
    stream_with(0)
}

fn stream_with(flags: u32) -> Stream {
    enter();
    let mut stream = std::ptr::null_mut();
    // SAFETY: the driver's function, of this type; an output that outlives the call.
    unsafe {
        let create = driver!(c"cuStreamCreate", unsafe extern "C" fn(*mut *mut c_void, u32) -> i32);
        assert_eq!(create(&mut stream, flags), 0);
    }
    Stream(stream as usize)
}

/// A capture of a stream into a CUDA graph, begun by this thread as PyTorch begins one: it forbids much to all threads.
pub struct Capture(Stream);

impl Capture {
    pub fn begin(stream: Stream) -> Capture {
        enter();
        const GLOBAL: i32 = 0;
        // SAFETY: the driver's function, of this type; a living stream.
        unsafe {
            let begin = driver!(c"cuStreamBeginCapture_v2", unsafe extern "C" fn(*mut c_void, i32) -> i32);
            assert_eq!(begin(stream.0 as *mut c_void, GLOBAL), 0);
        }
        Capture(stream)
    }

    /// Ends it. What the driver says is not 0 where somebody did meanwhile what a capture forbids.
    pub fn end(self) -> i32 {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the driver's functions, of these types; an output that outlives the call; a graph is destroyed once.
        unsafe {
            let end = driver!(c"cuStreamEndCapture", unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> i32);
            let destroy = driver!(c"cuGraphDestroy", unsafe extern "C" fn(*mut c_void) -> i32);
            let told = end(self.0 .0 as *mut c_void, &mut graph);
            assert!(graph.is_null() || destroy(graph) == 0);
            told
        }
    }
}

/// Memory on GPU 0, whose primary context is current: freed with it. Whoever drops it waits for its uses first.
pub struct Remote {
    pub address: u64,
    pub bytes: usize,
}

impl Remote {
    /// A copy of these values.
    pub fn of<T: Copy>(values: &[T]) -> Remote {
        // SAFETY: the bytes of the values.
        unsafe { Remote::copy(values.as_ptr().cast(), std::mem::size_of_val(values)) }
    }

    /// A copy of host memory.
    ///
    /// # Safety
    /// `bytes` bytes may be read at `from`.
    pub unsafe fn copy(from: *const c_void, bytes: usize) -> Remote {
        let alloc = driver!(c"cuMemAlloc_v2", unsafe extern "C" fn(*mut u64, usize) -> i32);
        let copy = driver!(c"cuMemcpyHtoD_v2", unsafe extern "C" fn(u64, *const c_void, usize) -> i32);
        let mut address = 0u64;
        assert_eq!((alloc(&mut address, bytes), copy(address, from, bytes)), (0, 0));
        Remote { address, bytes }
    }

    pub fn read<T: Copy + Default>(&self) -> Vec<T> {
        let mut values = vec![T::default(); self.bytes / std::mem::size_of::<T>()];
        // SAFETY: as many bytes.
        unsafe { self.copy_to(values.as_mut_ptr().cast()) };
        values
    }

    /// # Safety
    /// As many bytes may be written at `to`.
    pub unsafe fn copy_to(&self, to: *mut c_void) {
        let copy = driver!(c"cuMemcpyDtoH_v2", unsafe extern "C" fn(*mut c_void, u64, usize) -> i32);
        assert_eq!(copy(to, self.address, self.bytes), 0);
    }

    pub fn pointer<T>(&self) -> *mut T {
        self.address as *mut T
    }

    /// Of float32 values, so many a row.
    pub fn matrix(&self, cols: usize) -> pfc_matrix {
        let (rows, cols) = ((self.bytes / 4 / cols) as u64, cols as u64);
        pfc_matrix { data: self.pointer(), dtype: DType::F32 as i32, reserved: 0, rows, cols, row_stride: cols }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // SAFETY: made by `copy`.
        unsafe {
            let free = driver!(c"cuMemFree_v2", unsafe extern "C" fn(u64) -> i32);
            free(self.address);
        }
    }
}

/// Bytes of the GPU's memory that are free; the thread has a context.
pub fn free_memory() -> usize {
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: outputs that outlive the call.
    let status = unsafe { driver!(c"cuMemGetInfo_v2", unsafe extern "C" fn(*mut usize, *mut usize) -> i32)(&mut free, &mut total) };
    assert_eq!(status, 0);
    free
}
