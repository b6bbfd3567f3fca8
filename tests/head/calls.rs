//! What one call leaves for the next: which calls abandon a step and which do not, and that nothing of an earlier call's arguments is
//! left.

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{assert_failed, options, Device, Head, Outcome, Rows};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{bits, Batch, ADAMW};

const ROWS: usize = 3;
const MOMENTUM: i32 = 1;
const SECOND_MOMENT: i32 = 2;

fn placements() -> [HeadOptions; 2] {
    let sharded = HeadOptions { sample_rate: 0.5, optimizer: ADAMW, ..options(30, 5, ROWS as u64) };
    [HeadOptions { placement: Placement::Replicated, ..sharded.clone() }, sharded]
}

fn head(place: &Rank, options: &HeadOptions) -> Head {
    Head::new(&Device::cpu(1), &place.comm, options)
}

fn batch(options: &HeadOptions, place: &Rank, step: usize) -> (Rows, Vec<i64>) {
    let batch = Batch::draw(options, place.rank, step, ROWS);
    (batch.rows(options.embedding_dim as usize), batch.labels)
}

fn forward(head: &mut Head, options: &HeadOptions, place: &Rank, step: usize) -> f64 {
    let (mut rows, labels) = batch(options, place, step);
    head.forward(&mut rows, Some(&labels)).expect("forward")
}

/// Everything a step gives, in bits.
fn step(head: &mut Head, options: &HeadOptions, place: &Rank, number: usize) -> Vec<u32> {
    let (mut rows, labels) = batch(options, place, number);
    let mut grad = Rows::output(ROWS, head.dim);
    let loss = head.step(&mut rows, &labels, 0.1, &mut grad).expect("step");
    let figures = head.metrics().expect("metrics");
    let norms = [loss as f32, figures.grad_embeddings_norm as f32, figures.grad_centers_norm as f32];
    [bits(&norms), bits(&grad.values_f32()), bits(&head.centers()), bits(&head.momentum()), bits(&head.second_moment())].concat()
}

type Call = fn(&mut Head) -> Outcome;

fn write(head: &mut Head, tensor: Option<i32>) -> Outcome {
    let (first, _) = head.shard();
    let values = vec![0.25; head.dim];
    match tensor {
        None => head.write_centers(first, &values),
        Some(tensor) => head.write_state(tensor, first, &values),
    }
}

#[test]
fn what_writes_rows_abandons_the_step() {
    let writes: [(&str, Call); 3] = [
        ("write_centers", |head| write(head, None)),
        ("write_state of the momentum", |head| write(head, Some(MOMENTUM))),
        ("write_state of the second moment", |head| write(head, Some(SECOND_MOMENT))),
    ];
    for options in placements() {
        for (what, write) in writes {
            on_ranks(2, |place| {
                let mut head = head(place, &options);
                let mut grad = Rows::output(ROWS, head.dim);
                forward(&mut head, &options, place, 0);
                write(&mut head).expect(what);
                let refused = head.backward(1.0, 1.0, &mut grad);
                assert_failed(&refused, Status::InvalidArgument as i32, &["pfc_head_backward", "idle"]);
                forward(&mut head, &options, place, 1);
                head.backward(1.0, 1.0, &mut grad).expect("backward");
                write(&mut head).expect(what);
                let refused = head.update(0.1);
                assert_failed(&refused, Status::InvalidArgument as i32, &["pfc_head_update", "idle"]);
                // Neither step has updated anything, and the next one is whole.
                step(&mut head, &options, place, 2);
                assert_eq!(head.metrics().expect("metrics").updates, 1, "{what}");
            });
        }
    }
}

#[test]
fn a_wrong_weight_abandons_the_step() {
    for options in placements() {
        on_ranks(2, |place| {
            let mut head = head(place, &options);
            for (weight, scale) in [(f64::NAN, 1.0), (-1.0, 1.0), (1.0, f64::INFINITY)] {
                let mut grad = Rows::output(ROWS, head.dim);
                forward(&mut head, &options, place, 0);
                assert_eq!(
                    head.backward(weight, scale, &mut grad).expect_err("a wrong weight").status,
                    Status::InvalidArgument as i32
                );
                assert_failed(&head.update(0.1), Status::InvalidArgument as i32, &["pfc_head_update", "idle"]);
            }
        });
    }
}

/// The bits of a step with a call between its parts are those of the step without it.
#[test]
fn what_only_reads_or_fails_leaves_the_step_alone() {
    let calls: [(&str, Call); 11] = [
        ("nothing", |_| Ok(())),
        ("read_centers", |head| head.read_centers(head.shard().0, 1).map(drop)),
        ("read_state", |head| head.read_state(MOMENTUM, head.shard().0, 1).map(drop)),
        ("sample_ids", |head| head.sample_ids().map(drop)),
        ("metrics", |head| head.metrics().map(drop)),
        ("top_k", |head| head.top_k(&mut Rows::f32(&[0.5; 5], 5), 3).map(drop)),
        ("wait", |head| head.wait()),
        ("a write of rows beyond the shard", |head| {
            head.write_centers(head.shard().0 + head.shard().1, &[0.25; 5]).expect_err("no such row");
            Ok(())
        }),
        ("a write of NaN", |head| {
            head.write_centers(head.shard().0, &[f32::NAN; 5]).expect_err("not finite");
            Ok(())
        }),
        ("a write of a state that is none", |head| {
            head.write_state(3, head.shard().0, &[0.25; 5]).expect_err("no such state");
            Ok(())
        }),
        ("a call out of order", |head| {
            // Right after a backward it is the second one, before it an update without one.
            match head.metrics().expect("metrics").grad_embeddings_norm > 0.0 {
                true => head.backward(0.5, 1.0, &mut Rows::output(ROWS, 5)).expect_err("the second backward"),
                false => head.update(0.7).expect_err("an update without a backward"),
            };
            Ok(())
        }),
    ];
    for options in placements() {
        let run = |what: &str, call: Call| {
            on_ranks(2, |place| {
                let mut head = head(place, &options);
                let mut grad = Rows::output(ROWS, head.dim);
                let loss = forward(&mut head, &options, place, 0);
                call(&mut head).expect(what);
                head.backward(1.0, 1.0, &mut grad).expect(what);
                call(&mut head).expect(what);
                head.update(0.1).expect(what);
                let rows = [bits(&grad.values_f32()), bits(&head.centers()), bits(&head.momentum())].concat();
                (loss.to_bits(), rows, step(&mut head, &options, place, 1))
            })
        };
        let alone = run("nothing", |_| Ok(()));
        for (what, call) in calls {
            assert_eq!(run(what, call), alone, "{:?}: {what}", options.placement);
        }
    }
}

/// A step by itself weighs 1 and learns at its own rate, whatever the calls before it were given.
#[test]
fn nothing_is_left_of_an_earlier_call_s_arguments() {
    // Whether a step of its own weight and rate is also finished.
    for options in placements() {
        let run = |weight: f64, scale: f64, whole: bool| {
            on_ranks(2, |place| {
                let mut head = head(place, &options);
                let mut grad = Rows::output(ROWS, head.dim);
                forward(&mut head, &options, place, 0);
                head.backward(weight, scale, &mut grad).expect("backward");
                if !whole {
                    // A wrong rate may be repeated; here it is left at that, and the step is abandoned.
                    head.update(f64::NAN).expect_err("a wrong rate");
                }
                [step(&mut head, &options, place, 1), step(&mut head, &options, place, 2)]
            })
        };
        let plain = run(1.0, 1.0, true);
        assert_eq!(run(0.5, 64.0, true), plain, "{:?}: a weight", options.placement);
        assert_eq!(run(0.0, 0.0, false), plain, "{:?}: a weight of 0 and a wrong rate", options.placement);
    }
}

/// The ranks compare how far they are: here one counter at a time differs.
#[test]
fn ranks_of_different_counters_are_told_apart() {
    for options in placements() {
        for skips_update in [true, false] {
            on_ranks(2, |place| {
                let mut a = head(place, &options);
                let mut grad = Rows::output(ROWS, a.dim);
                forward(&mut a, &options, place, 0);
                if skips_update {
                    // An update of a sharded head is no collective: nothing else tells the others.
                    a.backward(1.0, 1.0, &mut grad).expect("backward");
                    if options.placement == Placement::Replicated {
                        return;
                    }
                    if place.rank == 0 {
                        a.update(0.1).expect("update");
                    }
                }
                if !skips_update && place.rank == 1 {
                    // Draws alone.
                    a.write_progress((0, 0)).expect("progress");
                }
                let (mut rows, labels) = batch(&options, place, 1);
                let refused = a.forward(&mut rows, Some(&labels)).map(drop);
                let counted = if skips_update { "updates" } else { "step" };
                assert_failed(&refused, Status::Mismatch as i32, &["rank 1", counted]);
                assert_failed(&a.wait(), Status::Poisoned as i32, &[]);
            });
        }
    }
}

/// The text of a head's last error is the head's, whatever thread its call was on, and can be read while another thread is inside.
#[test]
fn a_head_s_last_error_is_there_for_every_thread() {
    let options = options(30, 5, ROWS as u64);
    on_ranks(2, |place| {
        let (mut head, other) = (head(place, &options), self::head(place, &options));
        assert_eq!(head.error(), "", "before the first error");
        let refused =
            std::thread::scope(|scope| scope.spawn(|| head.update(0.1).expect_err("no backward")).join().expect("a thread"));
        assert_eq!(head.error(), refused.message);
        forward(&mut head, &options, place, 0);
        assert_eq!(head.error(), refused.message, "a call that succeeds leaves it");
        assert_eq!(other.error(), "", "another head's");
        let mut short = [b'#' as std::ffi::c_char; 5];
        // SAFETY: a live head; a buffer of this size.
        let size = unsafe { partialfc::capi::head::pfc_head_error(head.raw, short.as_mut_ptr(), 4) };
        assert_eq!(size as usize, refused.message.len() + 1);
        assert_eq!(short.map(|c| c as u8), [b'p', b'f', b'c', 0, b'#'], "cut, with a zero, and no byte more");
    });
    // A rank waits inside a step for the other; its head's error is read meanwhile.
    let entered = std::sync::Barrier::new(2);
    on_ranks(2, |place| {
        let mut head = head(place, &options);
        let wrong = head.update(0.1).expect_err("no backward").message;
        if place.rank == 0 {
            let beside = Head { raw: head.raw, dim: head.dim };
            std::thread::scope(|scope| {
                scope.spawn(|| forward(&mut head, &options, place, 0));
                assert_eq!(beside.error(), wrong);
                entered.wait();
            });
            std::mem::forget(beside);
        } else {
            entered.wait();
            forward(&mut head, &options, place, 0);
        }
    });
}

/// What docs/errors.md promises. The device's one thread is the caller's.
#[test]
fn a_step_needs_no_more_than_256_kib_of_stack() {
    on_ranks(1, |place| {
        let steps = || {
            let options = HeadOptions { sample_rate: 0.5, optimizer: ADAMW, ..options(700, 600, ROWS as u64) };
            let mut head = head(place, &options);
            (0..2).for_each(|number| drop(step(&mut head, &options, place, number)));
            let (mut rows, _) = batch(&options, place, 2);
            head.top_k(&mut rows, 3).expect("top k");
        };
        std::thread::scope(|scope| {
            let small = std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, steps);
            small.expect("a thread").join().expect("the steps");
        });
    });
}
