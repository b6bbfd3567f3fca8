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
mod tests {
    use super::*;

    fn margin(m1: f64, m2: f64, m3: f64) -> Margin {
        Margin { scale: 64.0, m1, m2, m3, interclass_filter: 0.0, gradient: MarginGradient::Exact, guard: false }
    }

    #[test]
    fn ranges_are_checked_at_both_ends() {
        let arcface = margin(1.0, 0.5, 0.0);
        type Set = fn(&mut Margin, f64);
        let cases: [(&str, Set, &[f64], &[f64]); 5] = [
            ("scale", |m, v| m.scale = v, &[1e-3, 64.0, 128.0], &[0.0, -1.0, 128.1, f64::INFINITY, f64::NAN]),
            ("m1", |m, v| m.m1 = v, &[0.1, 1.0, 16.0], &[0.0, -1.0, 16.1, f64::INFINITY, f64::NAN]),
            ("m2", |m, v| m.m2 = v, &[0.0, 0.5, PI, std::f32::consts::PI as f64], &[-0.1, 3.15, f64::INFINITY, f64::NAN]),
            ("m3", |m, v| m.m3 = v, &[0.0, 0.35, 2.0], &[-0.1, 2.1, f64::INFINITY, f64::NAN]),
            ("interclass_filter", |m, v| m.interclass_filter = v, &[0.0, 0.4, 1.0], &[-0.1, 1.1, f64::INFINITY, f64::NAN]),
        ];
        for (name, set, good, bad) in cases {
            for &value in good {
                let mut margin = arcface;
                set(&mut margin, value);
                assert_eq!(margin.check(), Ok(()), "{name} = {value}");
            }
            for &value in bad {
                let mut margin = arcface;
                set(&mut margin, value);
                let refused = margin.check().unwrap_err();
                assert_eq!(refused.status, crate::Status::InvalidArgument);
                assert!(
                    refused.message.starts_with(&format!("{name} must be "))
                        && refused.message.ends_with(&format!(", got {value:?}")),
                    "{}",
                    refused.message
                );
            }
        }
        let mut zero = arcface;
        zero.scale = 0.0;
        assert_eq!(zero.check().unwrap_err().message, "scale must be above 0 and at most 128, got 0.0");
    }

    #[test]
    fn the_offset_begins_at_64() {
        for (scale, offset) in [(1e-3, 0.0), (30.0, 0.0), (64.0, 0.0), (65.0, 1.0), (128.0, 64.0)] {
            assert_eq!(Margin { scale, ..margin(1.0, 0.5, 0.0) }.offset(), offset);
        }
    }

    #[test]
    fn rows_far_from_all_negatives_have_an_offset_of_their_own() {
        let at = |scale: f64, filter: f64, best: f32| {
            let margin = Margin { scale, interclass_filter: filter, ..margin(1.0, 0.5, 0.0) };
            (margin.has_row_offsets(), margin.row_offset(best))
        };
        for best in [-2.0, -1.0, 0.0, 1.0] {
            assert_eq!([at(75.0, 0.0, best), at(64.0, 0.1, best)], [(false, 11.0), (false, 0.0)]);
            assert!((75f64 + 11.0) < -f64::from(f32::MIN_POSITIVE).ln());
        }
        assert_eq!(at(128.0, 0.0, 0.04), (true, 64.0));
        assert_eq!(at(128.0, 0.0, 0.03), (true, (128.0 * f64::from(0.03f32)) as f32));
        assert_eq!(at(128.0, 0.0, -1.0), (true, -128.0));
        // No negative at all; a negative above the filter, which counts as cosine 0.
        assert_eq!([at(128.0, 0.0, -2.0), at(128.0, 0.01, 0.02)], [(true, 64.0); 2]);
        assert_eq!(at(128.0, 0.01, -0.5), (true, -64.0));
        assert_eq!([at(90.0, 0.0, -0.3).1, at(90.0, 0.0, -0.5).1], [26.0, -45.0]);
    }

    #[test]
    fn targets_follow_the_formula() {
        let target = margin(1.0, 0.5, 0.0).target(1.0);
        assert_eq!(target.logit, 64.0 * 1.5f64.cos());
        assert!((target.derivative - 1.5f64.sin() / 1f64.sin()).abs() < 1e-15);
        let target = margin(1.0, 0.0, 0.35).target(0.7);
        assert!((target.logit - 64.0 * (0.7f64.cos() - 0.35)).abs() < 1e-12);
        assert_eq!(target.derivative, 1.0);
        let target = Margin { gradient: MarginGradient::StraightThrough, ..margin(2.0, 0.3, 0.1) }.target(0.7);
        assert!((target.logit - 64.0 * (1.7f64.cos() - 0.1)).abs() < 1e-12);
        assert_eq!(target.derivative, 1.0);
    }

    #[test]
    fn derivatives_are_finite_differences_by_the_cosine() {
        for guard in [false, true] {
            for (m1, m2, m3) in
                [(1.0, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.3, 0.2), (0.9, 0.4, 0.15), (1.35, 0.0, 0.0), (4.0, 0.1, 0.0)]
            {
                let margin = Margin { guard, scale: 1.0, ..margin(m1, m2, m3) };
                for step in 1..200 {
                    let theta = PI * f64::from(step) / 200.0;
                    let h = 1e-6;
                    if (m1 * theta + m2 - PI).abs() < 1e-3 {
                        continue;
                    }
                    let (high, low) = (margin.target(theta + h).logit, margin.target(theta - h).logit);
                    let difference = (high - low) / ((theta + h).cos() - (theta - h).cos());
                    let derivative = margin.target(theta).derivative;
                    assert!(
                        (difference - derivative).abs() < 1e-6 * m1 * m1 * 10.0,
                        "{margin:?} {theta}: {difference} {derivative}"
                    );
                }
            }
        }
    }

    #[test]
    fn derivatives_by_m2_are_finite_differences() {
        for (guard, m1) in [(false, 1.0), (true, 1.0), (false, 1.35), (true, 1.35), (true, 0.5), (true, 4.0)] {
            // 2.33 is where k with m1 = 1 goes from one formula to the other.
            for m2 in [-0.4, 0.1, 0.5, 1.5, 2.2, 2.5, 3.0] {
                let at = |m2: f64| Margin { guard, scale: 1.0, ..margin(m1, m2, 0.2) };
                for theta in (1..200).map(|step| PI * f64::from(step) / 200.0) {
                    let h = 1e-6;
                    if (m1 * theta + m2 - PI).abs() < 1e-3 {
                        continue;
                    }
                    let difference = (at(m2 + h).target(theta).logit - at(m2 - h).target(theta).logit) / (2.0 * h);
                    let derivative = at(m2).derivative_by_m2(theta);
                    assert!((difference - derivative).abs() < 1e-8, "{guard} {m1} {m2} {theta}: {difference} {derivative}");
                }
            }
        }
    }

    #[test]
    fn a_margin_below_0_ends_where_the_logit_is_largest() {
        for m1 in [0.8, 1.0, 1.4] {
            let negative = Margin { scale: 1.0, ..margin(m1, -0.4, 0.1) };
            let edge = 0.4 / m1;
            assert_eq!(negative.target(edge - 1e-3), Target { logit: 0.9, derivative: 0.0 });
            assert_eq!(negative.derivative_by_m2(edge - 1e-3), 0.0);
            let beyond = negative.target(edge + 0.1);
            assert!((beyond.logit - ((0.1 * m1).cos() - 0.1)).abs() < 1e-15 && beyond.derivative > 0.0);
        }
    }

    #[test]
    fn derivatives_stay_finite_at_the_ends() {
        for theta in [0.0, 1e-9, PI - 1e-9, PI] {
            let target = margin(1.0, 0.5, 0.0).target(theta);
            assert!(target.logit.is_finite() && target.derivative.abs() <= 1.0 / LEAST_SINE, "{theta}: {target:?}");
        }
        let at_zero = margin(1.0, 0.5, 0.0).target(0.0).derivative;
        assert_eq!(at_zero, 0.5f64.sin() / 1e-4);
    }

    #[test]
    fn with_the_guard_the_logit_falls_with_the_angle() {
        let rises = |margin: Margin| {
            let logits: Vec<f64> = (0..=10_000).map(|step| margin.target(PI * f64::from(step) / 10_000.0).logit).collect();
            logits.windows(2).any(|pair| pair[1] > pair[0] + 1e-12)
        };
        for m1 in [0.5, 0.9, 1.0, 1.1, 1.35, 2.0, 4.0, 16.0] {
            for m2 in [0.0, 0.1, 0.5, 1.0, 2.0, 2.3, 2.4, 3.0, PI] {
                let unguarded = margin(m1, m2, 0.1);
                assert!(!rises(Margin { guard: true, ..unguarded }), "{m1} {m2}");
                let turns_back = m1 * PI + m2 > PI + 1e-3;
                assert_eq!(rises(unguarded), turns_back, "{m1} {m2}");
            }
        }
    }

    #[test]
    fn the_guard_is_arcface_s_for_usual_margins_and_continuous_for_other_multipliers() {
        let guarded = Margin { guard: true, scale: 1.0, ..margin(1.0, 0.5, 0.0) };
        let target = guarded.target(3.0);
        assert!((target.logit - (3f64.cos() - 0.5 * 0.5f64.sin())).abs() < 1e-15);
        assert_eq!(target.derivative, 1.0);
        assert_eq!(guarded.target(2.0), Margin { guard: false, ..guarded }.target(2.0));
        let guarded = Margin { guard: true, scale: 1.0, ..margin(1.3, 0.2, 0.1) };
        let edge = (PI - 0.2) / 1.3;
        assert!((guarded.target(edge - 1e-9).logit - guarded.target(edge + 1e-9).logit).abs() < 1e-8);
    }

    fn row(seed: u32, count: usize) -> (Vec<f32>, f64) {
        let row: Vec<f32> = (0..count).map(|i| ((i as u32 * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect();
        let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        (row, 1.0 / norm)
    }

    #[test]
    fn angles_have_the_cosine_of_the_rows() {
        for count in [1, 2, 15, 16, 17, 100, 512] {
            let ((e, e_inverse), (w, w_inverse)) = (row(1, count), row(2, count));
            let theta = angle(&e, e_inverse, &w, w_inverse);
            let dot: f64 = e.iter().zip(&w).map(|(&e, &w)| f64::from(e) * f64::from(w)).sum();
            assert!((cosine(theta) - dot * e_inverse * w_inverse).abs() < 1e-14, "{count}");
            let bits = difference_and_sum(&e, e_inverse, &w, w_inverse).map(f64::to_bits);
            for simd in Simd::available() {
                assert_eq!(difference_and_sum_on(simd, &e, e_inverse, &w, w_inverse).map(f64::to_bits), bits, "{simd:?} {count}");
            }
        }
    }

    #[test]
    fn tangents_are_across_the_row_and_as_long_as_the_sine() {
        for count in [2, 15, 16, 17, 512] {
            let (e, e_inverse) = row(1, count);
            for nearness in [0.0, 1.0, 1e3, 1e6, -1e3] {
                let (mut w, _) = row(2, count);
                w.iter_mut().zip(&e).for_each(|(w, &e)| *w += nearness * e);
                let w_inverse = 1.0 / w.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
                let theta = angle(&e, e_inverse, &w, w_inverse);
                let mut found = vec![f32::NAN; count];
                tangent(&e, e_inverse, &w, w_inverse, theta, &mut found);
                let sine = found.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
                assert!((sine - theta.sin()).abs() <= 1e-7 * sine, "{count} {nearness}: {sine} for {}", theta.sin());
                let along: f64 = found.iter().zip(&e).map(|(&t, &e)| f64::from(t) * f64::from(e)).sum();
                assert!((along * e_inverse).abs() <= 1e-7 * sine, "{count} {nearness}: {along}");
            }
            let mut none = vec![f32::NAN; count];
            tangent(&e, 0.0, &e, e_inverse, FRAC_PI_2, &mut none);
            assert_eq!(none, vec![0.0; count]);
            // Theta 0 and pi: nothing but roundings of f64.
            let opposite: Vec<f32> = e.iter().map(|x| -x).collect();
            for (w, theta) in [(&e, 0.0), (&opposite, PI)] {
                tangent(&e, e_inverse, w, e_inverse, theta, &mut none);
                assert!(none.iter().all(|t| t.abs() < 1e-15));
            }
        }
    }

    #[test]
    fn small_angles_keep_their_digits() {
        let (mut e, mut w) = (vec![0f32; 40], vec![0f32; 40]);
        (e[0], w[0], w[1]) = (3.0, 2.0, 2e-10);
        let theta = angle(&e, 1.0 / 3.0, &w, 0.5);
        assert!((theta - 1e-10).abs() < 1e-16, "{theta}");
        assert_eq!(angle(&e, 1.0 / 3.0, &e, 1.0 / 3.0), 0.0);
        let opposite: Vec<f32> = e.iter().map(|x| -x).collect();
        assert!((angle(&e, 1.0 / 3.0, &opposite, 1.0 / 3.0) - PI).abs() < 1e-15);
    }

    #[test]
    fn a_row_without_direction_has_cosine_zero() {
        let (e, inverse) = row(1, 64);
        let zero = vec![0f32; 64];
        for theta in [angle(&e, inverse, &zero, 0.0), angle(&zero, 0.0, &e, inverse), angle(&zero, 0.0, &zero, 0.0)] {
            assert_eq!(cosine(theta), 0.0);
        }
        // NaN in a row that does not count is not looked at.
        assert_eq!(angle(&[f32::NAN], 0.0, &[1.0], 1.0), FRAC_PI_2);
        assert!(angle(&[f32::NAN], 1.0, &[1.0], 1.0).is_nan());
        assert_eq!(margin(1.0, 0.0, 0.0).target(FRAC_PI_2).logit, 0.0);
    }
}
