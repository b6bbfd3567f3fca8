//! How much memory a head takes on a GPU: capacities, the chunk that fits the memory, the list of arrays, and their allocation.

mod allocation;
mod arrays;
mod capacities;
mod chunks;
#[cfg(test)]
mod tests;

use self::arrays::Array;
use super::context::GpuCapacity;
use super::driver::MemorySpace;
use super::products::LARGEST_DIM;
use super::shared_structs::{HeadArrays, MarginSettings, OptimizerSettings};
use crate::device::{HeadSpec, Memory};
use crate::matrix::DType;
use crate::options::{HeadOptions, Residency, RowUpdate};
use crate::{ensure, Result};

pub(super) use allocation::{HeadMemory, LargerArrays, Replaced};
pub(super) use capacities::{draw_counters, Capacities, DEPTH_MULTIPLE};
pub(super) use chunks::{weighted_splits, Chunks, LARGEST_CHUNK};

/// The sizes of a head's arrays.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    spec: HeadSpec,
    pub capacities: Capacities,
    pub chunks: Chunks,
}

/// Multiprocessors of the GPU that is planned for: an H100 or H200.
const PLANNED_MULTIPROCESSORS: u32 = 132;

/// Refuses the options that no CUDA device takes.
pub(super) fn check_options(options: &HeadOptions) -> Result<()> {
    ensure!(
        options.embedding_dim <= LARGEST_DIM,
        Unsupported,
        "embedding_dim must be 1 to {LARGEST_DIM} on the CUDA device, got {}",
        options.embedding_dim
    );
    let residency = !options.residency.is_file();
    ensure!(residency, Unsupported, "residency must be device or host on the CUDA device in this version, got file");
    Ok(())
}

/// What a head takes, on the rank that owns most, with a GPU that has so many bytes for it; and how many of these bytes are in the host's
/// memory.
pub(crate) fn memory_needed(options: &HeadOptions, ranks: u32, free_memory: u64) -> Result<(Memory, u64)> {
    check_options(options)?;
    let spec = HeadSpec { options: options.clone(), ranks, rank: 0, shard: options.shard(ranks, 0), successor: false };
    let sizes = Sizes::new(&spec, GpuCapacity { multiprocessors: PLANNED_MULTIPROCESSORS, free_memory }, 0)?;
    Ok((sizes.memory(), sizes.host_bytes()))
}

/// Whether the center gradient's kernel updates the rows; otherwise it writes their gradient, and another kernel updates them.
pub(super) fn fuses_update(spec: &HeadSpec) -> bool {
    let options = &spec.options;
    let in_float32 = options.weight_dtype == DType::F32 && options.state_dtype == DType::F32;
    // A row in the host's memory moves at once, whole; the product writes tiles, 32 bytes of a row at a time.
    let on_device = options.residency == Residency::Device;
    spec.is_sharded() && options.row_update == RowUpdate::Lazy && in_float32 && on_device
}

impl Sizes {
    /// For samples of `int(rate * rows)` classes, of all positives, and of `least_sample`.
    ///
    /// P is kept where it fits into the workspace limit (0: three quarters of the memory that W and the state leave free); else it
    /// is computed twice, by chunks.
    ///
    /// Errors: INVALID_ARGUMENT, for a limit that leaves no room for one tile of columns, naming the need; or for more rows than
    /// are numbered in 32 bits.
    pub fn new(spec: &HeadSpec, gpu: GpuCapacity, least_sample: u64) -> Result<Sizes> {
        let capacities = Capacities::new(spec, least_sample)?;
        let of = |columns: u64| Chunks::of(columns, capacities.rows, capacities.depth_pitch, gpu);
        let mut sizes = Sizes { spec: spec.clone(), chunks: of(capacities.sample), capacities: capacities.clone() };
        let limit = spec.options.workspace_limit;
        let available = match limit {
            0 => gpu.free_memory.saturating_sub(sizes.kept_on_device()) / 4 * 3,
            limit => limit,
        };
        for columns in chunks::chunk_sizes(capacities.sample) {
            sizes.chunks = of(columns);
            if sizes.workspace() <= available {
                return Ok(sizes);
            }
        }
        // Without a limit the allocation itself says what is missing; and a caller's own sample goes before the limit.
        ensure!(
            limit == 0 || least_sample > 0,
            InvalidArgument,
            "workspace_limit must be 0 or at least {} bytes for batches of {} rows on {} ranks of dimension {}, got {limit}",
            sizes.workspace(),
            spec.options.max_batch,
            spec.ranks,
            spec.options.embedding_dim
        );
        Ok(sizes)
    }

    /// Whether P is kept from the forward to the backward.
    pub fn keeps_probabilities(&self) -> bool {
        self.chunks.columns == self.capacities.sample
    }

    fn list(&self) -> Vec<Array> {
        let mut list = Vec::new();
        arrays::each(&self.spec, &self.capacities, self.chunks, &mut |array| list.push(array));
        list
    }

    /// Without a list: a plan is to be had where memory is short.
    pub fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        arrays::each(&self.spec, &self.capacities, self.chunks, &mut |array| array.count_into(&mut memory));
        memory
    }

    /// The memory that an array is in.
    fn space(&self, array: &Array) -> MemorySpace {
        match self.spec.options.residency == Residency::Host && array.has_rows() {
            true => MemorySpace::Host,
            false => MemorySpace::Device,
        }
    }

    /// Bytes in the host's memory.
    pub fn host_bytes(&self) -> u64 {
        let mut bytes = 0u64;
        arrays::each(&self.spec, &self.capacities, self.chunks, &mut |array| {
            if self.space(&array) == MemorySpace::Host {
                bytes = bytes.saturating_add(array.all_bytes());
            }
        });
        bytes
    }

    /// Bytes of W and the state in the GPU's memory.
    pub fn kept_on_device(&self) -> u64 {
        let memory = self.memory();
        memory.weight.saturating_add(memory.state).saturating_sub(self.host_bytes())
    }

    /// Bytes beside W and the state, which the workspace limit is about.
    fn workspace(&self) -> u64 {
        let memory = self.memory();
        memory.activation.saturating_add(memory.probability)
    }

    /// All sizes, without pointers.
    fn head_arrays(&self) -> HeadArrays {
        let Sizes { spec: HeadSpec { options, ranks, rank, shard, .. }, capacities, chunks } = self;
        // All of them were checked: rows and classes here, the rest by the options.
        let narrow = |count: u64| u32::try_from(count).expect("a size that was checked");
        HeadArrays {
            first_class: shard.first,
            num_classes: options.num_classes,
            seed: options.seed,
            ignore_label: options.ignore_label.unwrap_or(i64::MIN),
            plane_rows: capacities.rows * capacities.depth_pitch,
            plane_centers: chunks.columns * capacities.depth_pitch,
            plane_numerators: capacities.rows.saturating_mul(chunks.columns),
            margin: MarginSettings::from(&options.margin),
            optimizer: OptimizerSettings::new(&options.optimizer, options.row_update),
            ranks: *ranks,
            rank: *rank,
            max_batch: narrow(options.max_batch),
            label_capacity: narrow(capacities.labels),
            row_capacity: narrow(capacities.rows),
            dim: options.embedding_dim,
            depth_pitch: narrow(capacities.depth_pitch),
            master_pitch: narrow(capacities.master_pitch),
            shard_rows: narrow(shard.rows),
            sample_size: narrow(capacities.sample_size),
            block_shift: options.sample_block.trailing_zeros(),
            sample_capacity: narrow(capacities.sample),
            chunk_capacity: narrow(chunks.columns),
            column_tiles: narrow(capacities.column_tiles()),
            splits: narrow(chunks.splits),
            count_capacity: narrow(capacities.counts),
            history_capacity: narrow(capacities.history),
            sharded: self.spec.is_sharded().into(),
            whole_shard: (capacities.sample_size == shard.rows).into(),
            split_operands: capacities.split_operands.into(),
            gather_dtype: capacities.gather_dtype as i32,
            ..HeadArrays::zeroed()
        }
    }
}
