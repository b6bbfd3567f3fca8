//! How much memory a head takes on a GPU: one list of arrays for the allocation, the view's pointers and the totals.

use super::driver::{DeviceBuffer, Stream};
use super::shared_structs::{
    HeadArrays, Ledger, MarginSettings, MissedUpdates, OptimizerSettings, Rule, StepBlock, TILE_COLUMNS, TILE_ROWS,
};
use crate::device::{sample_capacity, HeadSpec, Memory};
use crate::matrix::DType;
use crate::optimizer::Optimizer;
use crate::options::{Placement, Precision, RowUpdate};
use crate::protocol::{label_block, REPLICATED_SLOT, REPLICATED_TOTALS, TOTALS};
use crate::sample::sample_size;
use crate::{ensure, Result};

/// Operands are zero from d up to a multiple of it: the depth of the products' widest stage.
pub(super) const DEPTH: u64 = 64;
/// Rows of W and of the state begin on 16 bytes.
const MASTER: u64 = 4;
/// Columns of a chunk where P is not kept: 69 MB of P at 4096 rows, and 66 tiles, which outnumber the multiprocessors' half.
pub(super) const CHUNK: u64 = 8448;
/// Columns of a tile of P @ W^, along d.
const WEIGHTED_TILE: u64 = 128;
/// Blocks of P @ W^ that a multiprocessor holds.
const WEIGHTED_BLOCKS: u64 = 2;
/// Updates that a dense row may be behind before all rows are brought up: 32 bytes each.
const HISTORY: u64 = 4096;
/// kernels/sample.cu: bins of the draw's histogram, at the head of the counters.
pub(super) const BINS: u64 = 2048;
/// kernels/labels.cu: rows of a tile of the sort, and counters it has.
const SORT_ROWS: u64 = 1024;
const SORT_COUNTERS: u64 = 256;
/// kernels/sample.cu: classes for which the draw and the listing may have one counter.
pub(super) const COUNTED_CLASSES: u64 = 512;

/// What sizes depend on beside the options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gpu {
    pub multiprocessors: u32,
    /// Bytes.
    pub free_memory: u64,
}

/// What memory is for, as `Memory` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Weight,
    State,
    Activation,
    Probability,
}

/// One array of a head.
#[derive(Clone, Copy)]
pub(crate) struct Array {
    /// The field of `HeadArrays`.
    pub name: &'static str,
    /// Of one of its copies.
    pub bytes: u64,
    /// 2 for what each of the two steps under way has for itself.
    pub copies: usize,
    pub purpose: Purpose,
    /// Puts the address into a view.
    pub place: fn(&mut HeadArrays, *mut u8),
}

/// Elements of a head's arrays, from capacities: the largest batch and sample there can be.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    spec: HeadSpec,
    pub gather_dtype: DType,
    /// Precision f32: operands are three planes of bf16.
    pub split_operands: bool,
    pub label_capacity: u64,
    pub row_capacity: u64,
    pub depth_pitch: u64,
    pub master_pitch: u64,
    pub sample_size: u64,
    /// Classes of a sample at most.
    pub sample_most: u64,
    /// The same, up to whole tiles.
    pub sample_capacity: u64,
    pub chunk_capacity: u64,
    pub splits: u64,
    pub count_capacity: u64,
    pub history_capacity: u64,
}

impl Sizes {
    /// For samples of `int(rate * rows)` classes, of all positives, and of `least_sample`.
    ///
    /// P is kept where it fits into the workspace limit (0: three quarters of what W and the state leave free); else it is computed
    /// twice, by chunks.
    ///
    /// Errors: INVALID_ARGUMENT, for a limit that leaves no room for one tile of columns, naming the need; or for more rows than
    /// are numbered in 32 bits.
    pub fn new(spec: &HeadSpec, gpu: Gpu, least_sample: u64) -> Result<Sizes> {
        let options = &spec.options;
        let split_operands = options.precision == Precision::F32;
        let label_capacity = u64::from(spec.ranks) * options.max_batch;
        let rows = if spec.is_sharded() { label_capacity } else { options.max_batch };
        let dim = u64::from(options.embedding_dim);
        let most = sample_capacity(options, spec.ranks, spec.shard).max(least_sample).min(spec.shard.rows);
        let sort_tiles = label_capacity.div_ceil(SORT_ROWS);
        let mut sizes = Sizes {
            spec: spec.clone(),
            gather_dtype: options.gathered_dtype(Precision::Half),
            split_operands,
            label_capacity,
            row_capacity: rows.next_multiple_of(TILE_ROWS),
            depth_pitch: dim.next_multiple_of(DEPTH),
            master_pitch: dim.next_multiple_of(MASTER),
            sample_size: sample_size(options.sample_rate, spec.shard.rows),
            sample_most: most,
            sample_capacity: most.max(1).next_multiple_of(TILE_COLUMNS),
            chunk_capacity: 0,
            splits: 1,
            count_capacity: BINS + (SORT_COUNTERS * sort_tiles).max(spec.shard.rows.div_ceil(COUNTED_CLASSES)),
            history_capacity: if options.row_update == RowUpdate::Dense { HISTORY } else { 0 },
        };
        for (what, count) in [("rows", sizes.row_capacity), ("classes of a sample", sizes.sample_capacity)] {
            ensure!(
                count <= u32::MAX.into(),
                InvalidArgument,
                "{what} must be at most {} on a GPU, got {count} for max_batch {} on {} ranks with {} classes each",
                u32::MAX,
                options.max_batch,
                spec.ranks,
                spec.shard.rows
            );
        }
        sizes.choose_chunk(gpu, least_sample)?;
        Ok(sizes)
    }

    /// The largest chunk that fits; P is kept where that is the sample.
    fn choose_chunk(&mut self, gpu: Gpu, least_sample: u64) -> Result<()> {
        let limit = self.spec.options.workspace_limit;
        self.set_chunk(self.sample_capacity, gpu);
        let memory = self.memory();
        let room = match limit {
            0 => gpu.free_memory.saturating_sub(memory.weight.saturating_add(memory.state)) / 4 * 3,
            limit => limit,
        };
        if self.workspace() <= room {
            return Ok(());
        }
        for chunk in (1..=CHUNK.min(self.sample_capacity) / TILE_COLUMNS).rev() {
            self.set_chunk(chunk * TILE_COLUMNS, gpu);
            if self.workspace() <= room {
                return Ok(());
            }
        }
        let options = &self.spec.options;
        // Without a limit the allocation itself says what is missing; and a caller's own sample goes before the limit.
        ensure!(
            limit == 0 || least_sample > 0,
            InvalidArgument,
            "workspace_limit must be 0 or at least {} bytes for max_batch {} on {} ranks of dimension {}, got {limit}",
            self.workspace(),
            options.max_batch,
            self.spec.ranks,
            options.embedding_dim
        );
        Ok(())
    }

    fn set_chunk(&mut self, chunk: u64, gpu: Gpu) {
        self.chunk_capacity = chunk;
        self.splits = weighted_splits(self.row_capacity, self.depth_pitch, chunk, gpu.multiprocessors);
    }

    pub fn column_tiles(&self) -> u64 {
        self.sample_capacity / TILE_COLUMNS
    }

    /// Whether P is kept from the forward to the backward.
    pub fn keeps_probabilities(&self) -> bool {
        self.chunk_capacity == self.sample_capacity
    }

    /// Every array there is; those that the options leave out have no bytes.
    pub fn arrays(&self) -> Vec<Array> {
        use Purpose::{Activation, Probability, State, Weight};

        let options = &self.spec.options;
        let (ranks, max_batch, dim) = (u64::from(self.spec.ranks), options.max_batch, u64::from(options.embedding_dim));
        let (labels, rows, sample, chunk) = (self.label_capacity, self.row_capacity, self.sample_capacity, self.chunk_capacity);
        let shard_rows = self.spec.shard.rows;
        let pitch = self.depth_pitch;
        let planes = if self.split_operands { 3 } else { 1 };
        let block = label_block(max_batch) as u64;
        let gathered = self.gather_dtype.size() as u64;
        let only = |condition: bool, count: u64| if condition { count } else { 0 };
        let sharded = self.spec.is_sharded();
        let adamw = matches!(options.optimizer, Optimizer::Adamw(_));
        let dense = options.row_update == RowUpdate::Dense;
        let center_gradient = match () {
            () if !sharded => times(&[sample, dim]),
            () if dense => times(&[chunk, dim]),
            // The product's epilogue updates the rows in place.
            () => 0,
        };
        let master = times(&[shard_rows, self.master_pitch]);

        let mut arrays = Vec::new();
        macro_rules! array {
            ($purpose:ident, $copies:literal, $($field:ident $([$index:literal])?),+: $type:ty, $count:expr) => {
                arrays.push(Array {
                    name: first_of!($($field),+),
                    bytes: times(&[$count, std::mem::size_of::<$type>() as u64]),
                    copies: $copies,
                    purpose: $purpose,
                    place: |view, data| {
                        $(view.$field $([$index])? = data.cast::<$type>();)+
                    },
                })
            };
        }
        array!(Activation, 2, block: StepBlock, 1);
        array!(Activation, 1, ledger: Ledger, 1);
        array!(Activation, 2, labels_send: i64, block);
        array!(Activation, 2, labels_recv: i64, times(&[ranks, block]));
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
        array!(Activation, 1, counts: u32, self.count_capacity);
        array!(Activation, 1, selected: u32, shard_rows.div_ceil(32));
        array!(Activation, 1, embeddings_send: u8, only(sharded, times(&[max_batch, dim, gathered])));
        array!(Activation, 1, embeddings_recv: u8, only(sharded, times(&[ranks, max_batch, dim, gathered])));
        array!(Activation, 1, send_scales: f32, only(sharded && self.gather_dtype == DType::F16, max_batch));
        array!(Activation, 1, units: f32, times(&[rows, pitch]));
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
        array!(Activation, 1, partial_sums: f32, times(&[self.column_tiles(), rows]));
        array!(Activation, 1, partial_best: f32, times(&[self.column_tiles(), rows]));
        if self.split_operands {
            // Both products read W^ as the same three planes.
            array!(Activation, 1, center_operand, center_wide: u16, times(&[planes, chunk, pitch]));
        } else {
            array!(Activation, 1, center_operand: u16, times(&[chunk, pitch]));
            array!(Activation, 1, center_wide: u16, times(&[chunk, pitch]));
        }
        array!(Activation, 1, center_inverse_norms: f32, sample);
        array!(Probability, 1, numerators: u16, times(&[planes, rows, chunk]));
        array!(Activation, 1, weighted_centers: f32, times(&[self.splits, rows, pitch]));
        array!(Activation, 1, sums: f32, only(sharded, 2 * labels + TOTALS as u64));
        array!(
            Activation,
            1,
            replicated_sums: f64,
            only(!sharded, REPLICATED_TOTALS as u64 + REPLICATED_SLOT as u64 * ranks)
        );
        array!(Activation, 1, gradient_send: f32, only(sharded, times(&[ranks, max_batch, dim])));
        array!(Activation, 1, gradient_recv: f32, times(&[max_batch, dim]));
        array!(Activation, 1, center_gradient: f32, center_gradient);
        array!(Activation, 1, squares: f32, rows);
        array!(Activation, 1, center_squares: f32, sample);
        array!(Weight, 1, centers: f32, master);
        array!(State, 1, momentum: f32, master);
        array!(State, 1, second_moment: f32, only(adamw, master));
        array!(State, 1, last_update: u32, only(dense, shard_rows));
        array!(Activation, 1, rule: Rule, 1);
        array!(State, 1, missed_updates: MissedUpdates, self.history_capacity);
        arrays
    }

    pub fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        for array in self.arrays() {
            let total = match array.purpose {
                Purpose::Weight => &mut memory.weight,
                Purpose::State => &mut memory.state,
                Purpose::Activation => &mut memory.activation,
                Purpose::Probability => &mut memory.probability,
            };
            *total = total.saturating_add(times(&[array.bytes, array.copies as u64]));
        }
        memory
    }

    /// Bytes beside W and the state: what the workspace limit is about.
    fn workspace(&self) -> u64 {
        let memory = self.memory();
        memory.activation.saturating_add(memory.probability)
    }

    /// A view with all sizes and no array.
    pub fn view(&self) -> HeadArrays {
        let HeadSpec { options, ranks, rank, shard } = &self.spec;
        // All of them were checked: rows and classes here, the rest by the options.
        let narrow = |count: u64| u32::try_from(count).expect("a size that was checked");
        HeadArrays {
            first_class: shard.first,
            num_classes: options.num_classes,
            seed: options.seed,
            ignore_label: options.ignore_label.unwrap_or(i64::MIN),
            plane_rows: self.row_capacity * self.depth_pitch,
            plane_centers: self.chunk_capacity * self.depth_pitch,
            plane_numerators: self.row_capacity.saturating_mul(self.chunk_capacity),
            margin: MarginSettings::from(&options.margin),
            optimizer: OptimizerSettings::new(&options.optimizer, options.row_update),
            ranks: *ranks,
            rank: *rank,
            max_batch: narrow(options.max_batch),
            label_capacity: narrow(self.label_capacity),
            row_capacity: narrow(self.row_capacity),
            dim: options.embedding_dim,
            depth_pitch: narrow(self.depth_pitch),
            master_pitch: narrow(self.master_pitch),
            shard_rows: narrow(shard.rows),
            sample_size: narrow(self.sample_size),
            sample_capacity: narrow(self.sample_capacity),
            chunk_capacity: narrow(self.chunk_capacity),
            column_tiles: narrow(self.column_tiles()),
            splits: narrow(self.splits),
            count_capacity: narrow(self.count_capacity),
            history_capacity: narrow(self.history_capacity),
            sharded: self.spec.is_sharded().into(),
            whole_shard: (self.sample_size == shard.rows).into(),
            split_operands: self.split_operands.into(),
            gather_dtype: self.gather_dtype as i32,
            ..HeadArrays::zeroed()
        }
    }

    /// Makes all arrays, zeroed in the order of `stream`, and the views of the two steps that may be under way.
    ///
    /// Errors: OUT_OF_MEMORY, naming the array; what was made before it is given back.
    pub fn allocate(&self, stream: &Stream) -> Result<Arrays> {
        let mut views = [self.view(); 2];
        let mut buffers = Vec::new();
        for array in self.arrays() {
            let mut data = std::ptr::null_mut();
            for (copy, view) in views.iter_mut().enumerate() {
                if copy < array.copies {
                    let bytes = usize::try_from(array.bytes).unwrap_or(usize::MAX);
                    let buffer = DeviceBuffer::<u8>::zeroed(stream, bytes, array.name)?;
                    data = buffer.as_mut_ptr();
                    buffers.push(buffer);
                }
                (array.place)(view, data);
            }
        }
        Ok(Arrays { views, buffers })
    }

    /// Makes those arrays anew that are of other sizes than the ones there are, zeroed in the order of `stream`. W and the state keep
    /// theirs, and so does what labels are sorted in. The views stay as they are: gives the ones with the new arrays, and the arrays
    /// that were replaced, which the old views still show.
    ///
    /// Errors: OUT_OF_MEMORY, naming the array; nothing is changed then.
    pub fn grow(&self, arrays: &mut Arrays, stream: &Stream) -> Result<([HeadArrays; 2], Vec<DeviceBuffer<u8>>)> {
        let mut views = [self.view(); 2];
        let (mut number, mut replaced) = (0, Vec::new());
        for array in self.arrays() {
            let mut data = std::ptr::null_mut();
            for (copy, view) in views.iter_mut().enumerate() {
                if copy < array.copies {
                    let there = &arrays.buffers[number];
                    data = there.as_mut_ptr();
                    if there.len() as u64 != array.bytes {
                        let bytes = usize::try_from(array.bytes).unwrap_or(usize::MAX);
                        let buffer = DeviceBuffer::zeroed(stream, bytes, array.name)?;
                        data = buffer.as_mut_ptr();
                        replaced.push((number, buffer));
                    }
                    number += 1;
                }
                (array.place)(view, data);
            }
        }
        let outgrown = replaced.into_iter().map(|(number, buffer)| std::mem::replace(&mut arrays.buffers[number], buffer));
        Ok((views, outgrown.collect()))
    }
}

/// As many parts of a chunk's columns as fill the GPU with blocks, each a tile of P @ W^ over its part.
pub(super) fn weighted_splits(row_capacity: u64, depth_pitch: u64, chunk: u64, multiprocessors: u32) -> u64 {
    let tiles = (row_capacity / TILE_ROWS) * depth_pitch.div_ceil(WEIGHTED_TILE);
    let slots = WEIGHTED_BLOCKS * u64::from(multiprocessors);
    (slots / tiles).clamp(1, chunk / TILE_COLUMNS)
}

/// A head's arrays, and where they are.
pub(crate) struct Arrays {
    pub views: [HeadArrays; 2],
    /// In the order of `Sizes::arrays`, each copy after the other.
    pub buffers: Vec<DeviceBuffer<u8>>,
}

impl HeadSpec {
    fn is_sharded(&self) -> bool {
        self.options.placement == Placement::Sharded
    }
}

macro_rules! first_of {
    ($first:ident $(, $more:ident)*) => {
        stringify!($first)
    };
}
use first_of;

/// What no memory holds stays more than any memory.
fn times(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product, &factor| product.saturating_mul(factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::margin::{Margin, MarginGradient};
    use crate::optimizer::{Adamw, Sgd};
    use crate::options::HeadOptions;
    use crate::shard::Shard;
    use crate::Status;

    const H200: Gpu = Gpu { multiprocessors: 132, free_memory: 140 << 30 };

    fn spec(classes: u64, batch: u64, change: impl FnOnce(&mut HeadOptions)) -> HeadSpec {
        let margin = Margin {
            scale: 64.0,
            m1: 1.0,
            m2: 0.5,
            m3: 0.0,
            interclass_filter: 0.0,
            gradient: MarginGradient::Exact,
            guard: false,
        };
        let mut options = HeadOptions {
            num_classes: classes,
            embedding_dim: 512,
            placement: Placement::Sharded,
            sample_rate: 1.0,
            seed: 1,
            max_batch: batch,
            margin,
            row_update: RowUpdate::Lazy,
            optimizer: Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-4 }),
            gradient_scale: 1.0,
            init_std: 0.01,
            ignore_label: None,
            precision: Precision::Auto,
            gather_dtype: None,
            workspace_limit: 0,
        };
        change(&mut options);
        let shard = options.shard(1, 0);
        HeadSpec { options, ranks: 1, rank: 0, shard }
    }

    fn bytes(sizes: &Sizes, name: &str) -> u64 {
        sizes.arrays().iter().find(|array| array.name == name).map_or(0, |array| array.bytes)
    }

    #[test]
    fn the_main_shapes_take_what_was_promised() {
        let sizes = Sizes::new(&spec(125_000, 4096, |_| ()), H200, 0).expect("sizes");
        assert!(sizes.keeps_probabilities());
        assert!(sizes.workspace() < 1_400_000_000, "{}", sizes.workspace());
        assert_eq!(sizes.memory().weight, 125_000 * 512 * 4);
        assert_eq!(sizes.memory().probability, 4096 * 125_056 * 2);
        assert_eq!((sizes.splits, sizes.column_tiles()), (2, 977));

        let tight = spec(125_000, 4096, |options| options.workspace_limit = 192_000_000);
        let sizes = Sizes::new(&tight, H200, 0).expect("sizes");
        assert_eq!(sizes.chunk_capacity, CHUNK);
        assert!(sizes.workspace() < 192_000_000, "{}", sizes.workspace());
    }

    #[test]
    fn chunks_shrink_with_the_limit_until_it_is_refused() {
        let mut last = u64::MAX;
        let mut limit = 2_000_000_000u64;
        let refused = loop {
            match Sizes::new(&spec(125_000, 1024, |options| options.workspace_limit = limit), H200, 0) {
                Ok(sizes) => {
                    assert!(sizes.workspace() <= limit && sizes.chunk_capacity <= last);
                    assert!(sizes.chunk_capacity.is_multiple_of(TILE_COLUMNS));
                    assert!(sizes.splits >= 1 && sizes.splits <= sizes.chunk_capacity / TILE_COLUMNS);
                    last = sizes.chunk_capacity;
                    limit = limit / 100 * 99;
                }
                Err(error) => break error,
            }
        };
        assert_eq!(refused.status, Status::InvalidArgument);
        let words: Vec<&str> = refused.message.split(' ').collect();
        let need: u64 = words[7].parse().expect("the need");
        // The need that it names is the least that is taken.
        let least = |limit| Sizes::new(&spec(125_000, 1024, |options| options.workspace_limit = limit), H200, 0);
        assert_eq!(least(need).expect("enough").chunk_capacity, TILE_COLUMNS);
        assert!(least(need - 1).is_err());
    }

    #[test]
    fn without_a_limit_it_is_what_the_gpu_has() {
        let weights = 2 * 125_000 * 512 * 4u64;
        let at = |free_memory| Sizes::new(&spec(125_000, 4096, |_| ()), Gpu { multiprocessors: 132, free_memory }, 0);
        assert!(at(weights + 2_000_000_000).expect("sizes").keeps_probabilities());
        assert_eq!(at(weights + 1_000_000_000).expect("sizes").chunk_capacity, CHUNK);
        // Nothing free: the allocation will say so.
        assert_eq!(at(0).expect("sizes").chunk_capacity, TILE_COLUMNS);
    }

    #[test]
    fn arrays_follow_the_options() {
        let sharded = Sizes::new(&spec(1000, 10, |_| ()), H200, 0).expect("sizes");
        assert_eq!((sharded.gather_dtype, sharded.row_capacity, sharded.sample_capacity), (DType::F16, 128, 1024));
        assert_eq!(bytes(&sharded, "embeddings_recv"), 10 * 512 * 2);
        assert_eq!(bytes(&sharded, "send_scales"), 10 * 4);
        assert_eq!(bytes(&sharded, "sums"), 4 * (20 + 4));
        for name in ["replicated_sums", "center_gradient", "second_moment", "last_update", "missed_updates"] {
            assert_eq!(bytes(&sharded, name), 0, "{name}");
        }
        let adamw = Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 });
        let replicated = spec(1000, 10, |options| {
            options.placement = Placement::Replicated;
            options.optimizer = adamw;
            options.row_update = RowUpdate::Dense;
            options.precision = Precision::F32;
            options.embedding_dim = 65;
            options.sample_rate = 0.1;
        });
        let replicated = Sizes::new(&replicated, H200, 0).expect("sizes");
        assert_eq!((replicated.depth_pitch, replicated.master_pitch, replicated.sample_size), (128, 68, 100));
        assert_eq!(replicated.sample_capacity, 128);
        assert_eq!(bytes(&replicated, "center_operand"), 3 * 128 * 128 * 2);
        assert_eq!(bytes(&replicated, "center_wide"), 0);
        assert_eq!(bytes(&replicated, "center_gradient"), 128 * 65 * 4);
        assert_eq!(bytes(&replicated, "second_moment"), 1000 * 68 * 4);
        assert_eq!(bytes(&replicated, "last_update"), 4000);
        for name in ["sums", "gradient_send", "embeddings_recv", "send_scales"] {
            assert_eq!(bytes(&replicated, name), 0, "{name}");
        }
        assert_eq!(bytes(&replicated, "replicated_sums"), 8 * 8);
        // What travels: as asked for, else as the products take it. Rows are scaled for f16 alone.
        for (precision, gather, dtype) in [
            (Precision::Auto, None, DType::F16),
            (Precision::Half, None, DType::F16),
            (Precision::F32, None, DType::F32),
            (Precision::F32, Some(DType::F16), DType::F16),
            (Precision::Half, Some(DType::F32), DType::F32),
            (Precision::Auto, Some(DType::Bf16), DType::Bf16),
        ] {
            let spec = spec(1000, 10, |options| (options.precision, options.gather_dtype) = (precision, gather));
            let sizes = Sizes::new(&spec, H200, 0).expect("sizes");
            assert_eq!(sizes.gather_dtype, dtype, "{precision:?} {gather:?}");
            assert_eq!(bytes(&sizes, "send_scales"), if dtype == DType::F16 { 40 } else { 0 }, "{precision:?} {gather:?}");
        }
        let more = Sizes::new(&replicated.spec, H200, 300).expect("sizes");
        assert_eq!(more.sample_capacity, 384);
    }

    #[test]
    fn every_pointer_of_the_view_has_an_array() {
        let sizes = Sizes::new(&spec(1000, 10, |options| options.precision = Precision::F32), H200, 0).expect("sizes");
        let mut view = sizes.view();
        let arrays = sizes.arrays();
        for (number, array) in arrays.iter().enumerate() {
            (array.place)(&mut view, (number + 1) as *mut u8);
        }
        let pointers = std::mem::offset_of!(HeadArrays, first_class) / 8;
        // SAFETY: the structure begins with as many pointers.
        let pointers = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&view).cast::<u64>(), pointers) };
        assert!(pointers.iter().all(|&pointer| pointer != 0), "{pointers:?}");
        // The three planes of W^ serve both products; all else is an array of its own.
        assert_eq!(view.center_wide, view.center_operand);
        assert_eq!(pointers.len(), arrays.len() + 1);
    }

    #[test]
    fn arrays_are_made_and_given_back() {
        use crate::device::cuda::driver::{Context, Priority};

        let turn = cuda_emulator::turn(1);
        // SAFETY: the default stream.
        let context = unsafe { Context::of(0, std::ptr::null_mut()) }.expect("GPU 0");
        let stream = Stream::new(&context, Priority::Least).expect("a stream");
        let before = context.free_memory().expect("a number");
        let gpu = Gpu { multiprocessors: context.multiprocessors().expect("a number"), free_memory: before };
        let spec = spec(1000, 10, |options| options.row_update = RowUpdate::Dense);
        let sizes = Sizes::new(&spec, gpu, 0).expect("sizes");
        let arrays = sizes.allocate(&stream).expect("memory");
        let [one, two] = arrays.views;
        // Each step has its own draft; the rest is shared.
        assert!(one.block != two.block && one.sample != two.sample && one.sort_keys[1] != two.sort_keys[1]);
        assert!(one.ledger == two.ledger && one.counts == two.counts && one.centers == two.centers);
        assert!(one.second_moment.is_null() && two.second_moment.is_null() && !one.last_update.is_null());
        let total: u64 = arrays.buffers.iter().map(|buffer| buffer.bytes() as u64).sum();
        assert_eq!(total, sizes.memory().total());
        drop(arrays);

        // Where one array is refused, those before it are given back.
        let huge = Sizes::new(&self::spec(400_000_000, 10, |_| ()), gpu, 0).expect("sizes");
        let refused = huge.allocate(&stream).map(|_| ()).expect_err("more than there is");
        assert_eq!(refused.status, Status::OutOfMemory);
        if turn.is_emulator() {
            assert_eq!(context.free_memory().expect("a number"), before);
        }
    }

    #[test]
    fn the_view_has_the_sizes() {
        let mut spec = spec(1001, 10, |options| options.sample_rate = 0.5);
        (spec.ranks, spec.rank, spec.shard) = (3, 1, Shard::of(1001, 3, 1));
        let view = Sizes::new(&spec, H200, 0).expect("sizes").view();
        assert_eq!((view.ranks, view.rank, view.max_batch, view.label_capacity, view.row_capacity), (3, 1, 10, 30, 128));
        assert_eq!((view.first_class, view.num_classes, view.shard_rows), (334, 1001, 334));
        assert_eq!((view.sample_size, view.sample_capacity, view.column_tiles, view.whole_shard), (167, 256, 2, 0));
        assert_eq!((view.plane_rows, view.plane_centers, view.plane_numerators), (128 * 512, 256 * 512, 128 * 256));
        assert_eq!((view.ignore_label, view.sharded, view.split_operands, view.gather_dtype), (i64::MIN, 1, 0, 2));
    }

    #[test]
    fn sizes_beyond_any_memory_do_not_wrap() {
        let huge = spec(u32::MAX.into(), 1 << 24, |options| options.embedding_dim = 1 << 16);
        assert_eq!(Sizes::new(&huge, H200, 0).expect_err("too many classes").status, Status::InvalidArgument);
        let large = spec(4_000_000_000, 1 << 24, |options| options.embedding_dim = 1 << 16);
        let sizes = Sizes::new(&large, H200, 0).expect("sizes");
        assert!(sizes.workspace() > 1 << 40 && sizes.chunk_capacity == TILE_COLUMNS);
    }
}
