//! `PFC_CHECK=1`: ranks that make different calls are told which, before any data moves.

use partialfc::capi::comm::{PFC_MAX, PFC_SUM};
use partialfc::capi::status::*;
use partialfc_testing::capi::{assert_failed, options, Comm, Device, Head, Outcome};
use partialfc_testing::processes::run_alone;
use partialfc_testing::ranks::{group, on_comms, together};
use partialfc_testing::training::{assert_same_bits, train};

fn all_reduce(rank: &Comm, count: usize, op: i32) -> Outcome {
    rank.all_reduce_in_place(&mut vec![1f64; count], op)
}

/// One test, in a process of its own: the environment is the process's, and it is read when a communicator is made.
#[test]
fn calls_that_differ_are_a_mismatch_on_all_ranks() {
    if std::env::var_os("PFC_CHECK").is_none() {
        return run_alone(module_path!(), "calls_that_differ_are_a_mismatch_on_all_ranks", "PFC_CHECK", "1");
    }
    let words = ["PFC_CHECK", "rank 0 is about to run all_reduce #2 of 3 f64 (sum)"];
    type Call = fn(&Comm) -> Outcome;
    let cases: [(&str, Call); 3] = [
        ("rank 1 all_reduce #2 of 4 f64 (sum)", |rank| all_reduce(rank, 3 + rank.rank().min(1), PFC_SUM)),
        ("rank 2 all_reduce #2 of 3 f64 (max)", |rank| all_reduce(rank, 3, if rank.rank() == 2 { PFC_MAX } else { PFC_SUM })),
        ("rank 1 barrier #2", |rank| if rank.rank() == 1 { rank.barrier() } else { all_reduce(rank, 3, PFC_SUM) }),
    ];
    for (told, call) in cases {
        let ranks = group(3);
        for outcome in together(&ranks, |rank| all_reduce(rank, 5, PFC_SUM)) {
            outcome.expect("ranks that agree");
        }
        for outcome in together(&ranks, call) {
            assert_failed(&outcome, PFC_ERROR_MISMATCH, &[words[0], words[1], told]);
        }
        // They never line up again.
        for outcome in together(&ranks, Comm::barrier) {
            assert_failed(&outcome, PFC_ERROR_ABORTED, &["had ended"]);
        }
    }
    Comm::solo().barrier().expect("nobody to compare with");

    // Heads train as without, and the comparisons are not in the traffic.
    let options = options(30, 6, 8);
    let run = |comms: Vec<Comm>| on_comms(comms, |place| (train(place, &options, 1, 3), place.comm.traffic().all_gather_bytes));
    let checked = run(Comm::threads(2));
    // SAFETY: the ranks' threads have ended.
    unsafe { std::env::remove_var("PFC_CHECK") };
    let plain = run(Comm::threads(2));
    let (checked, checked_bytes): (Vec<_>, Vec<_>) = checked.into_iter().unzip();
    let (plain, plain_bytes): (Vec<_>, Vec<_>) = plain.into_iter().unzip();
    assert_same_bits("PFC_CHECK", &checked, &plain);
    assert_eq!(checked_bytes, plain_bytes);
    drop(Head::new(&Device::under_test(1), &Comm::solo(), &options));
}
