//! Where float32 could lose what float64 has: negatives that are all far away, targets at small angles, rows left alone for long.

use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc_testing::capi::{on_cuda, options, Comm, Device, Head, Rows};
use partialfc_testing::numbers::{distance, norm, widen, Random};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::reference::{self, RankInput};

/// Gradients come out of one update: as momentum, of which there was none.
const PLAIN: Optimizer = Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0 });

/// One step of one rank, and the float64 head's.
struct Compared {
    loss: [f64; 2],
    grad_embeddings: [Vec<f64>; 2],
    grad_centers: [Vec<f64>; 2],
}

fn compare(options: &HeadOptions, centers: &[f32], embeddings: &[f32], labels: &[i64]) -> Compared {
    let dim = options.embedding_dim as usize;
    let comm = Comm::solo();
    let mut head = Head::new(&Device::under_test(1), &comm, options);
    head.write_centers(0, centers).expect("start values");
    let mut grad = Rows::output(labels.len(), dim);
    let loss = head.step(&mut Rows::f32(embeddings, dim), labels, 0.1, &mut grad).expect("a step");
    let sample: Vec<i64> = (0..options.num_classes as i64).collect();
    let judge = reference::Head::new(options.clone(), 1, widen(centers));
    let step = judge.forward(&[RankInput { embeddings: &widen(embeddings), labels, sample: &sample }]).expect("a step");
    Compared {
        loss: [loss, step.loss],
        grad_embeddings: [grad.values(), step.grad_embeddings[0].clone()],
        grad_centers: [widen(&head.momentum()), step.grad_centers[0].clone()],
    }
}

/// Of the rows' errors the largest, relative to the row.
fn largest_error([found, truth]: &[Vec<f64>; 2], dim: usize) -> f64 {
    let rows = found.chunks_exact(dim).zip(truth.chunks_exact(dim));
    rows.map(|(found, truth)| distance(found, truth) / norm(truth).max(1e-30)).fold(0.0, f64::max)
}

#[test]
fn a_row_far_from_all_negatives_has_its_loss_and_its_gradient() {
    // All classes on one side, the row on the other: the loss is that of the nearest, and large.
    let centers = [-1.0f32, 0.1, -1.0, 1.2, -1.0, -1.3];
    for scale in [64.0, 75.0, 76.0, 90.0, 96.0, 128.0] {
        for placement in [Placement::Sharded, Placement::Replicated] {
            let mut options = HeadOptions { placement, optimizer: PLAIN, ..options(3, 2, 2) };
            (options.margin.scale, options.margin.m2, options.margin.m3) = (scale, 0.0, 0.35);
            let compared = compare(&options, &centers, &[1.0, 0.05, 1.0, -0.3], &[0, 2]);
            let [loss, truth] = compared.loss;
            assert!((loss - truth).abs() <= 1e-6 * truth, "{scale} {placement:?}: loss {loss}, expected {truth}");
            for (what, gradients) in [("dE", &compared.grad_embeddings), ("dW", &compared.grad_centers)] {
                let error = largest_error(gradients, 2);
                assert!(error <= 2e-5, "{scale} {placement:?} {what}: {error:e}: {gradients:?}");
            }
        }
    }
}

/// Perfectly separated rows have next to no loss, and training goes on.
#[test]
fn separated_rows_go_on_training() {
    for (classes, ranks, scale, sample_rate) in [(2, 1, 96.0, 1.0), (2, 2, 128.0, 1.0), (3, 1, 128.0, 0.0), (3, 3, 128.0, 1.0)] {
        for workspace_limit in [0, partialfc_testing::capi::LEAST] {
            let mut options = options(classes, 16, 6);
            options.margin.scale = scale;
            (options.sample_rate, options.workspace_limit) = (sample_rate, workspace_limit);
            let steps = if on_cuda() { 4 } else { 40 };
            on_ranks(ranks, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let ways = Random(7).normals(16 * classes as usize, 1.0);
                let (first, count) = head.shard();
                head.write_centers(first, &ways[16 * first as usize..16 * (first + count) as usize]).expect("start values");
                let labels: Vec<i64> = (0..6).map(|row| row % classes as i64).collect();
                // Each row right away from the other classes.
                let rows: Vec<f32> = labels
                    .iter()
                    .flat_map(|&y| (0..16).map(move |k| (y, k)))
                    .map(|(y, k)| {
                        let others = (0..classes as usize).filter(|&class| class != y as usize);
                        ways[16 * y as usize + k] - others.map(|class| 3.0 * ways[16 * class + k]).sum::<f32>()
                    })
                    .collect();
                for step in 0..steps {
                    let mut grad = Rows::output(6, 16);
                    let loss = head.step(&mut Rows::f32(&rows, 16), &labels, 0.1, &mut grad);
                    let loss = loss.unwrap_or_else(|failure| panic!("{classes} classes, scale {scale}, step {step}: {failure:?}"));
                    assert!(loss.is_finite() && grad.values().iter().all(|g| g.is_finite()));
                    assert!(step + 1 < steps || on_cuda() || loss < 1e-3, "loss {loss}");
                }
            });
        }
    }
}

/// With the exact margin the target's pull grows as 1 / theta while its part across the row shrinks.
#[test]
fn targets_at_small_angles_keep_their_gradients_digits() {
    let (classes, dim) = (30, 70);
    let pi = std::f64::consts::PI;
    let thetas = [1e-1, 3e-2, 1e-2, 1e-3, 3e-4, 1e-4, 1e-5, pi - 1e-1, pi - 1e-3];
    for placement in [Placement::Sharded, Placement::Replicated] {
        for row_update in [RowUpdate::Lazy, RowUpdate::Dense] {
            let batch = thetas.len();
            let mut options = HeadOptions { placement, row_update, optimizer: PLAIN, ..options(classes, dim, batch as u64) };
            options.margin.scale = 10.0;
            let (classes, dim) = (classes as usize, dim as usize);
            let mut random = Random(5);
            let centers = random.normals(classes * dim, 1.0);
            let embeddings: Vec<f32> = thetas
                .iter()
                .enumerate()
                .flat_map(|(row, theta)| {
                    let w = widen(&centers[row * dim..(row + 1) * dim]);
                    let noise: Vec<f64> = (0..dim).map(|_| random.normal()).collect();
                    let along = w.iter().zip(&noise).map(|(w, n)| w * n).sum::<f64>() / norm(&w).powi(2);
                    let across: Vec<f64> = noise.iter().zip(&w).map(|(n, w)| n - along * w).collect();
                    let (c, s) = (20.0 * theta.cos() / norm(&w), 20.0 * theta.sin() / norm(&across));
                    w.iter().zip(&across).map(|(w, a)| (c * w + s * a) as f32).collect::<Vec<_>>()
                })
                .collect();
            let labels: Vec<i64> = (0..batch as i64).collect();
            let compared = compare(&options, &centers, &embeddings, &labels);
            for (what, gradients) in [("dE", &compared.grad_embeddings), ("dW", &compared.grad_centers)] {
                let error = largest_error(gradients, dim);
                assert!(error <= 6e-6, "{placement:?} {row_update:?} {what}: {error:e}");
            }
        }
    }
}

/// At theta 0 and pi nothing pulls: only what the negatives give is left.
#[test]
fn a_row_on_its_class_center_is_not_pulled() {
    let mut options = HeadOptions { optimizer: PLAIN, ..options(2, 3, 2) };
    options.margin.scale = 32.0;
    let centers = [1.0f32, 2.0, -0.5, 0.3, -1.0, 0.7];
    let compared = compare(&options, &centers, &[2.0, 4.0, -1.0, -0.25, -0.5, 0.125], &[0, 0]);
    let sizes: Vec<f64> = compared.grad_embeddings[1].chunks_exact(3).map(norm).collect();
    for (found, truth) in compared.grad_embeddings[0].chunks_exact(3).zip(compared.grad_embeddings[1].chunks_exact(3)) {
        assert!(distance(found, truth) <= 1e-5 * sizes[0].max(sizes[1]), "{found:?}, expected {truth:?}");
    }
}

/// Rows that decay for thousands of updates, past where a head forgets its history, have the digits of a float32 to the end.
#[test]
fn dense_rows_left_alone_keep_their_digits() {
    let (classes, dim, updates) = (12, 4, if on_cuda() { 40 } else { 17_000 });
    let sgd = Sgd { momentum: 0.9, weight_decay: 0.01 };
    let mut options = options(classes, dim, 2);
    options.optimizer = Optimizer::Sgd(sgd);
    (options.row_update, options.sample_rate) = (RowUpdate::Dense, 0.0);
    let comm = Comm::solo();
    let mut head = Head::new(&Device::under_test(1), &comm, &options);
    let mut random = Random(3);
    let count = (classes * u64::from(dim)) as usize;
    let (start, momentum) = (random.normals(count, 1.0), random.normals(count, 0.1));
    head.write_centers(0, &start).expect("start values");
    head.write_state(partialfc::capi::head::PFC_STATE_MOMENTUM, 0, &momentum).expect("start values");
    let mut embeddings = Rows::f32(&random.normals(2 * dim as usize, 1.0), dim as usize);
    let (mut w, mut m) = (widen(&start), widen(&momentum));
    for update in 1..=updates {
        let lr = 0.02 * (f64::from(update) / 100.0).min(1.0);
        // Classes 2 and 3 every thousand updates, 4 and more never.
        let labels = if update % 1000 == 0 { [2, 3] } else { [0, 1] };
        head.step(&mut embeddings, &labels, lr, &mut Rows::output(2, dim as usize)).expect("a step");
        for (w, m) in w.iter_mut().zip(&mut m) {
            *m = sgd.momentum * *m + sgd.weight_decay * *w;
            *w -= lr * *m;
        }
        if [20, 40, 1000, 1030, 1500, 5000, 9000, 11_000, 13_000, 16_383, 16_385, 17_000].contains(&update) {
            let (found, from) = (head.centers(), 4 * dim as usize);
            let error = distance(&widen(&found[from..]), &w[from..]) / norm(&w[from..]);
            assert!(error <= 1e-5, "update {update}: {error:e} of {:e}", norm(&w[from..]));
        }
    }
}
