//! The class centres nearest to each query, on the host: evaluation reads the rows once, a piece at a time.

use crate::device::cpu::{gemm, inverse_norm, keep_best, offer};
use crate::device::Nearest;
use crate::memory::zeros;
use crate::Result;

/// Rows of a piece.
const PIECE: usize = 4096;

/// For each query its `k` nearest of `rows` centres, nearest first, equal cosines by ascending id: [queries, k]. `read` gives raw
/// rows from the one named on, as many as fit.
pub(super) fn nearest(
    dim: usize,
    rows: usize,
    first_class: u64,
    queries: &[f32],
    k: usize,
    read: &dyn Fn(usize, &mut [f32]) -> Result<()>,
) -> Result<Nearest> {
    let count = queries.len() / dim;
    let mut units = zeros(&[count, dim], "queries of top_k")?;
    units.copy_from_slice(queries);
    units.chunks_exact_mut(dim).for_each(normalize);
    let mut centers = zeros(&[PIECE.min(rows), dim], "rows of top_k")?;
    let mut cosines = zeros(&[count, PIECE.min(rows)], "cosines of top_k")?;
    let mut best = vec![Vec::new(); count];
    for first in (0..rows).step_by(PIECE) {
        let piece = PIECE.min(rows - first);
        let centers = &mut centers[..piece * dim];
        read(first, centers)?;
        centers.chunks_exact_mut(dim).for_each(normalize);
        gemm(count, piece, dim, (&mut cosines, piece), (&units, dim, 1), (centers, 1, dim), false);
        for (query, best) in best.iter_mut().enumerate() {
            for (slot, &cosine) in cosines[query * piece..(query + 1) * piece].iter().enumerate() {
                offer(best, k, (cosine, (first_class as usize + first + slot) as i64));
            }
        }
    }
    let mut found = Nearest::default();
    for mut best in best {
        keep_best(&mut best, k);
        found.ids.extend(best.iter().map(|hit| hit.1));
        found.cosines.extend(best.iter().map(|hit| hit.0));
    }
    Ok(found)
}

fn normalize(row: &mut [f32]) {
    let squares = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let inverse = inverse_norm(squares) as f32;
    row.iter_mut().for_each(|x| *x *= inverse);
}
