//! Heads on a communicator of the caller's functions that fail: with a code, or by never returning.

use std::time::Duration;

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, Comm, Device, Head, Rows};
use partialfc_testing::ranks::{on_comms, LONG};
use partialfc_testing::training::{assert_same_bits, train};
use partialfc_testing::transport::{group, Fault, CODE};

fn placements() -> [HeadOptions; 2] {
    let sharded = options(10, 4, 8);
    [HeadOptions { placement: Placement::Replicated, ..sharded.clone() }, sharded]
}

#[test]
fn a_head_on_a_custom_communicator_gives_the_bits_of_one_on_threads() {
    for options in placements() {
        let expected = on_comms(Comm::threads(3), |place| train(place, &options, 1, 3));
        let (comms, _) = group(3);
        let found = on_comms(comms, |place| train(place, &options, 1, 3));
        assert_same_bits(&format!("{:?}", options.placement), &found, &expected);
    }
}

/// Lets rank 1's `at`-th operation of a step fail; gives what each rank's first failing call said.
fn fail_in_step(options: &HeadOptions, at: i64, fault: Fault, timeout_ms: u64) -> Vec<partialfc_testing::capi::Failure> {
    let (comms, transports) = group(3);
    on_comms(comms, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        place.comm.barrier().expect("all are there");
        place.comm.set_timeout(Duration::from_millis(timeout_ms));
        if fault == Fault::Hang {
            transports[place.rank].silence();
        }
        if place.rank == 1 {
            transports[1].plant(at, fault);
        }
        let mut rows = Rows::f32(&[1.0; 8], 4);
        let mut step = || -> Result<(), partialfc_testing::capi::Failure> {
            head.forward(&mut rows, Some(&[1, 2]))?;
            head.backward(1.0, 1.0, &mut Rows::output(2, 4))?;
            head.update(0.1)
        };
        let what = format!("{:?} operation {at} rank {}", options.placement, place.rank);
        // A rank whose last operation succeeded hears of the failure in the next step.
        let failure = step().and_then(|()| step()).expect_err(&what);
        let refused = head.forward(&mut rows, Some(&[1, 2]));
        let poisoned = assert_refused(&what, refused, Status::Poisoned, &["free it"]);
        let rows = head.read_centers(head.shard().0, 1);
        // An update that failed may have left some rows moved and others not.
        match poisoned.message.contains("which are whole") {
            true => assert!(rows.is_ok(), "{what}: {rows:?}"),
            false => drop(assert_refused(&what, rows, Status::Poisoned, &["load a checkpoint"])),
        }
        if options.placement == Placement::Sharded && !partialfc_testing::capi::on_cuda() {
            assert!(poisoned.message.contains("which are whole"), "{what}: no operation of these is in an update: {poisoned:?}");
        }
        failure
    })
}

/// Operations of a sharded step: A, B, C, D; of a replicated one at rate 1: A, the sums, dW.
fn operations(options: &HeadOptions) -> i64 {
    if options.placement == Placement::Sharded {
        4
    } else {
        3
    }
}

#[test]
fn a_function_that_returns_a_code_is_comm_with_its_text_and_poisons() {
    for options in placements() {
        for at in 0..operations(&options) {
            let failures = fail_in_step(&options, at, Fault::Code, LONG.as_millis() as u64);
            let what = format!("{:?} operation {at}", options.placement);
            let code = CODE.to_string();
            let words = ["rank 1", code.as_str(), "cable 4242 is cut"];
            assert_refused::<()>(&what, Err(failures[1].clone()), Status::Comm, &words);
            for rank in [0, 2] {
                // They hear of it through their own functions, which the group of threads ended, or through the library.
                let told = [Status::Comm as i32, Status::Aborted as i32];
                assert!(told.contains(&failures[rank].status), "{what} rank {rank}: {:?}", failures[rank]);
            }
        }
    }
}

#[test]
fn a_function_that_never_returns_is_timeout_on_all_ranks_and_poisons() {
    for options in placements() {
        for at in 0..operations(&options) {
            for (rank, failure) in fail_in_step(&options, at, Fault::Hang, 500).into_iter().enumerate() {
                let what = format!("{:?} operation {at} rank {rank}", options.placement);
                assert_refused::<()>(&what, Err(failure), Status::Timeout, &["500 ms"]);
            }
        }
    }
}

#[test]
fn a_failing_function_during_creation_gives_no_head() {
    let (comms, transports) = group(2);
    on_comms(comms, |place| {
        if place.rank == 1 {
            transports[1].plant(0, Fault::Code);
        }
        let refused = Head::with(&Device::under_test(1), &place.comm, &options(10, 4, 8)).map(|_| ());
        match place.rank {
            1 => assert_refused("rank 1", refused, Status::Comm, &["4242"]),
            _ => {
                let failure = refused.expect_err("rank 1 failed");
                assert!([Status::Comm as i32, Status::Aborted as i32].contains(&failure.status), "{failure:?}");
                failure
            }
        };
    });
}
