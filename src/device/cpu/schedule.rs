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
mod tests {
    use super::*;

    #[test]
    fn threads_take_the_next_task_as_they_come_free() {
        assert_eq!(last_end([3.0, 1.0, 1.0, 1.0, 2.0].into_iter(), 2), 5.0);
        assert_eq!(last_end([1.0; 7].into_iter(), 3), 3.0);
        assert_eq!(last_end([].into_iter(), 3), 0.0);
    }

    #[test]
    fn blocks_have_all_rows_once_and_begin_at_a_pair() {
        for rows in [1, 63, 128, 301, 1024] {
            let shape = Shape { rows, dim: 37, classes: 600, half: true };
            assert_eq!(shape.row_blocks(1), 1);
            for threads in [4, 16, 100] {
                let blocks = shape.row_blocks(threads);
                assert!(blocks <= (rows / 64).max(1), "{rows} rows, {threads} threads: {blocks}");
                assert!(blocks > 1 || rows < 128 || threads < 100, "{rows} rows, {threads} threads");
                let all: Vec<_> = (0..blocks).map(|block| shape.row_block(block, blocks)).collect();
                assert!(all.iter().all(|block| block.start % 2 == 0 && !block.is_empty()), "{all:?}");
                assert!(all.into_iter().flatten().eq(0..rows), "{rows} rows, {blocks} blocks");
            }
        }
    }

    #[test]
    fn sixty_four_threads_have_work_in_a_large_step() {
        for threads in 1..=64 {
            let [forward, update] = step_efficiency(1024, 512, 125_000, threads);
            let least = if threads.is_power_of_two() { 0.9 } else { 0.79 };
            assert!(forward >= least && update >= 0.9, "{threads} threads: {forward:.3}, {update:.3}");
        }
        // A shape of one chunk has work for as many threads as it has blocks of rows.
        assert!(step_efficiency(1024, 512, super::super::products::CHUNK, 8)[0] > 0.7);
    }
}
