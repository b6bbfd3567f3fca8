//! A matrix product on the calling thread, which allocates nothing: what it packs lies on the stack, 96 KiB.
//!
//! The destination is cut into strips of columns, as wide as a tile ([`tile`]). Of the right operand a strip is packed, [`DEPTH`] rows
//! at a time, so that the tile reads it along memory, from the second-level cache; the left one is read where it lies, [`BLOCK`] rows
//! for all strips, which then stay in that cache too. Floor: m n k fused multiply-adds, 32 of them a cycle on AVX-512, 16 on AVX2; the
//! packing moves n k elements a block of rows.
//!
//! An element is the sum, in order, of the blocks of DEPTH products, each summed in order by itself. So its bits depend on its own row
//! and column alone, not on the shape around it, nor on the instruction set where that has a fused multiply-add.

mod tile;

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

    /// The number of the last element of rows x columns.
    fn last(&self, rows: usize, columns: usize) -> usize {
        (rows.max(1) - 1) * self.row_stride + (columns.max(1) - 1) * self.column_stride
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
    assert!((m - 1) * pitch + n <= destination.len(), "destination of {m} x {n}");
    // SAFETY: as just checked; the destination is borrowed alone.
    unsafe { gemm_into(shape, destination.as_mut_ptr(), pitch, left, right, store) }
}

/// [`gemm`] into memory that is not one slice of ours.
///
/// # Safety
/// The destination has m rows of n elements, of which nobody else uses these.
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
    assert!(left.last(m, k) < left.data.len(), "left of {m} x {k}");
    assert!(right.last(k, n) < right.data.len(), "right of {k} x {n}");
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
            Level::Portable => product.run::<Portable, PORTABLE_ROWS>(1),
        }
    }
}

/// # Safety
/// The processor has these features; otherwise as [`gemm_into`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512(product: &Product<'_>) {
    // 24 of the 32 registers hold the tile: 11 loads for 24 multiply-adds.
    unsafe { product.run::<std::arch::x86_64::__m512, 8>(3) }
}

/// # Safety
/// As [`avx512`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(product: &Product<'_>) {
    // 12 of the 16 registers hold the tile: 8 loads for 12 multiply-adds.
    unsafe { product.run::<std::arch::x86_64::__m256, 6>(2) }
}

/// A vector of the portable copy takes two registers, of which there are 32 on aarch64, else at least 16.
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
struct Packed([std::mem::MaybeUninit<f32>; DEPTH * WIDTH]);

impl Product<'_> {
    /// By tiles of ROWS rows and at most `vectors` vectors.
    ///
    /// # Safety
    /// As [`gemm_into`], and the processor has what `V` needs.
    #[inline(always)]
    unsafe fn run<V: Vector, const ROWS: usize>(&self, vectors: usize) {
        let GemmShape { m, n, k } = self.shape;
        let mut packed = Packed([const { std::mem::MaybeUninit::uninit() }; DEPTH * WIDTH]);
        let packed = packed.0.as_mut_ptr().cast::<f32>();
        // Strips as even as can be: a narrow one has fewer sums to hide the multiply-adds' latency behind.
        let all_vectors = n.div_ceil(V::LANES);
        let strips = all_vectors.div_ceil(vectors);
        // A strip that must be transposed costs more to pack, and is packed less often.
        let block = match self.right.column_stride {
            1 => BLOCK.next_multiple_of(ROWS),
            _ => (4 * BLOCK).next_multiple_of(ROWS),
        };
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
                            2 => strip::<V, ROWS, 2>(&task),
                            _ => strip::<V, ROWS, 3>(&task),
                        }
                    }
                }
            }
        }
    }

    /// Packs these rows and columns of the right operand as rows of `width`, zeros beyond the columns.
    ///
    /// # Safety
    /// The operand has them, and `packed` room.
    #[inline(always)]
    unsafe fn pack<V: Vector>(
        &self,
        packed: *mut f32,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        width: usize,
    ) {
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

    /// Rows or columns side by side, further apart than they must be.
    fn operand(data: &[f32], rows: usize, columns: usize, transposed: bool) -> Operand<'_> {
        match transposed {
            true => Operand::transposed(data, rows + 3),
            false => Operand::rows(data, columns + 3),
        }
    }

    const SIZES: [(usize, usize, usize); 12] = [
        (1, 1, 1),
        (1, 300, 70),
        (300, 1, 70),
        (2, 9, 300),
        (7, 48, 256),
        (8, 47, 257),
        (9, 49, 513),
        (16, 96, 8),
        (17, 31, 0),
        (25, 130, 255),
        (257, 33, 37),
        (260, 16, 20),
    ];

    fn for_all_layouts(mut check: impl FnMut((usize, usize, usize), Operand<'_>, Operand<'_>)) {
        for (m, n, k) in SIZES {
            for (left_transposed, right_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
                let left = numbers((m + 3) * (k + 3), 1);
                let right = numbers((n + 3) * (k + 3), 2);
                check((m, n, k), operand(&left, m, k, left_transposed), operand(&right, k, n, right_transposed));
            }
        }
    }

    fn product(simd: Simd, (m, n, k): (usize, usize, usize), left: Operand<'_>, right: Operand<'_>, store: Store) -> Vec<f32> {
        let pitch = n + 5;
        let mut all = numbers(m * pitch, 3);
        // SAFETY: m rows of `pitch` elements.
        unsafe { gemm_on(simd, GemmShape { m, n, k }, all.as_mut_ptr(), pitch, left, right, store) };
        all
    }

    #[test]
    fn products_are_those_of_float64_and_nothing_else_is_written() {
        for_all_layouts(|(m, n, k), left, right| {
            let before = numbers(m * (n + 5), 3);
            for (simd, store) in Simd::available().into_iter().flat_map(|simd| [(simd, Store::Replace), (simd, Store::Add)]) {
                let all = product(simd, (m, n, k), left, right, store);
                for (at, (&got, &was)) in all.iter().zip(&before).enumerate() {
                    let (row, column) = (at / (n + 5), at % (n + 5));
                    if column >= n {
                        assert_eq!(got, was, "{simd:?} {m} x {n} x {k}: row {row}, column {column} is none of the product's");
                        continue;
                    }
                    let start = if store == Store::Add { f64::from(was) } else { 0.0 };
                    let of = |k: usize| {
                        let left = left.data[row * left.row_stride + k * left.column_stride];
                        f64::from(left) * f64::from(right.data[k * right.row_stride + column * right.column_stride])
                    };
                    let exact = (0..k).fold(start, |sum, k| sum + of(k));
                    let size = (0..k).fold(start.abs(), |sum, k| sum + of(k).abs());
                    let bound = f64::from(f32::EPSILON) * (size + 1e-30) * 8.0;
                    assert!(
                        (f64::from(got) - exact).abs() <= bound,
                        "{simd:?} {m} x {n} x {k} {store:?} [{row}, {column}]: {got}, not {exact}"
                    );
                }
            }
        });
    }

    #[test]
    fn an_element_has_the_bits_of_its_row_and_column_alone() {
        for_all_layouts(|(m, n, k), left, right| {
            for simd in Simd::available() {
                let all = product(simd, (m, n, k), left, right, Store::Replace);
                for (row, column) in [(0, 0), (m - 1, n - 1), (m / 2, n / 3)] {
                    let left = Operand { data: &left.data[row * left.row_stride..], ..left };
                    let right = Operand { data: &right.data[column * right.column_stride..], ..right };
                    let alone = product(simd, (1, 1, k), left, right, Store::Replace)[0];
                    assert_eq!(
                        all[row * (n + 5) + column].to_bits(),
                        alone.to_bits(),
                        "{simd:?} {m} x {n} x {k} [{row}, {column}]"
                    );
                }
            }
        });
    }

    #[test]
    fn instruction_sets_with_a_fused_multiply_add_have_the_same_bits() {
        let fused = |simd: &Simd| simd.level() != Level::Portable || crate::simd::PORTABLE_FMA;
        for_all_layouts(|sizes, left, right| {
            let mut all = Simd::available().into_iter().filter(fused).map(|simd| product(simd, sizes, left, right, Store::Add));
            let Some(first) = all.next() else { return };
            all.for_each(|other| assert_eq!(first, other, "{sizes:?}"));
        });
    }
}
