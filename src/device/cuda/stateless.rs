//! The kernels by themselves on a GPU, but for the fused ones: what src/capi/kernels.rs documents.
//!
//! Everything is enqueued on the caller's stream. A call waits where it has to know: for an array in device memory whose contents it
//! checks, for a result in host memory, for a count that it returns.

use std::mem::{size_of, size_of_val};
use std::sync::MutexGuard;

use super::driver::{Arguments, Grid, Kernel};
use super::kernels::{ALONE, BLOCK, HISTOGRAM, PARTS};
use super::lent::{check_workspace, Cut, Lent, Room};
use super::shared_structs::{
    HeadArrays, MarginSettings, MatrixView, OptimizerSettings, Rule, StepBlock, NONE, TILE_COLUMNS, TILE_ROWS,
};
use super::sizes::{BINS, CHUNK, COUNTED_CLASSES, DEPTH};
use super::staging::{fetch, grown};
use super::Cuda;
use crate::device::stateless::{checked_shape, checked_targets, must_be_f32};
use crate::device::{RowState, SampleDraw, Workspace};
use crate::margin::Margin;
use crate::matrix::Matrix;
use crate::optimizer::{Optimizer, UpdateRule};
use crate::options::RowUpdate;
use crate::{ensure, Result};

/// Blocks for each multiprocessor.
pub(super) const BLOCKS: u32 = 4;
/// Bytes that a chunk of columns may take before it is cut down.
const CHUNK_BYTES: u64 = 256 << 20;
/// kernels/sample.cu: counters of the shortest list.
const LIST_COUNTERS: u64 = 3;
/// Columns of a row, and rows of a shard that is drawn from: the kernels' 32-bit numbers, with room for a block's stride.
const MOST: u64 = u32::MAX as u64 - 8191;

/// B, d and S of a product, and how many columns go at a time.
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
    /// `column_bytes`: of a chunk's column, from the others of the shape.
    pub fn new(batch: u64, dim: u64, classes: u64, column_bytes: impl FnOnce(&Shape) -> u64) -> Result<Shape> {
        checked_shape(batch, dim, classes)?;
        for (name, value) in [("batch", batch), ("classes", classes)] {
            ensure!(value <= MOST, InvalidArgument, "{name} must be at most {MOST} on the CUDA device, got {value}");
        }
        let mut shape = Shape {
            rows: batch,
            dim,
            classes,
            row_capacity: batch.max(1).next_multiple_of(TILE_ROWS),
            depth_pitch: dim.max(1).next_multiple_of(DEPTH),
            sample_capacity: classes.max(1).next_multiple_of(TILE_COLUMNS),
            chunk: 0,
        };
        let tiles = (CHUNK_BYTES / (TILE_COLUMNS * column_bytes(&shape))).clamp(1, CHUNK / TILE_COLUMNS);
        shape.chunk = (tiles * TILE_COLUMNS).min(shape.sample_capacity);
        Ok(shape)
    }

    /// The sizes of a view; its operands are float32's three planes.
    pub fn view(&self) -> HeadArrays {
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

    /// A workspace's arrays for cosines.
    fn cosines(&self, start: *mut u8) -> (HeadArrays, u64) {
        let mut cut = Cut::new(start);
        let view = HeadArrays {
            unit_operand: cut.take(3 * self.row_capacity * self.depth_pitch),
            center_operand: cut.take(3 * self.chunk * self.depth_pitch),
            ..self.view()
        };
        (view, cut.bytes)
    }
}

/// -1 is no column.
pub(super) fn columns_of(targets: &[i64]) -> Vec<u32> {
    targets.iter().map(|&target| u32::try_from(target).unwrap_or(NONE)).collect()
}

fn margin_view(margin: &Margin) -> HeadArrays {
    HeadArrays { margin: MarginSettings::from(margin), ..HeadArrays::zeroed() }
}

fn few_columns(name: &str, matrix: &Matrix) -> Result<()> {
    let cols = matrix.cols;
    ensure!(cols as u64 <= MOST, InvalidArgument, "{name}.cols must be at most {MOST} on the CUDA device, got {cols}");
    Ok(())
}

impl Cuda {
    /// One stateless call at a time fills the memory that is kept for them.
    pub(super) fn room(&self) -> MutexGuard<'_, Room> {
        // A call that panicked left nothing half done: buffers are made whole or not at all.
        self.room.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn normalize_rows(&self, rows: &Matrix, normalized: &Matrix, inverse_norms: *mut f32) -> Result<()> {
        few_columns("rows", rows)?;
        if rows.rows == 0 {
            return Ok(());
        }
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let from = lent.read("rows", rows)?;
        let to = lent.write("normalized", normalized)?;
        let norms = lent.write_array("inverse_norms", inverse_norms, rows.rows)?;
        self.run(&self.kernels.normalize_matrix, (HeadArrays::zeroed(), from, to, norms.cast()))?;
        lent.finish()
    }

    pub(super) fn normalize_gemm(&self, e: &Matrix, w: &Matrix, cosines: &Matrix, workspace: Workspace) -> Result<()> {
        must_be_f32("cosines", cosines)?;
        let shape = cosines_shape(e.rows as u64, e.cols as u64, w.rows as u64)?;
        let (view, needed) = shape.cosines(workspace.data);
        check_workspace(&self.stream, workspace, needed)?;
        if shape.rows == 0 || shape.classes == 0 {
            return Ok(());
        }
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let embeddings = lent.read("embeddings", e)?;
        let centers = lent.read("centers", w)?;
        let out = lent.write("cosines", cosines)?;
        self.unit_rows(&view, embeddings, shape.rows as u32)?;
        for (first, count) in shape.chunks() {
            self.unit_centers(&view, centers, first, count)?;
            self.products.cosines(&self.stream, view, shape.rows as u32, count, first.into(), out)?;
        }
        lent.finish()
    }

    pub(super) fn normalize_gemm_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        Ok(cosines_shape(batch, dim, classes)?.cosines(std::ptr::null_mut()).1)
    }

    /// E^: the first `count` rows.
    pub(super) fn unit_rows(&self, view: &HeadArrays, rows: MatrixView, count: u32) -> Result<()> {
        self.run(&self.kernels.write_unit_operands, (*view, rows, 0u64, count, 0i32))?;
        Ok(())
    }

    /// W^ of a chunk.
    pub(super) fn unit_centers(&self, view: &HeadArrays, centers: MatrixView, first: u32, count: u32) -> Result<()> {
        self.run(&self.kernels.write_unit_operands, (*view, centers, u64::from(first), count, 1i32))?;
        Ok(())
    }

    pub(super) fn margin_forward(&self, margin: &Margin, cosines: *const f32, count: usize, logits: *mut f32) -> Result<()> {
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let from = lent.read_array("cosines", cosines, count)?;
        let to = lent.write_array("logits", logits, count)?;
        self.run(&self.kernels.margin_forward, (margin_view(margin), from.cast(), count as u64, to.cast()))?;
        lent.finish()
    }

    pub(super) fn margin_backward(
        &self,
        margin: &Margin,
        cosines: *const f32,
        grad_logits: *const f32,
        count: usize,
        grad_cosines: *mut f32,
    ) -> Result<()> {
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let from = lent.read_array("cosines", cosines, count)?;
        let gradient = lent.read_array("grad_logits", grad_logits, count)?;
        let to = lent.write_array("grad_cosines", grad_cosines, count)?;
        self.run(&self.kernels.margin_backward, (margin_view(margin), from.cast(), gradient.cast(), count as u64, to.cast()))?;
        lent.finish()
    }

    pub(super) fn partial_softmax(&self, margin: &Margin, cosines: &Matrix, targets: *const i64, sums: *mut f32) -> Result<()> {
        must_be_f32("cosines", cosines)?;
        few_columns("cosines", cosines)?;
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let targets = lent.on_host("targets", targets, cosines.rows)?;
        checked_targets(&targets, cosines.cols)?;
        let columns = lent.list(&columns_of(&targets))?;
        let values = lent.change("cosines", cosines)?;
        let row_sums = lent.write_array("row_sums", sums, cosines.rows)?;
        let arguments = (margin_view(margin), values, columns.cast(), row_sums.cast());
        self.run_with(PARTS, &self.kernels.partial_softmax, arguments)?;
        lent.finish()
    }

    pub(super) fn sample_classes(&self, draw: &SampleDraw, ids: *mut i64) -> Result<u64> {
        draw.check()?;
        ensure!(draw.rows <= MOST, InvalidArgument, "rows must be at most {MOST} on the CUDA device, got {}", draw.rows);
        let mut room = self.room();
        let (mut lent, kept) = Lent::new(&self.stream, &mut room);
        let positives = lent.on_host("positives", draw.positives, draw.positive_count)?;
        draw.check_positives(&positives)?;
        let count = positives.len().max(draw.sample_size as usize);
        if count == 0 {
            return Ok(0);
        }
        let positives: Vec<u32> = positives.iter().map(|&id| (id as u64 - draw.first) as u32).collect();
        let capacity = count.next_multiple_of(TILE_COLUMNS as usize);
        let counters = (BINS + draw.rows.div_ceil(COUNTED_CLASSES).max(LIST_COUNTERS)) as usize;
        let stream = &self.stream;
        let view = HeadArrays {
            block: grown(&mut kept.block, stream, 1, "a draw's block")?.as_mut_ptr(),
            counts: grown(&mut kept.counts, stream, counters, "a draw's counters")?.as_mut_ptr(),
            selected: grown(&mut kept.selected, stream, draw.rows.div_ceil(32) as usize, "a draw's bits")?.as_mut_ptr(),
            sample: grown(&mut kept.sample, stream, capacity, "a draw's classes")?.as_mut_ptr(),
            positive_of: grown(&mut kept.positive_of, stream, capacity, "a draw's columns")?.as_mut_ptr(),
            positive_classes: lent.list(&positives)?,
            first_class: draw.first,
            seed: draw.seed,
            shard_rows: draw.rows as u32,
            sample_size: draw.sample_size as u32,
            sample_capacity: capacity as u32,
            ..HeadArrays::zeroed()
        };
        let out = lent.write_array("ids", ids, count)?;
        self.put(view.block, &[StepBlock { draws: draw.step, positives: positives.len() as u32, ..StepBlock::zeroed() }])?;
        self.run(&self.kernels.mark_positives, (view,))?;
        for level in 0..3u32 {
            self.run_with(HISTOGRAM, &self.kernels.key_histogram, (view, level))?;
            self.run_on(Grid { shared: PARTS, ..Grid::of(1, ALONE) }, &self.kernels.pick_threshold, (view, level))?;
        }
        self.run(&self.kernels.mark_below, (view,))?;
        self.run_on(Grid { shared: PARTS, ..Grid::of(1, ALONE) }, &self.kernels.mark_ties_scan, (view,))?;
        self.run(&self.kernels.mark_ties, (view,))?;
        self.run_with(PARTS, &self.kernels.list_sample_count, (view,))?;
        self.run_on(Grid { shared: PARTS, ..Grid::of(1, ALONE) }, &self.kernels.list_sample_scan, (view,))?;
        self.run_with(PARTS, &self.kernels.list_sample_scatter, (view,))?;
        self.run(&self.kernels.write_ids, (view, out.cast()))?;
        let block: StepBlock = fetch(stream, view.block, 1)?[0];
        lent.finish()?;
        Ok(block.classes.into())
    }

    pub(super) fn update_rows(
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
        ensure!(rows <= MOST, InvalidArgument, "centers.rows must be at most {MOST} on the CUDA device, got {rows}");
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let ids = lent.on_host("ids", ids, gradients.rows)?;
        state.check_ids(&ids)?;
        let places = lent.list(&columns_of(&ids))?;
        let centers = lent.change("centers", state.centers)?;
        let momentum = lent.change("momentum", state.momentum)?;
        let second_moment = match state.second_moment {
            Some(matrix) if optimizer.state_tensors() > 1 => lent.change("second_moment", matrix)?,
            _ => MatrixView::zeroed(),
        };
        let given = lent.read("gradients", gradients)?;
        let view = HeadArrays { optimizer: OptimizerSettings::new(optimizer, RowUpdate::Lazy), ..HeadArrays::zeroed() };
        let rule = Rule::from(&UpdateRule::new(optimizer, learning_rate, update));
        self.run(&self.kernels.update_given_rows, (view, centers, momentum, second_moment, places.cast(), given, rule))?;
        lent.finish()
    }

    /// Launches a row-wise kernel on the caller's stream, over arguments that the call has checked and a workspace as large as its
    /// view says.
    pub(super) fn run<A: Arguments>(&self, kernel: &Kernel<A>, arguments: A) -> Result<()> {
        self.run_with(0, kernel, arguments)
    }

    fn run_with<A: Arguments>(&self, shared: u32, kernel: &Kernel<A>, arguments: A) -> Result<()> {
        self.run_on(Grid { shared, ..Grid::of(self.grid(BLOCKS), BLOCK) }, kernel, arguments)
    }

    fn run_on<A: Arguments>(&self, grid: Grid, kernel: &Kernel<A>, arguments: A) -> Result<()> {
        // SAFETY: as `run` says.
        unsafe { kernel.launch(&self.stream, grid, arguments) }
    }

    /// Copies values of the host's to an array of a workspace.
    pub(super) fn put<T: crate::memory::Plain>(&self, to: *mut T, values: &[T]) -> Result<()> {
        // SAFETY: an array of as many; the driver has copied pageable memory away when it returns.
        unsafe { self.stream.upload(to.cast(), values.as_ptr().cast(), size_of_val(values)) }
    }

    /// Zeroes an array of a workspace.
    pub(super) fn clear<T>(&self, at: *mut T, count: u64) -> Result<()> {
        // SAFETY: an array of as many.
        unsafe { self.stream.fill(at.cast(), 0, count as usize * size_of::<T>()) }
    }
}

fn cosines_shape(batch: u64, dim: u64, classes: u64) -> Result<Shape> {
    Shape::new(batch, dim, classes, |shape| 6 * shape.depth_pitch)
}
