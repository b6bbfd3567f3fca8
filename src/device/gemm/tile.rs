//! The innermost loops of a product: a tile of the destination is summed in registers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::pairs::Pair;
use crate::simd::PORTABLE_FMA;

/// A register as an instruction set has it: elements of the operands side by side, or as many sums. Its functions run only where the
/// processor has that.
///
/// # Safety
/// In memory it is LANES elements or floats, the first lane first, without padding; `load` and `store` touch these and nothing else.
pub(super) unsafe trait Vector: Copy {
    /// Of the operands: as large as a float.
    type Element: Copy + Default;
    const LANES: usize;

    unsafe fn splat(value: Self::Element) -> Self;
    unsafe fn load(from: *const Self::Element) -> Self;
    unsafe fn store(self, to: *mut Self::Element);
    unsafe fn plus(self, other: Self) -> Self;
    /// Hints that this line of memory will be used.
    unsafe fn prefetch(_line: *const f32) {}
    /// The sums self, and the products of the elements a and b.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
}

/// A register of x86's.
#[cfg(target_arch = "x86_64")]
macro_rules! register {
    ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $plus:ident, $fused:ident) => {
        unsafe impl Vector for $type {
            type Element = f32;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                unsafe { $splat(value) }
            }

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                unsafe { $store(to, self) }
            }

            #[inline(always)]
            unsafe fn plus(self, other: Self) -> Self {
                unsafe { $plus(self, other) }
            }

            #[inline(always)]
            unsafe fn plus_product(self, a: Self, b: Self) -> Self {
                unsafe { $fused(a, b, self) }
            }

            #[inline(always)]
            unsafe fn prefetch(line: *const f32) {
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
register!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps);
#[cfg(target_arch = "x86_64")]
register!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_fmadd_ps);

/// A register of pairs, or of sums of their products.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Pairs(__m512);

#[cfg(target_arch = "x86_64")]
unsafe impl Vector for Pairs {
    type Element = Pair;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: Pair) -> Self {
        Pairs(unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(value.bits() as i32)) })
    }

    #[inline(always)]
    unsafe fn load(from: *const Pair) -> Self {
        Pairs(unsafe { _mm512_loadu_ps(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut Pair) {
        unsafe { _mm512_storeu_ps(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Pairs(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        // SAFETY: a register of 16 floats is one of 32 bfloat16s.
        unsafe {
            Pairs(_mm512_dpbf16_ps(
                self.0,
                std::mem::transmute::<__m512, __m512bh>(a.0),
                std::mem::transmute::<__m512, __m512bh>(b.0),
            ))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

/// What the compiler makes vectors of.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Portable([f32; 8]);

unsafe impl Vector for Portable {
    type Element = f32;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Portable(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Portable(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        Portable(std::array::from_fn(|lane| match PORTABLE_FMA {
            true => a.0[lane].mul_add(b.0[lane], self.0[lane]),
            false => a.0[lane] * b.0[lane] + self.0[lane],
        }))
    }
}

/// A product of `depth` columns of the left operand with a strip of the right one. A pair of strides is a row's and a column's.
pub(super) struct Strip<T> {
    pub left: *const T,
    pub left_strides: (usize, usize),
    /// Rows of whole vectors, side by side.
    pub right: *const T,
    pub right_stride: usize,
    pub destination: *mut f32,
    pub destination_strides: (usize, usize),
    pub rows: usize,
    /// Those that are stored; the right rows' vectors may have more.
    pub columns: usize,
    pub depth: usize,
    /// Adds to the destination.
    pub add: bool,
}

/// # Safety
/// The left operand has rows x depth elements, the right one depth rows of VECTORS vectors, the destination rows x columns elements, which
/// nobody else uses. Columns are at most those vectors' elements. The processor has what `V` needs.
#[inline(always)]
pub(super) unsafe fn strip<V: Vector, const ROWS: usize, const VECTORS: usize>(s: &Strip<V::Element>) {
    const { assert!(size_of::<V>() == V::LANES * size_of::<f32>() && size_of::<V::Element>() == size_of::<f32>()) }
    let (row_stride, column_stride) = s.destination_strides;
    for top in (0..s.rows).step_by(ROWS) {
        let rows = (s.rows - top).min(ROWS);
        // SAFETY: a row beyond the last is read as the last, and not stored.
        unsafe {
            let to = s.destination.add(top * row_stride);
            // Arrives while the tile is summed.
            if column_stride == 1 {
                for row in 0..rows {
                    for column in (0..s.columns).step_by(16) {
                        V::prefetch(to.add(row * row_stride + column));
                    }
                }
            }
            let (row_step, step) = s.left_strides;
            let left = s.left.add(top * row_step);
            let width = VECTORS * V::LANES;
            // The strides of most tiles are constants, so that addresses take few registers.
            let sums = match (row_step, step, s.right_stride == width && rows == ROWS) {
                (_, 1, true) => tile::<V, ROWS, VECTORS>(s.depth, rows_of(left, row_step, ROWS), 1, s.right, width),
                (1, _, true) => tile::<V, ROWS, VECTORS>(s.depth, rows_of(left, 1, ROWS), step, s.right, width),
                _ => tile::<V, ROWS, VECTORS>(s.depth, rows_of(left, row_step, rows), step, s.right, s.right_stride),
            };
            if rows == ROWS && s.columns == width && column_stride == 1 {
                for (row, sums) in sums.into_iter().enumerate() {
                    for (vector, sum) in sums.into_iter().enumerate() {
                        let to = to.add(row * row_stride + vector * V::LANES).cast();
                        let sum = if s.add { V::load(to).plus(sum) } else { sum };
                        sum.store(to);
                    }
                }
                continue;
            }
            let sums = sums.as_ptr().cast::<f32>();
            for row in 0..rows {
                for column in 0..s.columns {
                    let (to, sum) = (to.add(row * row_stride + column * column_stride), *sums.add(row * width + column));
                    *to = if s.add { *to + sum } else { sum };
                }
            }
        }
    }
}

/// Products of an element that are summed before the loop's end is looked at, with one computation of addresses.
const STEPS: usize = 4;

/// The first elements of `rows` rows; what is beyond them is the last.
///
/// # Safety
/// There are as many rows, at least one.
#[inline(always)]
unsafe fn rows_of<T, const ROWS: usize>(first: *const T, stride: usize, rows: usize) -> [*const T; ROWS] {
    let mut all = [first; ROWS];
    for (row, start) in all.iter_mut().enumerate() {
        // SAFETY: as above.
        *start = unsafe { first.add(row.min(rows - 1) * stride) };
    }
    all
}

/// The sums of a tile.
///
/// # Safety
/// Each left row has `depth` elements, `stride` apart; there are as many right rows of VECTORS vectors. The processor has what `V` needs.
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(
    depth: usize,
    left: [*const V::Element; ROWS],
    stride: usize,
    right: *const V::Element,
    right_stride: usize,
) -> [[V; VECTORS]; ROWS] {
    // SAFETY: as above.
    unsafe {
        let zero = V::splat(V::Element::default());
        let mut sums = [[zero; VECTORS]; ROWS];
        let whole = depth / STEPS * STEPS;
        for k in (0..whole).step_by(STEPS) {
            add_steps::<V, ROWS, VECTORS, STEPS>(&mut sums, k, left, stride, right, right_stride);
        }
        for k in whole..depth {
            add_steps::<V, ROWS, VECTORS, 1>(&mut sums, k, left, stride, right, right_stride);
        }
        sums
    }
}

/// Adds the products of COUNT columns of the left operand, from `first` on, with their rows of the right one.
///
/// # Safety
/// As [`tile`], for a depth of `first` + COUNT.
#[inline(always)]
unsafe fn add_steps<V: Vector, const ROWS: usize, const VECTORS: usize, const COUNT: usize>(
    sums: &mut [[V; VECTORS]; ROWS],
    first: usize,
    left: [*const V::Element; ROWS],
    stride: usize,
    right: *const V::Element,
    right_stride: usize,
) {
    for k in first..first + COUNT {
        // SAFETY: as above.
        unsafe {
            let mut row = [V::splat(V::Element::default()); VECTORS];
            for (vector, row) in row.iter_mut().enumerate() {
                *row = V::load(right.add(k * right_stride + vector * V::LANES));
            }
            for (sums, left) in sums.iter_mut().zip(left) {
                let left = V::splat(*left.add(k * stride));
                for (sum, right) in sums.iter_mut().zip(row) {
                    *sum = sum.plus_product(left, right);
                }
            }
        }
    }
}
