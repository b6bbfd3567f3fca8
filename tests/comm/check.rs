//! `PFC_CHECK=1`: ranks that make different calls are told which, before any data moves.

use std::path::PathBuf;
use std::ptr::null_mut;

use partialfc::capi::comm::{pfc_comm_self, pfc_comm_threads, PFC_MAX, PFC_SUM};
use partialfc::capi::status::*;
use partialfc_testing::capi::{assert_failed, options, outcome, Comm, Outcome};
use partialfc_testing::processes::run_alone;
use partialfc_testing::ranks::{group, on_comms, together};
use partialfc_testing::training::train;

fn all_reduce(rank: &Comm, count: usize, op: i32) -> Outcome {
    rank.all_reduce_in_place(&mut vec![1f64; count], op)
}

/// What heads do that train on two ranks, and the bytes that they gather.
fn trained() -> String {
    let options = options(30, 6, 8);
    let run = |comms| on_comms(comms, |place| (train(place, &options, 1, 3), place.comm.traffic().all_gather_bytes));
    format!("{:?}", run(Comm::threads(2)))
}

/// Where the process with PFC_CHECK leaves that for the one without.
fn left_by(process: u32) -> PathBuf {
    std::env::temp_dir().join(format!("pfc-check-{process}"))
}

/// One test, in a process of its own: the environment is the process's, and it is read when the first communicator is made.
#[test]
fn calls_that_differ_are_a_mismatch_on_all_ranks() {
    if std::env::var_os("PFC_CHECK").is_none() {
        run_alone(module_path!(), "calls_that_differ_are_a_mismatch_on_all_ranks", "PFC_CHECK", "1");
        // Heads train as with it, and the comparisons are not in the traffic.
        let left = left_by(std::process::id());
        let checked = std::fs::read_to_string(&left).expect("what the other process left");
        std::fs::remove_file(left).expect("the file goes");
        assert!(checked == trained(), "with PFC_CHECK heads do something else");
        return;
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

    std::fs::write(left_by(std::os::unix::process::parent_id()), trained()).expect("a file for the process without");
}

/// Each value in a process of its own, which makes a communicator of every kind.
#[test]
fn values_that_are_no_switch_are_refused() {
    const TEST: &str = "values_that_are_no_switch_are_refused";
    const REFUSED: [&str; 3] = ["2", "enable", " 1"];
    let Some(value) = std::env::var_os("PFC_CHECK") else {
        ["1", "Yes", "on", "TRUE", "0", "no", "off", ""].iter().chain(&REFUSED).for_each(|value| {
            run_alone(module_path!(), TEST, "PFC_CHECK", value);
        });
        return;
    };
    let value = value.to_str().expect("a value of this test");
    let mut comms = [null_mut(); 2];
    let made = outcome(unsafe { pfc_comm_threads(2, comms.as_mut_ptr()) });
    let mut one = null_mut();
    let alone = outcome(unsafe { pfc_comm_self(&mut one) });
    if REFUSED.contains(&value) {
        for refused in [made, alone] {
            assert_failed(&refused, PFC_ERROR_INVALID_ARGUMENT, &["PFC_CHECK must be 1, true, yes or on", &format!("{value:?}")]);
        }
        assert_eq!((comms, one), ([null_mut(); 2], null_mut()));
        return;
    }
    made.and(alone).expect("a switch");
    let ranks: Vec<Comm> = comms.into_iter().chain([one]).map(Comm).collect();
    // Ranks that differ in nothing but a maximum or a sum: only the comparison sees it before it happens.
    let outcomes = together(&ranks[..2], |rank| all_reduce(rank, 3, if rank.rank() == 1 { PFC_MAX } else { PFC_SUM }));
    let checks = outcomes.iter().all(|outcome| outcome.as_ref().is_err_and(|failure| failure.message.contains("PFC_CHECK")));
    assert_eq!(checks, ["1", "Yes", "on", "TRUE"].contains(&value), "{value:?}: {outcomes:?}");
}
