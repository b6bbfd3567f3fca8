//! The draw: all positives, then negatives uniformly without replacement; a pure function of seed and step.

use std::collections::BTreeSet;

use partialfc::options::{HeadOptions, Placement};
use partialfc::sample::{draw, sample_size, Draw};

use partialfc_testing::capi::{options, outcome, Device, Head, Rows};
use partialfc_testing::numbers::Random;
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, Batch, Trace};

const STEPS: usize = 400;

/// Each rank's samples of `STEPS` steps with `rows` rows a rank; labels as `Batch::draw` has them.
fn samples(options: &HeadOptions, ranks: usize, rows: usize) -> Vec<Vec<Vec<i64>>> {
    samples_of(STEPS, options, ranks, rows)
}

fn samples_of(steps: usize, options: &HeadOptions, ranks: usize, rows: usize) -> Vec<Vec<Vec<i64>>> {
    on_ranks(ranks, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        (0..steps)
            .map(|step| {
                let batch = Batch::draw(options, place.rank, step, rows);
                head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
                head.sample_ids().expect("the sample")
            })
            .collect()
    })
}

fn labels(options: &HeadOptions, ranks: usize, rows: usize, step: usize) -> BTreeSet<i64> {
    (0..ranks).flat_map(|rank| Batch::draw(options, rank, step, rows).labels).collect()
}

/// Chi-square of counts that should be equal, each a sum of `STEPS` draws with probability `p`, in standard deviations.
fn unevenness(counts: &[u64], p: f64) -> f64 {
    let n = counts.len() as f64;
    let mean = counts.iter().sum::<u64>() as f64 / n;
    let variance = mean * (1.0 - p);
    let chi_square: f64 = counts.iter().map(|&count| (count as f64 - mean).powi(2) / variance).sum();
    (chi_square - (n - 1.0)) / (2.0 * (n - 1.0)).sqrt()
}

#[test]
fn negatives_are_uniform_without_repeats_and_steps_are_independent() {
    let options = HeadOptions { sample_rate: 0.1, seed: 11, ..options(1003, 2, 4) };
    for (rank, drawn) in samples(&options, 2, 0).into_iter().enumerate() {
        let (first, rows) = if rank == 0 { (0, 502) } else { (502, 501) };
        let mut counts = vec![0u64; rows];
        for sample in &drawn {
            assert_eq!(sample.len(), 50, "rank {rank}: int(rate * rows) classes");
            assert!(sample.windows(2).all(|pair| pair[0] < pair[1]), "rank {rank}: not ascending: {sample:?}");
            sample.iter().for_each(|&id| counts[id as usize - first] += 1);
        }
        let spread = unevenness(&counts, 50.0 / rows as f64);
        assert!(spread.abs() < 5.0, "rank {rank}: chi-square is {spread:.1} standard deviations from its mean");
        // Two draws share 50 * 50 / 502 = 5 ids on average, +- 2.0: over 400 steps the mean is within 0.1, five of which are allowed.
        for lag in [1, 2, 64] {
            let shared: usize = drawn.iter().zip(&drawn[lag..]).map(|(a, b)| a.iter().filter(|id| b.contains(id)).count()).sum();
            let mean = shared as f64 / (drawn.len() - lag) as f64;
            assert!((mean - 2500.0 / rows as f64).abs() < 0.55, "rank {rank}: steps {lag} apart share {mean:.2} ids");
        }
        // Neighbors come four from one counter: they must not come together.
        let pairs = drawn.iter().map(|sample| sample.windows(2).filter(|pair| pair[1] == pair[0] + 1).count()).sum::<usize>();
        let expected = STEPS as f64 * (rows - 1) as f64 * (50.0 * 49.0) / (rows as f64 * (rows - 1) as f64);
        assert!((pairs as f64 - expected).abs() < 5.0 * expected.sqrt(), "rank {rank}: {pairs} neighbors, expected {expected:.0}");
    }
}

#[test]
fn the_unevenness_of_a_bad_draw_is_seen() {
    let mut random = Random(1);
    let mut counts = vec![0u64; 500];
    for _ in 0..STEPS * 50 {
        // The first tenth of the classes a fifth too often.
        let id = random.below(510);
        counts[if id < 500 { id } else { (id - 500) * 5 }] += 1;
    }
    assert!(unevenness(&counts, 0.0) > 5.0, "{}", unevenness(&counts, 0.0));
}

#[test]
fn positives_are_in_and_do_not_bias_the_rest() {
    let options = HeadOptions { sample_rate: 0.1, seed: 12, ..options(603, 2, 8) };
    let drawn = samples(&options, 3, 8);
    let mut counts = vec![0u64; 603];
    for step in 0..STEPS {
        let positives = labels(&options, 3, 8, step);
        for (rank, steps) in drawn.iter().enumerate() {
            let sample = &steps[step];
            let own: Vec<i64> = positives.iter().copied().filter(|&id| id as usize / 201 == rank).collect();
            assert!(
                own.iter().all(|id| sample.binary_search(id).is_ok()),
                "step {step} rank {rank}: {own:?} not all in {sample:?}"
            );
            assert_eq!(sample.len(), own.len().max(20), "step {step} rank {rank}");
            sample.iter().filter(|id| !positives.contains(id)).for_each(|&id| counts[id as usize] += 1);
        }
    }
    let spread = unevenness(&counts, 0.08);
    assert!(spread.abs() < 5.0, "negatives: chi-square is {spread:.1} standard deviations from its mean");
}

#[test]
fn rates_zero_and_one_are_positives_only_and_all() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        for (rate, all) in [(0.0, false), (1.0, true)] {
            let options = HeadOptions { sample_rate: rate, placement, ..options(37, 2, 5) };
            on_ranks(3, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let (first, count) = head.shard();
                for step in 0..4 {
                    let batch = Batch::draw(&options, place.rank, step, 5);
                    head.forward(&mut batch.rows(2), Some(&batch.labels)).expect("forward");
                    let own = (first as i64..(first + count) as i64).filter(|id| all || labels(&options, 3, 5, step).contains(id));
                    assert_eq!(
                        head.sample_ids().expect("ids"),
                        own.collect::<Vec<_>>(),
                        "{placement:?} rate {rate} rank {}",
                        place.rank
                    );
                }
            });
        }
    }
}

#[test]
fn the_draw_is_a_function_of_seed_and_step() {
    let options = HeadOptions { sample_rate: 0.2, seed: 13, ..options(300, 2, 6) };
    let drawn = samples(&options, 2, 3);
    assert_eq!(drawn, samples(&options, 2, 3), "the same seed");
    let other = samples(&HeadOptions { seed: 14, ..options.clone() }, 2, 0);
    let again = samples(&options, 2, 0);
    assert!(other[0].iter().zip(&again[0]).all(|(a, b)| a != b), "another seed drew the same sample");
    assert!(again[0].windows(2).all(|pair| pair[0] != pair[1]), "two steps drew the same sample");
}

#[test]
fn replicated_ranks_draw_the_same_sample() {
    let options = HeadOptions { sample_rate: 0.2, seed: 15, placement: Placement::Replicated, ..options(200, 2, 6) };
    let drawn = samples(&options, 3, 4);
    assert_eq!(drawn[1], drawn[0]);
    assert_eq!(drawn[2], drawn[0]);
    for (step, sample) in drawn[0].iter().enumerate() {
        let positives = labels(&options, 3, 4, step);
        assert!(positives.iter().all(|id| sample.binary_search(id).is_ok()), "step {step}: {positives:?} not all in {sample:?}");
        assert_eq!(sample.len(), 40, "step {step}");
    }
}

#[test]
fn a_head_draws_what_pfc_sample_classes_draws() {
    let options = HeadOptions { sample_rate: 0.15, seed: 16, ..options(101, 2, 6) };
    let drawn = samples(&options, 2, 3);
    let device = Device::cpu(1);
    for (rank, (first, rows)) in [(0u64, 51u64), (51, 50)].into_iter().enumerate() {
        for (step, sample) in drawn[rank].iter().enumerate() {
            let shard = first as i64..(first + rows) as i64;
            let positives: Vec<i64> = labels(&options, 2, 3, step).into_iter().filter(|id| shard.contains(id)).collect();
            let wanted = (0.15 * rows as f64) as u64;
            let mut ids = vec![0i64; positives.len().max(wanted as usize)];
            let mut count = 0;
            // SAFETY: a live device; ids has the capacity the function names.
            outcome(unsafe {
                partialfc::capi::kernels::pfc_sample_classes(
                    device.0,
                    options.seed,
                    step as u64,
                    first,
                    rows,
                    positives.as_ptr(),
                    positives.len() as u64,
                    wanted,
                    ids.as_mut_ptr(),
                    &mut count,
                )
            })
            .expect("a draw");
            assert_eq!(&ids[..count as usize], sample.as_slice(), "rank {rank} step {step}");
        }
    }
}

/// Blocks count from class 0, whatever the shards: one that a boundary cuts has the same key on both sides.
#[test]
fn a_head_draws_in_blocks() {
    for (placement, block) in [(Placement::Sharded, 4), (Placement::Sharded, 64), (Placement::Replicated, 16)] {
        let options = HeadOptions { sample_rate: 0.15, seed: 17, sample_block: block, placement, ..options(3001, 2, 6) };
        let drawn = samples_of(8, &options, 2, 3);
        for (rank, samples) in drawn.iter().enumerate() {
            let shard = options.shard(2, rank as u32);
            for (step, sample) in samples.iter().enumerate() {
                let positives: Vec<i64> = labels(&options, 2, 3, step).into_iter().filter(|&id| shard.contains(id)).collect();
                let size = sample_size(options.sample_rate, shard.rows) as usize;
                let block = block.into();
                let request = Draw { seed: options.seed, number: step as u64, shard, positives: &positives, size, block };
                let mut expected = Vec::new();
                draw(&request, &|tasks, body| (0..tasks).for_each(body), &mut expected).expect("a draw");
                assert_eq!(*sample, expected, "{placement:?} {block} rank {rank} step {step}");
                let runs = sample.chunk_by(|a, b| a + 1 == *b).count();
                assert!(runs <= size.div_ceil(block as usize) + 2 * positives.len() + 2, "{placement:?} {block}: {runs} runs");
            }
        }
    }
}

/// A GPU sorts labels by other kernels where there may be more than 8192 of them, however many there are.
#[test]
fn room_for_many_labels_changes_no_draw() {
    for (placement, sample_rate) in [(Placement::Sharded, 0.2), (Placement::Sharded, 1.0), (Placement::Replicated, 0.2)] {
        let small = HeadOptions { sample_rate, seed: 18, placement, ..options(301, 2, 6) };
        let run = |max_batch: u64| {
            on_ranks(2, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &HeadOptions { max_batch, ..small.clone() });
                let step = |step| {
                    let batch = Batch::draw(&small, place.rank, step, 5);
                    let loss = head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
                    (loss, head.sample_ids().expect("the sample"))
                };
                (0..3).map(step).collect::<Vec<_>>()
            })
        };
        for (few, many) in run(6).iter().flatten().zip(run(4100).iter().flatten()) {
            assert_eq!(few.1, many.1, "{placement:?} {sample_rate}: the sample");
            assert!((few.0 - many.0).abs() <= 1e-4 * few.0.abs(), "{placement:?} {sample_rate}: losses {} and {}", few.0, many.0);
        }
    }
}

#[test]
fn a_given_sample_is_taken_and_its_missing_positives_are_added() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { sample_rate: 0.5, placement, ..options(20, 2, 4) };
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let embeddings = [1.0f32, 2.0, -1.0, 0.5];
            let labels = if place.rank == 0 { [3, 12] } else { [12, 19] };
            let given: Vec<i64> = match (placement, place.rank) {
                (Placement::Sharded, 0) => vec![0, 5],
                (Placement::Sharded, _) => vec![12, 14],
                (Placement::Replicated, _) => vec![0, 5, 12, 14],
            };
            head.set_sample(&given).expect("a sample");
            head.forward(&mut partialfc_testing::capi::Rows::f32(&embeddings, 2), Some(&labels)).expect("forward");
            let expected = match (placement, place.rank) {
                (Placement::Sharded, 0) => vec![0, 3, 5],
                (Placement::Sharded, _) => vec![12, 14, 19],
                (Placement::Replicated, _) => vec![0, 3, 5, 12, 14, 19],
            };
            assert_eq!(head.sample_ids().expect("ids"), expected, "{placement:?} rank {}", place.rank);
            // For one step only: the next one draws again.
            head.forward(&mut partialfc_testing::capi::Rows::f32(&embeddings, 2), Some(&labels)).expect("forward");
            let drawn = head.sample_ids().expect("ids").len();
            assert_eq!(drawn, if placement == Placement::Sharded { 5 } else { 10 }, "{placement:?} rank {}", place.rank);
        });
    }
}

/// A given sample may be larger than any draw: room for it must not come from the step under way.
#[test]
fn a_given_sample_beyond_every_draw_may_be_prepared_ahead() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { sample_rate: 0.1, placement, ..options(600, 3, 5) };
        let run = |ahead: bool| {
            on_ranks(2, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let (first, count) = head.shard();
                let given: Vec<i64> = (first..first + count).step_by(2).map(|id| id as i64).collect();
                let batches: Vec<Batch> = (0..4).map(|step| Batch::draw(&options, place.rank, step, 4)).collect();
                let mut trace = Trace::default();
                for (step, batch) in batches.iter().enumerate() {
                    let prepare = |head: &mut Head, step: usize| {
                        // The third step has a sample of its own; the others' are drawn.
                        if step == 2 {
                            head.set_sample(&given).expect("a sample");
                        }
                        head.prepare(&batches[step].labels).expect("prepare");
                    };
                    if !ahead || step == 0 {
                        prepare(&mut head, step);
                    }
                    let loss = head.forward(&mut batch.rows(head.dim), None).expect("forward");
                    let sample = head.sample_ids().expect("the sample");
                    if ahead && step + 1 < batches.len() {
                        prepare(&mut head, step + 1);
                    }
                    let mut grad = Rows::output(4, head.dim);
                    head.backward(1.0, 1.0, &mut grad).expect("backward");
                    head.update(0.1).expect("update");
                    trace.saw_step(loss, &grad, sample);
                }
                trace.saw_rows(&mut head, &options);
                trace
            })
        };
        assert_same_bits(&format!("{placement:?}"), &run(true), &run(false));
    }
}
