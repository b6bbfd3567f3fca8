//! A GPU as its heads and its stateless calls share it: the context, the caller's stream, the loaded kernels.

use std::ffi::{c_void, CString};
use std::mem::{size_of, size_of_val};
use std::sync::{Arc, Mutex};

use super::driver::{self, Arguments, Context, EventPool, Stream};
use super::entries::{Entries, Entry};
use super::images::{self, Images};
use super::products::Products;
use super::shared_structs::{HeadArrays, MatrixView};
use super::upload_slots::{UploadSlots, MOST_BYTES};
use crate::memory::Plain;
use crate::{error, Result};

/// Those of two stateless calls.
const UPLOADS: usize = 4;

pub(super) struct Gpu {
    pub context: Arc<Context>,
    /// The caller's.
    pub stream: Stream,
    pub entries: Entries,
    pub products: Products,
    /// Of communicators.
    pub events: Arc<EventPool>,
    pub multiprocessors: u32,
    /// One line for people.
    pub info: CString,
    /// The process that made it.
    pub process: u32,
    /// Numbers that stateless calls compute on the host.
    uploads: Mutex<UploadSlots<u8>>,
}

/// The properties of a GPU that decide the sizes of a head.
#[derive(Clone, Copy, Debug)]
pub(super) struct GpuCapacity {
    pub multiprocessors: u32,
    /// Bytes.
    pub free_memory: u64,
}

impl Gpu {
    /// Errors: UNSUPPORTED without a driver, with one too old, or without kernels for the GPU; INVALID_ARGUMENT for a wrong
    /// ordinal.
    ///
    /// # Safety
    /// `stream` is a stream of the driver's, or NULL.
    pub unsafe fn new(ordinal: i32, stream: *mut c_void) -> Result<Gpu> {
        images::check_driver(driver::driver()?)?;
        let context = Context::of(ordinal, stream)?;
        let (major, minor) = context.compute_capability()?;
        let (name, multiprocessors) = (context.name()?, context.multiprocessors()?);
        let images = Images::for_device((major as u32, minor as u32))?;
        let text = format!("cuda: {name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors");
        Ok(Gpu {
            entries: Entries::load(&context, &images, multiprocessors)?,
            products: Products::load(&context, &images, multiprocessors)?,
            events: EventPool::new(&context),
            stream: Stream::borrowed(&context, stream),
            multiprocessors,
            info: CString::new(text).map_err(|_| error!(Device, "the GPU's name contains a zero byte"))?,
            process: std::process::id(),
            uploads: Mutex::new(UploadSlots::new(&context, UPLOADS, MOST_BYTES, "numbers under way")?),
            context,
        })
    }

    pub fn capacity(&self) -> Result<GpuCapacity> {
        Ok(GpuCapacity { multiprocessors: self.multiprocessors, free_memory: self.context.free_memory()? })
    }

    /// Launches a kernel on the caller's stream, over arguments that the call has checked and arrays as large as their sizes say.
    pub fn run<A: Arguments>(&self, entry: &Entry<A>, arguments: A) -> Result<()> {
        // SAFETY: as above.
        unsafe { entry.launch(&self.stream, arguments) }
    }

    /// E^, as an operand of the products, of the first `count` rows.
    pub fn write_unit_rows(&self, arrays: &HeadArrays, rows: MatrixView, count: u32) -> Result<()> {
        self.run(&self.entries.write_unit_operands, (*arrays, rows, 0u64, count, 0i32))
    }

    /// W^, as an operand of the products, of the chunk that begins at row `first`.
    pub fn write_unit_centers(&self, arrays: &HeadArrays, centers: MatrixView, first: u32, count: u32) -> Result<()> {
        self.run(&self.entries.write_unit_operands, (*arrays, centers, u64::from(first), count, 1i32))
    }

    /// Copies values of the host's to an array of a workspace. They may change when it returns, which is not before many have arrived.
    pub fn upload<T: Plain>(&self, destination: *mut T, source: &[T]) -> Result<()> {
        if size_of_val(source) > MOST_BYTES {
            // SAFETY: an array of as many.
            return unsafe { self.stream.upload_now(destination.cast(), source.as_ptr().cast(), size_of_val(source)) };
        }
        let mut uploads = self.uploads.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: plain values are bytes; an array of as many.
        unsafe {
            let bytes = std::slice::from_raw_parts(source.as_ptr().cast(), size_of_val(source));
            uploads.upload(&self.stream, destination.cast(), bytes)
        }
    }

    /// Zeroes an array of a workspace.
    pub fn clear<T>(&self, destination: *mut T, count: u64) -> Result<()> {
        // SAFETY: an array of as many.
        unsafe { self.stream.fill(destination.cast(), 0, count as usize * size_of::<T>()) }
    }
}
