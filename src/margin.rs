//! The margin on the target logit: target logit = scale * (cos(m1 * theta + m2) - m3).
//!
//! CosFace (arXiv:1801.09414) is m3 alone, ArcFace (arXiv:1801.07698) m2 alone, SphereFace (arXiv:1704.08063) m1 alone.
//!
//! ```
//! use partialfc::margin::{Margin, MarginGradient};
//!
//! let arcface =
//!     Margin { scale: 64.0, m1: 1.0, m2: 0.5, m3: 0.0, interclass_filter: 0.0, gradient: MarginGradient::Exact, guard: true };
//! // A target at 0.3 radians from its class center counts as one at 0.8.
//! assert!((arcface.target(0.3).logit - 64.0 * 0.8_f64.cos()).abs() < 1e-9);
//! ```

use std::f64::consts::{FRAC_PI_2, PI};

use crate::simd::{clones, Simd};
use crate::{ensure, Result};

/// Which derivative the margin has on the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum MarginGradient {
    /// The derivative of the formula.
    Exact = 1,
    /// 1, as the reference implementation has it since 2022-12.
    StraightThrough = 2,
}

/// Scale, margins and the inter-class filter: everything between a cosine and a logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin {
    pub scale: f64,
    pub m1: f64,
    pub m2: f64,
    pub m3: f64,
    /// A negative's cosine above it becomes 0; 0 is off.
    pub interclass_filter: f64,
    pub gradient: MarginGradient,
    /// Keep the target logit monotone beyond theta = pi - m2.
    pub guard: bool,
}

/// A target logit and how it moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// scale * psi(theta).
    pub logit: f64,
    /// psi', the derivative of psi by cos(theta): without the scale.
    pub derivative: f64,
}

/// Logits up to this need no offset: exp(64) times any count of classes is far from f32's largest number.
const FREE_SCALE: f64 = 64.0;
/// Up to this scale a sum is a normal float32 however far its negatives are: they are at least exp(-75 - 11), of e^-87.3.
const LARGEST_COMMON_SCALE: f64 = 75.0;
/// A row whose largest numerator has a lower exponent is taken again relative to it. What lies e^-27 below the largest of the other
/// rows is lost, the least that float32 has being e^-87.3.
const LEAST_EXPONENT: f64 = -60.0;
/// Least sine in the derivative's denominator: at theta = 0 and pi the angle has no derivative by its cosine.
const LEAST_SINE: f64 = 1e-4;

fn within(value: f64, most: f64) -> bool {
    (0.0..=most).contains(&value)
}

pub(crate) fn within_m2(m2: f64) -> bool {
    // A caller's pi may be a little above ours, as pi in f32 is.
    within(m2, PI + 1e-6)
}

pub(crate) fn within_m3(m3: f64) -> bool {
    within(m3, 2.0)
}

impl Margin {
    /// Errors: INVALID_ARGUMENT, for a field that is NaN or outside 0 < scale <= 128, 0 < m1 <= 16, 0 <= m2 <= pi, 0 <= m3 <= 2,
    /// 0 <= interclass_filter <= 1.
    pub fn check(&self) -> Result<()> {
        let above = |value: f64, most: f64| value > 0.0 && value <= most;
        ensure!(above(self.scale, 128.0), InvalidArgument, "scale must be above 0 and at most 128, got {:?}", self.scale);
        ensure!(above(self.m1, 16.0), InvalidArgument, "m1 must be above 0 and at most 16, got {:?}", self.m1);
        ensure!(within_m2(self.m2), InvalidArgument, "m2 must be 0 to pi, in radians, got {:?}", self.m2);
        ensure!(within_m3(self.m3), InvalidArgument, "m3 must be 0 to 2, got {:?}", self.m3);
        let filter = self.interclass_filter;
        ensure!(within(filter, 1.0), InvalidArgument, "interclass_filter must be 0 (off) to 1, got {filter:?}");
        Ok(())
    }

    /// c = max(0, scale - 64): logits are at most the scale, so that this constant serves where others track a running maximum.
    pub fn offset(&self) -> f64 {
        (self.scale - FREE_SCALE).max(0.0)
    }

    /// Whether sums relative to c may leave float32, so that a row may have an offset of its own.
    pub fn has_row_offsets(&self) -> bool {
        self.scale > LARGEST_COMMON_SCALE
    }

    /// The offset of a row whose largest negative cosine is `best`, -2 without a negative: c, or the logit of that negative where
    /// all numerators would be next to nothing relative to c.
    ///
    /// A negative above the filter counts as cosine 0, so that its numerator, exp(-c), is far from that.
    pub fn row_offset(&self, best: f32) -> f32 {
        let (offset, logit) = (self.offset(), self.scale * f64::from(best));
        let filtered = self.interclass_filter > 0.0 && f64::from(best) > self.interclass_filter;
        let far = best > -2.0 && !filtered && logit - offset < LEAST_EXPONENT;
        (if self.has_row_offsets() && far { logit } else { offset }) as f32
    }

    /// The target logit at an angle theta in [0, pi], and its derivative:
    ///
    /// psi = cos(m1 * theta + m2) - m3, psi' = m1 * sin(m1 * theta + m2) / max(sin(theta), 1e-4). m1 * theta + m2 below 0 counts as 0.
    ///
    /// With the guard, where m1 * theta + m2 > pi, psi = cos(theta) + k - m3 and psi' = 1. For m1 = 1, k = -m2 * sin(m2) as in
    /// ArcFace's code, or cos(m2) - 1 where that is less (m2 above 2.33: ArcFace's would jump upwards); for other m1,
    /// k = -1 - cos((pi - m2) / m1), with which psi is continuous. Straight-through: psi' = 1 everywhere.
    pub fn target(&self, theta: f64) -> Target {
        let turned = self.turned(theta);
        let guarded = self.guard && turned > PI;
        let psi = if guarded { cosine(theta) + self.guard_shift() } else { cosine(turned) };
        let derivative = if guarded || self.gradient == MarginGradient::StraightThrough {
            1.0
        } else {
            self.m1 * turned.sin() / theta.sin().max(LEAST_SINE)
        };
        Target { logit: self.scale * (psi - self.m3), derivative }
    }

    /// The derivative of psi by m2, of the formula whatever `gradient` says: -sin(m1 * theta + m2), and with the guard beyond pi that of
    /// k. By m3 it is -1.
    pub fn derivative_by_m2(&self, theta: f64) -> f64 {
        let turned = self.turned(theta);
        if !(self.guard && turned > PI) {
            -turned.sin()
        } else if self.m1 != 1.0 {
            -((PI - self.m2) / self.m1).sin() / self.m1
        } else if -self.m2 * self.m2.sin() < self.m2.cos() - 1.0 {
            -self.m2.sin() - self.m2 * self.m2.cos()
        } else {
            -self.m2.sin()
        }
    }

    /// m1 * theta + m2, and 0 where that is below, as a row's own m2 can have it: there the logit stays at its largest.
    fn turned(&self, theta: f64) -> f64 {
        match self.m1 * theta + self.m2 {
            below if below < 0.0 => 0.0,
            // A NaN stays one.
            turned => turned,
        }
    }

    fn guard_shift(&self) -> f64 {
        if self.m1 == 1.0 {
            (-self.m2 * self.m2.sin()).min(self.m2.cos() - 1.0)
        } else {
            -1.0 - ((PI - self.m2) / self.m1).cos()
        }
    }
}

/// cos(theta), and exactly 0 at the angle that [`angle`] gives a row without direction.
pub fn cosine(theta: f64) -> f64 {
    // pi/2 itself is no f64, so that cos would be 6e-17.
    if theta == FRAC_PI_2 {
        0.0
    } else {
        theta.cos()
    }
}

/// The angle between two rows, given the inverses of their norms: 2 atan2(|E^ - W^|, |E^ + W^|), in [0, pi].
///
/// Unlike acos of the inner product it keeps its digits for rows that nearly agree (Kahan, "How futile are mindless assessments of
/// roundoff", 2006, section 12). An inverse norm of 0 stands for a row without direction: pi/2, whose [`cosine`] is 0. Summed in
/// f64, in an order fixed by the length; the same bits on every instruction set.
///
/// # Panics
/// If the lengths differ.
pub fn angle(e: &[f32], e_inverse_norm: f64, w: &[f32], w_inverse_norm: f64) -> f64 {
    assert_eq!(e.len(), w.len(), "angle needs two rows of one length");
    if e_inverse_norm == 0.0 || w_inverse_norm == 0.0 {
        return FRAC_PI_2;
    }
    let [difference, sum] = difference_and_sum_on(Simd::best(), e, e_inverse_norm, w, w_inverse_norm);
    2.0 * difference.sqrt().atan2(sum.sqrt())
}

/// The part of W^ across E^, W^ - cos(theta) E^, and zeros for a row without direction; its norm is sin(theta).
///
/// It is what the target adds to the gradient of E^ but for a factor, once what lies along E^ is taken off. Near theta = 0 and pi
/// it keeps the digits that W^ in f32 less its part along E^ would lose. In f64; the same bits on every instruction set.
///
/// # Panics
/// If the lengths differ.
pub fn tangent(e: &[f32], e_inverse_norm: f64, w: &[f32], w_inverse_norm: f64, theta: f64, out: &mut [f32]) {
    assert!(e.len() == w.len() && e.len() == out.len(), "tangent needs three rows of one length");
    if e_inverse_norm == 0.0 || w_inverse_norm == 0.0 {
        out.fill(0.0);
        return;
    }
    tangent_on(Simd::best(), e, cosine(theta) * e_inverse_norm, w, w_inverse_norm, out)
}

clones! {
    fn tangent_on(e: &[f32], e_factor: f64, w: &[f32], w_factor: f64, out: &mut [f32]) = tangent_body;
}

#[inline(always)]
fn tangent_body(e: &[f32], e_factor: f64, w: &[f32], w_factor: f64, out: &mut [f32]) {
    for ((out, &e), &w) in out.iter_mut().zip(e).zip(w) {
        *out = (f64::from(w) * w_factor - f64::from(e) * e_factor) as f32;
    }
}

/// Running sums of a row.
const LANES: usize = 16;

clones! {
    /// [|E^ - W^|^2, |E^ + W^|^2].
    fn difference_and_sum_on(e: &[f32], e_inverse_norm: f64, w: &[f32], w_inverse_norm: f64) -> [f64; 2] = difference_and_sum;
}

#[inline(always)]
fn difference_and_sum(e: &[f32], e_inverse_norm: f64, w: &[f32], w_inverse_norm: f64) -> [f64; 2] {
    let (mut minus, mut plus) = ([0f64; LANES], [0f64; LANES]);
    let (mut e_groups, mut w_groups) = (e.chunks_exact(LANES), w.chunks_exact(LANES));
    for (e, w) in (&mut e_groups).zip(&mut w_groups) {
        let (e, w): (&[f32; LANES], &[f32; LANES]) = (e.try_into().expect("LANES"), w.try_into().expect("LANES"));
        for lane in 0..LANES {
            let (e, w) = (f64::from(e[lane]) * e_inverse_norm, f64::from(w[lane]) * w_inverse_norm);
            minus[lane] += (e - w) * (e - w);
            plus[lane] += (e + w) * (e + w);
        }
    }
    for (lane, (e, w)) in e_groups.remainder().iter().zip(w_groups.remainder()).enumerate() {
        let (e, w) = (f64::from(*e) * e_inverse_norm, f64::from(*w) * w_inverse_norm);
        minus[lane] += (e - w) * (e - w);
        plus[lane] += (e + w) * (e + w);
    }
    [minus.into_iter().sum(), plus.into_iter().sum()]
}

#[cfg(test)]
mod tests;
