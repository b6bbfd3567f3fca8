//! What the ranks tell each other in a step: the layouts of the messages, and the verdict that every rank reaches from them alike.
//!
//! *labels*, before any work, one block a rank: {status, rank, batch, announcement, max_batch labels}. Replicated heads with
//! sample_rate 1 need no one else's labels, but a caller's sample and a verdict on all labels do. What comes back is judged before any
//! of it is an index: this rank's own block is what it sent, each block is at its rank's place, no batch is above max_batch.
//! With max_batch 0 it is the room that all ranks have. A block with a larger batch asks for more: a handshake tells that all have made
//! it, and *labels* is gathered once more.
//! *sums*, after the forward of a sharded head: {N of each row, zt of each row, sum of the target cosines, loss places, errors,
//! classes}, and where rows may have offsets of their own, those rows' N: see [`far_sum`]. With row terms {N, angle, ..} and, at the end,
//! m2, m3 and weight of each row, from the rank that it comes from: see [`crate::row_terms`].
//! *replicated sums*: {loss, valid rows, sum of the target cosines, loss places} and {status, row, sample, capacity} of each rank, whose
//! center gradient has rows for `capacity` classes (0: for those of its sample).
//! The loss places are added up ([`LossPlace`]): a rank with an unusable loss pointer learns from them what the others do.

use crate::margin::Margin;
use crate::options::HeadOptions;
use crate::row_terms::RowTerm;
use crate::{error, Error, Result, Status};

/// The call that a rank's *labels* are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum StepCall {
    Prepare = 1,
    Forward = 2,
    Step = 3,
}

impl StepCall {
    fn name(code: i64) -> &'static str {
        match code {
            1 => "pfc_head_prepare",
            2 => "pfc_head_forward",
            3 => "pfc_head_step",
            _ => "an unknown call",
        }
    }
}

/// What a rank says of itself at the start of a step, and all ranks must say alike: which head, which call, how far it is, and what
/// its last update was like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Announcement {
    /// Heads that had been made on the communicator before this one.
    pub head: u64,
    pub call: StepCall,
    /// Samples drawn.
    pub draws: u64,
    /// Updates done.
    pub updates: u64,
    /// Of `pfc_head_step` its own; otherwise the last update's.
    pub learning_rate: f64,
    /// Of `pfc_head_step` its own; otherwise the last backward's.
    pub loss_weight: f64,
    /// A sum that changes with each row that the caller overwrites; 0 for a sharded head, whose ranks have different rows.
    pub written_rows: u64,
    /// What the last update multiplied the class centers' gradient by.
    pub factor: f64,
    /// Micro-batches accumulated since the last update.
    pub accumulated: u64,
}

/// Word of a factor that is no finite float32: such an update is skipped, and by which factor does not matter.
pub(crate) const SKIPPED_FACTOR: i64 = 0x7ff8_0000_0000_0000;

/// Whether a gradient can be multiplied by it.
pub(crate) fn is_factor(factor: f64) -> bool {
    factor.abs() <= f64::from(f32::MAX)
}

/// A factor as ranks tell it each other.
pub(crate) fn factor_word(factor: f64) -> i64 {
    if is_factor(factor) {
        factor.to_bits() as i64
    } else {
        SKIPPED_FACTOR
    }
}

/// Elements of an announcement.
pub(crate) const ANNOUNCED: usize = 9;

impl Announcement {
    pub(crate) fn words(&self) -> [i64; ANNOUNCED] {
        [
            self.head as i64,
            self.call as i64,
            self.draws as i64,
            self.updates as i64,
            self.learning_rate.to_bits() as i64,
            self.loss_weight.to_bits() as i64,
            self.written_rows as i64,
            factor_word(self.factor),
            self.accumulated as i64,
        ]
    }
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
pub(crate) const HEADER: usize = 3 + ANNOUNCED;
/// Where among them the samples drawn are.
#[cfg(test)]
pub(crate) const DRAWS_WORD: usize = 3 + 2;
/// Where the last update's factor is.
#[cfg(test)]
pub(crate) const FACTOR_WORD: usize = 3 + 7;
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

/// What is before the labels in a rank's block of *labels*; with a failure there are none.
pub(crate) fn label_header(rank: u32, announcement: &Announcement, batch: usize, failure: Option<&Error>) -> [i64; HEADER] {
    let mut header = [0; HEADER];
    header[0] = failure.map_or(0, |cause| cause.status as i64);
    (header[1], header[2]) = (rank.into(), if failure.is_some() { 0 } else { batch as i64 });
    header[3..].copy_from_slice(&announcement.words());
    header
}

/// Elements of *sums* for as many rows.
pub(crate) fn sum_elements(rows: usize, options: &HeadOptions) -> usize {
    terms_start(rows, &options.margin) + if options.row_terms { RowTerm::ALL.len() * rows } else { 0 }
}

/// Where in *sums* the rows' terms begin.
pub(crate) fn terms_start(rows: usize, margin: &Margin) -> usize {
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

/// Fills a rank's block of *labels*. Where the batch is larger than the block there are none: its number asks for a larger one.
pub(crate) fn pack_labels(block: &mut [i64], header: &[i64; HEADER], labels: &[i64]) {
    block.fill(0);
    block[..HEADER].copy_from_slice(header);
    block[HEADER..HEADER + labels.len()].copy_from_slice(labels);
}

/// The error of an embedding that is NaN or infinite.
pub(crate) fn bad_embedding(row: usize, rank: usize) -> Error {
    error!(NotFinite, "embeddings row {row} contains a NaN or an infinity (rank {rank})")
}

/// What the text of `bad_sum` begins with.
const BAD_SUM: &str = "the softmax sum of row";

/// The error of a row whose sums leave float32.
pub(crate) fn bad_sum(row: usize, rank: usize) -> Error {
    error!(NotFinite, "{BAD_SUM} {row} is no number that has a gradient: NaN, infinite or 0 (rank {rank})")
}

/// The error of a row whose own term is out of its range.
pub(crate) fn bad_term(term: RowTerm, value: f32, row: usize, rank: usize) -> Error {
    error!(InvalidArgument, "{}[{row}] must be {}, got {value:?} (rank {rank})", term.name(), term.range())
}

/// A row's term in a slot of *replicated sums*, beside INVALID_ARGUMENT: below 0, since a rank's own failure has 0 there. The value is
/// where a step that has not failed has its sample.
pub(crate) fn term_word(term: RowTerm, row: usize) -> f64 {
    -1.0 - (RowTerm::ALL.len() * row + term as usize) as f64
}

/// The error that such a slot tells of.
pub(crate) fn bad_term_of(word: f64, value: f64, rank: usize) -> Error {
    let (terms, number) = (RowTerm::ALL.len(), (-word - 1.0) as usize);
    bad_term(RowTerm::ALL[number % terms], value as f32, number / terms, rank)
}

/// Whether it is the error of `bad_sum`: it may have its cause in a class center.
pub(crate) fn is_bad_sum(error: &Error) -> bool {
    error.status == Status::NotFinite && error.message.starts_with(BAD_SUM)
}

/// The error of ranks that have not made the same calls: what rank 0 announced, then what rank `rank` did.
pub(crate) fn ranks_differ(first: &[i64], other: &[i64], rank: usize) -> Error {
    let differs = |i: usize| first[i] != other[i];
    let both = |i: usize| (f64::from_bits(first[i] as u64), f64::from_bits(other[i] as u64));
    // A step brings its own rate and weight, the other calls tell those of the step before.
    let (of_update, of_backward) = match first[1] == StepCall::Step as i64 {
        true => ("", ""),
        false => (" of the last update", " of the last backward"),
    };
    if differs(0) || differs(1) {
        return error!(
            Mismatch,
            "rank 0 has called {} of head {} of its communicator and rank {rank} {} of head {}: \
             all ranks must make the same calls on the same heads",
            StepCall::name(first[1]),
            first[0],
            StepCall::name(other[1]),
            other[0]
        );
    }
    if differs(2) || differs(3) {
        return error!(
            Mismatch,
            "the ranks are at different steps: {} samples drawn and {} updates done on rank 0, {} and {} on rank {rank}",
            first[2],
            first[3],
            other[2],
            other[3]
        );
    }
    if differs(8) {
        return error!(
            Mismatch,
            "{} micro-batches have been accumulated since the last update on rank 0 and {} on rank {rank}", first[8], other[8]
        );
    }
    if differs(4) {
        let (rate, others) = both(4);
        return error!(Mismatch, "learning_rate{of_update} is {rate} on rank 0 and {others} on rank {rank}");
    }
    if differs(5) {
        let (weight, others) = both(5);
        return error!(Mismatch, "loss_weight{of_backward} is {weight} on rank 0 and {others} on rank {rank}");
    }
    if differs(7) {
        let shown = |word: i64| match word {
            SKIPPED_FACTOR => "not finite".to_owned(),
            word => f64::from_bits(word as u64).to_string(),
        };
        let (factor, others) = (shown(first[7]), shown(other[7]));
        return error!(Mismatch, "factor times device_factor of the last update is {factor} on rank 0 and {others} on rank {rank}");
    }
    error!(
        Mismatch,
        "class centers or their state have been overwritten with other values on rank {rank} than on rank 0, \
         or the progress of dense rows has been read or written on one of them alone: \
         all ranks of a replicated head must hold the same rows"
    )
}

/// The error of an update that has taken a class center or its state out of the type that it is stored in.
pub(crate) fn bad_update(class: u64, update: u64) -> Error {
    error!(
        NotFinite,
        "update {update} has taken class center {class}, or its state, out of the range of its type: \
         the learning rate, the weight decay or the loss weight is too large"
    )
}

/// What is wrong with a block of *labels* that a gather brought back, in the order in which it is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub(crate) enum BlockFault {
    /// Another than this rank sent.
    Changed = 1,
    /// Another rank's than its place says.
    Misplaced = 2,
    /// With more rows than a batch can have, or fewer than none.
    Batch = 3,
}

/// The error of a gather that brought back rank `rank`'s block wrongly; `found` is the rank, or the batch, that it names.
///
/// `fault` is a number since a device may have found it.
pub(crate) fn bad_block(fault: i64, rank: usize, found: i64, max_batch: u64) -> Error {
    const CHANGED: i64 = BlockFault::Changed as i64;
    const MISPLACED: i64 = BlockFault::Misplaced as i64;
    match fault {
        CHANGED => {
            error!(Comm, "all_gather of the labels did not bring back the own block of rank {rank} at its place as it was sent")
        }
        MISPLACED => error!(Comm, "all_gather of the labels brought back a block of rank {found} at the place of rank {rank}"),
        _ => error!(
            Comm,
            "all_gather of the labels brought back a batch of {found} rows for rank {rank}, but max_batch is {max_batch}"
        ),
    }
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

/// Rows of the largest batch that a rank asks for, from the gathered headers of blocks that are `stride` apart.
pub(crate) fn largest_batch(sent: &[i64], blocks: &[i64], stride: usize, rank: usize, limit: u64) -> Result<u64> {
    let header = |r: usize| &blocks[r * stride..][..HEADER];
    let wrong = |fault: BlockFault, r: usize, found: i64| Err(bad_block(fault as i64, r, found, limit));
    if header(rank) != &sent[..HEADER] {
        return wrong(BlockFault::Changed, rank, 0);
    }
    let mut largest = 0;
    for r in 0..blocks.len() / stride {
        let (place, batch) = (header(r)[1], header(r)[2]);
        if place != r as i64 {
            return wrong(BlockFault::Misplaced, r, place);
        }
        if !(0..=limit as i64).contains(&batch) {
            return wrong(BlockFault::Batch, r, batch);
        }
        largest = largest.max(batch as u64);
    }
    Ok(largest)
}

/// What every rank concludes from the gathered labels: the ranks' batches, for which `batches` has room, or the same failure.
pub(crate) fn judge_labels(
    sent: &[i64],
    blocks: &[i64],
    rank: usize,
    own: Option<&Error>,
    num_classes: u64,
    ignore_label: Option<i64>,
    batches: &mut Vec<usize>,
) -> Result<()> {
    if let Some(own) = own {
        return Err(own.clone());
    }
    let (max_batch, ranks) = ((sent.len() - HEADER) as u64, blocks.len() / sent.len());
    let block = |r: usize| &blocks[r * sent.len()..(r + 1) * sent.len()];
    let wrong = |fault: BlockFault, r: usize, found: i64| Err(bad_block(fault as i64, r, found, max_batch));
    if block(rank) != sent {
        return wrong(BlockFault::Changed, rank, 0);
    }
    if let Some(r) = (0..ranks).find(|&r| block(r)[1] != r as i64) {
        return wrong(BlockFault::Misplaced, r, block(r)[1]);
    }
    if let Some(r) = (0..ranks).find(|&r| !(0..=max_batch as i64).contains(&block(r)[2])) {
        return wrong(BlockFault::Batch, r, block(r)[2]);
    }
    if let Some(failed) = (0..ranks).find(|&r| block(r)[0] != 0) {
        return Err(Error::remote(failed, block(failed)[0]));
    }
    let announced = |r: usize| &block(r)[3..HEADER];
    if let Some(r) = (1..ranks).find(|&r| announced(r) != announced(0)) {
        return Err(ranks_differ(announced(0), announced(r), r));
    }
    batches.clear();
    batches.extend((0..ranks).map(|r| block(r)[2] as usize));
    let wrong = |label: i64| Some(label) != ignore_label && !(0..num_classes as i64).contains(&label);
    for (r, &batch) in batches.iter().enumerate() {
        let labels = &block(r)[HEADER..HEADER + batch];
        if let Some(row) = labels.iter().position(|&label| wrong(label)) {
            return Err(bad_label(labels[row], row, r, num_classes));
        }
    }
    Ok(())
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
        1.0 if errors > ONE_ERROR => {
            let failed = (errors - ONE_ERROR) as usize - 1;
            Err(error!(Remote, "rank {failed} failed in its forward; its own message says why (this is rank {rank})"))
        }
        several => {
            Err(error!(Remote, "about {several} ranks failed in their forward; their messages say why (this is rank {rank})"))
        }
    }
}
