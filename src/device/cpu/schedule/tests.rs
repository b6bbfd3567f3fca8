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
