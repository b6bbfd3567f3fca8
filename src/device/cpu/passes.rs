//! A head's passes over its sample: the products of `products.rs` over the shard's rows.

use super::buffers::Activations;
use super::head::{CpuHead, StepState, ELSEWHERE};
use super::pool::Pool;
use super::products::{self, ForwardOutput, Pass, UpdateInput};
use super::rows::{HostRows, UpdatingRows};
use super::sample::Sample;
use super::vector::{self, Softmax};
use crate::device::UpdateCall;
use crate::memory::{Buffer, Parts};
use crate::optimizer::Replay;
use crate::Result;

/// The shard's rows of a sample.
struct SampleRows<'a> {
    shard: &'a HostRows,
    replay: &'a Replay,
    sample: &'a Sample,
}

impl products::RowSource for SampleRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        self.shard.read(self.replay, self.sample.row(column), out, scratch_rows);
    }

    fn prefetch(&self, column: usize) {
        self.shard.prefetch(self.sample.row(column));
    }
}

/// The same rows while they are being updated: each is read before it is written, by the one task that does both.
struct UpdatedRows<'a> {
    rows: &'a UpdatingRows<'a>,
    sample: &'a Sample,
}

impl products::RowSource for UpdatedRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        // SAFETY: a column is in one chunk, a chunk in one task.
        unsafe { self.rows.read(self.sample.row(column), out, scratch_rows) }
    }
}

impl CpuHead {
    /// The current step's pass over the sample; `numerators` and `scratch` are lent to it.
    fn pass<'a>(
        step: &'a StepState,
        softmax: Softmax,
        units_transposed: &'a [f32],
        rows: &'a dyn products::RowSource,
        numerators: &'a mut Buffer<f32>,
        scratch: &'a mut Buffer<f32>,
    ) -> Pass<'a> {
        // A caller's sample may be larger than any draw: what does not fit is computed twice.
        let kept_chunks = numerators.len().checked_div(step.shape.chunk_elements()).unwrap_or(0).min(step.shape.chunks());
        Pass {
            shape: step.shape,
            softmax,
            offsets: &step.offsets,
            units_transposed,
            targets: &step.draft.targets,
            rows,
            numerators: numerators.parts(),
            kept_chunks,
            scratch: scratch.parts(),
        }
    }

    /// Phase 4: numerators, row sums and P @ W^. All is done again if a row turns out to need an offset of its own: that happens to few
    /// classes at a large scale alone, and to every other row it makes no difference.
    pub(super) fn multiply(&mut self) {
        self.step.offsets.fill(self.softmax.offset);
        self.multiply_by_offsets();
        let mut again = false;
        for (offset, &best) in self.step.offsets.iter_mut().zip(&self.step.best_negatives) {
            let own = self.spec.options.margin.row_offset(best);
            again |= own != std::mem::replace(offset, own);
        }
        if again {
            self.multiply_by_offsets();
        }
    }

    /// The pass over the sample with the offsets that the rows have; then the splits' sums in order.
    fn multiply_by_offsets(&mut self) {
        let CpuHead { pool, softmax, rows: shard, step, replay, activations, .. } = self;
        let Activations { units_transposed, numerators, scratch, split_sums, split_best, weighted_centers, .. } = activations;
        let mut center_inverse_norms = std::mem::take(&mut step.center_inverse_norms);
        let rows = SampleRows { shard, replay, sample: &step.draft.sample };
        let pass = CpuHead::pass(step, *softmax, units_transposed, &rows, numerators, scratch);
        products::forward(
            pool,
            &pass,
            &ForwardOutput {
                inverse_norms: Parts::of(&mut center_inverse_norms),
                sums: split_sums.parts(),
                best: split_best.parts(),
                weighted_centers: weighted_centers.parts(),
            },
        );
        step.center_inverse_norms = center_inverse_norms;
        let (rows, splits) = (step.shape.rows, step.shape.splits());
        for row in 0..rows {
            let split_cells = (0..splits).map(|split| split * rows + row);
            step.row_sums[row] = split_cells.clone().map(|cell| split_sums[cell]).sum::<f64>() as f32;
            step.best_negatives[row] = split_cells.map(|cell| split_best[cell]).fold(ELSEWHERE, f32::max);
        }
    }

    /// Phase 5 for W, sharded: the optimizer runs on each row as its gradient comes out of the product.
    pub(super) fn update_pass(&mut self, learning_rate: f64, weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let CpuHead { pool, softmax, rows: shard, step, replay, activations, .. } = self;
        let Activations { tangents, units_transposed, scaled, numerators, scratch, .. } = activations;
        let mut totals = std::mem::take(&mut step.totals);
        let weight = weight as f32;
        let outcome = {
            let updated = shard.updating(replay, learning_rate);
            let rows = UpdatedRows { rows: &updated, sample: &step.draft.sample };
            let pass = CpuHead::pass(step, *softmax, units_transposed, &rows, numerators, scratch);
            let input = UpdateInput { scaled, tangents, coefficients: &step.coefficients };
            let sink = |column: usize, gradient: &mut [f32], scratch_rows: &mut [f32]| {
                let inverse = step.center_inverse_norms[column];
                let row = step.draft.sample.row(column);
                // SAFETY: a column is in one chunk, a chunk in one task.
                unsafe {
                    let values = updated.current(row, scratch_rows);
                    let squares = vector::normalize_backward(gradient, values.w, inverse, inverse * weight);
                    updated.apply_to_current(row, values, gradient);
                    squares
                }
            };
            let prefetch = |column: usize| updated.prefetch(step.draft.sample.row(column));
            let outcome = products::update(pool, &pass, &input, &Parts::of(&mut totals), &sink, &prefetch, beside);
            outcome.and(updated.verdict())
        };
        step.totals = totals;
        outcome
    }

    /// Phase 5 for W, replicated: the gradient of each raw row of the sample, for the ranks to sum.
    pub(super) fn gradient_pass(&mut self, weight: f64) {
        let CpuHead { pool, softmax, rows: shard, step, replay, messages, activations, .. } = self;
        let Activations { tangents, units_transposed, scaled, numerators, scratch, .. } = activations;
        let mut totals = std::mem::take(&mut step.totals);
        let (dim, weight) = (step.shape.dim, weight as f32);
        let rows = SampleRows { shard, replay, sample: &step.draft.sample };
        let pass = CpuHead::pass(step, *softmax, units_transposed, &rows, numerators, scratch);
        let input = UpdateInput { scaled, tangents, coefficients: &step.coefficients };
        let out = messages.center_gradient.parts();
        let sink = |column: usize, gradient: &mut [f32], scratch_rows: &mut [f32]| {
            let inverse = step.center_inverse_norms[column];
            // SAFETY: a column is in one chunk, a chunk in one task.
            let out = unsafe { out.range(column * dim..(column + 1) * dim) };
            // The raw row again, where its gradient will be: the gradient must be orthogonal to its direction.
            shard.read(replay, step.draft.sample.row(column), out, scratch_rows);
            vector::normalize_backward(gradient, out, inverse, inverse * weight);
            out.copy_from_slice(gradient);
            0.0
        };
        let prefetch = |column: usize| shard.prefetch(step.draft.sample.row(column));
        products::update(pool, &pass, &input, &Parts::of(&mut totals), &sink, &prefetch, || ());
        step.totals = totals;
    }

    /// Phase 5 for W, replicated: the optimizer on the gradient that the ranks have summed.
    pub(super) fn apply_pass(&mut self, update: UpdateCall) -> Result<()> {
        let UpdateCall { learning_rate, factor, .. } = update;
        let CpuHead { pool, rows: centers, step, replay, messages, .. } = self;
        let StepState { draft, shape, totals, .. } = step;
        let dim = shape.dim;
        let rows = centers.updating(replay, learning_rate);
        let (totals, gradients) = (Parts::of(totals), messages.center_gradient.parts());
        pool.run(shape.chunks(), &|chunk, worker| {
            let mut squares = 0.0;
            for column in shape.chunk(chunk) {
                // SAFETY: a column is in one chunk, a chunk in one task.
                let gradient = unsafe { gradients.range(column * dim..(column + 1) * dim) };
                vector::scale(gradient, factor as f32);
                squares += vector::sum_of_squares(gradient);
                // SAFETY: as above.
                unsafe { rows.apply(draft.sample.row(column), worker, gradient) };
            }
            unsafe { totals.range(chunk..chunk + 1)[0] = squares };
        });
        let verdict = rows.verdict();
        self.step.grad_centers = self.step.totals.iter().sum();
        verdict.and(self.count_update(learning_rate))
    }
}

/// `destination` [columns, pitch(rows)] = `source` [rows, source_pitch] transposed, by blocks that stay in the first-level cache.
pub(super) fn transpose(
    pool: &Pool,
    source: &[f32],
    source_pitch: usize,
    destination: &mut Buffer<f32>,
    rows: usize,
    columns: usize,
) {
    const BLOCK: usize = 16;
    let pitch = products::pitch(rows);
    let destination = destination.parts();
    pool.run(columns.div_ceil(BLOCK), &|task, _| {
        let block = task * BLOCK..((task + 1) * BLOCK).min(columns);
        // SAFETY: a block of destination rows belongs to one task.
        let out = unsafe { destination.range(block.start * pitch..block.end * pitch) };
        for first in (0..rows).step_by(BLOCK) {
            for row in first..(first + BLOCK).min(rows) {
                for (slot, column) in block.clone().enumerate() {
                    out[slot * pitch + row] = source[row * source_pitch + column];
                }
            }
        }
    });
}
