//! Products of bfloat16s: an element of an operand is a pair of them, neighbors along what is summed over.
//!
//! VDPBF16PS (AVX-512 BF16) multiplies 16 pairs by 16 others and adds both products of each to a float32: twice the multiply-adds of
//! float32's own instruction, at the same rate on processors of AMD. The operands lie as those of float32 do, with half as many elements to
//! sum over, so strips, tiles and their order are the same. AMX has a matrix unit, and code of its own: [`super::amx`].

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{GemmShape, Operand, Store};
use crate::rounding::nearest;
#[cfg(target_arch = "x86_64")]
use crate::simd::may_use_tiles;
use crate::simd::{clones, Level, Simd};

/// Two bfloat16s; the first in the low half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Pair(u32);

impl Pair {
    #[inline(always)]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The nearest to two numbers.
    #[inline(always)]
    fn of(first: f32, second: f32) -> Pair {
        Pair(u32::from(nearest(first)) | u32::from(nearest(second)) << 16)
    }
}

/// Floats' memory in which there are pairs.
pub(crate) fn as_pairs(memory: &[f32]) -> &[Pair] {
    // SAFETY: of one size and alignment; any bits are a pair.
    unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), memory.len()) }
}

/// Floats' memory in which there are bfloat16s, two to a float: a row of pairs along itself.
pub(crate) fn as_bf16(memory: &[f32]) -> &[u16] {
    // SAFETY: half of the size and no larger alignment; any bits are a bfloat16.
    unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), 2 * memory.len()) }
}

/// [`as_bf16`], to write to.
pub(crate) fn as_bf16_mut(memory: &mut [f32]) -> &mut [u16] {
    // SAFETY: as there; any bits are a float.
    unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), 2 * memory.len()) }
}

/// Of every two rows of `length` floats, `pitch` apart, makes pairs of the elements of one column, where the first of them was. What an odd
/// last row is paired with is 0.
pub(crate) fn pair_rows(rows: &mut [f32], pitch: usize, length: usize) {
    let simd = Simd::best();
    for two in rows.chunks_mut(2 * pitch) {
        let (first, second) = two.split_at_mut(pitch.min(two.len()));
        match second.is_empty() {
            false => pair_on(simd, &mut first[..length], &second[..length]),
            true => pair_with_zeros_on(simd, &mut first[..length]),
        }
    }
}

clones! {
    fn pair_on(first: &mut [f32], second: &[f32]) = pair_body;
}

#[inline(always)]
fn pair_body(first: &mut [f32], second: &[f32]) {
    for (first, second) in first.iter_mut().zip(second) {
        *first = f32::from_bits(Pair::of(*first, *second).bits());
    }
}

clones! {
    fn pair_with_zeros_on(first: &mut [f32]) = pair_with_zeros_body;
}

#[inline(always)]
fn pair_with_zeros_body(first: &mut [f32]) {
    for first in first {
        *first = f32::from_bits(Pair::of(*first, 0.0).bits());
    }
}

/// The right operand of [`PairUnit::gemm_terms`] from the rows of its transpose: of columns 2i and 2i + 1 of `rows`, `pitch` apart, the pairs
/// of the first terms of every row, and of the second ones.
pub(crate) fn split_columns(rows: &[f32], pitch: usize, i: usize, length: usize, terms: [&mut [f32]; 2]) {
    let [first, second] = terms;
    for ((row, first), second) in rows.chunks(pitch).zip(first).zip(second) {
        let numbers = [row[2 * i], if 2 * i + 1 < length { row[2 * i + 1] } else { 0.0 }];
        let left = numbers.map(|x| x - f32::from_bits(u32::from(nearest(x)) << 16));
        *first = f32::from_bits(Pair::of(numbers[0], numbers[1]).bits());
        *second = f32::from_bits(Pair::of(left[0], left[1]).bits());
    }
}

/// What multiplies pairs. To hold one is to know that the processor can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PairUnit(Simd);

impl PairUnit {
    /// That of an instruction set. Where the system does not let this process use the tiles of AMX there is none.
    pub fn of(simd: Simd) -> Option<PairUnit> {
        match simd.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => may_use_tiles().then_some(PairUnit(simd)),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => Some(PairUnit(simd)),
            _ => None,
        }
    }

    /// Whether products of terms ([`PairUnit::gemm_terms`]) are faster than those of float32: there are three for one.
    pub fn multiplies_terms(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0.level() == Level::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// destination [m, n] = left [m, k] @ right [k, n] of float32, each number as the sum of two bfloat16s; the product of both second ones
    /// is left out. A product of two numbers is off by less than 2^-15 of it. Rows of the destination are `pitch` apart.
    ///
    /// Of the right operand there are pairs: [`split_columns`].
    ///
    /// # Panics
    /// Unless it [multiplies terms](PairUnit::multiplies_terms).
    pub fn gemm_terms(self, shape: GemmShape, destination: &mut [f32], pitch: usize, left: Operand<'_>, right: Operand<'_, Pair>) {
        shape.check(destination, pitch);
        let GemmShape { m, n, k } = shape;
        let pairs = k.div_ceil(2);
        if m == 0 || n == 0 || k == 0 {
            return super::gemm(shape, destination, pitch, left, Operand::rows(&[], 0), Store::Replace);
        }
        assert!(self.multiplies_terms() && left.column_stride == 1, "products of terms of rows");
        assert!(left.covers(m, k) && right.covers(2 * pairs, n), "operands of {m} x {n} x {k}");
        #[cfg(target_arch = "x86_64")]
        for (second, from, store) in [(false, 0, Store::Replace), (false, pairs, Store::Add), (true, 0, Store::Add)] {
            let left = amx::Left::Terms(amx::Terms { rows: left, length: k, second });
            let right = Operand { data: &right.data[from * right.row_stride..], ..right };
            // SAFETY: as just checked; the destination is borrowed alone; a PairUnit of that level exists only where the processor has it.
            unsafe { amx::run(GemmShape { m, n, k: pairs }, destination.as_mut_ptr(), (pitch, 1), &left, right, store) };
        }
    }

    /// destination [m, n] (+)= left [m, k] @ right [k, n] of pairs on the calling thread. Rows of the destination are `pitch` apart.
    ///
    /// What is below the normal numbers counts as 0, in the operands and in the sums.
    pub fn gemm(
        self,
        shape: GemmShape,
        destination: &mut [f32],
        pitch: usize,
        left: Operand<'_, Pair>,
        right: Operand<'_, Pair>,
        store: Store,
    ) {
        shape.check(destination, pitch);
        // SAFETY: as just checked; the destination is borrowed alone.
        let Some(product) = (unsafe { super::Product::new(shape, destination.as_mut_ptr(), pitch, left, right, store) }) else {
            return;
        };
        match self.0.level() {
            // SAFETY: the strides keep every access inside the slices, as `Product::new` has checked; a PairUnit of a level exists only
            // where the processor has its features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => unsafe { avx512_bf16(&product) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Amx => unsafe { amx::multiply(&product) },
            _ => unreachable!("{self:?} multiplies no pairs"),
        }
    }
}

/// # Safety
/// The processor has these features; otherwise as [`super::gemm_into`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")]
unsafe fn avx512_bf16(product: &super::Product<'_, Pair>) {
    unsafe { product.run::<super::tile::Pairs, 8, 3>() }
}

#[cfg(test)]
mod tests;
