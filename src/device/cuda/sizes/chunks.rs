//! How the sample is divided into chunks, and a chunk into splits.

use crate::device::cuda::context::GpuCapacity;
use crate::device::cuda::shared_structs::{TILE_COLUMNS, TILE_ROWS};

/// The most columns of a chunk where P is not kept: 69 MB of P at 4096 rows, and 66 tiles, which outnumber the multiprocessors'
/// half.
pub(in crate::device::cuda) const LARGEST_CHUNK: u64 = 8448;
/// Columns of a tile of P @ W^, along d.
const WEIGHTED_TILE: u64 = 128;
/// Blocks of P @ W^ that a multiprocessor holds.
const WEIGHTED_BLOCKS: u64 = 2;

/// Splits that are tried where the tiles alone fill the GPU.
const MOST_SPLITS_OF_A_FULL_GPU: u64 = 16;
/// The columns whose products take as long as a split's sums, 8 bytes an element written and read: a GPU does about 160 FLOP by
/// mma.sync in the time of a byte (A100: 250 TFLOP/s, 1.6 TB/s), and a column is 2 FLOP an element.
const SPLIT_COLUMNS: u64 = 8 * 160 / 2;

/// Columns that are handled at once, and into how many ordered sums P @ W^ splits them.
#[derive(Clone, Copy, Debug)]
pub(in crate::device::cuda) struct Chunks {
    pub columns: u64,
    pub splits: u64,
}

impl Chunks {
    pub fn of(columns: u64, rows: u64, depth_pitch: u64, gpu: GpuCapacity) -> Chunks {
        Chunks { columns, splits: weighted_splits(rows, depth_pitch, columns, gpu.multiprocessors) }
    }
}

/// The sizes of chunks to try, largest first: the whole sample, then the multiples of a tile.
pub(super) fn chunk_sizes(sample: u64) -> impl Iterator<Item = u64> {
    std::iter::once(sample).chain((1..=LARGEST_CHUNK.min(sample) / TILE_COLUMNS).rev().map(|tiles| tiles * TILE_COLUMNS))
}

/// The number of splits of a chunk's columns. A block takes a tile of P @ W^ over a split; blocks run in waves, and the last one should
/// be as full as the others. Each split costs the bytes of its sums, so the fewest that do this are taken.
pub(in crate::device::cuda) fn weighted_splits(rows: u64, depth_pitch: u64, chunk: u64, multiprocessors: u32) -> u64 {
    let tiles = (rows / TILE_ROWS) * depth_pitch.div_ceil(WEIGHTED_TILE);
    let slots = WEIGHTED_BLOCKS * u64::from(multiprocessors);
    let most = slots.div_ceil(tiles).max(MOST_SPLITS_OF_A_FULL_GPU).min(chunk / TILE_COLUMNS);
    // In columns of all tiles' products by a full GPU. A split has whole tiles of columns, the last one what is left.
    let cost = |splits: u64| {
        let share = (chunk / TILE_COLUMNS).div_ceil(splits) * TILE_COLUMNS;
        let waves = (tiles * splits).div_ceil(slots);
        (share * waves * slots) as f64 / tiles as f64 + (SPLIT_COLUMNS * splits) as f64
    };
    (2..=most).fold(1, |best, splits| if cost(splits) < cost(best) { splits } else { best })
}
