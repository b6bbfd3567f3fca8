//! The innermost loops of a product: a tile of the destination is summed in registers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::simd::PORTABLE_FMA;

/// Floats side by side, as an instruction set has them.
///
/// # Safety
/// Its functions run only where the processor has that instruction set.
pub(super) unsafe trait Vector: Copy {
    const LANES: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn plus(self, other: Self) -> Self;
    /// Hints that this line of memory will be read and written.
    unsafe fn prefetch(_line: *const f32) {}
    /// self + a * b.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
unsafe impl Vector for __m512 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        unsafe { _mm512_add_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        unsafe { _mm512_fmadd_ps(a, b, self) }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe impl Vector for __m256 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        unsafe { _mm256_add_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        unsafe { _mm256_fmadd_ps(a, b, self) }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

/// What the compiler makes vectors of.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

unsafe impl Vector for Portable {
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

/// A product of `depth` columns of the left operand with a strip of the right one, whose rows are whole vectors. Strides are of a row
/// and of a column.
pub(super) struct Strip {
    pub left: *const f32,
    pub left_strides: (usize, usize),
    pub right: *const f32,
    /// Of a row; a column's is 1.
    pub right_stride: usize,
    pub destination: *mut f32,
    pub destination_strides: (usize, usize),
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    /// Adds to the destination.
    pub add: bool,
}

/// # Safety
/// All of the strip's memory is there, nobody else uses the destination, and the processor has what `V` needs.
#[inline(always)]
pub(super) unsafe fn strip<V: Vector, const ROWS: usize, const VECTORS: usize>(s: &Strip) {
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
            let packed = VECTORS * V::LANES;
            // The strides of most tiles are constants, so that addresses take few registers.
            let sums = match (row_step, step, s.right_stride == packed && rows == ROWS) {
                (_, 1, true) => tile::<V, ROWS, VECTORS>(s.depth, rows_of(left, row_step, ROWS), 1, s.right, packed),
                (1, _, true) => tile::<V, ROWS, VECTORS>(s.depth, rows_of(left, 1, ROWS), step, s.right, packed),
                _ => tile::<V, ROWS, VECTORS>(s.depth, rows_of(left, row_step, rows), step, s.right, s.right_stride),
            };
            if rows == ROWS && s.columns == VECTORS * V::LANES && column_stride == 1 {
                for (row, sums) in sums.into_iter().enumerate() {
                    for (vector, sum) in sums.into_iter().enumerate() {
                        let to = to.add(row * row_stride + vector * V::LANES);
                        let sum = if s.add { V::load(to).plus(sum) } else { sum };
                        sum.store(to);
                    }
                }
                continue;
            }
            let sums = sums.as_ptr().cast::<f32>();
            for row in 0..rows {
                for column in 0..s.columns {
                    let (to, sum) =
                        (to.add(row * row_stride + column * column_stride), *sums.add(row * VECTORS * V::LANES + column));
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
/// There are as many rows.
#[inline(always)]
unsafe fn rows_of<const ROWS: usize>(first: *const f32, stride: usize, rows: usize) -> [*const f32; ROWS] {
    let mut all = [first; ROWS];
    for (row, start) in all.iter_mut().enumerate() {
        // SAFETY: as above.
        *start = unsafe { first.add(row.min(rows - 1) * stride) };
    }
    all
}

/// # Safety
/// `depth` elements of each row of the left operand, `step` apart, and as many rows of the right one are there.
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(
    depth: usize,
    left: [*const f32; ROWS],
    stride: usize,
    right: *const f32,
    right_stride: usize,
) -> [[V; VECTORS]; ROWS] {
    // SAFETY: as above.
    unsafe {
        let zero = V::splat(0.0);
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
/// As [`tile`].
#[inline(always)]
unsafe fn add_steps<V: Vector, const ROWS: usize, const VECTORS: usize, const COUNT: usize>(
    sums: &mut [[V; VECTORS]; ROWS],
    first: usize,
    left: [*const f32; ROWS],
    stride: usize,
    right: *const f32,
    right_stride: usize,
) {
    for k in first..first + COUNT {
        // SAFETY: as above.
        unsafe {
            let mut row = [V::splat(0.0); VECTORS];
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
