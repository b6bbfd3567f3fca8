//! Lists of the class centers nearest to a query, as evaluation asks for them.

use crate::{error, Error};

/// Class ids and cosines, [queries, k], nearest first, equal cosines by ascending id.
#[derive(Clone, Debug, Default)]
pub struct Nearest {
    pub ids: Vec<i64>,
    pub cosines: Vec<f32>,
}

/// The error of a search over a class center that is no direction.
pub(super) fn not_finite(class: u64) -> Error {
    error!(NotFinite, "class center {class} is not finite")
}

/// Adds a candidate; the list is cut back to `k` only when it has doubled.
pub(super) fn offer(best: &mut Vec<(f32, i64)>, k: usize, candidate: (f32, i64)) {
    // From the first k on, the first k are sorted. Ids ascend, so that of equal cosines the earlier stays ahead.
    if best.len() >= k && candidate.0 <= best[k - 1].0 {
        return;
    }
    best.push(candidate);
    if best.len() == k || best.len() == 2 * k {
        keep_best(best, k);
    }
}

/// Sorts nearest first, ties by id, and keeps `k`.
pub(crate) fn keep_best(best: &mut Vec<(f32, i64)>, k: usize) {
    // In place: the stable sort takes memory of its own, and no two candidates are equal.
    best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    best.truncate(k);
}
