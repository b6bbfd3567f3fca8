//! The structures of kernels/shared_structs.h, field by field in the same order. It explains the fields. A test compares the two.

use crate::margin::{Margin, MarginGradient};
use crate::matrix::Matrix;
use crate::memory::Plain;
use crate::optimizer::{replayed_updates, AdamwCoefficients, Coefficients, Optimizer, SgdCoefficients, UpdateRule};
use crate::options::RowUpdate;
use crate::protocol::{ANNOUNCED, HEADER};
use crate::stream::MOST_REDUCED;

/// No column, no class, no positive.
pub(crate) const NONE: u32 = u32::MAX;
/// Rows of operands are zero up to a multiple of it.
pub(crate) const TILE_ROWS: u64 = 128;
/// Columns likewise.
pub(crate) const TILE_COLUMNS: u64 = 128;

/// The values of `StepBlock::fault`: what is wrong with a step.
pub(crate) mod fault {
    pub(crate) const NONE: i32 = 0;
    /// Rank `rank` failed before the labels message, with status `value`.
    pub(crate) const REMOTE: i32 = 1;
    /// Rank `rank` has announced another call or step than rank 0: `detail` has both announcements.
    pub(crate) const RANKS_DIFFER: i32 = 2;
    /// Label `value` of row `row` of rank `rank`.
    pub(crate) const LABEL: i32 = 3;
    /// Row `row` of rank `rank` holds a NaN or an infinity.
    pub(crate) const EMBEDDING: i32 = 4;
    /// The softmax sum of row `row` of rank `rank` leaves float32.
    pub(crate) const SUM: i32 = 5;
    /// Ranks failed in their forward: the sums message carried `value`.
    pub(crate) const FORWARD: i32 = 6;
    /// Replicated: the samples of rank 0 and rank `rank` differ.
    pub(crate) const SAMPLES: i32 = 7;
    /// Replicated: rank `rank` sent status `value` in the sums message.
    pub(crate) const SUMS: i32 = 8;
    /// The gather brought back rank `rank`'s block of labels wrongly: `row` is a `BlockFault`, `value` the rank or batch that it names.
    pub(crate) const BLOCK: i32 = 9;
    /// A row's own term is out of its range: `row` is 3 * row + term, `value` its bits.
    pub(crate) const TERM: i32 = 10;
}

macro_rules! structures {
    ($($(#[$meta:meta])* pub(crate) struct $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub(crate) struct $name {
                $(pub $field: $type,)*
            }

            // Some are made on the device alone.
            #[allow(dead_code)]
            impl $name {
                pub(crate) fn zeroed() -> $name {
                    // SAFETY: numbers and pointers, all of which may be zero.
                    unsafe { std::mem::zeroed() }
                }
            }
        )*

        /// The size of each structure, and the offset and size of each field.
        #[cfg(test)]
        const LAYOUT: &[(&str, usize, &[(&str, usize, usize)])] = &[
            $((stringify!($name), std::mem::size_of::<$name>(), &[$((
                stringify!($field),
                std::mem::offset_of!($name, $field),
                size_of_field(|value: &$name| &value.$field),
            )),*])),*
        ];
    };
}

structures! {
    /// A caller's matrix in device memory.
    pub(crate) struct MatrixView {
        data: *mut u8,
        rows: u64,
        columns: u64,
        stride: u64,
        dtype: i32,
        reserved: i32,
    }
    /// What is before the labels of this rank's block.
    pub(crate) struct LabelHeader {
        words: [i64; HEADER],
    }
    /// `Margin`, with its offset.
    pub(crate) struct MarginSettings {
        scale: f64,
        m1: f64,
        m2: f64,
        m3: f64,
        filter: f64,
        offset: f64,
        straight_through: i32,
        guard: i32,
    }
    /// A step's real sizes and its verdict, computed on the device.
    pub(crate) struct StepBlock {
        draws: u64,
        status: i32,
        fault: i32,
        rank: i32,
        only_target: u32,
        row: i64,
        value: i64,
        detail: [i64; 2 * ANNOUNCED],
        rows: u32,
        first_computed: u32,
        own_rows: u32,
        first_own: u32,
        global_rows: u32,
        positives: u32,
        positive_rows: u32,
        classes: u32,
        wanted: u32,
        threshold: u32,
        ties: u32,
        bad_row: u32,
        valid_rows: u64,
        own_valid_rows: u64,
        loss: f64,
        target_cosines: f64,
        grad_embeddings: f64,
        grad_centers: f64,
        digest: f64,
    }
    /// Outlives the steps.
    pub(crate) struct Ledger {
        updates: u64,
        failed: u64,
        skipped: u64,
        factors: [i64; 2],
        device_factor: f32,
        torn_row: u32,
        first_failure: StepBlock,
    }
    /// An update's coefficients, made on the device.
    pub(crate) struct Rule {
        momentum: f32,
        weight_decay: f32,
        learning_rate: f32,
        beta1: f32,
        beta2: f32,
        one_minus_beta1: f32,
        one_minus_beta2: f32,
        decay_factor: f32,
        corrected_rate: f32,
        sqrt_v_scale: f32,
        epsilon: f32,
        factor: f32,
        active: i32,
        reserved: i32,
    }
    /// Gradients that are summed up over micro-batches.
    pub(crate) struct Accumulated {
        gradients: *mut f32,
        classes: *mut u32,
        places: *mut u32,
        squares: *mut f32,
        counts: *mut u32,
    }
    /// The updates that dense rows missed since one update, computed on the device.
    pub(crate) struct MissedUpdates {
        shift_w: f64,
        whole_w: f64,
        w_m: f64,
        m_w: f64,
        m_m: f64,
    }
    /// `Optimizer` and `RowUpdate`.
    pub(crate) struct OptimizerSettings {
        momentum: f64,
        weight_decay: f64,
        beta1: f64,
        beta2: f64,
        epsilon: f64,
        replayed_updates: u64,
        adamw: i32,
        dense: i32,
    }
    /// A head's arrays and sizes: every kernel gets it by value.
    pub(crate) struct HeadArrays {
        block: *mut StepBlock,
        ledger: *mut Ledger,
        labels_send: *mut i64,
        labels_recv: *mut i64,
        labels: *mut i64,
        origins: *mut u32,
        sort_keys: [*mut u32; 2],
        sort_rows: [*mut u32; 2],
        positive_classes: *mut u32,
        positive_starts: *mut u32,
        sample: *mut u32,
        columns: *mut u32,
        positive_of: *mut u32,
        counts: *mut u32,
        selected: *mut u32,
        embeddings_send: *mut u8,
        embeddings_recv: *mut u8,
        send_scales: *mut f32,
        units: *mut f32,
        tangents: *mut f32,
        unit_operand: *mut u16,
        scaled_operand: *mut u16,
        inverse_norms: *mut f32,
        target_logits: *mut f32,
        target_cosines: *mut f32,
        derivatives: *mut f32,
        coefficients: *mut f32,
        factors: *mut f32,
        row_sums: *mut f32,
        best_negatives: *mut f32,
        row_losses: *mut f64,
        shifts: *mut f32,
        far_tiles: *mut u32,
        terms: *mut f32,
        angles: *mut f64,
        margin_gradients: *mut f32,
        partial_sums: *mut f32,
        partial_best: *mut f32,
        center_operand: *mut u16,
        center_wide: *mut u16,
        center_inverse_norms: *mut f32,
        numerators: *mut u16,
        weighted_centers: *mut f32,
        sums: *mut f32,
        replicated_sums: *mut f64,
        gradient_send: *mut f32,
        gradient_recv: *mut f32,
        center_gradient: *mut f32,
        squares: *mut f32,
        center_squares: *mut f32,
        centers: *mut f32,
        momentum: *mut f32,
        second_moment: *mut f32,
        centers_bf16: *mut u16,
        momentum_bf16: *mut u16,
        second_moment_bf16: *mut u16,
        last_update: *mut u32,
        rule: *mut Rule,
        missed_updates: *mut MissedUpdates,
        first_class: u64,
        num_classes: u64,
        seed: u64,
        ignore_label: i64,
        plane_rows: u64,
        plane_centers: u64,
        plane_numerators: u64,
        margin: MarginSettings,
        optimizer: OptimizerSettings,
        ranks: u32,
        rank: u32,
        max_batch: u32,
        label_capacity: u32,
        row_capacity: u32,
        dim: u32,
        depth_pitch: u32,
        master_pitch: u32,
        shard_rows: u32,
        sample_size: u32,
        block_shift: u32,
        sample_capacity: u32,
        chunk_capacity: u32,
        column_tiles: u32,
        splits: u32,
        count_capacity: u32,
        history_capacity: u32,
        sharded: i32,
        whole_shard: i32,
        split_operands: i32,
        gather_dtype: i32,
        reserved: i32,
    }
}

/// kernels/collective.h: one buffer of each rank; NULL: none.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RankPointers {
    of: [*mut u8; MOST_REDUCED],
}

impl RankPointers {
    pub fn new(pointers: impl Iterator<Item = *mut u8>) -> RankPointers {
        let mut all = RankPointers { of: [std::ptr::null_mut(); MOST_REDUCED] };
        all.of.iter_mut().zip(pointers).for_each(|(slot, pointer)| *slot = pointer);
        all
    }
}

const _: () = {
    assert!(std::mem::size_of::<MatrixView>() == 40);
    assert!(std::mem::size_of::<MarginSettings>() == 56);
    assert!(std::mem::size_of::<StepBlock>() == 288);
    assert!(std::mem::size_of::<Ledger>() == 336);
    assert!(std::mem::size_of::<Rule>() == 56);
    assert!(std::mem::size_of::<MissedUpdates>() == 40);
    assert!(std::mem::size_of::<OptimizerSettings>() == 56);
    assert!(std::mem::size_of::<HeadArrays>() == 744);
};

// SAFETY: numbers without padding, which the sizes above show.
unsafe impl Plain for StepBlock {}
unsafe impl Plain for Ledger {}
unsafe impl Plain for Rule {}
unsafe impl Plain for MissedUpdates {}

// SAFETY: descriptions of device memory; the host never follows their pointers.
unsafe impl Send for MatrixView {}
unsafe impl Sync for MatrixView {}
unsafe impl Send for HeadArrays {}
unsafe impl Sync for HeadArrays {}

impl From<&Matrix> for MatrixView {
    fn from(matrix: &Matrix) -> MatrixView {
        MatrixView {
            data: matrix.data,
            rows: matrix.rows as u64,
            columns: matrix.cols as u64,
            stride: matrix.row_stride as u64,
            dtype: matrix.dtype as i32,
            reserved: 0,
        }
    }
}

impl From<&Margin> for MarginSettings {
    fn from(margin: &Margin) -> MarginSettings {
        MarginSettings {
            scale: margin.scale,
            m1: margin.m1,
            m2: margin.m2,
            m3: margin.m3,
            filter: margin.interclass_filter,
            offset: margin.offset(),
            straight_through: (margin.gradient == MarginGradient::StraightThrough).into(),
            guard: margin.guard.into(),
        }
    }
}

impl OptimizerSettings {
    pub(crate) fn new(optimizer: &Optimizer, rows: RowUpdate) -> OptimizerSettings {
        let dense = (rows == RowUpdate::Dense).into();
        match optimizer {
            Optimizer::Sgd(sgd) => {
                OptimizerSettings { momentum: sgd.momentum, weight_decay: sgd.weight_decay, dense, ..OptimizerSettings::zeroed() }
            }
            Optimizer::Adamw(adamw) => OptimizerSettings {
                weight_decay: adamw.weight_decay,
                beta1: adamw.beta1,
                beta2: adamw.beta2,
                epsilon: adamw.epsilon,
                replayed_updates: replayed_updates(adamw),
                adamw: 1,
                dense,
                ..OptimizerSettings::zeroed()
            },
        }
    }
}

impl From<&UpdateRule> for Rule {
    fn from(rule: &UpdateRule) -> Rule {
        match rule.coefficients {
            Coefficients::Sgd(SgdCoefficients { momentum, weight_decay, learning_rate }) => {
                Rule { momentum, weight_decay, learning_rate, factor: 1.0, ..Rule::zeroed() }
            }
            Coefficients::Adamw(AdamwCoefficients {
                beta1,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                decay_factor,
                corrected_rate,
                sqrt_v_scale,
                epsilon,
            }) => Rule {
                beta1,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                decay_factor,
                corrected_rate,
                sqrt_v_scale,
                epsilon,
                factor: 1.0,
                ..Rule::zeroed()
            },
        }
    }
}

#[cfg(test)]
const fn size_of_field<S, F>(_: fn(&S) -> &F) -> usize {
    std::mem::size_of::<F>()
}

#[cfg(test)]
mod tests;
