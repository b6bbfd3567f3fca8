//! Products of float32, on all instruction sets that are here.

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
