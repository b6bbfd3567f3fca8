//! How well the tasks of a step fill many threads, without the machine: the pool's own order, and a model of what a task costs.

use super::products::{Shape, GATHER};

/// The share of so many threads' time that the forward and the update of a step spend on what one thread would have to do too. Memory is
/// taken to be fast enough for all of them, and the threads to be equally fast.
pub fn step_efficiency(batch: usize, dim: usize, classes: usize, threads: usize) -> [f64; 2] {
    let shape = Shape { rows: batch, dim, classes, half: false };
    let blocks = shape.row_blocks(threads);
    let columns = |split: usize| shape.split(split).map(|chunk| shape.chunk(chunk).len()).sum::<usize>() as f64;
    // Of a number of W: two products with each row of the batch.
    let forward = (0..shape.splits() * blocks).map(|task| {
        let rows = shape.row_block(task % blocks, blocks).len() as f64;
        columns(task / blocks) * (GATHER + 4.0 * rows)
    });
    let update = (0..shape.chunks()).map(|chunk| shape.chunk(chunk).len() as f64 * (GATHER + 2.0 * batch as f64));
    let ideal = |products: f64| classes as f64 * (GATHER + products * batch as f64) / threads as f64;
    [ideal(4.0) / last_end(forward, threads), ideal(2.0) / last_end(update, threads)]
}

/// When the last of the tasks ends, of which each thread takes the next as it comes free.
fn last_end(tasks: impl Iterator<Item = f64>, threads: usize) -> f64 {
    let mut free = vec![0.0f64; threads];
    for task in tasks {
        if let Some(first) = free.iter_mut().min_by(|a, b| a.total_cmp(b)) {
            *first += task;
        }
    }
    free.into_iter().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests;
