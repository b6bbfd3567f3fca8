//! Contexts: the caller's, made current for as long as a call lasts.

use std::ffi::{c_char, c_void, CStr};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUpointer_attribute, CUresult, CUstream, CUstreamCaptureMode,
};

use super::stream::{is_capturing, OwnStream};
use super::{call, describe, driver, driver_result, failure, log_failure};
use crate::{ensure, Result};

/// The context that a caller works in. It is never destroyed: it belongs to the caller.
pub(crate) struct Context {
    raw: CUcontext,
    device: CUdevice,
    ordinal: i32,
    /// The ordinal's primary context, held until the drop.
    retained: bool,
    /// The caller's stream, which was named when this was made.
    caller: CUstream,
    /// Those that [`super::Stream::new`] made and that live.
    own: Mutex<Vec<Arc<OwnStream>>>,
}

// SAFETY: contexts may be made current on any thread, on several at once.
unsafe impl Send for Context {}
unsafe impl Sync for Context {}

/// Where memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemorySpace {
    Host,
    Device,
}

/// A pointer's attributes in the driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointer {
    pub on_device: bool,
    pub managed: bool,
    pub ordinal: i32,
    pub context: CUcontext,
}

/// The numbers that the driver has for its default streams, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD; they belong to no context.
const LEGACY_STREAM: usize = 1;
const THREAD_STREAM: usize = 2;

impl Context {
    /// The context of `stream`; of a default stream: the thread's current context, else the primary context of GPU `ordinal`.
    ///
    /// Errors: UNSUPPORTED without a driver; INVALID_ARGUMENT for an ordinal that is not there, or not the stream's.
    ///
    /// # Safety
    /// `stream` is a stream of the driver's, or NULL.
    pub unsafe fn of(ordinal: i32, stream: *mut c_void) -> Result<Arc<Context>> {
        driver()?;
        // A head's calls come from any thread, and it orders its own streams' work by this one.
        ensure!(
            stream as usize != THREAD_STREAM,
            InvalidArgument,
            "stream must not be CU_STREAM_PER_THREAD, another one in each thread: make one with cuStreamCreate"
        );
        let mut count = 0;
        call!(ordinal, cuDeviceGetCount(&mut count))?;
        ensure!(
            (0..count).contains(&ordinal),
            InvalidArgument,
            "ordinal must be at least 0 and below {count}, the number of GPUs, got {ordinal}"
        );
        let mut device = 0;
        call!(ordinal, cuDeviceGet(&mut device, ordinal))?;
        let mut raw: CUcontext = std::ptr::null_mut();
        call!(ordinal, cuCtxGetCurrent(&mut raw))?;
        let new = |raw, retained| Context { raw, device, ordinal, retained, caller: stream.cast(), own: Mutex::default() };
        let mut context = if raw.is_null() {
            call!(ordinal, cuDevicePrimaryCtxRetain(&mut raw, device))?;
            new(raw, true)
        } else {
            new(raw, false)
        };
        let is_default = matches!(stream as usize, 0 | LEGACY_STREAM);
        if !is_default {
            // The driver may refuse to answer a thread that has no context at all.
            let current = context.enter()?;
            let known = sys::cuStreamGetCtx(stream.cast(), &mut raw);
            ensure!(
                !matches!(known, CUresult::CUDA_ERROR_INVALID_HANDLE | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED),
                InvalidArgument,
                "stream must be a stream of the CUDA driver, got {stream:p}: {}",
                describe(known)
            );
            driver_result(known, "cuStreamGetCtx", ordinal)?;
            drop(current);
            if raw != context.raw {
                context = new(raw, false);
            }
        }
        let context = Arc::new(context);
        let mut found = 0;
        {
            let _current = context.enter()?;
            call!(ordinal, cuCtxGetDevice(&mut found))?;
        }
        let whose = if is_default { "the current context" } else { "the stream" };
        // A CUdevice is the ordinal's number in the driver: the same in all contexts.
        ensure!(found == device, InvalidArgument, "ordinal must be {found}, as {whose} is of GPU {found}, got {ordinal}");
        Ok(context)
    }

    /// Makes this the thread's current context until the guard goes.
    ///
    /// A capture of a stream that is not ours forbids most of the driver's functions, to all threads or to its own. What is called
    /// here touches no captured stream, so meanwhile the thread says that it knows what it does.
    pub fn enter(&self) -> Result<CurrentContext<'_>> {
        let mut current: CUcontext = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        unsafe { call!(self.ordinal, cuCtxGetCurrent(&mut current)) }?;
        let pushed = current != self.raw;
        if pushed {
            // SAFETY: the caller's context lives as long as what is made in it.
            unsafe { call!(self.ordinal, cuCtxPushCurrent_v2(self.raw)) }?;
        }
        let mut guard = CurrentContext { context: self, pushed, capture_mode: None, thread: PhantomData };
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: an input and output that outlives the call.
        unsafe { call!(self.ordinal, cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        guard.capture_mode = Some(mode);
        Ok(guard)
    }

    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    pub fn name(&self) -> Result<String> {
        let mut text = [0 as c_char; 256];
        // SAFETY: the driver writes at most as many bytes, the last of them a zero.
        unsafe {
            call!(self.ordinal, cuDeviceGetName(text.as_mut_ptr(), text.len() as i32, self.device))?;
            Ok(CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
        }
    }

    pub fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: an output that outlives the call.
        unsafe { call!(self.ordinal, cuDeviceGetAttribute(&mut value, attribute, self.device)) }?;
        Ok(value)
    }

    pub fn multiprocessors(&self) -> Result<u32> {
        Ok(self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32)
    }

    /// Major and minor.
    pub fn compute_capability(&self) -> Result<(i32, i32)> {
        let major = self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        Ok((major, self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
    }

    /// Bytes of dynamic shared memory that a block may have at most.
    pub fn largest_shared(&self) -> Result<u32> {
        Ok(self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32)
    }

    /// Bytes of device memory that are free.
    pub fn free_memory(&self) -> Result<u64> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: outputs that outlive the call.
        unsafe { call!(self.ordinal, cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok(free as u64)
    }

    /// Waits for everything that was enqueued here: on the caller's stream, unless that is captured now, and on our own.
    ///
    /// Not for the whole context, where others may have work that waits for this thread, or a capture that the wait would end.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.enter()?;
        let captured = is_capturing(self.caller, self.ordinal);
        let caller = matches!(captured, Ok(false)).then_some(self.caller);
        // Not under the lock: another thread may end a head meanwhile.
        let own = self.own_streams().clone();
        // For all of them, whatever has become of one.
        let waits = own.iter().map(|own| own.raw).chain(caller).map(|stream| {
            // SAFETY: a living stream: the caller's outlives the device, and of ours there is a reference.
            unsafe { call!(self.ordinal, cuStreamSynchronize(stream)) }
        });
        waits.fold(captured.map(|_| ()), |first, outcome| first.and(outcome))
    }

    pub(super) fn own_streams(&self) -> MutexGuard<'_, Vec<Arc<OwnStream>>> {
        self.own.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Where the memory at `pointer` lies. Memory that the driver does not know is the host's, managed memory is the device's.
    ///
    /// Errors: INVALID_ARGUMENT, naming the argument, for memory of another GPU or another context.
    pub fn memory_space(&self, name: &str, pointer: *const c_void) -> Result<MemorySpace> {
        let _current = self.enter()?;
        let mut kind = 0u32;
        match self.pointer_attribute(CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer, &mut kind) {
            CUresult::CUDA_SUCCESS => {}
            CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(MemorySpace::Host),
            result => return Err(failure(result, "cuPointerGetAttribute", self.ordinal)),
        }
        // Not all memory has all of these attributes. A missing one counts as this device's.
        let (mut managed, mut ordinal, mut context) = (0u32, self.ordinal, self.raw);
        let is_managed = CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED;
        if self.pointer_attribute(is_managed, pointer, &mut managed) != CUresult::CUDA_SUCCESS {
            managed = 0;
        }
        let device_ordinal = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        if self.pointer_attribute(device_ordinal, pointer, &mut ordinal) != CUresult::CUDA_SUCCESS {
            ordinal = self.ordinal;
        }
        let of_context = CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT;
        if self.pointer_attribute(of_context, pointer, &mut context) != CUresult::CUDA_SUCCESS {
            context = self.raw;
        }
        let on_device = kind == sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as u32;
        self.judge_pointer(name, Pointer { on_device, managed: managed != 0, ordinal, context })
    }

    pub(super) fn judge_pointer(&self, name: &str, pointer: Pointer) -> Result<MemorySpace> {
        if pointer.managed {
            return Ok(MemorySpace::Device);
        }
        if !pointer.on_device {
            return Ok(MemorySpace::Host);
        }
        ensure!(
            pointer.ordinal == self.ordinal,
            InvalidArgument,
            "{name} must be memory of GPU {}, got memory of GPU {}",
            self.ordinal,
            pointer.ordinal
        );
        // Memory from a pool belongs to the GPU, not to a context.
        ensure!(
            pointer.context.is_null() || pointer.context == self.raw,
            InvalidArgument,
            "{name} must be memory of this device's context, got another context of GPU {}",
            self.ordinal
        );
        Ok(MemorySpace::Device)
    }

    fn pointer_attribute<T>(&self, attribute: CUpointer_attribute, pointer: *const c_void, value: &mut T) -> CUresult {
        // SAFETY: the driver looks the address up and reads nothing there; T is as large as the attribute's value.
        unsafe { sys::cuPointerGetAttribute(std::ptr::from_mut(value).cast(), attribute, pointer as u64) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.retained {
            // SAFETY: retained once.
            log_failure("releasing a primary context", unsafe { call!(self.ordinal, cuDevicePrimaryCtxRelease_v2(self.device)) });
        }
    }
}

/// While it lives its context is the thread's current one; its drop restores the one before.
#[must_use]
pub(crate) struct CurrentContext<'a> {
    context: &'a Context,
    pushed: bool,
    /// The thread's before.
    capture_mode: Option<CUstreamCaptureMode>,
    /// The stack of contexts is the thread's.
    thread: PhantomData<*const ()>,
}

impl Drop for CurrentContext<'_> {
    fn drop(&mut self) {
        if let Some(mut mode) = self.capture_mode {
            // SAFETY: an input and output that outlives the call.
            let outcome = unsafe { call!(self.context.ordinal, cuThreadExchangeStreamCaptureMode(&mut mode)) };
            log_failure("leaving a context", outcome);
        }
        if self.pushed {
            let mut popped: CUcontext = std::ptr::null_mut();
            // SAFETY: pushed by `enter`; guards are dropped in the reverse order of their making.
            let outcome = unsafe { call!(self.context.ordinal, cuCtxPopCurrent_v2(&mut popped)) };
            log_failure("leaving a context", outcome);
        }
    }
}
