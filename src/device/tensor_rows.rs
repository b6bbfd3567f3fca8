//! Rows of a head's tensors as callers and checkpoints hand them over, and what of them can be stored.

use crate::matrix::{DType, Matrix};
use crate::optimizer::StateTensor;
use crate::{ensure, error, Result};

/// The bits of the smallest numbers that are not finite any more, without their sign: a float32, and one that is rounded to bfloat16.
const INFINITE: u32 = 0x7f80_0000;
const BEYOND_BF16: u32 = 0x7f7f_8000;

/// Rows of one of a head's tensors.
#[derive(Clone, Copy, Debug)]
pub struct TensorRows {
    pub tensor: StateTensor,
    pub rows: Matrix,
}

/// Refuses a row that cannot be stored as `dtype`. `row` is its number in the caller's matrix.
pub(super) fn check_row(tensor: StateTensor, dtype: DType, row: usize, class: u64, values: &[f32]) -> Result<()> {
    let limit = if dtype == DType::Bf16 { BEYOND_BF16 } else { INFINITE };
    let signed = tensor != StateTensor::SecondMoment;
    // All of a row that is as it should be, without a branch for each value.
    let is_wrong = |x: f32| (x.to_bits() & !(1 << 31) >= limit) | (!signed & (x < 0.0));
    if !values.iter().fold(false, |wrong, &x| wrong | is_wrong(x)) {
        return Ok(());
    }
    ensure!(values.iter().all(|x| x.is_finite()), InvalidArgument, "row {row} (class {class}) contains a NaN or an infinity");
    let negative = !signed && values.iter().any(|&x| x < 0.0);
    ensure!(!negative, InvalidArgument, "row {row} (class {class}) of the second moment must not be negative");
    Err(error!(InvalidArgument, "row {row} (class {class}) contains a number beyond bfloat16"))
}

#[cfg(test)]
mod tests;
