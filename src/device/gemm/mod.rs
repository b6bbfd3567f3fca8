//! A matrix product on the calling thread, which allocates nothing: what it packs lies on the stack, 96 KiB.
//!
//! The destination is cut into strips of columns, as wide as a tile ([`tile`]). Of the right operand a strip is packed, [`DEPTH`] rows
//! at a time, so that the tile reads it along memory, from the second-level cache. The left one is read where it lies: [`BLOCK`] rows,
//! which stay in that cache while all strips take them. Floor: m n k fused multiply-adds, 32 of them a cycle on AVX-512, 16 on AVX2;
//! the packing moves n k elements a block of rows.
//!
//! An element is what the destination held, or the first block, plus the blocks of DEPTH products one after the other; each block is
//! summed in order by itself. So its bits depend on its own row and column alone, not on the shape around it, nor on the instruction
//! set where that has a fused multiply-add. Only which NaN it is may differ.

#[cfg(target_arch = "x86_64")]
mod amx;
mod pairs;
mod tile;

use std::mem::MaybeUninit;
use std::ops::Range;

pub(super) use pairs::{as_bf16, as_bf16_mut, as_pairs, pair_rows, split_columns, PairUnit};
use tile::{strip, Portable, Strip, Vector};

use crate::simd::{Level, Simd};

/// Rows of the right operand that are packed at a time.
const DEPTH: usize = 512;
/// The most columns of a strip.
const WIDTH: usize = 48;
/// Rows of the left operand that all strips take before the next.
const BLOCK: usize = 256;

/// An operand of [`gemm`]: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a, T = f32> {
    data: &'a [T],
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Operand<'a, T> {
    /// Rows of elements side by side, `pitch` apart.
    pub fn rows(data: &'a [T], pitch: usize) -> Operand<'a, T> {
        Operand { data, row_stride: pitch, column_stride: 1 }
    }

    /// The transpose of such rows.
    pub fn transposed(data: &'a [T], pitch: usize) -> Operand<'a, T> {
        Operand { data, row_stride: 1, column_stride: pitch }
    }

    /// # Safety
    /// It has this element.
    #[inline(always)]
    unsafe fn at(&self, row: usize, column: usize) -> *const T {
        unsafe { self.data.as_ptr().add(row * self.row_stride + column * self.column_stride) }
    }

    fn transpose(self) -> Operand<'a, T> {
        Operand { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// Whether all of rows x columns elements, at least one, are in its data.
    fn covers(&self, rows: usize, columns: usize) -> bool {
        let (rows, columns) = ((rows - 1).checked_mul(self.row_stride), (columns - 1).checked_mul(self.column_stride));
        rows.zip(columns).and_then(|(row, column)| row.checked_add(column)).is_some_and(|last| last < self.data.len())
    }
}

/// What a product does to what its destination holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    Replace,
    Add,
}

/// The sizes of a product: [m, n] = [m, k] @ [k, n].
#[derive(Clone, Copy, Debug)]
pub(super) struct GemmShape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

impl GemmShape {
    /// Panics if the destination has not these rows, `pitch` apart.
    fn check(&self, destination: &[f32], pitch: usize) {
        let GemmShape { m, n, .. } = *self;
        let needed = m.saturating_sub(1).checked_mul(pitch).and_then(|rows| rows.checked_add(n));
        let covered = needed.is_some_and(|needed| needed <= destination.len());
        assert!(covered || m == 0 || n == 0, "destination of {m} x {n}, {pitch} apart");
    }
}

/// destination [m, n] (+)= left [m, k] @ right [k, n] on the calling thread. Rows of the destination are `pitch` apart.
pub(super) fn gemm(shape: GemmShape, destination: &mut [f32], pitch: usize, left: Operand<'_>, right: Operand<'_>, store: Store) {
    shape.check(destination, pitch);
    // SAFETY: as just checked; the destination is borrowed alone.
    unsafe { gemm_into(shape, destination.as_mut_ptr(), pitch, left, right, store) }
}

/// [`gemm`] into memory that is not one slice of ours.
///
/// # Safety
/// The destination has m rows of n elements, `pitch` apart, which nobody else reads or writes meanwhile and which are none of the
/// operands'.
pub(super) unsafe fn gemm_into(
    shape: GemmShape,
    destination: *mut f32,
    pitch: usize,
    left: Operand<'_>,
    right: Operand<'_>,
    store: Store,
) {
    // SAFETY: the caller answers for the destination.
    unsafe { gemm_on(Simd::best(), shape, destination, pitch, left, right, store) }
}

/// [`gemm_into`] on a given instruction set.
///
/// # Safety
/// As [`gemm_into`].
unsafe fn gemm_on(
    simd: Simd,
    shape: GemmShape,
    destination: *mut f32,
    pitch: usize,
    left: Operand<'_>,
    right: Operand<'_>,
    store: Store,
) {
    // SAFETY: the caller answers for the destination.
    let Some(product) = (unsafe { Product::new(shape, destination, pitch, left, right, store) }) else { return };
    // SAFETY: the strides keep every access inside the slices, as `Product::new` has checked; a Simd of a level exists only where the
    // processor has its features.
    unsafe {
        match simd.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Amx | Level::Avx512Bf16 | Level::Avx512 => avx512(&product),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2(&product),
            Level::Portable => product.run::<Portable, PORTABLE_ROWS, 1>(),
        }
    }
}

/// # Safety
/// The processor has these features; otherwise as [`gemm_into`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512(product: &Product<'_>) {
    // 24 of the 32 registers hold the tile: 11 loads for 24 multiply-adds.
    unsafe { product.run::<std::arch::x86_64::__m512, 8, 3>() }
}

/// # Safety
/// As [`avx512`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(product: &Product<'_>) {
    // 12 of the 16 registers hold the tile: 8 loads for 12 multiply-adds.
    unsafe { product.run::<std::arch::x86_64::__m256, 6, 2>() }
}

/// On aarch64 a vector of the portable copy takes two of 32 registers; elsewhere there are fewer.
const PORTABLE_ROWS: usize = if cfg!(target_arch = "aarch64") { 8 } else { 4 };

struct Product<'a, T = f32> {
    shape: GemmShape,
    destination: *mut f32,
    row_stride: usize,
    column_stride: usize,
    left: Operand<'a, T>,
    right: Operand<'a, T>,
    store: Store,
}

/// A packed strip, aligned for every vector.
#[repr(align(64))]
struct Packed(#[allow(dead_code)] [f32; DEPTH * WIDTH]);

impl<'a, T: Copy + Default> Product<'a, T> {
    /// `None`: nothing is left to sum.
    ///
    /// # Safety
    /// As [`gemm_into`], for the destination.
    unsafe fn new(
        shape: GemmShape,
        destination: *mut f32,
        pitch: usize,
        left: Operand<'a, T>,
        right: Operand<'a, T>,
        store: Store,
    ) -> Option<Product<'a, T>> {
        let GemmShape { m, n, k } = shape;
        if m == 0 || n == 0 {
            return None;
        }
        if k == 0 {
            // An empty sum.
            if store == Store::Replace {
                // SAFETY: the caller answers for the destination.
                (0..m).for_each(|row| unsafe { std::slice::from_raw_parts_mut(destination.add(row * pitch), n) }.fill(0.0));
            }
            return None;
        }
        assert!(left.covers(m, k), "left of {m} x {k}");
        assert!(right.covers(k, n), "right of {k} x {n}");
        Some(match right.column_stride > 1 && 4 * m <= n {
            false => Product { shape, destination, row_stride: pitch, column_stride: 1, left, right, store },
            // A few rows times many columns that lie along k: of the transposed product the right operand is the small one.
            true => {
                let (shape, left, right) = (GemmShape { m: n, n: m, k }, right.transpose(), left.transpose());
                Product { shape, destination, row_stride: 1, column_stride: pitch, left, right, store }
            }
        })
    }

    /// By tiles of ROWS rows and at most MOST vectors.
    ///
    /// # Safety
    /// As [`gemm_into`], the operands cover the shape, and the processor has what `V` needs.
    #[inline(always)]
    unsafe fn run<V: Vector<Element = T>, const ROWS: usize, const MOST: usize>(&self) {
        const { assert!(MOST >= 1 && MOST <= 3 && MOST * V::LANES <= WIDTH) }
        let GemmShape { m, n, k } = self.shape;
        let mut packed = MaybeUninit::<Packed>::uninit();
        let packed = packed.as_mut_ptr().cast::<T>();
        // Strips as even as can be: a narrow one has fewer sums to hide the multiply-adds' latency behind.
        let all_vectors = n.div_ceil(V::LANES);
        let strips = all_vectors.div_ceil(MOST);
        // A strip that must be transposed costs more to pack, and is packed less often, although the rows may leave the cache.
        let block = if self.right.column_stride == 1 { BLOCK } else { 4 * BLOCK }.next_multiple_of(ROWS);
        for first in (0..k).step_by(DEPTH) {
            let depth = (k - first).min(DEPTH);
            for top in (0..m).step_by(block) {
                for number in 0..strips {
                    let of = |number: usize| number * all_vectors / strips * V::LANES;
                    let (column, end) = (of(number), of(number + 1).min(n));
                    let columns = end - column;
                    let vectors = columns.div_ceil(V::LANES);
                    let rows = (m - top).min(block);
                    // What one or two tiles read is not worth packing.
                    let as_it_lies = rows <= 2 * ROWS && columns == vectors * V::LANES && self.right.column_stride == 1;
                    // SAFETY: the operands and the destination have these elements, and a packed strip fits its array: its width is
                    // at most WIDTH.
                    unsafe {
                        let (right, right_stride) = match as_it_lies {
                            true => (self.right.at(first, column), self.right.row_stride),
                            false => {
                                self.pack::<V>(packed, first..first + depth, column..column + columns, vectors * V::LANES);
                                (packed.cast_const(), vectors * V::LANES)
                            }
                        };
                        let task = Strip {
                            left: self.left.at(top, first),
                            left_strides: (self.left.row_stride, self.left.column_stride),
                            right,
                            right_stride,
                            destination: self.destination.add(top * self.row_stride + column * self.column_stride),
                            destination_strides: (self.row_stride, self.column_stride),
                            rows,
                            columns,
                            depth,
                            add: first > 0 || self.store == Store::Add,
                        };
                        match vectors {
                            1 => strip::<V, ROWS, 1>(&task),
                            2 if MOST >= 2 => strip::<V, ROWS, 2>(&task),
                            3 if MOST >= 3 => strip::<V, ROWS, 3>(&task),
                            _ => unreachable!("a strip has 1 to {MOST} vectors"),
                        }
                    }
                }
            }
        }
    }

    /// Packs these rows and columns of the right operand as rows of `width`, zeros beyond the columns. What the zeros are multiplied by
    /// is stored nowhere.
    ///
    /// # Safety
    /// The operand has them, and `packed` has room for rows x `width` elements.
    #[inline(always)]
    unsafe fn pack<V: Vector<Element = T>>(&self, packed: *mut T, rows: Range<usize>, columns: Range<usize>, width: usize) {
        let (row_stride, column_stride) = (self.right.row_stride, self.right.column_stride);
        let (depth, filled) = (rows.len(), columns.len());
        // SAFETY: the caller answers for all of these elements.
        unsafe {
            let from = self.right.at(rows.start, columns.start);
            if filled < width {
                packed.write_bytes(0, depth * width);
            }
            if column_stride == 1 {
                let whole = filled / V::LANES * V::LANES;
                for row in 0..depth {
                    let (from, to) = (from.add(row * row_stride), packed.add(row * width));
                    for column in (0..whole).step_by(V::LANES) {
                        V::load(from.add(column)).store(to.add(column));
                    }
                    for column in whole..filled {
                        *to.add(column) = *from.add(column);
                    }
                }
                return;
            }
            // Four columns at a time: a line of the strip is written a quarter at once.
            let whole = filled / 4 * 4;
            for column in (0..whole).step_by(4) {
                let from = from.add(column * column_stride);
                for row in 0..depth {
                    let four: [T; 4] = std::array::from_fn(|c| *from.add(row * row_stride + c * column_stride));
                    packed.add(row * width + column).cast::<[T; 4]>().write(four);
                }
            }
            for column in whole..filled {
                for row in 0..depth {
                    *packed.add(row * width + column) = *from.add(row * row_stride + column * column_stride);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
