//! How much memory a head takes on the CPU: one computation for the allocation and for the plan.

use super::products::{pitch, Shape};
use crate::device::sizes::{sample_capacity, Memory};
use crate::matrix::DType;
use crate::options::{HeadOptions, Placement, Precision, RowUpdate};
use crate::shard::Shard;
use crate::{ensure, Result};

/// Figures of a row that a step keeps: norms, logits, cosines, sums, target columns and the like.
const ROW_FIGURES: usize = 16;

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
        let capacity = Shape { rows, dim, classes: sample_capacity(options, ranks, shard) as usize };
        let split_rows = Shape { classes: shard.rows as usize, ..capacity }.split_row_capacity();
        let mut sizes = Sizes {
            capacity,
            weighted_centers: split_rows * pitch(dim),
            split_rows,
            scratch: threads * capacity.scratch_elements(),
            kept_chunks: capacity.chunks().min(isize::MAX as usize / 4 / capacity.chunk_elements().max(1)),
        };
        let limit = options.workspace_limit;
        if limit > 0 {
            let fixed = sizes.activation(options, ranks as usize);
            ensure!(
                limit >= fixed,
                InvalidArgument,
                "workspace_limit must be 0 or at least {fixed} bytes for max_batch {} on {ranks} ranks of dimension {dim}, got {limit}",
                options.max_batch
            );
            let chunk = 4 * capacity.chunk_elements() as u64;
            sizes.kept_chunks = sizes.kept_chunks.min(((limit - fixed) / chunk.max(1)) as usize);
        }
        Ok(sizes)
    }

    fn activation(&self, options: &HeadOptions, ranks: usize) -> u64 {
        let Shape { rows, dim, classes } = self.capacity;
        let sharded = options.placement == Placement::Sharded;
        let max_batch = options.max_batch as usize;
        let embeddings = 3 * rows * pitch(dim) + dim * pitch(rows);
        let block = (max_batch + ranks * max_batch) * dim;
        // Blocks of the gradient and of the embeddings, or the replicated gradient.
        let exchanges = if sharded { block } else { max_batch * dim + classes * dim };
        let embedded = if sharded { block * options.gathered_dtype(Precision::F32).size() } else { 0 };
        let elements =
            embeddings + exchanges + self.weighted_centers + self.scratch + self.split_rows + classes + ROW_FIGURES * rows;
        // Ids of this sample and the next, and the draw's candidates; labels as sent, as gathered and as kept.
        let ids = if options.sample_rate < 1.0 { 4 * classes } else { 0 };
        let labels = 4 * ranks * max_batch + max_batch;
        let scales = if sharded && options.gathered_dtype(Precision::F32) == DType::F16 { max_batch } else { 0 };
        (4 * (elements + scales) + embedded) as u64 + 8 * (self.split_rows + ids + labels) as u64
    }

    /// Elements of the numerators that are kept.
    pub fn kept_elements(&self) -> usize {
        self.kept_chunks * self.capacity.chunk_elements()
    }

    pub fn memory(&self, options: &HeadOptions, ranks: u32, shard: Shard) -> Memory {
        let tensor = 4 * shard.rows * u64::from(options.embedding_dim);
        let last = if options.row_update == RowUpdate::Dense { 8 * shard.rows } else { 0 };
        Memory {
            weight: tensor,
            state: options.optimizer.state_tensors() as u64 * tensor + last,
            activation: self.activation(options, ranks as usize),
            probability: 4 * self.kept_elements() as u64,
        }
    }
}

/// What the largest rank's head takes on a CPU with `threads` threads.
pub(crate) fn memory_needed(options: &HeadOptions, ranks: u32, threads: usize) -> Result<Memory> {
    let shard = options.shard(ranks, 0);
    Ok(Sizes::new(options, ranks, shard, threads)?.memory(options, ranks, shard))
}

/// Bytes that can be had without swapping; unbounded where the system does not tell.
pub(super) fn available_memory() -> u64 {
    let number = |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    // A container's own limit, where there is one: "max" is no number.
    let limit = number("/sys/fs/cgroup/memory.max").unwrap_or(u64::MAX);
    let own = limit.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0));
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kilobytes.map_or(u64::MAX, |kilobytes| kilobytes << 10).min(own)
}
