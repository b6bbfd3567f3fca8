//! How much memory a head takes on the CPU: one computation for the allocation and for the plan.

use super::products::{pitch, Shape};
use super::row_file;
use super::row_set::RowSet;
use crate::device::sizes::{sample_capacity, Memory};
use crate::matrix::DType;
use crate::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use crate::shard::Shard;
use crate::{ensure, Result};

/// Figures of a row that a step keeps: norms, logits, cosines, sums, target columns and the like.
const ROW_FIGURES: usize = 16;

/// The same with row terms: terms, angle, gradients, and the terms in the message.
const ROW_TERM_FIGURES: usize = 10;

/// Elements of a head's buffers, from capacities: the largest batch and sample there can be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// The largest step.
    pub capacity: Shape,
    /// Accumulators of P @ W^, over all splits.
    pub weighted_centers: usize,
    /// Row sums and maxima, over all splits.
    pub split_rows: usize,
    /// Scratch of all threads.
    pub scratch: usize,
    /// Chunks of P^T that are kept.
    pub kept_chunks: usize,
}

impl Sizes {
    /// Refuses a workspace limit that leaves no room for the rest.
    pub fn new(options: &HeadOptions, ranks: u32, shard: Shard, threads: usize) -> Result<Sizes> {
        let rows = match options.placement {
            Placement::Sharded => ranks as usize * options.max_batch as usize,
            Placement::Replicated => options.max_batch as usize,
        };
        let dim = options.embedding_dim as usize;
        let capacity = Shape {
            rows,
            dim,
            classes: sample_capacity(options, ranks, shard) as usize,
            half: options.precision == Precision::Half,
        };
        let split_rows = Shape { classes: shard.rows as usize, ..capacity }.split_row_capacity();
        let mut sizes = Sizes {
            capacity,
            weighted_centers: split_rows * pitch(dim),
            split_rows,
            scratch: threads * capacity.scratch_elements(),
            kept_chunks: capacity.chunks().min(isize::MAX as usize / 4 / capacity.kept_chunk_elements().max(1)),
        };
        let limit = options.workspace_limit;
        if limit > 0 {
            let fixed = sizes.activation(options, ranks as usize);
            ensure!(
                limit >= fixed,
                InvalidArgument,
                "workspace_limit must be 0 or at least {fixed} bytes for batches of {} rows on {ranks} ranks of dimension {dim}, got {limit}",
                options.max_batch
            );
            let chunk = 4 * capacity.kept_chunk_elements() as u64;
            sizes.kept_chunks = sizes.kept_chunks.min(((limit - fixed) / chunk.max(1)) as usize);
        }
        Ok(sizes)
    }

    fn activation(&self, options: &HeadOptions, ranks: usize) -> u64 {
        let Shape { rows, dim, classes, .. } = self.capacity;
        let sharded = options.placement == Placement::Sharded;
        let max_batch = options.max_batch as usize;
        let embeddings = 3 * rows * pitch(dim) + dim.next_multiple_of(2) * pitch(rows);
        let block = (max_batch + ranks * max_batch) * dim;
        // Blocks of the gradient and of the embeddings, or the replicated gradient.
        let exchanges = if sharded { block } else { max_batch * dim + classes * dim };
        let embedded = if sharded { block * options.gathered_dtype(Precision::F32).size() } else { 0 };
        let figures = ROW_FIGURES + if options.row_terms { ROW_TERM_FIGURES } else { 0 };
        let elements = embeddings + exchanges + self.weighted_centers + self.scratch + self.split_rows + classes + figures * rows;
        let moved = if options.residency.is_file() { row_file::memory(record_bytes(options), dim) } else { 0 };
        // Ids of this sample and the next, and the draw's candidates; labels as sent, as gathered and as kept.
        let ids = if options.sample_rate < 1.0 { 4 * classes } else { 0 };
        let labels = 4 * ranks * max_batch + max_batch;
        let scales = if sharded && options.gathered_dtype(Precision::F32) == DType::F16 { max_batch } else { 0 };
        (4 * (elements + scales) + embedded + moved) as u64 + 8 * (self.split_rows + ids + labels) as u64
    }

    /// Floats of the numerators that are kept.
    pub fn kept_elements(&self) -> usize {
        self.kept_chunks * self.capacity.kept_chunk_elements()
    }

    pub fn memory(&self, options: &HeadOptions, ranks: u32, shard: Shard) -> Memory {
        // Of a file's rows memory has those of a step, beside those that the file does not have.
        let slots = if options.residency.is_file() { self.capacity.classes as u64 } else { shard.rows };
        let rows = slots + cached_rows(options, shard.rows) as u64;
        let tensor = |dtype: DType| dtype.size() as u64 * rows * u64::from(options.embedding_dim);
        let map = RowSet::bytes(shard.rows);
        let last = if options.row_update == RowUpdate::Dense { 8 * shard.rows } else { 0 };
        Memory {
            weight: tensor(options.weight_dtype),
            state: options.optimizer.state_tensors() as u64 * tensor(options.state_dtype) + last,
            activation: self.activation(options, ranks as usize) + map,
            probability: 4 * self.kept_elements() as u64,
        }
    }
}

/// What the largest rank's head takes on a CPU with `threads` threads.
pub(crate) fn memory_needed(options: &HeadOptions, ranks: u32, threads: usize) -> Result<Memory> {
    let shard = options.shard(ranks, 0);
    Ok(Sizes::new(options, ranks, shard, threads)?.memory(options, ranks, shard))
}

/// Bytes of the file in which a rank keeps these rows; 0 for other residencies.
pub(crate) fn storage_needed(options: &HeadOptions, shard: Shard) -> u64 {
    match options.residency {
        Residency::File { .. } => row_file::bytes(record_bytes(options), shard.rows as usize - cached_rows(options, shard.rows)),
        Residency::Device | Residency::Host => 0,
    }
}

/// Rows of a shard that a file does not have, since memory always does: the first ones.
pub(super) fn cached_rows(options: &HeadOptions, rows: u64) -> usize {
    match options.residency {
        Residency::File { cache, .. } => (cache / record_bytes(options) as u64).min(rows) as usize,
        Residency::Device | Residency::Host => 0,
    }
}

/// Bytes of a row's tensors as they are stored.
pub(super) fn record_bytes(options: &HeadOptions) -> usize {
    let state = options.optimizer.state_tensors() * options.state_dtype.size();
    options.embedding_dim as usize * (options.weight_dtype.size() + state)
}
