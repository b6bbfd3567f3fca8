//! Which class centers take part in a step: the positives, and negatives drawn without replacement.
//!
//! Every block of consecutive classes has a random key at every step ([`sample_key`]); the negatives with the smallest keys win. So all
//! ranks and devices agree without a message. Keys are made and compared with a threshold in one pass, a little above the key that the
//! last winner will have: what passes it is a little more than the sample, whatever the number of classes.
//!
//! Negatives that share the last key cannot all win. With blocks of one class these are those few whose keys happen to be equal, and the
//! smaller ids win. With larger blocks it is most of a block, and the smaller ids of blocks would win too often. So there the winners begin
//! at a random one of them and go round. Every negative is then drawn as often as any other whose block has as many negatives. Those of
//! blocks with fewer, which hold positives or are cut by the shard's ends, are drawn more often, the less so the more blocks a sample has.
//!
//! [`sample_key`]: crate::random::sample_key

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
/// Keys that are made at a time; they stay in the nearest cache.
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
    /// Classes of a block, a power of two: class c is in block c / block.
    pub block: u64,
}

/// Replaces `ids` with the sample, ascending: the positives and the `size - positives` negatives with the smallest keys.
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
        select(draw, wanted, first_threshold(wanted, rows - positives, draw.block), parallel, ids)?;
    }
    Ok(())
}

/// A key that, but once in a billion draws, the keys of at least `wanted` of `negatives` do not exceed: their expected number there is
/// six standard deviations above `wanted`.
fn first_threshold(wanted: u64, negatives: u64, block: u64) -> u32 {
    let (wanted, negatives, block) = (wanted as f64, negatives as f64, block as f64);
    // The constant carries small samples, whose number below a threshold is far from normal.
    let expected = wanted + 6.0 * (block * wanted).sqrt() + 20.0 * block;
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

    let LastKey { key: largest, winners, equal } = last_winner(&candidates, wanted as usize)?;
    // The key's remainder is as random as any other number: there are far more keys than classes of a block.
    let first_tie = if draw.block == 1 { 0 } else { largest as usize % equal };
    let mut tie = first_tie;
    let mut positives = draw.positives.iter().copied().peekable();
    for task in &candidates {
        for (&key, &offset) in task.keys.iter().zip(&task.offsets) {
            if key > largest {
                continue;
            }
            if key == largest {
                let wins = tie < winners;
                tie = if tie + 1 == equal { 0 } else { tie + 1 };
                if !wins {
                    continue;
                }
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

/// The largest key in a sample.
#[derive(Debug, PartialEq)]
struct LastKey {
    key: u32,
    /// Negatives with this very key, and how many of them are in the sample.
    equal: usize,
    winners: usize,
}

/// The `wanted`-th smallest key.
fn last_winner(candidates: &[Candidates], wanted: usize) -> Result<LastKey> {
    let mut keys = Vec::new();
    reserve(&mut keys, candidates.iter().map(|task| task.keys.len()).sum(), SAMPLE)?;
    for task in candidates {
        keys.extend_from_slice(&task.keys);
    }
    let (smaller, &mut key, larger) = keys.select_nth_unstable(wanted - 1);
    let equals = |keys: &[u32]| keys.iter().filter(|&&other| other == key).count();
    let winners = 1 + equals(smaller);
    Ok(LastKey { key, equal: winners + equals(larger), winners })
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
        let first = (first_task + task as u64) * TASK;
        let found = match draw.block {
            1 => collect_task(draw, threshold, first, simd),
            _ => collect_blocks(draw, threshold, first, simd),
        };
        *slots[task].lock().unwrap_or_else(PoisonError::into_inner) = found;
    });
    let mut found = Vec::new();
    reserve(&mut found, tasks, SAMPLE)?;
    for slot in slots {
        found.push(slot.into_inner().unwrap_or_else(PoisonError::into_inner)?);
    }
    Ok(found)
}

/// The classes of the shard in the task that begins with class `first`, and room for what is likely found there.
fn begin_task(draw: &Draw, threshold: u32, first: u64) -> Result<(Candidates, u64, u64)> {
    let mut found = Candidates { first, ..Candidates::default() };
    let (begin, end) = (draw.shard.first.max(first), draw.shard.end().min(first + TASK));
    let expected = (end - begin) as f64 * (f64::from(threshold) + 1.0) / 2f64.powi(32);
    let block = draw.block as f64;
    let likely = ((expected + 6.0 * (block * expected).sqrt() + 8.0 * block) as usize).min((end - begin) as usize);
    reserve(&mut found.keys, likely, SAMPLE)?;
    reserve(&mut found.offsets, likely, SAMPLE)?;
    Ok((found, begin, end))
}

/// With blocks of more than one class. A task has whole blocks, but for those that the shard's ends cut.
fn collect_blocks(draw: &Draw, threshold: u32, first: u64, simd: Simd) -> Result<Candidates> {
    let (mut found, begin, end) = begin_task(draw, threshold, first)?;
    let mut positives = &draw.positives[draw.positives.partition_point(|&id| (id as u64) < begin)..];
    let (begin_block, end_block) = (begin / draw.block, end.div_ceil(draw.block));
    let mut keys = [0u32; CHUNK];
    let mut chunk = begin_block / KEYS as u64 * KEYS as u64;
    while chunk < end_block {
        let chunk_end = end_block.min(chunk + CHUNK as u64);
        let made = ((chunk_end - chunk) as usize).next_multiple_of(KEYS);
        sample_keys_on(simd, draw.seed, draw.number, chunk, &mut keys[..made]);
        for (block, &key) in (chunk..chunk_end).zip(&keys).filter(|&(block, &key)| key <= threshold && block >= begin_block) {
            let (from, to) = (begin.max(block * draw.block), end.min((block + 1) * draw.block));
            make_room(&mut found.keys, draw.block as usize)?;
            make_room(&mut found.offsets, draw.block as usize)?;
            positives = &positives[positives.partition_point(|&id| (id as u64) < from)..];
            for id in from..to {
                if positives.first() == Some(&(id as i64)) {
                    positives = &positives[1..];
                } else {
                    found.keys.push(key);
                    found.offsets.push((id - first) as u32);
                }
            }
        }
        chunk = chunk_end;
    }
    Ok(found)
}

fn collect_task(draw: &Draw, threshold: u32, first: u64, simd: Simd) -> Result<Candidates> {
    let (mut found, begin, end) = begin_task(draw, threshold, first)?;
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
    make_room(list, more.len())?;
    list.extend_from_slice(more);
    Ok(())
}

fn make_room<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    if list.capacity() - list.len() < more {
        // Twice what there is, so that many small pieces do not copy it many times.
        reserve(list, list.len().max(more), SAMPLE)?;
    }
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
        let shards =
            [(0, 1), (0, 7), (3, 100), (61, 70), (0, 1000), (999, 5000), (65_535, 3), (65_530, 70_000), (1 << 40, 140_001)];
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
        let refused = super::draw(&Draw { seed: 1, number: 1, shard, positives: &[], size, block: 16 }, &serial, &mut Vec::new())
            .unwrap_err();
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
