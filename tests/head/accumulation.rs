//! Gradients of micro-batches, applied at once. That the sum is right is the property tests' matter; here is what belongs to it.

use partialfc::options::{HeadOptions, RowUpdate};
use partialfc::Status;
use partialfc_testing::capi::{assert_failed, on_cuda, options, Device, Head, Outcome, Rows};
use partialfc_testing::numbers::assert_close;
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, bits, ways_to_update, Batch, Trace};

const ROWS: usize = 5;
const INVALID: i32 = Status::InvalidArgument as i32;

fn heads() -> Vec<HeadOptions> {
    ways_to_update(&HeadOptions { sample_rate: 0.3, ..options(60, 9, ROWS as u64) })
}

/// A step up to its backward; the classes of its sample.
fn micro_batch(head: &mut Head, options: &HeadOptions, rank: usize, step: usize) -> Vec<i64> {
    micro_batch_of(head, options, rank, step, 0.5)
}

fn micro_batch_of(head: &mut Head, options: &HeadOptions, rank: usize, step: usize, weight: f64) -> Vec<i64> {
    let batch = Batch::draw(options, rank, step, ROWS);
    head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
    head.backward(weight, 1.0, &mut Rows::output(ROWS, head.dim)).expect("backward");
    head.sample_ids().expect("the sample")
}

fn rows(head: &mut Head, options: &HeadOptions) -> Trace {
    let mut trace = Trace::default();
    trace.saw_rows(head, options);
    trace
}

/// What both ranks' rows are after these calls.
fn after(options: &HeadOptions, calls: impl Fn(&mut Head, usize) + Sync) -> Vec<Trace> {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(2), &place.comm, options);
        calls(&mut head, place.rank);
        rows(&mut head, options)
    })
}

/// The same to the bit, or nearly so where a GPU's update has another order of sums.
fn assert_same(what: &str, found: &[Trace], expected: &[Trace]) {
    if !on_cuda() {
        return assert_same_bits(what, found, expected);
    }
    for (found, expected) in found.iter().zip(expected) {
        assert_close(what, &found.centers(), &expected.centers(), 1e-5);
        assert_close(what, &found.momentum(), &expected.momentum(), 1e-5);
    }
}

#[test]
fn one_micro_batch_is_a_step() {
    for options in heads() {
        let train = |update: fn(&mut Head) -> Outcome| {
            after(&options, |head, rank| {
                for step in 0..4 {
                    micro_batch(head, &options, rank, step);
                    update(head).expect("update");
                }
            })
        };
        let plain = train(|head| head.update(0.1));
        let kept = train(|head| {
            head.accumulate()?;
            head.update(0.1)
        });
        assert_same(&format!("{options:?}"), &kept, &plain);
    }
}

/// The last micro-batch may be accumulated before the update, by it, or by a step of its own.
#[test]
fn the_last_micro_batch_comes_in_three_ways() {
    type Last = fn(&mut Head, &HeadOptions, usize, usize);
    let ways: [(&str, Last); 3] = [
        ("by the update", |head, options, rank, step| {
            micro_batch(head, options, rank, step);
            head.update(0.1).expect("update");
        }),
        ("before the update", |head, options, rank, step| {
            micro_batch(head, options, rank, step);
            head.accumulate().expect("accumulate");
            // What is prepared before the update is of the rows after it.
            head.prepare(&Batch::draw(options, rank, step + 1, ROWS).labels).expect("prepare");
            head.update(0.1).expect("update");
        }),
        ("by a step", |head, options, rank, step| {
            let batch = Batch::draw(options, rank, step, ROWS);
            head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut Rows::output(ROWS, head.dim)).expect("step");
        }),
    ];
    for options in heads() {
        let train = |last: Last, weight: f64| {
            after(&options, |head, rank| {
                for round in 0..3 {
                    for step in 0..2 {
                        micro_batch_of(head, &options, rank, 3 * round + step, weight);
                        head.accumulate().expect("accumulate");
                    }
                    last(head, &options, rank, 3 * round + 2);
                    let metrics = head.metrics().expect("metrics");
                    assert_eq!(metrics.updates, round as u64 + 1, "an update counts once");
                    assert!(metrics.grad_centers_norm > 0.0);
                }
            })
        };
        let expected = train(ways[0].1, 0.5);
        assert_same_bits(&format!("{options:?}: {}", ways[1].0), &train(ways[1].1, 0.5), &expected);
        // A step's own loss weighs 1.
        let weighted = |head: &mut Head, options: &HeadOptions, rank: usize, step: usize| {
            micro_batch_of(head, options, rank, step, 1.0);
            head.update(0.1).expect("update");
        };
        assert_same_bits(&format!("{options:?}: {}", ways[2].0), &train(ways[2].1, 0.5), &train(weighted, 0.5));
    }
}

/// Lazy rows that are in no sample keep their bits; those of any sample move, by one update.
#[test]
fn the_union_of_the_samples_moves() {
    for options in heads().into_iter().filter(|options| options.row_update == RowUpdate::Lazy) {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(2), &place.comm, &options);
            let before = bits(&head.centers());
            let mut union = Vec::new();
            for step in 0..3 {
                union.extend(micro_batch(&mut head, &options, place.rank, step));
                head.accumulate().expect("accumulate");
                assert_eq!(bits(&head.centers()), before, "no row moves before the update");
            }
            head.update(0.1).expect("update");
            let (after, first) = (bits(&head.centers()), head.shard().0);
            for (row, (after, before)) in after.chunks(head.dim).zip(before.chunks(head.dim)).enumerate() {
                assert_eq!(after != before, union.contains(&((first as usize + row) as i64)), "row {row} of {union:?}");
            }
        });
    }
}

/// What fails or is abandoned adds nothing and takes nothing away.
#[test]
fn a_lost_micro_batch_is_lost_alone() {
    for options in heads() {
        let whole = after(&options, |head, rank| {
            for step in [0, 2] {
                micro_batch(head, &options, rank, step);
                head.accumulate().expect("accumulate");
            }
            head.update(0.1).expect("update");
        });
        let with_losses = after(&options, |head, rank| {
            micro_batch(head, &options, rank, 0);
            head.accumulate().expect("accumulate");
            let wrong = head.forward(&mut Batch::draw(&options, rank, 1, ROWS).rows(head.dim), Some(&[99; ROWS]));
            assert_failed(&wrong.map(drop), Status::Label as i32, &["99"]);
            micro_batch(head, &options, rank, 2);
            head.accumulate().expect("accumulate");
            let wrong = head.forward(&mut Rows::f32(&[f32::NAN; 9], 9), Some(&[1]));
            assert_failed(&wrong.map(drop), Status::NotFinite as i32, &["row 0"]);
            head.update(0.1).expect("an update of what there is");
        });
        // The draws are those of a wrong label alone: it is refused before them.
        assert_same_bits(&format!("{options:?}"), &with_losses, &whole);
    }
}

/// Calls that drop what was kept, so that there is nothing to update by.
#[test]
fn writes_and_skipped_updates_drop_what_was_kept() {
    type Call = fn(&mut Head) -> Outcome;
    let calls: [(&str, Call); 4] = [
        ("write_centers", |head| head.write_centers(head.shard().0, &vec![0.25; head.dim])),
        ("write_state", |head| head.write_state(1, head.shard().0, &vec![0.25; head.dim])),
        ("write_progress", |head| head.write_progress((2, 0))),
        ("a skipped update", |head| head.update_with(0.1, f64::NAN, std::ptr::null())),
    ];
    for options in heads() {
        for (what, call) in calls {
            on_ranks(2, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                for step in 0..2 {
                    micro_batch(&mut head, &options, place.rank, step);
                    head.accumulate().expect("accumulate");
                }
                call(&mut head).expect(what);
                let before = rows(&mut head, &options);
                assert_failed(&head.update(0.1), INVALID, &["pfc_head_update", "idle"]);
                // The next update is of its own step.
                let sample = micro_batch(&mut head, &options, place.rank, 2);
                head.update(0.1).expect("update");
                assert_eq!(head.metrics().expect("metrics").updates, 1, "{what}");
                if options.row_update == RowUpdate::Lazy {
                    let (after, first) = (rows(&mut head, &options), head.shard().0 as i64);
                    for row in 0..after.centers.len() / head.dim {
                        let at = row * head.dim..(row + 1) * head.dim;
                        let moved = after.centers[at.clone()] != before.centers[at];
                        assert!(!moved || sample.contains(&(first + row as i64)), "{what}: row {row} moved");
                    }
                }
            });
        }
    }
}

/// Reading between micro-batches changes no bit of lazy rows, and dense ones are brought to now by nothing but roundings.
#[test]
fn reading_keeps_what_was_kept() {
    for options in heads() {
        let train = |reads: bool| {
            after(&options, |head, rank| {
                for step in 0..6 {
                    micro_batch(head, &options, rank, step);
                    head.accumulate().expect("accumulate");
                    if reads {
                        head.centers();
                        head.last_metrics().expect("metrics");
                        head.read_progress().expect("progress");
                    }
                    if step % 2 == 1 {
                        head.update(0.1).expect("update");
                    }
                }
            })
        };
        for (read, plain) in train(true).iter().zip(&train(false)) {
            assert_close("W", &read.centers(), &plain.centers(), 1e-6);
        }
    }
}

#[test]
fn calls_out_of_order_are_refused() {
    on_ranks(1, |place| {
        let options = &heads()[0];
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        assert_failed(&head.accumulate(), INVALID, &["pfc_head_accumulate", "pfc_head_backward", "idle"]);
        let batch = Batch::draw(options, 0, 0, ROWS);
        head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
        assert_failed(&head.accumulate(), INVALID, &["pfc_head_accumulate", "forwarded"]);
        micro_batch(&mut head, options, 0, 0);
        head.accumulate().expect("accumulate");
        assert_failed(&head.accumulate(), INVALID, &["pfc_head_accumulate", "idle"]);
        assert_failed(&head.update(f64::NAN), INVALID, &["learning_rate"]);
        head.update(0.1).expect("what was kept is still there");
        assert_failed(&head.update(0.1), INVALID, &["pfc_head_update", "idle"]);
    });
}

#[test]
fn a_rank_that_does_not_accumulate_is_told() {
    for options in heads() {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            micro_batch(&mut head, &options, place.rank, 0);
            if place.rank == 0 {
                head.accumulate().expect("accumulate");
            }
            let batch = Batch::draw(&options, place.rank, 1, ROWS);
            let told = head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).map(drop);
            assert_failed(&told, Status::Mismatch as i32, &["accumulated", "1 micro-batches", "rank 0", "0 on rank 1"]);
        });
    }
}
