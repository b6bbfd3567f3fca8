//! Arguments of the stateless kernels, and what they must satisfy on every device.

use crate::margin::Margin;
use crate::matrix::{DType, Matrix};
use crate::memory::Buffer;
use crate::optimizer::Optimizer;
use crate::options::LARGEST_DIM;
use crate::shard::Shard;
use crate::{ensure, error, Result};

/// Scratch memory of the caller's for a stateless kernel.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    pub data: *mut u8,
    pub bytes: usize,
}

/// Arguments of `pfc_fused_forward`.
pub struct FusedForward<'a> {
    pub margin: &'a Margin,
    pub embeddings: &'a Matrix,
    pub centers: &'a Matrix,
    pub targets: *const i64,
    pub row_sums: *mut f32,
    /// NULL: all rows have offset c.
    pub row_offsets: *mut f32,
    pub target_logits: *mut f32,
    pub weighted: &'a Matrix,
    pub workspace: Workspace,
}

/// Arguments of `pfc_fused_backward`.
pub struct FusedBackward<'a> {
    pub margin: &'a Margin,
    pub embeddings: &'a Matrix,
    pub centers: &'a Matrix,
    pub targets: *const i64,
    pub row_sums: *const f32,
    /// None: all rows have offset c.
    pub offsets: Option<RowOffsets>,
    pub target_logits: *const f32,
    pub weighted: &'a Matrix,
    pub loss_weight: f64,
    pub grad_embeddings: &'a Matrix,
    pub grad_centers: &'a Matrix,
    pub workspace: Workspace,
}

/// What sums are relative to, row by row.
#[derive(Clone, Copy, Debug)]
pub struct RowOffsets {
    /// The numerators of this rank.
    pub of_rank: *const f32,
    /// The sums over all ranks.
    pub of_sums: *const f32,
}

/// Arguments of `pfc_sample_classes`.
pub struct SampleDraw {
    pub seed: u64,
    pub step: u64,
    pub first: u64,
    pub rows: u64,
    pub positives: *const i64,
    pub positive_count: usize,
    pub sample_size: u64,
}

/// The tensors of `pfc_update_rows`.
pub struct RowState<'a> {
    pub centers: &'a Matrix,
    pub momentum: &'a Matrix,
    pub second_moment: Option<&'a Matrix>,
}

/// The offset that a row with this largest negative is given: [`Margin::row_offset`], and the least there is for a row without a
/// negative, so that it is not taken for the ranks' largest.
pub(super) fn given_offset(margin: &Margin, best: f32) -> f32 {
    if margin.has_row_offsets() && best <= -2.0 {
        -margin.scale as f32
    } else {
        margin.row_offset(best)
    }
}

/// A sum relative to exp(c) that is smaller has lost numerators that count.
const LEAST_SUM: f64 = 1e-32;

pub(super) fn must_be_f32(name: &str, matrix: &Matrix) -> Result<()> {
    ensure!(matrix.dtype == DType::F32, InvalidArgument, "{name}.dtype must be f32, got {}", matrix.dtype.name());
    Ok(())
}

/// Sizes that 32-bit row and column numbers hold.
pub(super) fn checked_shape(batch: u64, dim: u64, classes: u64) -> Result<()> {
    let small = |name: &str, value: u64| {
        ensure!(value <= u32::MAX.into(), InvalidArgument, "{name} must be at most {}, got {value}", u32::MAX);
        Ok(())
    };
    ensure!(dim <= LARGEST_DIM.into(), InvalidArgument, "dim must be at most {LARGEST_DIM}, got {dim}");
    small("batch", batch)?;
    small("classes", classes)
}

/// A caller's targets, each a row of centers or -1.
pub(super) fn checked_targets(targets: &[i64], classes: usize) -> Result<()> {
    match targets.iter().position(|column| !(-1..classes as i64).contains(column)) {
        None => Ok(()),
        Some(row) => Err(error!(
            InvalidArgument,
            "targets[{row}] must be a column of the sample, 0 to {}, or -1, got {}",
            classes as i64 - 1,
            targets[row]
        )),
    }
}

/// The callers' sums over the ranks.
#[derive(Clone, Copy)]
pub(super) struct GivenSums<'a> {
    pub margin: &'a Margin,
    pub row_sums: &'a [f32],
    pub target_logits: &'a [f32],
    /// Of the numerators of this rank and of the sums; none: all are c.
    pub offsets: Option<[&'a [f32]; 2]>,
}

/// What a row's gradient takes of its sums.
pub(super) struct RowShare {
    /// N / L; 0 for a row without negatives.
    pub missing: f64,
    /// scale / L relative to the row's offset on this rank; 0 for a row without negatives.
    pub factor: f32,
}

impl GivenSums<'_> {
    pub fn of_row(&self, row: usize) -> RowShare {
        let offset = self.margin.offset();
        // Most rows' offset is c rounded to float32, which stands for c.
        let relative = |own: f32| if own == offset as f32 { 1.0 } else { (f64::from(own) - offset).exp() };
        let [of_rank, of_sum] = self.offsets.map_or([1.0; 2], |offsets| offsets.map(|offsets| relative(offsets[row])));
        let sum = f64::from(self.row_sums[row]) * of_sum;
        if sum == 0.0 {
            return RowShare { missing: 0.0, factor: 0.0 };
        }
        let denominator = sum + (f64::from(self.target_logits[row]) - offset).exp();
        let factor = (self.margin.scale / denominator * of_rank) as f32;
        // It leaves float32 where all negatives are other ranks' and far: nothing is weighed here.
        let nothing = self.offsets.is_some() && factor == f32::INFINITY;
        RowShare { missing: sum / denominator, factor: if nothing { 0.0 } else { factor } }
    }

    /// That they have a gradient in float32; `targets` are columns of the `classes` of this rank.
    pub fn check(&self, targets: &[i64], classes: usize) -> Result<()> {
        for (row, (&sum, &logit)) in self.row_sums.iter().zip(self.target_logits).enumerate() {
            let share = self.of_row(row);
            ensure!(
                sum >= 0.0 && sum.is_finite() && logit.is_finite() && share.factor.is_finite() && share.missing.is_finite(),
                NotFinite,
                "float32 has no gradient for row_sums[{row}], {sum:e}, and target_logits[{row}], {logit:e}"
            );
            match self.offsets {
                Some(offsets) => {
                    for (name, offset) in ["row_offsets", "sum_offsets"].into_iter().zip(offsets.map(|offsets| offsets[row])) {
                        let (least, most) = (-1.01 * self.margin.scale, self.margin.offset() as f32);
                        ensure!(
                            f64::from(offset) >= least && offset <= most,
                            InvalidArgument,
                            "{name}[{row}] must be {least} to {most}, got {offset}"
                        );
                    }
                }
                None => {
                    let has_negatives = classes > usize::from(targets[row] >= 0);
                    let far = f64::from(logit) - self.margin.offset() < -60.0;
                    ensure!(
                        !(self.margin.has_row_offsets() && has_negatives && f64::from(sum) < LEAST_SUM && far),
                        NotFinite,
                        "row_sums[{row}] is {sum:e}: the row's negatives are too far for float32, take pfc_fused_forward_offsets \
                         and pfc_fused_backward_offsets"
                    );
                }
            }
        }
        Ok(())
    }
}

pub(super) fn checked_weight(weight: f64) -> Result<()> {
    ensure!(weight.is_finite(), InvalidArgument, "loss_weight must be finite, got {weight}");
    Ok(())
}

impl Workspace {
    /// That it has the bytes of the _workspace function, at an address of that alignment.
    pub(super) fn check(&self, needed: u64, alignment: usize) -> Result<()> {
        let data = self.data as usize;
        ensure!(
            self.bytes as u64 >= needed,
            InvalidArgument,
            "workspace_bytes must be at least {needed}, got {}: ask the kernel's _workspace function",
            self.bytes
        );
        ensure!(data.is_multiple_of(alignment), InvalidArgument, "workspace must be aligned to {alignment} bytes, got {data:#x}");
        Ok(())
    }
}

impl SampleDraw {
    pub(super) fn shard(&self) -> Shard {
        Shard { first: self.first, rows: self.rows }
    }

    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            self.first.checked_add(self.rows).is_some_and(|end| end <= i64::MAX as u64),
            InvalidArgument,
            "first + rows must be at most INT64_MAX, got {} + {}",
            self.first,
            self.rows
        );
        ensure!(self.rows <= 1 << 40, InvalidArgument, "rows must be at most 2^40, got {}", self.rows);
        ensure!(
            self.sample_size <= self.rows,
            InvalidArgument,
            "sample_size must be at most rows, {}, got {}",
            self.rows,
            self.sample_size
        );
        Ok(())
    }

    /// Positives of the shard, ascending.
    pub(super) fn check_positives(&self, positives: &[i64]) -> Result<()> {
        let shard = self.shard();
        for (i, &id) in positives.iter().enumerate() {
            ensure!(
                shard.contains(id),
                InvalidArgument,
                "positives[{i}] must be {} to {}, got {id}",
                shard.first,
                shard.end() as i64 - 1
            );
            ensure!(
                i == 0 || positives[i - 1] < id,
                InvalidArgument,
                "positives must ascend: positives[{i}] is {id} after {}",
                positives[i - 1]
            );
        }
        Ok(())
    }
}

impl RowState<'_> {
    /// That the optimizer has what it needs for update number `update`.
    pub(super) fn check(&self, optimizer: &Optimizer, learning_rate: f64, update: u64) -> Result<()> {
        must_be_f32("centers", self.centers)?;
        must_be_f32("momentum", self.momentum)?;
        match (optimizer.state_tensors() > 1, self.second_moment) {
            (true, None) => return Err(error!(InvalidArgument, "second_moment must not be NULL with AdamW")),
            (_, Some(matrix)) => must_be_f32("second_moment", matrix)?,
            (false, None) => {}
        }
        ensure!(
            learning_rate.is_finite() && learning_rate >= 0.0,
            InvalidArgument,
            "learning_rate must be finite and at least 0, got {learning_rate}"
        );
        ensure!(update > 0, InvalidArgument, "update must be at least 1, got 0");
        Ok(())
    }

    /// Row numbers of the centers, without repeats.
    pub(super) fn check_ids(&self, ids: &[i64]) -> Result<()> {
        let rows = self.centers.rows;
        let mut seen = Buffer::<u8>::zeroed(rows, "a mark for each of centers.rows")?;
        for (i, &id) in ids.iter().enumerate() {
            ensure!(
                (0..rows as i64).contains(&id),
                InvalidArgument,
                "ids[{i}] must be at least 0 and below centers.rows, {rows}, got {id}"
            );
            ensure!(
                std::mem::replace(&mut seen[id as usize], 1) == 0,
                InvalidArgument,
                "ids must not repeat: ids[{i}] is {id} again"
            );
        }
        Ok(())
    }
}
