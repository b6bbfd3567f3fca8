//! Reads a head's sample, figures and rows, and overwrites rows.

use super::super::shared_structs::StepBlock;
use super::super::staging;
use super::super::streams::StreamRole;
use super::{run, CudaHead};
use crate::device::tensor_rows::check_row;
use crate::device::{StepFigures, TensorRows};
use crate::optimizer::StateTensor;
use crate::{ensure, error, Result};

impl CudaHead {
    pub(super) fn listed_ids(&self) -> Result<Vec<i64>> {
        // After the last kernel that writes the block.
        self.streams.join(StreamRole::Centers, StreamRole::Main)?;
        let (arrays, role) = match self.next_has_labels {
            true => (self.memory.arrays[self.next()], StreamRole::Draw),
            false => (self.arrays(), StreamRole::Centers),
        };
        let stream = self.streams.of(role);
        let block: StepBlock = staging::fetch(stream, arrays.block, 1)?[0];
        let classes: Vec<u32> = staging::fetch(stream, arrays.sample, block.classes as usize)?;
        Ok(classes.into_iter().map(|class| self.spec.shard.first as i64 + i64::from(class)).collect())
    }

    pub(super) fn step_figures(&mut self) -> Result<StepFigures> {
        self.pending_error()?;
        self.join(StreamRole::Main, StreamRole::Centers);
        let arrays = self.arrays();
        for (which, has_squares) in [0i32, 1].into_iter().zip(std::mem::take(&mut self.has_squares)) {
            if has_squares {
                run!(self, Main, sum_squares, (arrays, which));
            }
        }
        self.pending_error()?;
        self.read_block()?;
        let block = self.block;
        let rows = block.rows as usize;
        let stream = &self.gpu.stream;
        let ledger = self.ledger()?;
        Ok(StepFigures {
            updates: ledger.updates,
            skipped_updates: ledger.skipped,
            rows: block.global_rows.into(),
            valid_rows: block.valid_rows,
            sample_size: block.classes.into(),
            loss: block.loss,
            target_cosines: block.target_cosines,
            best_negatives: staging::fetch(stream, arrays.best_negatives, rows)?,
            own_target_cosines: staging::fetch(stream, arrays.target_cosines, rows)?,
            grad_embeddings: block.grad_embeddings,
            grad_centers: block.grad_centers,
        })
    }

    pub(super) fn fetch_rows(&self, first: u64, &TensorRows { tensor, ref rows }: &TensorRows) -> Result<()> {
        self.check_state(tensor)?;
        self.streams.join(StreamRole::Main, StreamRole::Centers)?;
        // Some rows at a time: a GPU may have no memory for a second copy of a shard.
        let count = self.rows_at_once();
        for start in (0..rows.rows).step_by(count) {
            let some = staging::some_rows(rows, start, count);
            let output = self.staging.borrow_mut().output(&self.gpu.stream, "rows", &some)?;
            let (arrays, tensor, first) = (self.arrays(), tensor as i32, (first as usize + start) as u32);
            self.gpu.run(&self.gpu.entries.read_rows, (arrays, tensor, first, output))?;
            self.staging.borrow().download(&self.gpu.stream, &some, &output)?;
        }
        Ok(())
    }

    pub(super) fn put_rows(&mut self, first: u64, tensors: &[TensorRows]) -> Result<()> {
        tensors.iter().try_for_each(|given| self.check_values(first, given))?;
        for (number, given) in tensors.iter().enumerate() {
            // Rows with some tensors written and others not are not those of any step.
            let alone = number == 0 || self.spec.successor;
            self.put_checked_rows(first, given).map_err(|error| match alone {
                true => error,
                false => error!(Device, "some tensors of these rows were written, the others were not: {error}"),
            })?;
        }
        Ok(())
    }

    /// Refuses rows that cannot be stored.
    fn check_values(&self, first: u64, &TensorRows { tensor, ref rows }: &TensorRows) -> Result<()> {
        self.check_state(tensor)?;
        let (dtype, class) = (self.spec.options.stored_dtype(tensor), self.spec.shard.first + first);
        staging::for_each_row(&self.gpu.stream, "rows", rows, |row, values| {
            check_row(tensor, dtype, row, class + row as u64, values)
        })
    }

    fn put_checked_rows(&mut self, first: u64, &TensorRows { tensor, ref rows }: &TensorRows) -> Result<()> {
        self.join(StreamRole::Main, StreamRole::Centers);
        let next = self.next();
        self.drafts[next].gathered = false;
        let count = self.rows_at_once();
        for start in (0..rows.rows).step_by(count) {
            let some = staging::some_rows(rows, start, count);
            let uploaded = self.staging.borrow_mut().upload(&self.gpu.stream, "rows", &some);
            let source = match uploaded {
                Err(error) if start > 0 && !self.spec.successor => {
                    // A head with some rows written and others not must not go on.
                    let (from, last) = (self.spec.shard.first + first, self.spec.shard.first + first + start as u64 - 1);
                    return Err(error!(Device, "classes {from} to {last} were written, the later ones were not: {error}"));
                }
                uploaded => uploaded?,
            };
            let (arrays, tensor, first) = (self.arrays(), tensor as i32, (first as usize + start) as u32);
            run!(self, Main, write_rows, (arrays, tensor, first, source));
        }
        self.pending_error()?;
        self.gpu.stream.synchronize()
    }

    /// Updates done by steps that did not fail: the host counts those that it has enqueued. Afterwards it has the same count, so that its
    /// sweeps of dense rows, none of which is behind, come when those of a head do that is loaded from here.
    pub(super) fn applied_updates(&mut self) -> Result<u64> {
        self.pending_error()?;
        self.join(StreamRole::Main, StreamRole::Centers);
        let ledger = self.ledger()?;
        self.check_rows(&ledger)?;
        self.updates = ledger.updates;
        Ok(ledger.updates)
    }

    /// Brings every dense row to now.
    pub(super) fn catch_up_all(&mut self) -> Result<()> {
        if self.dense() {
            let (arrays, all, next) = (self.arrays(), u64::MAX, self.next());
            run!(self, Centers, catch_up_rows, (arrays, all));
            // Rows in bf16 are rounded by that: what was gathered of them is stale.
            self.drafts[next].gathered = false;
        }
        self.pending_error()
    }

    /// Takes the rows as those after update `updates`.
    pub(super) fn restore_updates(&mut self, updates: u64) -> Result<()> {
        let (arrays, next) = (self.arrays(), self.next());
        self.drafts[next].gathered = false;
        (self.updates, self.step_in_progress) = (updates, false);
        run!(self, Centers, set_updates, (arrays, updates));
        self.pending_error()?;
        self.join(StreamRole::Main, StreamRole::Centers);
        self.gpu.stream.synchronize()
    }

    fn check_state(&self, tensor: StateTensor) -> Result<()> {
        ensure!(
            tensor != StateTensor::SecondMoment || self.spec.options.optimizer.state_tensors() > 1,
            InvalidArgument,
            "tensor must not be the second moment: this head's optimizer has none"
        );
        Ok(())
    }

    /// Rows that are copied at a time.
    fn rows_at_once(&self) -> usize {
        (staging::COPIED_BYTES / (4 * self.dim())).max(1)
    }
}
