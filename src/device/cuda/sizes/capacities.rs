//! Capacities of a head's arrays: the largest batch and sample there can be, and the pitches of rows.

use crate::device::cuda::shared_structs::{TILE_COLUMNS, TILE_ROWS};
use crate::device::{sample_capacity, HeadSpec};
use crate::matrix::DType;
use crate::options::{Precision, RowUpdate};
use crate::sample::sample_size;
use crate::{ensure, Result};

/// Operands are zero from d up to a multiple of it: the depth of the products' widest stage.
pub(in crate::device::cuda) const DEPTH_MULTIPLE: u64 = 64;
/// Four columns of a row of W or of the state are read at once, aligned.
const MASTER_MULTIPLE: u64 = 4;
/// Updates that a dense row may be behind before all rows are brought up to date: 40 bytes each.
const HISTORY: u64 = 4096;
/// kernels/shared_structs.h: a draw's own counters, at the head of all.
const DRAW_COUNTERS: u64 = 8;
/// kernels/labels.cu: rows of a tile of the sort, and counters it has.
const SORT_ROWS: u64 = 1024;
const SORT_COUNTERS: u64 = 256;
/// kernels/sample.cu: classes of a tile of the list, which has one counter.
const LIST_CLASSES: u64 = 8192;

/// kernels/sample.cu: the counters of a draw of `size` of so many classes, with so many labels of all ranks.
pub(in crate::device::cuda) fn draw_counters(labels: u64, classes: u64, size: u64, block: u64) -> u64 {
    // The blocks whose keys are near the threshold: their key and their first class.
    let listed = 128 + (16.0 * (size as f64 / block as f64).sqrt()) as u64;
    let sort = SORT_COUNTERS * labels.div_ceil(SORT_ROWS);
    DRAW_COUNTERS + sort.max(classes.div_ceil(LIST_CLASSES)).max(2 * listed)
}

#[derive(Clone, Debug)]
pub(in crate::device::cuda) struct Capacities {
    pub gather_dtype: DType,
    /// Precision f32: operands are three planes of bf16.
    pub split_operands: bool,
    /// Labels of all ranks.
    pub labels: u64,
    /// Rows of a step on this device, up to whole tiles.
    pub rows: u64,
    pub depth_pitch: u64,
    pub master_pitch: u64,
    pub sample_size: u64,
    /// Classes of a sample at most.
    pub sample_limit: u64,
    /// The same, up to whole tiles.
    pub sample: u64,
    pub counts: u64,
    pub history: u64,
}

impl Capacities {
    /// Errors: INVALID_ARGUMENT, for more rows or classes than are numbered in 32 bits.
    pub fn new(spec: &HeadSpec, least_sample: u64) -> Result<Capacities> {
        let options = &spec.options;
        let labels = u64::from(spec.ranks) * options.max_batch;
        let rows = if spec.is_sharded() { labels } else { options.max_batch };
        let dim = u64::from(options.embedding_dim);
        let sample_limit = sample_capacity(options, spec.ranks, spec.shard).max(least_sample).min(spec.shard.rows);
        let size = sample_size(options.sample_rate, spec.shard.rows);
        let capacities = Capacities {
            gather_dtype: options.gathered_dtype(Precision::Half),
            split_operands: options.precision == Precision::F32,
            labels,
            rows: rows.next_multiple_of(TILE_ROWS),
            depth_pitch: dim.next_multiple_of(DEPTH_MULTIPLE),
            master_pitch: dim.next_multiple_of(MASTER_MULTIPLE),
            sample_size: size,
            sample_limit,
            sample: sample_limit.max(1).next_multiple_of(TILE_COLUMNS),
            counts: draw_counters(labels, spec.shard.rows, size, options.sample_block.into()),
            history: if options.row_update == RowUpdate::Dense { HISTORY } else { 0 },
        };
        for (what, count) in [("rows", capacities.rows), ("classes of a sample", capacities.sample)] {
            ensure!(
                count <= u32::MAX.into(),
                InvalidArgument,
                "{what} must be at most {} on a GPU, got {count} for batches of {} rows on {} ranks with {} classes each",
                u32::MAX,
                options.max_batch,
                spec.ranks,
                spec.shard.rows
            );
        }
        Ok(capacities)
    }

    pub fn column_tiles(&self) -> u64 {
        self.sample / TILE_COLUMNS
    }
}
