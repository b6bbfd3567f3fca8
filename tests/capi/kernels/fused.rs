//! One rank's forward and backward without a head; over several ranks their sums make the whole.

use std::ptr::{null, null_mut};

use partialfc::capi::kernels::{
    pfc_fused_backward, pfc_fused_backward_offsets, pfc_fused_forward, pfc_fused_forward_offsets, pfc_fused_workspace,
};
use partialfc::capi::types::pfc_margin;
use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement};
use partialfc_testing::reference::{self, RankInput, Step};

use super::{assert_refused, device, lend, margin, Workspace};
use partialfc_testing::capi::{options, outcome, Device, Rows};
use partialfc_testing::numbers::{norm, Random};

/// What one rank's forward gives.
struct Forward {
    row_sums: Vec<f32>,
    row_offsets: Vec<f32>,
    target_logits: Vec<f32>,
    weighted: Rows,
}

fn workspace(device: &Device, batch: usize, dim: usize, classes: usize) -> Workspace {
    // SAFETY: a live device and an output.
    Workspace::asked(|bytes| unsafe { pfc_fused_workspace(device.0, batch as u64, dim as u64, classes as u64, bytes) })
}

/// Whether rows may have offsets of their own: which entries are called.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Offsets {
    Common,
    Own,
}

fn forward(device: &Device, m: &pfc_margin, e: &mut Rows, w: &mut Rows, targets: &[i64]) -> Forward {
    forward_by(Offsets::Common, device, m, e, w, targets)
}

fn forward_by(by: Offsets, device: &Device, m: &pfc_margin, e: &mut Rows, w: &mut Rows, targets: &[i64]) -> Forward {
    let batch = targets.len();
    let mut out = Forward {
        row_sums: vec![-9.0; batch],
        row_offsets: vec![0.0; batch],
        target_logits: vec![-9.0; batch],
        weighted: Rows::new(&vec![-9.0; batch * e.cols], e.cols, DType::F32, 1),
    };
    let mut workspace = workspace(device, batch, e.cols, w.rows);
    let (at, bytes) = (workspace.pointer(), workspace.bytes);
    // SAFETY: a live device, memory of the sizes that the function names.
    lend(|l| unsafe {
        let (e, w, p) = (l.matrix(e), l.matrix(w), l.matrix(&mut out.weighted));
        let (sums, logits) = (l.array(&mut out.row_sums), l.array(&mut out.target_logits));
        let t = l.list(targets);
        outcome(match by {
            Offsets::Common => pfc_fused_forward(device.0, m, &e, &w, t, sums, logits, &p, at, bytes),
            Offsets::Own => {
                let offsets = l.array(&mut out.row_offsets);
                pfc_fused_forward_offsets(device.0, m, &e, &w, t, sums, offsets, logits, &p, at, bytes)
            }
        })
    })
    .expect("forward");
    workspace.check();
    out
}

/// This rank's gradients; `of_all` has the sums over ranks, `of_rank` this rank's P @ W^.
fn backward(
    device: &Device,
    m: &pfc_margin,
    (e, w): (&mut Rows, &mut Rows),
    targets: &[i64],
    (row_sums, target_logits): (&[f32], &[f32]),
    of_rank: &mut Forward,
    loss_weight: f64,
) -> (Vec<f64>, Vec<f64>) {
    backward_by(None, device, m, (e, w), targets, (row_sums, target_logits), of_rank, loss_weight)
}

#[allow(clippy::too_many_arguments)]
fn backward_by(
    sum_offsets: Option<&[f32]>,
    device: &Device,
    m: &pfc_margin,
    (e, w): (&mut Rows, &mut Rows),
    targets: &[i64],
    (row_sums, target_logits): (&[f32], &[f32]),
    of_rank: &mut Forward,
    loss_weight: f64,
) -> (Vec<f64>, Vec<f64>) {
    let batch = targets.len();
    let mut grad_e = Rows::new(&vec![-9.0; batch * e.cols], e.cols, DType::F32, 2);
    let mut grad_w = Rows::new(&vec![-9.0; w.rows * e.cols], e.cols, DType::F32, 0);
    let mut workspace = workspace(device, batch, e.cols, w.rows);
    let (at, bytes) = (workspace.pointer(), workspace.bytes);
    // SAFETY: a live device, memory of the sizes that the function names.
    lend(|l| unsafe {
        let (e, w, p) = (l.matrix(e), l.matrix(w), l.matrix(&mut of_rank.weighted));
        let (t, n, z) = (l.list(targets), l.list(row_sums), l.list(target_logits));
        let (ge, gw) = (l.matrix(&mut grad_e), l.matrix(&mut grad_w));
        outcome(match sum_offsets {
            None => pfc_fused_backward(device.0, m, &e, &w, t, n, z, &p, loss_weight, &ge, &gw, at, bytes),
            Some(offsets) => {
                let (of_sums, own) = (l.list(offsets), l.list(&of_rank.row_offsets));
                pfc_fused_backward_offsets(device.0, m, &e, &w, t, n, of_sums, z, own, &p, loss_weight, &ge, &gw, at, bytes)
            }
        })
    })
    .expect("backward");
    workspace.check();
    (grad_e.values(), grad_w.values())
}

/// The reference's step over the same rows: all classes sampled, on as many ranks as W was cut into.
fn judge(options: &HeadOptions, shards: usize, e: &[f64], w: &[f64], labels: &[i64]) -> Step {
    let head = reference::Head::new(options.clone(), shards, w.to_vec());
    let samples: Vec<Vec<i64>> = (0..shards).map(|rank| head.shard(rank).map(|class| class as i64).collect()).collect();
    let inputs: Vec<RankInput> = samples
        .iter()
        .enumerate()
        .map(|(rank, sample)| match rank {
            0 => RankInput { embeddings: e, labels, sample },
            _ => RankInput { embeddings: &[], labels: &[], sample },
        })
        .collect();
    head.forward(&inputs).expect("a step")
}

/// Rows within what float32 allows: relative to their size and to the terms that were added up.
fn check(what: &str, found: &[f64], truth: &[f64], gross: &[f64], dim: usize, scale: f64) {
    for (i, (found, truth)) in found.chunks_exact(dim).zip(truth.chunks_exact(dim)).enumerate() {
        let off = norm(&found.iter().zip(truth).map(|(f, t)| f - t).collect::<Vec<_>>());
        let allowed = 5e-5 * (scale / 64.0).max(1.0) * norm(truth) + 8e-7 * scale.max(1.0) * gross[i] + 1e-30;
        assert!(off <= allowed, "{what} row {i}: off by {off:e}, allowed {allowed:e}: {found:?}, expected {truth:?}");
    }
}

/// The loss and the gradients that the shards' parts add up to, against the reference.
fn check_shards(device: &Device, (batch, classes, dim): (usize, usize, usize), given: Margin, shards: usize, by: Offsets) {
    let mut options = HeadOptions { placement: Placement::Sharded, ..options(classes as u64, dim as u32, batch as u64) };
    options.margin = given;
    let Margin { scale, m1, m2, m3, interclass_filter, gradient, .. } = given;
    let m = pfc_margin { scale, m1, m2, m3, interclass_filter, margin_gradient: gradient as i32, ..margin() };
    let random = &mut Random((batch + classes) as u64);
    let (dtype, w_dtype) = if batch == 33 { (DType::Bf16, DType::F16) } else { (DType::F32, DType::F32) };
    let mut e = Rows::new(&normals(random, batch * dim), dim, dtype, 1);
    let w_values = Rows::new(&normals(random, classes * dim), dim, w_dtype, 0).values();
    let labels = random.labels(batch, classes);
    let step = judge(&options, shards, &e.values(), &w_values, &labels);
    let seen = &step.conditioning;
    if seen.filter_distance < 1e-5 {
        return;
    }
    let what = format!("{batch} x {classes} x {dim}, {:?}, {shards} shards, {by:?} offsets", options.margin);
    // Shard by shard: its rows of W, and the row's own class where it is there.
    let ranges: Vec<_> = (0..shards).map(|rank| options.shard(shards as u32, rank as u32)).collect();
    let mut parts: Vec<(Rows, Vec<i64>)> = ranges
        .iter()
        .map(|shard| {
            let (first, rows) = (shard.first as usize, shard.rows as usize);
            let w = Rows::new(&w_values[first * dim..(first + rows) * dim], dim, w_dtype, 2);
            let targets = labels.iter().map(|&y| if shard.contains(y) { y - first as i64 } else { -1 }).collect();
            (w, targets)
        })
        .collect();
    let mut forwards: Vec<Forward> = parts.iter_mut().map(|(w, targets)| forward_by(by, device, &m, &mut e, w, targets)).collect();
    let sum_offsets: Vec<f32> =
        (0..batch).map(|i| forwards.iter().map(|f| f.row_offsets[i]).fold(f32::NEG_INFINITY, f32::max)).collect();
    let relative = |f: &Forward, i: usize| f.row_sums[i] * (f.row_offsets[i] - sum_offsets[i]).exp();
    let row_sums: Vec<f32> = (0..batch).map(|i| forwards.iter().map(|f| relative(f, i)).sum()).collect();
    let target_logits: Vec<f32> = (0..batch).map(|i| forwards.iter().map(|f| f.target_logits[i]).sum()).collect();
    for ((_, targets), forward) in parts.iter().zip(&forwards) {
        let elsewhere = targets.iter().zip(&forward.target_logits).filter(|(&target, _)| target < 0);
        elsewhere.for_each(|(_, &logit)| assert_eq!(logit, 0.0, "{what}: a target logit without a target"));
    }
    let losses = (0..batch).map(|i| {
        let offset = if by == Offsets::Own { f64::from(sum_offsets[i]) } else { (scale - 64.0).max(0.0) };
        let excess = f64::from(row_sums[i]).ln() + offset - f64::from(target_logits[i]);
        excess.max(0.0) + (-excess.abs()).exp().ln_1p()
    });
    let loss = losses.sum::<f64>() / batch as f64;
    assert!((loss - step.loss).abs() <= 5e-5 * (scale / 64.0).max(1.0) * step.loss, "{what}: loss {loss}, expected {}", step.loss);
    let mut grad_e = vec![0.0; batch * dim];
    for (rank, ((w, targets), own)) in parts.iter_mut().zip(&mut forwards).enumerate() {
        let weight = 1.0 / batch as f64;
        let sums = (row_sums.as_slice(), target_logits.as_slice());
        let of_sums = (by == Offsets::Own).then_some(sum_offsets.as_slice());
        let (part, grad_w) = backward_by(of_sums, device, &m, (&mut e, w), targets, sums, own, weight);
        grad_e.iter_mut().zip(part).for_each(|(to, x)| *to += x);
        let what = format!("{what}: dW of shard {rank}");
        check(&what, &grad_w, &step.grad_centers[rank], &seen.gross_centers[rank], dim, scale);
    }
    check(&format!("{what}: dE"), &grad_e, &step.grad_embeddings[0], &seen.gross_embeddings[0], dim, scale);
}

#[test]
fn shards_together_give_the_loss_and_the_gradients() {
    let device = device(2);
    let shapes = [(1, 2, 1), (4, 9, 6), (33, 70, 17), (20, 700, 40), (150, 41, 64), (5, 30, 300)];
    let margins = [(64.0, 1.0, 0.5, 0.0, 0.0), (75.0, 1.0, 0.0, 0.35, 0.0), (1.0, 1.2, 0.3, 0.1, 0.0), (32.0, 1.0, 0.5, 0.0, 0.15)];
    for shape in shapes {
        for (scale, m1, m2, m3, interclass_filter) in margins {
            for shards in 1..=2 {
                for gradient in [MarginGradient::Exact, MarginGradient::StraightThrough] {
                    let margin = Margin { scale, m1, m2, m3, interclass_filter, gradient, guard: false };
                    check_shards(&device, shape, margin, shards, Offsets::Common);
                }
            }
        }
    }
}

/// With an offset for each row they do at every scale, however few classes there are and however far.
#[test]
fn shards_with_offsets_give_them_at_every_scale() {
    let device = device(2);
    let margins =
        [(64.0, 0.5, 0.0, 0.0), (76.0, 0.0, 0.4, 0.0), (100.0, 0.0, 0.35, 0.0), (128.0, 0.5, 0.0, 0.0), (128.0, 0.3, 0.1, 0.02)];
    for shape in [(1, 2, 1), (4, 2, 6), (9, 3, 2), (33, 70, 17), (140, 4, 3)] {
        for (scale, m2, m3, interclass_filter) in margins {
            for shards in 1..=2 {
                let gradient = MarginGradient::Exact;
                let margin = Margin { scale, m1: 1.0, m2, m3, interclass_filter, gradient, guard: false };
                check_shards(&device, shape, margin, shards, Offsets::Own);
            }
        }
    }
}

/// Without offsets a sum that has lost what counts is no sum, and the message says what has it.
#[test]
fn a_sum_whose_negatives_are_lost_is_refused() {
    let device = device(1);
    let m = pfc_margin { scale: 128.0, m2: 0.0, ..margin() };
    let mut w = Rows::f32(&[-1.0, 0.1, -1.0, 1.2, -1.0, -1.3], 2);
    let (mut near, mut far) = (Rows::f32(&[-1.0, 0.1, -1.0, 1.2], 2), Rows::f32(&[-1.0, 0.1, 1.0, 0.05], 2));
    let mut refused = |e: &mut Rows| {
        let mut out = forward(&device, &m, e, &mut w, &[0, 1]);
        let (mut ge, mut gw) = (Rows::output(2, 2), Rows::output(3, 2));
        let mut workspace = workspace(&device, 2, 2, 3);
        let (at, bytes) = (workspace.pointer(), workspace.bytes);
        // SAFETY: a live device, memory of the sizes that the function names.
        lend(|l| unsafe {
            let (e, w, p) = (l.matrix(e), l.matrix(&mut w), l.matrix(&mut out.weighted));
            let (t, n, z) = (l.list(&[0i64, 1]), l.list(&out.row_sums), l.list(&out.target_logits));
            let (ge, gw) = (l.matrix(&mut ge), l.matrix(&mut gw));
            outcome(pfc_fused_backward(device.0, &m, &e, &w, t, n, z, &p, 1.0, &ge, &gw, at, bytes))
        })
    };
    refused(&mut near).expect("sums that float32 has");
    let failure = refused(&mut far).expect_err("a row far from all classes");
    assert_eq!(failure.status, partialfc::Status::NotFinite as i32, "{failure:?}");
    for words in ["row_sums[1]", "pfc_fused_forward_offsets", "pfc_fused_backward_offsets"] {
        assert!(failure.message.contains(words), "{failure:?}");
    }
}

#[test]
fn more_columns_than_are_computed_at_a_time() {
    let margin =
        Margin { scale: 64.0, m1: 1.0, m2: 0.5, m3: 0.0, interclass_filter: 0.0, gradient: MarginGradient::Exact, guard: false };
    check_shards(&device(2), (3, 9000, 5), margin, 1, Offsets::Common);
    check_shards(&device(2), (2, 9000, 2), Margin { scale: 128.0, ..margin }, 1, Offsets::Own);
}

fn normals(random: &mut Random, count: usize) -> Vec<f64> {
    (0..count).map(|_| random.normal()).collect()
}

#[test]
fn a_row_whose_sample_is_only_its_target_gets_no_gradient() {
    let device = device(1);
    let m = margin();
    let (mut e, mut w) = (Rows::f32(&[1.0, 2.0, 3.0, -1.0, 0.5, 0.0], 3), Rows::f32(&[0.5, -1.0, 2.0], 3));
    let mut out = forward(&device, &m, &mut e, &mut w, &[0, 0]);
    assert_eq!(out.row_sums, [0.0, 0.0]);
    assert_eq!(out.weighted.values(), [0.0; 6]);
    let (sums, logits) = (out.row_sums.clone(), out.target_logits.clone());
    let (grad_e, grad_w) = backward(&device, &m, (&mut e, &mut w), &[0, 0], (&sums, &logits), &mut out, 1.0);
    assert_eq!((grad_e, grad_w), (vec![0.0; 6], vec![0.0; 3]));
}

#[test]
fn sums_that_leave_float32_are_refused_and_nothing_is_written() {
    let device = device(1);
    let m = margin();
    let (mut e, mut w) = (Rows::f32(&[1.0, 2.0, 3.0, -1.0, 0.5, 0.0], 3), Rows::f32(&[0.5, -1.0, 2.0], 3));
    let (mut p, mut ge, mut gw) = (Rows::output(2, 3), Rows::output(2, 3), Rows::output(1, 3));
    let mut workspace = workspace(&device, 2, 3, 1);
    let (at, bytes) = (workspace.pointer(), workspace.bytes);
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let (targets, sums, logits) = ([0i64, -1], [1.0, bad], [3f32; 2]);
        // SAFETY: a live device, memory of the sizes that the function names.
        let refused = lend(|l| unsafe {
            let (e, w, p) = (l.matrix(&mut e), l.matrix(&mut w), l.matrix(&mut p));
            let (t, n, z) = (l.list(&targets), l.list(&sums), l.list(&logits));
            let (ge, gw) = (l.matrix(&mut ge), l.matrix(&mut gw));
            outcome(pfc_fused_backward(device.0, &m, &e, &w, t, n, z, &p, 1.0, &ge, &gw, at, bytes))
        });
        let failure = refused.expect_err("a sum that is none");
        assert_eq!(failure.status, partialfc::Status::NotFinite as i32, "{failure:?}");
        assert!(failure.message.contains("row_sums[1]"), "{failure:?}");
    }
    assert_eq!((ge.values(), gw.values()), (vec![-123.0; 6], vec![-123.0; 3]));
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other_rows_sum() {
    let device = device(1);
    let m = margin();
    let mut random = Random(9);
    let (mut values, mut w) = (normals(&mut random, 5 * 3), Rows::f32(&random.normals(4 * 3, 1.0), 3));
    let sound = forward(&device, &m, &mut Rows::new(&values, 3, DType::F32, 0), &mut w, &[0, 1, -1, 3, 2]);
    values[7] = f64::NAN;
    let spoilt = forward(&device, &m, &mut Rows::new(&values, 3, DType::F32, 0), &mut w, &[0, 1, -1, 3, 2]);
    for row in [0, 1, 3, 4] {
        assert_eq!((spoilt.row_sums[row], spoilt.target_logits[row]), (sound.row_sums[row], sound.target_logits[row]));
        assert_eq!(spoilt.weighted.values()[3 * row..][..3], sound.weighted.values()[3 * row..][..3]);
    }
    assert!(spoilt.row_sums[2].is_nan() && spoilt.weighted.values()[6..9].iter().all(|x| x.is_nan()));
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = device(1);
    let m = margin();
    // No rows: the class centers get zeros.
    let (mut none, mut w) = (Rows::output(0, 3), Rows::f32(&[0.5, -1.0, 2.0], 3));
    let mut out = forward(&device, &m, &mut none, &mut w, &[]);
    let (grad_e, grad_w) = backward(&device, &m, (&mut none, &mut w), &[], (&[], &[]), &mut out, 1.0);
    assert_eq!((grad_e, grad_w), (vec![], vec![0.0; 3]));
    // No classes: sums of nothing.
    let (mut e, mut none) = (Rows::f32(&[1.0, 2.0, 3.0], 3), Rows::output(0, 3));
    let mut out = forward(&device, &m, &mut e, &mut none, &[-1]);
    assert_eq!((out.row_sums[0], out.target_logits[0]), (0.0, 0.0));
    assert_eq!(out.weighted.values(), [0.0; 3]);
    // Another rank has all of it.
    let (grad_e, grad_w) = backward(&device, &m, (&mut e, &mut none), &[-1], (&[2.0], &[3.0]), &mut out, 1.0);
    assert_eq!((grad_e, grad_w), (vec![0.0; 3], vec![]));
}

#[test]
fn what_cannot_be_is_refused() {
    let device = device(1);
    let m = margin();
    let (mut e, mut w, mut p) = (Rows::output(2, 3), Rows::output(4, 3), Rows::output(2, 3));
    let (e, w, p) = (e.view(), w.view(), p.view());
    let mut space = workspace(&device, 2, 3, 4);
    let (at, bytes) = (space.pointer(), space.bytes);
    let (mut sums, mut logits) = ([0f32; 2], [0f32; 2]);
    let targets = [0i64, 3];
    // SAFETY: a live device; wrong arguments are refused before memory is touched.
    unsafe {
        let mut call = |m, e, w, targets: *const i64, p, at, bytes| {
            outcome(pfc_fused_forward(device.0, m, e, w, targets, sums.as_mut_ptr(), logits.as_mut_ptr(), p, at, bytes))
        };
        assert_refused("no margin", call(null(), &e, &w, targets.as_ptr(), &p, at, bytes), &["pfc_margin"]);
        assert_refused("no embeddings", call(&m, null(), &w, targets.as_ptr(), &p, at, bytes), &["embeddings"]);
        assert_refused("no centers", call(&m, &e, null(), targets.as_ptr(), &p, at, bytes), &["centers"]);
        assert_refused("no targets", call(&m, &e, &w, null(), &p, at, bytes), &["targets"]);
        assert_refused("no weighted", call(&m, &e, &w, targets.as_ptr(), null(), at, bytes), &["weighted"]);
        assert_refused("rows", call(&m, &e, &w, targets.as_ptr(), &w, at, bytes), &["weighted.rows", "4", "2"]);
        assert_refused("no workspace", call(&m, &e, &w, targets.as_ptr(), &p, null_mut(), bytes), &["workspace"]);
        assert_refused("little workspace", call(&m, &e, &w, targets.as_ptr(), &p, at, bytes - 1), &["workspace"]);
        assert_refused("a target outside", call(&m, &e, &w, [0i64, 4].as_ptr(), &p, at, bytes), &["targets[1]", "4"]);
        assert_refused("a target outside", call(&m, &e, &w, [-2i64, 1].as_ptr(), &p, at, bytes), &["targets[0]", "-2"]);
        let grads = (e, w);
        let back = |loss_weight: f64, ge: *const _, gw: *const _| {
            let (n, z) = ([1f32; 2], [0f32; 2]);
            let t = targets.as_ptr();
            outcome(pfc_fused_backward(device.0, &m, &e, &w, t, n.as_ptr(), z.as_ptr(), &p, loss_weight, ge, gw, at, bytes))
        };
        assert_refused("no dE", back(1.0, null(), &grads.1), &["grad_embeddings"]);
        assert_refused("no dW", back(1.0, &grads.0, null()), &["grad_centers"]);
        assert_refused("rows of dE", back(1.0, &grads.1, &grads.1), &["grad_embeddings.rows", "4", "2"]);
        assert_refused("rows of dW", back(1.0, &grads.0, &grads.0), &["grad_centers.rows", "2", "4"]);
        assert_refused("weight", back(f64::NAN, &grads.0, &grads.1), &["loss_weight", "NaN"]);
        assert_refused("no size", outcome(pfc_fused_workspace(device.0, 2, 3, 4, null_mut())), &["bytes"]);
    }
    space.check();
}
