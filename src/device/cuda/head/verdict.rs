//! What the device says of a step that came to nothing.

use std::mem::size_of;

use super::super::shared_structs::{fault, Ledger, StepBlock};
use super::super::staging;
use super::CudaHead;
use crate::{error, protocol, Error, Result};

impl CudaHead {
    /// What a block says went wrong.
    pub(super) fn fault(&self, block: &StepBlock) -> Result<()> {
        let (rank, row) = (block.rank.max(0) as usize, block.row as usize);
        Err(match block.fault {
            fault::NONE => return Ok(()),
            fault::REMOTE | fault::SUMS => Error::remote(rank, block.value),
            fault::OUT_OF_STEP => protocol::ranks_out_of_step(block.detail, rank),
            fault::LABEL => protocol::bad_label(block.value, row, rank, self.spec.options.num_classes),
            fault::EMBEDDING => protocol::bad_embedding(row, rank),
            fault::SUM => protocol::bad_sum(row, rank),
            fault::FORWARD => match protocol::judge_errors(block.value as f32, self.spec.rank as usize) {
                Err(error) => error,
                Ok(()) => error!(Device, "the device reports a failed forward, but no rank that failed"),
            },
            fault::SAMPLES => protocol::samples_differ(rank),
            other => error!(Device, "the device reports a fault of kind {other}"),
        })
    }

    /// Counts the failed steps from 0 again.
    pub(super) fn forgive(&self) -> Result<()> {
        let failed = self.view().ledger.cast::<u8>().wrapping_add(std::mem::offset_of!(Ledger, failed));
        // SAFETY: the head's own ledger.
        unsafe { self.cuda.stream.fill(failed.cast(), 0, size_of::<u64>()) }
    }

    /// Counts the step that just failed no more; those before it, with their losses on the device, are still to be told.
    pub(super) fn forgive_last(&mut self) -> Result<()> {
        let step = self.drafts[self.current].step;
        if self.told.as_ref().is_some_and(|(told, _)| *told == step) {
            self.told = None;
        }
        let ledger: Ledger = staging::fetch(&self.cuda.stream, self.view().ledger, 1)?[0];
        if ledger.failed <= 1 {
            return self.forgive();
        }
        let (failed, left) = (std::mem::offset_of!(Ledger, failed), ledger.failed - 1);
        let target = self.view().ledger.cast::<u8>().wrapping_add(failed);
        // SAFETY: the head's own ledger; the driver has copied pageable memory away when it returns.
        unsafe { self.cuda.stream.upload(target.cast(), std::ptr::from_ref(&left).cast(), size_of::<u64>()) }
    }
}
