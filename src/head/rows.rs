//! The shard's class centers and their optimizer state, and the ids of samples, as callers read and write them.

use super::{CallState, Head};
use crate::device::Labels;
use crate::matrix::Matrix;
use crate::optimizer::StateTensor;
use crate::{ensure, error, Result};

impl Head {
    /// The ids that the next sample consists of; see `pfc_head_set_sample`.
    pub fn set_sample(&mut self, ids: Labels) -> Result<()> {
        self.check_usable()?;
        // SAFETY: the caller of the head's entry gave this many.
        let ids = unsafe { self.read_values("ids", ids.data, ids.count) };
        let ids = self.poison_unless_recoverable(ids)?;
        self.check_chosen(&ids)?;
        self.chosen = Some(ids);
        Ok(())
    }

    /// The ids of the last sample.
    pub fn sample_ids(&self) -> Result<Vec<i64>> {
        self.check_usable()?;
        ensure!(
            self.draws > 0,
            InvalidArgument,
            "pfc_head_sample_ids must come after pfc_head_prepare or pfc_head_forward (rank {})",
            self.rank()
        );
        self.prefer_comm_failure(self.backend.sample_ids())
    }

    /// Reads rows of the shard into a host matrix.
    pub fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_usable()?;
        let first = self.row_range(first, rows)?;
        self.prefer_comm_failure(self.backend.read_rows(tensor, first, rows))
    }

    /// Overwrites rows of the shard; abandons a step between forward and update.
    pub fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_usable()?;
        let first = self.row_range(first, rows)?;
        // What fails before the first row is written leaves a step under way alone, what fails later poisons the head.
        let written = self.backend.write_rows(tensor, first, rows);
        self.poison_unless_recoverable(written)?;
        self.state = CallState::Idle;
        Ok(())
    }

    /// Ascending ids of the shard, without repeats.
    fn check_chosen(&self, ids: &[i64]) -> Result<()> {
        let (rank, shard) = (self.rank(), self.shard);
        for (i, &id) in ids.iter().enumerate() {
            ensure!(
                shard.contains(id),
                InvalidArgument,
                "ids[{i}] must be in the shard, {} to {}, got {id} (rank {rank})",
                shard.first,
                shard.end() as i64 - 1
            );
            let previous = if i == 0 { None } else { Some(ids[i - 1]) };
            if let Some(previous) = previous.filter(|&previous| previous >= id) {
                return Err(error!(InvalidArgument, "ids must ascend: ids[{i}] is {id} after {previous} (rank {rank})"));
            }
        }
        Ok(())
    }

    /// Where in the shard a range of class ids begins.
    fn row_range(&self, first: u64, rows: &Matrix) -> Result<u64> {
        let (shard, count) = (self.shard, rows.rows as u64);
        ensure!(
            first >= shard.first && first.checked_add(count).is_some_and(|end| end <= shard.end()),
            InvalidArgument,
            "classes must be in the shard, {} to {}, got {first} to {} (rank {})",
            shard.first,
            shard.end() as i128 - 1,
            first as i128 + count as i128 - 1,
            self.rank()
        );
        Ok(first - shard.first)
    }
}
