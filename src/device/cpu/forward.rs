//! Phases 3 and 4 of a step: normalized embeddings, the targets' angles, and the products over the sample.

use super::arrivals::Arrivals;
use super::buffers::Activations;
use super::head::{CpuHead, StepState, ELSEWHERE, IGNORED, ROWS_A_TASK};
use super::operands::Operands;
use super::passes::{pass, SampleRows};
use super::pool::Pool;
use super::products::{self, ForwardOutput};
use super::sample::Draft;
use super::step_rows::ReadableRows;
use super::vector::{self, Softmax};
use crate::device::host_math::{center_inverse_norm, inverse_norm};
use crate::device::HeadSpec;
use crate::margin;
use crate::matrix::Matrix;
use crate::memory::Parts;
use crate::optimizer::Replay;
use crate::protocol;
use crate::Result;

/// All of a head that a forward needs, but for its rows, which may be on their way from a file meanwhile.
struct Forward<'a> {
    spec: &'a HeadSpec,
    pool: &'a Pool,
    softmax: Softmax,
    replay: &'a Replay,
    draft: &'a Draft,
    step: &'a mut StepState,
    activations: &'a mut Activations,
    /// The ranks' blocks of embeddings, each of `padded` rows; sharded heads only.
    gathered: Matrix,
    padded: usize,
}

impl CpuHead {
    /// Phases 3 and 4, while the rows of the sample come in.
    pub(super) fn compute_numerators(&mut self, own: &Matrix) -> Result<()> {
        let padded = self.padded_rows();
        let CpuHead { spec, pool, softmax, rows, arrivals, replay, step, activations, messages, gather_dtype, .. } = self;
        let (dim, draft) = (step.shape.dim, std::mem::take(&mut step.draft));
        let gathered = Matrix {
            data: messages.embeddings_recv.as_ptr().cast_mut(),
            dtype: *gather_dtype,
            rows: spec.ranks as usize * padded,
            cols: dim,
            row_stride: dim,
        };
        arrivals.restart();
        let arrivals = &*arrivals;
        let mut forward =
            Forward { spec, pool, softmax: *softmax, replay, draft: &draft, step: &mut *step, activations, gathered, padded };
        let outcome = rows.bring_beside(&draft, arrivals, pool, |rows| forward.run(rows, arrivals, own));
        step.draft = draft;
        outcome
    }
}

impl Forward<'_> {
    fn run(&mut self, rows: &ReadableRows<'_>, arrivals: &Arrivals, own: &Matrix) -> Result<()> {
        self.embed(rows, own);
        if let Some(row) = self.step.bad_row {
            let (rank, number) = if self.spec.is_sharded() { self.draft.origin(row) } else { (self.spec.rank as usize, row) };
            return Err(protocol::bad_embedding(number, rank));
        }
        self.multiply(&SampleRows { rows, replay: self.replay, sample: &self.draft.sample, arrivals: Some(arrivals) });
        Ok(())
    }

    /// Phase 3 for E: judges the rows, normalizes them into E^ and finds the angle of each target in this rank's sample.
    fn embed(&mut self, centers: &ReadableRows<'_>, own: &Matrix) {
        let Forward { spec, pool, replay, draft, step, activations, gathered, padded, .. } = self;
        let (padded, sharded) = (*padded, spec.is_sharded());
        let Activations { units, tangents, scratch, .. } = &mut **activations;
        let StepState { shape, bad_rows, inverse_norms, target_logits, target_cosines, derivatives, terms, .. } = &mut **step;
        let (rows, dim, pitch, scratch_length) = (shape.rows, shape.dim, shape.row_pitch(), shape.scratch_elements());
        let margin = &spec.options.margin;
        let tasks = rows.div_ceil(ROWS_A_TASK);
        bad_rows.fill(usize::MAX);
        let first_bad_rows = Parts::of(bad_rows);
        let (scratch, normalized, inverse_norms) = (scratch.parts(), units.parts(), Parts::of(inverse_norms));
        let tangents = tangents.parts();
        let (logits, cosines, derivatives) = (Parts::of(target_logits), Parts::of(target_cosines), Parts::of(derivatives));
        let (has_terms, angles) = (spec.options.row_terms, Parts::of(&mut terms.angles));
        pool.run(tasks, &|task, worker| {
            // SAFETY: a worker number belongs to one thread, a row to one task.
            let (raw, rest) = unsafe { scratch.range(worker * scratch_length..(worker + 1) * scratch_length) }.split_at_mut(dim);
            let (center, scratch_rows) = rest.split_at_mut(dim);
            for row in task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(rows) {
                let cell = |values: &Parts<'_, f32>, value: f32| unsafe { values.range(row..row + 1)[0] = value };
                let out = unsafe { normalized.range(row * pitch..row * pitch + dim) };
                for values in [&inverse_norms, &logits, &derivatives] {
                    cell(values, 0.0);
                }
                out.fill(0.0);
                if Some(draft.labels[row]) == spec.options.ignore_label {
                    cell(&cosines, IGNORED);
                    continue;
                }
                cell(&cosines, ELSEWHERE);
                // SAFETY: the gathered blocks are our own memory; the caller's matrix holds this rank's batch.
                unsafe {
                    if sharded {
                        let (origin, number) = draft.origin(row);
                        gathered.read_row(origin * padded + number, raw);
                    } else {
                        own.read_row(row, raw);
                    }
                }
                let squares = vector::sum_of_squares(raw);
                if !squares.is_finite() {
                    let first = unsafe { &mut first_bad_rows.range(task..task + 1)[0] };
                    *first = (*first).min(row);
                    continue;
                }
                let inverse = inverse_norm(squares);
                cell(&inverse_norms, inverse as f32);
                vector::scale_into(raw, inverse as f32, out);
                if let Some(column) = draft.column(row) {
                    // The target's row has been brought, and none is written.
                    unsafe { centers.read(replay, draft.sample.place(centers.slots, column), center, scratch_rows) };
                    let center_inverse = center_inverse_norm(vector::sum_of_squares(center));
                    let angle = margin::angle(raw, inverse, center, center_inverse);
                    let tangent = unsafe { tangents.range(row * pitch..row * pitch + dim) };
                    margin::tangent(raw, inverse, center, center_inverse, angle, tangent);
                    cell(&cosines, margin::cosine(angle) as f32);
                    if has_terms {
                        // The row's rank alone knows its margin.
                        unsafe { angles.range(row..row + 1)[0] = angle };
                        continue;
                    }
                    let target = margin.target(angle);
                    cell(&logits, target.logit as f32);
                    cell(&derivatives, target.derivative as f32);
                }
            }
        });
        step.bad_row = bad_rows.iter().copied().find(|&row| row != usize::MAX);
        let Activations { units, units_transposed, .. } = &mut *self.activations;
        Operands::of(&step.shape).transpose_units(pool, &step.shape, units, units_transposed);
    }

    /// Phase 4: numerators, row sums and P @ W^. All is done again if a row turns out to need an offset of its own: that happens to few
    /// classes at a large scale alone, and to every other row it makes no difference.
    fn multiply(&mut self, rows: &SampleRows<'_>) {
        self.step.offsets.fill(self.softmax.offset);
        self.multiply_by_offsets(rows);
        let mut again = false;
        for (offset, &best) in self.step.offsets.iter_mut().zip(&self.step.best_negatives) {
            let own = self.spec.options.margin.row_offset(best);
            again |= own != std::mem::replace(offset, own);
        }
        if again {
            self.multiply_by_offsets(rows);
        }
    }

    /// The pass over the sample with the offsets that the rows have; then the splits' sums in order.
    fn multiply_by_offsets(&mut self, rows: &SampleRows<'_>) {
        let Forward { pool, softmax, draft, step, activations, .. } = self;
        let Activations { units_transposed, numerators, scratch, split_sums, split_best, weighted_centers, .. } =
            &mut **activations;
        let mut center_inverse_norms = std::mem::take(&mut step.center_inverse_norms);
        let pass = pass(step, draft, *softmax, units_transposed, rows, numerators, scratch);
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
}
