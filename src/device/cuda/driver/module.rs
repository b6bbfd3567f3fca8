//! Images and kernels: loaded with their parameters checked, launched with arguments of the right types.

use std::ffi::{c_void, CString};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};

use super::{call, driver_result, has_optional, log_failure, Context, Stream};
use crate::{ensure, error, Result};

/// A loaded image.
pub(crate) struct Module {
    raw: CUmodule,
    name: String,
    context: Arc<Context>,
}

// SAFETY: a handle that is only read.
unsafe impl Send for Module {}
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin, a fatbin or PTX. `name` is the image's, for messages.
    pub fn load(context: &Arc<Context>, name: &str, image: &[u8]) -> Result<Arc<Module>> {
        // The driver gets the start of an image, not its length: a cubin and a fatbin contain it, a text must end with a zero.
        let text: Vec<u8>;
        let binary = image.starts_with(b"\x7fELF") || image.starts_with(&[0x50, 0xed, 0x55, 0xba]);
        let start = if binary || image.last() == Some(&0) {
            image.as_ptr()
        } else {
            text = [image, &[0]].concat();
            text.as_ptr()
        };
        let _current = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a whole image, which the driver copies.
        unsafe { call!(context.ordinal(), cuModuleLoadData(&mut raw, start.cast())) }
            .map_err(|error| error.during(format_args!("loading the image {name}")))?;
        Ok(Arc::new(Module { raw, name: name.into(), context: context.clone() }))
    }

    /// The kernel `name`, which takes arguments of the types `A`.
    ///
    /// Errors: DEVICE, naming the kernel, where the image lacks it or its parameters are of other numbers or sizes.
    pub fn kernel<A: Arguments>(self: &Arc<Module>, name: &str) -> Result<Kernel<A>> {
        let context = &self.context;
        let _current = context.enter()?;
        let symbol = CString::new(name).map_err(|_| error!(Device, "a kernel's name contains a zero byte: {name:?}"))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        unsafe { call!(context.ordinal(), cuModuleGetFunction(&mut raw, self.raw, symbol.as_ptr())) }
            .map_err(|error| error.during(format_args!("the kernel {name} of the image {}", self.name)))?;
        let kernel = Kernel { raw, name: name.into(), module: self.clone(), arguments: PhantomData };
        let (found, expected) = (kernel.parameters()?, A::sizes());
        ensure!(
            found.as_ref().is_none_or(|found| *found == expected),
            Device,
            "the kernel {name} of the image {} takes parameters of {:?} bytes; this library gives it {expected:?}",
            self.name,
            found.unwrap_or_default()
        );
        Ok(kernel)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let unload = || {
            // Code that still runs must not go.
            log_failure("before unloading an image", self.context.synchronize());
            let _current = self.context.enter()?;
            // SAFETY: made by `load`.
            unsafe { call!(self.context.ordinal(), cuModuleUnload(self.raw)) }
        };
        log_failure("unloading an image", unload());
    }
}

/// A launch's blocks, the threads of each, and the bytes of dynamic shared memory of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub blocks: u32,
    pub threads: u32,
    pub shared: u32,
}

#[cfg(test)]
impl Grid {
    /// Without shared memory.
    pub fn of(blocks: u32, threads: u32) -> Grid {
        Grid { blocks, threads, shared: 0 }
    }
}

/// A kernel that takes arguments of the types `A`.
pub(crate) struct Kernel<A> {
    raw: CUfunction,
    name: String,
    module: Arc<Module>,
    arguments: PhantomData<fn(A)>,
}

// SAFETY: a handle that any thread may launch.
unsafe impl<A> Send for Kernel<A> {}
unsafe impl<A> Sync for Kernel<A> {}

/// Shared memory that every block may have without `allow_shared`.
const FREE_SHARED: u32 = 48 << 10;

impl<A: Arguments> Kernel<A> {
    /// Lets blocks have `bytes` of dynamic shared memory.
    ///
    /// Errors: UNSUPPORTED, where the GPU has not as much.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        let context = &self.module.context;
        let largest = context.largest_shared()?;
        ensure!(
            bytes <= largest,
            Unsupported,
            "the kernel {} needs {bytes} bytes of shared memory a block; GPU {} has {largest}",
            self.name,
            context.ordinal()
        );
        if bytes <= FREE_SHARED {
            return Ok(());
        }
        self.set_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as i32)
    }

    /// Asks for as much of a multiprocessor's memory as there is to be shared memory, and the rest to be first-level cache.
    pub fn prefer_shared(&self) -> Result<()> {
        self.set_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    }

    fn set_attribute(&self, attribute: CUfunction_attribute, value: i32) -> Result<()> {
        let context = &self.module.context;
        let _current = context.enter()?;
        // SAFETY: a living function.
        unsafe { call!(context.ordinal(), cuFuncSetAttribute(self.raw, attribute, value)) }
            .map_err(|error| error.during(&self.name))
    }

    /// Blocks of `threads` threads and `shared` bytes that a multiprocessor holds at once.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32> {
        let context = &self.module.context;
        let _current = context.enter()?;
        let mut blocks = 0;
        let (threads, shared) = (threads as i32, shared as usize);
        // SAFETY: an output that outlives the call.
        unsafe { call!(context.ordinal(), cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, self.raw, threads, shared)) }
            .map_err(|error| error.during(&self.name))?;
        Ok(blocks as u32)
    }

    /// Threads that a block may have: fewer than the GPU's most where the kernel takes many registers.
    pub fn largest_block(&self) -> Result<u32> {
        let context = &self.module.context;
        let _current = context.enter()?;
        let mut threads = 0;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        // SAFETY: an output that outlives the call.
        unsafe { call!(context.ordinal(), cuFuncGetAttribute(&mut threads, attribute, self.raw)) }
            .map_err(|error| error.during(&self.name))?;
        Ok(threads as u32)
    }

    /// Enqueues the kernel; the arguments are copied. A grid without blocks is nothing to do.
    ///
    /// # Safety
    /// What the kernel reads and writes through its arguments is device memory of this context, large enough, and lives until the
    /// stream has done it.
    pub unsafe fn launch(&self, stream: &Stream, grid: Grid, arguments: A) -> Result<()> {
        if grid.blocks == 0 {
            return Ok(());
        }
        let context = &self.module.context;
        let _current = context.enter()?;
        let Grid { blocks, threads, shared } = grid;
        arguments
            .with_pointers(|pointers| {
                let (none, stream) = (std::ptr::null_mut(), stream.handle());
                call!(
                    context.ordinal(),
                    cuLaunchKernel(self.raw, blocks, 1, 1, threads, 1, 1, shared, stream, pointers.as_mut_ptr(), none)
                )
            })
            .map_err(|error| error.during(format_args!("{} of {blocks} blocks of {threads} threads, {shared} bytes", self.name)))
    }

    /// Bytes of each parameter, as the image has them; `None` where the driver cannot tell.
    fn parameters(&self) -> Result<Option<Vec<usize>>> {
        if !has_optional("cuFuncGetParamInfo") {
            return Ok(None);
        }
        let mut sizes = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: outputs that outlive the call.
            match unsafe { sys::cuFuncGetParamInfo(self.raw, sizes.len(), &mut offset, &mut size) } {
                // One past the last.
                CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(Some(sizes)),
                result => driver_result(result, "cuFuncGetParamInfo", self.module.context.ordinal())?,
            }
            sizes.push(size);
        }
    }
}

/// A kernel's arguments: a tuple of plain values, laid out as C has them.
pub(crate) trait Arguments: Copy {
    fn sizes() -> Vec<usize>;
    /// Hands on what cuLaunchKernel takes: where each argument is.
    fn with_pointers<R>(self, call: impl FnOnce(&mut [*mut c_void]) -> R) -> R;
}

macro_rules! arguments {
    ($($type:ident $value:ident),*) => {
        impl<$($type: Copy),*> Arguments for ($($type,)*) {
            fn sizes() -> Vec<usize> {
                vec![$(std::mem::size_of::<$type>()),*]
            }

            fn with_pointers<R>(self, call: impl FnOnce(&mut [*mut c_void]) -> R) -> R {
                let ($(mut $value,)*) = self;
                call(&mut [$(std::ptr::from_mut(&mut $value).cast()),*])
            }
        }
    };
}

arguments!(A a);
arguments!(A a, B b);
arguments!(A a, B b, C c);
arguments!(A a, B b, C c, D d);
arguments!(A a, B b, C c, D d, E e);
arguments!(A a, B b, C c, D d, E e, F f);
arguments!(A a, B b, C c, D d, E e, F f, G g);
