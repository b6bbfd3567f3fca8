//! The shard's class centers and their optimizer state, how far they are, and the ids of samples, as callers read and write them.

use super::{CallState, Head, Progress};
use crate::device::{Labels, TensorRows};
use crate::matrix::Matrix;
use crate::memory::zeros;
use crate::optimizer::StateTensor;
use crate::options::{Placement, RowUpdate};
use crate::{ensure, error, Result};

/// Bytes of rows that are compared at a time.
const DIGESTED_BYTES: usize = 1 << 20;

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
            self.has_sample,
            InvalidArgument,
            "pfc_head_sample_ids must come after pfc_head_prepare or pfc_head_forward (rank {})",
            self.rank()
        );
        self.prefer_comm_failure(self.backend.sample_ids())
    }

    /// Reads rows of the shard into a host matrix.
    pub fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_readable()?;
        let first = self.row_range(first, rows)?;
        let read = self.backend.read_rows(first, &[TensorRows { tensor, rows: *rows }]);
        // What ended the communicator of a poisoned head is known, and the rows are not the worse for it.
        if self.poisoned.is_some() {
            return read;
        }
        self.prefer_comm_failure(read)
    }

    /// How far the head is; see `pfc_head_read_progress`.
    pub fn read_progress(&mut self) -> Result<Progress> {
        self.check_readable()?;
        // Dense rows then hold their values by themselves: who writes them into another head needs no learning rates of the past.
        let updates = self.backend.catch_up().and_then(|()| self.backend.updates());
        let updates = match &mut self.poisoned {
            Some(poison) => {
                poison.whole_rows &= updates.is_ok();
                updates
            }
            None => self.poison_unless_recoverable(updates),
        }?;
        self.announce_caught_up(updates);
        // The sample of a prepared step is drawn again by who goes on from here.
        Ok(Progress { draws: self.draws - u64::from(self.prepared.is_some()), updates })
    }

    /// Goes on from another head's progress; see `pfc_head_write_progress`.
    pub fn write_progress(&mut self, progress: Progress) -> Result<()> {
        self.check_usable()?;
        let Progress { draws, updates } = progress;
        let rank = self.rank();
        // The counter of the random numbers has 56 bits for the draw, a row's last update 32 on a GPU.
        ensure!(draws < 1 << 56, InvalidArgument, "draws must be below 2^56, got {draws} (rank {rank})");
        ensure!(updates < 1 << 32, InvalidArgument, "updates must be below 2^32, got {updates} (rank {rank})");
        let written = self.backend.catch_up().and_then(|()| self.backend.set_updates(updates));
        self.poison_unless_recoverable(written)?;
        self.announce_caught_up(updates);
        self.drop_accumulated();
        (self.draws, self.updates) = (draws, updates);
        (self.state, self.prepared) = (CallState::Idle, None);
        Ok(())
    }

    /// Overwrites rows of the shard; abandons a step between forward and update.
    pub fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_usable()?;
        let first = self.row_range(first, rows)?;
        let before = self.digest_rows(tensor, first, rows.rows)?;
        // What fails before the first row is written leaves a step under way alone, what fails later poisons the head.
        let written = self.backend.write_rows(first, &[TensorRows { tensor, rows: *rows }]);
        self.poison_unless_recoverable(written)?;
        self.state = CallState::Idle;
        self.drop_accumulated();
        let after = self.digest_rows(tensor, first, rows.rows);
        // The rows are new, and what tells the other ranks so is not known.
        let after = after.inspect_err(|error| self.poison_before_update(error))?;
        self.written_rows = self.written_rows.wrapping_add(after.wrapping_sub(before));
        Ok(())
    }

    /// Dense rows that are brought to now in two goes round twice: replicas of which one has done so differ in their last bits.
    fn announce_caught_up(&mut self, updates: u64) {
        let replicated = self.options.placement == Placement::Replicated && self.comm.size() > 1;
        if replicated && self.options.row_update == RowUpdate::Dense {
            self.written_rows = mix(self.written_rows, updates);
        }
    }

    /// A number that rows of a replicated head share with those of other ranks only if they are equal, but for a chance of 2^-64: the
    /// sum over the rows, so that it does not matter in which pieces they are written. 0 where ranks do not have the same rows.
    fn digest_rows(&self, tensor: StateTensor, first: u64, count: usize) -> Result<u64> {
        if self.options.placement == Placement::Sharded || self.comm.size() == 1 {
            return Ok(0);
        }
        let dim = self.options.embedding_dim as usize;
        let at_once = (DIGESTED_BYTES / (4 * dim)).max(1);
        let mut values = zeros(&[at_once.min(count), dim], "rows to compare")?;
        let mut sum = 0u64;
        for start in (0..count).step_by(at_once) {
            let rows = at_once.min(count - start);
            let some = TensorRows { tensor, rows: Matrix::of_f32(&mut values[..rows * dim], rows, dim) };
            self.backend.read_rows(first + start as u64, &[some])?;
            for (row, values) in values[..rows * dim].chunks_exact(dim).enumerate() {
                let seed = (first + (start + row) as u64).wrapping_mul(4).wrapping_add(tensor as u64);
                let digest = values.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, value| mix(hash, value.to_bits().into()));
                sum = sum.wrapping_add(digest);
            }
        }
        Ok(sum)
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

/// One step of a hash.
fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}
