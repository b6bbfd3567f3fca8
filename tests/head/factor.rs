//! An update whose gradient is multiplied: by what a loss weight would have done, or not at all.

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{assert_failed, options, Device, Head, Rows};
use partialfc_testing::numbers::{assert_close, widen};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{assert_same_bits, batch_rows, learning_rate, ways_to_update, Batch, Trace};

const NO_POINTER: *const f32 = std::ptr::null();

fn heads() -> Vec<HeadOptions> {
    ways_to_update(&HeadOptions { sample_rate: 0.5, ..options(37, 9, 8) })
}

/// Steps whose updates `update` does.
fn train(place: &Rank, options: &HeadOptions, weight: f64, steps: usize, update: impl Fn(&mut Head, usize)) -> Trace {
    let mut head = Head::new(&Device::under_test(2), &place.comm, options);
    let mut trace = Trace::default();
    for step in 0..steps {
        let batch = Batch::draw(options, place.rank, step, batch_rows(options, place.rank, step));
        let mut grad = Rows::output(batch.labels.len(), head.dim);
        let loss = head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
        head.backward(weight, 1.0, &mut grad).expect("backward");
        let sample = head.sample_ids().expect("the sample");
        update(&mut head, step);
        trace.saw_step(loss, &grad, sample);
    }
    trace.saw_rows(&mut head, options);
    trace
}

/// What a head of steps `skipped` at the end of which nothing was updated has for its figures.
fn skip(head: &mut Head, factor: f64, device_factor: *const f32) {
    let before = head.last_metrics().expect("metrics");
    head.update_with(0.1, factor, device_factor).expect("a skipped update succeeds");
    let after = head.last_metrics().expect("metrics");
    assert_eq!((after.updates, after.skipped_updates), (before.updates, before.skipped_updates + 1));
    assert_eq!((after.loss, after.grad_centers_norm), (before.loss, 0.0));
    assert_failed(&head.update(0.1), Status::InvalidArgument as i32, &["pfc_head_update", "idle"]);
}

#[test]
fn a_factor_of_1_is_an_update() {
    for options in heads() {
        let plain =
            on_ranks(2, |place| train(place, &options, 1.0, 4, |head, step| head.update(learning_rate(step)).expect("update")));
        let with = on_ranks(2, |place| {
            train(place, &options, 1.0, 4, |head, step| head.update_with(learning_rate(step), 1.0, NO_POINTER).expect("update"))
        });
        assert_same_bits(&format!("{options:?}"), &with, &plain);
    }
}

#[test]
fn a_factor_is_a_weight_of_the_loss() {
    for options in heads() {
        for (factor, device_factor) in [(0.25, 1.0f32), (0.5, 0.5), (8.0, 0.03125)] {
            let weighted = on_ranks(3, |place| {
                train(place, &options, 0.25, 4, |head, step| head.update(learning_rate(step)).expect("update"))
            });
            let with = on_ranks(3, |place| {
                train(place, &options, 1.0, 4, |head, step| {
                    head.update_with(learning_rate(step), factor, &device_factor).expect("update");
                    let norm = head.metrics().expect("metrics").grad_centers_norm;
                    assert!(norm > 0.0 && norm.is_finite());
                })
            });
            for (with, weighted) in with.iter().zip(&weighted) {
                assert_close("W", &with.centers(), &weighted.centers(), 1e-5);
                assert_close("momentum", &with.momentum(), &weighted.momentum(), 1e-5);
            }
        }
    }
}

/// Plain descent without decay: a factor of -1 goes back by as much as 1 goes forth, and 0 stays.
#[test]
fn a_factor_may_be_negative_or_0() {
    let sgd = partialfc::optimizer::Sgd { momentum: 0.0, weight_decay: 0.0 };
    let optimizer = partialfc::optimizer::Optimizer::Sgd(sgd);
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, optimizer, ..options(20, 5, 8) };
        let moved = |factor: f64| {
            on_ranks(2, |place| {
                let start = widen(&Head::new(&Device::under_test(1), &place.comm, &options).centers());
                let trace = train(place, &options, 1.0, 1, |head, _| head.update_with(0.5, factor, NO_POINTER).expect("update"));
                trace.centers().iter().zip(&start).map(|(now, before)| now - before).collect::<Vec<f64>>()
            })
            .concat()
        };
        let (forth, back, not) = (moved(1.0), moved(-1.0), moved(0.0));
        assert!(forth.iter().any(|x| *x != 0.0) && not.iter().all(|x| *x == 0.0));
        assert_close("back", &back.iter().map(|x| -x).collect::<Vec<f64>>(), &forth, 1e-5);
    }
}

/// Skipped steps leave rows, state and the number of updates alone, whatever made the factor useless.
#[test]
fn an_update_is_skipped_where_the_factor_is_not_finite() {
    let wrong: [(f64, f32); 5] = [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, f32::NAN), (0.5, f32::NEG_INFINITY), (1e30, 1e30)];
    for options in heads() {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let mut seen: Vec<Trace> = Vec::new();
            for (step, (factor, device_factor)) in wrong.into_iter().enumerate() {
                let batch = Batch::draw(&options, place.rank, step, 4);
                head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
                head.backward(1.0, 1.0, &mut Rows::output(4, head.dim)).expect("backward");
                // The first time with something to be lost: momentum, and rows that lag.
                match step {
                    0 => head.update(0.1).expect("update"),
                    _ => skip(&mut head, factor, &device_factor),
                }
                let mut trace = Trace::default();
                trace.saw_rows(&mut head, &options);
                seen.push(trace);
            }
            for trace in &seen[1..] {
                assert_same_bits(&format!("{options:?}"), std::slice::from_ref(trace), &seen[..1]);
            }
            assert_eq!(head.metrics().expect("metrics").skipped_updates, 4);
        });
    }
}

#[test]
fn wrong_options_change_nothing() {
    use partialfc_testing::capi::{outcome, pfc_update_options};
    on_ranks(1, |place| {
        let options = options(20, 5, 8);
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let batch = Batch::draw(&options, 0, 0, 4);
        head.forward(&mut batch.rows(5), Some(&batch.labels)).expect("forward");
        head.backward(1.0, 1.0, &mut Rows::output(4, 5)).expect("backward");
        let invalid = Status::InvalidArgument as i32;
        assert_failed(&head.update_with(-1.0, 1.0, NO_POINTER), invalid, &["learning_rate", "-1"]);
        let odd = [0u8; 12];
        assert_failed(
            &head.update_with(0.1, 1.0, odd.as_ptr().wrapping_add(1 + odd.as_ptr() as usize % 2).cast()),
            invalid,
            &["device_factor"],
        );
        // SAFETY: a live head; options of their own size, wrong in one way each.
        unsafe {
            use partialfc::capi::update as c;
            let mut wrong: pfc_update_options = std::mem::zeroed();
            outcome(c::pfc_update_options_init_sized(&mut wrong, size_of::<pfc_update_options>() as u64)).expect("defaults");
            assert_failed(&outcome(c::pfc_head_update_with(head.raw, &wrong)), invalid, &["learning_rate", "NaN"]);
            wrong.learning_rate = 0.1;
            wrong.reserved = 7;
            assert_failed(&outcome(c::pfc_head_update_with(head.raw, &wrong)), invalid, &["reserved", "7"]);
            wrong.struct_size = 3;
            assert_failed(&outcome(c::pfc_head_update_with(head.raw, &wrong)), invalid, &["pfc_update_options", "3"]);
            assert_failed(&outcome(c::pfc_head_update_with(head.raw, std::ptr::null())), invalid, &["pfc_update_options"]);
            // Only the fields that an older caller has.
            (wrong.struct_size, wrong.learning_rate, wrong.factor, wrong.reserved) = (16, 0.1, f64::NAN, 7);
            outcome(c::pfc_head_update_with(head.raw, &wrong)).expect("a struct of two fields");
        }
        assert_eq!(head.last_metrics().expect("metrics").updates, 1);
    });
}

/// Ranks that multiply by other factors, or of which one skips the update, learn of it in the next step, and none waits.
#[test]
fn other_factors_on_other_ranks_are_a_mismatch() {
    for options in heads() {
        for (factors, words) in
            [([0.5, 0.25], ["0.5 on rank 0", "0.25 on rank 1"]), ([f64::NAN, 1.0], ["not finite on rank 0", "1 on rank 1"])]
        {
            on_ranks(2, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                for step in 0..2 {
                    let batch = Batch::draw(&options, place.rank, step, 4);
                    let told = head.forward(&mut batch.rows(head.dim), Some(&batch.labels));
                    if step == 1 {
                        assert_failed(&told.map(drop), Status::Mismatch as i32, &["factor", words[0], words[1]]);
                        break;
                    }
                    head.backward(1.0, 1.0, &mut Rows::output(4, head.dim)).expect("backward");
                    head.update_with(0.1, factors[place.rank], NO_POINTER).expect("nothing is compared in an update");
                }
            });
        }
    }
    // What cannot be multiplied by is the same, whatever it is.
    on_ranks(2, |place| {
        let options = &heads()[0];
        let trace = train(place, options, 1.0, 3, |head, _| {
            head.update_with(0.1, [f64::NAN, f64::NEG_INFINITY][place.rank], NO_POINTER).expect("skipped");
        });
        assert_eq!(trace.losses.len(), 3);
    });
}
