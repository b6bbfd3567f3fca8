//! Ranks that make the same exchanges for different reasons: another head, another call, another rate, other rows. Nothing is mixed,
//! and all are told the same.

use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, Device, Failure, Head, Outcome, Rows, PFC_STATE_MOMENTUM};
use partialfc_testing::ranks::on_ranks;

/// Two heads of equal options on each of two ranks, and what `calls` made of them.
fn on_two_heads(placement: Placement, calls: impl Fn(usize, &mut Head, &mut Head) -> Outcome<()> + Sync) -> Vec<Failure> {
    let options = HeadOptions { placement, ..options(10, 4, 8) };
    on_ranks(2, |place| {
        let device = Device::under_test(1);
        let (mut a, mut b) = (Head::new(&device, &place.comm, &options), Head::new(&device, &place.comm, &options));
        calls(place.rank, &mut a, &mut b).expect_err("the ranks disagree")
    })
}

fn step(head: &mut Head, rate: f64) -> Outcome<()> {
    head.step(&mut Rows::f32(&[1.0; 4], 4), &[1], rate, &mut Rows::output(1, 4)).map(|_| ())
}

fn forward(head: &mut Head) -> Outcome<()> {
    head.forward(&mut Rows::f32(&[1.0; 4], 4), Some(&[1])).map(|_| ())
}

#[track_caller]
fn all_mismatch(what: &str, failures: Vec<Failure>, words: &[&str]) {
    for failure in failures {
        assert_refused::<()>(what, Err(failure), Status::Mismatch, words);
    }
}

const BOTH: [Placement; 2] = [Placement::Sharded, Placement::Replicated];

#[test]
fn heads_reached_in_another_order() {
    for placement in BOTH {
        let swapped = on_two_heads(placement, |rank, a, b| step(if rank == 0 { a } else { b }, 0.1));
        all_mismatch("step", swapped, &["rank 0 has called pfc_head_step of head 0", "rank 1 pfc_head_step of head 1"]);
        // A GPU tells of it in the forward that follows.
        let swapped = on_two_heads(placement, |rank, a, b| {
            let head = if rank == 0 { a } else { b };
            head.prepare(&[1])?;
            forward(head)
        });
        all_mismatch("prepare", swapped, &["pfc_head_prepare of head 0", "rank 1", "head 1"]);
    }
}

/// These leave the heads usable: nothing of a step has been exchanged.
#[test]
fn evaluations_of_different_heads() {
    for placement in BOTH {
        let told = on_two_heads(placement, |rank, a, b| {
            step(a, 0.1)?;
            step(b, 0.1)?;
            let head = if rank == 0 { &mut *a } else { &mut *b };
            let metrics = head.metrics().map(|_| ()).expect_err("of different heads");
            assert_refused::<()>("metrics", Err(metrics), Status::Mismatch, &["pfc_head_metrics", "head 0", "head 1"]);
            let top = head.top_k(&mut Rows::f32(&[1.0; 4], 4), 1).map(|_| ()).expect_err("of different heads");
            step(a, 0.1).expect("the ranks are together again");
            Err(top)
        });
        all_mismatch("top_k", told, &["pfc_head_top_k", "head 0", "head 1"]);
    }
}

#[test]
fn different_calls_for_one_step() {
    for placement in BOTH {
        let told = on_two_heads(placement, |rank, a, _| if rank == 0 { forward(a) } else { step(a, 0.1) });
        all_mismatch("forward and step", told, &["pfc_head_forward of head 0", "pfc_head_step of head 0"]);
    }
}

#[test]
fn different_numbers_of_draws_and_updates() {
    for placement in BOTH {
        for progress in [(1, 0), (0, 1)] {
            let told = on_two_heads(placement, |rank, a, _| {
                if rank == 1 {
                    a.write_progress(progress)?;
                }
                step(a, 0.1)
            });
            let there = format!("{} and {} on rank 1", progress.0, progress.1);
            all_mismatch("progress", told, &["different steps", "0 samples drawn and 0 updates done on rank 0", &there]);
        }
    }
}

#[test]
fn different_learning_rates() {
    for placement in BOTH {
        let at_once = on_two_heads(placement, |rank, a, _| step(a, if rank == 0 { 0.1 } else { 0.2 }));
        all_mismatch("step", at_once, &["learning_rate is 0.1 on rank 0 and 0.2 on rank 1"]);
        let later = on_two_heads(placement, |rank, a, _| {
            forward(a)?;
            a.backward(1.0, 1.0, &mut Rows::output(1, 4))?;
            a.update(if rank == 0 { 0.1 } else { 0.2 }).expect("nothing is compared in an update");
            forward(a)
        });
        all_mismatch("update", later, &["learning_rate of the last update is 0.1 on rank 0 and 0.2 on rank 1"]);
    }
}

#[test]
fn different_loss_weights() {
    for placement in BOTH {
        let told = on_two_heads(placement, |rank, a, _| {
            forward(a)?;
            a.backward(if rank == 0 { 0.5 } else { 1.0 }, 1.0, &mut Rows::output(1, 4))?;
            a.update(0.1)?;
            forward(a)
        });
        all_mismatch("backward", told, &["loss_weight of the last backward is 0.5 on rank 0 and 1 on rank 1"]);
    }
}

#[test]
fn different_rows_of_replicas() {
    for tensor in [0, PFC_STATE_MOMENTUM] {
        let told = on_two_heads(Placement::Replicated, |rank, a, _| {
            step(a, 0.1)?;
            let values = [0.25, 0.5, 1.0, if rank == 0 { 1.0 } else { 1.0 + f32::EPSILON }];
            match tensor {
                0 => a.write_centers(7, &values)?,
                _ => a.write_state(tensor, 7, &values)?,
            }
            step(a, 0.1)
        });
        all_mismatch("rows", told, &["overwritten with other values on rank 1 than on rank 0"]);
    }
}

/// However the ranks have come to equal rows, they go on: in other pieces, twice, and with a value that was there.
#[test]
fn equal_rows_of_replicas_written_in_other_ways() {
    let told = on_two_heads(Placement::Replicated, |rank, a, _| {
        step(a, 0.1)?;
        let own = a.read_centers(3, 1)?;
        let (third, fourth) = ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]);
        if rank == 0 {
            a.write_centers(8, &[third, fourth].concat())?;
        } else {
            a.write_centers(9, &third)?;
            a.write_centers(9, &fourth)?;
            a.write_centers(8, &third)?;
            a.write_centers(3, &own)?;
        }
        step(a, 0.1).expect("the rows are equal");
        step(a, if rank == 0 { 0.1 } else { 0.2 })
    });
    all_mismatch("a rate", told, &["learning_rate"]);
}

/// Rows that are brought up to date on one rank alone would differ in their last bits.
#[test]
fn progress_of_dense_replicas_read_on_one_rank_alone() {
    let options = HeadOptions { placement: Placement::Replicated, row_update: RowUpdate::Dense, ..options(10, 4, 8) };
    let told = on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        step(&mut head, 0.1).expect("a step");
        head.read_progress().expect("on all ranks");
        step(&mut head, 0.1).expect("the rows are the same");
        if place.rank == 1 {
            head.read_progress().expect("on one rank");
        }
        step(&mut head, 0.1).expect_err("the rows may differ")
    });
    all_mismatch("progress", told, &["the progress of dense rows has been read or written on one of them alone"]);
}
