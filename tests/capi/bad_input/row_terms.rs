//! Margins and weights of the rows' own that are none, and arrays that cannot be used: every rank hears of it, and the head works on.

use partialfc::capi::forward as c;
use partialfc::capi::types::pfc_matrix;
use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, outcome, Device, Head, Outcome, Rows};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{assert_same_bits, train_step, Batch, Trace};

const DIM: usize = 6;
const ROWS: usize = 4;

/// Rate 1: no draw, so that a step that came to nothing does not change the next one's sample.
fn heads(row_terms: bool) -> [HeadOptions; 2] {
    [Placement::Sharded, Placement::Replicated].map(|placement| HeadOptions {
        placement,
        row_terms,
        ignore_label: Some(-1),
        ..options(20, DIM as u32, 9)
    })
}

/// Asserts that a run with a fault before each step is, bit for bit, the one without.
fn works_on(options: &HeadOptions, fault: impl Fn(&mut Head, &Rank, &str) + Sync) {
    let run = |faulty: bool| {
        on_ranks(3, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, options);
            let mut trace = Trace::default();
            for step in 0..2 {
                if faulty {
                    fault(&mut head, place, &format!("{:?}, rank {}, before step {step}", options.placement, place.rank));
                }
                train_step(&mut head, place, options, step, &mut trace);
            }
            trace.saw_rows(&mut head, options);
            trace
        })
    };
    assert_same_bits(&format!("{:?}", options.placement), &run(true), &run(false));
}

fn batch(place: &Rank) -> Batch {
    Batch::draw(&options(20, DIM as u32, 9), place.rank, 77, ROWS)
}

#[test]
fn values_out_of_range_are_named_on_all_ranks() {
    let wrong = [
        (0, -3.15, "m2[2] must be -pi to pi, in radians, got -3.15 (rank 1)"),
        (0, 3.15, "m2[2] must be -pi to pi, in radians, got 3.15 (rank 1)"),
        (0, f32::NAN, "m2[2] must be -pi to pi, in radians, got NaN (rank 1)"),
        (1, 2.5, "m3[2] must be 0 to 2, got 2.5 (rank 1)"),
        (1, f32::NEG_INFINITY, "m3[2] must be 0 to 2, got -inf (rank 1)"),
        (2, -1.0, "weight[2] must be a finite float32 of at least 0, got -1.0 (rank 1)"),
        (2, f32::INFINITY, "weight[2] must be a finite float32 of at least 0, got inf (rank 1)"),
        (2, f32::NAN, "weight[2] must be a finite float32 of at least 0, got NaN (rank 1)"),
    ];
    for options in heads(true) {
        works_on(&options, |head, place, what| {
            for (term, value, text) in wrong {
                let batch = batch(place);
                let mut terms = [None, None, None];
                if place.rank == 1 {
                    let mut values = vec![0.5; ROWS];
                    values[2] = value;
                    // Ranks tell the first.
                    values[3] = -7.0;
                    terms[term] = Some(values);
                }
                let told = head.forward_with(&mut batch.rows(DIM), Some(&batch.labels), &terms);
                assert_refused(what, told, Status::InvalidArgument, &[text]);
                assert_refused(what, head.backward(1.0, 1.0, &mut Rows::output(ROWS, DIM)), Status::InvalidArgument, &["idle"]);
            }
        });
    }
}

#[test]
fn the_ends_of_the_ranges_and_ignored_rows_are_fine() {
    for options in heads(true) {
        on_ranks(3, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let mut batch = batch(place);
            batch.labels[1] = -1;
            let (pi, nan) = (std::f32::consts::PI, f32::NAN);
            let terms = [vec![0.0, nan, pi, -pi], vec![2.0, nan, 0.0, 2.0], vec![1e30, nan, 0.0, 1e-40]].map(Some);
            let loss = head.forward_with(&mut batch.rows(DIM), Some(&batch.labels), &terms).expect("values at the ends");
            assert!(loss.is_finite());
            let margins = head.backward_with(1e-30, 1.0, &mut Rows::output(ROWS, DIM)).expect("backward");
            assert_eq!(margins.map(|of| of[1]), [0.0; 2], "an ignored row");
        });
    }
}

/// What this rank alone has done wrong: its own error here, REMOTE there.
fn assert_refused_alone(what: &str, place: &Rank, told: Outcome<f64>, words: &[&str]) {
    match place.rank {
        1 => assert_refused(what, told, Status::InvalidArgument, words),
        _ => assert_refused(what, told, Status::Remote, &["rank 1", "INVALID_ARGUMENT"]),
    };
}

#[test]
fn a_head_without_row_terms_takes_no_arrays() {
    for options in heads(false) {
        works_on(&options, |head, place, what| {
            let batch = batch(place);
            for term in 0..3 {
                let mut terms = [None, None, None];
                if place.rank == 1 {
                    terms[term] = Some(vec![0.5; ROWS]);
                }
                let told = head.forward_with(&mut batch.rows(DIM), Some(&batch.labels), &terms);
                assert_refused_alone(what, place, told, &[["m2", "m3", "weight"][term], "row_terms", "rank 1"]);
            }
        });
        // Nor gives it gradients of margins: the rank goes on all the same.
        on_ranks(3, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let (batch, mut grad, mut margins) = (batch(place), Rows::output(ROWS, DIM), [-5f32; ROWS]);
            head.forward_with(&mut batch.rows(DIM), Some(&batch.labels), &[None, None, None]).expect("defaults");
            let told = head.backward_by(&mut grad, |options| {
                if place.rank == 1 {
                    options.grad_m3 = margins.as_mut_ptr();
                }
            });
            match place.rank {
                1 => drop(assert_refused("backward", told, Status::InvalidArgument, &["grad_m3", "row_terms", "rank 1"])),
                _ => told.expect("backward"),
            }
            assert!(grad.values().iter().any(|&g| g != -123.0) && margins == [-5.0; ROWS]);
            head.update(0.1).expect("update");
        });
    }
}

#[test]
fn options_and_pointers_that_cannot_be_used_are_refused_by_name() {
    let odd = |array: &[f32]| array.as_ptr().cast::<u8>().wrapping_add(1).cast::<f32>();
    for options in heads(true) {
        works_on(&options, |head, place, what| {
            let (batch, array) = (batch(place), [0.5f32; ROWS + 1]);
            let bad = place.rank == 1;
            type Set = fn(&mut c::pfc_forward_options, *const f32);
            let cases: [(Set, &[&str]); 5] = [
                (|o, odd| o.m2 = odd, &["m2", "aligned"]),
                (|o, odd| o.weight = odd, &["weight", "aligned"]),
                (|o, _| o.m3 = (usize::MAX - 7) as *const f32, &["m3", "address space"]),
                (|o, _| o.reserved = 3, &["reserved", "3"]),
                (|o, _| o.struct_size = 3, &["pfc_forward_options", "3"]),
            ];
            for (set, words) in cases {
                let told = head.forward_by(&mut batch.rows(DIM), Some(&batch.labels), |options| {
                    if bad {
                        set(options, odd(&array));
                    }
                });
                assert_refused_alone(what, place, told, words);
            }
            // SAFETY: a live head; a matrix and labels of the batch; NULL options, on one rank.
            let told = unsafe {
                let (mut rows, mut loss) = (batch.rows(DIM), -1.0);
                let (view, mut defaults): (pfc_matrix, c::pfc_forward_options) = (rows.view(), std::mem::zeroed());
                let size = size_of::<c::pfc_forward_options>() as u64;
                outcome(c::pfc_forward_options_init_sized(&mut defaults, size)).expect("defaults");
                let given = if bad { std::ptr::null() } else { &raw const defaults };
                let told = outcome(c::pfc_head_forward_with(head.raw, &view, batch.labels.as_ptr(), given, &mut loss));
                assert_eq!(loss, -1.0, "{what}");
                told.map(|()| loss)
            };
            assert_refused_alone(what, place, told, &["pfc_forward_options", "NULL"]);
        });
    }
}

#[test]
fn a_backward_with_a_wrong_array_is_an_error_on_its_own_rank() {
    for options in heads(true) {
        on_ranks(3, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let (batch, mut grad, mut good, odd) = (batch(place), Rows::output(ROWS, DIM), [-5f32; ROWS], [-5f32; ROWS + 1]);
            head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
            let told = head.backward_by(&mut grad, |options| {
                options.grad_m2 = good.as_mut_ptr();
                if place.rank == 1 {
                    options.grad_m3 = odd.as_ptr().cast::<u8>().wrapping_add(1).cast_mut().cast();
                }
            });
            match place.rank {
                1 => drop(assert_refused("backward", told, Status::InvalidArgument, &["grad_m3", "aligned"])),
                _ => {
                    told.expect("backward");
                    assert!(good.iter().all(|&g| g != -5.0), "{good:?}");
                }
            }
            assert_eq!(odd, [-5.0; ROWS + 1]);
            assert!(grad.values().iter().all(|&g| g != -123.0));
            head.update(0.1).expect("update");

            // A weight that is none abandons the step.
            head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
            let told = head.backward_by(&mut grad, |options| options.loss_weight = f64::NAN);
            assert_refused("backward", told, Status::InvalidArgument, &["loss_weight", "NaN"]);
            assert_refused("update", head.update(0.1), Status::InvalidArgument, &["idle"]);
            head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
        });
    }
}
