//! How much memory a head takes, as every device counts it.

use crate::options::HeadOptions;
use crate::sample::sample_size;
use crate::shard::Shard;

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub weight: u64,
    pub state: u64,
    pub activation: u64,
    pub probability: u64,
}

impl Memory {
    pub fn total(&self) -> u64 {
        self.weight.saturating_add(self.state).saturating_add(self.activation).saturating_add(self.probability)
    }
}

/// S_max = min(rows, max(int(rate * rows), N * max_batch)).
pub(crate) fn sample_capacity(options: &HeadOptions, ranks: u32, shard: Shard) -> u64 {
    sample_size(options.sample_rate, shard.rows).max(u64::from(ranks) * options.max_batch).min(shard.rows)
}
