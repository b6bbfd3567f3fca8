//! The class centers nearest to each query: chunks of cosines, and the best k of each.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::pool::Pool;
use super::products::{pitch, CHUNK};
use super::rows::HostRows;
use super::vector;
use crate::device::gemm::{gemm, GemmShape, Operand, Store};
use crate::device::host_math::{center_inverse_norm, inverse_norm};
use crate::device::nearest::{keep_best, not_finite, offer, Nearest};
use crate::memory::{reserve, zeros, Buffer, Parts};
use crate::shard::Shard;
use crate::{Error, Result};

/// Queries of a task: few enough that their cosines with a chunk stay in the cache and that threads share a small batch.
const QUERIES: usize = 128;
/// Candidates that a task holds at most: with a large k it takes fewer queries.
const CANDIDATES: usize = 1 << 22;

/// For each query its `k` nearest centers of the shard, nearest first, equal cosines by ascending id: [queries, k].
///
/// `k` is at most the shard's rows. `queries` are raw embeddings, [queries, d]; one without a direction is at cosine 0 of everything.
pub(super) fn nearest(pool: &Pool, rows_of_shard: &HostRows, shard: Shard, queries: &[f32], k: usize) -> Result<Nearest> {
    let dim = rows_of_shard.dim();
    let (count, row_pitch) = (queries.len() / dim, pitch(dim));
    let queries_a_task = (CANDIDATES / k).clamp(1, QUERIES);
    let tasks = count.div_ceil(queries_a_task);
    let scratch_length = QUERIES * row_pitch + CHUNK * row_pitch + QUERIES * CHUNK + 2 * dim;
    let mut scratch = Buffer::<f32>::zeroed(pool.threads() * scratch_length, "scratch of top_k")?;
    let mut found = Nearest { ids: zeros(&[count, k], "ids of top_k")?, cosines: zeros(&[count, k], "cosines of top_k")? };
    let replay = rows_of_shard.replay()?;
    let (scratch, all_cosines, all_ids) = (scratch.parts(), Parts::of(&mut found.cosines), Parts::of(&mut found.ids));
    let (failure, bad_row) = (Mutex::new(None), AtomicUsize::new(usize::MAX));
    let failed = |error: Error| {
        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    };
    let mut readers = Vec::new();
    reserve(&mut readers, pool.threads(), "readers of top_k")?;
    for _ in 0..pool.threads() {
        readers.push(Mutex::new(rows_of_shard.reader()?));
    }
    pool.run(tasks, &|task, worker| {
        let range = task * queries_a_task..((task + 1) * queries_a_task).min(count);
        // SAFETY: a worker number belongs to one thread, a query to one task.
        let scratch = unsafe { scratch.range(worker * scratch_length..(worker + 1) * scratch_length) };
        let (units, rest) = scratch.split_at_mut(QUERIES * row_pitch);
        let (centers, rest) = rest.split_at_mut(CHUNK * row_pitch);
        let (products, spare) = rest.split_at_mut(QUERIES * CHUNK);
        for (slot, query) in range.clone().enumerate() {
            let raw = &queries[query * dim..(query + 1) * dim];
            let inverse = inverse_norm(vector::sum_of_squares(raw)) as f32;
            vector::scale_into(raw, inverse, &mut units[slot * row_pitch..slot * row_pitch + dim]);
        }
        let rows = shard.rows as usize;
        let mut best = match lists(range.len(), (2 * k).min(rows)) {
            Ok(lists) => lists,
            Err(error) => return failed(error),
        };
        // A worker number belongs to one thread: nobody waits.
        let mut reader = readers[worker].lock().unwrap_or_else(PoisonError::into_inner);
        for first in (0..rows).step_by(CHUNK) {
            let columns = first..(first + CHUNK).min(rows);
            let run = match reader.run(columns.clone()) {
                Ok(run) => run,
                Err(error) => return failed(error),
            };
            for (slot, row) in columns.clone().enumerate() {
                let center = &mut centers[slot * row_pitch..slot * row_pitch + dim];
                rows_of_shard.read_run(run, &replay, row, center, spare);
                let inverse = center_inverse_norm(vector::sum_of_squares(center)) as f32;
                if inverse.is_nan() {
                    bad_row.fetch_min(row, Ordering::Relaxed);
                }
                vector::scale(center, inverse);
            }
            let shape = GemmShape { m: range.len(), n: columns.len(), k: dim };
            let (queries, chunk) = (Operand::rows(units, row_pitch), Operand::transposed(centers, row_pitch));
            gemm(shape, products, CHUNK, queries, chunk, Store::Replace);
            for (slot, best) in best.iter_mut().enumerate() {
                for (column, row) in columns.clone().enumerate() {
                    offer(best, k, (products[slot * CHUNK + column], shard.first as i64 + row as i64));
                }
            }
        }
        for (query, best) in range.zip(&mut best) {
            keep_best(best, k);
            // SAFETY: as above.
            let (cosines, ids) =
                unsafe { (all_cosines.range(query * k..(query + 1) * k), all_ids.range(query * k..(query + 1) * k)) };
            for (slot, &(cosine, id)) in best.iter().enumerate() {
                (cosines[slot], ids[slot]) = (cosine, id);
            }
        }
    });
    if let row @ 0..usize::MAX = bad_row.into_inner() {
        return Err(not_finite(shard.first + row as u64));
    }
    drop(readers);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(found), Err)
}

/// `count` lists with room for `room` candidates each.
fn lists(count: usize, room: usize) -> Result<Vec<Vec<(f32, i64)>>> {
    let mut lists = Vec::new();
    reserve(&mut lists, count, "candidates of top_k")?;
    for _ in 0..count {
        let mut list = Vec::new();
        reserve(&mut list, room, "candidates of top_k")?;
        lists.push(list);
    }
    Ok(lists)
}
