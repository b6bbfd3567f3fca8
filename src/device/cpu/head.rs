//! One head on the CPU: its rows, its workspace, and the phases of a step.

use std::sync::Arc;

use super::accumulation::Accumulation;
use super::arrivals::Arrivals;
use super::batch_room::{affordable_sizes, BatchRoom};
use super::buffers::{copied, Activations, Messages};
use super::operands::Operands;
use super::pool::Pool;
use super::products::Shape;
use super::row_terms::TermFigures;
use super::rows::HostRows;
use super::sample::{merge, Draft, Sample};
use super::sizes::Sizes;
use super::vector::{self, Softmax};
use crate::device::{HeadDevice, HeadSpec, Labels, Nearest, SampleIds, StepFigures, TensorRows, UpdateCall};
use crate::exchange::Exchange;
use crate::matrix::{DType, Matrix};
use crate::memory::reserve;
use crate::optimizer::Replay;
use crate::options::Precision;
use crate::protocol::{self, Announcement, LossPlace};
use crate::row_terms::{MarginGradientArrays, RowTermArrays};
use crate::{Contribution, Error, Result};

/// Rows of a batch that one task normalizes or finishes: whole pairs of them.
pub(super) const ROWS_A_TASK: usize = 16;
/// A row's target cosine where another rank owns its class.
pub(super) const ELSEWHERE: f32 = -2.0;
/// A row's target cosine where its label is ignored.
pub(super) const IGNORED: f32 = 2.0;

pub(super) struct CpuHead {
    pub(super) spec: HeadSpec,
    pub(super) pool: Arc<Pool>,
    pub(super) softmax: Softmax,
    pub(super) rows: HostRows,
    pub(super) sizes: Sizes,
    pub(super) gather_dtype: DType,
    pub(super) own_labels: Vec<i64>,
    pub(super) own_failure: Option<Error>,
    /// The next step's, if `has_next`.
    pub(super) next: Draft,
    pub(super) has_next: bool,
    pub(super) step: StepState,
    /// Which rows of the step's sample a pass has, where they are in a file.
    pub(super) arrivals: Arrivals,
    /// Brings dense rows to the current step.
    pub(super) replay: Replay,
    pub(super) skipped_updates: u64,

    pub(super) messages: Messages,
    pub(super) activations: Activations,
    /// Memory for larger batches, put aside until all ranks have it.
    pub(super) reserved: Option<BatchRoom>,
    /// The same for the next step: the one under way still uses what it replaces.
    pub(super) grown: Option<BatchRoom>,
    /// Made by the first `accumulate`.
    pub(super) accumulation: Option<Accumulation>,
}

/// The current step: its draft, and what its phases found for each row.
#[derive(Default)]
pub(super) struct StepState {
    pub(super) draft: Draft,
    pub(super) shape: Shape,
    /// The first row, in the order of the batch, whose embedding is not finite.
    pub(super) bad_row: Option<usize>,
    /// The same of each task's rows; `usize::MAX`: none.
    pub(super) bad_rows: Vec<usize>,
    /// 1 / |E_i|, of the row as it travelled.
    pub(super) inverse_norms: Vec<f32>,
    /// 1 / |W_j| of the sample.
    pub(super) center_inverse_norms: Vec<f32>,
    pub(super) target_logits: Vec<f32>,
    pub(super) target_cosines: Vec<f32>,
    pub(super) derivatives: Vec<f32>,
    pub(super) coefficients: Vec<f32>,
    /// scale / L_i, 0 for a row without gradient; L_i, like N_i, is relative to the row's offset on this rank.
    pub(super) factors: Vec<f32>,
    /// c, or the row's own: [`crate::margin::Margin::row_offset`].
    pub(super) offsets: Vec<f32>,
    pub(super) row_sums: Vec<f32>,
    pub(super) best_negatives: Vec<f32>,
    /// Empty without row terms.
    pub(super) terms: TermFigures,
    pub(super) totals: Vec<f64>,
    pub(super) valid_rows: u64,
    pub(super) loss: f64,
    pub(super) target_cosine_sum: f64,
    pub(super) grad_embeddings: f64,
    pub(super) grad_centers: f64,
}

impl CpuHead {
    pub fn new(spec: HeadSpec, pool: Arc<Pool>) -> Result<CpuHead> {
        let options = &spec.options;
        let what = "class centers, their state and the workspace";
        let sizes = affordable_sizes(&spec, pool.threads(), what, |memory| memory.weight + memory.state)?;
        let memory = sizes.memory(options, spec.ranks, spec.shard);
        let gather_dtype = options.gathered_dtype(Precision::F32);
        let rows = HostRows::new(&spec, sizes.capacity.classes, &pool)?;
        let BatchRoom { sizes, messages, activations, own_labels, drafts: [draft, next], .. } =
            BatchRoom::new(&spec, sizes, gather_dtype)?;
        let head = CpuHead {
            softmax: Softmax::new(&options.margin),
            gather_dtype,
            own_labels,
            own_failure: None,
            next,
            has_next: false,
            step: StepState { draft, ..StepState::default() },
            arrivals: Arrivals::default(),
            replay: rows.replay()?,
            skipped_updates: 0,
            accumulation: None,
            rows,
            messages,
            activations,
            sizes,
            reserved: None,
            grown: None,
            pool,
            spec,
        };
        log::info!(
            "rank {} of {}: {} class centers of dimension {} from class {}, {} MiB for rows and state, {} of {} chunks of numerators kept",
            head.spec.rank,
            head.spec.ranks,
            head.spec.shard.rows,
            head.sizes.capacity.dim,
            head.spec.shard.first,
            (memory.weight + memory.state) >> 20,
            head.sizes.kept_chunks,
            head.sizes.capacity.chunks(),
        );
        Ok(head)
    }

    pub(super) fn sharded(&self) -> bool {
        self.spec.is_sharded()
    }

    /// This rank's rows in the current step.
    pub(super) fn own_rows(&self) -> std::ops::Range<usize> {
        let draft = &self.step.draft;
        draft.first_row..draft.first_row + draft.batches[self.spec.rank as usize]
    }

    /// Rows of a rank's block of embeddings and of gradient: the largest batch.
    pub(super) fn padded_rows(&self) -> usize {
        self.step.draft.batches.iter().copied().max().unwrap_or(0)
    }

    /// Counts an update whose rows have been written.
    pub(super) fn count_update(&mut self, learning_rate: f64) -> Result<()> {
        let CpuHead { pool, rows, .. } = self;
        rows.count_update(learning_rate, pool)
    }

    /// The sample last drawn.
    fn last_sample(&self) -> &Sample {
        let draft = if self.has_next { &self.next } else { &self.step.draft };
        &draft.sample
    }

    /// What a loss weight becomes: the mean is over the valid rows of the global batch.
    pub(super) fn weight(&self, loss_weight: f64) -> f64 {
        match self.step.valid_rows {
            0 => 0.0,
            rows => loss_weight / rows as f64,
        }
    }
}

impl HeadDevice for CpuHead {
    fn pack_labels(&mut self, announcement: &Announcement, labels: Contribution<Labels>) -> Exchange {
        self.has_next = false;
        self.own_labels.clear();
        self.own_failure = None;
        let batch = labels.as_ref().map_or(0, |labels| labels.count);
        match labels {
            // SAFETY: the caller of the head's entry gave this many labels of its host memory.
            Ok(labels) if batch as u64 <= self.spec.options.max_batch => {
                self.own_labels.extend_from_slice(unsafe { labels.as_slice() });
            }
            Ok(_) => {}
            Err(error) => self.own_failure = Some(error),
        }
        let header = protocol::label_header(self.spec.rank, announcement, batch, self.own_failure.as_ref());
        protocol::pack_labels(&mut self.messages.labels_send, &header, &self.own_labels);
        Exchange::host(
            self.messages.labels_send.as_ptr(),
            self.messages.labels_recv.as_mut_ptr(),
            self.messages.labels_send.len(),
            DType::I64,
        )
    }

    fn largest_batch(&mut self, limit: u64) -> Result<u64> {
        let Messages { labels_send, labels_recv, .. } = &self.messages;
        protocol::largest_batch(labels_send, labels_recv, labels_send.len(), self.spec.rank as usize, limit)
    }

    fn reserve_batch(&mut self, rows: u64) -> Result<()> {
        self.reserve_room(rows)
    }

    fn take_reserved(&mut self, used: bool) {
        match self.reserved.take() {
            Some(room) if used => self.use_for_labels(room),
            _ => {}
        }
    }

    fn judge_labels(&mut self) -> Result<()> {
        let (options, rank, blocks) = (&self.spec.options, self.spec.rank as usize, &self.messages.labels_recv);
        protocol::judge_labels(
            &self.messages.labels_send,
            blocks,
            rank,
            self.own_failure.as_ref(),
            options.num_classes,
            options.ignore_label,
            &mut self.next.batches,
        )?;
        self.next.take_labels(options, rank, blocks);
        self.has_next = true;
        Ok(())
    }

    fn sample(&mut self, draw: u64, chosen: Option<&[i64]>) -> Result<()> {
        let (options, shard) = (&self.spec.options, self.spec.shard);
        let draft = &mut self.next;
        let sample = match chosen {
            Some(ids) => Sample::of(shard, merge(ids, &draft.positives(shard)?)?),
            None if options.sample_rate >= 1.0 => Sample::whole(shard),
            None => {
                let positives = draft.positives(shard)?;
                let size = crate::sample::sample_size(options.sample_rate, shard.rows) as usize;
                let draw = crate::sample::Draw {
                    seed: options.seed,
                    number: draw,
                    shard,
                    positives: &positives,
                    size,
                    block: options.sample_block.into(),
                };
                let mut ids = Vec::new();
                crate::sample::draw(&draw, &|tasks, body| self.pool.run(tasks, &|task, _| body(task)), &mut ids)?;
                Sample::of(shard, ids)
            }
        };
        draft.set_sample(sample)
    }

    fn sample_ids(&self) -> Result<Vec<i64>> {
        let (sample, mut ids) = (self.last_sample(), Vec::new());
        reserve(&mut ids, sample.len(), "ids of the sample")?;
        ids.extend(sample.known_ids().ids());
        Ok(ids)
    }

    fn known_sample_ids(&self) -> Option<SampleIds<'_>> {
        Some(self.last_sample().known_ids())
    }

    fn next_labels(&self) -> (usize, Option<&[i64]>) {
        (self.own_labels.len(), Some(&self.own_labels))
    }

    fn begin(&mut self) -> Result<()> {
        self.rows.end_step();
        if std::mem::take(&mut self.has_next) {
            std::mem::swap(&mut self.step.draft, &mut self.next);
            self.use_grown();
        }
        self.size_step()
    }

    fn batch(&self) -> usize {
        self.own_rows().len()
    }

    fn pack_embeddings(&mut self, embeddings: Option<&Matrix>) -> Exchange {
        let dim = self.sizes.capacity.dim;
        let padded = self.padded_rows();
        let block = Matrix {
            data: self.messages.embeddings_send.as_mut_ptr(),
            dtype: self.gather_dtype,
            rows: padded,
            cols: dim,
            row_stride: dim,
        };
        let row = &mut self.messages.send_row;
        let rows = embeddings.map_or(0, |matrix| matrix.rows);
        for i in 0..padded {
            // SAFETY: the caller's matrix holds this rank's batch; the block is our own memory of at least `padded` rows.
            unsafe {
                match embeddings {
                    Some(matrix) if i < rows => matrix.read_row(i, row),
                    _ => row.fill(0.0),
                }
                if let Some(scale) = self.messages.send_scales.get_mut(i) {
                    *scale = vector::send_scale(row);
                    vector::scale(row, *scale);
                }
                block.write_row(i, row);
            }
        }
        Exchange::host(
            self.messages.embeddings_send.as_ptr(),
            self.messages.embeddings_recv.as_mut_ptr(),
            padded * dim,
            self.gather_dtype,
        )
    }

    fn forward(&mut self, embeddings: &Matrix, terms: &RowTermArrays) -> Result<()> {
        self.replay = self.rows.replay()?;
        self.take_terms(terms);
        self.compute_numerators(embeddings)
    }

    fn pack_sums(&mut self, outcome: &Result<()>, _: LossPlace) -> Exchange {
        let rank = self.spec.rank as usize;
        match self.sharded() {
            true => self.pack_sharded_sums(outcome, rank),
            false => self.pack_replicated_sums(outcome, rank),
        }
    }

    fn judge_sums(&mut self, _loss: Option<*mut f64>) -> Result<f64> {
        let sum = if self.sharded() { self.judge_sharded_sums()? } else { self.judge_replicated_sums()? };
        self.step.loss = match self.step.valid_rows {
            0 => 0.0,
            rows => sum / rows as f64,
        };
        Ok(self.step.loss)
    }

    fn backward(&mut self) -> Exchange {
        let (padded, sharded) = (self.padded_rows(), self.sharded());
        let CpuHead { pool, step, messages, activations, .. } = self;
        let Messages { gradient_send, gradient_recv, .. } = messages;
        let Activations { units, tangents, scaled, weighted_centers, .. } = activations;
        let StepState { draft, shape, coefficients, factors, target_cosines, .. } = step;
        let (rows, dim, pitch) = (shape.rows, shape.dim, shape.row_pitch());
        let splits = shape.splits();
        if sharded {
            // Rows beyond a rank's batch travel too, and a stale number would reach no one but might be a NaN in a sum.
            for (rank, &batch) in draft.batches.iter().enumerate() {
                gradient_send[(rank * padded + batch) * dim..(rank + 1) * padded * dim].fill(0.0);
            }
        }
        let target = if sharded { gradient_send.parts() } else { gradient_recv.parts() };
        let (tangents, scaled, operands) = (tangents.parts(), scaled.parts(), Operands::of(shape));
        pool.run(rows.div_ceil(ROWS_A_TASK), &|task, _| {
            let own = task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(rows);
            for row in own.clone() {
                let position = if sharded {
                    let (origin, number) = draft.origin(row);
                    origin * padded + number
                } else {
                    row
                };
                let unit = &units[row * pitch..row * pitch + dim];
                // SAFETY: a row is in one task.
                let out = unsafe { target.range(position * dim..(position + 1) * dim) };
                out.fill(0.0);
                let scaled = unsafe { scaled.range(row * pitch..row * pitch + dim) };
                vector::scale_into(unit, factors[row], scaled);
                // A row far from this rank's negatives may be near another's: then its target counts.
                if factors[row] == 0.0 && coefficients[row] == 0.0 {
                    continue;
                }
                for split in 0..splits {
                    let at = (split * rows + row) * pitch;
                    vector::add_scaled(out, factors[row], &weighted_centers[at..at + dim]);
                }
                if draft.column(row).is_some() {
                    let tangent = unsafe { tangents.range(row * pitch..row * pitch + dim) };
                    vector::add_scaled(out, coefficients[row], tangent);
                    vector::turn_tangent(tangent, unit, target_cosines[row]);
                }
            }
            // SAFETY: as above.
            operands.round_scaled(unsafe { scaled.range(own.start * pitch..own.end * pitch) }, pitch, dim);
        });
        Exchange::host(self.messages.gradient_send.as_ptr(), self.messages.gradient_recv.as_mut_ptr(), padded * dim, DType::F32)
    }

    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()> {
        let own = self.own_rows();
        let (dim, pitch) = (self.step.shape.dim, self.step.shape.row_pitch());
        let weight = self.weight(factor) as f32;
        let mut squares = 0.0;
        for (i, row) in own.enumerate() {
            let out = &mut self.messages.gradient_recv[i * dim..(i + 1) * dim];
            let unit = &self.activations.units[row * pitch..row * pitch + dim];
            // The row's own, of which the one that travelled is a multiple.
            let inverse_norm = self.step.inverse_norms[row] * self.messages.send_scales.get(i).unwrap_or(&1.0);
            squares += vector::normalize_backward(out, unit, 1.0, inverse_norm * weight);
            if let Some(matrix) = gradient {
                // SAFETY: the caller's matrix holds this rank's batch.
                unsafe { matrix.write_row(i, out) };
            }
        }
        self.step.grad_embeddings = squares;
        Ok(())
    }

    fn margin_gradients(&mut self, factor: f64, gradients: &MarginGradientArrays) -> Result<()> {
        self.write_margin_gradients(factor, gradients);
        Ok(())
    }

    fn update(&mut self, update: UpdateCall, loss_weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if !protocol::is_factor(update.factor) {
            self.skipped_updates += 1;
            return beside();
        }
        let weight = self.weight(loss_weight) * update.factor;
        let outcome = self.update_pass(update.learning_rate, weight, beside);
        self.step.grad_centers = self.step.totals.iter().sum();
        outcome.and_then(|()| self.count_update(update.learning_rate))
    }

    fn center_gradient(&mut self, loss_weight: f64) -> Exchange {
        let weight = self.weight(loss_weight);
        self.gradient_pass(weight);
        let data = self.messages.center_gradient.as_mut_ptr();
        Exchange::host(data, data, self.step.shape.classes * self.step.shape.dim, DType::F32)
    }

    fn apply_gradient(&mut self, update: UpdateCall) -> Result<()> {
        if !protocol::is_factor(update.factor) {
            self.skipped_updates += 1;
            return Ok(());
        }
        self.apply_pass(update)
    }

    fn accumulate(&mut self, loss_weight: f64) -> Result<()> {
        self.accumulate_step(loss_weight)
    }

    fn drop_accumulated(&mut self) {
        self.accumulation = None;
    }

    fn accumulated_gradient(&mut self) -> Exchange {
        self.exchange_accumulated()
    }

    fn apply_accumulated(&mut self, update: UpdateCall) -> Result<()> {
        self.update_by_accumulated(update)
    }

    fn figures(&mut self) -> Result<StepFigures> {
        let step = &self.step;
        Ok(StepFigures {
            updates: self.rows.updates(),
            skipped_updates: self.skipped_updates,
            rows: step.draft.batches.iter().sum::<usize>() as u64,
            valid_rows: step.valid_rows,
            sample_size: step.draft.sample.len() as u64,
            loss: step.loss,
            target_cosines: step.target_cosine_sum,
            best_negatives: copied(&step.best_negatives)?,
            own_target_cosines: copied(&step.target_cosines)?,
            grad_embeddings: step.grad_embeddings,
            grad_centers: step.grad_centers,
        })
    }

    fn read_rows(&self, first: u64, tensors: &[TensorRows]) -> Result<()> {
        self.rows.read_rows(first, tensors, &self.pool)
    }

    fn write_rows(&mut self, first: u64, tensors: &[TensorRows]) -> Result<()> {
        self.rows.write_rows(first, tensors, &self.pool)
    }

    fn updates(&mut self) -> Result<u64> {
        Ok(self.rows.updates())
    }

    fn catch_up(&mut self) -> Result<()> {
        let CpuHead { pool, rows, step, .. } = self;
        rows.catch_up(&step.draft.sample, pool)
    }

    fn set_updates(&mut self, updates: u64) -> Result<()> {
        self.rows.set_updates(updates);
        Ok(())
    }

    fn is_start(&self, row: u64) -> bool {
        self.rows.is_start(row as usize)
    }

    fn succeed(&mut self) {
        self.rows.succeed();
    }

    fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        super::nearest::nearest(&self.pool, &self.rows, self.spec.shard, queries, k)
    }
}
