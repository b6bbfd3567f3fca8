//! What a head tells of itself: metrics, and the class centers nearest to a row.

use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc_testing::reference::{self, RankInput, Step};

use partialfc_testing::capi::{on_cuda, options, pfc_metrics, traffic_between, Comm, Device, Head, Rows};
use partialfc_testing::numbers::{assert_close, norm, widen, Random};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, batch_rows, learning_rate, train, Batch, Trace};

const IGNORED: i64 = -7;

/// A rank's batch with every fourth row ignored and every third row near its class center, so that top-1 is neither 0 nor 1.
fn batch(options: &HeadOptions, rank: usize, step: usize, centers: &[f32]) -> Batch {
    let d = options.embedding_dim as usize;
    let mut batch = Batch::draw(options, rank, step, batch_rows(options, rank, step));
    for row in 0..batch.labels.len() {
        if row % 4 == 3 {
            batch.labels[row] = IGNORED;
        } else if row % 3 == 0 {
            let center = &centers[batch.labels[row] as usize * d..][..d];
            batch.embeddings[row * d..][..d].iter_mut().zip(center).for_each(|(e, w)| *e = 0.3 * *e + 100.0 * w);
        }
    }
    batch
}

/// What the reference makes of the step over the samples that were drawn.
fn judged(head: &reference::Head, batches: &[Batch], samples: &[Vec<i64>]) -> Step {
    let embeddings: Vec<Vec<f64>> = batches.iter().map(|batch| widen(&batch.embeddings)).collect();
    let inputs: Vec<RankInput> = (0..batches.len())
        .map(|rank| RankInput { embeddings: &embeddings[rank], labels: &batches[rank].labels, sample: &samples[rank] })
        .collect();
    head.forward(&inputs).expect("a step")
}

#[test]
fn metrics_are_those_of_the_reference() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        for sample_rate in [1.0, 0.4] {
            let mut options = HeadOptions { placement, sample_rate, ignore_label: Some(IGNORED), ..options(61, 16, 14) };
            options.gradient_scale = 3.0;
            options.margin.scale = 24.0;
            let start = on_ranks(1, |place| Head::new(&Device::under_test(1), &place.comm, &options).centers()).remove(0);
            type Seen = (Vec<i64>, [[pfc_metrics; 2]; 3]);
            let both = |head: &mut Head| [head.metrics().expect("metrics"), head.last_metrics().expect("last metrics")];
            let seen: Vec<Seen> = on_ranks(3, |place| {
                let mut head = Head::new(&Device::under_test(2), &place.comm, &options);
                let batch = batch(&options, place.rank, 0, &start);
                head.forward(&mut batch.rows(16), Some(&batch.labels)).expect("forward");
                let after_forward = both(&mut head);
                head.backward(0.5, 128.0, &mut Rows::output(batch.labels.len(), 16)).expect("backward");
                let after_backward = both(&mut head);
                head.update(learning_rate(0)).expect("update");
                let after_update = both(&mut head);
                (head.sample_ids().expect("ids"), [after_forward, after_backward, after_update])
            });
            let judge = reference::Head::new(options.clone(), 3, widen(&start));
            let batches: Vec<Batch> = (0..3).map(|rank| batch(&options, rank, 0, &start)).collect();
            let samples: Vec<Vec<i64>> = seen.iter().map(|(sample, _)| sample.clone()).collect();
            let step = judged(&judge, &batches, &samples);
            assert!(step.top1 > 0.1 && step.top1 < 0.9 && step.conditioning.top1_distance > 1e-5, "a dull test: {}", step.top1);
            let rows: usize = batches.iter().map(|batch| batch.labels.len()).sum();
            let cosines: f64 = step.target_cosines.concat().iter().sum::<f64>() / step.valid_rows as f64;
            let grad_embeddings = 0.5 * 128.0 * 3.0 * norm(&step.grad_embeddings.concat());
            let sampled = if placement == Placement::Sharded { &step.grad_centers[..] } else { &step.grad_centers[..1] };
            let grad_centers = 0.5 * norm(&sampled.concat());
            for (rank, (sample, metrics)) in seen.iter().enumerate() {
                for (at, [m, last]) in metrics.iter().enumerate() {
                    let what = |field: &str| format!("{placement:?} rate {sample_rate} rank {rank} reading {at}: {field}");
                    assert_own_part(&what("own"), m, last, placement);
                    let counts = (m.rows, m.valid_rows, m.sample_size, m.draws, m.updates);
                    let expected = (rows as u64, step.valid_rows as u64, sample.len() as u64, 1, u64::from(at == 2));
                    assert_eq!(counts, expected, "{}", what("rows, valid rows, sample size, draws, updates"));
                    assert_close(&what("loss"), &[m.loss], &[step.loss], 5e-5);
                    assert_close(&what("top1"), &[m.top1], &[step.top1], 1e-6);
                    assert_close(&what("mean_target_cosine"), &[m.mean_target_cosine], &[cosines], 1e-5);
                    let expected = if at == 0 { 0.0 } else { grad_embeddings };
                    assert_close(&what("grad_embeddings_norm"), &[m.grad_embeddings_norm], &[expected], 5e-5);
                    let expected = if at < 2 { 0.0 } else { grad_centers };
                    assert_close(&what("grad_centers_norm"), &[m.grad_centers_norm], &[expected], 5e-5);
                    let seconds = [m.seconds_gather, m.seconds_sample, m.seconds_forward, m.seconds_reduce, m.seconds_backward];
                    assert!(seconds.iter().chain([&m.seconds_update]).all(|s| (0.0..3600.0).contains(s)), "{}", what("seconds"));
                }
            }
            // What each rank knows of its own comes together to what all know.
            for at in 0..3 {
                let own = |value: fn(&pfc_metrics) -> f64| seen.iter().map(|(_, m)| value(&m[at][1])).collect::<Vec<f64>>();
                let all = &seen[0].1[at][0];
                assert_close("embeddings", &[norm(&own(|m| m.grad_embeddings_norm))], &[all.grad_embeddings_norm], 1e-6);
                let parts = own(|m| m.grad_centers_norm);
                let together = if placement == Placement::Sharded { norm(&parts) } else { parts[0] };
                assert_close("centers", &[together], &[all.grad_centers_norm], 1e-6);
                if placement == Placement::Replicated {
                    let valid = |rank: usize| batches[rank].labels.iter().filter(|&&label| label != IGNORED).count() as f64;
                    let hits: f64 = own(|m| m.top1).iter().enumerate().map(|(rank, top1)| top1 * valid(rank)).sum();
                    assert_close("top1", &[hits / step.valid_rows as f64], &[all.top1], 1e-6);
                }
            }
        }
    }
}

/// What a rank knows by itself: the same where it is of all ranks or of this rank for both, and no guess elsewhere.
fn assert_own_part(what: &str, all: &pfc_metrics, own: &pfc_metrics, placement: Placement) {
    let counts = |m: &pfc_metrics| (m.rows, m.valid_rows, m.sample_size, m.draws, m.updates);
    assert_eq!(counts(own), counts(all), "{what}");
    let common = |m: &pfc_metrics| [m.loss, m.mean_target_cosine, m.seconds_forward].map(f64::to_bits);
    assert_eq!(common(own), common(all), "{what}");
    assert_eq!(own.top1.is_nan(), placement == Placement::Sharded, "{what}: top1 {}", own.top1);
    assert!(own.grad_embeddings_norm <= all.grad_embeddings_norm && own.grad_centers_norm <= all.grad_centers_norm, "{what}");
}

/// A logger on one rank does not wait for the others.
#[test]
fn one_rank_alone_reads_its_metrics() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..options(30, 4, 8) };
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let batch = Batch::draw(&options, place.rank, 0, 5);
            for updates in 1..=2 {
                head.step(&mut batch.rows(4), &batch.labels, 0.1, &mut Rows::output(5, 4)).expect("step");
                if place.rank == 0 {
                    let before = place.comm.traffic();
                    assert_eq!(head.last_metrics().expect("last metrics").updates, updates);
                    assert_eq!(traffic_between(&before, &place.comm.traffic()), [0; 4], "no message");
                }
            }
        });
        on_ranks(1, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let batch = Batch::draw(&options, 0, 0, 5);
            head.step(&mut batch.rows(4), &batch.labels, 0.1, &mut Rows::output(5, 4)).expect("step");
            let (all, own) = (head.metrics().expect("metrics"), head.last_metrics().expect("last metrics"));
            assert_eq!(format!("{:?}", values(&own)), format!("{:?}", values(&all)), "{placement:?}: one rank knows all");
        });
    }
}

fn values(m: &pfc_metrics) -> [f64; 5] {
    [m.loss, m.top1, m.mean_target_cosine, m.grad_embeddings_norm, m.grad_centers_norm]
}

/// A negative that beats the target is seen wherever it stands in a sample of many chunks and splits.
#[test]
fn top1_sees_the_nearest_negative_at_any_place() {
    const CLASSES: usize = 40_000;
    let options = HeadOptions { init_std: 0.0, ..options(CLASSES as u64, 4, 1) };
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::cpu(1), &place.comm, &options);
        let mut top1_with = |near: Option<usize>| {
            if let Some(near) = near {
                head.write_centers(near as u64, &[1.0, 0.1, 0.0, 0.0]).expect("a near center");
            }
            let target = CLASSES as i64 / 2;
            head.write_centers(target as u64, &[1.0, 0.5, 0.0, 0.0]).expect("the target's");
            head.forward(&mut Rows::f32(&[1.0, 0.0, 0.0, 0.0], 4), Some(&[target])).expect("forward");
            if let Some(near) = near {
                head.write_centers(near as u64, &[0.0; 4]).expect("a center as before");
            }
            head.metrics().expect("metrics").top1
        };
        assert_eq!(top1_with(None), 1.0);
        let spread = (0..16).map(|part| part * CLASSES / 16 + part);
        let edges = [0, 1, 63, 64, 255, 256, 257, 511, 512, 16_383, 16_384, 16_385, CLASSES - 257, CLASSES - 2, CLASSES - 1];
        for near in spread.chain(edges) {
            assert_eq!(top1_with(Some(near)), 0.0, "a nearer center at {near}");
        }
    });
}

#[test]
fn metrics_of_a_step_that_failed_are_zeros() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..options(30, 4, 8) };
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let mut grad = Rows::output(2, 4);
            let mut step = |head: &mut Head, first: f32, label| {
                let mut rows = Rows::f32(&[first, 2.0, -1.0, 0.5, 1.0, 1.0, 3.0, -2.0], 4);
                head.step(&mut rows, &[1, label], 0.1, &mut grad)
            };
            step(&mut head, 1.0, 2).expect("a step");
            assert!(head.metrics().expect("metrics").loss > 0.0);
            for (first, label) in [(f32::NAN, 2), (1.0, 99)] {
                step(&mut head, if place.rank == 1 { first } else { 1.0 }, if place.rank == 1 { label } else { 2 })
                    .expect_err("no step");
                let m = head.metrics().expect("metrics");
                let figures = [m.loss, m.top1, m.mean_target_cosine, m.grad_embeddings_norm, m.grad_centers_norm];
                assert_eq!((m.updates, m.rows, m.valid_rows, m.sample_size, figures), (1, 0, 0, 0, [0.0; 5]), "{first} {label}");
            }
            step(&mut head, 1.0, 2).expect("a step");
            assert!(head.metrics().expect("metrics").loss > 0.0);
        });
    }
}

#[test]
fn metrics_before_any_step_are_zeros() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &HeadOptions { placement, ..options(10, 4, 3) });
            let m = head.metrics().expect("metrics");
            assert_eq!((m.updates, m.draws, m.rows, m.valid_rows, m.sample_size), (0, 0, 0, 0, 0), "{placement:?}");
            let figures = [m.loss, m.top1, m.mean_target_cosine, m.grad_embeddings_norm, m.grad_centers_norm];
            assert_eq!(figures, [0.0; 5], "{placement:?}");
        });
    }
}

/// Cosines of a row with all class centers; 0 where either has no direction.
fn cosines(query: &[f32], centers: &[f32]) -> Vec<f64> {
    let query = widen(query);
    let rows = centers.chunks_exact(query.len()).map(widen);
    rows.map(|row| {
        let sizes = norm(&query) * norm(&row);
        if sizes < 1e-12 {
            0.0
        } else {
            query.iter().zip(&row).map(|(a, b)| a * b).sum::<f64>() / sizes
        }
    })
    .collect()
}

/// Checks one row's answer against all cosines.
fn check_nearest(what: &str, ids: &[i64], found: &[f32], truth: &[f64]) {
    let mut best: Vec<f64> = truth.to_vec();
    best.sort_by(|a, b| b.total_cmp(a));
    for (at, (&id, &cosine)) in ids.iter().zip(found).enumerate() {
        let what = format!("{what} place {at}: class {id} at {cosine}");
        assert!(id >= 0 && (id as usize) < truth.len(), "{what}: no such class");
        assert!(!ids[..at].contains(&id), "{what}: twice");
        assert!((f64::from(cosine) - truth[id as usize]).abs() < 2e-6, "{what}: its cosine is {}", truth[id as usize]);
        assert!(truth[id as usize] > best[at] - 2e-6, "{what}: the one to be here has {}", best[at]);
        if at > 0 {
            let before = (found[at - 1], ids[at - 1]);
            assert!(before.0 > cosine || before.0 == cosine && before.1 < id, "{what}: after class {} at {}", before.1, before.0);
        }
    }
}

#[test]
fn top_k_finds_the_nearest_class_centers() {
    const CLASSES: usize = 45;
    const DIM: usize = 6;
    let mut random = Random(9);
    let mut centers = random.normals(CLASSES * DIM, 1.0);
    // Equal rows, on the same rank and on different ones; a row without direction.
    for (to, from) in [(3, 2), (30, 2), (44, 17)] {
        centers.copy_within(from * DIM..(from + 1) * DIM, to * DIM);
    }
    centers[20 * DIM..21 * DIM].fill(0.0);
    // More rows than max_batch, and none; one that is a class center, one without direction.
    let queries: Vec<Vec<f32>> = [5, 0, 2, 1]
        .iter()
        .map(|&rows| {
            let mut query = random.normals(rows * DIM, 3.0);
            if rows > 2 {
                query[..DIM].copy_from_slice(&centers[2 * DIM..3 * DIM]);
                query[DIM..2 * DIM].fill(0.0);
            }
            query
        })
        .collect();
    for placement in [Placement::Sharded, Placement::Replicated] {
        for ranks in 1..=4 {
            let options = HeadOptions { placement, ..options(CLASSES as u64, DIM as u32, 2) };
            on_ranks(ranks, |place| {
                let mut head = Head::new(&Device::under_test(2), &place.comm, &options);
                let (first, count) = head.shard();
                head.write_centers(first, &centers[first as usize * DIM..(first + count) as usize * DIM]).expect("rows");
                let query = &queries[place.rank];
                // An emulated GPU takes its time.
                for k in (1..=CLASSES).filter(|&k| !on_cuda() || k < 4 || k == 17 || k > CLASSES - 2) {
                    let (ids, found) = head.top_k(&mut Rows::f32(query, DIM), k as u64).expect("top k");
                    for (row, query) in query.chunks_exact(DIM).enumerate() {
                        let what = format!("{placement:?} on {ranks}, rank {} row {row} k {k}", place.rank);
                        let range = row * k..(row + 1) * k;
                        check_nearest(&what, &ids[range.clone()], &found[range], &cosines(query, &centers));
                    }
                    if place.rank == 0 {
                        assert_eq!(ids[..k.min(3)], [2, 3, 30][..k.min(3)], "equal class centers come by id");
                        let none: Vec<i64> = (0..k as i64).collect();
                        assert_eq!(ids[k..2 * k], none, "a row without direction is as near to all");
                    }
                }
            });
        }
    }
}

#[test]
fn top_k_of_many_classes_is_theirs_and_the_same_every_time() {
    const CLASSES: usize = 9000;
    const DIM: usize = 3;
    let mut random = Random(10);
    let mut centers = random.normals(CLASSES * DIM, 1.0);
    // Nearest of all to the first query: equal rows far apart.
    for at in [8999, 17, 4100] {
        centers[at * DIM..(at + 1) * DIM].copy_from_slice(&[3.0, 4.0, 0.0]);
    }
    let mut query = random.normals(130 * DIM, 2.0);
    query[..DIM].copy_from_slice(&[0.3, 0.4, 0.0]);
    let mut head = Head::new(&Device::under_test(2), &Comm::solo(), &options(CLASSES as u64, DIM as u32, 2));
    head.write_centers(0, &centers).expect("rows");
    for (rows, k) in [(130, 1), (2, 100), (3, 128), (2, 129), (1, CLASSES)] {
        let mut query = Rows::f32(&query[..rows * DIM], DIM);
        let (ids, found) = head.top_k(&mut query, k as u64).expect("top k");
        for (row, query) in query.values_f32().chunks_exact(DIM).enumerate() {
            let range = row * k..(row + 1) * k;
            check_nearest(&format!("row {row} k {k}"), &ids[range.clone()], &found[range], &cosines(query, &centers));
        }
        assert_eq!(ids[..k.min(3)], [17, 4100, 8999][..k.min(3)], "equal class centers come by id");
        let again = head.top_k(&mut query, k as u64).expect("top k");
        assert_eq!(again, (ids, found), "k {k}");
    }
}

/// More than the rows are gone through for at once, on an odd number of threads.
#[test]
fn top_k_of_thousands_of_queries_is_that_of_each() {
    const CLASSES: usize = 1700;
    const DIM: usize = 3;
    let count = if on_cuda() { 40 } else { 2500 };
    let mut random = Random(11);
    let mut centers = random.normals(CLASSES * DIM, 1.0);
    let (equal, rest) = centers.split_at_mut(700 * DIM);
    rest[..300 * DIM].copy_from_slice(&equal[..300 * DIM]);
    let queries = random.normals(count * DIM, 2.0);
    for k in [1, 5] {
        let mut head = Head::new(&Device::under_test(3), &Comm::solo(), &options(CLASSES as u64, DIM as u32, 2));
        head.write_centers(0, &centers).expect("rows");
        let all = head.top_k(&mut Rows::f32(&queries, DIM), k as u64).expect("top k");
        for query in (0..count).step_by(7) {
            let one = head.top_k(&mut Rows::f32(&queries[query * DIM..(query + 1) * DIM], DIM), k as u64).expect("top k");
            let of_all = (all.0[query * k..(query + 1) * k].to_vec(), all.1[query * k..(query + 1) * k].to_vec());
            assert_eq!(of_all, one, "query {query} k {k}");
        }
    }
}

#[test]
fn top_k_sees_dense_rows_as_they_are_now_and_changes_nothing() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, sample_rate: 0.2, row_update: RowUpdate::Dense, ..options(40, 6, 8) };
        let plain = on_ranks(2, |place| train(place, &HeadOptions { row_update: RowUpdate::Lazy, ..options.clone() }, 1, 4));
        let asked = on_ranks(2, |place| {
            let options = HeadOptions { row_update: RowUpdate::Lazy, ..options.clone() };
            ask_between(place, &options)
        });
        assert_same_bits(&format!("{placement:?}"), &asked, &plain);
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let mut trace = Trace::default();
            for step in 0..4 {
                partialfc_testing::training::train_step(&mut head, place, &options, step, &mut trace);
            }
            let query = Random(1).normals(6, 1.0);
            let (ids, found) = head.top_k(&mut Rows::f32(&query, 6), 40).expect("top k");
            let (first, count) = head.shard();
            let own = head.centers();
            for (&id, &cosine) in ids.iter().zip(&found).filter(|(&id, _)| (first..first + count).contains(&(id as u64))) {
                let truth = cosines(&query, &own[(id as u64 - first) as usize * 6..][..6])[0];
                assert!((f64::from(cosine) - truth).abs() < 2e-6, "{placement:?} class {id}: {cosine}, expected {truth}");
            }
        });
    }
}

/// Training with a question after every call.
fn ask_between(place: &partialfc_testing::ranks::Rank, options: &HeadOptions) -> Trace {
    let mut head = Head::new(&Device::under_test(1), &place.comm, options);
    let mut trace = Trace::default();
    let query = Random(1).normals(6 * (1 + place.rank), 1.0);
    let ask = |head: &mut Head| drop(head.top_k(&mut Rows::f32(&query, 6), 3).expect("top k"));
    for step in 0..4 {
        let batch = Batch::draw(options, place.rank, step, batch_rows(options, place.rank, step));
        let mut grad = Rows::output(batch.labels.len(), head.dim);
        ask(&mut head);
        let loss = head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
        ask(&mut head);
        head.backward(1.0, 1.0, &mut grad).expect("backward");
        ask(&mut head);
        let sample = head.sample_ids().expect("the sample");
        head.update(learning_rate(step)).expect("update");
        trace.saw_step(loss, &grad, sample);
    }
    trace.saw_rows(&mut head, options);
    trace
}
