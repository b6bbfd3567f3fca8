//! Products of pairs, on all units that are here.

use super::*;
use half::bf16;

fn number(seed: usize) -> f32 {
    ((seed * 7919 + 13) % 2003) as f32 / 1001.0 - 1.0
}

fn units() -> Vec<PairUnit> {
    Simd::available().into_iter().filter_map(PairUnit::of).collect()
}

/// Rows of pairs of the columns of a matrix [2 * k - odd, n].
fn paired(rows: usize, columns: usize, seed: usize) -> (Vec<f32>, Vec<f32>) {
    let pitch = columns + 3;
    let exact: Vec<f32> = (0..rows * pitch).map(|i| number(i + seed)).collect();
    let mut pairs = exact.clone();
    pair_rows(&mut pairs, pitch, columns);
    (exact, pairs)
}

#[test]
fn rows_are_paired_where_the_first_of_two_was() {
    let (exact, pairs) = paired(5, 37, 1);
    for row in (0..5).step_by(2) {
        for column in 0..37 {
            let rounded = |row: usize| if row < 5 { u32::from(bf16::from_f32(exact[row * 40 + column]).to_bits()) } else { 0 };
            assert_eq!(as_pairs(&pairs)[row * 40 + column].bits(), rounded(row) | rounded(row + 1) << 16, "[{row}, {column}]");
        }
        assert_eq!(pairs[row * 40 + 37..(row + 1) * 40], exact[row * 40 + 37..(row + 1) * 40], "beyond the rows' length");
    }
}

#[test]
fn products_of_terms_are_those_of_float32_but_for_its_last_bits() {
    for unit in units().into_iter().filter(|unit| unit.multiplies_terms()) {
        for (m, n, k) in [(1, 1, 1), (256, 130, 512), (33, 31, 515), (16, 48, 33), (5, 3, 1100), (2, 3, 0)] {
            let (left, right): (Vec<f32>, Vec<f32>) =
                ((0..m * (k + 3)).map(|i| number(i + 1)).collect(), (0..n * (k + 2)).map(|i| number(i + 2)).collect());
            let (pairs, pitch) = (k.div_ceil(2), n + 1);
            let mut terms = vec![0.0; 2 * pairs * pitch];
            let (first, second) = terms.split_at_mut(pairs * pitch);
            for i in 0..pairs {
                let line = i * pitch..i * pitch + n;
                split_columns(&right, k + 2, i, k, [&mut first[line.clone()], &mut second[line]]);
            }
            let mut all = vec![0.25f32; m * (n + 5)];
            let shape = GemmShape { m, n, k };
            unit.gemm_terms(shape, &mut all, n + 5, Operand::rows(&left, k + 3), Operand::rows(as_pairs(&terms), pitch));
            for row in 0..m {
                for column in 0..n {
                    let products = (0..k).map(|k2| f64::from(left[row * (k + 3) + k2]) * f64::from(right[column * (k + 2) + k2]));
                    let (exact, size) = products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                    let found = f64::from(all[row * (n + 5) + column]);
                    assert!((found - exact).abs() <= size / 32768.0, "{m} x {n} x {k} [{row}, {column}]: {found}, not {exact}");
                }
                assert_eq!(all[row * (n + 5) + n..(row + 1) * (n + 5)], [0.25; 5], "beyond the product");
            }
        }
    }
}

/// Blocks of a batch's rows rest on it.
#[test]
fn an_element_has_the_bits_of_its_row_and_column_alone() {
    for unit in units() {
        for (m, n, k) in [(1, 1, 1), (33, 130, 301), (256, 47, 1100), (40, 64, 16)] {
            let (_, left) = paired(k, m, 5);
            let (_, right) = paired(k, n, 6);
            let (left_pitch, right_pitch, pairs) = (m + 3, n + 3, k.div_ceil(2));
            let product = |from: (usize, usize), m: usize, n: usize| {
                let mut all = vec![0.0f32; m * n];
                let left = Operand::transposed(&as_pairs(&left)[from.0..], 2 * left_pitch);
                let right = Operand::rows(&as_pairs(&right)[from.1..], 2 * right_pitch);
                unit.gemm(GemmShape { m, n, k: pairs }, &mut all, n, left, right, Store::Replace);
                all
            };
            let floats: Vec<f32> = (0..m * k).map(|i| number(i + 1)).collect();
            let (mut terms, pitch) = (vec![0.0; 2 * pairs * n], n);
            let columns: Vec<f32> = (0..n * k).map(|i| number(i + 2)).collect();
            let (first, second) = terms.split_at_mut(pairs * pitch);
            for (i, (first, second)) in first.chunks_mut(pitch).zip(second.chunks_mut(pitch)).enumerate() {
                split_columns(&columns, k, i, k, [first, second]);
            }
            let in_terms = |from: (usize, usize), m: usize, n: usize| {
                let mut all = vec![0.0f32; m * n];
                let right = Operand::rows(&as_pairs(&terms)[from.1..], pitch);
                unit.gemm_terms(GemmShape { m, n, k }, &mut all, n, Operand::rows(&floats[from.0 * k..], k), right);
                all
            };
            let (whole, whole_in_terms) = (product((0, 0), m, n), unit.multiplies_terms().then(|| in_terms((0, 0), m, n)));
            for (row, column) in [(0, 0), (m - 1, n - 1), (m / 2, n / 3)] {
                assert_eq!(
                    product((row, column), 1, 1),
                    whole[row * n + column..][..1],
                    "{unit:?} {m} x {n} x {k} [{row}, {column}]"
                );
                if let Some(whole) = &whole_in_terms {
                    assert_eq!(
                        in_terms((row, column), 1, 1),
                        whole[row * n + column..][..1],
                        "terms, {m} x {n} x {k} [{row}, {column}]"
                    );
                }
            }
        }
    }
}

/// Both layouts of a left operand: along its rows, and as rows of pairs of the other's columns.
#[test]
fn products_of_pairs_are_those_of_the_rounded_numbers() {
    for unit in units() {
        for (m, n, k) in
            [(1, 1, 1), (8, 48, 64), (9, 49, 65), (17, 130, 511), (128, 512, 256), (256, 40, 2100), (3, 300, 0), (260, 16, 7)]
        {
            let (left, left_pairs) = paired(k, m, 5);
            let (right, right_pairs) = paired(k, n, 6);
            let (left_pitch, right_pitch) = (m + 3, n + 3);
            let mut along = vec![0.0; m * (k.div_ceil(2) + 2)];
            let along_pitch = k.div_ceil(2) + 2;
            for row in 0..m {
                let to = as_bf16_mut(&mut along[row * along_pitch..(row + 1) * along_pitch]);
                (0..k).for_each(|k| to[k] = nearest(left[k * left_pitch + row]));
            }
            let shape = GemmShape { m, n, k: k.div_ceil(2) };
            for store in [Store::Replace, Store::Add] {
                let lefts =
                    [Operand::transposed(as_pairs(&left_pairs), 2 * left_pitch), Operand::rows(as_pairs(&along), along_pitch)];
                let products = lefts.map(|left| {
                    let mut all = vec![0.25f32; m * (n + 5)];
                    unit.gemm(shape, &mut all, n + 5, left, Operand::rows(as_pairs(&right_pairs), 2 * right_pitch), store);
                    all
                });
                assert_eq!(products[0], products[1], "{unit:?} {m} x {n} x {k}");
                let rounded = |x: f32| bf16::from_f32(x).to_f64();
                for row in 0..m {
                    for column in 0..n {
                        let (mut exact, mut size) = if store == Store::Add { (0.25, 0.25) } else { (0.0, 0.0) };
                        for k in 0..k {
                            let product = rounded(left[k * left_pitch + row]) * rounded(right[k * right_pitch + column]);
                            exact += product;
                            size += product.abs();
                        }
                        let found = f64::from(products[0][row * (n + 5) + column]);
                        let bound = f64::from(f32::EPSILON) * 8.0 * (size + 1e-30);
                        assert!((found - exact).abs() <= bound, "{unit:?} {m} x {n} x {k} [{row}, {column}]: {found}, not {exact}");
                    }
                    assert_eq!(products[0][row * (n + 5) + n..(row + 1) * (n + 5)], [0.25; 5], "beyond the product");
                }
            }
        }
    }
}
