//! Row updates by given gradients: the arithmetic of the optimizers, down to AdamW's small epsilon.

use std::ptr::null;

use partialfc::capi::kernels::pfc_update_rows;
use partialfc::capi::types::{pfc_optimizer, pfc_optimizer_init_sized};
use partialfc::matrix::DType;

use super::{assert_refused, device, lend};
use partialfc_testing::capi::{outcome, Device, Outcome, Rows};
use partialfc_testing::numbers::Random;

fn optimizer(kind: i32) -> pfc_optimizer {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut optimizer: pfc_optimizer = std::mem::zeroed();
        outcome(pfc_optimizer_init_sized(&mut optimizer, std::mem::size_of::<pfc_optimizer>() as u64)).expect("defaults");
        optimizer.kind = kind;
        optimizer
    }
}

/// W and its state.
struct Table {
    centers: Rows,
    momentum: Rows,
    second_moment: Rows,
}

fn update(device: &Device, o: &pfc_optimizer, t: &mut Table, ids: &[i64], g: &mut Rows, lr: f64, number: u64) -> Outcome<()> {
    // SAFETY: a live device, matrices that own their memory, an id for each gradient row.
    lend(|l| unsafe {
        let (w, m, v) = (l.matrix(&mut t.centers), l.matrix(&mut t.momentum), l.matrix(&mut t.second_moment));
        let v = if o.kind == 2 { &v as *const _ } else { null() };
        outcome(pfc_update_rows(device.0, o, &w, &m, v, l.list(ids), &l.matrix(g), lr, number))
    })
}

/// One element in float64: W, m, v.
fn truth(o: &pfc_optimizer, [w, m, v]: [f64; 3], g: f64, lr: f64, number: u64) -> [f64; 3] {
    if o.kind == 1 {
        let m = o.momentum * m + g + o.weight_decay * w;
        return [w - lr * m, m, v];
    }
    let m = o.beta1 * m + (1.0 - o.beta1) * g;
    let v = o.beta2 * v + (1.0 - o.beta2) * g * g;
    let (m_hat, v_hat) = (m / (1.0 - o.beta1.powf(number as f64)), v / (1.0 - o.beta2.powf(number as f64)));
    [w * (1.0 - lr * o.weight_decay) - lr * m_hat / (v_hat.sqrt() + o.epsilon), m, v]
}

#[test]
fn rows_move_as_the_optimizers_say() {
    let device = device(2);
    let mut random = Random(6);
    for kind in [1, 2] {
        for (rows, dim, count) in [(1, 1, 1), (9, 5, 4), (40, 64, 0), (70, 33, 70), (500, 16, 333)] {
            for (decay, lr, number, dtype) in [
                (0.0, 0.1, 1, DType::F32),
                (5e-4, 0.1, 2, DType::F16),
                (0.1, 1e-3, 1000, DType::Bf16),
                (0.1, 0.0, 10_000_000, DType::F32),
            ] {
                let mut o = optimizer(kind);
                o.weight_decay = decay;
                let normals = |random: &mut Random, n: usize, size: f64| (0..n).map(|_| size * random.normal()).collect::<Vec<_>>();
                let w = normals(&mut random, rows * dim, 0.1);
                let m = normals(&mut random, rows * dim, 1e-2);
                // sqrt(v) is about |m|, so that the update is about the learning rate.
                let v: Vec<f64> = m.iter().map(|m| m * m * 4.0 + 1e-12).collect();
                let mut table = Table {
                    centers: Rows::new(&w, dim, DType::F32, 1),
                    momentum: Rows::new(&m, dim, DType::F32, 0),
                    second_moment: Rows::new(&v, dim, DType::F32, 2),
                };
                let mut ids: Vec<i64> = (0..rows as i64).collect();
                for i in 0..rows {
                    ids.swap(i, random.below(rows)); // in any order, without repeats
                }
                ids.truncate(count);
                let mut g = Rows::new(&normals(&mut random, count * dim, 1e-2), dim, dtype, 3);
                let before = [table.centers.values(), table.momentum.values(), table.second_moment.values()];
                update(&device, &o, &mut table, &ids, &mut g, lr, number).expect("an update");
                let after = [table.centers.values(), table.momentum.values(), table.second_moment.values()];
                let what = format!("kind {kind} {rows} x {dim}, {count} rows, decay {decay} lr {lr} update {number} {dtype:?}");
                let gradients = g.values();
                for row in 0..rows {
                    let at = ids.iter().position(|&id| id == row as i64);
                    for k in 0..dim {
                        let element = |tensors: &[Vec<f64>; 3]| [0, 1, 2].map(|t| tensors[t][row * dim + k]);
                        let (was, is) = (element(&before), element(&after));
                        let Some(at) = at else {
                            assert_eq!(is, was, "{what}: row {row} has no gradient");
                            continue;
                        };
                        let grad = gradients[at * dim + k];
                        let expected = truth(&o, was, grad, lr, number);
                        let terms = [
                            was[0].abs() + (expected[0] - was[0]).abs(),
                            was[1].abs() + grad.abs() + (decay * was[0]).abs(),
                            was[2] + grad * grad,
                        ];
                        for t in 0..3 {
                            let off = (is[t] - expected[t]).abs();
                            let allowed = 4e-7 * terms[t];
                            assert!(off <= allowed, "{what}: tensor {t} ({row}, {k}) is {:e}, expected {:e}", is[t], expected[t]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_first_adamw_update_is_the_learning_rate_by_sign() {
    let device = device(1);
    let mut table =
        Table { centers: Rows::f32(&[1.0; 4], 4), momentum: Rows::f32(&[0.0; 4], 4), second_moment: Rows::f32(&[0.0; 4], 4) };
    let mut o = optimizer(2);
    o.weight_decay = 0.0;
    // From the smallest gradient whose square is a float32 to a large one; the last is lost beside epsilon.
    let mut g = Rows::f32(&[1e-4, -3.0, 1e10, 1e-16], 4);
    update(&device, &o, &mut table, &[0], &mut g, 0.25, 1).expect("an update");
    let w = table.centers.values();
    assert!((w[0] - 0.75).abs() < 1e-4 && (w[1] - 1.25).abs() < 1e-6 && (w[2] - 0.75).abs() < 1e-6 && w[3] == 1.0, "{w:?}");
}

#[test]
fn what_cannot_be_is_refused_and_nothing_moves() {
    let device = device(1);
    let table = || Table { centers: Rows::output(3, 2), momentum: Rows::output(3, 2), second_moment: Rows::output(3, 2) };
    let mut t = table();
    let mut g = Rows::output(2, 2);
    let sgd = optimizer(1);
    let try_ids = |t: &mut Table, ids: &[i64]| update(&device, &sgd, t, ids, &mut Rows::output(2, 2), 0.1, 1);
    assert_refused("id beyond", try_ids(&mut t, &[0, 3]), &["ids[1]", "3"]);
    assert_refused("id below", try_ids(&mut t, &[-1, 0]), &["ids[0]", "-1"]);
    assert_refused("rate", update(&device, &sgd, &mut t, &[0, 1], &mut g, f64::NAN, 1), &["learning_rate", "NaN"]);
    assert_refused("rate", update(&device, &sgd, &mut t, &[0, 1], &mut g, -1.0, 1), &["learning_rate", "-1"]);
    let none = |t: &mut Table, rate| update(&device, &sgd, t, &[], &mut Rows::output(0, 2), rate, 1);
    assert_refused("rate for no rows", none(&mut t, f64::NAN), &["learning_rate", "NaN"]);
    none(&mut t, 0.1).expect("no rows");
    let adamw = optimizer(2);
    assert_refused("update 0", update(&device, &adamw, &mut t, &[0, 1], &mut g, 0.1, 0), &["update", "0"]);
    let mut bad = optimizer(1);
    bad.momentum = 1.0;
    assert_refused("momentum", update(&device, &bad, &mut t, &[0, 1], &mut g, 0.1, 1), &["momentum", "1"]);
    assert_refused("kind", update(&device, &optimizer(3), &mut t, &[0, 1], &mut g, 0.1, 1), &["optimizer", "3"]);
    let (w, m) = (t.centers.view(), t.momentum.view());
    let mut half = Rows::new(&[0.0; 6], 2, DType::F16, 0);
    // SAFETY: a live device; wrong arguments are refused before memory is touched.
    unsafe {
        let call = |w: *const _, m: *const _, v: *const _, ids: *const i64, g: *const _| {
            outcome(pfc_update_rows(device.0, &adamw, w, m, v, ids, g, 0.1, 1))
        };
        let (ids, g) = ([0i64, 1], g.view());
        assert_refused("no centers", call(null(), &m, &m, ids.as_ptr(), &g), &["centers"]);
        assert_refused("no momentum", call(&w, null(), &m, ids.as_ptr(), &g), &["momentum"]);
        assert_refused("no second moment", call(&w, &m, null(), ids.as_ptr(), &g), &["second_moment"]);
        assert_refused("no ids", call(&w, &m, &m, null(), &g), &["ids"]);
        assert_refused("no gradients", call(&w, &m, &m, ids.as_ptr(), null()), &["gradients"]);
        assert_refused("f16 centers", call(&half.view(), &m, &m, ids.as_ptr(), &g), &["centers", "f16"]);
        assert_refused("rows", call(&w, &g, &m, ids.as_ptr(), &g), &["momentum.rows", "2", "3"]);
    }
    assert_eq!((t.centers.values(), t.momentum.values()), (table().centers.values(), table().momentum.values()));
}

#[test]
fn what_is_no_number_stays_in_its_element() {
    let device = device(1);
    for kind in [1, 2] {
        let ones = || Rows::f32(&[1.0; 6], 3);
        let mut table = Table { centers: ones(), momentum: ones(), second_moment: ones() };
        let mut gradient = Rows::f32(&[0.5, f32::NAN, f32::INFINITY], 3);
        update(&device, &optimizer(kind), &mut table, &[1], &mut gradient, 0.1, 1).expect("an update");
        for tensor in [&table.centers, &table.momentum] {
            let found = tensor.values();
            assert!(found[..4].iter().all(|x| x.is_finite()), "{kind}: {found:?}");
            assert!(found[4].is_nan() && !found[5].is_finite(), "{kind}: {found:?}");
        }
    }
    let ones = |first| Rows::f32(&[first, 1.0, 1.0], 3);
    let mut table = Table { centers: ones(1.0), momentum: ones(1.0), second_moment: ones(-1.0) };
    update(&device, &optimizer(2), &mut table, &[0], &mut ones(0.0), 0.1, 1).expect("an update");
    let found = table.centers.values();
    assert!(found[0].is_nan() && found[1..].iter().all(|x| x.is_finite()), "a second moment below zero: {found:?}");
}
