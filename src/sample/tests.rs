use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::random::sample_key;

fn serial(tasks: usize, body: &(dyn Fn(usize) + Sync)) {
    (0..tasks).for_each(body);
}

/// Three threads, the last tasks first.
fn threaded(tasks: usize, body: &(dyn Fn(usize) + Sync)) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| loop {
                let taken = next.fetch_add(1, Ordering::Relaxed);
                if taken >= tasks {
                    break;
                }
                body(tasks - 1 - taken);
            });
        }
    });
}

fn drawn(draw: &Draw) -> Vec<i64> {
    let mut ids = vec![-5; 3];
    super::draw(draw, &serial, &mut ids).unwrap();
    ids
}

/// By sorting all keys.
fn naive(draw: &Draw) -> Vec<i64> {
    let mut negatives: Vec<(u32, i64)> = (draw.shard.first..draw.shard.end())
        .filter(|&id| draw.positives.binary_search(&(id as i64)).is_err())
        .map(|id| (sample_key(draw.seed, draw.number, id / draw.block), id as i64))
        .collect();
    negatives.sort_unstable();
    let wanted = draw.size.saturating_sub(draw.positives.len()).min(negatives.len());
    if draw.block > 1 && wanted > 0 {
        // Those with the last key begin with another one.
        let last = negatives[wanted - 1].0;
        let ties = negatives.partition_point(|&(key, _)| key < last)..negatives.partition_point(|&(key, _)| key <= last);
        let round = last as usize % ties.len();
        negatives[ties].rotate_right(round);
        negatives.truncate(wanted);
    }
    negatives.truncate(wanted);
    let mut ids: Vec<i64> = negatives.into_iter().map(|(_, id)| id).chain(draw.positives.iter().copied()).collect();
    ids.sort_unstable();
    ids
}

/// `count` classes spread over the shard.
fn spread(shard: Shard, count: u64) -> Vec<i64> {
    let mut ids: Vec<i64> = (0..count).map(|i| (shard.first + i * 7919 % shard.rows) as i64).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[test]
fn draws_are_those_of_a_full_sort() {
    let shards = [(0, 1), (0, 7), (3, 100), (61, 70), (0, 1000), (999, 5000), (65_535, 3), (65_530, 70_000), (1 << 40, 140_001)];
    for (first, rows) in shards {
        let shard = Shard { first, rows };
        for step in [0, 1, 1 << 33] {
            for count in [0, 1, 5, 300] {
                let positives = spread(shard, count);
                for (rate, block) in
                    [(0.0, 1), (0.001, 64), (0.1, 1), (0.1, 4), (0.5, 2), (0.5, 16), (0.9, 1), (0.999, 1024), (1.0, 8)]
                {
                    let size = sample_size(rate, rows) as usize;
                    let draw = Draw { seed: 11 << 30, number: step, shard, positives: &positives, size, block };
                    let ids = drawn(&draw);
                    assert_eq!(ids, naive(&draw), "{shard:?} {step} {count} {rate} {block}");
                    assert_eq!(ids.len(), size.max(positives.len()));
                }
            }
        }
    }
}

#[test]
fn too_low_a_threshold_changes_nothing() {
    let shard = Shard { first: 12_345, rows: 100_000 };
    let positives = spread(shard, 77);
    for (size, block) in [(78, 1), (500, 16), (60_000, 1), (60_000, 4), (99_999, 2)] {
        let draw = Draw { seed: 5, number: 9, shard, positives: &positives, size, block };
        let wanted = (size - positives.len()) as u64;
        let truth = naive(&draw);
        let good = first_threshold(wanted, shard.rows - 77, block);
        for threshold in [0, 1, good / 1000, good / 2, good - good / 20, good, good.saturating_mul(3), u32::MAX] {
            let mut ids = Vec::new();
            select(&draw, wanted, threshold, &serial, &mut ids).unwrap();
            assert_eq!(ids, truth, "{size} {threshold}");
        }
    }
}

#[test]
fn equal_keys_go_to_the_smaller_ids() {
    let task = |first, keys: &[u32]| Candidates { first, keys: keys.to_vec(), offsets: (0..keys.len() as u32).collect() };
    let candidates = [task(0, &[5, 9, 5, 1]), task(100, &[5, 2, 5])];
    let last = |wanted| {
        let LastKey { key, equal, winners } = last_winner(&candidates, wanted).unwrap();
        (key, equal, winners)
    };
    assert_eq!(last(1), (1, 1, 1));
    assert_eq!(last(2), (2, 1, 1));
    assert_eq!(last(3), (5, 4, 1));
    assert_eq!(last(5), (5, 4, 3));
    assert_eq!(last(7), (9, 1, 1));
    // 2^18 classes and 2^32 keys: about 2^3 pairs share a key; cut right between the two of each pair.
    let shard = Shard::whole(1 << 18);
    let mut keys: Vec<(u32, i64)> = (0..shard.rows).map(|id| (sample_key(3, 4, id), id as i64)).collect();
    keys.sort_unstable();
    let mut cuts = 0;
    for at in 1..keys.len() {
        if keys[at - 1].0 == keys[at].0 {
            let draw = Draw { seed: 3, number: 4, shard, positives: &[], size: at, block: 1 };
            let ids = drawn(&draw);
            assert!(ids.binary_search(&keys[at - 1].1).is_ok() && ids.binary_search(&keys[at].1).is_err());
            cuts += 1;
        }
    }
    assert!(cuts > 0, "no two classes share a key");
}

#[test]
fn threads_change_nothing() {
    let shard = Shard { first: 1000, rows: 700_000 };
    let positives = spread(shard, 1000);
    for block in [1, 32] {
        let draw = Draw { seed: 1, number: 2, shard, positives: &positives, size: 70_000, block };
        let mut ids = Vec::new();
        super::draw(&draw, &threaded, &mut ids).unwrap();
        assert_eq!(ids, drawn(&draw));
    }
}

#[test]
fn more_positives_than_the_size_are_the_sample() {
    let shard = Shard { first: 10, rows: 1000 };
    let positives = spread(shard, 50);
    for size in [0, 1, 49, 50] {
        assert_eq!(drawn(&Draw { seed: 1, number: 1, shard, positives: &positives, size, block: 1 }), positives);
    }
    let empty = Shard { first: 10, rows: 0 };
    assert_eq!(drawn(&Draw { seed: 1, number: 1, shard: empty, positives: &[], size: 0, block: 1 }), [0i64; 0]);
    assert_eq!(drawn(&Draw { seed: 1, number: 1, shard: empty, positives: &[], size: 9, block: 1 }), [0i64; 0]);
}

#[test]
fn all_classes_need_no_keys() {
    let shard = Shard { first: 10, rows: 1000 };
    let all: Vec<i64> = (10..1010).collect();
    for positives in [spread(shard, 0), spread(shard, 50), spread(shard, 1000)] {
        for size in [1000, 5000] {
            let mut ids = Vec::new();
            let draw = Draw { seed: 1, number: 1, shard, positives: &positives, size, block: 1 };
            super::draw(&draw, &|_: usize, _: &(dyn Fn(usize) + Sync)| panic!("a draw of all makes no keys"), &mut ids).unwrap();
            assert_eq!(ids, all);
        }
    }
}

#[test]
fn every_class_is_drawn_alike() {
    // 4000 draws of 100 of 1000; positives 0 to 9 are in every one, the other 990 share 90 places.
    let shard = Shard::whole(1000);
    let positives: Vec<i64> = (0..10).collect();
    let (draws, mut counts) = (4000, vec![0u32; 1000]);
    for step in 0..draws {
        let ids = drawn(&Draw { seed: 2024, number: step, shard, positives: &positives, size: 100, block: 1 });
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "no repeats, ascending");
        ids.iter().for_each(|&id| counts[id as usize] += 1);
    }
    assert!(counts[..10].iter().all(|&count| u64::from(count) == draws));
    let p = 90.0 / 990.0;
    let (mean, variance) = (draws as f64 * p, draws as f64 * p * (1.0 - p));
    // Chi-square of 990 counts with a fixed sum: mean 989 (990 / 989 of it apart), standard deviation sqrt(2 * 989) = 44.5.
    let chi: f64 = counts[10..].iter().map(|&count| (f64::from(count) - mean).powi(2) / variance).sum();
    assert!((chi - 990.0).abs() < 4.0 * 44.5, "chi-square is {chi}");
}

#[test]
fn blocks_are_drawn_alike_and_their_classes_too() {
    // 100 of 1024 classes are 6 blocks of 16 and 4 classes of a seventh, or with 7 positives elsewhere 5 and 13 classes.
    let (shard, block, draws) = (Shard { first: 32, rows: 1024 }, 16, 4000);
    for count in [0, 7] {
        let positives: Vec<i64> = (0..count).map(|block| 32 + 16 * block + 3).collect();
        let (mut of_blocks, mut of_places) = ([0f64; 64], [0f64; 16]);
        for number in 0..draws {
            let ids = drawn(&Draw { seed: 2024, number, shard, positives: &positives, size: 100, block });
            assert_eq!(ids.len(), 100);
            let negatives = ids.iter().filter(|id| !positives.contains(id));
            let blocks: Vec<usize> = negatives.clone().map(|id| (id / 16 - 2) as usize).collect();
            assert!(blocks.chunk_by(|a, b| a == b).count() <= 8, "{ids:?}");
            blocks.iter().for_each(|&block| of_blocks[block] += 1.0);
            negatives.for_each(|id| of_places[(id % 16) as usize] += 1.0);
        }
        // The blocks without positives: 16 times a chance of about 6.2 in 64 each, a variance of at most 23 a draw.
        let whole = &of_blocks[count as usize..];
        let mean = whole.iter().sum::<f64>() / whole.len() as f64;
        let chi: f64 = whole.iter().map(|&found| (found - mean).powi(2) / (23.0 * draws as f64)).sum();
        let freedom = whole.len() as f64 - 1.0;
        assert!((chi - freedom).abs() < 5.0 * (2.0 * freedom).sqrt(), "chi-square of blocks is {chi}");
        // A place is in all whole blocks and, by chance, in the last one: a variance of at most 1 / 4 a draw; place 3 has positives.
        let mean = of_places[8..].iter().sum::<f64>() / 8.0;
        for (place, &found) in of_places.iter().enumerate().filter(|&(place, _)| place != 3) {
            // With positives the number of whole blocks below a place varies little more.
            assert!((found - mean).abs() < 6.0 * (draws as f64 / 4.0).sqrt(), "place {place}: {found} of {mean}");
        }
    }
}

#[test]
fn pairs_are_drawn_alike() {
    // Neighbours share a block of the generator; they meet as often as chance has it.
    let (shard, draws) = (Shard::whole(400), 2000);
    for lag in 1..=5usize {
        let mut together = 0u64;
        for step in 0..draws {
            let ids = drawn(&Draw { seed: 99, number: step, shard, positives: &[], size: 80, block: 1 });
            together += ids.iter().filter(|&&id| ids.binary_search(&(id + lag as i64)).is_ok()).count() as u64;
        }
        let expected = draws as f64 * (400 - lag) as f64 * (80.0 * 79.0) / (400.0 * 399.0);
        assert!((together as f64 - expected).abs() < 5.0 * expected.sqrt(), "{lag}: {together} against {expected}");
    }
}

#[test]
fn seed_and_step_decide() {
    let shard = Shard::whole(10_000);
    let make = |seed, step| drawn(&Draw { seed, number: step, shard, positives: &[], size: 1000, block: 1 });
    assert_eq!(make(1, 1), make(1, 1));
    for other in [make(1, 2), make(2, 1), make(1, 1 + (1 << 32)), make(1 + (1 << 32), 1)] {
        let common = other.iter().filter(|id| make(1, 1).binary_search(id).is_ok()).count();
        // 100 expected, standard deviation 9.
        assert!((50..150).contains(&common), "{common} classes in common");
    }
}

#[test]
fn a_sample_that_cannot_be_held_is_an_error_that_names_its_bytes() {
    let shard = Shard::whole(i64::MAX as u64);
    let size = sample_size(0.25, shard.rows) as usize;
    let refused =
        super::draw(&Draw { seed: 1, number: 1, shard, positives: &[], size, block: 16 }, &serial, &mut Vec::new()).unwrap_err();
    assert_eq!(refused.status, crate::Status::OutOfMemory);
    assert!(refused.message.contains(&format!("{} bytes", size.saturating_mul(8))), "{}", refused.message);
}

#[test]
fn sizes_are_rounded_down() {
    assert_eq!(sample_size(0.1, 1_000_003), 100_000);
    assert_eq!(sample_size(1.0, 1_000_003), 1_000_003);
    assert_eq!(sample_size(0.0, 7), 0);
    assert_eq!(sample_size(0.999_999, 7), 6);
    assert_eq!(sample_size(1.0, u64::MAX), u64::MAX);
}
