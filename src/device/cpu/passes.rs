//! A head's passes over its sample: what `fused` does to chunks, over the rows of the table.

use super::draft::Sample;
use super::head::{CpuHead, Step, ELSEWHERE};
use super::products::{self, ForwardOutput, Pass, UpdateInput};
use super::rows::{self, HostRows};
use super::vector::{self, Softmax};
use crate::memory::{Buffer, Parts};
use crate::optimizer::Replay;
use crate::Result;

/// The table's rows of a sample.
struct SampleRows<'a> {
    table: &'a HostRows,
    replay: &'a Replay,
    sample: &'a Sample,
}

impl products::Rows for SampleRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], spare: &mut [f32]) {
        self.table.read(self.replay, self.sample.row(column), out, spare);
    }

    fn prefetch(&self, column: usize) {
        self.table.prefetch(self.sample.row(column));
    }
}

/// The same rows while they are being updated: each is read before it is written, by the one task that does both.
struct UpdatedRows<'a> {
    rows: &'a rows::UpdatingRows<'a>,
    sample: &'a Sample,
}

impl products::Rows for UpdatedRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], spare: &mut [f32]) {
        // SAFETY: a column is in one chunk, a chunk in one task.
        unsafe { self.rows.read(self.sample.row(column), out, spare) }
    }
}

impl CpuHead {
    /// The current step's pass over the sample; `kept` and `scratch` are lent to it.
    fn pass<'a>(
        step: &'a Step,
        softmax: Softmax,
        embeddings_t: &'a [f32],
        rows: &'a dyn products::Rows,
        kept: &'a mut Buffer<f32>,
        scratch: &'a mut Buffer<f32>,
    ) -> Pass<'a> {
        // A caller's sample may be larger than any draw: what does not fit is computed twice.
        let kept_chunks = kept.len().checked_div(step.shape.chunk_elements()).unwrap_or(0).min(step.shape.chunks());
        Pass {
            shape: step.shape,
            softmax,
            embeddings_t,
            targets: &step.draft.targets,
            rows,
            kept: kept.parts(),
            kept_chunks,
            scratch: scratch.parts(),
        }
    }

    /// Phase 4: numerators, row sums and P @ W^; then the slices' sums in order.
    pub(super) fn multiply(&mut self) {
        let CpuHead { pool, softmax, table, step, replay, embeddings_t, kept, scratch, slice_sums, slice_best, weighted, .. } =
            self;
        let mut center_inverse_norms = std::mem::take(&mut step.center_inverse_norms);
        let rows = SampleRows { table, replay, sample: &step.draft.sample };
        let pass = CpuHead::pass(step, *softmax, embeddings_t, &rows, kept, scratch);
        products::forward(
            pool,
            &pass,
            &ForwardOutput {
                inverse_norms: Parts::of(&mut center_inverse_norms),
                sums: slice_sums.parts(),
                best: slice_best.parts(),
                weighted: weighted.parts(),
            },
        );
        step.center_inverse_norms = center_inverse_norms;
        let (rows, slices) = (step.shape.rows, step.shape.slices());
        for row in 0..rows {
            let slice_cells = (0..slices).map(|slice| slice * rows + row);
            step.row_sums[row] = slice_cells.clone().map(|cell| slice_sums[cell]).sum::<f64>() as f32;
            step.best_negatives[row] = slice_cells.map(|cell| slice_best[cell]).fold(ELSEWHERE, f32::max);
        }
    }

    /// Phase 5 for W, sharded: the optimizer runs on each row as its gradient comes out of the product.
    pub(super) fn update_pass(&mut self, learning_rate: f64, weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let CpuHead { pool, softmax, table, step, replay, embeddings, embeddings_t, scaled, kept, scratch, .. } = self;
        let mut totals = std::mem::take(&mut step.totals);
        let weight = weight as f32;
        let outcome = {
            let updated = table.rows(replay, learning_rate);
            let rows = UpdatedRows { rows: &updated, sample: &step.draft.sample };
            let pass = CpuHead::pass(step, *softmax, embeddings_t, &rows, kept, scratch);
            let input = UpdateInput { scaled, embeddings, coefficients: &step.coefficients };
            let sink = |column: usize, gradient: &mut [f32], _: &mut [f32]| {
                let inverse = step.center_inverse_norms[column];
                // SAFETY: a column is in one chunk, a chunk in one task.
                let (w, m, v) = unsafe { updated.current(step.draft.sample.row(column)) };
                let squares = vector::normalize_backward(gradient, w, inverse, inverse * weight);
                updated.rule().apply(w, m, v, gradient);
                squares
            };
            let prefetch = |column: usize| updated.prefetch(step.draft.sample.row(column));
            products::update(pool, &pass, &input, &Parts::of(&mut totals), &sink, &prefetch, beside)
        };
        step.totals = totals;
        outcome
    }

    /// Phase 5 for W, replicated: the gradient of each raw row of the sample, for the ranks to sum.
    pub(super) fn gradient_pass(&mut self, weight: f64) {
        let CpuHead {
            pool, softmax, table, step, replay, embeddings, embeddings_t, scaled, kept, scratch, center_gradient, ..
        } = self;
        let mut totals = std::mem::take(&mut step.totals);
        let (dim, weight) = (step.shape.dim, weight as f32);
        let rows = SampleRows { table, replay, sample: &step.draft.sample };
        let pass = CpuHead::pass(step, *softmax, embeddings_t, &rows, kept, scratch);
        let input = UpdateInput { scaled, embeddings, coefficients: &step.coefficients };
        let out = center_gradient.parts();
        let sink = |column: usize, gradient: &mut [f32], spare: &mut [f32]| {
            let inverse = step.center_inverse_norms[column];
            // SAFETY: a column is in one chunk, a chunk in one task.
            let out = unsafe { out.range(column * dim..(column + 1) * dim) };
            // The raw row again, in the gradient's place: its direction is what the gradient must be orthogonal to.
            table.read(replay, step.draft.sample.row(column), out, spare);
            vector::normalize_backward(gradient, out, inverse, inverse * weight);
            out.copy_from_slice(gradient);
            0.0
        };
        let prefetch = |column: usize| table.prefetch(step.draft.sample.row(column));
        products::update(pool, &pass, &input, &Parts::of(&mut totals), &sink, &prefetch, || ());
        step.totals = totals;
    }
}
