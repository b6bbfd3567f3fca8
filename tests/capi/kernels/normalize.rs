//! Rows divided by their norms, and cosines of all pairs.

use std::ptr::{null, null_mut};

use partialfc::capi::kernels::{pfc_normalize_gemm, pfc_normalize_gemm_workspace, pfc_normalize_rows};
use partialfc::matrix::DType;

use super::{assert_refused, device, lend, Workspace};
use partialfc_testing::capi::{outcome, Rows};
use partialfc_testing::numbers::{norm, Random};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Rounding to the type, relative.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 4.9e-4,
        DType::Bf16 => 4e-3,
        _ => 0.0,
    }
}

/// Rows of many sizes, one zero and one too small to have a direction.
fn rows(random: &mut Random, count: usize, dim: usize) -> Vec<f64> {
    let mut values = Vec::new();
    for row in 0..count {
        let size = [1.0, 1e-3, 300.0, 0.0, 1e-14, 1.0][row % 6];
        values.extend((0..dim).map(|_| size * random.normal()));
    }
    values
}

/// E^ and the inverse norm.
fn unit(row: &[f64]) -> (Vec<f64>, f64) {
    let norm = norm(row);
    let inverse = if norm < 1e-12 { 0.0 } else { 1.0 / norm };
    (row.iter().map(|x| x * inverse).collect(), inverse)
}

#[test]
fn rows_are_divided_by_their_norms() {
    let device = device(2);
    let mut random = Random(1);
    for (count, dim) in [(0, 3), (1, 1), (7, 5), (40, 129), (13, 64), (600, 17)] {
        for from in DTYPES {
            for to in DTYPES {
                let mut input = Rows::new(&rows(&mut random, count, dim), dim, from, dim % 3);
                let mut output = Rows::new(&vec![-9.0; count * dim], dim, to, 2);
                let mut inverse = vec![-9f32; count];
                // SAFETY: a live device, matrices that own their memory, an inverse norm for each row.
                lend(|l| unsafe {
                    let (from, to) = (l.matrix(&mut input), l.matrix(&mut output));
                    outcome(pfc_normalize_rows(device.0, &from, &to, l.array(&mut inverse)))
                })
                .expect("rows");
                let what = format!("{count} x {dim} {from:?} to {to:?}");
                let (values, found) = (input.values(), output.values());
                for (i, row) in values.chunks_exact(dim).enumerate() {
                    let (expected, size) = unit(row);
                    let off = (f64::from(inverse[i]) - size).abs();
                    assert!(off <= 3e-7 * size, "{what} row {i}: inverse norm {:e}, expected {size:e}", inverse[i]);
                    for (k, (f, e)) in found[i * dim..][..dim].iter().zip(&expected).enumerate() {
                        let allowed = (3e-7 + rounding(to)) * e.abs() + if to == DType::F16 { 3e-8 } else { 0.0 };
                        assert!((f - e).abs() <= allowed, "{what} row {i} column {k}: {f:e}, expected {e:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_may_be_normalized_in_place_and_without_norms() {
    let device = device(1);
    let values = rows(&mut Random(2), 9, 7);
    let mut separate = Rows::output(9, 7);
    let mut in_place = Rows::new(&values, 7, DType::F32, 0);
    let mut input = in_place.clone();
    // SAFETY: a live device, matrices that own their memory; the function says that normalized may be rows.
    lend(|l| unsafe {
        let (from, to) = (l.matrix(&mut input), l.matrix(&mut separate));
        outcome(pfc_normalize_rows(device.0, &from, &to, null_mut())).expect("rows");
        let view = l.matrix(&mut in_place);
        outcome(pfc_normalize_rows(device.0, &view, &view, null_mut())).expect("rows");
    });
    assert_eq!(in_place.values(), separate.values());
}

#[test]
fn large_and_small_rows_keep_their_direction() {
    let device = device(1);
    for size in [1e-11f64, 1e-10, 1e15, 1e18, 1e20, 1e30] {
        let mut input = Rows::new(&[0.6 * size, 0.0, -0.8 * size], 3, DType::F32, 0);
        let mut output = Rows::output(1, 3);
        // SAFETY: a live device, matrices that own their memory.
        lend(|l| unsafe { outcome(pfc_normalize_rows(device.0, &l.matrix(&mut input), &l.matrix(&mut output), null_mut())) })
            .expect("rows");
        let off = norm(&output.values().iter().zip([0.6, 0.0, -0.8]).map(|(f, e)| f - e).collect::<Vec<_>>());
        assert!(off < 1e-6, "size {size:e}: {:?}", output.values());
    }
}

#[test]
fn cosines_are_those_of_all_pairs() {
    let device = device(2);
    let mut random = Random(3);
    let shapes = [(1, 1, 1), (0, 4, 3), (33, 70, 65), (130, 139, 7), (3, 5, 7), (7, 1500, 16), (130, 9, 257), (2, 9000, 5)];
    for (batch, classes, dim) in shapes {
        for dtype in DTYPES {
            let mut e = Rows::new(&rows(&mut random, batch, dim), dim, dtype, 1);
            let mut w = Rows::new(&rows(&mut random, classes, dim), dim, DType::F32, 3);
            let mut cosines = Rows::new(&vec![-9.0; batch * classes], classes, DType::F32, 2);
            let mut workspace = Workspace::asked(|bytes| unsafe {
                // SAFETY: a live device and an output.
                pfc_normalize_gemm_workspace(device.0, batch as u64, dim as u64, classes as u64, bytes)
            });
            let (at, bytes) = (workspace.pointer(), workspace.bytes);
            // SAFETY: a live device, matrices that own their memory, a workspace of the size asked for.
            lend(|l| unsafe {
                let (e, w, out) = (l.matrix(&mut e), l.matrix(&mut w), l.matrix(&mut cosines));
                outcome(pfc_normalize_gemm(device.0, &e, &w, &out, at, bytes))
            })
            .expect("cosines");
            workspace.check();
            let (e, w, found) = (e.values(), w.values(), cosines.values());
            for i in 0..batch {
                let (e, _) = unit(&e[i * dim..][..dim]);
                for j in 0..classes {
                    let (w, _) = unit(&w[j * dim..][..dim]);
                    let cosine: f64 = e.iter().zip(&w).map(|(a, b)| a * b).sum();
                    let off = (found[i * classes + j] - cosine).abs();
                    assert!(
                        off < 1e-6,
                        "{batch} x {classes} x {dim} {dtype:?}: ({i}, {j}) is {}, expected {cosine}",
                        found[i * classes + j]
                    );
                    if norm(&e) == 0.0 || norm(&w) == 0.0 {
                        assert_eq!(found[i * classes + j], 0.0, "a row without direction");
                    }
                }
            }
        }
    }
}

/// What is no number, or next to none, spoils its own row and no other.
#[test]
fn what_is_no_number_spoils_its_own_row() {
    let device = device(1);
    let mut input = Rows::f32(&[1.0, f32::NAN, 2.0, f32::INFINITY, 1.0, 0.0, 3.0, 4.0, 0.0, 2e38, 0.0, 2e38], 3);
    let (mut output, mut inverse) = (Rows::output(4, 3), vec![-9f32; 4]);
    // SAFETY: a live device, matrices that own their memory, an inverse norm for each row.
    lend(|l| unsafe {
        let (from, to) = (l.matrix(&mut input), l.matrix(&mut output));
        outcome(pfc_normalize_rows(device.0, &from, &to, l.array(&mut inverse)))
    })
    .expect("rows");
    let found = output.values();
    assert!(inverse[0].is_nan() && found[..3].iter().all(|x| x.is_nan()), "{found:?}");
    assert!(inverse[1] == 0.0 && found[3].is_nan() && found[4..6] == [0.0; 2], "{found:?}");
    let off = |at: usize, truth: f64| (found[at] - truth).abs();
    assert!(off(6, 0.6) < 1e-7 && off(7, 0.8) < 1e-7 && found[8] == 0.0, "{found:?}");
    // The inverse norm is a subnormal number.
    let half = 0.5f64.sqrt();
    assert!(inverse[3] < f32::MIN_POSITIVE && off(9, half) < 1e-6 && off(11, half) < 1e-6, "{found:?}");

    let (mut w, mut cosines) = (Rows::f32(&[1.0, 0.0, 0.0, 0.0, f32::NAN, 0.0], 3), Rows::output(4, 2));
    let mut workspace = Workspace::asked(|bytes| unsafe {
        // SAFETY: a live device and an output.
        pfc_normalize_gemm_workspace(device.0, 4, 3, 2, bytes)
    });
    let (at, bytes) = (workspace.pointer(), workspace.bytes);
    // SAFETY: a live device, matrices that own their memory, a workspace of the size asked for.
    lend(|l| unsafe {
        let (e, w, out) = (l.matrix(&mut input), l.matrix(&mut w), l.matrix(&mut cosines));
        outcome(pfc_normalize_gemm(device.0, &e, &w, &out, at, bytes))
    })
    .expect("cosines");
    let found = cosines.values();
    assert!([0, 1, 2, 3, 5, 7].iter().all(|&at| found[at].is_nan()), "{found:?}");
    assert!((found[4] - 0.6).abs() < 1e-6 && (found[6] - half).abs() < 1e-6, "{found:?}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device(1);
    let (mut e, mut w, mut cosines) = (Rows::output(2, 3), Rows::output(4, 3), Rows::output(2, 4));
    let (e, w, cosines) = (e.view(), w.view(), cosines.view());
    let mut workspace = Workspace::asked(|bytes| unsafe {
        // SAFETY: a live device and an output.
        pfc_normalize_gemm_workspace(device.0, 2, 3, 4, bytes)
    });
    let (at, bytes) = (workspace.pointer(), workspace.bytes);
    assert!(bytes > 0, "the test is about too little workspace");
    let mut wide = cosines;
    wide.cols = 5;
    wide.row_stride = 5;
    let mut short = cosines;
    short.rows = 1;
    let mut half = cosines;
    half.dtype = 2;
    // SAFETY: a live device; wrong arguments are refused before memory is touched.
    unsafe {
        let call = |e, w, c, at, bytes| outcome(pfc_normalize_gemm(device.0, e, w, c, at, bytes));
        assert_refused("no embeddings", call(null(), &w, &cosines, at, bytes), &["embeddings"]);
        assert_refused("no centers", call(&e, null(), &cosines, at, bytes), &["centers"]);
        assert_refused("no cosines", call(&e, &w, null(), at, bytes), &["cosines"]);
        assert_refused("other columns", call(&e, &w, &wide, at, bytes), &["cosines.cols", "5", "4"]);
        assert_refused("other rows", call(&e, &w, &short, at, bytes), &["cosines.rows", "1", "2"]);
        assert_refused("not f32", call(&e, &w, &half, at, bytes), &["cosines", "f16"]);
        assert_refused("no workspace", call(&e, &w, &cosines, null_mut(), bytes), &["workspace"]);
        assert_refused("too little workspace", call(&e, &w, &cosines, at, bytes - 1), &["workspace"]);
        let refused = outcome(pfc_normalize_gemm(null(), &e, &w, &cosines, at, bytes));
        assert_refused("no device", refused, &["device"]);
        assert_refused("no size", outcome(pfc_normalize_gemm_workspace(device.0, 2, 3, 4, null_mut())), &["bytes"]);
        assert_refused("rows", outcome(pfc_normalize_rows(device.0, &e, &w, null_mut())), &["normalized.rows", "4", "2"]);
    }
    workspace.check();
}
