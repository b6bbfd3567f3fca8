//! What the ranks tell each other in a step: the layouts of the messages, and the verdict that every rank reaches from them alike.
//!
//! *labels*, before any work, one block a rank: {status, draws, updates, batch, labels[max_batch]}. Replicated heads with sample_rate 1
//! need no one else's labels, but a caller's sample and a verdict on all labels do.
//! *sums*, after the forward of a sharded head: {N of each row, zt of each row, sum of the target cosines, loss places, errors,
//! classes}, and where rows may have offsets of their own, those rows' N: see [`far_sum`].
//! *replicated sums*: {loss, valid rows, sum of the target cosines, loss places} and {status, row, sample, capacity} of each rank, whose
//! center gradient has rows for `capacity` classes (0: for those of its sample).
//! The loss places are added up ([`LossPlace`]): a rank with an unusable loss pointer learns from them what the others do.

use crate::margin::Margin;
use crate::{error, Error, Result};

/// How far a rank is: samples drawn and updates done. Ranks that differ in either have not made the same calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    pub draws: u64,
    pub updates: u64,
}

/// Where a rank's loss is, by the number that it adds to the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum LossPlace {
    Host = -1,
    /// The rank's loss pointer is unusable.
    Unknown = 0,
    Device = 1,
}

impl LossPlace {
    /// Where the ranks' losses are, given what they have added up. Ranks with a usable pointer agree.
    pub(crate) fn from_sum(sum: f64) -> LossPlace {
        match sum {
            0.0 => LossPlace::Unknown,
            sum if sum > 0.0 => LossPlace::Device,
            _ => LossPlace::Host,
        }
    }

    /// `None` for `Unknown`.
    pub(crate) fn known(self) -> Option<LossPlace> {
        (self != LossPlace::Unknown).then_some(self)
    }
}

/// Elements before the labels in a block of *labels*.
pub(crate) const HEADER: usize = 4;
/// Elements of *sums* beside the two for each row.
pub(crate) const TOTALS: usize = 4;
/// The N of rows with offsets of their own travel times e to this power: relative to c they are e^-192 to e^-38, which it takes into
/// the middle of float32's range.
const FAR_EXPONENT: f64 = 120.0;
/// Elements of a replicated head's sums beside those of each rank.
pub(crate) const REPLICATED_TOTALS: usize = 4;
/// Elements of a replicated head's sums for each rank.
pub(crate) const REPLICATED_SLOT: usize = 4;

/// Elements of one rank's block of *labels*.
pub(crate) fn label_block(max_batch: u64) -> usize {
    HEADER + max_batch as usize
}

/// Elements of *sums* for as many rows.
pub(crate) fn sum_elements(rows: usize, margin: &Margin) -> usize {
    2 * rows + TOTALS + if margin.has_row_offsets() { rows } else { 0 }
}

/// What travels of an N that is relative to exp(`offset`), the row's own on this rank.
pub(crate) fn far_sum(sum: f32, offset: f32, margin: &Margin) -> f32 {
    (f64::from(sum) * (f64::from(offset) - margin.offset() + FAR_EXPONENT).exp()) as f32
}

/// A row's N relative to exp(c), from what the ranks' sums relative to that and their far sums came to.
pub(crate) fn whole_sum(near: f32, far: f32) -> f64 {
    f64::from(near) + f64::from(far) * (-FAR_EXPONENT).exp()
}

/// Fills a block of *labels* for a rank that can take the step.
pub(crate) fn pack_labels(block: &mut [i64], counters: Counters, labels: &[i64]) {
    block.fill(0);
    (block[1], block[2], block[3]) = (counters.draws as i64, counters.updates as i64, labels.len() as i64);
    block[HEADER..HEADER + labels.len()].copy_from_slice(labels);
}

/// Fills a block of *labels* for a rank that cannot.
pub(crate) fn pack_failure(block: &mut [i64], counters: Counters, cause: &Error) {
    pack_labels(block, counters, &[]);
    block[0] = cause.status as i64;
}

/// The error of an embedding that is NaN or infinite.
pub(crate) fn bad_embedding(row: usize, rank: usize) -> Error {
    error!(NotFinite, "embeddings row {row} contains a NaN or an infinity (rank {rank})")
}

/// The error of a row whose sums leave float32.
pub(crate) fn bad_sum(row: usize, rank: usize) -> Error {
    error!(NotFinite, "the softmax sum of row {row} is no number that has a gradient: NaN, infinite or 0 (rank {rank})")
}

/// The error of ranks that have not made the same calls: samples drawn and updates done on rank 0, then on rank `rank`.
pub(crate) fn ranks_out_of_step(counts: [i64; 4], rank: usize) -> Error {
    let [draws, updates, other_draws, other_updates] = counts;
    error!(
        Mismatch,
        "the ranks are at different steps: {draws} samples drawn and {updates} updates done on rank 0, \
         {other_draws} and {other_updates} on rank {rank}"
    )
}

/// The error of a label that is no class.
pub(crate) fn bad_label(label: i64, row: usize, rank: usize, num_classes: u64) -> Error {
    let last = num_classes - 1;
    error!(Label, "labels[{row}] must be 0 to {last} or ignore_label, got {label} (rank {rank})")
}

/// The error of replicated heads whose callers gave them different samples.
pub(crate) fn samples_differ(rank: usize) -> Error {
    error!(Mismatch, "the samples of rank 0 and rank {rank} differ: all ranks of a replicated head must be given the same ids")
}

/// What every rank concludes from the gathered labels: the ranks' batches, or the same failure.
pub(crate) fn judge_labels(
    blocks: &[i64],
    ranks: usize,
    own: Option<&Error>,
    num_classes: u64,
    ignore_label: Option<i64>,
) -> Result<Vec<usize>> {
    let length = blocks.len() / ranks;
    let block = |r: usize| &blocks[r * length..(r + 1) * length];
    if let Some(own) = own {
        return Err(own.clone());
    }
    if let Some(failed) = (0..ranks).find(|&r| block(r)[0] != 0) {
        return Err(Error::remote(failed, block(failed)[0]));
    }
    for r in 1..ranks {
        let (first, other) = (block(0), block(r));
        if first[1..3] != other[1..3] {
            return Err(ranks_out_of_step([first[1], first[2], other[1], other[2]], r));
        }
    }
    let batches: Vec<usize> = (0..ranks).map(|r| block(r)[3] as usize).collect();
    let wrong = |label: i64| Some(label) != ignore_label && !(0..num_classes as i64).contains(&label);
    for (r, &batch) in batches.iter().enumerate() {
        let labels = &block(r)[HEADER..HEADER + batch];
        if let Some(row) = labels.iter().position(|&label| wrong(label)) {
            return Err(bad_label(labels[row], row, r, num_classes));
        }
    }
    Ok(batches)
}

/// Of the sums only totals arrive: one failing rank adds its number + 1 and this, so that it can be named unless there are several.
const ONE_ERROR: f32 = 65536.0;

pub(crate) fn pack_error(rank: usize) -> f32 {
    ONE_ERROR + (rank.min(65534) + 1) as f32
}

/// The failure that the sums' `errors` tells of, if there is one.
pub(crate) fn judge_errors(errors: f32, rank: usize) -> Result<()> {
    match (errors / ONE_ERROR).floor() {
        0.0 => Ok(()),
        1.0 => {
            let failed = (errors - ONE_ERROR) as usize - 1;
            Err(error!(Remote, "rank {failed} failed in its forward; its own message says why (this is rank {rank})"))
        }
        several => {
            Err(error!(Remote, "about {several} ranks failed in their forward; their messages say why (this is rank {rank})"))
        }
    }
}
