//! Streams and events.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream, CUstreamCaptureStatus, CUstream_flags};

use super::{call, driver_result, log_failure, Context};
use crate::Result;

/// Which of two streams' blocks goes first where both wait for a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    Least,
    Greatest,
}

/// A stream of our own. Whoever drops the last reference is in its context.
pub(super) struct OwnStream {
    pub raw: CUstream,
    ordinal: i32,
}

// SAFETY: any thread may wait for a stream, and destroy it.
unsafe impl Send for OwnStream {}
unsafe impl Sync for OwnStream {}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: made by `Stream::new`. The driver ends it once its work is done.
        log_failure("destroying a stream", unsafe { call!(self.ordinal, cuStreamDestroy_v2(self.raw)) });
    }
}

/// An order of work: the caller's, or one of our own.
pub(crate) struct Stream {
    raw: CUstream,
    context: Arc<Context>,
    /// Of our own.
    own: Option<Arc<OwnStream>>,
}

// SAFETY: any thread may enqueue on a stream.
unsafe impl Send for Stream {}
unsafe impl Sync for Stream {}

impl Stream {
    /// The caller's stream, in `context`. It stays the caller's.
    ///
    /// # Safety
    /// `raw` is a stream of the context's, or a default stream, and outlives this.
    pub unsafe fn borrowed(context: &Arc<Context>, raw: *mut c_void) -> Stream {
        Stream { raw: raw.cast(), context: context.clone(), own: None }
    }

    /// A stream of our own, which does not wait for the legacy default stream.
    pub fn new(context: &Arc<Context>, priority: Priority) -> Result<Stream> {
        let _current = context.enter()?;
        let (mut least, mut greatest) = (0, 0);
        let mut raw = std::ptr::null_mut();
        // SAFETY: outputs that outlive the calls.
        unsafe {
            call!(context.ordinal(), cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            let number = if priority == Priority::Greatest { greatest } else { least };
            let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            call!(context.ordinal(), cuStreamCreateWithPriority(&mut raw, flags, number))?;
        }
        let own = Arc::new(OwnStream { raw, ordinal: context.ordinal() });
        context.own_streams().push(own.clone());
        Ok(Stream { raw, context: context.clone(), own: Some(own) })
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The handle that a communicator takes.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    pub(super) fn handle(&self) -> CUstream {
        self.raw
    }

    /// Whether what is enqueued here is recorded into a graph, which others run later or never.
    pub fn is_capturing(&self) -> Result<bool> {
        let _current = self.context.enter()?;
        is_capturing(self.raw, self.context.ordinal())
    }

    /// Waits, on the host, for everything enqueued so far. It returns the failures of kernels.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: a living stream.
        unsafe { call!(self.context.ordinal(), cuStreamSynchronize(self.raw)) }
    }

    /// Work that is enqueued here from now on runs after the event's last record.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: a living stream and a living event.
        unsafe { call!(self.context.ordinal(), cuStreamWaitEvent(self.raw, event.raw, 0)) }
    }

    /// Copies to the device, in stream order.
    ///
    /// # Safety
    /// `bytes` bytes may be read at `source` on the host and written at `destination` on the device until the stream has done it.
    pub unsafe fn upload(&self, destination: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        call!(self.context.ordinal(), cuMemcpyHtoDAsync_v2(destination as u64, source, bytes, self.raw))
    }

    /// The same, and waits for it. The host may use the source again: the driver need not have read memory that is not page-locked
    /// when it has enqueued the copy.
    ///
    /// # Safety
    /// As `upload`, until it returns.
    pub unsafe fn upload_now(&self, destination: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.upload(destination, source, bytes)?;
        self.synchronize()
    }

    /// Copies to the host, in stream order.
    ///
    /// # Safety
    /// `bytes` bytes may be read at `source` on the device and written at `destination` on the host until the stream has done it.
    pub unsafe fn download(&self, destination: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        call!(self.context.ordinal(), cuMemcpyDtoHAsync_v2(destination, source as u64, bytes, self.raw))
    }

    /// Copies on the device, in stream order.
    ///
    /// # Safety `bytes` bytes may be read at `source` and written at `destination`, both on the device, until the stream has done
    /// it; no overlap.
    pub unsafe fn copy(&self, destination: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        call!(self.context.ordinal(), cuMemcpyDtoDAsync_v2(destination as u64, source as u64, bytes, self.raw))
    }

    /// Fills device memory with a byte, in stream order.
    ///
    /// # Safety
    /// `bytes` bytes may be written at `destination` on the device until the stream has done it.
    pub unsafe fn fill(&self, destination: *mut c_void, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        call!(self.context.ordinal(), cuMemsetD8Async(destination as u64, byte, bytes, self.raw))
    }
}

/// The stream is of the current context.
pub(super) fn is_capturing(stream: CUstream, ordinal: i32) -> Result<bool> {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: an output that outlives the call, a living stream.
    match unsafe { sys::cuStreamIsCapturing(stream, &mut status) } {
        // The legacy default stream cannot be used while a stream that waits for it is captured.
        CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => Ok(true),
        result => driver_result(result, "cuStreamIsCapturing", ordinal)
            .map(|()| status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE),
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Some(own) = self.own.take() else { return };
        // From here on nobody else can wait for its work before memory goes.
        log_failure("before destroying a stream", self.synchronize());
        let current = self.context.enter();
        self.context.own_streams().retain(|other| !Arc::ptr_eq(other, &own));
        drop(own);
        log_failure("destroying a stream", current.map(drop));
    }
}

/// A point in a stream; only one made by `timed` has a time.
pub(crate) struct Event {
    raw: CUevent,
    context: Arc<Context>,
}

// SAFETY: any thread may record and wait for an event.
unsafe impl Send for Event {}
unsafe impl Sync for Event {}

impl Event {
    /// Without a time, which would cost each record a write and each wait its wake-up.
    pub fn new(context: &Arc<Context>) -> Result<Event> {
        Event::with(context, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    pub fn timed(context: &Arc<Context>) -> Result<Event> {
        Event::with(context, CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with(context: &Arc<Context>, flags: CUevent_flags) -> Result<Event> {
        let _current = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        unsafe { call!(context.ordinal(), cuEventCreate(&mut raw, flags as u32)) }?;
        Ok(Event { raw, context: context.clone() })
    }

    /// Microseconds from an earlier event to this one; both are timed and over.
    pub fn since(&self, earlier: &Event) -> Result<f64> {
        let _current = self.context.enter()?;
        let mut milliseconds = 0.0f32;
        // SAFETY: an output that outlives the call, living events.
        unsafe { call!(self.context.ordinal(), cuEventElapsedTime(&mut milliseconds, earlier.raw, self.raw)) }?;
        Ok(f64::from(milliseconds) * 1e3)
    }

    /// Makes it the point after everything enqueued on `stream` so far.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: a living event and a living stream.
        unsafe { call!(self.context.ordinal(), cuEventRecord(self.raw, stream.handle())) }
    }

    /// Whether the stream has reached it; true before the first record.
    pub fn is_over(&self) -> Result<bool> {
        let _current = self.context.enter()?;
        // SAFETY: a living event.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => driver_result(result, "cuEventQuery", self.context.ordinal()).map(|()| true),
        }
    }

    /// Waits for it, on the host.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: a living event.
        unsafe { call!(self.context.ordinal(), cuEventSynchronize(self.raw)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroy = || {
            let _current = self.context.enter()?;
            // SAFETY: made by `new`.
            unsafe { call!(self.context.ordinal(), cuEventDestroy_v2(self.raw)) }
        };
        log_failure("destroying an event", destroy());
    }
}

/// Events of one context that nobody holds, for the next who need one: the driver is not asked to make and to destroy one each time.
pub(crate) struct EventPool {
    context: Arc<Context>,
    unused: Mutex<Vec<Event>>,
}

/// An event that goes back to its pool. What already waits for its last record goes on doing so.
pub(crate) struct PooledEvent {
    /// None while it goes back.
    event: Option<Event>,
    pool: Arc<EventPool>,
}

impl EventPool {
    pub fn new(context: &Arc<Context>) -> Arc<EventPool> {
        Arc::new(EventPool { context: context.clone(), unused: Mutex::default() })
    }

    /// The point after everything enqueued on `stream` so far.
    pub fn record(self: &Arc<EventPool>, stream: &Stream) -> Result<PooledEvent> {
        let unused = self.unused.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let event = unused.map_or_else(|| Event::new(&self.context), Ok)?;
        event.record(stream)?;
        Ok(PooledEvent { event: Some(event), pool: self.clone() })
    }
}

impl std::ops::Deref for PooledEvent {
    type Target = Event;

    fn deref(&self) -> &Event {
        self.event.as_ref().expect("it has not gone back")
    }
}

impl Drop for PooledEvent {
    fn drop(&mut self) {
        self.pool.unused.lock().unwrap_or_else(PoisonError::into_inner).extend(self.event.take());
    }
}
