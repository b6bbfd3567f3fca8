//! Some rows of a shard.

use crate::memory::Buffer;
use crate::Result;

pub(super) struct RowSet {
    /// A bit for each row of the shard.
    bits: Buffer<u64>,
    count: usize,
}

impl RowSet {
    /// None of `rows`.
    pub fn none_of(rows: usize) -> Result<RowSet> {
        Ok(RowSet { bits: Buffer::zeroed(rows.div_ceil(64), "the map of rows that are not at their start any more")?, count: 0 })
    }

    /// Bytes of memory for as many rows.
    pub fn bytes(rows: u64) -> u64 {
        8 * rows.div_ceil(64)
    }

    pub fn has(&self, row: usize) -> bool {
        self.bits[row / 64] >> (row % 64) & 1 != 0
    }

    pub fn add(&mut self, row: usize) {
        self.count += usize::from(!self.has(row));
        self.bits[row / 64] |= 1 << (row % 64);
    }

    /// How many rows it has.
    pub fn count(&self) -> usize {
        self.count
    }
}
