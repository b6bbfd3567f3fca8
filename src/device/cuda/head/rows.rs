//! What a head tells of its rows and of its last step, and rows that are put in their place.

use super::super::driver::Grid;
use super::super::kernels::BLOCK;
use super::super::lanes::Lane;
use super::super::shared_structs::{Ledger, StepBlock};
use super::super::staging;
use super::{run, CudaHead};
use crate::device::StepFigures;
use crate::matrix::Matrix;
use crate::optimizer::StateTensor;
use crate::{ensure, error, Result};

impl CudaHead {
    pub(super) fn listed_ids(&self) -> Result<Vec<i64>> {
        // After whoever writes the block last.
        self.lanes.join(Lane::Centers, Lane::Main)?;
        let (view, lane) = match self.drafted {
            true => (self.arrays.views[self.next()], Lane::Draw),
            false => (self.view(), Lane::Centers),
        };
        let stream = self.lanes.of(lane);
        let block: StepBlock = staging::fetch(stream, view.block, 1)?[0];
        let classes: Vec<u32> = staging::fetch(stream, view.sample, block.classes as usize)?;
        Ok(classes.into_iter().map(|class| self.spec.shard.first as i64 + i64::from(class)).collect())
    }

    pub(super) fn step_figures(&mut self) -> Result<StepFigures> {
        self.settled()?;
        self.join(Lane::Main, Lane::Centers);
        self.read_block()?;
        let (view, block) = (self.view(), self.block);
        let rows = block.rows as usize;
        let stream = &self.cuda.stream;
        let ledger: Ledger = staging::fetch(stream, view.ledger, 1)?[0];
        Ok(StepFigures {
            updates: ledger.updates,
            rows: block.global_rows.into(),
            valid_rows: block.valid_rows,
            sample_size: block.classes.into(),
            loss: block.loss,
            target_cosines: block.target_cosines,
            best_negatives: staging::fetch(stream, view.best_negatives, rows)?,
            own_target_cosines: staging::fetch(stream, view.target_cosines, rows)?,
            grad_embeddings: block.grad_embeddings,
            grad_centers: block.grad_centers,
        })
    }

    pub(super) fn fetch_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        self.lanes.join(Lane::Main, Lane::Centers)?;
        // A piece at a time: a whole shard has no room beside itself.
        let piece = self.rows_a_piece();
        for start in (0..rows.rows).step_by(piece) {
            let part = staging::part_of(rows, start, piece);
            let target = self.staging.borrow_mut().target(&self.cuda.stream, "rows", &part)?;
            let (view, tensor, first) = (self.view(), tensor as i32, (first as usize + start) as u32);
            let grid = Grid::of(self.cuda.grid(4), BLOCK);
            // SAFETY: the head's own arrays, and a target of as many rows.
            unsafe { self.cuda.kernels.read_rows.launch(&self.cuda.stream, grid, (view, tensor, first, target)) }?;
            self.staging.borrow().download(&self.cuda.stream, &target, &part)?;
        }
        Ok(())
    }

    pub(super) fn put_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        if let Some(row) = staging::not_finite(&self.cuda.stream, "rows", rows)? {
            let class = self.spec.shard.first + first + row as u64;
            return Err(error!(InvalidArgument, "row {row} (class {class}) contains a NaN or an infinity"));
        }
        self.join(Lane::Main, Lane::Centers);
        let next = self.next();
        self.drafts[next].gathered = false;
        let piece = self.rows_a_piece();
        for start in (0..rows.rows).step_by(piece) {
            let part = staging::part_of(rows, start, piece);
            let uploaded = self.staging.borrow_mut().upload(&self.cuda.stream, "rows", &part);
            let source = match uploaded {
                Err(error) if start > 0 => {
                    // A head with rows half written is not to go on.
                    let (from, last) = (self.spec.shard.first + first, self.spec.shard.first + first + start as u64 - 1);
                    return Err(error!(Device, "classes {from} to {last} were written, the later ones were not: {error}"));
                }
                uploaded => uploaded?,
            };
            let (view, tensor, first) = (self.view(), tensor as i32, (first as usize + start) as u32);
            run!(self, Main, write_rows, self.cuda.grid(4), BLOCK, (view, tensor, first, source));
        }
        self.settled()?;
        self.cuda.stream.synchronize()
    }

    fn check_state(&self, tensor: StateTensor) -> Result<()> {
        ensure!(
            tensor != StateTensor::SecondMoment || self.spec.options.optimizer.state_tensors() > 1,
            InvalidArgument,
            "tensor must not be the second moment: this head's optimizer has none"
        );
        Ok(())
    }

    /// Rows that go at a time.
    fn rows_a_piece(&self) -> usize {
        (staging::PIECE / (4 * self.dim())).max(1)
    }
}
