//! pfc_fused_forward and pfc_fused_backward on a GPU: a head's products over the caller's rows, in the caller's workspace.
//!
//! The numerators of a chunk of columns are made anew in the backward: no workspace grows with B x S.

use super::lent::{check_workspace, Cut, Lent};
use super::products::LARGEST_DIM;
use super::shared_structs::{HeadArrays, MarginSettings, StepBlock, NONE, TILE_COLUMNS};
use super::sizes::weighted_splits;
use super::stateless::{columns_of, Shape};
use super::Cuda;
use crate::device::stateless::{checked_sums, checked_targets, checked_weight, must_be_f32};
use crate::device::{FusedBackward, FusedForward};
use crate::{ensure, Result};

/// The arrays of both calls, cut off a workspace.
struct Arrays {
    view: HeadArrays,
    /// Forward: the sums of the chunks so far.
    totals: *mut f64,
    bytes: u64,
}

/// The rows of the batch by their class, as the third product takes them.
struct Positives {
    /// The columns of all rows; then for those that have one, by column and row: columns, rows; distinct columns; where each begins.
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

impl Cuda {
    fn fused_shape(&self, batch: u64, dim: u64, classes: u64) -> Result<Shape> {
        ensure!(
            dim <= LARGEST_DIM.into(),
            Unsupported,
            "dim must be 1 to {LARGEST_DIM} for the fused kernels of the CUDA device, got {dim}"
        );
        // Operands, numerators and dW^.
        Shape::new(batch, dim, classes, |shape| 6 * shape.depth_pitch + 6 * shape.row_capacity + 4 * shape.dim)
    }

    fn fused_arrays(&self, shape: &Shape, start: *mut u8) -> Arrays {
        let mut cut = Cut::new(start);
        let (rows, pitch, chunk) = (shape.row_capacity, shape.depth_pitch, shape.chunk);
        let splits = weighted_splits(rows, pitch, chunk, self.multiprocessors);
        let lists: *mut u32 = cut.take(5 * shape.rows + 1);
        let list = |number: u64| lists.wrapping_add((number * shape.rows) as usize);
        let operand = cut.take(3 * chunk * pitch);
        let mut view = HeadArrays {
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
            center_operand: operand,
            center_wide: operand,
            center_inverse_norms: cut.take(shape.classes),
            numerators: cut.take(3 * rows * chunk),
            splits: splits as u32,
            sharded: 1,
            ..shape.view()
        };
        // Forward and backward share the rest.
        let begin = cut.bytes;
        view.weighted_centers = cut.take(splits * rows * pitch);
        let totals = cut.take(rows);
        let forward = cut.bytes;
        cut.bytes = begin;
        view.scaled_operand = cut.take(3 * rows * pitch);
        view.coefficients = cut.take(rows);
        view.factors = cut.take(rows);
        view.sample = cut.take(shape.sample_capacity);
        view.positive_of = cut.take(shape.sample_capacity);
        view.center_gradient = cut.take(chunk * shape.dim);
        Arrays { view, totals, bytes: cut.bytes.max(forward) }
    }

    pub(super) fn fused_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        let shape = self.fused_shape(batch, dim, classes)?;
        Ok(self.fused_arrays(&shape, std::ptr::null_mut()).bytes)
    }

    /// P of a chunk, from the rows of W that begin it.
    fn chunk_numerators(&self, view: &HeadArrays, first: u32) -> Result<()> {
        // GEMM1 numbers column tiles from the sample's first; only the chunk's have sums here.
        let tiles = u64::from(first) / TILE_COLUMNS * u64::from(view.row_capacity);
        let view = HeadArrays {
            partial_sums: view.partial_sums.wrapping_sub(tiles as usize),
            partial_best: view.partial_best.wrapping_sub(tiles as usize),
            ..*view
        };
        self.products.numerators(&self.stream, view, first)
    }

    pub(super) fn fused_forward(&self, arguments: &FusedForward<'_>) -> Result<()> {
        let FusedForward { margin, embeddings, centers, weighted, .. } = *arguments;
        must_be_f32("weighted", weighted)?;
        let shape = self.fused_shape(embeddings.rows as u64, embeddings.cols as u64, centers.rows as u64)?;
        let Arrays { mut view, totals, bytes } = self.fused_arrays(&shape, arguments.workspace.data);
        check_workspace(&self.stream, arguments.workspace, bytes)?;
        view.margin = MarginSettings::from(margin);
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let targets = lent.on_host("targets", arguments.targets, embeddings.rows)?;
        checked_targets(&targets, centers.rows)?;
        let e = lent.read("embeddings", embeddings)?;
        let w = lent.read("centers", centers)?;
        view.row_sums = lent.write_array("row_sums", arguments.row_sums, embeddings.rows)?;
        view.target_logits = lent.write_array("target_logits", arguments.target_logits, embeddings.rows)?;
        let out = lent.write("weighted", weighted)?;
        self.put(view.columns, &columns_of(&targets))?;
        self.clear(view.target_cosines, shape.row_capacity)?;
        self.put(view.block, &[block_of(&shape)])?;
        self.unit_rows(&view, e, shape.rows as u32)?;
        self.run(&self.kernels.find_given_targets, (view, e, w))?;
        // Without classes one chunk of none: sums and P @ W^ are zeros.
        let none = (shape.classes == 0).then_some((0, 0));
        for (first, count) in shape.chunks().chain(none) {
            self.unit_centers(&view, w, first, count)?;
            self.chunk_numerators(&view, first)?;
            self.products.weighted_centers(&self.stream, view, first, 0)?;
            let tiles = count.div_ceil(TILE_COLUMNS as u32);
            self.run(&self.kernels.add_row_sums, (view, tiles, i32::from(first == 0), totals.cast()))?;
        }
        self.run(&self.kernels.write_weighted_centers, (view, out))?;
        lent.finish()
    }

    pub(super) fn fused_backward(&self, arguments: &FusedBackward<'_>) -> Result<()> {
        let FusedBackward { margin, embeddings, centers, weighted, grad_embeddings, grad_centers, loss_weight, .. } = *arguments;
        must_be_f32("weighted", weighted)?;
        checked_weight(loss_weight)?;
        let shape = self.fused_shape(embeddings.rows as u64, embeddings.cols as u64, centers.rows as u64)?;
        let Arrays { mut view, bytes, .. } = self.fused_arrays(&shape, arguments.workspace.data);
        check_workspace(&self.stream, arguments.workspace, bytes)?;
        view.margin = MarginSettings::from(margin);
        let mut room = self.room();
        let (mut lent, _) = Lent::new(&self.stream, &mut room);
        let batch = embeddings.rows;
        let targets = lent.on_host("targets", arguments.targets, batch)?;
        checked_targets(&targets, centers.rows)?;
        let sums = lent.on_host("row_sums", arguments.row_sums, batch)?;
        let logits = lent.on_host("target_logits", arguments.target_logits, batch)?;
        checked_sums(margin, &sums, &logits)?;
        let e = lent.read("embeddings", embeddings)?;
        let w = lent.read("centers", centers)?;
        let product = lent.read("weighted", weighted)?;
        let row_sums = lent.read_array("row_sums", arguments.row_sums, batch)?;
        let target_logits = lent.read_array("target_logits", arguments.target_logits, batch)?;
        let grad_e = lent.write("grad_embeddings", grad_embeddings)?;
        let grad_w = lent.write("grad_centers", grad_centers)?;
        let positives = Positives::of(&targets);
        self.put(view.columns, &positives.lists)?;
        self.clear(view.target_cosines, shape.row_capacity)?;
        let block = StepBlock { positives: positives.classes, positive_rows: positives.rows, ..block_of(&shape) };
        self.put(view.block, &[block])?;
        self.unit_rows(&view, e, shape.rows as u32)?;
        self.run(&self.kernels.find_given_targets, (view, e, w))?;
        self.run(&self.kernels.weigh_rows, (view, row_sums.cast(), target_logits.cast()))?;
        self.run(&self.kernels.scale_embeddings, (view,))?;
        self.run(&self.kernels.list_whole, (view,))?;
        self.run(&self.kernels.find_target_columns, (view,))?;
        for (first, count) in shape.chunks() {
            self.unit_centers(&view, w, first, count)?;
            self.chunk_numerators(&view, first)?;
            self.products.center_gradient(&self.stream, view, first, loss_weight, 0, 0)?;
            self.run(&self.kernels.write_center_rows, (view, u64::from(first), count, w, grad_w))?;
        }
        self.run(&self.kernels.finish_given_rows, (view, w, product, loss_weight, grad_e))?;
        lent.finish()
    }
}

/// A step of the whole shard, whose gradients are weighed by the loss weight alone.
fn block_of(shape: &Shape) -> StepBlock {
    let (rows, classes) = (shape.rows as u32, shape.classes as u32);
    StepBlock { rows, global_rows: rows, own_rows: rows, classes, valid_rows: 1, own_valid_rows: 1, ..StepBlock::zeroed() }
}
