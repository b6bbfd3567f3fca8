//! The CUDA backend: a GPU, its kernels, heads on it, and the kernels by themselves.
//!
//! Work is enqueued on the caller's stream, in the caller's context. The driver is looked for when a device is made; without one
//! everything else in the library works.

mod driver;
mod fused;
mod head;
pub(crate) mod images;
mod kernels;
mod lanes;
mod lent;
mod memory;
mod nearest;
mod products;
mod shared_structs;
mod sizes;
mod staging;
mod stateless;

use std::ffi::{c_void, CStr, CString};
use std::sync::{Arc, Mutex};

use self::driver::{Context, Place, Stream};
use self::head::CudaHead;
use self::images::Images;
use self::kernels::Kernels;
use self::lent::Room;
use self::products::Products;
use self::sizes::Gpu;
use crate::device::{Device, FusedBackward, FusedForward, HeadDevice, HeadSpec, RowState, SampleDraw, Workspace};
use crate::margin::Margin;
use crate::matrix::Matrix;
use crate::optimizer::Optimizer;
use crate::options::Precision;
use crate::stream::StreamDevice;
use crate::{error, Result};

/// A GPU as its heads share it.
pub(super) struct Cuda {
    context: Arc<Context>,
    /// The caller's.
    stream: Stream,
    kernels: Kernels,
    products: Products,
    /// For the kernels by themselves.
    room: Mutex<Room>,
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
        let images = Images::for_device((major as u32, minor as u32))?;
        let text = format!("cuda: {name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors");
        Ok(Cuda {
            kernels: Kernels::load(&context, &images)?,
            products: Products::load(&context, &images, multiprocessors)?,
            stream: Stream::borrowed(&context, stream),
            room: Mutex::default(),
            multiprocessors,
            info: CString::new(text).map_err(|_| error!(Device, "the GPU's name contains a zero byte"))?,
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

impl Device for CudaDevice {
    fn info(&self) -> &CStr {
        &self.0.info
    }

    fn process(&self) -> u32 {
        self.0.process
    }

    fn auto_precision(&self) -> Precision {
        Precision::Half
    }

    fn streams(&self) -> Option<Arc<dyn StreamDevice>> {
        Some(self.0.clone())
    }

    fn is_device_memory(&self, name: &str, pointer: *const u8) -> Result<bool> {
        Ok(self.0.context.place(name, pointer.cast())? == Place::Device)
    }

    fn open(&self, spec: HeadSpec) -> Result<Box<dyn HeadDevice>> {
        Ok(Box::new(CudaHead::new(self.0.clone(), spec)?))
    }

    fn normalize_rows(&self, rows: &Matrix, normalized: &Matrix, inverse_norms: *mut f32) -> Result<()> {
        self.0.normalize_rows(rows, normalized, inverse_norms)
    }

    fn normalize_gemm(&self, embeddings: &Matrix, centers: &Matrix, cosines: &Matrix, workspace: Workspace) -> Result<()> {
        self.0.normalize_gemm(embeddings, centers, cosines, workspace)
    }

    fn normalize_gemm_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        self.0.normalize_gemm_workspace(batch, dim, classes)
    }

    fn margin_forward(&self, margin: &Margin, cosines: *const f32, count: usize, logits: *mut f32) -> Result<()> {
        self.0.margin_forward(margin, cosines, count, logits)
    }

    fn margin_backward(
        &self,
        margin: &Margin,
        cosines: *const f32,
        grad_logits: *const f32,
        count: usize,
        grad_cosines: *mut f32,
    ) -> Result<()> {
        self.0.margin_backward(margin, cosines, grad_logits, count, grad_cosines)
    }

    fn partial_softmax(&self, margin: &Margin, cosines: &Matrix, targets: *const i64, row_sums: *mut f32) -> Result<()> {
        self.0.partial_softmax(margin, cosines, targets, row_sums)
    }

    fn fused_forward(&self, arguments: &FusedForward<'_>) -> Result<()> {
        self.0.fused_forward(arguments)
    }

    fn fused_backward(&self, arguments: &FusedBackward<'_>) -> Result<()> {
        self.0.fused_backward(arguments)
    }

    fn fused_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        self.0.fused_workspace(batch, dim, classes)
    }

    fn sample_classes(&self, draw: &SampleDraw, ids: *mut i64) -> Result<u64> {
        self.0.sample_classes(draw, ids)
    }

    fn update_rows(
        &self,
        optimizer: &Optimizer,
        state: &RowState<'_>,
        ids: *const i64,
        gradients: &Matrix,
        learning_rate: f64,
        update: u64,
    ) -> Result<()> {
        self.0.update_rows(optimizer, state, ids, gradients, learning_rate, update)
    }
}
