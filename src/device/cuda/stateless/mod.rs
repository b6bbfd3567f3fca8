//! A GPU as a device: it makes heads, and offers the kernels without a head, which src/capi/kernels.rs documents.
//!
//! Stateless calls enqueue everything on the caller's stream. A call waits only for values that the host needs: an array in device
//! memory whose contents it checks, a result in host memory, a count that it returns.

mod arguments;
mod fused;

use std::ffi::{c_void, CStr};
use std::sync::{Arc, Mutex, MutexGuard};

use self::arguments::{check_workspace, CallArguments, StagingPool, ALIGNMENT};
use super::context::Gpu;
use super::driver::MemorySpace;
use super::head::CudaHead;
use super::shared_structs::{
    HeadArrays, MarginSettings, MatrixView, OptimizerSettings, Rule, StepBlock, NONE, TILE_COLUMNS, TILE_ROWS,
};
use super::sizes::{draw_counters, DEPTH_MULTIPLE, LARGEST_CHUNK};
use super::staging::{fetch, grown};
use crate::device::stateless::{checked_shape, checked_targets, must_be_f32};
use crate::device::workspace::WorkspaceCutter;
use crate::device::{Device, FusedBackward, FusedForward, HeadDevice, HeadSpec, RowState, SampleDraw, Workspace};
use crate::margin::Margin;
use crate::matrix::Matrix;
use crate::optimizer::{Optimizer, UpdateRule};
use crate::options::{Precision, RowUpdate};
use crate::stream::StreamDevice;
use crate::{ensure, Result};

/// Bytes that a chunk of columns may take before it is cut down.
const CHUNK_BYTES: u64 = 256 << 20;
/// Columns of a row, and rows of a shard that is drawn from: the kernels' 32-bit numbers, with room for a block's stride.
const MAX_COLUMNS: u64 = u32::MAX as u64 - 8191;

/// B, d and S of a product, and how many columns a chunk has.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub rows: u64,
    pub dim: u64,
    pub classes: u64,
    pub row_capacity: u64,
    pub depth_pitch: u64,
    pub sample_capacity: u64,
    pub chunk: u64,
}

impl Shape {
    /// `column_bytes` computes the bytes of a chunk's column from the rest of the shape.
    pub fn new(batch: u64, dim: u64, classes: u64, column_bytes: impl FnOnce(&Shape) -> u64) -> Result<Shape> {
        checked_shape(batch, dim, classes)?;
        for (name, value) in [("batch", batch), ("classes", classes)] {
            ensure!(value <= MAX_COLUMNS, InvalidArgument, "{name} must be at most {MAX_COLUMNS} on the CUDA device, got {value}");
        }
        let mut shape = Shape {
            rows: batch,
            dim,
            classes,
            row_capacity: batch.max(1).next_multiple_of(TILE_ROWS),
            depth_pitch: dim.max(1).next_multiple_of(DEPTH_MULTIPLE),
            sample_capacity: classes.max(1).next_multiple_of(TILE_COLUMNS),
            chunk: 0,
        };
        let tiles = (CHUNK_BYTES / (TILE_COLUMNS * column_bytes(&shape))).clamp(1, LARGEST_CHUNK / TILE_COLUMNS);
        shape.chunk = (tiles * TILE_COLUMNS).min(shape.sample_capacity);
        Ok(shape)
    }

    /// The sizes, without pointers; operands are float32's three planes.
    pub fn head_arrays(&self) -> HeadArrays {
        HeadArrays {
            plane_rows: self.row_capacity * self.depth_pitch,
            plane_centers: self.chunk * self.depth_pitch,
            plane_numerators: self.row_capacity * self.chunk,
            row_capacity: self.row_capacity as u32,
            dim: self.dim as u32,
            depth_pitch: self.depth_pitch as u32,
            shard_rows: self.classes as u32,
            sample_capacity: self.sample_capacity as u32,
            chunk_capacity: self.chunk as u32,
            split_operands: 1,
            ..HeadArrays::zeroed()
        }
    }

    /// First column and number of columns of each chunk.
    pub fn chunks(&self) -> impl Iterator<Item = (u32, u32)> {
        let (chunk, classes) = (self.chunk, self.classes);
        (0..classes).step_by(chunk as usize).map(move |first| (first as u32, chunk.min(classes - first) as u32))
    }

    /// A workspace's arrays for cosines, and their bytes.
    fn cosines(&self, start: *mut u8) -> (HeadArrays, u64) {
        let mut cut = WorkspaceCutter::new(start, ALIGNMENT);
        let arrays = HeadArrays {
            unit_operand: cut.take(3 * self.row_capacity * self.depth_pitch),
            center_operand: cut.take(3 * self.chunk * self.depth_pitch),
            ..self.head_arrays()
        };
        (arrays, cut.bytes())
    }
}

/// The columns of targets, of which -1 is no column.
pub(super) fn columns_of(targets: &[i64]) -> Vec<u32> {
    targets.iter().map(|&target| u32::try_from(target).unwrap_or(NONE)).collect()
}

fn margin_arrays(margin: &Margin) -> HeadArrays {
    HeadArrays { margin: MarginSettings::from(margin), ..HeadArrays::zeroed() }
}

fn check_columns(name: &str, matrix: &Matrix) -> Result<()> {
    let cols = matrix.cols;
    ensure!(
        cols as u64 <= MAX_COLUMNS,
        InvalidArgument,
        "{name}.cols must be at most {MAX_COLUMNS} on the CUDA device, got {cols}"
    );
    Ok(())
}

/// A GPU as callers hold it.
pub(in crate::device) struct CudaDevice {
    gpu: Arc<Gpu>,
    pool: Mutex<StagingPool>,
}

impl CudaDevice {
    /// Errors: UNSUPPORTED without a driver, with one too old, or without kernels for the GPU; INVALID_ARGUMENT for a wrong
    /// ordinal.
    ///
    /// # Safety
    /// `stream` is a stream of the driver's, or NULL.
    pub unsafe fn new(ordinal: i32, stream: *mut c_void) -> Result<CudaDevice> {
        Ok(CudaDevice { gpu: Arc::new(Gpu::new(ordinal, stream)?), pool: Mutex::default() })
    }

    /// One stateless call at a time fills the memory that is kept for them.
    fn pool(&self) -> MutexGuard<'_, StagingPool> {
        // A call that panicked left nothing half done: buffers are made whole or not at all.
        self.pool.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &CStr {
        &self.gpu.info
    }

    fn process(&self) -> u32 {
        self.gpu.process
    }

    fn auto_precision(&self) -> Precision {
        Precision::Half
    }

    fn streams(&self) -> Option<Arc<dyn StreamDevice>> {
        Some(self.gpu.clone())
    }

    fn check_not_capturing(&self) -> Result<()> {
        ensure!(
            !self.gpu.stream.is_capturing()?,
            InvalidArgument,
            "the device's stream, or one that it waits for, is being captured into a CUDA graph: call the library before or after"
        );
        Ok(())
    }

    fn is_device_memory(&self, name: &str, pointer: *const u8) -> Result<bool> {
        Ok(self.gpu.context.memory_space(name, pointer.cast())? == MemorySpace::Device)
    }

    fn open(&self, spec: HeadSpec) -> Result<Box<dyn HeadDevice>> {
        Ok(Box::new(CudaHead::new(self.gpu.clone(), spec)?))
    }

    fn normalize_rows(&self, rows: &Matrix, normalized: &Matrix, inverse_norms: *mut f32) -> Result<()> {
        check_columns("rows", rows)?;
        if rows.rows == 0 {
            return Ok(());
        }
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&self.gpu.stream, &mut pool);
        let from = call.read("rows", rows)?;
        let to = call.write("normalized", normalized)?;
        let norms = call.write_array("inverse_norms", inverse_norms, rows.rows)?;
        self.gpu.run(&self.gpu.entries.normalize_matrix, (HeadArrays::zeroed(), from, to, norms.cast()))?;
        call.finish()
    }

    fn normalize_gemm(&self, e: &Matrix, w: &Matrix, cosines: &Matrix, workspace: Workspace) -> Result<()> {
        must_be_f32("cosines", cosines)?;
        let shape = cosines_shape(e.rows as u64, e.cols as u64, w.rows as u64)?;
        let (arrays, needed) = shape.cosines(workspace.data);
        check_workspace(&self.gpu.stream, workspace, needed)?;
        if shape.rows == 0 || shape.classes == 0 {
            return Ok(());
        }
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&self.gpu.stream, &mut pool);
        let embeddings = call.read("embeddings", e)?;
        let centers = call.read("centers", w)?;
        let out = call.write("cosines", cosines)?;
        self.gpu.write_unit_rows(&arrays, embeddings, shape.rows as u32)?;
        for (first, count) in shape.chunks() {
            self.gpu.write_unit_centers(&arrays, centers, first, count)?;
            self.gpu.products.cosines(&self.gpu.stream, arrays, shape.rows as u32, count, first.into(), out)?;
        }
        call.finish()
    }

    fn normalize_gemm_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        Ok(cosines_shape(batch, dim, classes)?.cosines(std::ptr::null_mut()).1)
    }

    fn margin_forward(&self, margin: &Margin, cosines: *const f32, count: usize, logits: *mut f32) -> Result<()> {
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&self.gpu.stream, &mut pool);
        let from = call.read_array("cosines", cosines, count)?;
        let to = call.write_array("logits", logits, count)?;
        self.gpu.run(&self.gpu.entries.margin_forward, (margin_arrays(margin), from.cast(), count as u64, to.cast()))?;
        call.finish()
    }

    fn margin_backward(
        &self,
        margin: &Margin,
        cosines: *const f32,
        grad_logits: *const f32,
        count: usize,
        grad_cosines: *mut f32,
    ) -> Result<()> {
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&self.gpu.stream, &mut pool);
        let from = call.read_array("cosines", cosines, count)?;
        let gradient = call.read_array("grad_logits", grad_logits, count)?;
        let to = call.write_array("grad_cosines", grad_cosines, count)?;
        self.gpu.run(
            &self.gpu.entries.margin_backward,
            (margin_arrays(margin), from.cast(), gradient.cast(), count as u64, to.cast()),
        )?;
        call.finish()
    }

    fn partial_softmax(
        &self,
        margin: &Margin,
        cosines: &Matrix,
        targets: *const i64,
        sums: *mut f32,
        offsets: *mut f32,
    ) -> Result<()> {
        must_be_f32("cosines", cosines)?;
        check_columns("cosines", cosines)?;
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&self.gpu.stream, &mut pool);
        let targets = call.on_host("targets", targets, cosines.rows)?;
        checked_targets(&targets, cosines.cols)?;
        let columns = call.list(&columns_of(&targets))?;
        let values = call.change("cosines", cosines)?;
        let row_sums = call.write_array("row_sums", sums, cosines.rows)?;
        let row_offsets = call.write_array("row_offsets", offsets, cosines.rows)?;
        let own = i32::from(!offsets.is_null() && margin.has_row_offsets());
        let arguments = (margin_arrays(margin), values, columns.cast(), row_sums.cast(), row_offsets.cast(), own);
        self.gpu.run(&self.gpu.entries.partial_softmax, arguments)?;
        call.finish()
    }

    fn sample_classes(&self, draw: &SampleDraw, ids: *mut i64) -> Result<u64> {
        draw.check()?;
        ensure!(
            draw.rows <= MAX_COLUMNS,
            InvalidArgument,
            "rows must be at most {MAX_COLUMNS} on the CUDA device, got {}",
            draw.rows
        );
        let mut pool = self.pool();
        let (mut call, kept) = CallArguments::new(&self.gpu.stream, &mut pool);
        let positives = call.on_host("positives", draw.positives, draw.positive_count)?;
        draw.check_positives(&positives)?;
        let count = positives.len().max(draw.sample_size as usize);
        if count == 0 {
            return Ok(0);
        }
        let positives: Vec<u32> = positives.iter().map(|&id| (id as u64 - draw.first) as u32).collect();
        let capacity = count.next_multiple_of(TILE_COLUMNS as usize);
        let counters = draw_counters(0, draw.rows, draw.sample_size, 1);
        let (gpu, stream) = (&*self.gpu, &self.gpu.stream);
        let arrays = HeadArrays {
            block: grown(&mut kept.block, stream, 1, "a draw's block")?.as_mut_ptr(),
            counts: grown(&mut kept.counts, stream, counters as usize, "a draw's counters")?.as_mut_ptr(),
            selected: grown(&mut kept.selected, stream, draw.rows.div_ceil(32) as usize, "a draw's bits")?.as_mut_ptr(),
            sample: grown(&mut kept.sample, stream, capacity, "a draw's classes")?.as_mut_ptr(),
            positive_of: grown(&mut kept.positive_of, stream, capacity, "a draw's columns")?.as_mut_ptr(),
            positive_classes: call.list(&positives)?,
            first_class: draw.first,
            seed: draw.seed,
            shard_rows: draw.rows as u32,
            sample_size: draw.sample_size as u32,
            sample_capacity: capacity as u32,
            count_capacity: counters as u32,
            ..HeadArrays::zeroed()
        };
        let out = call.write_array("ids", ids, count)?;
        let (positives, wanted) = (positives.len() as u32, draw.sample_size.saturating_sub(positives.len() as u64) as u32);
        gpu.upload(arrays.block, &[StepBlock { draws: draw.step, positives, wanted, ..StepBlock::zeroed() }])?;
        gpu.run(&gpu.entries.mark_chosen, (arrays, arrays.positive_classes.cast(), positives))?;
        gpu.run(&gpu.entries.mark_below, (arrays,))?;
        gpu.run(&gpu.entries.pick_threshold, (arrays,))?;
        gpu.run(&gpu.entries.count_sample, (arrays,))?;
        gpu.run(&gpu.entries.list_sample, (arrays,))?;
        gpu.run(&gpu.entries.write_ids, (arrays, out.cast()))?;
        let block: StepBlock = fetch(stream, arrays.block, 1)?[0];
        call.finish()?;
        Ok(block.classes.into())
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
        state.check(optimizer, learning_rate, update)?;
        let rows = state.centers.rows as u64;
        ensure!(rows <= MAX_COLUMNS, InvalidArgument, "centers.rows must be at most {MAX_COLUMNS} on the CUDA device, got {rows}");
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&self.gpu.stream, &mut pool);
        let ids = call.on_host("ids", ids, gradients.rows)?;
        state.check_ids(&ids)?;
        let row_indices = call.list(&columns_of(&ids))?;
        let centers = call.change("centers", state.centers)?;
        let momentum = call.change("momentum", state.momentum)?;
        let second_moment = match state.second_moment {
            Some(matrix) if optimizer.state_tensors() > 1 => call.change("second_moment", matrix)?,
            _ => MatrixView::zeroed(),
        };
        let given = call.read("gradients", gradients)?;
        let arrays = HeadArrays { optimizer: OptimizerSettings::new(optimizer, RowUpdate::Lazy), ..HeadArrays::zeroed() };
        let rule = Rule::from(&UpdateRule::new(optimizer, learning_rate, update));
        self.gpu.run(
            &self.gpu.entries.update_given_rows,
            (arrays, centers, momentum, second_moment, row_indices.cast(), given, rule),
        )?;
        call.finish()
    }

    fn fused_forward(&self, arguments: &FusedForward<'_>) -> Result<()> {
        self.run_fused_forward(arguments)
    }

    fn fused_backward(&self, arguments: &FusedBackward<'_>) -> Result<()> {
        self.run_fused_backward(arguments)
    }

    fn fused_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        self.fused_bytes(batch, dim, classes)
    }
}

fn cosines_shape(batch: u64, dim: u64, classes: u64) -> Result<Shape> {
    Shape::new(batch, dim, classes, |shape| 6 * shape.depth_pitch)
}
