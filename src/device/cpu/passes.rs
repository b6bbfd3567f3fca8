//! A head's passes over its sample: the products of `products.rs` over the shard's rows.

use std::ops::Range;

use super::arrivals::Arrivals;
use super::buffers::Activations;
use super::head::{CpuHead, StepState};
use super::operands::Operands;
use super::pool::Pool;
use super::products::{self, Pass, RowSource, UpdateInput};
use super::row_tensors::Slots;
use super::sample::{Draft, Sample};
use super::step_rows::{ReadableRows, UpdatingRows};
use super::vector::{self, Softmax};
use crate::device::UpdateCall;
use crate::memory::{Buffer, Parts};
use crate::optimizer::Replay;
use crate::Result;

/// The rows of a sample.
pub(super) struct SampleRows<'a> {
    pub rows: &'a ReadableRows<'a>,
    pub replay: &'a Replay,
    pub sample: &'a Sample,
    /// `None`: all are there.
    pub arrivals: Option<&'a Arrivals>,
}

impl RowSource for SampleRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        // SAFETY: rows of a chunk that has come are not written.
        unsafe { self.rows.read(self.replay, self.sample.place(self.rows.slots, column), out, scratch_rows) }
    }

    fn prefetch(&self, column: usize) {
        self.rows.prefetch(self.sample.place(self.rows.slots, column));
    }

    fn wait(&self, columns: &Range<usize>) -> bool {
        self.arrivals.is_none_or(|arrivals| self.rows.slots == Slots::OfRows || arrivals.wait(columns))
    }
}

/// The same rows while they are being updated: each is read before it is written, by the one task that does both.
struct UpdatedRows<'a> {
    rows: &'a UpdatingRows<'a>,
    sample: &'a Sample,
    arrivals: &'a Arrivals,
}

impl RowSource for UpdatedRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        // SAFETY: a column is in one chunk, a chunk in one task.
        unsafe { self.rows.read(self.sample.place(self.rows.slots, column), out, scratch_rows) }
    }

    fn let_go(&self, columns: &Range<usize>) {
        if self.rows.slots == Slots::OfPositions {
            self.arrivals.has_come(columns);
        }
    }
}

/// A step's pass over its sample; `numerators` and `scratch` are lent to it.
pub(super) fn pass<'a>(
    step: &'a StepState,
    draft: &'a Draft,
    softmax: Softmax,
    units_transposed: &'a [f32],
    rows: &'a dyn RowSource,
    numerators: &'a mut Buffer<f32>,
    scratch: &'a mut Buffer<f32>,
) -> Pass<'a> {
    // A caller's sample may be larger than any draw: what does not fit is computed twice.
    let kept_chunks = numerators.len().checked_div(step.shape.kept_chunk_elements()).unwrap_or(0).min(step.shape.chunks());
    Pass {
        shape: step.shape,
        operands: Operands::of(&step.shape),
        softmax,
        offsets: &step.offsets,
        units_transposed,
        targets: &draft.targets,
        rows,
        numerators: numerators.parts(),
        kept_chunks,
        scratch: scratch.parts(),
    }
}

impl CpuHead {
    /// Phase 5 for W, sharded: the optimizer runs on each row as its gradient comes out of the product.
    pub(super) fn update_pass(&mut self, learning_rate: f64, weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let CpuHead { pool, softmax, rows: shard, arrivals, step, replay, activations, .. } = self;
        let Activations { tangents, units_transposed, scaled, numerators, scratch, .. } = activations;
        let mut totals = std::mem::take(&mut step.totals);
        let weight = weight as f32;
        arrivals.restart();
        let (arrivals, sample) = (&*arrivals, &step.draft.sample);
        let outcome = shard.update_beside(sample, replay, learning_rate, arrivals, |updated| {
            let rows = UpdatedRows { rows: updated, sample, arrivals };
            let pass = pass(step, &step.draft, *softmax, units_transposed, &rows, numerators, scratch);
            let input = UpdateInput { scaled, tangents, coefficients: &step.coefficients };
            let sink = |column: usize, gradient: &mut [f32], scratch_rows: &mut [f32]| {
                let inverse = step.center_inverse_norms[column];
                let place = sample.place(updated.slots, column);
                // SAFETY: a column is in one chunk, a chunk in one task.
                unsafe {
                    let values = updated.current(place, scratch_rows);
                    let squares = vector::normalize_backward(gradient, values.w, inverse, inverse * weight);
                    updated.apply_to_current(place, values, gradient);
                    squares
                }
            };
            let prefetch = |column: usize| updated.prefetch(sample.place(updated.slots, column));
            let outcome = products::update(pool, &pass, &input, &Parts::of(&mut totals), &sink, &prefetch, beside);
            outcome.and(updated.verdict())
        });
        step.totals = totals;
        outcome
    }

    /// Phase 5 for W, replicated: the gradient of each raw row of the sample, for the ranks to sum.
    pub(super) fn gradient_pass(&mut self, weight: f64) {
        let CpuHead { pool, softmax, rows: shard, step, replay, messages, activations, .. } = self;
        let Activations { tangents, units_transposed, scaled, numerators, scratch, .. } = activations;
        let mut totals = std::mem::take(&mut step.totals);
        let (dim, weight) = (step.shape.dim, weight as f32);
        let rows = SampleRows { rows: &shard.readable(), replay, sample: &step.draft.sample, arrivals: None };
        let pass = pass(step, &step.draft, *softmax, units_transposed, &rows, numerators, scratch);
        let input = UpdateInput { scaled, tangents, coefficients: &step.coefficients };
        let out = messages.center_gradient.parts();
        let sink = |column: usize, gradient: &mut [f32], scratch_rows: &mut [f32]| {
            let inverse = step.center_inverse_norms[column];
            // SAFETY: a column is in one chunk, a chunk in one task.
            let out = unsafe { out.range(column * dim..(column + 1) * dim) };
            // The raw row again, where its gradient will be: the gradient must be orthogonal to its direction.
            rows.read(column, out, scratch_rows);
            vector::normalize_backward(gradient, out, inverse, inverse * weight);
            out.copy_from_slice(gradient);
            0.0
        };
        let prefetch = |column: usize| rows.prefetch(column);
        products::update(pool, &pass, &input, &Parts::of(&mut totals), &sink, &prefetch, || ());
        step.totals = totals;
    }

    /// Phase 5 for W, replicated: the optimizer on the gradient that the ranks have summed.
    pub(super) fn apply_pass(&mut self, update: UpdateCall) -> Result<()> {
        let UpdateCall { learning_rate, factor, .. } = update;
        let CpuHead { pool, rows: centers, arrivals, step, replay, messages, .. } = self;
        let StepState { draft, shape, totals, .. } = step;
        let dim = shape.dim;
        let (totals, gradients) = (Parts::of(totals), messages.center_gradient.parts());
        arrivals.restart();
        let (arrivals, sample) = (&*arrivals, &draft.sample);
        let outcome = centers.update_beside(sample, replay, learning_rate, arrivals, |rows| {
            pool.run(shape.chunks(), &|chunk, worker| {
                let (columns, mut squares) = (shape.chunk(chunk), 0.0);
                for column in columns.clone() {
                    // SAFETY: a column is in one chunk, a chunk in one task.
                    let gradient = unsafe { gradients.range(column * dim..(column + 1) * dim) };
                    vector::scale(gradient, factor as f32);
                    squares += vector::sum_of_squares(gradient);
                    // SAFETY: as above.
                    unsafe { rows.apply(sample.place(rows.slots, column), worker, gradient) };
                }
                unsafe { totals.range(chunk..chunk + 1)[0] = squares };
                UpdatedRows { rows, sample, arrivals }.let_go(&columns);
            });
            rows.verdict()
        });
        self.step.grad_centers = self.step.totals.iter().sum();
        outcome.and_then(|()| self.count_update(learning_rate))
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
