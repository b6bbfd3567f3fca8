//! pfc_fused_forward and pfc_fused_backward on a GPU: a head's products over the caller's rows, in the caller's workspace.
//!
//! The backward computes the numerators of a chunk of columns again: no workspace grows with B x S.

use super::arguments::{check_workspace, CallArguments, ALIGNMENT};
use super::{columns_of, CudaDevice, Shape};
use crate::device::cuda::products::{Offsets, LARGEST_DIM};
use crate::device::cuda::shared_structs::{HeadArrays, MarginSettings, StepBlock, NONE, TILE_COLUMNS, TILE_ROWS};
use crate::device::cuda::sizes::weighted_splits;
use crate::device::stateless::{checked_targets, checked_weight, must_be_f32, GivenSums};
use crate::device::workspace::WorkspaceCutter;
use crate::device::{FusedBackward, FusedForward};
use crate::{ensure, Result};

/// The arrays of both calls, cut off a workspace.
struct FusedArrays {
    arrays: HeadArrays,
    /// Forward: the sums of the chunks so far.
    totals: *mut f64,
    bytes: u64,
}

/// The rows of the batch by their class, as the center gradient takes them.
struct Positives {
    /// The columns of all rows; then for those that have one, by column and row: columns, rows; distinct columns; where each
    /// begins.
    lists: Vec<u32>,
    rows: u32,
    classes: u32,
}

impl Positives {
    fn of(targets: &[i64]) -> Positives {
        let (batch, mut lists) = (targets.len(), columns_of(targets));
        let pairs = lists.iter().zip(0u32..).filter(|(&column, _)| column != NONE);
        let mut pairs: Vec<(u32, u32)> = pairs.map(|(&column, row)| (column, row)).collect();
        pairs.sort_unstable();
        let starts: Vec<usize> = (0..pairs.len()).filter(|&i| i == 0 || pairs[i - 1].0 != pairs[i].0).collect();
        lists.extend(pairs.iter().map(|pair| pair.0));
        lists.resize(2 * batch, 0);
        lists.extend(pairs.iter().map(|pair| pair.1));
        lists.resize(3 * batch, 0);
        lists.extend(starts.iter().map(|&start| pairs[start].0));
        lists.resize(4 * batch, 0);
        lists.extend(starts.iter().map(|&start| start as u32));
        lists.push(pairs.len() as u32);
        Positives { lists, rows: pairs.len() as u32, classes: starts.len() as u32 }
    }
}

impl CudaDevice {
    fn fused_shape(&self, batch: u64, dim: u64, classes: u64) -> Result<Shape> {
        ensure!(
            dim <= LARGEST_DIM.into(),
            Unsupported,
            "dim must be 1 to {LARGEST_DIM} for the fused kernels of the CUDA device, got {dim}"
        );
        // Operands, numerators and dW^.
        Shape::new(batch, dim, classes, |shape| 6 * shape.depth_pitch + 6 * shape.row_capacity + 4 * shape.dim)
    }

    fn fused_arrays(&self, shape: &Shape, start: *mut u8) -> FusedArrays {
        let mut cut = WorkspaceCutter::new(start, ALIGNMENT);
        let (rows, pitch, chunk) = (shape.row_capacity, shape.depth_pitch, shape.chunk);
        let splits = weighted_splits(rows, pitch, chunk, self.gpu.multiprocessors);
        let lists: *mut u32 = cut.take(5 * shape.rows + 1);
        let list = |number: u64| lists.wrapping_add((number * shape.rows) as usize);
        let operand = cut.take(3 * chunk * pitch);
        let mut arrays = HeadArrays {
            block: cut.take(1),
            columns: list(0),
            sort_keys: [list(1), std::ptr::null_mut()],
            sort_rows: [list(2), std::ptr::null_mut()],
            positive_classes: list(3),
            positive_starts: list(4),
            units: cut.take(rows * pitch),
            unit_operand: cut.take(3 * rows * pitch),
            inverse_norms: cut.take(rows),
            derivatives: cut.take(rows),
            target_cosines: cut.take(rows),
            partial_sums: cut.take(chunk / TILE_COLUMNS * rows),
            partial_best: cut.take(chunk / TILE_COLUMNS * rows),
            best_negatives: cut.take(rows),
            shifts: cut.take(rows),
            far_tiles: cut.take(rows / TILE_ROWS),
            center_operand: operand,
            center_wide: operand,
            center_inverse_norms: cut.take(shape.classes),
            numerators: cut.take(3 * rows * chunk),
            splits: splits as u32,
            sharded: 1,
            ..shape.head_arrays()
        };
        // Forward and backward share the rest.
        let shared = cut.bytes();
        arrays.weighted_centers = cut.take(splits * rows * pitch);
        let totals = cut.take(rows);
        let forward = cut.bytes();
        cut.rewind(shared);
        arrays.scaled_operand = cut.take(3 * rows * pitch);
        arrays.tangents = cut.take(rows * pitch);
        arrays.coefficients = cut.take(rows);
        arrays.factors = cut.take(rows);
        arrays.sample = cut.take(shape.sample_capacity);
        arrays.positive_of = cut.take(shape.sample_capacity);
        arrays.center_gradient = cut.take(chunk * shape.dim);
        FusedArrays { arrays, totals, bytes: cut.bytes().max(forward) }
    }

    pub(super) fn fused_bytes(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        let shape = self.fused_shape(batch, dim, classes)?;
        Ok(self.fused_arrays(&shape, std::ptr::null_mut()).bytes)
    }

    /// P of a chunk, from the rows of W that begin it.
    fn chunk_numerators(&self, arrays: &HeadArrays, first: u32, offsets: Offsets) -> Result<()> {
        // The kernel numbers column tiles from the sample's first; only the chunk's have sums here.
        let tiles = u64::from(first) / TILE_COLUMNS * u64::from(arrays.row_capacity);
        let arrays = HeadArrays {
            partial_sums: arrays.partial_sums.wrapping_sub(tiles as usize),
            partial_best: arrays.partial_best.wrapping_sub(tiles as usize),
            ..*arrays
        };
        self.gpu.products.numerators(&self.gpu.stream, arrays, first, offsets)
    }

    pub(super) fn run_fused_forward(&self, arguments: &FusedForward<'_>) -> Result<()> {
        let FusedForward { margin, embeddings, centers, weighted, .. } = *arguments;
        let (gpu, entries) = (&*self.gpu, &self.gpu.entries);
        must_be_f32("weighted", weighted)?;
        let shape = self.fused_shape(embeddings.rows as u64, embeddings.cols as u64, centers.rows as u64)?;
        let FusedArrays { mut arrays, totals, bytes } = self.fused_arrays(&shape, arguments.workspace.data);
        check_workspace(&gpu.stream, arguments.workspace, bytes)?;
        arrays.margin = MarginSettings::from(margin);
        // The backward's: their memory is the forward's for P @ W^.
        arrays.tangents = std::ptr::null_mut();
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&gpu.stream, &mut pool);
        let targets = call.on_host("targets", arguments.targets, embeddings.rows)?;
        checked_targets(&targets, centers.rows)?;
        let e = call.read("embeddings", embeddings)?;
        let w = call.read("centers", centers)?;
        arrays.row_sums = call.write_array("row_sums", arguments.row_sums, embeddings.rows)?;
        let row_offsets = call.write_array("row_offsets", arguments.row_offsets, embeddings.rows)?;
        let has_offsets = !row_offsets.is_null() && margin.has_row_offsets();
        without_offsets_unless(has_offsets, &mut arrays);
        arrays.target_logits = call.write_array("target_logits", arguments.target_logits, embeddings.rows)?;
        let out = call.write("weighted", weighted)?;
        gpu.upload(arrays.columns, &columns_of(&targets))?;
        gpu.clear(arrays.target_cosines, shape.row_capacity)?;
        gpu.upload(arrays.block, &[block_of(&shape)])?;
        gpu.write_unit_rows(&arrays, e, shape.rows as u32)?;
        gpu.run(&entries.find_given_targets, (arrays, e, w))?;
        // Without classes one chunk of none: sums and P @ W^ are zeros.
        let none = (shape.classes == 0).then_some((0, 0));
        let add_sums = |(first, count): (u32, u32), offsets: Offsets| {
            gpu.write_unit_centers(&arrays, w, first, count)?;
            self.chunk_numerators(&arrays, first, offsets)?;
            let tiles = count.div_ceil(TILE_COLUMNS as u32);
            gpu.run(&entries.add_row_sums, (arrays, tiles, i32::from(first == 0), totals.cast()))
        };
        let mut offsets = Offsets::Common;
        if has_offsets {
            // Only the sums of all chunks tell which rows need offsets of their own.
            shape.chunks().chain(none).try_for_each(|chunk| add_sums(chunk, offsets))?;
            gpu.run(&entries.find_far_rows, (arrays,))?;
            offsets = Offsets::Own { far_only: false };
        }
        for chunk in shape.chunks().chain(none) {
            add_sums(chunk, offsets)?;
            gpu.products.weighted_centers(&gpu.stream, arrays, chunk.0, 0)?;
        }
        if !row_offsets.is_null() {
            gpu.run(&entries.write_row_offsets, (arrays, row_offsets.cast()))?;
        }
        gpu.run(&entries.write_weighted_centers, (arrays, out))?;
        call.finish()
    }

    pub(super) fn run_fused_backward(&self, arguments: &FusedBackward<'_>) -> Result<()> {
        let FusedBackward { margin, embeddings, centers, weighted, grad_embeddings, grad_centers, loss_weight, .. } = *arguments;
        let (gpu, entries) = (&*self.gpu, &self.gpu.entries);
        must_be_f32("weighted", weighted)?;
        checked_weight(loss_weight)?;
        let shape = self.fused_shape(embeddings.rows as u64, embeddings.cols as u64, centers.rows as u64)?;
        let FusedArrays { mut arrays, bytes, .. } = self.fused_arrays(&shape, arguments.workspace.data);
        check_workspace(&gpu.stream, arguments.workspace, bytes)?;
        arrays.margin = MarginSettings::from(margin);
        let mut pool = self.pool();
        let (mut call, _) = CallArguments::new(&gpu.stream, &mut pool);
        let batch = embeddings.rows;
        let targets = call.on_host("targets", arguments.targets, batch)?;
        checked_targets(&targets, centers.rows)?;
        let sums = call.on_host("row_sums", arguments.row_sums, batch)?;
        let logits = call.on_host("target_logits", arguments.target_logits, batch)?;
        let offsets = match arguments.offsets {
            Some(offsets) => {
                Some([call.on_host("row_offsets", offsets.of_rank, batch)?, call.on_host("sum_offsets", offsets.of_sums, batch)?])
            }
            None => None,
        };
        let given = offsets.as_ref().map(|offsets| offsets.each_ref().map(Vec::as_slice));
        let given = GivenSums { margin, row_sums: &sums, target_logits: &logits, offsets: given };
        given.check(&targets, centers.rows)?;
        let e = call.read("embeddings", embeddings)?;
        let w = call.read("centers", centers)?;
        let product = call.read("weighted", weighted)?;
        let row_sums = call.read_array("row_sums", arguments.row_sums, batch)?;
        let target_logits = call.read_array("target_logits", arguments.target_logits, batch)?;
        let (mut sum_offsets, mut row_offsets) = (std::ptr::null_mut::<f32>(), std::ptr::null_mut::<f32>());
        without_offsets_unless(arguments.offsets.is_some() && margin.has_row_offsets(), &mut arrays);
        if let Some(offsets) = arguments.offsets.filter(|_| margin.has_row_offsets()) {
            sum_offsets = call.read_array("sum_offsets", offsets.of_sums, batch)?;
            row_offsets = call.read_array("row_offsets", offsets.of_rank, batch)?;
        }
        let grad_e = call.write("grad_embeddings", grad_embeddings)?;
        let grad_w = call.write("grad_centers", grad_centers)?;
        let positives = Positives::of(&targets);
        gpu.upload(arrays.columns, &positives.lists)?;
        gpu.clear(arrays.target_cosines, shape.row_capacity)?;
        let block = StepBlock { positives: positives.classes, positive_rows: positives.rows, ..block_of(&shape) };
        gpu.upload(arrays.block, &[block])?;
        gpu.write_unit_rows(&arrays, e, shape.rows as u32)?;
        gpu.run(&entries.find_given_targets, (arrays, e, w))?;
        let mut numerators = Offsets::Common;
        if !row_offsets.is_null() {
            gpu.run(&entries.set_shifts, (arrays, row_offsets.cast()))?;
            numerators = Offsets::Own { far_only: false };
        }
        gpu.run(&entries.weigh_rows, (arrays, row_sums.cast(), target_logits.cast(), sum_offsets.cast()))?;
        gpu.run(&entries.finish_given_rows, (arrays, product, loss_weight, grad_e))?;
        gpu.run(&entries.scale_embeddings, (arrays,))?;
        gpu.run(&entries.list_whole, (arrays,))?;
        for (first, count) in shape.chunks() {
            gpu.write_unit_centers(&arrays, w, first, count)?;
            self.chunk_numerators(&arrays, first, numerators)?;
            gpu.products.center_gradient(&gpu.stream, arrays, first, loss_weight, 0, 0)?;
            gpu.run(&entries.write_center_rows, (arrays, u64::from(first), count, w, grad_w))?;
        }
        call.finish()
    }
}

/// Kernels take all rows to have offset c where there is no array of shifts.
fn without_offsets_unless(has_offsets: bool, arrays: &mut HeadArrays) {
    if !has_offsets {
        (arrays.shifts, arrays.best_negatives) = (std::ptr::null_mut(), std::ptr::null_mut());
    }
}

/// A step of the whole shard, whose gradients are weighed by the loss weight alone.
fn block_of(shape: &Shape) -> StepBlock {
    let (rows, classes) = (shape.rows as u32, shape.classes as u32);
    StepBlock { rows, global_rows: rows, own_rows: rows, classes, valid_rows: 1, own_valid_rows: 1, ..StepBlock::zeroed() }
}
