//! The class centers nearest to each query: chunks of cosines, and the best k of each.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::pool::Pool;
use super::products::{pitch, CHUNK};
use super::row_reader::RunReader;
use super::rows::HostRows;
use super::vector;
use crate::device::gemm::{gemm, GemmShape, Operand, Store};
use crate::device::host_math::{center_inverse_norm, inverse_norm};
use crate::device::nearest::{keep_best, not_finite, offer, Nearest};
use crate::memory::{reserve, zeros, Buffer, Parts};
use crate::optimizer::Replay;
use crate::shard::Shard;
use crate::Result;

/// Queries whose cosines with a chunk are made at a time: these stay in the cache.
const QUERIES: usize = 128;
/// Queries that the rows are gone through for once.
const QUERIES_A_PASS: usize = 1024;
/// Candidates that a thread has room for; with a large k a pass has fewer queries.
const CANDIDATES: usize = 1 << 23;
/// Queries whose candidates one task merges.
const MERGED_QUERIES: usize = 16;

/// A cosine and its class.
type Candidates = Vec<(f32, i64)>;

/// What one thread searches with.
struct Searcher<'a> {
    reader: RunReader<'a>,
    /// A chunk's directions, [CHUNK, pitch].
    centers: Buffer<f32>,
    /// [QUERIES, CHUNK].
    cosines: Buffer<f32>,
    /// Two rows.
    scratch_rows: Buffer<f32>,
    merged: Candidates,
}

/// What the queries of a pass are compared with.
struct Search<'a> {
    rows: &'a HostRows,
    replay: Replay,
    shard: Shard,
    k: usize,
}

/// For each query its `k` nearest centers of the shard, nearest first, equal cosines by ascending id: [queries, k].
///
/// `k` is at most the shard's rows. `queries` are raw embeddings, [queries, d]; one without a direction is at cosine 0 of everything.
pub(super) fn nearest(pool: &Pool, rows: &HostRows, shard: Shard, queries: &[f32], k: usize) -> Result<Nearest> {
    let search = Search { rows, replay: rows.replay()?, shard, k };
    let (dim, shard_rows) = (rows.dim(), shard.rows as usize);
    let count = queries.len() / dim;
    // Each task has a slice of the rows, in ascending order as `offer` wants them, and a list for each query of the pass.
    let slice = shard_rows.div_ceil(CHUNK).div_ceil(pool.threads()) * CHUNK;
    let room = k.saturating_mul(2).min(slice);
    let queries_a_pass = (CANDIDATES / room).clamp(1, QUERIES_A_PASS).min(count.max(1));
    let (mut searchers, mut slices) = (Vec::new(), Vec::new());
    reserve(&mut searchers, pool.threads(), "threads of top_k")?;
    for _ in 0..pool.threads() {
        searchers.push(Mutex::new(Searcher::new(rows, queries_a_pass, k.saturating_mul(2).min(shard_rows))?));
    }
    reserve(&mut slices, pool.threads(), "threads of top_k")?;
    for _ in (0..shard_rows).step_by(slice) {
        slices.push(Mutex::new(lists(queries_a_pass, room)?));
    }
    let mut units = Buffer::zeroed(queries_a_pass * pitch(dim), "queries of top_k")?;
    let mut found = Nearest { ids: zeros(&[count, k], "ids of top_k")?, cosines: zeros(&[count, k], "cosines of top_k")? };
    let passes = found.ids.chunks_mut(queries_a_pass * k).zip(found.cosines.chunks_mut(queries_a_pass * k));
    for (queries, (ids, cosines)) in queries.chunks(queries_a_pass * dim).zip(passes) {
        let count = queries.len() / dim;
        for (query, unit) in queries.chunks_exact(dim).zip(units.chunks_exact_mut(pitch(dim))) {
            let inverse = inverse_norm(vector::sum_of_squares(query)) as f32;
            vector::scale_into(query, inverse, &mut unit[..dim]);
        }
        let units = &units[..count * pitch(dim)];
        let (failure, bad_row) = (Mutex::new(None), AtomicUsize::new(usize::MAX));
        pool.run(slices.len(), &|task, worker| {
            // A worker number belongs to one thread, a slice to one task: nobody waits.
            let (mut searcher, mut lists) = (locked(&searchers[worker]), locked(&slices[task]));
            for first in (task * slice..((task + 1) * slice).min(shard_rows)).step_by(CHUNK) {
                match search.offer_chunk(&mut searcher, first..(first + CHUNK).min(shard_rows), units, &mut lists) {
                    Ok(row) => drop(bad_row.fetch_min(row, Ordering::Relaxed)),
                    Err(error) => {
                        locked(&failure).get_or_insert(error);
                        return;
                    }
                }
            }
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        if let row @ 0..usize::MAX = bad_row.into_inner() {
            return Err(not_finite(shard.first + row as u64));
        }
        let (ids, cosines) = (Parts::of(ids), Parts::of(cosines));
        pool.run(count.div_ceil(MERGED_QUERIES), &|task, worker| {
            let merged = &mut locked(&searchers[worker]).merged;
            for query in task * MERGED_QUERIES..((task + 1) * MERGED_QUERIES).min(count) {
                // SAFETY: a query belongs to one task.
                let (ids, cosines) = unsafe { (ids.range(query * k..(query + 1) * k), cosines.range(query * k..(query + 1) * k)) };
                merge(&slices, query, merged, ids, cosines);
            }
        });
    }
    Ok(found)
}

impl Searcher<'_> {
    /// For as many queries, of which `room` candidates are merged.
    fn new(rows: &HostRows, queries: usize, room: usize) -> Result<Searcher<'_>> {
        let (dim, mut merged) = (rows.dim(), Vec::new());
        reserve(&mut merged, room, "candidates of top_k")?;
        Ok(Searcher {
            reader: rows.reader()?,
            centers: Buffer::zeroed(CHUNK * pitch(dim), "class centers of top_k")?,
            cosines: Buffer::zeroed(QUERIES.min(queries) * CHUNK, "cosines of top_k")?,
            scratch_rows: Buffer::zeroed(2 * dim, "rows of top_k")?,
            merged,
        })
    }
}

impl Search<'_> {
    /// Offers a chunk of rows to all queries. Returns the first row that is no direction; `usize::MAX`: none.
    fn offer_chunk(
        &self,
        searcher: &mut Searcher<'_>,
        columns: Range<usize>,
        units: &[f32],
        lists: &mut [Candidates],
    ) -> Result<usize> {
        let (dim, pitch) = (self.rows.dim(), pitch(self.rows.dim()));
        let Searcher { reader, centers, cosines, scratch_rows, .. } = searcher;
        let mut bad_row = usize::MAX;
        let run = reader.run(columns.clone())?;
        for (row, center) in columns.clone().zip(centers.chunks_exact_mut(pitch)) {
            let center = &mut center[..dim];
            self.rows.read_run(run, &self.replay, row, center, scratch_rows);
            let inverse = center_inverse_norm(vector::sum_of_squares(center)) as f32;
            if inverse.is_nan() {
                bad_row = bad_row.min(row);
            }
            vector::scale(center, inverse);
        }
        let chunk = Operand::transposed(centers, pitch);
        for (units, lists) in units.chunks(QUERIES * pitch).zip(lists.chunks_mut(QUERIES)) {
            let shape = GemmShape { m: units.len() / pitch, n: columns.len(), k: dim };
            gemm(shape, cosines, CHUNK, Operand::rows(units, pitch), chunk, Store::Replace);
            for (list, cosines) in lists.iter_mut().zip(cosines.chunks_exact(CHUNK)).take(shape.m) {
                for (row, &cosine) in columns.clone().zip(cosines) {
                    offer(list, self.k, (cosine, self.shard.first as i64 + row as i64));
                }
            }
        }
        Ok(bad_row)
    }
}

/// Empties a query's lists and writes the best of them, as many as there is room for. `merged` has room for twice as many, and is empty.
fn merge(slices: &[Mutex<Vec<Candidates>>], query: usize, merged: &mut Candidates, ids: &mut [i64], cosines: &mut [f32]) {
    let k = ids.len();
    for slice in slices {
        // Other queries of the slice are another task's.
        let mut list = std::mem::take(&mut locked(slice)[query]);
        keep_best(&mut list, k);
        merged.append(&mut list);
        keep_best(merged, k);
        locked(slice)[query] = list;
    }
    for ((cosine, id), &best) in cosines.iter_mut().zip(ids).zip(&*merged) {
        (*cosine, *id) = best;
    }
    merged.clear();
}

/// `count` lists with room for `room` candidates each.
fn lists(count: usize, room: usize) -> Result<Vec<Candidates>> {
    let mut lists = Vec::new();
    reserve(&mut lists, count, "candidates of top_k")?;
    for _ in 0..count {
        let mut list = Vec::new();
        reserve(&mut list, room, "candidates of top_k")?;
        lists.push(list);
    }
    Ok(lists)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
