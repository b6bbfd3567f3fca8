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

mod tile;

use std::mem::MaybeUninit;
use std::ops::Range;

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
pub(super) struct Operand<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Operand<'a> {
    /// Rows of elements side by side, `pitch` apart.
    pub fn rows(data: &'a [f32], pitch: usize) -> Operand<'a> {
        Operand { data, row_stride: pitch, column_stride: 1 }
    }

    /// The transpose of such rows.
    pub fn transposed(data: &'a [f32], pitch: usize) -> Operand<'a> {
        Operand { data, row_stride: 1, column_stride: pitch }
    }

    /// # Safety
    /// It has this element.
    #[inline(always)]
    unsafe fn at(&self, row: usize, column: usize) -> *const f32 {
        unsafe { self.data.as_ptr().add(row * self.row_stride + column * self.column_stride) }
    }

    fn transpose(self) -> Operand<'a> {
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

/// destination [m, n] (+)= left [m, k] @ right [k, n] on the calling thread. Rows of the destination are `pitch` apart.
pub(super) fn gemm(shape: GemmShape, destination: &mut [f32], pitch: usize, left: Operand<'_>, right: Operand<'_>, store: Store) {
    let GemmShape { m, n, .. } = shape;
    if m == 0 || n == 0 {
        return;
    }
    let needed = (m - 1).checked_mul(pitch).and_then(|rows| rows.checked_add(n));
    assert!(needed.is_some_and(|needed| needed <= destination.len()), "destination of {m} x {n}, {pitch} apart");
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
    let GemmShape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        // An empty sum.
        if store == Store::Replace {
            // SAFETY: the caller answers for the destination.
            (0..m).for_each(|row| unsafe { std::slice::from_raw_parts_mut(destination.add(row * pitch), n) }.fill(0.0));
        }
        return;
    }
    assert!(left.covers(m, k), "left of {m} x {k}");
    assert!(right.covers(k, n), "right of {k} x {n}");
    let product = match right.column_stride > 1 && 4 * m <= n {
        false => Product { shape, destination, row_stride: pitch, column_stride: 1, left, right, store },
        // A few rows times many columns that lie along k: of the transposed product the right operand is the small one.
        true => {
            let (shape, left, right) = (GemmShape { m: n, n: m, k }, right.transpose(), left.transpose());
            Product { shape, destination, row_stride: 1, column_stride: pitch, left, right, store }
        }
    };
    // SAFETY: the strides keep every access inside the slices, as checked above; a Simd of a level exists only where the processor has
    // its features.
    unsafe {
        match simd.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512(&product),
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

struct Product<'a> {
    shape: GemmShape,
    destination: *mut f32,
    row_stride: usize,
    column_stride: usize,
    left: Operand<'a>,
    right: Operand<'a>,
    store: Store,
}

/// A packed strip, aligned for every vector.
#[repr(align(64))]
struct Packed(#[allow(dead_code)] [f32; DEPTH * WIDTH]);

impl Product<'_> {
    /// By tiles of ROWS rows and at most MOST vectors.
    ///
    /// # Safety
    /// As [`gemm_into`], the operands cover the shape, and the processor has what `V` needs.
    #[inline(always)]
    unsafe fn run<V: Vector, const ROWS: usize, const MOST: usize>(&self) {
        const { assert!(MOST >= 1 && MOST <= 3 && MOST * V::LANES <= WIDTH) }
        let GemmShape { m, n, k } = self.shape;
        let mut packed = MaybeUninit::<Packed>::uninit();
        let packed = packed.as_mut_ptr().cast::<f32>();
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
    unsafe fn pack<V: Vector>(&self, packed: *mut f32, rows: Range<usize>, columns: Range<usize>, width: usize) {
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
                    let four: [f32; 4] = std::array::from_fn(|c| *from.add(row * row_stride + c * column_stride));
                    packed.add(row * width + column).cast::<[f32; 4]>().write(four);
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
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Rows or columns side by side, further apart than they must be, in memory that ends with the last element.
    struct Exact {
        data: Box<[f32]>,
        pitch: usize,
        transposed: bool,
    }

    impl Exact {
        fn new(rows: usize, columns: usize, transposed: bool, seed: u32) -> Exact {
            let (lines, length) = if transposed { (columns, rows) } else { (rows, columns) };
            let pitch = length + 3;
            let count = if lines * length == 0 { 0 } else { (lines - 1) * pitch + length };
            Exact { data: numbers(count, seed).into(), pitch, transposed }
        }

        fn operand(&self) -> Operand<'_> {
            match self.transposed {
                true => Operand::transposed(&self.data, self.pitch),
                false => Operand::rows(&self.data, self.pitch),
            }
        }
    }

    /// Edges of tiles, strips, blocks of rows and DEPTH.
    const SIZES: [(usize, usize, usize); 15] = [
        (1, 1, 1),
        (1, 300, 70),
        (300, 1, 70),
        (2, 9, 300),
        (7, 48, 511),
        (8, 47, 512),
        (9, 49, 513),
        (16, 96, 8),
        (17, 31, 0),
        (25, 130, 1025),
        (257, 33, 37),
        (260, 16, 520),
        (1030, 20, 1100),
        (20, 1100, 520),
        (300, 60, 1025),
    ];

    fn for_all_layouts(mut check: impl FnMut((usize, usize, usize), Operand<'_>, Operand<'_>)) {
        for (m, n, k) in SIZES {
            for (left_transposed, right_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
                let (left, right) = (Exact::new(m, k, left_transposed, 1), Exact::new(k, n, right_transposed, 2));
                check((m, n, k), left.operand(), right.operand());
            }
        }
    }

    /// What stands before and after a destination, and between its rows, as before.
    const MARGIN: usize = 64;

    fn destination(m: usize, n: usize) -> Vec<f32> {
        numbers(m * (n + 5) + 2 * MARGIN, 3)
    }

    fn product(simd: Simd, (m, n, k): (usize, usize, usize), left: Operand<'_>, right: Operand<'_>, store: Store) -> Vec<f32> {
        let mut all = destination(m, n);
        // SAFETY: m rows of n + 5 elements from MARGIN on.
        unsafe { gemm_on(simd, GemmShape { m, n, k }, all.as_mut_ptr().add(MARGIN), n + 5, left, right, store) };
        all
    }

    fn at(row: usize, column: usize, n: usize) -> usize {
        MARGIN + row * (n + 5) + column
    }

    #[test]
    fn products_are_those_of_float64_and_nothing_else_is_written() {
        for_all_layouts(|(m, n, k), left, right| {
            // [n, k], so that the sums below run along memory.
            let right_rows: Vec<f64> = (0..n)
                .flat_map(|column| (0..k).map(move |k| f64::from(right.data[k * right.row_stride + column * right.column_stride])))
                .collect();
            let before = destination(m, n);
            for (simd, store) in Simd::available().into_iter().flat_map(|simd| [(simd, Store::Replace), (simd, Store::Add)]) {
                let mut all = product(simd, (m, n, k), left, right, store);
                for row in 0..m {
                    let left_row: Vec<f64> =
                        (0..k).map(|k| f64::from(left.data[row * left.row_stride + k * left.column_stride])).collect();
                    for column in 0..n {
                        let (got, was) = (all[at(row, column, n)], before[at(row, column, n)]);
                        all[at(row, column, n)] = was;
                        let (mut exact, mut size) =
                            if store == Store::Add { (f64::from(was), f64::from(was).abs()) } else { (0.0, 0.0) };
                        for (left, right) in left_row.iter().zip(&right_rows[column * k..]) {
                            exact += left * right;
                            size += (left * right).abs();
                        }
                        let bound = f64::from(f32::EPSILON) * (size + 1e-30) * 8.0;
                        assert!(
                            (f64::from(got) - exact).abs() <= bound,
                            "{simd:?} {m} x {n} x {k} {store:?} [{row}, {column}]: {got}, not {exact}"
                        );
                    }
                }
                assert_eq!(all, before, "{simd:?} {m} x {n} x {k} {store:?} wrote beyond the product");
            }
        });
    }

    #[test]
    fn an_element_has_the_bits_of_its_row_and_column_alone() {
        for_all_layouts(|(m, n, k), left, right| {
            for (simd, store) in Simd::available().into_iter().flat_map(|simd| [(simd, Store::Replace), (simd, Store::Add)]) {
                let all = product(simd, (m, n, k), left, right, store);
                for (row, column) in [(0, 0), (m - 1, n - 1), (m / 2, n / 3)] {
                    let left = Operand { data: &left.data[(row * left.row_stride).min(left.data.len())..], ..left };
                    let right = Operand { data: &right.data[(column * right.column_stride).min(right.data.len())..], ..right };
                    let mut alone = destination(m, n)[at(row, column, n)];
                    // SAFETY: one element.
                    unsafe { gemm_on(simd, GemmShape { m: 1, n: 1, k }, &mut alone, 1, left, right, store) };
                    let found = all[at(row, column, n)];
                    assert_eq!(found.to_bits(), alone.to_bits(), "{simd:?} {m} x {n} x {k} {store:?} [{row}, {column}]");
                }
            }
        });
    }

    #[test]
    fn instruction_sets_with_a_fused_multiply_add_have_the_same_bits() {
        let fused = |simd: &Simd| simd.level() != Level::Portable || crate::simd::PORTABLE_FMA;
        for_all_layouts(|sizes, left, right| {
            let bits = |simd| product(simd, sizes, left, right, Store::Add).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let mut all = Simd::available().into_iter().filter(fused).map(bits);
            let Some(first) = all.next() else { return };
            all.for_each(|other| assert_eq!(first, other, "{sizes:?}"));
        });
    }

    #[test]
    fn operands_that_do_not_cover_the_shape_are_refused() {
        let data = [0.0; 100];
        for (operand, rows, columns) in [
            (Operand::rows(&data, 10), 11, 1),
            (Operand::rows(&data, 10), 10, 11),
            (Operand::transposed(&data, 10), 10, 11),
            (Operand::rows(&data, usize::MAX), 3, 1),
            (Operand::rows(&data, usize::MAX / 2 + 1), 3, 5),
        ] {
            assert!(!operand.covers(rows, columns), "{rows} x {columns}");
        }
        assert!(Operand::rows(&data, 10).covers(10, 10) && Operand::transposed(&data, 10).covers(10, 10));
    }
}
