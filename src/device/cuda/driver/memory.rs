//! Memory that kernels reach, on the device or on the host, and memory of the host that the device copies to and from by itself.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::{call, driver_result, log_failure, Context, MemorySpace, Stream};
use crate::memory::Plain;
use crate::{ensure, error, Error, Result};

/// An array that kernels reach: those in page-locked host memory over the link between the two. Dropping it waits for everything
/// that was enqueued through its `Context`.
pub(crate) struct DeviceBuffer<T: Plain> {
    data: *mut T,
    len: usize,
    space: MemorySpace,
    context: Arc<Context>,
}

// SAFETY: an address; the memory is reached through streams alone.
unsafe impl<T: Plain> Send for DeviceBuffer<T> {}
unsafe impl<T: Plain> Sync for DeviceBuffer<T> {}

impl<T: Plain> DeviceBuffer<T> {
    /// `len` zeros, written in the order of `stream`. `what` names them in the error.
    ///
    /// Errors: OUT_OF_MEMORY, naming the bytes wanted and the bytes free.
    pub fn zeroed(stream: &Stream, len: usize, what: &str) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::zeroed_in(MemorySpace::Device, stream, len, what)
    }

    /// The same in that memory.
    pub fn zeroed_in(space: MemorySpace, stream: &Stream, len: usize, what: &str) -> Result<DeviceBuffer<T>> {
        let context = stream.context();
        let _current = context.enter()?;
        let mut buffer = DeviceBuffer { data: std::ptr::null_mut(), len, space, context: context.clone() };
        if len == 0 {
            return Ok(buffer);
        }
        let bytes = wanted::<T>(len, what)?;
        buffer.data = match space {
            MemorySpace::Device => allocate_on_device(context, bytes, what)?.cast(),
            MemorySpace::Host => allocate_on_host(context, bytes, what, sys::CU_MEMHOSTALLOC_DEVICEMAP)?.cast(),
        };
        // SAFETY: memory of this size, and nobody else's.
        unsafe { stream.fill(buffer.data.cast(), 0, bytes) }?;
        Ok(buffer)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.len * std::mem::size_of::<T>()
    }

    /// NULL where it is empty. For the device: the host cannot read what is in its memory.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.data
    }

    #[cfg(test)]
    /// Overwrites elements from `first`; returns when it is done, and with it everything on `stream` so far.
    pub fn write(&self, stream: &Stream, first: usize, values: &[T]) -> Result<()> {
        self.assert_holds(first, values.len());
        // SAFETY: within the array; the values are borrowed until the copy is over.
        unsafe { stream.upload(self.data.wrapping_add(first).cast(), values.as_ptr().cast(), std::mem::size_of_val(values)) }?;
        stream.synchronize()
    }

    #[cfg(test)]
    /// Reads elements from `first`; returns when it is done, and with it everything on `stream` so far.
    pub fn read(&self, stream: &Stream, first: usize, values: &mut [T]) -> Result<()> {
        self.assert_holds(first, values.len());
        let bytes = std::mem::size_of_val(values);
        // SAFETY: within the array; the values are borrowed until the copy is over.
        unsafe { stream.download(values.as_mut_ptr().cast(), self.data.wrapping_add(first).cast(), bytes) }?;
        stream.synchronize()
    }

    #[cfg(test)]
    /// Enqueues a copy of `count` elements of `values` to elements from `first`.
    ///
    /// # Safety
    /// Nobody writes those values before the stream has done it, and `values` and this live as long.
    pub unsafe fn upload(&self, stream: &Stream, first: usize, values: &PinnedBuffer<T>, count: usize) -> Result<()> {
        self.assert_holds(first, count);
        assert!(count <= values.len, "{count} elements of {}", values.len);
        stream.upload(self.data.wrapping_add(first).cast(), values.data.cast(), count * std::mem::size_of::<T>())
    }

    #[cfg(test)]
    /// Enqueues a copy of `count` elements from `first` to the front of `values`.
    ///
    /// # Safety
    /// Nobody touches those values before the stream has done it, and `values` and this live as long.
    pub unsafe fn download(&self, stream: &Stream, first: usize, values: &PinnedBuffer<T>, count: usize) -> Result<()> {
        self.assert_holds(first, count);
        assert!(count <= values.len, "{count} elements of {}", values.len);
        stream.download(values.data.cast(), self.data.wrapping_add(first).cast(), count * std::mem::size_of::<T>())
    }

    #[cfg(test)]
    fn assert_holds(&self, first: usize, count: usize) {
        let end = first.checked_add(count);
        assert!(end.is_some_and(|end| end <= self.len), "{count} elements from {first} of {}", self.len);
    }
}

impl<T: Plain> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.data.is_null() {
            return;
        }
        let free = || {
            // The next call that waits returns a kernel's failure; the memory is freed all the same.
            log_failure("before freeing memory that kernels reach", self.context.synchronize());
            let _current = self.context.enter()?;
            // SAFETY: made by `zeroed_in`; nothing under way uses it.
            unsafe {
                match self.space {
                    MemorySpace::Device => call!(self.context.ordinal(), cuMemFree_v2(self.data as u64)),
                    MemorySpace::Host => call!(self.context.ordinal(), cuMemFreeHost(self.data.cast())),
                }
            }
        };
        log_failure("freeing memory that kernels reach", free());
    }
}

/// An array in page-locked host memory: copies between it and the device run beside the host. Dropping it waits for everything
/// that was enqueued through its `Context`.
pub(crate) struct PinnedBuffer<T: Plain> {
    data: *mut T,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: owned memory of plain numbers.
unsafe impl<T: Plain> Send for PinnedBuffer<T> {}
unsafe impl<T: Plain> Sync for PinnedBuffer<T> {}

impl<T: Plain> PinnedBuffer<T> {
    /// `len` zeros. `what` names them in the error.
    ///
    /// Errors: OUT_OF_MEMORY, naming the bytes wanted.
    pub fn zeroed(context: &Arc<Context>, len: usize, what: &str) -> Result<PinnedBuffer<T>> {
        let mut buffer = PinnedBuffer { data: std::ptr::NonNull::<T>::dangling().as_ptr(), len: 0, context: context.clone() };
        if len == 0 {
            return Ok(buffer);
        }
        let bytes = wanted::<T>(len, what)?;
        let _current = context.enter()?;
        let data = allocate_on_host(context, bytes, what, 0)?;
        // SAFETY: memory of this size, and nobody else's.
        unsafe { std::ptr::write_bytes(data.cast::<u8>(), 0, bytes) };
        (buffer.data, buffer.len) = (data.cast(), len);
        Ok(buffer)
    }

    /// For what the device writes while nobody holds the slice.
    pub fn as_raw(&self) -> *mut T {
        self.data
    }
}

impl<T: Plain> Deref for PinnedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: data points to len initialized values (dangling for 0); the code that enqueues a copy keeps it apart from the
        // slice.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T: Plain> DerefMut for PinnedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T: Plain> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        let free = || {
            log_failure("before freeing page-locked memory", self.context.synchronize());
            let _current = self.context.enter()?;
            // SAFETY: made by `zeroed`; nothing under way uses it.
            unsafe { call!(self.context.ordinal(), cuMemFreeHost(self.data.cast())) }
        };
        log_failure("freeing page-locked memory", free());
    }
}

fn wanted<T>(len: usize, what: &str) -> Result<usize> {
    let bytes = len as u128 * std::mem::size_of::<T>() as u128;
    ensure!(bytes <= isize::MAX as u128, OutOfMemory, "cannot allocate {bytes} bytes for {what}");
    Ok(bytes as usize)
}

/// The context is current.
fn allocate_on_device(context: &Context, bytes: usize, what: &str) -> Result<*mut c_void> {
    let mut data = 0;
    // SAFETY: an output that outlives the call.
    match unsafe { sys::cuMemAlloc_v2(&mut data, bytes) } {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(out_of_memory(context, bytes, what)),
        result => driver_result(result, "cuMemAlloc_v2", context.ordinal()).map(|()| data as *mut c_void),
    }
}

/// The context is current.
fn allocate_on_host(context: &Context, bytes: usize, what: &str, flags: u32) -> Result<*mut c_void> {
    let mut data: *mut c_void = std::ptr::null_mut();
    // SAFETY: an output that outlives the call.
    match unsafe { sys::cuMemHostAlloc(&mut data, bytes, flags) } {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Err(error!(OutOfMemory, "cannot allocate {bytes} bytes of page-locked host memory for {what}"))
        }
        result => driver_result(result, "cuMemHostAlloc", context.ordinal()).map(|()| data),
    }
}

fn out_of_memory(context: &Context, bytes: usize, what: &str) -> Error {
    let free = context.free_memory().map_or_else(|_| "an unknown number".into(), |free| free.to_string());
    error!(OutOfMemory, "cannot allocate {bytes} bytes for {what} on GPU {}, {free} are free", context.ordinal())
}
