//! Rows stored in bfloat16: widened exactly, and rounded to nearest or at random.
//!
//! An update far below half a unit in the last place never changes a number that is rounded to nearest, and the push of an ordinary
//! negative is such an update. Rounded at random, up with the probability that is the part left over, a number moves as far as it
//! should in the mean. The bits come from a counter, so that they are the same on any number of threads and ranks.

use crate::simd::{clones, Simd};

/// The bits of a float32 that bfloat16 leaves out.
const LEFT_OUT: u32 = 0xffff;
/// Columns that one set of words rounds: each word two, one with its low half and one with its high half.
const GROUP: usize = 32;
const WEYL: u32 = 0x9E37_79B9;

/// The float32 that a bfloat16 is.
pub fn widen(from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "rows of one length");
    widen_on(Simd::best(), from, to);
}

/// To nearest, halves to even. Gives whether all are finite, before and after.
pub fn to_nearest(from: &[f32], to: &mut [u16]) -> bool {
    assert_eq!(from.len(), to.len(), "rows of one length");
    to_nearest_on(Simd::best(), from, to)
}

/// At random: away from 0 with the probability that is the part left over, to 16 bits. What bfloat16 holds stays as it is. Gives
/// whether all are finite, before and after.
///
/// Column c has 16 bits of word(c / 32 * 16 + c mod 16), the low ones where c mod 32 < 16, word(i) = lowbias32(key + i * 0x9E3779B9)
/// (C. Wellons, hash-prospector). The key is [`crate::random::rounding_key`].
pub fn at_random(key: u32, from: &[f32], to: &mut [u16]) -> bool {
    assert_eq!(from.len(), to.len(), "rows of one length");
    at_random_on(Simd::best(), key, from, to)
}

clones! {
    fn widen_on(from: &[u16], to: &mut [f32]) = widen_body;
}

#[inline(always)]
fn widen_body(from: &[u16], to: &mut [f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from) << 16);
    }
}

clones! {
    fn to_nearest_on(from: &[f32], to: &mut [u16]) -> bool = to_nearest_body;
}

#[inline(always)]
fn to_nearest_body(from: &[f32], to: &mut [u16]) -> bool {
    let mut left = 0;
    for (to, &from) in to.iter_mut().zip(from) {
        left |= round(from.to_bits(), nearest_carry(from), to);
    }
    left == 0
}

/// What rounds to nearest, halves to even.
#[inline(always)]
fn nearest_carry(value: f32) -> u32 {
    0x7fff + (value.to_bits() >> 16 & 1)
}

/// The nearest bfloat16, halves to even.
#[inline(always)]
pub(crate) fn nearest(value: f32) -> u16 {
    let mut rounded = 0;
    round(value.to_bits(), nearest_carry(value), &mut rounded);
    rounded
}

/// Makes the nearest that bfloat16 holds of each number.
pub(crate) fn narrow(row: &mut [f32]) {
    narrow_on(Simd::best(), row);
}

clones! {
    fn narrow_on(row: &mut [f32]) = narrow_body;
}

#[inline(always)]
fn narrow_body(row: &mut [f32]) {
    for value in row {
        *value = f32::from_bits(u32::from(nearest(*value)) << 16);
    }
}

clones! {
    fn at_random_on(key: u32, from: &[f32], to: &mut [u16]) -> bool = at_random_body;
}

#[inline(always)]
fn at_random_body(key: u32, from: &[f32], to: &mut [u16]) -> bool {
    const HALF: usize = GROUP / 2;
    let mut left = 0;
    let (mut groups, mut stored) = (from.chunks_exact(GROUP), to.chunks_exact_mut(GROUP));
    let mut first = 0;
    for (from, to) in (&mut groups).zip(&mut stored) {
        let from: &[f32; GROUP] = from.try_into().expect("a group's length");
        let to: &mut [u16; GROUP] = to.try_into().expect("a group's length");
        for i in 0..HALF {
            let word = word(key, first + i as u32);
            left |= round(from[i].to_bits(), word & LEFT_OUT, &mut to[i]);
            left |= round(from[HALF + i].to_bits(), word >> 16, &mut to[HALF + i]);
        }
        first += HALF as u32;
    }
    for (i, (from, to)) in groups.remainder().iter().zip(stored.into_remainder()).enumerate() {
        let word = word(key, first + (i % HALF) as u32);
        left |= round(from.to_bits(), if i < HALF { word & LEFT_OUT } else { word >> 16 }, to);
    }
    left == 0
}

#[inline(always)]
fn word(key: u32, i: u32) -> u32 {
    let mut x = key.wrapping_add(i.wrapping_mul(WEYL));
    x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
    x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

/// Adds `carry`, below 0x10000, to a float32's bits and cuts off what bfloat16 leaves out. Gives not 0 where a NaN or an infinity goes in
/// or comes out.
#[inline(always)]
fn round(bits: u32, carry: u32, to: &mut u16) -> u32 {
    const EXPONENT: u32 = 0x7f80_0000;
    // Added to a NaN it might make it a number.
    let carry = if bits & EXPONENT == EXPONENT { 0 } else { carry };
    let sum = bits.wrapping_add(carry);
    *to = (sum >> 16) as u16;
    u32::from(sum & EXPONENT == EXPONENT)
}

#[cfg(test)]
mod tests;
