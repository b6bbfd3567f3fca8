//! `PFC_CHECK=1`: ranks that make different calls are told which, before any data moves.

mod common;
#[path = "ranks/mod.rs"]
mod ranks;

use common::ffi::{options, Comm, Device, Head};
use common::ranks::on_comms;
use common::training::{assert_same_bits, train};
use partialfc::capi::comm::*;
use partialfc::capi::status::*;
use partialfc::capi::types::*;
use ranks::{alone, assert_failed, group, together, Outcome, Rank};

fn all_reduce(rank: &Rank, count: usize, op: i32) -> Outcome {
    let mut values = vec![1f64; count];
    // SAFETY: a live handle and as many values.
    let status = unsafe {
        pfc_comm_all_reduce(rank.handle(), values.as_ptr().cast(), values.as_mut_ptr().cast(), count as u64, PFC_F64, op)
    };
    if status == PFC_OK {
        Ok(())
    } else {
        Err((status, ranks::last_error()))
    }
}

fn barrier(rank: &Rank) -> Outcome {
    // SAFETY: a live handle.
    match unsafe { pfc_comm_barrier(rank.handle()) } {
        PFC_OK => Ok(()),
        status => Err((status, ranks::last_error())),
    }
}

/// One test: the environment is the process's, and it is read when a communicator is made.
#[test]
fn calls_that_differ_are_a_mismatch_on_all_ranks() {
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("PFC_CHECK", "1") };

    let words = ["PFC_CHECK", "rank 0 is about to run all_reduce #2 of 3 f64 (sum)"];
    type Call = fn(&Rank) -> Outcome;
    let cases: [(&str, Call); 3] = [
        ("rank 1 all_reduce #2 of 4 f64 (sum)", |rank| all_reduce(rank, 3 + rank.rank().min(1), PFC_SUM)),
        ("rank 2 all_reduce #2 of 3 f64 (max)", |rank| all_reduce(rank, 3, if rank.rank() == 2 { PFC_MAX } else { PFC_SUM })),
        ("rank 1 barrier #2", |rank| if rank.rank() == 1 { barrier(rank) } else { all_reduce(rank, 3, PFC_SUM) }),
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
        for outcome in together(&ranks, barrier) {
            assert_failed(&outcome, PFC_ERROR_ABORTED, &["had ended"]);
        }
    }
    barrier(&alone()).expect("nobody to compare with");

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
