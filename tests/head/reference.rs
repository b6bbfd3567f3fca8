//! The float64 reference head against finite differences of its own loss, and against the PyTorch implementation's vectors.

use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::DType;
use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use partialfc::Status;
use partialfc_testing::numbers::{assert_close, relative_l2, widen, Random};
use partialfc_testing::reference::{target, Head, RankInput, RowTerms, Step};
use partialfc_testing::vectors::{Vectors, NAMES};

const MARGIN: Margin =
    Margin { scale: 16.0, m1: 1.0, m2: 0.5, m3: 0.0, interclass_filter: 0.0, gradient: MarginGradient::Exact, guard: false };

fn options(margin: Margin, placement: Placement) -> HeadOptions {
    HeadOptions {
        num_classes: 11,
        embedding_dim: 5,
        placement,
        sample_rate: 1.0,
        seed: 0,
        max_batch: 4,
        margin,
        row_update: RowUpdate::Lazy,
        optimizer: Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-4 }),
        gradient_scale: 1.0,
        init_std: 0.01,
        ignore_label: Some(-1),
        precision: Precision::Auto,
        gather_dtype: None,
        row_terms: false,
        sample_block: 1,
        residency: Residency::Device,
        weight_dtype: DType::F32,
        state_dtype: DType::F32,
        workspace_limit: 0,
    }
}

/// A rank's step that owns its data.
#[derive(Clone, Debug)]
struct Owned {
    embeddings: Vec<f64>,
    labels: Vec<i64>,
    sample: Vec<i64>,
}

fn forward(head: &Head, owned: &[Owned]) -> Step {
    let inputs: Vec<RankInput> =
        owned.iter().map(|o| RankInput { embeddings: &o.embeddings, labels: &o.labels, sample: &o.sample }).collect();
    head.forward(&inputs).expect("a valid step")
}

/// Three ranks, eleven classes, rows near and far from their targets, one ignored; most classes in the sample.
fn problem(margin: Margin, placement: Placement, seed: u64) -> (Head, Vec<Owned>) {
    let mut random = Random(seed);
    let options = options(margin, placement);
    let (classes, d, ranks) = (11, 5, 3);
    let head = Head::new(options, ranks, widen(&random.normals(classes * d, 0.7)));
    let batches = [4usize, 1, 3];
    let mut owned: Vec<Owned> = batches
        .iter()
        .map(|&batch| {
            let mut labels = random.labels(batch, classes);
            let mut embeddings = widen(&random.normals(batch * d, 1.0));
            // The first row leans towards its class center, as in training that has got somewhere; the third is left out.
            let center = &head.centers[labels[0] as usize * d..][..d];
            embeddings[..d].iter_mut().zip(center).for_each(|(e, w)| *e = 0.4 * *e + 2.0 * w);
            if batch > 2 {
                labels[2] = -1;
                embeddings[2 * d] = f64::NAN;
            }
            Owned { embeddings, labels, sample: Vec::new() }
        })
        .collect();
    let positives: Vec<i64> = owned.iter().flat_map(|o| o.labels.clone()).collect();
    let kept: Vec<bool> = (0..classes).map(|c| random.unit() < 0.7 || positives.contains(&(c as i64))).collect();
    for (rank, o) in owned.iter_mut().enumerate() {
        o.sample = head.shard(rank).filter(|&c| kept[c]).map(|c| c as i64).collect();
    }
    (head, owned)
}

/// Central difference of the loss by one number.
fn slope(step: f64, mut loss: impl FnMut(f64) -> f64) -> f64 {
    (loss(step) - loss(-step)) / (2.0 * step)
}

#[test]
fn gradients_are_the_finite_differences_of_the_loss() {
    let margins = [
        MARGIN,
        Margin { scale: 64.0, ..MARGIN },
        Margin { scale: 1e-3, ..MARGIN },
        Margin { scale: 100.0, m2: 0.0, m3: 0.4, ..MARGIN },
        Margin { m1: 1.35, m2: 0.0, ..MARGIN },
        Margin { m1: 1.2, m2: 0.3, m3: 0.2, ..MARGIN },
        Margin { m1: 4.0, m2: 0.1, m3: 0.1, ..MARGIN },
        Margin { guard: true, m2: 1.7, ..MARGIN },
        Margin { guard: true, m1: 2.0, m2: 0.9, m3: 0.1, ..MARGIN },
        Margin { interclass_filter: 0.2, ..MARGIN },
    ];
    // The difference of two losses of about 1 is good to 1e-16 / h; the smallest slopes, at scale 1e-3, are about 1e-5.
    let h = 1e-5;
    for margin in margins {
        for placement in [Placement::Sharded, Placement::Replicated] {
            for seed in 0..4 {
                let (head, owned) = problem(margin, placement, seed);
                let step = forward(&head, &owned);
                let near = &step.conditioning;
                if near.filter_distance < 1e-3 || near.guard_distance < 1e-3 {
                    continue; // the loss jumps there
                }
                let what = format!("{margin:?} {placement:?} seed {seed}");
                let mut differences = Vec::new();
                for (rank, own) in owned.iter().enumerate() {
                    differences.extend((0..own.embeddings.len()).map(|at| {
                        slope(h, |by| {
                            let mut moved = owned.clone();
                            moved[rank].embeddings[at] += by;
                            forward(&head, &moved).loss
                        })
                    }));
                }
                assert_close(&format!("{what}: dE"), &step.grad_embeddings.concat(), &differences, 3e-6);
                let samples: Vec<(&i64, &[f64])> = (0..owned.len())
                    .flat_map(|rank| owned[rank].sample.iter().zip(step.grad_centers[rank].chunks_exact(5)))
                    .collect();
                let (mut found, mut differences) = (Vec::new(), Vec::new());
                for (&class, gradient) in samples {
                    found.extend_from_slice(gradient);
                    differences.extend((0..5).map(|k| {
                        slope(h, |by| {
                            let mut moved = head.clone();
                            moved.centers[class as usize * 5 + k] += by;
                            forward(&moved, &owned).loss
                        })
                    }));
                }
                assert_close(&format!("{what}: dW"), &found, &differences, 3e-6);
            }
        }
    }
}

/// Of the margins and the weights of rows; and with them all other gradients still are what they should be.
#[test]
fn gradients_of_row_terms_are_finite_differences() {
    let margins = [
        MARGIN,
        Margin { scale: 64.0, m1: 1.2, ..MARGIN },
        Margin { guard: true, m2: 1.7, ..MARGIN },
        Margin { guard: true, m1: 2.0, m2: 0.9, ..MARGIN },
        // The formula's, where the embeddings' gradient is not.
        Margin { gradient: MarginGradient::StraightThrough, ..MARGIN },
    ];
    let h = 1e-5;
    for margin in margins {
        for seed in 0..4 {
            let (head, owned) = problem(margin, Placement::Sharded, seed);
            let mut random = Random(seed + 5);
            let terms: Vec<RowTerms> = owned
                .iter()
                .map(|own| {
                    let mut draw = |from: f64, to: f64| own.labels.iter().map(|_| random.between(from, to)).collect::<Vec<f64>>();
                    RowTerms { m2: draw(0.5 * margin.m2, margin.m2 + 0.3), m3: draw(0.0, 0.5), weight: draw(0.0, 2.0) }
                })
                .collect();
            let at = |owned: &[Owned], terms: &[RowTerms]| {
                let inputs: Vec<RankInput> =
                    owned.iter().map(|o| RankInput { embeddings: &o.embeddings, labels: &o.labels, sample: &o.sample }).collect();
                head.forward_with(&inputs, terms).expect("a valid step")
            };
            let step = at(&owned, &terms);
            if step.conditioning.guard_distance < 1e-3 {
                continue;
            }
            let what = format!("{margin:?} seed {seed}");
            type Pick = fn(&mut RowTerms) -> &mut Vec<f64>;
            let by = |pick: Pick| {
                let mut slopes = Vec::new();
                for rank in 0..owned.len() {
                    for row in 0..owned[rank].labels.len() {
                        slopes.push(slope(h, |by| {
                            let mut moved = terms.clone();
                            pick(&mut moved[rank])[row] += by;
                            at(&owned, &moved).loss
                        }));
                    }
                }
                slopes
            };
            assert_close(&format!("{what}: dm2"), &step.grad_m2.concat(), &by(|terms| &mut terms.m2), 3e-6);
            assert_close(&format!("{what}: dm3"), &step.grad_m3.concat(), &by(|terms| &mut terms.m3), 3e-6);
            // The loss is linear in the weights.
            let weighted: f64 = by(|terms| &mut terms.weight)
                .iter()
                .zip(terms.iter().flat_map(|terms| &terms.weight))
                .map(|(slope, weight)| slope * weight)
                .sum();
            assert_close(&format!("{what}: weights"), &[weighted], &[step.loss], 1e-6);
            if margin.gradient == MarginGradient::StraightThrough {
                continue;
            }
            let differences: Vec<f64> = (0..owned[0].embeddings.len())
                .map(|number| {
                    slope(h, |by| {
                        let mut moved = owned.clone();
                        moved[0].embeddings[number] += by;
                        at(&moved, &terms).loss
                    })
                })
                .collect();
            assert_close(&format!("{what}: dE"), &step.grad_embeddings[0], &differences, 3e-6);
        }
    }
}

#[test]
fn a_planted_fault_is_further_off_than_the_finite_differences_allow() {
    // The test above can fail: the straight-through gradient is not the derivative of the loss.
    let (head, owned) = problem(Margin { gradient: MarginGradient::StraightThrough, ..MARGIN }, Placement::Sharded, 0);
    let step = forward(&head, &owned);
    let difference = slope(1e-5, |by| {
        let mut moved = owned.clone();
        moved[0].embeddings[0] += by;
        forward(&head, &moved).loss
    });
    assert!(
        (step.grad_embeddings[0][0] - difference).abs() > 1e-4 * difference.abs(),
        "{} {difference}",
        step.grad_embeddings[0][0]
    );
}

#[test]
fn sharded_and_replicated_give_the_same_step() {
    for seed in 0..8 {
        let (head, mut owned) = problem(Margin { interclass_filter: 0.3, ..MARGIN }, Placement::Sharded, seed);
        let sharded = forward(&head, &owned);
        let union: Vec<i64> = owned.iter().flat_map(|o| o.sample.clone()).collect();
        owned.iter_mut().for_each(|o| o.sample = union.clone());
        let replicated = Head::new(options(Margin { interclass_filter: 0.3, ..MARGIN }, Placement::Replicated), 3, head.centers);
        let whole = forward(&replicated, &owned);
        assert_close("loss", &[whole.loss], &[sharded.loss], 1e-14);
        assert_close("dE", &whole.grad_embeddings.concat(), &sharded.grad_embeddings.concat(), 1e-14);
        assert_close("dW", &whole.grad_centers[1], &sharded.grad_centers.concat(), 1e-14);
    }
}

#[test]
fn the_guard_keeps_the_target_logit_falling() {
    for (m1, m2) in [(1.0, 0.5), (1.0, 1.2), (1.0, 2.3), (1.0, 2.4), (1.0, 3.0), (1.35, 0.3), (2.0, 0.0), (3.0, 0.5)] {
        let margin = Margin { m1, m2, guard: true, ..MARGIN };
        let psis: Vec<f64> = (0..=1000).map(|i| target(&margin, std::f64::consts::PI * f64::from(i) / 1000.0).psi).collect();
        if let Some(at) = psis.windows(2).position(|pair| pair[1] > pair[0]) {
            panic!("m1 {m1} m2 {m2}: psi rises from {} to {} at theta {} / 1000 pi", psis[at], psis[at + 1], at);
        }
        let unguarded = target(&Margin { guard: false, ..margin }, std::f64::consts::PI).psi;
        assert!(psis[1000] < unguarded, "m1 {m1} m2 {m2}: the guard changes nothing at pi: {} {unguarded}", psis[1000]);
    }
}

#[test]
fn edges_have_the_values_the_semantics_name() {
    let one = |embeddings: Vec<f64>, labels: Vec<i64>, sample: Vec<i64>| Owned { embeddings, labels, sample };
    let mut head = Head::new(options(MARGIN, Placement::Sharded), 1, vec![0.1; 55]);
    for (class, row) in head.centers.chunks_exact_mut(5).enumerate() {
        row[class % 5] = 1.0 + class as f64;
    }
    // Only the target in the sample: loss 0, gradients 0.
    let alone = forward(&head, &[one(vec![1.0, 2.0, 3.0, 4.0, 5.0], vec![3], vec![3])]);
    assert_eq!((alone.loss, alone.valid_rows), (0.0, 1));
    assert_eq!(alone.grad_embeddings[0], [0.0; 5]);
    assert_eq!(alone.grad_centers[0], [0.0; 5]);
    // No valid row: loss 0, gradients 0, NaN or not.
    let ignored = forward(&head, &[one(vec![f64::NAN; 5], vec![-1], vec![0, 1])]);
    assert_eq!((ignored.loss, ignored.valid_rows), (0.0, 0));
    assert_eq!(ignored.grad_embeddings[0], [0.0; 5]);
    assert_eq!(ignored.grad_centers[0], [0.0; 10]);
    // No row at all.
    let empty = forward(&head, &[one(vec![], vec![], vec![0, 1])]);
    assert_eq!((empty.loss, empty.valid_rows), (0.0, 0));
    // A zero row: cosine 0 with all, so loss = log(2 exp(0) + exp(z)) - z with z = scale * cos(pi/2 + m2).
    let zero = forward(&head, &[one(vec![0.0; 5], vec![1], vec![0, 1, 2])]);
    let z = 16.0 * (std::f64::consts::PI / 2.0 + 0.5).cos();
    assert_close("loss of a zero row", &[zero.loss], &[(2.0 + z.exp()).ln() - z], 1e-14);
    assert_eq!(zero.grad_embeddings[0], [0.0; 5]);
    assert_eq!(zero.grad_centers[0], [0.0; 15]);
    // Theta 0: the slope is bounded, the gradient finite.
    let aligned = forward(&head, &[one(head.centers[..5].to_vec(), vec![0], vec![0, 1])]);
    assert!(aligned.loss.is_finite() && aligned.grad_embeddings[0].iter().all(|g| g.is_finite()), "{aligned:?}");
    assert_eq!(target(&MARGIN, 0.0).slope, 0.5f64.sin() / 1e-4);
}

#[test]
fn bad_inputs_get_the_statuses_a_head_gives() {
    let (head, owned) = problem(MARGIN, Placement::Sharded, 1);
    let status = |change: &dyn Fn(&mut Vec<Owned>)| {
        let mut owned = owned.clone();
        change(&mut owned);
        let inputs: Vec<RankInput> =
            owned.iter().map(|o| RankInput { embeddings: &o.embeddings, labels: &o.labels, sample: &o.sample }).collect();
        head.forward(&inputs).map(|step| step.loss).map_err(|error| error.status)
    };
    assert!(status(&|_| ()).is_ok());
    assert_eq!(status(&|o| o[1].labels[0] = 11), Err(Status::Label));
    assert_eq!(status(&|o| o[1].labels[0] = -2), Err(Status::Label));
    assert_eq!(status(&|o| o[2].embeddings[1] = f64::INFINITY), Err(Status::NotFinite));
    assert_eq!(status(&|o| o[0].sample.reverse()), Err(Status::InvalidArgument));
    assert_eq!(status(&|o| o[0].sample = o[1].sample.clone()), Err(Status::InvalidArgument));
    let positive = owned[0].labels[0];
    assert_eq!(status(&|o| o.iter_mut().for_each(|o| o.sample.retain(|&id| id != positive))), Err(Status::InvalidArgument));
}

#[test]
fn conformance_vectors() {
    for name in NAMES {
        let vectors = Vectors::load(name);
        let mut head = Head::new(vectors.options(), vectors.ranks(), widen(&vectors.all_rows("weight_initial")));
        for k in 0..vectors.steps() {
            let ranks: Vec<_> = (0..vectors.ranks()).map(|rank| vectors.step(rank, k)).collect();
            let embeddings: Vec<_> = ranks.iter().map(|r| widen(&r.embeddings)).collect();
            let inputs: Vec<_> = ranks
                .iter()
                .zip(&embeddings)
                .map(|(r, embeddings)| RankInput { embeddings, labels: &r.labels, sample: &r.sample })
                .collect();
            let step = head.forward(&inputs).unwrap_or_else(|e| panic!("{name} step {k}: {e}"));
            for (rank, expected) in ranks.iter().enumerate() {
                let what = |tensor: &str| format!("{name} step {k} rank {rank} {tensor}");
                assert_close(&what("loss"), &[step.loss], &[expected.loss], 5e-7);
                assert_close(&what("embedding_grad"), &step.grad_embeddings[rank], &widen(&expected.embedding_grad), 6e-6);
                assert_close(&what("center_grad"), &step.grad_centers[rank], &widen(&expected.center_grad), 6e-6);
            }
            head.update(&step, 1.0, vectors.number("lr"));
        }
        for (tensor, values) in [("weight_final", &head.centers), ("momentum_final", &head.momentum)] {
            assert_close(&format!("{name} {tensor}"), values, &widen(&vectors.all_rows(tensor)), 6e-6);
        }
        if vectors.text("opt") == "adamw" {
            let expected = widen(&vectors.all_rows("second_moment_final"));
            assert_close(&format!("{name} second_moment_final"), &head.second_moment, &expected, 6e-6);
        }
    }
}

#[test]
fn relative_l2_sees_nan_and_size() {
    assert!(relative_l2(&[f64::NAN], &[1.0]).is_nan());
    assert!((relative_l2(&[1.1, 0.0], &[1.0, 0.0]) - 0.1).abs() < 1e-12);
    assert!(std::panic::catch_unwind(|| assert_close("nan", &[f64::NAN, 1.0], &[1.0, 1.0], 1.0)).is_err());
}
