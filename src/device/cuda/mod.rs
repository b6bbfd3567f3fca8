//! The CUDA backend: a GPU, its kernels, and heads on it.
//!
//! Work is enqueued on the caller's stream, in the caller's context. The driver is looked for when a device is made; without one
//! everything else in the library works.

mod driver;
mod head;
pub(crate) mod images;
mod kernels;
mod lanes;
mod memory;
mod nearest;
mod products;
#[cfg(test)]
#[path = "../../../tests/common/simt.rs"]
mod simt;
mod sizes;
mod staging;
mod view;

use std::ffi::{c_void, CStr, CString};
use std::sync::Arc;

use self::driver::{Context, Stream};
use self::head::CudaHead;
use self::images::Images;
use self::kernels::Kernels;
use self::products::Products;
use self::sizes::Gpu;
use crate::device::{Device, FusedBackward, FusedForward, HeadDevice, HeadSpec, RowState, SampleDraw, Workspace};
use crate::margin::Margin;
use crate::matrix::Matrix;
use crate::optimizer::Optimizer;
use crate::{error, Error, Result};

/// How the emulator of ctests/simt calls its GPU.
const EMULATOR: &str = "SIMT emulator";

/// A GPU as its heads share it.
pub(super) struct Cuda {
    context: Arc<Context>,
    /// The caller's.
    stream: Stream,
    kernels: Kernels,
    products: Products,
    multiprocessors: u32,
    info: CString,
    process: u32,
}

impl Cuda {
    /// Errors: UNSUPPORTED without a driver, with one too old, or without kernels for the GPU; INVALID_ARGUMENT for a wrong ordinal.
    ///
    /// # Safety
    /// `stream` is a stream of the driver's, or NULL.
    pub unsafe fn new(ordinal: i32, stream: *mut c_void) -> Result<Cuda> {
        images::check_driver(driver::driver()?)?;
        let context = Context::of(ordinal, stream)?;
        let (major, minor) = context.compute_capability()?;
        let (name, multiprocessors) = (context.name()?, context.multiprocessors()?);
        let images = Images::for_device((major as u32, minor as u32), name.contains(EMULATOR))?;
        let text = format!("cuda: {name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors");
        Ok(Cuda {
            kernels: Kernels::load(&context, &images)?,
            products: Products::load(&context, &images, multiprocessors)?,
            stream: Stream::borrowed(&context, stream),
            multiprocessors,
            info: CString::new(text).map_err(|_| error!(Device, "the GPU's name holds a zero"))?,
            process: std::process::id(),
            context,
        })
    }

    /// Blocks of a row-wise kernel, so many for each multiprocessor.
    fn grid(&self, blocks: u32) -> u32 {
        blocks * self.multiprocessors
    }

    fn gpu(&self) -> Result<Gpu> {
        Ok(Gpu { multiprocessors: self.multiprocessors, free_memory: self.context.free_memory()? })
    }
}

/// A GPU as callers hold it.
pub(super) struct CudaDevice(pub(super) Arc<Cuda>);

impl CudaDevice {
    fn stateless(&self, kernel: &str) -> Error {
        error!(Unsupported, "{kernel} by itself is not on the CUDA device in this version; heads are, and the CPU device has it")
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &CStr {
        &self.0.info
    }

    fn process(&self) -> u32 {
        self.0.process
    }

    fn open(&self, spec: HeadSpec) -> Result<Box<dyn HeadDevice>> {
        Ok(Box::new(CudaHead::new(self.0.clone(), spec)?))
    }

    fn normalize_rows(&self, _: &Matrix, _: &Matrix, _: *mut f32) -> Result<()> {
        Err(self.stateless("pfc_normalize_rows"))
    }

    fn normalize_gemm(&self, _: &Matrix, _: &Matrix, _: &Matrix, _: Workspace) -> Result<()> {
        Err(self.stateless("pfc_normalize_gemm"))
    }

    fn normalize_gemm_workspace(&self, _: u64, _: u64, _: u64) -> Result<u64> {
        Err(self.stateless("pfc_normalize_gemm"))
    }

    fn margin_forward(&self, _: &Margin, _: *const f32, _: usize, _: *mut f32) -> Result<()> {
        Err(self.stateless("pfc_margin_forward"))
    }

    fn margin_backward(&self, _: &Margin, _: *const f32, _: *const f32, _: usize, _: *mut f32) -> Result<()> {
        Err(self.stateless("pfc_margin_backward"))
    }

    fn partial_softmax(&self, _: &Margin, _: &Matrix, _: *const i64, _: *mut f32) -> Result<()> {
        Err(self.stateless("pfc_partial_softmax"))
    }

    fn fused_forward(&self, _: &FusedForward<'_>) -> Result<()> {
        Err(self.stateless("pfc_fused_forward"))
    }

    fn fused_backward(&self, _: &FusedBackward<'_>) -> Result<()> {
        Err(self.stateless("pfc_fused_backward"))
    }

    fn fused_workspace(&self, _: u64, _: u64, _: u64) -> Result<u64> {
        Err(self.stateless("pfc_fused_forward"))
    }

    fn sample_classes(&self, _: &SampleDraw, _: *mut i64) -> Result<u64> {
        Err(self.stateless("pfc_sample_classes"))
    }

    fn update_rows(&self, _: &Optimizer, _: &RowState<'_>, _: *const i64, _: &Matrix, _: f64, _: u64) -> Result<()> {
        Err(self.stateless("pfc_update_rows"))
    }
}
