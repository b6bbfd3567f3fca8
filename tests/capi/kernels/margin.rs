//! The margin by itself, and the softmax's numerators.

use std::ptr::{null, null_mut};

use partialfc::capi::kernels::{pfc_margin_backward, pfc_margin_forward, pfc_partial_softmax, pfc_partial_softmax_offsets};
use partialfc::capi::types::pfc_margin;
use partialfc::matrix::DType;

use super::{assert_refused, device, lend, margin};
use partialfc_testing::capi::{outcome, Rows};
use partialfc_testing::numbers::Random;

/// exp(-87): numerators below it may be 0.
const LOST: f64 = 1.65e-38;

/// Margins of all kinds, with and without the guard.
fn margins() -> Vec<pfc_margin> {
    let mut margins = Vec::new();
    for (scale, m1, m2, m3) in [
        (64.0, 1.0, 0.5, 0.0),
        (64.0, 1.0, 0.0, 0.35),
        (1e-3, 1.0, 0.3, 0.2),
        (128.0, 1.35, 0.0, 0.0),
        (30.0, 2.0, 0.4, 0.1),
        (64.0, 4.0, 0.0, 0.0),
    ] {
        for guard in [1, 2] {
            for gradient in [1, 2] {
                margins.push(pfc_margin { scale, m1, m2, m3, margin_guard: guard, margin_gradient: gradient, ..margin() });
            }
        }
    }
    margins
}

fn describe(m: &pfc_margin) -> String {
    format!("scale {} m1 {} m2 {} m3 {} guard {} gradient {}", m.scale, m.m1, m.m2, m.m3, m.margin_guard, m.margin_gradient)
}

/// Target logit and its derivative by the cosine, from the cosine: theta by acos, good away from 0 and pi.
fn truth(m: &pfc_margin, cosine: f64) -> (f64, f64) {
    let theta = cosine.clamp(-1.0, 1.0).acos();
    let angle = m.m1 * theta + m.m2;
    if m.margin_guard == 2 && angle > std::f64::consts::PI {
        let shift = if m.m1 == 1.0 { -m.m2 * m.m2.sin() } else { -1.0 - ((std::f64::consts::PI - m.m2) / m.m1).cos() };
        return (m.scale * (theta.cos() + shift - m.m3), m.scale);
    }
    let slope = if m.margin_gradient == 2 { 1.0 } else { m.m1 * angle.sin() / theta.sin().max(1e-4) };
    (m.scale * (angle.cos() - m.m3), m.scale * slope)
}

#[test]
fn target_logits_and_their_derivatives() {
    let device = device(1);
    let mut random = Random(1);
    for m in margins() {
        // Away from the guard's edge, where the value jumps.
        let edge = ((std::f64::consts::PI - m.m2) / m.m1).cos();
        let drawn = (0..500).map(|_| random.between(-1.0, 1.0)).chain([-1.0, -0.999, 0.0, 0.999, 1.0]);
        let cosines: Vec<f32> = drawn.filter(|c| (c - edge).abs() > 1e-5).map(|c| c as f32).collect();
        let grads: Vec<f32> = cosines.iter().map(|_| random.between(-2.0, 2.0) as f32).collect();
        let n = cosines.len();
        let (mut logits, mut back) = (vec![-9f32; n + 1], vec![-9f32; n + 1]);
        // SAFETY: a live device and n numbers at each pointer.
        lend(|l| unsafe {
            let from = l.list(&cosines);
            outcome(pfc_margin_forward(device.0, &m, from, n as u64, l.array(&mut logits))).expect("forward");
            outcome(pfc_margin_backward(device.0, &m, from, l.list(&grads), n as u64, l.array(&mut back))).expect("backward");
        });
        assert_eq!((logits[n], back[n]), (-9.0, -9.0), "written beyond the count");
        for i in 0..n {
            let what = format!("{} cosine {}", describe(&m), cosines[i]);
            let (logit, slope) = truth(&m, f64::from(cosines[i]));
            let off = (f64::from(logits[i]) - logit).abs();
            assert!(off < 4e-7 * m.scale * (1.0 + m.m1), "{what}: logit {}, expected {logit}", logits[i]);
            let expected = f64::from(grads[i]) * slope;
            let off = (f64::from(back[i]) - expected).abs();
            assert!(off <= 1e-6 * expected.abs() + 2e-7 * m.scale, "{what}: gradient {}, expected {expected}", back[i]);
        }
        // In place, and none at all.
        let mut in_place = grads.clone();
        // SAFETY: as above; the function says that grad_cosines may be grad_logits.
        lend(|l| unsafe {
            let at = l.array(&mut in_place);
            outcome(pfc_margin_backward(device.0, &m, l.list(&cosines), at, n as u64, at)).expect("in place");
            outcome(pfc_margin_forward(device.0, &m, null(), 0, null_mut())).expect("nothing to do");
            outcome(pfc_margin_backward(device.0, &m, null(), null(), 0, null_mut())).expect("nothing to do");
        });
        assert_eq!(in_place, back[..n], "{}", describe(&m));
    }
}

#[test]
fn cosines_a_little_beyond_one_are_one() {
    let device = device(1);
    let m = margin();
    let (cosines, mut logits) = ([1.0000001f32, 1.0, -1.0, -1.0000001], [0f32; 4]);
    // SAFETY: a live device and four numbers at each pointer.
    lend(|l| unsafe { outcome(pfc_margin_forward(device.0, &m, l.list(&cosines), 4, l.array(&mut logits))) }).expect("forward");
    assert_eq!((logits[0], logits[3]), (logits[1], logits[2]), "rounded cosines are clamped");
}

#[test]
fn numerators_and_their_sums() {
    let device = device(2);
    let mut random = Random(2);
    for (batch, classes) in [(1, 1), (5, 3), (0, 4), (17, 100), (3, 2000), (300, 33)] {
        for (scale, filter) in [(64.0, 0.0), (1e-3, 0.0), (128.0, 0.0), (64.0, 0.3), (100.0, 0.5), (30.0, 0.02)] {
            let m = pfc_margin { scale, interclass_filter: filter, ..margin() };
            let offset = (scale - 64.0f64).max(0.0);
            let drawn: Vec<f64> = (0..batch * classes)
                .map(|_| loop {
                    let cosine = f64::from(random.between(-1.0, 1.0) as f32);
                    if filter == 0.0 || (cosine - filter).abs() > 1e-6 {
                        break cosine;
                    }
                })
                .collect();
            let targets: Vec<i64> = (0..batch).map(|_| random.below(classes + 1) as i64 - 1).collect();
            let mut cosines = Rows::new(&drawn, classes, DType::F32, 3);
            let mut sums = vec![-9f32; batch + 1];
            // SAFETY: a live device, a matrix that owns its memory, a target and a sum for each row.
            lend(|l| unsafe {
                let values = l.matrix(&mut cosines);
                outcome(pfc_partial_softmax(device.0, &m, &values, l.list(&targets), l.array(&mut sums)))
            })
            .expect("softmax");
            assert_eq!(sums[batch], -9.0, "written beyond the batch");
            let found = cosines.values();
            for i in 0..batch {
                let what = format!("{batch} x {classes} scale {scale} filter {filter} row {i}");
                let mut sum = 0.0;
                for j in 0..classes {
                    let cosine = drawn[i * classes + j];
                    let filtered = filter > 0.0 && cosine > filter;
                    let p = ((if filtered { 0.0 } else { scale * cosine }) - offset).exp();
                    let expected = if targets[i] == j as i64 || filtered { 0.0 } else { p };
                    sum += if targets[i] == j as i64 { 0.0 } else { p };
                    let f = found[i * classes + j];
                    let allowed = (4e-7 + 1.2e-7 * scale) * expected + LOST;
                    assert!((f - expected).abs() <= allowed, "{what} column {j}: {f:e}, expected {expected:e}");
                }
                let allowed = (1e-6 + 1.2e-7 * scale) * sum + classes as f64 * LOST;
                assert!((f64::from(sums[i]) - sum).abs() <= allowed, "{what}: sum {:e}, expected {sum:e}", sums[i]);
            }
        }
    }
}

/// Rows of which some are far from all that they are compared with.
#[test]
fn numerators_relative_to_each_rows_offset() {
    let device = device(2);
    let mut random = Random(6);
    for (scale, filter) in [(64.0, 0.0), (90.0, 0.0), (128.0, 0.0), (128.0, 0.1)] {
        let m = pfc_margin { scale, interclass_filter: filter, ..margin() };
        let (batch, classes) = (9, 300);
        let far = |i: usize| i.is_multiple_of(3);
        let drawn: Vec<f64> = (0..batch * classes)
            .map(|at| f64::from(random.between(-1.0, if far(at / classes) { -0.4 } else { 0.09 }) as f32))
            .collect();
        let targets: Vec<i64> = (0..batch as i64).map(|row| row * 7 - 1).collect();
        let mut cosines = Rows::new(&drawn, classes, DType::F32, 3);
        let (mut sums, mut offsets) = (vec![-9f32; batch], vec![-9f32; batch]);
        // SAFETY: a live device, a matrix that owns its memory, a target, a sum and an offset for each row.
        lend(|l| unsafe {
            let (values, t) = (l.matrix(&mut cosines), l.list(&targets));
            let (n, o) = (l.array(&mut sums), l.array(&mut offsets));
            outcome(pfc_partial_softmax_offsets(device.0, &m, &values, t, n, o))
        })
        .expect("softmax");
        let found = cosines.values();
        for i in 0..batch {
            let row = &drawn[i * classes..(i + 1) * classes];
            let negatives = || (0..classes).filter(|&j| targets[i] != j as i64);
            let largest = negatives().map(|j| row[j]).fold(-2.0, f64::max);
            let own = scale > 75.0 && scale * largest - (scale - 64.0) < -60.0;
            let offset = if own { (scale * largest) as f32 } else { (scale - 64.0) as f32 };
            let what = format!("scale {scale} filter {filter} row {i}");
            assert_eq!(offsets[i], offset, "{what}");
            let truth = |j: usize| (scale * row[j] - f64::from(offset)).exp();
            for j in negatives() {
                let off = (found[i * classes + j] - truth(j)).abs();
                assert!(off <= (4e-7 + 1.2e-7 * scale) * truth(j) + LOST, "{what} column {j}: {:e}", found[i * classes + j]);
            }
            let sum: f64 = negatives().map(truth).sum();
            assert!((f64::from(sums[i]) - sum).abs() <= (1e-6 + 1.2e-7 * scale) * sum, "{what}: {:e} for {sum:e}", sums[i]);
            assert!(!own || sum >= 0.99);
        }
    }
}

/// What is no number stays where it is.
#[test]
fn what_is_no_number_spoils_its_own_element_or_row() {
    let device = device(1);
    let m = margin();
    let (cosines, grads) = ([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.3, 0.3], [1.0, 1.0, 1.0, f32::NAN, 1.0f32]);
    let (mut logits, mut back) = (vec![-9f32; 5], vec![-9f32; 5]);
    // SAFETY: a live device and five numbers at each pointer.
    lend(|l| unsafe {
        let from = l.list(&cosines);
        outcome(pfc_margin_forward(device.0, &m, from, 5, l.array(&mut logits))).expect("forward");
        outcome(pfc_margin_backward(device.0, &m, from, l.list(&grads), 5, l.array(&mut back))).expect("backward");
    });
    assert!(logits[0].is_nan() && back[0].is_nan() && back[3].is_nan());
    assert!(logits[1..].iter().chain(&back[1..3]).all(|x| x.is_finite()) && back[4].is_finite(), "{logits:?} {back:?}");
    let mut values = Rows::f32(&[0.1, f32::NAN, 0.2, 0.1, 0.3, 0.2], 3);
    let mut sums = vec![-9f32; 2];
    // SAFETY: a live device, a matrix that owns its memory, a target and a sum for each row.
    lend(|l| unsafe {
        let view = l.matrix(&mut values);
        outcome(pfc_partial_softmax(device.0, &m, &view, l.list(&[-1i64, -1]), l.array(&mut sums)))
    })
    .expect("softmax");
    let found = values.values();
    assert!(sums[0].is_nan() && found[1].is_nan() && sums[1].is_finite());
    assert!([0, 2, 3, 4, 5].iter().all(|&at| found[at].is_finite()), "{found:?}");
}

#[test]
fn what_cannot_be_is_refused() {
    let device = device(1);
    let m = margin();
    let numbers = [0.5f32; 2];
    let mut out = [-9f32; 2];
    let mut cosines = Rows::output(2, 3);
    let view = cosines.view();
    let mut half = Rows::new(&[0.0; 6], 3, DType::F16, 0);
    let half = half.view();
    let bad = |spoil: fn(&mut pfc_margin)| {
        let mut m = margin();
        spoil(&mut m);
        m
    };
    // SAFETY: a live device; wrong arguments are refused before memory is touched.
    unsafe {
        let forward = |m: *const pfc_margin, out| outcome(pfc_margin_forward(device.0, m, numbers.as_ptr(), 2, out));
        assert_refused("no margin", forward(null(), out.as_mut_ptr()), &["pfc_margin"]);
        assert_refused("no output", forward(&m, null_mut()), &["logits"]);
        assert_refused("scale", forward(&bad(|m| m.scale = 0.0), out.as_mut_ptr()), &["scale", "0"]);
        assert_refused("scale", forward(&bad(|m| m.scale = 129.0), out.as_mut_ptr()), &["scale", "129"]);
        assert_refused("m2", forward(&bad(|m| m.m2 = f64::NAN), out.as_mut_ptr()), &["m2", "NaN"]);
        assert_refused("gradient", forward(&bad(|m| m.margin_gradient = 7), out.as_mut_ptr()), &["margin_gradient", "7"]);
        assert_refused("size", forward(&bad(|m| m.struct_size = 3), out.as_mut_ptr()), &["struct_size", "3"]);
        assert_refused("no cosines", outcome(pfc_margin_forward(device.0, &m, null(), 2, out.as_mut_ptr())), &["cosines"]);
        let mut backward =
            |grads: *const f32| outcome(pfc_margin_backward(device.0, &m, numbers.as_ptr(), grads, 2, out.as_mut_ptr()));
        assert_refused("no gradient", backward(null()), &["grad_logits"]);
        let softmax = |view, targets: &[i64]| {
            let mut sums = [0f32; 2];
            outcome(pfc_partial_softmax(device.0, &m, view, targets.as_ptr(), sums.as_mut_ptr()))
        };
        assert_refused("f16 cosines", softmax(&half, &[0, 1]), &["cosines", "f16"]);
        assert_refused("a target outside", softmax(&view, &[0, 3]), &["targets[1]", "3"]);
        assert_refused("a target outside", softmax(&view, &[-2, 0]), &["targets[0]", "-2"]);
        let mut sums = [0f32; 2];
        assert_refused("no targets", outcome(pfc_partial_softmax(device.0, &m, &view, null(), sums.as_mut_ptr())), &["targets"]);
        assert_refused("no sums", outcome(pfc_partial_softmax(device.0, &m, &view, [0i64, 0].as_ptr(), null_mut())), &["row_sums"]);
    }
    assert_eq!(out, [-9.0; 2]);
    assert_eq!(cosines.values(), [-123.0; 6]);
}
