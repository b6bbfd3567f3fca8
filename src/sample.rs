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
mod tests;
