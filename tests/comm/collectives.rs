//! Communicators of one process through the C interface: results, counters, and what every kind of failure does on every rank.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use partialfc::capi::comm::*;
use partialfc::capi::status::*;
use partialfc::capi::types::*;
use partialfc_testing::capi::{assert_failed, outcome, Comm, Outcome};
use partialfc_testing::collectives::{exercise, reduced, sample};
use partialfc_testing::processes::{in_a_forked_child, in_a_process_of_its_own};
use partialfc_testing::ranks::{group, together, LONG};
use proptest::prelude::*;

const SHORT: Duration = Duration::from_millis(100);

#[test]
fn every_operation_on_one_to_five_ranks() {
    exercise(&[Comm::solo()]);
    for size in 1..=5 {
        exercise(&group(size));
    }
}

#[test]
fn sums_of_floats_are_in_rank_order_on_all_ranks() {
    const COUNT: usize = 3001;
    let value = |rank: usize, i: usize| ((i * 7919 + rank * 104_729) % 100_003) as f32 * 1.7e-3 - 80.0;
    let expected: Vec<u32> = (0..COUNT).map(|i| (1..5).fold(value(0, i), |sum, rank| sum + value(rank, i)).to_bits()).collect();
    together(&group(5), |rank| {
        let mut data: Vec<f32> = (0..COUNT).map(|i| value(rank.rank(), i)).collect();
        assert_eq!(rank.all_reduce_in_place(&mut data, PFC_SUM), Ok(()));
        assert!(data.iter().map(|sum| sum.to_bits()).eq(expected.iter().copied()));
    });
}

#[test]
fn the_largest_of_a_nan_is_a_nan_and_integers_wrap() {
    together(&group(3), |rank| {
        let mut data = [1.0f32, rank.rank() as f32, f32::NEG_INFINITY];
        data[rank.rank()] = f32::NAN;
        assert_eq!(rank.all_reduce_in_place(&mut data, PFC_MAX), Ok(()));
        assert!(data.iter().all(|x| x.is_nan()), "{data:?}");
        let mut data = [i64::MAX, i64::MIN];
        assert_eq!(rank.all_reduce_in_place(&mut data, PFC_SUM), Ok(()));
        assert_eq!(data, [i64::MAX.wrapping_mul(3), i64::MIN.wrapping_mul(3)]);
    });
}

#[test]
fn traffic_counts_what_a_rank_hands_over() {
    together(&group(3), |rank| {
        let mut gathered = [0u8; 30];
        rank.all_gather(&[1u8; 10], &mut gathered).unwrap();
        rank.all_reduce_in_place(&mut [0f64; 5], PFC_SUM).unwrap();
        rank.all_reduce_in_place(&mut [0f32; 5], PFC_MAX).unwrap();
        rank.reduce_scatter(&[0i32; 12], &mut [0i32; 4], PFC_SUM).unwrap();
        rank.broadcast(&mut [0u8; 7], 2).unwrap();
        rank.barrier().unwrap();
        rank.barrier().unwrap();
        let t = rank.traffic();
        assert_eq!((t.all_gather_calls, t.all_gather_bytes), (1, 10));
        assert_eq!((t.all_reduce_calls, t.all_reduce_bytes), (2, 60));
        assert_eq!((t.reduce_scatter_calls, t.reduce_scatter_bytes), (1, 48));
        assert_eq!((t.broadcast_calls, t.broadcast_bytes, t.barrier_calls), (1, 7, 2));
    });
}

#[test]
fn traffic_can_be_asked_while_a_rank_waits() {
    let ranks = group(2);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| ranks[0].barrier());
        while ranks[0].traffic().barrier_calls == 0 {
            std::thread::yield_now();
        }
        assert_eq!(ranks[1].barrier(), Ok(()));
        assert_eq!(waiting.join().unwrap(), Ok(()));
    });
}

#[test]
fn a_timeout_names_the_operation_and_the_missing_rank() {
    let ranks = group(4);
    let outcomes = together(&ranks, |rank| {
        rank.barrier().unwrap();
        match rank.rank() {
            3 => return Ok(()),
            // Its time begins when the others are on their way.
            0 => {
                while ranks[1..3].iter().any(|rank| rank.traffic().all_reduce_calls == 0) {
                    std::thread::yield_now();
                }
                rank.set_timeout(SHORT);
            }
            _ => {}
        }
        rank.all_reduce_in_place(&mut [0f32; 100], PFC_SUM)
    });
    // On a busy machine another may not have got further than its way.
    let missing = "3 did not arrive";
    for (rank, outcome) in outcomes[..3].iter().enumerate() {
        let end = format!("{missing} within 100 ms (this is rank {rank})");
        assert_failed(outcome, PFC_ERROR_TIMEOUT, &["all_reduce #2: rank", &end]);
    }
    // The late one does not wait for anybody, and nothing is started afterwards.
    assert_failed(&ranks[3].all_reduce_in_place(&mut [0f32; 100], PFC_SUM), PFC_ERROR_TIMEOUT, &[missing]);
    together(&ranks, |rank| assert_failed(&rank.barrier(), PFC_ERROR_ABORTED, &[missing, "barrier"]));

    let ranks = group(3);
    ranks[1].set_timeout(Duration::from_millis(1));
    assert_failed(&ranks[1].barrier(), PFC_ERROR_TIMEOUT, &["barrier #1: ranks 0 and 2 did not arrive within 1 ms"]);
    assert_eq!(unsafe { pfc_comm_set_timeout(ranks[0].0, 0) }, PFC_ERROR_INVALID_ARGUMENT);
}

/// An operation begins on all ranks or on none, however close the deadline; who has returned is not read from or written to.
#[test]
fn deadlines_that_race_with_arrivals_give_one_verdict() {
    const COUNT: usize = 5000;
    let (mut begun, mut missed) = (0, 0);
    for round in 0..300u64 {
        let ranks = group(3);
        let outcomes = together(&ranks, |rank| {
            let me = rank.rank() as u64;
            // Every second round all come at once, some of them with time enough, so that on a busy machine too operations begin; and in
            // some one comes far too late, so that on a fast one too they do not.
            rank.set_timeout(Duration::from_millis(if round % 8 == 0 { 10_000 } else { 1 }));
            let late = if round % 16 == 15 && me == 2 { 50_000 } else { 400 * ((round * 7 + me * 5) % 4) };
            std::thread::sleep(Duration::from_micros((round % 2) * late));
            let send: Vec<i64> = (0..COUNT).map(|i| sample(rank.rank(), i)).collect();
            let mut recv = vec![0; COUNT];
            let outcome = rank.all_reduce(&send, &mut recv, PFC_SUM).map_err(|failure| failure.status);
            // Overwritten at once: a peer still at work would read this instead. What it writes late is seen when all have returned.
            let mut send = send;
            send.fill(-1);
            (outcome, recv, send)
        });
        let verdict = outcomes[0].0;
        for (outcome, result, send) in outcomes {
            assert!(send.iter().all(|&x| x == -1), "round {round}: an input was written to");
            assert_eq!(outcome, verdict, "round {round}");
            match outcome {
                Ok(()) => assert!(result.iter().enumerate().all(|(i, &sum)| sum == reduced(3, i, PFC_SUM)), "round {round}"),
                Err(status) => {
                    assert_eq!(status, PFC_ERROR_TIMEOUT);
                    assert!(result.iter().all(|&sum| sum == 0), "round {round}: a failed operation wrote");
                }
            }
        }
        *(if verdict.is_ok() { &mut begun } else { &mut missed }) += 1;
    }
    assert!(begun > 0 && missed > 0, "{begun} begun, {missed} missed");
}

#[test]
fn abort_from_another_thread_wakes_every_rank() {
    for aborting in [0, 2] {
        let ranks = group(3);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let ranks = &ranks;
            let waiting = [0, 1].map(|rank: usize| scope.spawn(move || ranks[rank].all_gather(&[0u8; 4], &mut [0u8; 12])));
            while ranks[..2].iter().any(|rank| rank.traffic().all_gather_calls == 0) {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(2));
            ranks[aborting].abort();
            for thread in waiting {
                let cause = format!("pfc_comm_abort was called on rank {aborting}");
                assert_failed(&thread.join().unwrap(), PFC_ERROR_ABORTED, &["all_gather #1", &cause]);
            }
        });
        for rank in &ranks {
            assert_failed(&rank.barrier(), PFC_ERROR_ABORTED, &[&format!("rank {aborting}")]);
        }
        assert!(start.elapsed() < LONG / 2);
    }
}

#[test]
fn a_mismatch_is_told_on_all_ranks() {
    type Body = fn(&Comm) -> Outcome;
    let reduce: Body = |rank| rank.all_reduce_in_place(&mut [1f32; 4], PFC_SUM);
    let cases: [(Body, Body, &str); 8] = [
        (reduce, |rank| rank.barrier(), "operation is all_reduce on rank 0 and barrier on rank 1"),
        (reduce, |rank| rank.all_reduce_in_place(&mut [1f32; 5], PFC_SUM), "count is 4 on rank 0 and 5 on rank 1"),
        (reduce, |rank| rank.all_reduce_in_place(&mut [1i32; 4], PFC_SUM), "dtype is f32 on rank 0 and i32 on rank 1"),
        (reduce, |rank| rank.all_reduce_in_place(&mut [1f32; 4], PFC_MAX), "op is sum on rank 0 and max on rank 1"),
        (
            reduce,
            |rank| rank.reduce_scatter(&[1f32; 8], &mut [0f32; 4], PFC_SUM),
            "operation is all_reduce on rank 0 and reduce_scatter",
        ),
        (|rank| rank.broadcast(&mut [0u8; 9], 0), |rank| rank.broadcast(&mut [0u8; 9], 1), "root is 0 on rank 0 and 1 on rank 1"),
        (|rank| rank.broadcast(&mut [0u8; 9], 0), |rank| rank.broadcast(&mut [0u8; 8], 0), "bytes is 9 on rank 0 and 8 on rank 1"),
        (
            |rank| rank.all_gather(&[0u8; 3], &mut [0u8; 6]),
            |rank| rank.all_gather(&[0u8; 2], &mut [0u8; 4]),
            "bytes is 3 on rank 0 and 2 on rank 1",
        ),
    ];
    for (one, other, text) in cases {
        let outcomes = together(&group(2), |rank| if rank.rank() == 0 { one(rank) } else { other(rank) });
        outcomes.iter().for_each(|outcome| assert_failed(outcome, PFC_ERROR_MISMATCH, &[text]));
    }
    // Ranks that agree with each other hear of the third one's difference.
    let outcomes = together(&group(3), |rank| rank.all_reduce_in_place(&mut vec![1f32; 4 + rank.rank() / 2], PFC_SUM));
    outcomes.iter().for_each(|outcome| assert_failed(outcome, PFC_ERROR_MISMATCH, &["count is 4 on rank", "and 5 on rank 2"]));
}

#[test]
fn a_freed_end_fails_the_others_at_once() {
    let mut ranks = group(3);
    let last = ranks.pop().unwrap();
    let start = Instant::now();
    let outcomes = std::thread::scope(|scope| {
        let ranks = &ranks;
        let waiting = scope.spawn(move || together(ranks, |rank| rank.barrier()));
        while ranks.iter().any(|rank| rank.traffic().barrier_calls == 0) {
            std::thread::yield_now();
        }
        drop(last);
        waiting.join().unwrap()
    });
    outcomes.iter().for_each(|outcome| assert_failed(outcome, PFC_ERROR_COMM, &["barrier #1: rank 2 freed its communicator"]));

    // One that went before anybody waited.
    let mut ranks = group(2);
    drop(ranks.pop());
    assert_failed(&ranks[0].all_reduce_in_place(&mut [0f32], PFC_SUM), PFC_ERROR_COMM, &["rank 1 freed its communicator"]);
    assert!(start.elapsed() < LONG / 2);
}

/// A rank may leave as soon as its last operation has returned, while the others are on their way out of it.
#[test]
fn leaving_after_the_last_operation_disturbs_nobody() {
    for _ in 0..200 {
        std::thread::scope(|scope| {
            for rank in group(3) {
                scope.spawn(move || {
                    let mut data = [rank.rank() as i64; 40];
                    assert_eq!(rank.all_reduce_in_place(&mut data, PFC_SUM), Ok(()));
                    assert_eq!(data, [3; 40]);
                    drop(rank);
                });
            }
        });
    }
}

#[test]
fn wrong_arguments_are_named_and_nobody_waits() {
    type Body = unsafe fn(*mut pfc_comm, *mut f32) -> i32;
    let null = std::ptr::null_mut;
    assert_eq!(unsafe { pfc_comm_threads(0, &mut null()) }, PFC_ERROR_INVALID_ARGUMENT);
    assert_eq!(unsafe { pfc_comm_threads(4097, &mut null()) }, PFC_ERROR_INVALID_ARGUMENT);
    assert_eq!(unsafe { pfc_comm_threads(2, std::ptr::null_mut()) }, PFC_ERROR_INVALID_ARGUMENT);
    assert_eq!(unsafe { pfc_comm_barrier(null()) }, PFC_ERROR_INVALID_ARGUMENT);
    let cases: [(Body, &str); 11] = [
        (|c, _| unsafe { pfc_comm_all_gather(c, std::ptr::null(), std::ptr::null_mut(), 1) }, "send must not be NULL (rank 1)"),
        (|c, x| unsafe { pfc_comm_all_gather(c, x.cast(), std::ptr::null_mut(), 1) }, "recv must not be NULL (rank 1)"),
        (|c, x| unsafe { pfc_comm_all_gather(c, x.cast(), x.cast(), 8) }, "must not overlap unless send is recv + rank * bytes"),
        (|c, x| unsafe { pfc_comm_all_gather(c, x.cast(), x.cast(), u64::MAX) }, "got 18446744073709551615 (rank 1)"),
        (
            |c, x| unsafe { pfc_comm_all_reduce(c, x.cast(), x.cast(), 4, PFC_F16, PFC_SUM) },
            "f32, f64, i32 or i64 in a reduction, got f16",
        ),
        (|c, x| unsafe { pfc_comm_all_reduce(c, x.cast(), x.cast(), 4, 77, PFC_SUM) }, "got 77 (rank 1)"),
        (|c, x| unsafe { pfc_comm_all_reduce(c, x.cast(), x.cast(), 4, PFC_F32, 3) }, "got 3 (rank 1)"),
        (|c, x| unsafe { pfc_comm_all_reduce(c, x.cast(), x.add(1).cast(), 4, PFC_F32, PFC_SUM) }, "unless send is recv"),
        (|c, x| unsafe { pfc_comm_all_reduce(c, x.cast(), x.byte_add(1).cast(), 4, PFC_F32, PFC_SUM) }, "recv must be aligned"),
        (
            |c, x| unsafe { pfc_comm_reduce_scatter(c, x.cast(), x.cast(), 4, PFC_F32, PFC_SUM) },
            "unless recv is send + rank * count",
        ),
        (|c, x| unsafe { pfc_comm_broadcast(c, x.cast(), 4, 2) }, "root must be below 2, the number of ranks, got 2 (rank 1)"),
    ];
    for (wrong, text) in cases {
        let outcomes = together(&group(2), |rank| match rank.rank() {
            0 => rank.barrier(),
            _ => outcome(unsafe { wrong(rank.0, [0f32; 64].as_mut_ptr()) }),
        });
        assert_failed(&outcomes[1], PFC_ERROR_INVALID_ARGUMENT, &[text]);
        assert_failed(&outcomes[0], PFC_ERROR_ABORTED, &["rank 1", text]);
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Gather(usize),
    Reduce(usize, i32, bool),
    Scatter(usize, i32, bool),
    Broadcast(usize, usize),
    Barrier,
}

const CELLS: usize = 24;

fn steps() -> impl Strategy<Value = (usize, Vec<Step>)> {
    (1usize..=4).prop_flat_map(|size| {
        let op = || prop_oneof![Just(PFC_SUM), Just(PFC_MAX)];
        let step = prop_oneof![
            (0..=CELLS / size).prop_map(Step::Gather),
            (0..=CELLS, op(), any::<bool>()).prop_map(|(n, op, in_place)| Step::Reduce(n, op, in_place)),
            (0..=CELLS / size, op(), any::<bool>()).prop_map(|(n, op, in_place)| Step::Scatter(n, op, in_place)),
            (0..=CELLS, 0..size).prop_map(|(n, root)| Step::Broadcast(n, root)),
            Just(Step::Barrier),
        ];
        (Just(size), proptest::collection::vec(step, 1..20))
    })
}

/// What a step does to all ranks' cells, one rank after the other.
fn model(step: Step, cells: &mut [Vec<i64>]) {
    let size = cells.len();
    let before = cells.to_vec();
    let combine = |i: usize, op| {
        let values = before.iter().map(|cells| cells[i]);
        if op == PFC_SUM {
            values.fold(0, i64::wrapping_add)
        } else {
            values.max().unwrap()
        }
    };
    for (rank, cells) in cells.iter_mut().enumerate() {
        match step {
            Step::Gather(n) => (0..n * size).for_each(|i| cells[i] = before[i / n][i % n]),
            Step::Reduce(n, op, _) => (0..n).for_each(|i| cells[i] = combine(i, op)),
            Step::Scatter(n, op, true) => (rank * n..(rank + 1) * n).for_each(|i| cells[i] = combine(i, op)),
            Step::Scatter(n, op, false) => (0..n).for_each(|i| cells[i] = combine(rank * n + i, op)),
            Step::Broadcast(n, root) => cells[..n].copy_from_slice(&before[root][..n]),
            Step::Barrier => (),
        }
    }
}

fn perform(rank: &Comm, step: Step, cells: &mut [i64]) -> Outcome {
    let size = rank.size();
    let before = cells.to_vec();
    match step {
        Step::Gather(n) => rank.all_gather(&before[..n], &mut cells[..n * size]),
        Step::Reduce(n, op, true) => rank.all_reduce_in_place(&mut cells[..n], op),
        Step::Reduce(n, op, false) => rank.all_reduce(&before[..n], &mut cells[..n], op),
        Step::Scatter(n, op, true) => rank.reduce_scatter_in_place(&mut cells[..n * size], op),
        Step::Scatter(n, op, false) => rank.reduce_scatter(&before[..n * size], &mut cells[..n], op),
        Step::Broadcast(n, root) => rank.broadcast(&mut cells[..n], root),
        Step::Barrier => rank.barrier(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sequences_do_what_one_rank_after_the_other_would((size, steps) in steps(), seed in any::<u64>()) {
        let start = |rank: usize| -> Vec<i64> {
            (0..CELLS).map(|i| seed.wrapping_mul(2 * (rank * CELLS + i) as u64 + 1).rotate_left(17) as i64).collect()
        };
        let mut expected: Vec<Vec<i64>> = (0..size).map(start).collect();
        steps.iter().for_each(|&step| model(step, &mut expected));
        let got = together(&group(size as u32), |rank| {
            let mut cells = start(rank.rank());
            steps.iter().try_for_each(|&step| perform(rank, step, &mut cells)).map(|()| cells)
        });
        for (rank, cells) in got.into_iter().enumerate() {
            prop_assert_eq!(cells.as_ref(), Ok(&expected[rank]), "rank {}", rank);
        }
    }
}

#[test]
fn a_forked_child_is_refused() {
    in_a_process_of_its_own(module_path!(), "a_forked_child_is_refused", || {
        let rank = Comm::solo();
        let ranks = group(2);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // At the moment of a fork a lock of the group's may be held.
            for rank in &ranks {
                scope.spawn(|| {
                    let mut votes = [0];
                    while votes[0] == 0 {
                        votes[0] = i32::from(stop.load(Ordering::Relaxed));
                        rank.all_reduce_in_place(&mut votes, PFC_MAX).unwrap();
                    }
                });
            }
            for _ in 0..20 {
                in_a_forked_child(|| unsafe {
                    let refused = [&rank, &ranks[0]].map(|rank| pfc_comm_barrier(rank.0)) == [PFC_ERROR_FORKED; 2];
                    let refused = refused && pfc_comm_abort(ranks[0].0) == PFC_ERROR_FORKED;
                    pfc_comm_free(ranks[0].0);
                    pfc_comm_free(rank.0);
                    refused
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(rank.barrier(), Ok(()));
    });
}
