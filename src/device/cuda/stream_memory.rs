//! A GPU's memory as a communicator uses it: copies, sums and events on its streams.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use super::context::Gpu;
use super::driver::{CurrentContext, DeviceBuffer, Event, PooledEvent, Priority, Stream};
use super::shared_structs::RankPointers;
use crate::matrix::{DType, ReduceOp};
use crate::stream::{self, CurrentDeviceGuard, Scratch, StreamDevice, StreamEvent, StreamMemory};
use crate::{error, Result};

impl Gpu {
    /// # Safety
    /// A stream of this context.
    unsafe fn borrowed(&self, stream: *mut c_void) -> Stream {
        Stream::borrowed(&self.context, stream)
    }
}

impl StreamEvent for PooledEvent {
    fn is_over(&self) -> Result<bool> {
        Event::is_over(self)
    }
}

// SAFETY of all methods: the trait's callers answer for the pointers and the stream.
impl StreamMemory for Gpu {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn record(&self, stream: *mut c_void) -> Result<stream::Event> {
        Ok(Arc::new(self.events.record(&unsafe { self.borrowed(stream) })?))
    }

    fn wait(&self, stream: *mut c_void, event: &stream::Event) -> Result<()> {
        let event = (&**event as &dyn Any)
            .downcast_ref::<PooledEvent>()
            .ok_or_else(|| error!(Device, "an event of another kind of memory"))?;
        unsafe { self.borrowed(stream) }.wait(event)
    }

    unsafe fn copy(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        self.borrowed(stream).copy(destination.cast(), source.cast(), bytes)
    }

    unsafe fn reduce(
        &self,
        sources: &[*const u8],
        destinations: &[*mut u8],
        first: usize,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: *mut c_void,
    ) -> Result<()> {
        let ranks = sources.len() as u32;
        let sources = RankPointers::new(sources.iter().map(|source| source.cast_mut()));
        let destinations = RankPointers::new(destinations.iter().copied());
        let arguments = (sources, destinations, first as u64, count as u64, dtype as i32, op as i32, ranks);
        self.entries.reduce_ranks.launch(&self.borrowed(stream), arguments)
    }

    unsafe fn to_host(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        let stream = self.borrowed(stream);
        stream.download(destination.cast(), source.cast(), bytes)?;
        stream.synchronize()
    }

    unsafe fn to_device(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        let stream = self.borrowed(stream);
        stream.upload_now(destination.cast(), source.cast(), bytes)
    }

    fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        unsafe { self.borrowed(stream) }.synchronize()
    }
}

impl CurrentDeviceGuard for CurrentContext<'_> {}

impl StreamDevice for Gpu {
    fn ordinal(&self) -> i32 {
        self.context.ordinal()
    }

    fn make_current(&self) -> Result<Box<dyn CurrentDeviceGuard + '_>> {
        Ok(Box::new(self.context.enter()?))
    }

    fn scratch(&self) -> Result<Box<dyn Scratch>> {
        Ok(Box::new(GpuScratch { stream: Stream::new(&self.context, Priority::Greatest)?, buffers: Vec::new() }))
    }
}

struct GpuScratch {
    stream: Stream,
    /// The last is the largest. Freeing one waits for all of the device's streams, and one of them may wait for this rank: those outgrown
    /// stay, together no larger than the last.
    buffers: Vec<DeviceBuffer<u8>>,
}

impl Scratch for GpuScratch {
    fn stream(&self) -> *mut c_void {
        self.stream.raw()
    }

    fn reserve(&mut self, bytes: usize) -> Result<*mut u8> {
        if self.buffers.last().is_none_or(|buffer| buffer.len() < bytes) {
            let bytes = bytes.next_power_of_two();
            self.buffers.push(DeviceBuffer::zeroed(&self.stream, bytes, "a communicator's buffer")?);
        }
        Ok(self.buffers.last().map_or(std::ptr::null_mut(), DeviceBuffer::as_mut_ptr))
    }
}
