//! A row's own terms: its margins m2 and m3, and the weight that multiplies its loss.
//!
//! ```text
//! loss_i = weight_i * softplus(log N_i + c - zt_i),  zt_i = scale * (cos(max(m1 * theta_i + m2_i, 0)) - m3_i)
//! ```
//!
//! AdaFace (arXiv:2204.00964), MagFace (arXiv:2103.06627) and ElasticFace (arXiv:2109.09416) choose margins row by row;
//! class-balanced losses (arXiv:1901.05555) weigh rows. A head with row terms sends angles in *sums* where others send target logits:
//! every rank then finds the logits from them and from the terms, which travel beside them.

use crate::margin::{within_m2, within_m3, Margin};

/// What a row may have of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowTerm {
    M2 = 0,
    M3 = 1,
    Weight = 2,
}

impl RowTerm {
    /// In the order in which they travel.
    pub const ALL: [RowTerm; 3] = [RowTerm::M2, RowTerm::M3, RowTerm::Weight];

    /// The argument that gives it.
    pub fn name(self) -> &'static str {
        ["m2", "m3", "weight"][self as usize]
    }

    /// What a row has without one of its own.
    pub fn default(self, margin: &Margin) -> f32 {
        [margin.m2, margin.m3, 1.0][self as usize] as f32
    }

    pub fn admits(self, value: f32) -> bool {
        match self {
            // AdaFace has margins below 0, which options do not.
            RowTerm::M2 => within_m2(value.abs().into()),
            RowTerm::M3 => within_m3(value.into()),
            RowTerm::Weight => value >= 0.0 && value.is_finite(),
        }
    }

    /// The range in words.
    pub(crate) fn range(self) -> &'static str {
        ["-pi to pi, in radians", "0 to 2", "a finite float32 of at least 0"][self as usize]
    }
}

/// A caller's arrays, one number for each row of this rank's batch, borrowed for a call. NULL: the default of all rows.
#[derive(Clone, Copy, Debug)]
pub struct RowTermArrays(pub [*const f32; RowTerm::ALL.len()]);

impl RowTermArrays {
    pub const NONE: RowTermArrays = RowTermArrays([std::ptr::null(); RowTerm::ALL.len()]);

    /// Those that the caller gave.
    pub(crate) fn given(&self) -> impl Iterator<Item = (RowTerm, *const f32)> + '_ {
        RowTerm::ALL.into_iter().zip(self.0).filter(|(_, array)| !array.is_null())
    }
}

/// A caller's arrays for the gradients of m2 and m3, borrowed for a call; NULL: not wanted.
#[derive(Clone, Copy, Debug)]
pub struct MarginGradientArrays(pub [*mut f32; 2]);

impl MarginGradientArrays {
    pub const NONE: MarginGradientArrays = MarginGradientArrays([std::ptr::null_mut(); 2]);

    pub(crate) fn given(&self) -> impl Iterator<Item = (&'static str, *mut f32)> + '_ {
        ["grad_m2", "grad_m3"].into_iter().zip(self.0).filter(|(_, array)| !array.is_null())
    }
}

/// The angle that travelled as a float32: pi/2 of a row without direction and pi are no float32.
pub(crate) fn travelled_angle(angle: f32) -> f64 {
    use std::f64::consts::{FRAC_PI_2, PI};

    match f64::from(angle) {
        angle if angle == f64::from(FRAC_PI_2 as f32) => FRAC_PI_2,
        angle => angle.min(PI),
    }
}
