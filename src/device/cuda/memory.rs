//! What a communicator does with a GPU's memory: copies, sums and events on its streams.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{Event, Grid, Stream};
use super::kernels::BLOCK;
use super::Cuda;
use crate::comm::ReduceOp;
use crate::device::{self, StreamMemory, MOST_REDUCED};
use crate::matrix::DType;
use crate::{error, Result};

/// kernels/collective.h: one buffer of each rank; NULL: none.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RankPointers {
    of: [*mut u8; MOST_REDUCED],
}

impl RankPointers {
    fn new(pointers: impl Iterator<Item = *mut u8>) -> RankPointers {
        let mut all = RankPointers { of: [std::ptr::null_mut(); MOST_REDUCED] };
        all.of.iter_mut().zip(pointers).for_each(|(slot, pointer)| *slot = pointer);
        all
    }
}

impl Cuda {
    /// # Safety
    /// A stream of this context.
    unsafe fn borrowed(&self, stream: *mut c_void) -> Stream {
        Stream::borrowed(&self.context, stream)
    }
}

// SAFETY of all methods: the trait's callers answer for the pointers and the stream.
impl StreamMemory for Cuda {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn record(&self, stream: *mut c_void) -> Result<device::Event> {
        let event = Event::new(&self.context)?;
        event.record(&unsafe { self.borrowed(stream) })?;
        Ok(Arc::new(event))
    }

    fn wait(&self, stream: *mut c_void, event: &device::Event) -> Result<()> {
        let event = event.downcast_ref::<Event>().ok_or_else(|| error!(Device, "an event of another kind of memory"))?;
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
        let from = RankPointers::new(sources.iter().map(|source| source.cast_mut()));
        let to = RankPointers::new(destinations.iter().copied());
        let arguments = (from, to, first as u64, count as u64, dtype as i32, op as i32, sources.len() as u32);
        self.kernels.reduce_ranks.launch(&self.borrowed(stream), Grid::of(self.grid(2), BLOCK), arguments)
    }

    unsafe fn to_host(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        let stream = self.borrowed(stream);
        stream.download(destination.cast(), source.cast(), bytes)?;
        stream.synchronize()
    }

    unsafe fn to_device(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        let stream = self.borrowed(stream);
        stream.upload(destination.cast(), source.cast(), bytes)?;
        // Page-locked memory is read late.
        stream.synchronize()
    }

    fn synchronise(&self, stream: *mut c_void) -> Result<()> {
        unsafe { self.borrowed(stream) }.synchronize()
    }
}
