//! Arithmetic on one row: the softmax's exponentials and the few vector products that are too small for a GEMM.
//!
//! Sums run in an order fixed by the row's length alone: 32 running sums, folded from the first lane to the last.

use crate::device::host_math::inverse_norm;
use crate::margin::Margin;
use crate::simd::{clones, Simd};

/// Largest exponent field of a magnitude whose power of two has a normal inverse.
const LARGEST_EXPONENT: u32 = 253;

/// Running sums of a row; a whole number of vectors on every instruction set.
const LANES: usize = 32;
/// Elements whose exponentials are summed in f32 before the lanes are folded into f64.
const BLOCK: usize = 16 * LANES;

/// What a row of exponentials adds up to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSums {
    /// Sum of exp(scale * x - offset), filtered elements as exp(-offset). NaN if any element is.
    pub sum: f64,
    /// Largest x before anything was done to it; -inf for an empty or wholly masked row. NaN elements are passed over.
    pub max_cosine: f32,
}

/// Cosines to the softmax's numerators, in place: x becomes exp(scale * x - offset).
///
/// * -inf (a masked target) becomes exactly 0, as does everything whose exponent is below -87.3.
/// * With a `filter`, x above it becomes 0 and adds exp(-offset) to the sum: a negative whose cosine counts as 0, without gradient.
///
/// The exponential's relative error is below 3e-7 on [-87, 88]; beyond 88.72 it is +inf. NaN stays NaN.
pub fn exp_row(row: &mut [f32], scale: f32, offset: f32, filter: Option<f32>) -> RowSums {
    exp_row_on(Simd::best(), row, scale, offset, filter)
}

clones! {
    /// [`exp_row`] on a given instruction set.
    pub fn exp_row_on(row: &mut [f32], scale: f32, offset: f32, filter: Option<f32>) -> RowSums = exp_row_body::<FMA>;
}

#[inline(always)]
fn exp_row_body<const FMA: bool>(row: &mut [f32], scale: f32, offset: f32, filter: Option<f32>) -> RowSums {
    let (limit, floor) = match filter {
        Some(limit) => (limit, (-f64::from(offset)).exp() as f32),
        None => (f32::INFINITY, 0.0),
    };
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut total = [0f64; LANES];
    for block in row.chunks_mut(BLOCK) {
        let mut sum = [0f32; LANES];
        let mut groups = block.chunks_exact_mut(LANES);
        for group in &mut groups {
            let group: &mut [f32; LANES] = group.try_into().expect("a group has LANES elements");
            exp_group::<FMA>(group, scale, offset, limit, floor, &mut sum, &mut max);
        }
        let rest = groups.into_remainder();
        if !rest.is_empty() {
            // Masked elements add nothing, so that the tail takes the same path as the rest.
            let mut padded = [f32::NEG_INFINITY; LANES];
            padded[..rest.len()].copy_from_slice(rest);
            exp_group::<FMA>(&mut padded, scale, offset, limit, floor, &mut sum, &mut max);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
        for lane in 0..LANES {
            total[lane] += f64::from(sum[lane]);
        }
    }
    let max_cosine = max.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    RowSums { sum: total.into_iter().sum(), max_cosine }
}

#[inline(always)]
fn exp_group<const FMA: bool>(
    group: &mut [f32; LANES],
    scale: f32,
    offset: f32,
    limit: f32,
    floor: f32,
    sum: &mut [f32; LANES],
    max: &mut [f32; LANES],
) {
    for lane in 0..LANES {
        let x = group[lane];
        let power = exp::<FMA>(fma::<FMA>(x, scale, -offset));
        let filtered = x > limit;
        group[lane] = if filtered { 0.0 } else { power };
        sum[lane] += if filtered { floor } else { power };
        max[lane] = if x > max[lane] { x } else { max[lane] };
    }
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// exp(t) = 2^n exp(r) with n = round(t / ln 2) and |r| <= ln(2) / 2: the reduction and polynomial of Cephes' expf.
#[inline(always)]
fn exp<const FMA: bool>(t: f32) -> f32 {
    /// Just above ln(2^-126): what lies below has no normal result.
    const LOWEST: f32 = -87.3;
    /// ln(f32::MAX), rounded down.
    const HIGHEST: f32 = 88.722_83;
    /// 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has 9 bits, so that n times it is exact without a fused multiply.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;

    // Written so that NaN fails both comparisons and goes through the arithmetic.
    let clamped = if t < LOWEST { LOWEST } else { t };
    let rounded = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4;
    p = fma::<FMA>(p, r, 1.398_199_9e-3);
    p = fma::<FMA>(p, r, 8.333_452e-3);
    p = fma::<FMA>(p, r, 4.166_579_6e-2);
    p = fma::<FMA>(p, r, 1.666_666_5e-1);
    p = fma::<FMA>(p, r, 0.5);
    p = fma::<FMA>(p, r * r, r) + 1.0;
    // n goes straight into the exponent field: at n = 128 the polynomial is below 1 and the result still finite.
    let power = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    let power = if t < LOWEST { 0.0 } else { power };
    let power = if t > HIGHEST { f32::INFINITY } else { power };
    // A NaN's exponent bits may have been shifted into a number.
    if t.is_nan() {
        t
    } else {
        power
    }
}

/// Sum of squares. Products of f32 are exact in f64, so that every instruction set gives the same bits.
pub fn sum_of_squares(row: &[f32]) -> f64 {
    dot(row, row)
}

/// Inner product, summed in f64; every instruction set gives the same bits.
///
/// # Panics
/// If the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "dot needs two rows of one length");
    dot_on(Simd::best(), a, b)
}

clones! {
    /// [`dot`] on a given instruction set.
    pub fn dot_on(a: &[f32], b: &[f32]) -> f64 = dot_body;
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f64 {
    let mut sum = [0f64; LANES];
    let (mut a_groups, mut b_groups) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a_groups).zip(&mut b_groups) {
        let (a, b): (&[f32; LANES], &[f32; LANES]) = (a.try_into().expect("LANES"), b.try_into().expect("LANES"));
        for lane in 0..LANES {
            sum[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    for (lane, (a, b)) in a_groups.remainder().iter().zip(b_groups.remainder()).enumerate() {
        sum[lane] += f64::from(*a) * f64::from(*b);
    }
    sum.into_iter().sum()
}

/// dst = factor * src.
///
/// # Panics
/// If the lengths differ.
pub fn scale_into(src: &[f32], factor: f32, dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len(), "scale_into needs two rows of one length");
    scale_into_on(Simd::best(), src, factor, dst)
}

clones! {
    fn scale_into_on(src: &[f32], factor: f32, dst: &mut [f32]) = scale_into_body;
}

#[inline(always)]
fn scale_into_body(src: &[f32], factor: f32, dst: &mut [f32]) {
    for (to, from) in dst.iter_mut().zip(src) {
        *to = factor * from;
    }
}

/// dst += factor * src, rounded twice an element, alike on every instruction set.
///
/// # Panics
/// If the lengths differ.
pub fn add_scaled(dst: &mut [f32], factor: f32, src: &[f32]) {
    assert_eq!(src.len(), dst.len(), "add_scaled needs two rows of one length");
    add_scaled_on(Simd::best(), dst, factor, src)
}

clones! {
    fn add_scaled_on(dst: &mut [f32], factor: f32, src: &[f32]) = add_scaled_body;
}

#[inline(always)]
fn add_scaled_body(dst: &mut [f32], factor: f32, src: &[f32]) {
    for (to, from) in dst.iter_mut().zip(src) {
        *to += factor * from;
    }
}

/// What turns cosines into numerators: P = exp(scale * cos - offset), the offset being c = max(0, scale - 64) or a row's own.
#[derive(Clone, Copy, Debug)]
pub struct Softmax {
    pub scale: f32,
    /// c.
    pub offset: f32,
    /// A negative's cosine above it counts as 0.
    pub filter: Option<f32>,
}

impl Softmax {
    pub fn new(margin: &Margin) -> Softmax {
        Softmax {
            scale: margin.scale as f32,
            offset: margin.offset() as f32,
            filter: (margin.interclass_filter > 0.0).then_some(margin.interclass_filter as f32),
        }
    }
}

/// As [`exp_row`] for one class and many rows of the batch, each with its offset: adds each numerator to its row's sum and keeps each
/// row's largest cosine. A row with a filtered element has offset c.
///
/// # Panics
/// If the lengths differ.
pub fn softmax_column(column: &mut [f32], softmax: &Softmax, offsets: &[f32], sums: &mut [f32], best: &mut [f32]) {
    let lengths = [offsets.len(), sums.len(), best.len()];
    assert!(lengths == [column.len(); 3], "softmax_column needs four rows of one length");
    softmax_column_on(Simd::best(), column, softmax, offsets, sums, best)
}

clones! {
    fn softmax_column_on(column: &mut [f32], softmax: &Softmax, offsets: &[f32], sums: &mut [f32], best: &mut [f32])
        = softmax_column_body::<FMA>;
}

#[inline(always)]
fn softmax_column_body<const FMA: bool>(
    column: &mut [f32],
    softmax: &Softmax,
    offsets: &[f32],
    sums: &mut [f32],
    best: &mut [f32],
) {
    let (limit, floor) = match softmax.filter {
        Some(limit) => (limit, (-f64::from(softmax.offset)).exp() as f32),
        None => (f32::INFINITY, 0.0),
    };
    let scale = softmax.scale;
    for (((cell, offset), sum), best) in column.iter_mut().zip(offsets).zip(sums).zip(best) {
        let x = *cell;
        let power = exp::<FMA>(fma::<FMA>(x, scale, -offset));
        let filtered = x > limit;
        *cell = if filtered { 0.0 } else { power };
        *sum += if filtered { floor } else { power };
        *best = if x > *best { x } else { *best };
    }
}

/// Turns the part of W^ across E^ into that of E^ across W^, in place: sin^2 E^ - cos t, the sine being t's norm. Nothing cancels.
///
/// # Panics
/// If the lengths differ.
pub fn turn_tangent(tangent: &mut [f32], unit: &[f32], cosine: f32) {
    assert_eq!(tangent.len(), unit.len(), "turn_tangent needs two rows of one length");
    let sine_squared = sum_of_squares(tangent) as f32;
    turn_tangent_on(Simd::best(), tangent, unit, sine_squared, cosine)
}

clones! {
    fn turn_tangent_on(tangent: &mut [f32], unit: &[f32], sine_squared: f32, cosine: f32) = turn_tangent_body;
}

#[inline(always)]
fn turn_tangent_body(tangent: &mut [f32], unit: &[f32], sine_squared: f32, cosine: f32) {
    for (t, u) in tangent.iter_mut().zip(unit) {
        *t = sine_squared * u - cosine * *t;
    }
}

/// The backward of normalize, in place: of dL/du for u = row * inverse_norm makes factor * (g - (g . u) u).
///
/// With factor = inverse_norm that is dL/drow. Returns the sum of the squares of the result.
///
/// # Panics
/// If the lengths differ.
pub fn normalize_backward(gradient: &mut [f32], row: &[f32], inverse_norm: f32, factor: f32) -> f64 {
    let along = (dot(gradient, row) * f64::from(inverse_norm)) as f32;
    subtract_along_on(Simd::best(), gradient, row, along * inverse_norm, factor);
    sum_of_squares(gradient)
}

clones! {
    fn subtract_along_on(gradient: &mut [f32], row: &[f32], along: f32, factor: f32) = subtract_along;
}

#[inline(always)]
fn subtract_along(gradient: &mut [f32], row: &[f32], along: f32, factor: f32) {
    for (g, r) in gradient.iter_mut().zip(row) {
        *g = (*g - along * r) * factor;
    }
}

/// row *= factor.
pub fn scale(row: &mut [f32], factor: f32) {
    scale_on(Simd::best(), row, factor)
}

clones! {
    fn scale_on(row: &mut [f32], factor: f32) = scale_body;
}

#[inline(always)]
fn scale_body(row: &mut [f32], factor: f32) {
    for x in row {
        *x *= factor;
    }
}

/// What a row is multiplied by to travel in f16: the power of two that takes its largest magnitude into [1, 2).
///
/// It and its inverse are normal numbers: a largest magnitude of 2^127 or more comes into [2, 4). 0 for a row without a direction,
/// 1 for one with a NaN or an infinity, which is still there in f16. kernels/embeddings.cu send_scale.
pub fn send_scale(row: &[f32]) -> f32 {
    // As integers magnitudes have the order of the numbers, with NaN above them all.
    let largest = row.iter().fold(0, |largest, value| value.abs().to_bits().max(largest));
    if largest >= f32::INFINITY.to_bits() {
        return 1.0;
    }
    if inverse_norm(sum_of_squares(row)) == 0.0 {
        return 0.0;
    }
    let exponent = (largest >> 23).min(LARGEST_EXPONENT);
    f32::from_bits((254 - exponent) << 23)
}

#[cfg(test)]
mod tests;
