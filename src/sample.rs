//! Which class centers take part in a step: the positives, and negatives drawn without replacement.
//!
//! Every class has a random key at every step ([`crate::random::sample_key`]); the negatives with the smallest (key, id) win. So
//! all ranks and devices agree without a message. Keys are made and compared with a threshold in one pass, a little above the key
//! that the last winner will have: what passes it is a little more than the sample, whatever the number of classes.

use std::sync::{Mutex, PoisonError};

use crate::memory::reserve;
use crate::random::{sample_keys_on, KEYS};
use crate::shard::Shard;
use crate::simd::Simd;
use crate::Result;

/// Runs `body(0)` to `body(tasks - 1)`, each once, possibly on several threads, and returns when all are done.
pub type Parallel<'a> = dyn Fn(usize, &(dyn Fn(usize) + Sync)) + 'a;

/// Classes of one task: enough to outweigh handing it out.
const TASK: u64 = 1 << 16;
/// Classes whose keys are made at a time; their keys stay in the nearest cache.
const CHUNK: usize = 32 * KEYS;
/// What memory is for, in messages.
const SAMPLE: &str = "the sample";

/// Classes in a shard's sample before positives outnumber it: `rate * rows` rounded down, 0 <= rate <= 1.
pub fn sample_size(rate: f64, rows: u64) -> u64 {
    ((rate * rows as f64) as u64).min(rows)
}

/// One draw.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    pub seed: u64,
    /// How many samples the head has drawn before.
    pub number: u64,
    /// The classes to draw from.
    pub shard: Shard,
    /// Classes of the batch in the shard, ascending, each once.
    pub positives: &'a [i64],
    /// How many to draw, positives included; see [`sample_size`].
    pub size: usize,
}

/// Replaces `ids` with the sample, ascending: the positives and the `size - positives` negatives with the smallest (key, id).
///
/// More positives than `size`: the sample is the positives. `size` of all classes: all, without keys. The result depends on `draw`
/// alone. Time O(classes), memory O(size).
///
/// Errors: OUT_OF_MEMORY.
pub fn draw(draw: &Draw, parallel: &Parallel, ids: &mut Vec<i64>) -> Result<()> {
    let (rows, positives) = (draw.shard.rows, draw.positives.len() as u64);
    debug_assert!(draw.positives.windows(2).all(|pair| pair[0] < pair[1]), "positives ascend");
    debug_assert!(draw.positives.iter().all(|&id| draw.shard.contains(id)), "positives lie in the shard");
    ids.clear();
    let wanted = (draw.size as u64).min(rows).saturating_sub(positives);
    reserve(ids, (wanted + positives) as usize, SAMPLE)?;
    if wanted == 0 {
        ids.extend_from_slice(draw.positives);
    } else if wanted + positives == rows {
        ids.extend((draw.shard.first..draw.shard.end()).map(|id| id as i64));
    } else {
        select(draw, wanted, first_threshold(wanted, rows - positives), parallel, ids)?;
    }
    Ok(())
}

/// A key that, but once in a billion draws, at least `wanted` of `negatives` keys do not exceed: their expected number there is six
/// standard deviations above `wanted`.
fn first_threshold(wanted: u64, negatives: u64) -> u32 {
    let (wanted, negatives) = (wanted as f64, negatives as f64);
    // The constant carries small samples, whose number below a threshold is far from normal.
    let expected = wanted + 6.0 * wanted.sqrt() + 20.0;
    // As casts do, this ends at u32::MAX.
    (expected / negatives * 2f64.powi(32)) as u32
}

/// Appends the sample to `ids`, given a first guess at the largest key in it.
fn select(draw: &Draw, wanted: u64, mut threshold: u32, parallel: &Parallel, ids: &mut Vec<i64>) -> Result<()> {
    let candidates = loop {
        let candidates = collect(draw, threshold, parallel)?;
        let found: u64 = candidates.iter().map(|task| task.keys.len() as u64).sum();
        // Where every key passes, everyone was found.
        if found >= wanted || threshold == u32::MAX {
            break candidates;
        }
        threshold = threshold.max(1 << 8).saturating_mul(2);
    };

    let (largest, mut ties) = last_winner(&candidates, wanted as usize)?;
    let mut positives = draw.positives.iter().copied().peekable();
    for task in &candidates {
        for (&key, &offset) in task.keys.iter().zip(&task.offsets) {
            if key > largest {
                continue;
            }
            if key == largest {
                // Among equal keys the smaller ids win, and they come first.
                if ties == 0 {
                    continue;
                }
                ties -= 1;
            }
            let id = task.first as i64 + i64::from(offset);
            while let Some(positive) = positives.next_if(|&positive| positive < id) {
                ids.push(positive);
            }
            ids.push(id);
        }
    }
    ids.extend(positives);
    Ok(())
}

/// The `wanted`-th smallest key, and how many candidates with that very key are among the `wanted`.
fn last_winner(candidates: &[Candidates], wanted: usize) -> Result<(u32, usize)> {
    let mut keys = Vec::new();
    reserve(&mut keys, candidates.iter().map(|task| task.keys.len()).sum(), SAMPLE)?;
    for task in candidates {
        keys.extend_from_slice(&task.keys);
    }
    let (smaller, &mut largest, _) = keys.select_nth_unstable(wanted - 1);
    let ties = 1 + smaller.iter().filter(|&&key| key == largest).count();
    Ok((largest, ties))
}

/// Negatives of one task whose keys do not exceed the threshold, in the order of their ids.
#[derive(Default)]
struct Candidates {
    /// Global id that offsets count from.
    first: u64,
    keys: Vec<u32>,
    offsets: Vec<u32>,
}

/// All negatives whose keys do not exceed the threshold, task by task.
fn collect(draw: &Draw, threshold: u32, parallel: &Parallel) -> Result<Vec<Candidates>> {
    // Tasks begin at multiples of TASK whatever the shard, and so at whole groups of keys.
    let first_task = draw.shard.first / TASK;
    let tasks = (draw.shard.end().div_ceil(TASK) - first_task) as usize;
    let simd = Simd::best();
    let mut slots: Vec<Mutex<Result<Candidates>>> = Vec::new();
    reserve(&mut slots, tasks, SAMPLE)?;
    slots.resize_with(tasks, || Mutex::new(Ok(Candidates::default())));
    parallel(tasks, &|task| {
        let found = collect_task(draw, threshold, (first_task + task as u64) * TASK, simd);
        *slots[task].lock().unwrap_or_else(PoisonError::into_inner) = found;
    });
    let mut found = Vec::new();
    reserve(&mut found, tasks, SAMPLE)?;
    for slot in slots {
        found.push(slot.into_inner().unwrap_or_else(PoisonError::into_inner)?);
    }
    Ok(found)
}

fn collect_task(draw: &Draw, threshold: u32, first: u64, simd: Simd) -> Result<Candidates> {
    let mut found = Candidates { first, ..Candidates::default() };
    let (begin, end) = (draw.shard.first.max(first), draw.shard.end().min(first + TASK));
    let expected = (end - begin) as f64 * (f64::from(threshold) + 1.0) / 2f64.powi(32);
    let likely = ((expected + 6.0 * expected.sqrt()) as usize + 8).min((end - begin) as usize);
    reserve(&mut found.keys, likely, SAMPLE)?;
    reserve(&mut found.offsets, likely, SAMPLE)?;
    let mut positives = &draw.positives[draw.positives.partition_point(|&id| (id as u64) < begin)..];

    let mut keys = [0u32; CHUNK];
    // One slot beyond the chunk: where the branchless loop writes what it does not keep.
    let (mut kept_keys, mut kept_offsets) = ([0u32; CHUNK + 1], [0u32; CHUNK + 1]);
    let mut chunk = begin / KEYS as u64 * KEYS as u64;
    while chunk < end {
        let chunk_end = end.min(chunk + CHUNK as u64);
        let made = ((chunk_end - chunk) as usize).next_multiple_of(KEYS);
        sample_keys_on(simd, draw.seed, draw.number, chunk, &mut keys[..made]);
        let mut kept = 0;
        let base = (chunk - first) as u32;
        let skipped = begin.saturating_sub(chunk) as usize;
        for (index, &key) in keys[..(chunk_end - chunk) as usize].iter().enumerate().skip(skipped) {
            // Which keys pass is as random as can be: a branch would be mispredicted at every other one.
            kept_keys[kept] = key;
            kept_offsets[kept] = base + index as u32;
            kept += usize::from(key <= threshold);
        }
        let here = positives.partition_point(|&id| (id as u64) < chunk_end);
        if here > 0 {
            kept = remove(&positives[..here], first, &mut kept_keys[..kept], &mut kept_offsets[..kept]);
            positives = &positives[here..];
        }
        extend(&mut found.keys, &kept_keys[..kept])?;
        extend(&mut found.offsets, &kept_offsets[..kept])?;
        chunk = chunk_end;
    }
    Ok(found)
}

/// Moves what is not a positive to the front, in order; returns how many. Both lists ascend.
fn remove(positives: &[i64], first: u64, keys: &mut [u32], offsets: &mut [u32]) -> usize {
    let mut positives = positives.iter().map(|&id| (id as u64 - first) as u32).peekable();
    let mut kept = 0;
    for index in 0..offsets.len() {
        let offset = offsets[index];
        while positives.next_if(|&positive| positive < offset).is_some() {}
        if positives.peek() != Some(&offset) {
            (keys[kept], offsets[kept]) = (keys[index], offset);
            kept += 1;
        }
    }
    kept
}

fn extend<T: Copy>(list: &mut Vec<T>, more: &[T]) -> Result<()> {
    let full = list.capacity() - list.len() < more.len();
    if full {
        // Twice what there is, so that many small pieces do not copy it many times.
        reserve(list, list.len().max(more.len()), SAMPLE)?;
    }
    list.extend_from_slice(more);
    Ok(())
}

#[cfg(test)]
mod tests {
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
            .map(|id| (sample_key(draw.seed, draw.number, id), id as i64))
            .collect();
        negatives.sort_unstable();
        negatives.truncate(draw.size.saturating_sub(draw.positives.len()));
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
        let shards =
            [(0, 1), (0, 7), (3, 100), (61, 70), (0, 1000), (999, 5000), (65_535, 3), (65_530, 70_000), (1 << 40, 140_001)];
        for (first, rows) in shards {
            let shard = Shard { first, rows };
            for step in [0, 1, 1 << 33] {
                for count in [0, 1, 5, 300] {
                    let positives = spread(shard, count);
                    for rate in [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0] {
                        let size = sample_size(rate, rows) as usize;
                        let draw = Draw { seed: 11 << 30, number: step, shard, positives: &positives, size };
                        let ids = drawn(&draw);
                        assert_eq!(ids, naive(&draw), "{shard:?} {step} {count} {rate}");
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
        for size in [78, 500, 60_000, 99_999] {
            let draw = Draw { seed: 5, number: 9, shard, positives: &positives, size };
            let wanted = (size - positives.len()) as u64;
            let truth = naive(&draw);
            let good = first_threshold(wanted, shard.rows - 77);
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
        assert_eq!(last_winner(&candidates, 1).unwrap(), (1, 1));
        assert_eq!(last_winner(&candidates, 2).unwrap(), (2, 1));
        assert_eq!(last_winner(&candidates, 3).unwrap(), (5, 1));
        assert_eq!(last_winner(&candidates, 5).unwrap(), (5, 3));
        assert_eq!(last_winner(&candidates, 7).unwrap(), (9, 1));
        // 2^18 classes and 2^32 keys: about 2^3 pairs share a key; cut right between the two of each pair.
        let shard = Shard::whole(1 << 18);
        let mut keys: Vec<(u32, i64)> = (0..shard.rows).map(|id| (sample_key(3, 4, id), id as i64)).collect();
        keys.sort_unstable();
        let mut cuts = 0;
        for at in 1..keys.len() {
            if keys[at - 1].0 == keys[at].0 {
                let draw = Draw { seed: 3, number: 4, shard, positives: &[], size: at };
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
        let draw = Draw { seed: 1, number: 2, shard, positives: &positives, size: 70_000 };
        let mut ids = Vec::new();
        super::draw(&draw, &threaded, &mut ids).unwrap();
        assert_eq!(ids, drawn(&draw));
    }

    #[test]
    fn more_positives_than_the_size_are_the_sample() {
        let shard = Shard { first: 10, rows: 1000 };
        let positives = spread(shard, 50);
        for size in [0, 1, 49, 50] {
            assert_eq!(drawn(&Draw { seed: 1, number: 1, shard, positives: &positives, size }), positives);
        }
        let empty = Shard { first: 10, rows: 0 };
        assert_eq!(drawn(&Draw { seed: 1, number: 1, shard: empty, positives: &[], size: 0 }), [0i64; 0]);
        assert_eq!(drawn(&Draw { seed: 1, number: 1, shard: empty, positives: &[], size: 9 }), [0i64; 0]);
    }

    #[test]
    fn all_classes_need_no_keys() {
        let shard = Shard { first: 10, rows: 1000 };
        let all: Vec<i64> = (10..1010).collect();
        for positives in [spread(shard, 0), spread(shard, 50), spread(shard, 1000)] {
            for size in [1000, 5000] {
                let mut ids = Vec::new();
                let draw = Draw { seed: 1, number: 1, shard, positives: &positives, size };
                super::draw(&draw, &|_: usize, _: &(dyn Fn(usize) + Sync)| panic!("a draw of all makes no keys"), &mut ids)
                    .unwrap();
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
            let ids = drawn(&Draw { seed: 2024, number: step, shard, positives: &positives, size: 100 });
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
    fn pairs_are_drawn_alike() {
        // Neighbours share a block of the generator; they meet as often as chance has it.
        let (shard, draws) = (Shard::whole(400), 2000);
        for lag in 1..=5usize {
            let mut together = 0u64;
            for step in 0..draws {
                let ids = drawn(&Draw { seed: 99, number: step, shard, positives: &[], size: 80 });
                together += ids.iter().filter(|&&id| ids.binary_search(&(id + lag as i64)).is_ok()).count() as u64;
            }
            let expected = draws as f64 * (400 - lag) as f64 * (80.0 * 79.0) / (400.0 * 399.0);
            assert!((together as f64 - expected).abs() < 5.0 * expected.sqrt(), "{lag}: {together} against {expected}");
        }
    }

    #[test]
    fn seed_and_step_decide() {
        let shard = Shard::whole(10_000);
        let make = |seed, step| drawn(&Draw { seed, number: step, shard, positives: &[], size: 1000 });
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
        let refused = super::draw(&Draw { seed: 1, number: 1, shard, positives: &[], size }, &serial, &mut Vec::new()).unwrap_err();
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
}
