use super::*;

#[test]
fn every_task_runs_once_whatever_the_threads() {
    for threads in 1..4 {
        let pool = Pool::new(threads);
        for tasks in [0, 1, 2, 7, 100] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            let beside = pool.run_beside(
                tasks,
                &|task, worker| {
                    assert!(worker < threads, "worker {worker} of {threads}");
                    counts[task].fetch_add(1, Ordering::Relaxed);
                },
                || 5,
            );
            assert_eq!(beside, 5);
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{tasks} tasks on {threads} threads");
        }
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(3);
    for bad in [0, 5, 63] {
        let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|task, _| assert!(task != bad, "task {task}"))));
        assert!(outcome.is_err(), "task {bad} panicked");
        let (sum, helped) = (AtomicUsize::new(0), AtomicUsize::new(0));
        pool.run(10, &|task, worker| {
            sum.fetch_add(task, Ordering::Relaxed);
            helped.fetch_or(worker, Ordering::Relaxed);
            // Until a worker has come, there is always something left to do.
            while worker == 0 && task < 8 && helped.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
        assert_ne!(helped.load(Ordering::Relaxed), 0, "workers still help");
    }
}

#[test]
fn a_busy_pool_does_not_block_a_second_caller() {
    let pool = Pool::new(2);
    let inner = AtomicUsize::new(0);
    pool.run_beside(1, &|_, _| (), || {
        pool.run(4, &|_, worker| {
            assert_eq!(worker, 0);
            inner.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(inner.load(Ordering::Relaxed), 4);
}
