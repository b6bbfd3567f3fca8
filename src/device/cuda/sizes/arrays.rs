//! The arrays of a head: one list for the allocation, the pointers of [`HeadArrays`] and the totals.

use super::{fuses_update, Capacities, Chunks};
use crate::device::cuda::shared_structs::{HeadArrays, Ledger, MissedUpdates, Rule, StepBlock, TILE_ROWS};
use crate::device::{HeadSpec, Memory};
use crate::matrix::DType;
use crate::optimizer::Optimizer;
use crate::options::RowUpdate;
use crate::protocol::{label_block, sum_elements, REPLICATED_SLOT, REPLICATED_TOTALS};
use crate::row_terms::RowTerm;

/// The purpose of an array, as `Memory` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Weight,
    State,
    /// What dense rows have missed: counted as state, and read at every step.
    Missed,
    Activation,
    Probability,
}

/// One array of a head.
#[derive(Clone, Copy)]
pub(super) struct Array {
    /// The field of `HeadArrays`.
    pub name: &'static str,
    /// The bytes of one copy.
    pub bytes: u64,
    /// 2 where each of the two steps in progress has its own.
    pub copies: usize,
    pub purpose: Purpose,
    /// Puts its address into a `HeadArrays`.
    pub assign: fn(&mut HeadArrays, *mut u8),
}

/// Gives every array there is to `take`; those that the options leave out have no bytes.
pub(super) fn each(spec: &HeadSpec, capacities: &Capacities, chunks: Chunks, take: &mut dyn FnMut(Array)) {
    use Purpose::{Activation, Missed, Probability, State, Weight};

    let options = &spec.options;
    let (ranks, max_batch, dim) = (u64::from(spec.ranks), options.max_batch, u64::from(options.embedding_dim));
    let (labels, rows, sample, chunk) = (capacities.labels, capacities.rows, capacities.sample, chunks.columns);
    let shard_rows = spec.shard.rows;
    let pitch = capacities.depth_pitch;
    let planes = if capacities.split_operands { 3 } else { 1 };
    let block = label_block(max_batch) as u64;
    let gathered = capacities.gather_dtype.size() as u64;
    let only = |condition: bool, count: u64| if condition { count } else { 0 };
    let sharded = spec.is_sharded();
    // Its messages are where they arrive, so that nothing is copied.
    let alone = ranks == 1 && sharded;
    let adamw = matches!(options.optimizer, Optimizer::Adamw(_));
    let dense = options.row_update == RowUpdate::Dense;
    let center_gradient = match () {
        () if !sharded => times(&[sample, dim]),
        () if fuses_update(spec) => 0,
        () => times(&[chunk, dim]),
    };
    let master = times(&[shard_rows, capacities.master_pitch]);

    macro_rules! array {
        ($purpose:ident, $copies:literal, $($field:ident $([$index:literal])?),+: $type:ty, $count:expr) => {
            take(Array {
                name: first_of!($($field),+),
                bytes: times(&[$count, std::mem::size_of::<$type>() as u64]),
                copies: $copies,
                purpose: $purpose,
                assign: |arrays, data| {
                    $(arrays.$field $([$index])? = data.cast::<$type>();)+
                },
            })
        };
    }
    array!(Activation, 2, block: StepBlock, 1);
    array!(Activation, 1, ledger: Ledger, 1);
    if alone {
        array!(Activation, 2, labels_send, labels_recv: i64, block);
    } else {
        array!(Activation, 2, labels_send: i64, block);
        array!(Activation, 2, labels_recv: i64, times(&[ranks, block]));
    }
    array!(Activation, 2, labels: i64, labels);
    array!(Activation, 2, origins: u32, labels);
    array!(Activation, 2, sort_keys[0]: u32, labels);
    array!(Activation, 2, sort_keys[1]: u32, labels);
    array!(Activation, 2, sort_rows[0]: u32, labels);
    array!(Activation, 2, sort_rows[1]: u32, labels);
    array!(Activation, 2, positive_classes: u32, labels);
    array!(Activation, 2, positive_starts: u32, labels + 1);
    array!(Activation, 2, sample: u32, sample);
    array!(Activation, 2, columns: u32, labels);
    array!(Activation, 2, positive_of: u32, sample);
    array!(Activation, 1, counts: u32, capacities.counts);
    array!(Activation, 1, selected: u32, shard_rows.div_ceil(32));
    if alone {
        array!(Activation, 1, embeddings_send, embeddings_recv: u8, times(&[max_batch, dim, gathered]));
    } else {
        array!(Activation, 1, embeddings_send: u8, only(sharded, times(&[max_batch, dim, gathered])));
        array!(Activation, 1, embeddings_recv: u8, only(sharded, times(&[ranks, max_batch, dim, gathered])));
    }
    array!(Activation, 1, send_scales: f32, only(sharded && capacities.gather_dtype == DType::F16, max_batch));
    array!(Activation, 1, units: f32, times(&[rows, pitch]));
    array!(Activation, 1, tangents: f32, times(&[rows, pitch]));
    array!(Activation, 1, unit_operand: u16, times(&[planes, rows, pitch]));
    array!(Activation, 1, scaled_operand: u16, times(&[planes, rows, pitch]));
    array!(Activation, 1, inverse_norms: f32, rows);
    array!(Activation, 1, target_logits: f32, rows);
    array!(Activation, 1, target_cosines: f32, rows);
    array!(Activation, 1, derivatives: f32, rows);
    array!(Activation, 1, coefficients: f32, rows);
    array!(Activation, 1, factors: f32, rows);
    array!(Activation, 1, row_sums: f32, rows);
    array!(Activation, 1, best_negatives: f32, rows);
    array!(Activation, 1, shifts: f32, only(options.margin.has_row_offsets(), rows));
    array!(Activation, 1, far_tiles: u32, only(options.margin.has_row_offsets(), rows / TILE_ROWS));
    array!(Activation, 1, terms: f32, only(options.row_terms, times(&[RowTerm::ALL.len() as u64, rows])));
    array!(Activation, 1, angles: f64, only(options.row_terms, rows));
    array!(Activation, 1, margin_gradients: f32, only(options.row_terms, times(&[2, rows])));
    array!(Activation, 1, partial_sums: f32, times(&[capacities.column_tiles(), rows]));
    array!(Activation, 1, partial_best: f32, times(&[capacities.column_tiles(), rows]));
    if capacities.split_operands {
        // Both products read W^ as the same three planes.
        array!(Activation, 1, center_operand, center_wide: u16, times(&[planes, chunk, pitch]));
    } else {
        array!(Activation, 1, center_operand: u16, times(&[chunk, pitch]));
        array!(Activation, 1, center_wide: u16, times(&[chunk, pitch]));
    }
    array!(Activation, 1, center_inverse_norms: f32, sample);
    array!(Probability, 1, numerators: u16, times(&[planes, rows, chunk]));
    array!(Activation, 1, weighted_centers: f32, times(&[chunks.splits, rows, pitch]));
    array!(Activation, 1, sums: f32, only(sharded, sum_elements(labels as usize, options) as u64));
    array!(
        Activation,
        1,
        replicated_sums: f64,
        only(!sharded, REPLICATED_TOTALS as u64 + REPLICATED_SLOT as u64 * ranks)
    );
    if alone {
        array!(Activation, 1, gradient_send, gradient_recv: f32, times(&[max_batch, dim]));
    } else {
        array!(Activation, 1, gradient_send: f32, only(sharded, times(&[ranks, max_batch, dim])));
        array!(Activation, 1, gradient_recv: f32, times(&[max_batch, dim]));
    }
    array!(Activation, 1, center_gradient: f32, center_gradient);
    array!(Activation, 1, squares: f32, rows);
    array!(Activation, 1, center_squares: f32, sample);
    let (narrow, narrow_state) = (options.weight_dtype == DType::Bf16, options.state_dtype == DType::Bf16);
    array!(Weight, 1, centers: f32, only(!narrow, master));
    array!(State, 1, momentum: f32, only(!narrow_state, master));
    array!(State, 1, second_moment: f32, only(adamw && !narrow_state, master));
    array!(Weight, 1, centers_bf16: u16, only(narrow, master));
    array!(State, 1, momentum_bf16: u16, only(narrow_state, master));
    array!(State, 1, second_moment_bf16: u16, only(adamw && narrow_state, master));
    array!(Missed, 1, last_update: u32, only(dense, shard_rows));
    array!(Activation, 1, rule: Rule, 1);
    array!(Missed, 1, missed_updates: MissedUpdates, capacities.history);
}

impl Array {
    /// Adds its bytes to those of its purpose.
    pub fn count_into(&self, memory: &mut Memory) {
        let total = match self.purpose {
            Purpose::Weight => &mut memory.weight,
            Purpose::State | Purpose::Missed => &mut memory.state,
            Purpose::Activation => &mut memory.activation,
            Purpose::Probability => &mut memory.probability,
        };
        *total = total.saturating_add(self.all_bytes());
    }

    /// Whether it is class centers or state of them.
    pub fn has_rows(&self) -> bool {
        matches!(self.purpose, Purpose::Weight | Purpose::State)
    }

    /// The bytes of all copies.
    pub fn all_bytes(&self) -> u64 {
        times(&[self.bytes, self.copies as u64])
    }
}

macro_rules! first_of {
    ($first:ident $(, $more:ident)*) => {
        stringify!($first)
    };
}
use first_of;

/// The product; one that no memory holds saturates.
fn times(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product, &factor| product.saturating_mul(factor))
}
