//! The two passes over a sample's class centers: forward (cosines, numerators, row sums, P @ W^) and update (dW, row by row).
//!
//! The sample is cut into chunks of [`CHUNK`] columns. A thread takes a chunk whole: it gathers and normalizes the rows, multiplies on
//! its own, takes exp and sums while the numerators are in its cache, and multiplies again; so no thread waits for another inside a
//! product, and the logits of the whole batch never exist unless the workspace keeps the numerators for the update.
//!
//! What is summed over chunks (N, P @ W^) is summed in splits: each split is a number of chunks that the shape fixes, summed in order,
//! and then the splits are summed in order. So the bits do not depend on which thread did what.
//!
//! Numerators are stored transposed, P^T [classes, rows]: then the three products read their operands along memory, once E^ is
//! transposed, and the row sums are sums of vectors. Floor: 2BSd flop a product, three of them (a fourth where P is recomputed);
//! bytes: W once in forward, W and state twice in update, and P^T twice where kept.

use std::ops::Range;

use super::operands::Operands;
use super::pool::Pool;
use super::vector::{self, Softmax};
use crate::device::gemm::Store;
use crate::device::host_math::center_inverse_norm;
use crate::memory::{reserve, Parts};
use crate::Result;

/// Columns of a chunk: W^ and P^T of a chunk fit a core's second-level cache at d = 512, B = 256, and larger chunks gain nothing.
pub(super) const CHUNK: usize = 256;

/// Accumulators of P @ W^ take at most this unless the splits would be too few to share out: 16 of them at B = 1024, d = 512.
const ACCUMULATOR_BYTES: usize = 36 << 20;
const FEWEST_SPLITS: usize = 8;
/// Of the batch's rows a block has at least so many: gathering a row of W once more takes as long as a fifth of their products.
const FEWEST_ROWS: usize = 64;
/// Blocks begin at a multiple of it: whole pairs, tiles and cache lines.
const ROW_UNIT: usize = 32;
/// What gathering and normalizing a number of W costs once more while another core works on the same rows, in flop of the products:
/// measured, benches/results/2026-11-30-half.md.
pub(super) const GATHER: f64 = 50.0;
/// More blocks must save at least this share of a forward's time.
const WORTH_IT: f64 = 0.03;
const MOST_SPLITS: usize = 64;

/// Elements from one row to the next: whole cache lines, an odd number of them, so that a column does not fall into one cache set.
pub(super) fn pitch(length: usize) -> usize {
    (length.div_ceil(16) | 1) * 16
}

/// The sizes of a step on this rank: rows B, embedding_dim d, classes S of the sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub rows: usize,
    pub dim: usize,
    pub classes: usize,
    /// In precision half: the numerators that are kept are bfloat16.
    pub half: bool,
}

impl Shape {
    pub fn row_pitch(&self) -> usize {
        pitch(self.dim)
    }

    pub fn batch_pitch(&self) -> usize {
        pitch(self.rows)
    }

    pub fn chunks(&self) -> usize {
        self.classes.div_ceil(CHUNK)
    }

    pub fn chunk(&self, chunk: usize) -> Range<usize> {
        chunk * CHUNK..((chunk + 1) * CHUNK).min(self.classes)
    }

    /// Elements of a whole chunk of P^T.
    pub fn chunk_elements(&self) -> usize {
        CHUNK * self.batch_pitch()
    }

    /// Floats from a kept row of P^T to the next; in precision half each holds two numerators.
    pub fn kept_pitch(&self) -> usize {
        pitch(if self.half { self.rows.div_ceil(2) } else { self.rows })
    }

    /// Floats of a whole chunk of P^T that is kept.
    pub fn kept_chunk_elements(&self) -> usize {
        CHUNK * self.kept_pitch()
    }

    pub fn splits(&self) -> usize {
        let accumulator = (self.rows * self.row_pitch() * 4).max(1);
        let fitting = (ACCUMULATOR_BYTES / accumulator).clamp(FEWEST_SPLITS, MOST_SPLITS);
        // A power of two: shared out evenly among most numbers of threads.
        (1 << fitting.ilog2()).min(self.chunks())
    }

    /// The most that splits times rows can be in a step of at most these sizes.
    pub fn split_row_capacity(&self) -> usize {
        let most = self.chunks().min(MOST_SPLITS);
        (ACCUMULATOR_BYTES / (4 * self.row_pitch())).max(FEWEST_SPLITS * self.rows).min(most * self.rows)
    }

    /// The chunks of a split.
    pub fn split(&self, split: usize) -> Range<usize> {
        let (chunks, splits) = (self.chunks(), self.splits());
        split * chunks / splits..(split + 1) * chunks / splits
    }

    /// Blocks of rows that splits are cut into, so that their number fills the threads. It changes no result, since an element of a product
    /// has the bits of its own row and column; but each block gathers the rows of W again.
    pub fn row_blocks(&self, threads: usize) -> usize {
        let time = |blocks: usize| {
            let rounds = (self.splits() * blocks).div_ceil(threads.max(1));
            rounds as f64 * (GATHER + 4.0 * self.rows.div_ceil(ROW_UNIT).div_ceil(blocks) as f64 * ROW_UNIT as f64)
        };
        let better = |best: usize, blocks: usize| if time(blocks) < (1.0 - WORTH_IT) * time(best) { blocks } else { best };
        (2..=self.rows / FEWEST_ROWS).fold(1, better)
    }

    /// Of so many blocks the rows of one.
    pub fn row_block(&self, block: usize, blocks: usize) -> Range<usize> {
        let from = |block: usize| (block * self.rows.div_ceil(ROW_UNIT) / blocks * ROW_UNIT).min(self.rows);
        from(block)..from(block + 1)
    }

    /// A step of these rows alone.
    pub fn of_block(&self, block: &Range<usize>) -> Shape {
        Shape { rows: block.len(), ..*self }
    }

    /// Where the rows of a block are in a kept row of P^T, in floats.
    pub fn kept_places(&self, block: &Range<usize>) -> Range<usize> {
        match self.half {
            true => block.start / 2..block.end.div_ceil(2),
            false => block.clone(),
        }
    }

    /// Elements of a thread's scratch: a chunk of W^ or dW^, a chunk of P^T, row sums and maxima, and rows to catch up in.
    pub fn scratch_elements(&self) -> usize {
        CHUNK * self.row_pitch() + self.chunk_elements() + 2 * self.batch_pitch() + 3 * self.row_pitch()
    }
}

/// Which (column of the sample, row of the batch) pairs are targets, by column, then row.
#[derive(Clone, Debug, Default)]
pub(super) struct Targets(Vec<(u32, u32)>);

impl Targets {
    /// Of (column, row) pairs in any order.
    pub fn new(pairs: impl Iterator<Item = (u32, u32)> + Clone) -> Result<Targets> {
        let mut sorted = Vec::new();
        reserve(&mut sorted, pairs.clone().count(), "targets")?;
        sorted.extend(pairs);
        sorted.sort_unstable();
        Ok(Targets(sorted))
    }

    pub fn of_columns(&self, columns: &Range<usize>) -> &[(u32, u32)] {
        let from = self.0.partition_point(|&(column, _)| (column as usize) < columns.start);
        let to = self.0.partition_point(|&(column, _)| (column as usize) < columns.end);
        &self.0[from..to]
    }
}

/// Where the sample's rows come from.
pub(super) trait RowSource: Sync {
    /// Writes a column's raw row, as it is at this step, into `out`; `scratch_rows` holds two rows of scratch.
    fn read(&self, column: usize, out: &mut [f32], scratch_rows: &mut [f32]);
    /// Hints that a column will be read soon.
    fn prefetch(&self, _column: usize) {}
    /// Waits until these columns can be read. Gives false where they never can: the pass comes to nothing.
    fn wait(&self, _columns: &Range<usize>) -> bool {
        true
    }
    /// These columns, a chunk, will not be read or changed any more.
    fn let_go(&self, _columns: &Range<usize>) {}
}

/// How far ahead rows are asked for: a row of 2 KiB arrives in the time two are normalized.
const PREFETCH: usize = 4;

/// What both passes work on.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub shape: Shape,
    pub operands: Operands,
    pub softmax: Softmax,
    /// c of each row, or the row's own offset.
    pub offsets: &'a [f32],
    /// E^ transposed, as the operands lay it out: [d, batch_pitch].
    pub units_transposed: &'a [f32],
    pub targets: &'a Targets,
    pub rows: &'a dyn RowSource,
    /// P^T of the first chunks: `kept_chunks` whole chunks.
    pub numerators: Parts<'a, f32>,
    pub kept_chunks: usize,
    /// `scratch_elements` for each thread.
    pub scratch: Parts<'a, f32>,
}

/// A thread's scratch, cut up.
struct Scratch<'a> {
    centers: &'a mut [f32],
    numerators: &'a mut [f32],
    sums: &'a mut [f32],
    best: &'a mut [f32],
    scratch_rows: &'a mut [f32],
}

impl<'a> Pass<'a> {
    /// The scratch of a worker.
    ///
    /// # Safety
    /// No other thread calls it for the same worker while the result is in use.
    unsafe fn worker_scratch(&self, worker: usize) -> Scratch<'a> {
        let length = self.shape.scratch_elements();
        let all = self.scratch.range(worker * length..(worker + 1) * length);
        let (centers, rest) = all.split_at_mut(CHUNK * self.shape.row_pitch());
        let (numerators, rest) = rest.split_at_mut(self.shape.chunk_elements());
        let (sums, rest) = rest.split_at_mut(self.shape.batch_pitch());
        let (best, scratch_rows) = rest.split_at_mut(self.shape.batch_pitch());
        Scratch { centers, numerators, sums, best, scratch_rows }
    }

    /// Where a chunk of P^T is kept.
    ///
    /// # Safety
    /// It is one of the `kept_chunks`, and nothing else refers to it while the result is in use.
    unsafe fn kept_chunk(&self, chunk: usize) -> &'a mut [f32] {
        let elements = self.shape.kept_chunk_elements();
        self.numerators.range(chunk * elements..(chunk + 1) * elements)
    }

    /// W^ of a chunk, and the inverse norms of its rows.
    fn gather(&self, columns: &Range<usize>, centers: &mut [f32], scratch_rows: &mut [f32], mut norms: impl FnMut(usize, f32)) {
        let (dim, pitch) = (self.shape.dim, self.shape.row_pitch());
        for ahead in columns.clone().take(PREFETCH) {
            self.rows.prefetch(ahead);
        }
        for (slot, column) in columns.clone().enumerate() {
            if column + PREFETCH < columns.end {
                self.rows.prefetch(column + PREFETCH);
            }
            let row = &mut centers[slot * pitch..slot * pitch + dim];
            self.rows.read(column, row, scratch_rows);
            let inverse = center_inverse_norm(vector::sum_of_squares(row)) as f32;
            vector::scale(row, inverse);
            norms(column, inverse);
        }
    }

    /// P^T of a chunk from W^, for a block of the batch's rows: cosines, targets masked, exp.
    fn numerators(
        &self,
        columns: &Range<usize>,
        block: &Range<usize>,
        centers: &[f32],
        numerators: &mut [f32],
        sums: &mut [f32],
        best: &mut [f32],
    ) {
        let shape = self.shape.of_block(block);
        let (rows, pitch) = (shape.rows, shape.batch_pitch());
        let (units, units_pitch) = (&self.units_transposed[block.start..], self.shape.batch_pitch());
        self.operands.cosines(&shape, columns.len(), centers, (units, units_pitch), numerators);
        let of_block = |&&(_, row): &&(u32, u32)| block.contains(&(row as usize));
        for &(column, row) in self.targets.of_columns(columns).iter().filter(of_block) {
            numerators[(column as usize - columns.start) * pitch + row as usize - block.start] = f32::NEG_INFINITY;
        }
        let (sums, best, offsets) = (&mut sums[..rows], &mut best[..rows], &self.offsets[block.clone()]);
        for slot in 0..columns.len() {
            let column = &mut numerators[slot * pitch..slot * pitch + rows];
            vector::softmax_column(column, &self.softmax, offsets, sums, best);
        }
    }

    /// Keeps the numerators of a chunk's block of rows for the update.
    ///
    /// # Safety
    /// As [`Pass::kept_chunk`], for the block.
    unsafe fn keep(&self, chunk: usize, columns: usize, block: &Range<usize>, numerators: &[f32]) {
        let (pitch, kept_pitch) = (self.shape.of_block(block).batch_pitch(), self.shape.kept_pitch());
        let places = self.shape.kept_places(block);
        for (slot, column) in numerators.chunks(pitch).take(columns).enumerate() {
            let row = chunk * self.shape.kept_chunk_elements() + slot * kept_pitch;
            // SAFETY: as above.
            let kept = unsafe { self.numerators.range(row + places.start..row + places.end) };
            self.operands.keep(&column[..block.len()], kept);
        }
    }
}

/// What the forward pass writes.
pub(super) struct ForwardOutput<'a> {
    /// 1 / |W_j| of the sample: [classes].
    pub inverse_norms: Parts<'a, f32>,
    /// N by split: [splits, rows].
    pub sums: Parts<'a, f64>,
    /// The largest cosine of a negative by split: [splits, rows], -2 where there is none.
    pub best: Parts<'a, f32>,
    /// P @ W^ by split: [splits, rows, row_pitch].
    pub weighted_centers: Parts<'a, f32>,
}

/// Phases 3 and 4 over the whole sample. A task is a split, or where these would not fill the threads one block of its rows.
pub(super) fn forward(pool: &Pool, pass: &Pass<'_>, output: &ForwardOutput<'_>) {
    let blocks = pass.shape.row_blocks(pool.threads());
    pool.run(pass.shape.splits() * blocks, &|task, worker| {
        let block = pass.shape.row_block(task % blocks, blocks);
        // SAFETY: a worker number belongs to one thread, a block of a split to one task.
        unsafe { forward_block(pass, output, task / blocks, &block, worker) };
    });
}

/// A split's part of a forward, for a block of the batch's rows.
///
/// # Safety
/// No other task has this block of the split, and no other thread the worker's number.
unsafe fn forward_block(pass: &Pass<'_>, output: &ForwardOutput<'_>, split: usize, block: &Range<usize>, worker: usize) {
    let (shape, pitch) = (pass.shape, pass.shape.row_pitch());
    let own = split * shape.rows + block.start..split * shape.rows + block.end;
    let is_whole = block.len() == shape.rows;
    // SAFETY: as the caller says; a chunk is in one split.
    let (scratch, split_sums, split_best, weighted_centers) = unsafe {
        (
            pass.worker_scratch(worker),
            output.sums.range(own.clone()),
            output.best.range(own.clone()),
            output.weighted_centers.range(own.start * pitch..own.end * pitch),
        )
    };
    split_sums.fill(0.0);
    split_best.fill(-2.0);
    let (sums, best) = (&mut scratch.sums[..block.len()], &mut scratch.best[..block.len()]);
    for (turn, chunk) in shape.split(split).enumerate() {
        let columns = shape.chunk(chunk);
        if !pass.rows.wait(&columns) {
            return;
        }
        // All blocks find the same norms; the first one stores them.
        // SAFETY: a column is in one split, and block 0 of that in one task.
        let norms = if block.start == 0 { unsafe { output.inverse_norms.range(columns.clone()) } } else { &mut [] };
        pass.gather(&columns, scratch.centers, scratch.scratch_rows, |column, inverse| {
            if let Some(norm) = norms.get_mut(column - columns.start) {
                *norm = inverse;
            }
        });
        sums.fill(0.0);
        best.fill(-2.0);
        let is_kept = chunk < pass.kept_chunks;
        let numerators = match is_kept && is_whole && pass.operands == Operands::F32 {
            // They are kept where they are computed.
            // SAFETY: a chunk is in one split, which this task has whole.
            true => unsafe { pass.kept_chunk(chunk) },
            false => &mut *scratch.numerators,
        };
        pass.numerators(&columns, block, scratch.centers, numerators, sums, best);
        if is_kept && !(is_whole && pass.operands == Operands::F32) {
            // SAFETY: a block of a chunk is in one task.
            unsafe { pass.keep(chunk, columns.len(), block, numerators) };
        }
        for row in 0..block.len() {
            split_sums[row] += f64::from(sums[row]);
            split_best[row] = split_best[row].max(best[row]);
        }
        let store = if turn == 0 { Store::Replace } else { Store::Add };
        let shape = shape.of_block(block);
        pass.operands.weighted_centers(&shape, columns.len(), numerators, scratch.centers, weighted_centers, store);
    }
}

/// Takes (column, dW^ of it, three rows of scratch); returns what to add to its chunk's total.
pub(super) type GradientSink<'a> = dyn Fn(usize, &mut [f32], &mut [f32]) -> f64 + Sync + 'a;

/// What the update pass reads beside the pass itself.
pub(super) struct UpdateInput<'a> {
    /// E' = scale * E^ / L: [rows, row_pitch], rounded by the pass's operands.
    pub scaled: &'a [f32],
    /// E^ - cos W^ of the rows whose target is here: [rows, row_pitch].
    pub tangents: &'a [f32],
    /// coef_i of the rows whose target is here.
    pub coefficients: &'a [f32],
}

/// Phase 5 over the whole sample: hands dW^ of each column to `sink`. The calling thread runs `beside` first.
pub(super) fn update<R>(
    pool: &Pool,
    pass: &Pass<'_>,
    input: &UpdateInput<'_>,
    totals: &Parts<'_, f64>,
    sink: &GradientSink<'_>,
    prefetch: &(dyn Fn(usize) + Sync),
    beside: impl FnOnce() -> R,
) -> R {
    let shape = pass.shape;
    let (dim, row_pitch) = (shape.dim, shape.row_pitch());
    let body = |chunk: usize, worker: usize| {
        let columns = shape.chunk(chunk);
        // SAFETY: a worker number belongs to one thread, a chunk to one task.
        let scratch = unsafe { pass.worker_scratch(worker) };
        let numerators = if chunk < pass.kept_chunks {
            pass.operands.kept(&shape, columns.len(), unsafe { pass.kept_chunk(chunk) }, scratch.numerators)
        } else {
            pass.gather(&columns, scratch.centers, scratch.scratch_rows, |_, _| ());
            pass.numerators(&columns, &(0..shape.rows), scratch.centers, scratch.numerators, scratch.sums, scratch.best);
            pass.operands.fresh(&shape, columns.len(), scratch.numerators, scratch.sums)
        };
        let gradients = &mut *scratch.centers;
        pass.operands.center_gradients(&shape, columns.len(), numerators, input.scaled, gradients);
        let mut targets = pass.targets.of_columns(&columns).iter().peekable();
        let mut total = 0.0;
        for ahead in columns.clone().take(PREFETCH) {
            prefetch(ahead);
        }
        for (slot, column) in columns.clone().enumerate() {
            if column + PREFETCH < columns.end {
                prefetch(column + PREFETCH);
            }
            let gradient = &mut gradients[slot * row_pitch..slot * row_pitch + dim];
            while let Some(&(_, row)) = targets.next_if(|target| target.0 as usize == column) {
                let row = row as usize;
                vector::add_scaled(gradient, input.coefficients[row], &input.tangents[row * row_pitch..row * row_pitch + dim]);
            }
            total += sink(column, gradient, scratch.scratch_rows);
        }
        unsafe { totals.range(chunk..chunk + 1)[0] = total };
        pass.rows.let_go(&columns);
    };
    pool.run_beside(shape.chunks(), &body, beside)
}
