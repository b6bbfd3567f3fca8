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

    /// P^T of a chunk from W^: cosines, targets masked, exp.
    fn numerators(&self, columns: &Range<usize>, centers: &[f32], numerators: &mut [f32], sums: &mut [f32], best: &mut [f32]) {
        let (rows, batch_pitch) = (self.shape.rows, self.shape.batch_pitch());
        self.operands.cosines(&self.shape, columns.len(), centers, self.units_transposed, numerators);
        for &(column, row) in self.targets.of_columns(columns) {
            numerators[(column as usize - columns.start) * batch_pitch + row as usize] = f32::NEG_INFINITY;
        }
        let (sums, best) = (&mut sums[..rows], &mut best[..rows]);
        for slot in 0..columns.len() {
            let column = &mut numerators[slot * batch_pitch..slot * batch_pitch + rows];
            vector::softmax_column(column, &self.softmax, self.offsets, sums, best);
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

/// Phases 3 and 4 over the whole sample.
pub(super) fn forward(pool: &Pool, pass: &Pass<'_>, output: &ForwardOutput<'_>) {
    let shape = pass.shape;
    let (rows, row_pitch) = (shape.rows, shape.row_pitch());
    pool.run(shape.splits(), &|split, worker| {
        // SAFETY: a worker number belongs to one thread, a split to one task, a chunk and a column to one split.
        let scratch = unsafe { pass.worker_scratch(worker) };
        let split_sums = unsafe { output.sums.range(split * rows..(split + 1) * rows) };
        let split_best = unsafe { output.best.range(split * rows..(split + 1) * rows) };
        let weighted_centers = unsafe { output.weighted_centers.range(split * rows * row_pitch..(split + 1) * rows * row_pitch) };
        split_sums.fill(0.0);
        split_best.fill(-2.0);
        for (turn, chunk) in shape.split(split).enumerate() {
            let columns = shape.chunk(chunk);
            if !pass.rows.wait(&columns) {
                return;
            }
            let norms = unsafe { output.inverse_norms.range(columns.clone()) };
            pass.gather(&columns, scratch.centers, scratch.scratch_rows, |column, inverse| norms[column - columns.start] = inverse);
            scratch.sums[..rows].fill(0.0);
            scratch.best[..rows].fill(-2.0);
            // SAFETY: as above.
            let kept = (chunk < pass.kept_chunks).then(|| unsafe { pass.kept_chunk(chunk) });
            let numerators = match kept {
                Some(kept) if pass.operands == Operands::F32 => {
                    pass.numerators(&columns, scratch.centers, kept, scratch.sums, scratch.best);
                    kept
                }
                kept => {
                    pass.numerators(&columns, scratch.centers, scratch.numerators, scratch.sums, scratch.best);
                    if let Some(kept) = kept {
                        pass.operands.keep(&shape, columns.len(), scratch.numerators, kept);
                    }
                    &mut *scratch.numerators
                }
            };
            for row in 0..rows {
                split_sums[row] += f64::from(scratch.sums[row]);
                split_best[row] = split_best[row].max(scratch.best[row]);
            }
            let store = if turn == 0 { Store::Replace } else { Store::Add };
            pass.operands.weighted_centers(&shape, columns.len(), numerators, scratch.centers, weighted_centers, store);
        }
    });
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
            pass.numerators(&columns, scratch.centers, scratch.numerators, scratch.sums, scratch.best);
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
