//! Why a step failed, as the device reports it.

use super::super::shared_structs::{fault, Ledger, StepBlock, NONE};
use super::super::staging;
use super::CudaHead;
use crate::row_terms::RowTerm;
use crate::{error, protocol, Error, Result};

/// A failure of this rank's own that a call has returned.
pub(super) struct ReportedFailure {
    pub step: u64,
    pub error: Error,
}

impl CudaHead {
    /// Waits for the step's block.
    pub(super) fn read_block(&mut self) -> Result<()> {
        let block = self.arrays().block;
        // SAFETY: a block on the device; the verdict lives as long as the head and is read after the wait.
        unsafe { self.gpu.stream.download(self.verdict.as_raw().cast(), block.cast(), size_of::<StepBlock>()) }?;
        self.gpu.stream.synchronize()?;
        self.streams.add_finished_spans();
        self.block = self.verdict[0];
        Ok(())
    }

    /// Waits for the step's loss, or for why it has none.
    pub(super) fn read_loss(&mut self) -> Result<f64> {
        self.read_block()?;
        if self.block.status != 0 {
            self.failed_in_labels = matches!(self.block.fault, fault::REMOTE | fault::RANKS_DIFFER | fault::LABEL | fault::BLOCK);
            self.is_fatal = self.block.fault == fault::RANKS_DIFFER;
            // This call returns the failure; `wait` must not return it again.
            let ledger = self.discount_last_failure()?;
            self.check_rows(&ledger)?;
            self.fault(&self.block)?;
        }
        Ok(self.block.loss)
    }

    /// The error of a block.
    pub(super) fn fault(&self, block: &StepBlock) -> Result<()> {
        let (rank, row) = (block.rank.max(0) as usize, block.row as usize);
        Err(match block.fault {
            fault::NONE => return Ok(()),
            fault::REMOTE | fault::SUMS => Error::remote(rank, block.value),
            fault::BLOCK => protocol::bad_block(block.row, rank, block.value, self.spec.options.max_batch),
            fault::RANKS_DIFFER => {
                let (first, other) = block.detail.split_at(protocol::ANNOUNCED);
                protocol::ranks_differ(first, other, rank)
            }
            fault::LABEL => protocol::bad_label(block.value, row, rank, self.spec.options.num_classes),
            fault::EMBEDDING => protocol::bad_embedding(row, rank),
            fault::SUM => protocol::bad_sum(row, rank),
            fault::FORWARD => match protocol::judge_errors(block.value as f32, self.spec.rank as usize) {
                Err(error) => error,
                Ok(()) => error!(Device, "the device reports a failed forward, but no rank that failed"),
            },
            fault::TERM => {
                let (terms, value) = (RowTerm::ALL.len(), f32::from_bits(block.value as u32));
                protocol::bad_term(RowTerm::ALL[row % terms], value, row / terms, rank)
            }
            fault::SAMPLES => protocol::samples_differ(rank),
            other => error!(Device, "the device reports a fault of kind {other}"),
        })
    }

    /// The ledger as of what is on the main stream.
    pub(super) fn ledger(&self) -> Result<Ledger> {
        Ok(staging::fetch(&self.gpu.stream, self.arrays().ledger, 1)?[0])
    }

    /// NOT_FINITE if an update has taken a row out of its type. The host learns it where it waits, which is after the update's own step.
    pub(super) fn check_rows(&mut self, ledger: &Ledger) -> Result<()> {
        if ledger.torn_row == NONE {
            return Ok(());
        }
        self.is_fatal = true;
        Err(protocol::bad_update(self.spec.shard.first + u64::from(ledger.torn_row), ledger.updates))
    }

    /// Counts the failed steps from 0 again.
    pub(super) fn reset_failure_count(&self) -> Result<()> {
        let failed = self.arrays().ledger.cast::<u8>().wrapping_add(std::mem::offset_of!(Ledger, failed));
        // SAFETY: the head's own ledger.
        unsafe { self.gpu.stream.fill(failed.cast(), 0, size_of::<u64>()) }
    }

    /// Takes the step that has just failed out of the count. Failures before it, of steps with their losses on the device, stay for
    /// `wait` to return. Returns the ledger as it was.
    pub(super) fn discount_last_failure(&mut self) -> Result<Ledger> {
        let step = self.drafts[self.current].step;
        if self.reported.as_ref().is_some_and(|reported| reported.step == step) {
            self.reported = None;
        }
        let ledger = self.ledger()?;
        if ledger.failed <= 1 {
            self.reset_failure_count()?;
            return Ok(ledger);
        }
        let (failed, left) = (std::mem::offset_of!(Ledger, failed), ledger.failed - 1);
        let destination = self.arrays().ledger.cast::<u8>().wrapping_add(failed);
        // SAFETY: the head's own ledger.
        unsafe { self.gpu.stream.upload_now(destination.cast(), std::ptr::from_ref(&left).cast(), size_of::<u64>()) }?;
        Ok(ledger)
    }
}
