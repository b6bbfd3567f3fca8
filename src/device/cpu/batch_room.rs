//! The memory of a head that follows its batches, and how it grows where `max_batch` is 0.

use super::buffers::{resize, Activations, Messages};
use super::head::{CpuHead, ELSEWHERE, ROWS_A_TASK};
use super::products::Shape;
use super::sample::Draft;
use super::sizes::{record_bytes, Sizes};
use crate::available_memory::AvailableMemory;
use crate::device::{HeadSpec, Memory};
use crate::matrix::DType;
use crate::memory::{reserve, Buffer};
use crate::Result;

/// All of a head whose size follows its largest batch.
pub(super) struct BatchRoom {
    pub max_batch: u64,
    pub sizes: Sizes,
    pub messages: Messages,
    pub activations: Activations,
    pub own_labels: Vec<i64>,
    /// Of the current step and of the next one.
    pub drafts: [Draft; 2],
}

impl BatchRoom {
    pub fn new(spec: &HeadSpec, sizes: Sizes, gather_dtype: DType) -> Result<BatchRoom> {
        let mut own_labels = Vec::new();
        reserve(&mut own_labels, spec.options.max_batch as usize, "labels")?;
        Ok(BatchRoom {
            max_batch: spec.options.max_batch,
            messages: Messages::new(spec, &sizes, gather_dtype)?,
            activations: Activations::new(&sizes)?,
            sizes,
            own_labels,
            drafts: [Draft::with_room(&spec.options, spec.ranks)?, Draft::with_room(&spec.options, spec.ranks)?],
        })
    }
}

/// Sizes for which this machine has memory, beside the bytes of class centers and their state that are not in it yet.
pub(super) fn affordable_sizes(spec: &HeadSpec, threads: usize, what: &str, rows: impl Fn(&Memory) -> u64) -> Result<Sizes> {
    let (options, available) = (&spec.options, AvailableMemory::now());
    let mut sizes = Sizes::new(options, spec.ranks, spec.shard, threads)?;
    let needed = |sizes: &Sizes| {
        let memory = sizes.memory(options, spec.ranks, spec.shard);
        rows(&memory) + memory.activation + memory.probability
    };
    if options.workspace_limit == 0 && needed(&sizes) > available.least() / 4 * 3 {
        // Twice the arithmetic beats swapping.
        sizes.kept_chunks = 0;
    }
    available.require(needed(&sizes), what)?;
    Ok(sizes)
}

impl CpuHead {
    /// Makes memory for larger batches, and puts it aside.
    pub(super) fn reserve_room(&mut self, rows: u64) -> Result<()> {
        let mut spec = self.spec.clone();
        spec.options.max_batch = rows;
        // Rows that no step has had yet will need what looks free now.
        let rows = (self.rows.unstored() * record_bytes(&spec.options)) as u64;
        let sizes = affordable_sizes(&spec, self.pool.threads(), "class centers and the workspace of a larger batch", |_| rows)?;
        self.reserved = Some(BatchRoom::new(&spec, sizes, self.gather_dtype)?);
        Ok(())
    }

    /// The next step's labels come before the step under way is over: they use it at once, the rest waits for `use_grown`.
    pub(super) fn use_for_labels(&mut self, mut room: BatchRoom) {
        self.spec.options.max_batch = room.max_batch;
        let Messages { labels_send, labels_recv, .. } = &mut room.messages;
        (self.messages.labels_send, self.messages.labels_recv) = (std::mem::take(labels_send), std::mem::take(labels_recv));
        self.own_labels = std::mem::take(&mut room.own_labels);
        self.next = std::mem::take(&mut room.drafts[1]);
        self.grown = Some(room);
    }

    /// The step that begins, and those after it, use what has grown.
    pub(super) fn use_grown(&mut self) {
        let Some(BatchRoom { sizes, mut messages, activations, drafts: [draft, _], .. }) = self.grown.take() else { return };
        std::mem::swap(&mut messages.labels_send, &mut self.messages.labels_send);
        std::mem::swap(&mut messages.labels_recv, &mut self.messages.labels_recv);
        (self.sizes, self.messages, self.activations, self.next) = (sizes, messages, activations, draft);
    }

    /// Sizes the step's vectors to its rows and classes, and forgets the figures of the step before.
    pub(super) fn size_step(&mut self) -> Result<()> {
        let draft = &self.step.draft;
        let shape = Shape { rows: draft.labels.len(), classes: draft.sample.len(), ..self.sizes.capacity };
        let step = &mut self.step;
        step.shape = shape;
        for vector in [
            &mut step.inverse_norms,
            &mut step.target_logits,
            &mut step.target_cosines,
            &mut step.derivatives,
            &mut step.coefficients,
            &mut step.factors,
            &mut step.offsets,
            &mut step.row_sums,
            &mut step.best_negatives,
        ] {
            resize(vector, shape.rows)?;
        }
        if self.spec.options.row_terms {
            step.terms.resize(shape.rows)?;
        }
        resize(&mut step.center_inverse_norms, shape.classes)?;
        resize(&mut step.totals, shape.chunks())?;
        self.arrivals.resize(shape.chunks())?;
        resize(&mut step.bad_rows, shape.rows.div_ceil(ROWS_A_TASK))?;
        step.target_cosines.fill(ELSEWHERE);
        step.best_negatives.fill(ELSEWHERE);
        (step.bad_row, step.valid_rows, step.loss, step.target_cosine_sum) = (None, 0, 0.0, 0.0);
        (step.grad_embeddings, step.grad_centers) = (0.0, 0.0);
        if !self.sharded() && shape.classes * shape.dim > self.messages.center_gradient.len() {
            // A caller's sample beyond every draw.
            self.messages.center_gradient = Buffer::zeroed(shape.classes * shape.dim, "class centers' gradient")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
