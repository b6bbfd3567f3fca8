//! The all-reduce of sampled gradients: each rank has rows for some classes, all get the sums for the union of the classes.

use super::handshake::{gather_words, require_equal};
use super::Communicator;
use crate::matrix::{Matrix, ReduceOp};
use crate::memory::{reserve, zeros};
use crate::{ensure, error, Contribution, Result};

/// Bytes of float32 sums that travel in one all-reduce: large enough for bandwidth, small beside the rows.
const PIECE: usize = 16 << 20;

/// One rank's part in [`all_reduce_rows`]; host memory.
#[derive(Clone, Copy, Debug)]
pub struct SampledRows {
    /// `count` class ids, ascending, each once.
    pub ids: *const i64,
    pub count: usize,
    /// At least `count` rows; row i belongs to `ids[i]`.
    pub rows: Matrix,
    /// The union's ids, room for `capacity`; may be `ids`. NULL: the ranks' ids must be equal.
    pub ids_out: *mut i64,
    /// Rows that the caller has room for.
    pub capacity: usize,
    /// At least `capacity` rows; may be the same matrix as `rows`.
    pub rows_out: Matrix,
}

/// Sums rows over the ranks by class and gives the number of classes in the union. Collective.
///
/// Sums are float32 in rank order, rounded once to `rows_out`'s type; a rank without a class adds nothing to it. Memory: the ranks'
/// ids and one piece of sums, at most 16 MiB or one row.
///
/// # Errors
/// A rank's own failed checks (in `mine`, or ids that do not ascend: INVALID_ARGUMENT) and REMOTE on the others; on all ranks alike
/// MISMATCH if the columns differ, or ids where they must not, and INVALID_ARGUMENT if the union exceeds a rank's capacity. These
/// leave the outputs alone and the communicator in use, as does INVALID_ARGUMENT where another thread uses the communicator. A failure of the communicator leaves `rows_out` undefined.
///
/// # Safety
/// The pointers and matrices describe host memory of the sizes named, `ids` and `rows` readable, `ids_out` and `rows_out` writable
/// by this call alone.
pub unsafe fn all_reduce_rows(comm: &Communicator, mine: Contribution<SampledRows>) -> Result<usize> {
    let rank = comm.rank();
    let _turn = comm.take_turn()?;
    let prepared = mine.and_then(|mine| {
        check(&mine, rank)?;
        // The same on all ranks; no union beyond the capacity gets that far.
        let piece_rows = (PIECE / 4 / mine.rows.cols.max(1)).max(1);
        let room = piece_rows.min(mine.capacity).saturating_mul(mine.rows.cols);
        Ok((zeros::<f32>(&[room], "sums of rows")?, piece_rows, mine))
    });
    let words = match &prepared {
        Ok((.., m)) => Ok([m.count as u64, m.capacity as u64, m.rows.cols as u64, u64::from(m.ids_out.is_null())]),
        Err(error) => Err(error.clone()),
    };
    let all = gather_words(comm, words)?;
    let (mut sums, piece_rows, mine) = prepared?;
    require_equal("rows.cols", &all, |words| words[2], |cols| cols.to_string())?;
    let union_wanted = |word| (if word == 0 { "given" } else { "NULL" }).to_owned();
    require_equal("ids_out", &all, |words| words[3], union_wanted)?;

    let widest = all.iter().map(|words| words[0] as usize).max().unwrap_or(0);
    let gathered = comm.or_abort(gather_ids(comm, &mine, widest))?;
    let mut ids: Vec<&[i64]> = Vec::new();
    comm.or_abort(reserve(&mut ids, all.len(), "the ranks' ids"))?;
    ids.extend(all.iter().enumerate().map(|(rank, words)| &gathered[rank * widest..][..words[0] as usize]));
    if mine.ids_out.is_null() {
        equal(&ids)?;
    }
    // Memory that one rank lacks here would leave the others waiting.
    let union = comm.or_abort(union(&ids))?;
    if let Some((rank, words)) = all.iter().enumerate().find(|(_, words)| (words[1] as usize) < union.len()) {
        return Err(error!(
            InvalidArgument,
            "capacity must be at least {}, the ids of the union, got {} (rank {rank})",
            union.len(),
            words[1]
        ));
    }

    // From the end: a row's position in the union is never before its own, so rows_out may overwrite rows that have been read.
    let own = ids[rank as usize];
    let mut next = own.len();
    for first in (0..union.len()).step_by(piece_rows).rev() {
        let classes = &union[first..(first + piece_rows).min(union.len())];
        let sums = &mut sums[..classes.len() * mine.rows.cols];
        sums.fill(0.0);
        for (at, class) in classes.iter().enumerate().rev() {
            if next > 0 && own[next - 1] == *class {
                next -= 1;
                mine.rows.read_row(next, row(sums, at, mine.rows.cols));
            }
        }
        comm.all_reduce(sums, ReduceOp::Sum)?;
        for at in 0..classes.len() {
            mine.rows_out.write_row(first + at, row(sums, at, mine.rows.cols));
        }
    }
    if !mine.ids_out.is_null() && !union.is_empty() {
        std::ptr::copy_nonoverlapping(union.as_ptr(), mine.ids_out, union.len());
    }
    Ok(union.len())
}

unsafe fn check(mine: &SampledRows, rank: u32) -> Result<()> {
    let named = |result: Result<()>| result.map_err(|error| error.during(format_args!("rank {rank}")));
    named(mine.rows.check("rows", mine.rows.cols))?;
    named(mine.rows_out.check("rows_out", mine.rows.cols))?;
    let (count, capacity) = (mine.count, mine.capacity);
    ensure!(
        mine.rows.rows >= count,
        InvalidArgument,
        "rows.rows must be at least count, {count}, got {} (rank {rank})",
        mine.rows.rows
    );
    let out = mine.rows_out.rows;
    ensure!(out >= capacity, InvalidArgument, "rows_out.rows must be at least capacity, {capacity}, got {out} (rank {rank})");
    ensure!(count == 0 || !mine.ids.is_null(), InvalidArgument, "ids must not be NULL for a count of {count} (rank {rank})");
    // Rows are written from the last to the first: over the inputs that is safe in one layout only.
    let layout = |m: &Matrix| (m.data, m.dtype, m.row_stride);
    // What lies after the last row is not the matrix's.
    let elements = |m: &Matrix| if m.rows == 0 { 0 } else { (m.rows - 1) * m.row_stride + m.cols };
    let range = |m: &Matrix| m.data as usize..m.data as usize + elements(m) * m.dtype.size();
    let (from, to) = (range(&mine.rows), range(&mine.rows_out));
    let disjoint = from.end <= to.start || to.end <= from.start;
    ensure!(
        disjoint || layout(&mine.rows) == layout(&mine.rows_out),
        InvalidArgument,
        "rows_out must not overlap rows unless data, dtype and row_stride are the same (rank {rank})"
    );
    if count > 0 {
        let ids = std::slice::from_raw_parts(mine.ids, count);
        if let Some(i) = ids.windows(2).position(|pair| pair[0] >= pair[1]) {
            let (a, b) = (ids[i], ids[i + 1]);
            return Err(error!(InvalidArgument, "ids must ascend: ids[{}] is {b} after {a} (rank {rank})", i + 1));
        }
    }
    Ok(())
}

/// All ranks' ids, `widest` entries for each rank.
unsafe fn gather_ids(comm: &Communicator, mine: &SampledRows, widest: usize) -> Result<Vec<i64>> {
    let mut block: Vec<i64> = zeros(&[widest], "ids")?;
    let mut blocks: Vec<i64> = zeros(&[widest, comm.size() as usize], "the ranks' ids")?;
    if mine.count > 0 {
        std::ptr::copy_nonoverlapping(mine.ids, block.as_mut_ptr(), mine.count);
    }
    comm.all_gather(&block, &mut blocks)?;
    let rank = comm.rank() as usize;
    ensure!(
        blocks[rank * widest..(rank + 1) * widest] == block,
        Comm,
        "all_gather did not bring back the own ids of rank {rank} at their place as they were sent"
    );
    Ok(blocks)
}

fn equal(ids: &[&[i64]]) -> Result<()> {
    for (rank, other) in ids.iter().enumerate().skip(1) {
        if let Some(i) = ids[0].iter().zip(*other).position(|(a, b)| a != b) {
            return Err(error!(Mismatch, "ids[{i}] is {} on rank 0 and {} on rank {rank}", ids[0][i], other[i]));
        }
        let counts = (ids[0].len(), other.len());
        ensure!(counts.0 == counts.1, Mismatch, "count is {} on rank 0 and {} on rank {rank}", counts.0, counts.1);
    }
    Ok(())
}

fn union(ids: &[&[i64]]) -> Result<Vec<i64>> {
    let total: usize = ids.iter().map(|ids| ids.len()).sum();
    let mut union = Vec::new();
    reserve(&mut union, total, "the union of the ids")?;
    ids.iter().for_each(|ids| union.extend_from_slice(ids));
    // In place: the stable sort takes memory of its own.
    union.sort_unstable();
    union.dedup();
    Ok(union)
}

fn row(values: &mut [f32], row: usize, cols: usize) -> &mut [f32] {
    &mut values[row * cols..][..cols]
}
