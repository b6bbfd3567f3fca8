//! What a device's streams can do: the part of a device that a communicator needs to work on its memory without making the host wait.
//!
//! A device implements these traits, a transport calls them; neither knows the other.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use crate::matrix::{DType, ReduceOp};
use crate::Result;

/// A point on a stream, which other streams can wait for. Any thread may ask about it and drop it.
pub trait StreamEvent: Any + Send + Sync {
    /// Whether the stream has reached it.
    fn is_over(&self) -> Result<bool>;
}

pub type Event = Arc<dyn StreamEvent>;

/// The most ranks' buffers that [`StreamMemory::reduce`] takes.
pub const MOST_REDUCED: usize = 16;

/// Memory that a device's streams read and write: what a communicator needs to work on it without making the host wait.
///
/// All but `to_host`, `to_device` and `synchronize` return once the work is on the stream, which runs it after all that was put
/// there before. Ranks in one process hand their pointers and events to each other, so every method takes those of any memory of
/// the same `kind`. Methods are called from any thread, whatever context is current there. Buffers are not empty.
///
/// # Safety
/// The pointers are valid for the sizes named until the stream has run the work; `copy`'s buffers do not overlap. Dropping an event
/// that streams still wait for is allowed.
#[allow(clippy::missing_safety_doc)] // The one above is every method's.
pub trait StreamMemory: Send + Sync {
    /// Names it in messages ("cuda"). Ranks whose kinds differ cannot work on each other's memory.
    fn kind(&self) -> &'static str;
    /// What `stream` has reached once all that is on it now has run.
    fn record(&self, stream: *mut c_void) -> Result<Event>;
    /// What is put on `stream` from here on runs after `event`, which any rank's memory of this kind recorded.
    fn wait(&self, stream: *mut c_void, event: &Event) -> Result<()>;
    unsafe fn copy(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Combines elements `first .. first + count` of the sources, in their order, into the same elements of every destination.
    ///
    /// At most [`MOST_REDUCED`] sources, and either as many destinations or one. A destination may be a source. f32, f64, i32 and
    /// i64, with [`ReduceOp`]'s rules for NaN and overflow.
    #[allow(clippy::too_many_arguments)] // The buffers, the range, the operation: each is one of them.
    unsafe fn reduce(
        &self,
        sources: &[*const u8],
        destinations: &[*mut u8],
        first: usize,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: *mut c_void,
    ) -> Result<()>;
    /// Copies what `stream` leaves in `source` to host memory and returns when it is there.
    unsafe fn to_host(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Copies host memory to `destination` after all that is on `stream` and returns when `source` may be written to again.
    unsafe fn to_device(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Returns when all that is on `stream` has run.
    fn synchronize(&self, stream: *mut c_void) -> Result<()>;
}

/// A device with streams, for a transport that works on it by itself.
pub trait StreamDevice: StreamMemory {
    /// Its number among those of its kind.
    fn ordinal(&self) -> i32;
    /// Makes it the thread's current device, as libraries beside this one find it, until the guard goes.
    fn make_current(&self) -> Result<Box<dyn CurrentDeviceGuard + '_>>;
    /// A stream and memory for what does not come from a head.
    fn scratch(&self) -> Result<Box<dyn Scratch>>;
}

/// While it lives a device is the thread's current one.
#[must_use]
pub trait CurrentDeviceGuard {}

/// A stream of its own, and memory on it that grows.
pub trait Scratch: Send {
    fn stream(&self) -> *mut c_void;
    /// At least so many bytes, not 0; what was in them is lost.
    fn reserve(&mut self, bytes: usize) -> Result<*mut u8>;
}

impl fmt::Debug for dyn StreamMemory + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())
    }
}
