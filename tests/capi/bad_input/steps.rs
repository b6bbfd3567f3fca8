//! Labels, embeddings, batches, samples and the order of calls: every rank hears of it, nothing is updated, the head works on.

use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{on_cuda, options, Device, Head, Outcome, Rows};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{assert_same_bits, train, train_step, Batch, Trace};

const RANKS: usize = 3;
const CLASSES: u64 = 20;
const DIM: usize = 6;
const MAX_BATCH: usize = 9;
const STEPS: usize = 2;

/// Every way of exchanging a step. Rates 0 and 1: no draw, so that a step that came to nothing does not change the next one's sample.
/// An emulated GPU, which takes its time, has one of each placement.
fn heads() -> Vec<HeadOptions> {
    let base = options(CLASSES, DIM as u32, MAX_BATCH as u64);
    let mut heads = Vec::new();
    for placement in [Placement::Sharded, Placement::Replicated] {
        for sample_rate in [0.0, 1.0] {
            heads.push(HeadOptions { placement, sample_rate, ..base.clone() });
        }
        heads.push(HeadOptions { placement, sample_rate: 0.0, row_update: RowUpdate::Dense, ..base.clone() });
    }
    if on_cuda() {
        heads = vec![heads[2].clone(), heads[4].clone()];
    }
    heads
}

/// Trains with a fault before each step; asserts that the run is, bit for bit, the one without.
fn works_on(fault: impl Fn(&mut Head, &Rank, &str) + Sync) {
    for options in heads() {
        let what = format!("{:?} rate {} {:?}", options.placement, options.sample_rate, options.row_update);
        let expected = on_ranks(RANKS, |place| train(place, &options, 1, STEPS));
        let found = on_ranks(RANKS, |place| {
            let device = Device::under_test(1);
            let mut head = Head::new(&device, &place.comm, &options);
            let mut trace = Trace::default();
            for step in 0..STEPS {
                let what = format!("{what}, rank {}, before step {step}", place.rank);
                fault(&mut head, place, &what);
                train_step(&mut head, place, &options, step, &mut trace);
            }
            trace.saw_rows(&mut head, &options);
            trace
        });
        assert_same_bits(&what, &found, &expected);
    }
}

/// The verdict on labels that are given early: it comes at once, but on a GPU with the forward that follows. There a rank's own
/// mistake is told both times.
fn prepared(head: &mut Head, rows: &mut Rows, labels: &[i64]) -> Outcome<()> {
    let prepared = head.prepare(labels);
    if !on_cuda() {
        return prepared;
    }
    let forwarded = head.forward(rows, None).map(|_| ());
    if prepared.is_err() {
        assert_eq!(prepared, forwarded);
    }
    forwarded
}

fn batch(place: &Rank, rows: usize) -> Batch {
    Batch::draw(&options(CLASSES, DIM as u32, MAX_BATCH as u64), place.rank, 77, rows)
}

#[test]
fn labels_out_of_range_are_named_on_all_ranks() {
    works_on(|head, place, what| {
        for bad in [-1, CLASSES as i64, i64::MAX, i64::MIN + 1, i64::MIN] {
            let mut batch = batch(place, 4);
            if place.rank == 1 {
                batch.labels[2] = bad;
            }
            let value = bad.to_string();
            let words = ["labels[2]", "rank 1", value.as_str()];
            assert_refused(what, head.forward(&mut batch.rows(DIM), Some(&batch.labels)), Status::Label, &words);
            assert_refused(what, prepared(head, &mut batch.rows(DIM), &batch.labels), Status::Label, &words);
            let mut grad = Rows::output(4, DIM);
            assert_refused(what, head.step(&mut batch.rows(DIM), &batch.labels, 0.1, &mut grad), Status::Label, &words);
            assert_eq!(grad.values(), vec![-123.0; 4 * DIM], "{what}: a gradient was written");
        }
    });
}

#[test]
fn embeddings_that_are_not_finite_are_named_on_all_ranks() {
    works_on(|head, place, what| {
        for (bad, dtype) in
            [(f64::NAN, DType::F32), (f64::INFINITY, DType::F32), (f64::NEG_INFINITY, DType::Bf16), (f64::NAN, DType::F16)]
        {
            let batch = batch(place, 5);
            let mut values: Vec<f64> = batch.embeddings.iter().map(|&x| f64::from(x)).collect();
            if place.rank == 2 {
                values[3 * DIM + 5] = bad;
            }
            let mut rows = Rows::new(&values, DIM, dtype, 1);
            let words = ["row 3", "rank 2"];
            assert_refused(what, head.forward(&mut rows, Some(&batch.labels)), Status::NotFinite, &words);
            let mut grad = Rows::output(5, DIM);
            assert_refused(what, head.step(&mut rows, &batch.labels, 0.1, &mut grad), Status::NotFinite, &words);
            assert_eq!(grad.values(), vec![-123.0; 5 * DIM], "{what}: a gradient was written");
            // Prepared, too: the labels were good.
            head.prepare(&batch.labels).expect("good labels");
            assert_refused(what, head.forward(&mut rows, None), Status::NotFinite, &words);
        }
    });
}

#[test]
fn a_batch_over_max_batch_on_one_rank_fails_on_all() {
    works_on(|head, place, what| {
        let rows = if place.rank == 0 { MAX_BATCH + 1 } else { 2 };
        let batch = batch(place, rows);
        let mut grad = Rows::output(rows, DIM);
        let outcomes = [
            head.forward(&mut batch.rows(DIM), Some(&batch.labels)).map(|_| ()),
            prepared(head, &mut batch.rows(DIM), &batch.labels),
            head.step(&mut batch.rows(DIM), &batch.labels, 0.1, &mut grad).map(|_| ()),
        ];
        for outcome in outcomes {
            match place.rank {
                0 => assert_refused(what, outcome, Status::InvalidArgument, &["10 rows", "rank 0", "max_batch", "9"]),
                _ => assert_refused(what, outcome, Status::Remote, &["rank 0", "INVALID_ARGUMENT"]),
            };
        }
    });
}

#[test]
fn missing_or_other_labels_on_one_rank_fail_on_all() {
    works_on(|head, place, what| {
        let batch = batch(place, 3);
        let labels = (place.rank != 1).then_some(batch.labels.as_slice());
        let outcome = head.forward(&mut batch.rows(DIM), labels);
        match place.rank {
            1 => assert_refused(what, outcome, Status::InvalidArgument, &["labels must not be NULL", "rank 1", "pfc_head_prepare"]),
            _ => assert_refused(what, outcome, Status::Remote, &["rank 1"]),
        };
        // After prepare the labels are those of then.
        head.prepare(&batch.labels).expect("good labels");
        let mut other = batch.labels.clone();
        if place.rank == 1 {
            other[2] = (other[2] + 1) % CLASSES as i64;
        }
        let outcome = head.forward(&mut batch.rows(DIM), Some(&other));
        match place.rank {
            1 => assert_refused(what, outcome, Status::InvalidArgument, &["labels[2]", "rank 1", "pfc_head_prepare"]),
            _ => assert_refused(what, outcome, Status::Remote, &["rank 1"]),
        };
        head.prepare(&batch.labels).expect("good labels");
        let rows = if place.rank == 1 { 2 } else { 3 };
        let mut fewer = Rows::f32(&batch.embeddings[..rows * DIM], DIM);
        let outcome = head.forward(&mut fewer, None);
        match place.rank {
            1 => assert_refused(what, outcome, Status::InvalidArgument, &["must be 3", "got 2", "rank 1"]),
            _ => assert_refused(what, outcome, Status::Remote, &["rank 1"]),
        };
    });
}

#[test]
fn calls_out_of_order_are_refused_and_change_nothing() {
    works_on(|head, place, what| {
        let batch = batch(place, 3);
        let mut grad = Rows::output(3, DIM);
        let backward = |head: &mut Head, grad: &mut Rows| head.backward(1.0, 1.0, grad);
        let words = ["pfc_head_backward", "pfc_head_forward", "idle"];
        assert_refused(what, backward(head, &mut grad), Status::InvalidArgument, &words);
        assert_refused(what, head.update(0.1), Status::InvalidArgument, &["pfc_head_update", "pfc_head_backward", "idle"]);
        head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
        assert_refused(what, head.update(0.1), Status::InvalidArgument, &["pfc_head_update", "pfc_head_backward", "forwarded"]);
        backward(head, &mut grad).expect("backward");
        assert_refused(what, backward(head, &mut grad), Status::InvalidArgument, &["pfc_head_backward", "backwarded"]);
        // Left here, the step is abandoned by the next forward.
    });
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(CLASSES, DIM as u32, 9));
        assert_refused("no sample yet", head.sample_ids(), Status::InvalidArgument, &["pfc_head_prepare", "pfc_head_forward"]);
        let batch = batch(place, 3);
        head.step(&mut batch.rows(DIM), &batch.labels, 0.1, &mut Rows::output(3, DIM)).expect("step");
        assert_refused("a second update", head.update(0.1), Status::InvalidArgument, &["pfc_head_update", "idle"]);
    });
}

#[test]
fn a_sample_that_no_rank_can_take_is_refused_where_it_is_given() {
    works_on(|head, place, what| {
        let (first, count) = head.shard();
        let (first, end) = (first as i64, (first + count) as i64);
        let rank = format!("rank {}", place.rank);
        let cases: [(Vec<i64>, Vec<&str>); 5] = [
            (vec![first + 2, first + 1], vec!["ids[1]"]),
            (vec![first, first + 1, first + 1], vec!["ids[2]"]),
            (vec![-1, first], vec!["ids[0]", "-1"]),
            (vec![first, CLASSES as i64], vec!["ids[1]", "20"]),
            (vec![first, i64::MAX], vec!["ids[1]"]),
        ];
        for (ids, mut words) in cases {
            words.push(&rank);
            assert_refused(what, head.set_sample(&ids), Status::InvalidArgument, &words);
        }
        if count < CLASSES {
            let another_ranks = if place.rank == 0 { end } else { first - 1 };
            let refused = head.set_sample(&[another_ranks]);
            assert_refused(what, refused, Status::InvalidArgument, &["ids[0]", &another_ranks.to_string(), "shard"]);
        }
    });
}

#[test]
fn replicated_ranks_with_different_samples_fail_alike() {
    for sample_rate in [0.0, 0.5] {
        let options = HeadOptions { placement: Placement::Replicated, sample_rate, ..options(CLASSES, DIM as u32, 9) };
        let expected = on_ranks(RANKS, |place| train(place, &HeadOptions { sample_rate: 0.0, ..options.clone() }, 1, 1));
        let found = on_ranks(RANKS, |place| {
            let options = HeadOptions { sample_rate: 0.0, ..options.clone() };
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            head.set_sample(if place.rank == 2 { &[1, 5] } else { &[1, 4] }).expect("a sample by itself");
            let batch = batch(place, 3);
            let outcome = head.forward(&mut batch.rows(DIM), Some(&batch.labels));
            assert_refused(&format!("rank {}", place.rank), outcome, Status::Mismatch, &["sample"]);
            let mut trace = Trace::default();
            train_step(&mut head, place, &options, 0, &mut trace);
            trace.saw_rows(&mut head, &options);
            trace
        });
        assert_same_bits("after samples that differ", &found, &expected);
    }
}

#[test]
fn factors_that_are_no_factors_are_refused() {
    works_on(|head, place, what| {
        let batch = batch(place, 3);
        let mut grad = Rows::output(3, DIM);
        for (weight, scale, name) in [
            (f64::NAN, 1.0, "loss_weight"),
            (-1.0, 1.0, "loss_weight"),
            (1.0, f64::INFINITY, "loss_scale"),
            (1.0, -2.0, "loss_scale"),
        ] {
            head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
            assert_refused(what, head.backward(weight, scale, &mut grad), Status::InvalidArgument, &[name]);
            assert_eq!(grad.values(), vec![-123.0; 3 * DIM], "{what}: a gradient was written");
        }
        for rate in [f64::NAN, -0.1, f64::INFINITY] {
            head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
            let mut grad = Rows::output(3, DIM);
            head.backward(1.0, 1.0, &mut grad).expect("backward");
            assert_refused(what, head.update(rate), Status::InvalidArgument, &["learning_rate"]);
            let mut grad = Rows::output(3, DIM);
            let outcome = head.step(&mut batch.rows(DIM), &batch.labels, rate, &mut grad);
            let failure = assert_refused(what, outcome, Status::InvalidArgument, &["learning_rate"]);
            assert!(failure.message.contains(&format!("rank {}", place.rank)), "{what}: {failure:?}");
        }
    });
}

#[test]
fn a_learning_rate_refused_leaves_the_update_to_be_asked_for_again() {
    for options in heads() {
        let expected = on_ranks(RANKS, |place| train(place, &options, 1, 2));
        let found = on_ranks(RANKS, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let mut trace = Trace::default();
            for step in 0..2 {
                let rows = partialfc_testing::training::batch_rows(&options, place.rank, step);
                let batch = Batch::draw(&options, place.rank, step, rows);
                let mut grad = Rows::output(rows, DIM);
                let loss = head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
                head.backward(1.0, 1.0, &mut grad).expect("backward");
                assert_refused("update", head.update(f64::NAN), Status::InvalidArgument, &["learning_rate", "NaN"]);
                head.update(partialfc_testing::training::learning_rate(step)).expect("update");
                trace.saw_step(loss, &grad, head.sample_ids().expect("ids"));
            }
            trace.saw_rows(&mut head, &options);
            trace
        });
        assert_same_bits("asked again", &found, &expected);
    }
}

/// One rank's gradient matrix is wrong: the others have theirs, and the class centers of all move as they should.
#[test]
fn a_wrong_gradient_matrix_on_one_rank_is_that_ranks_alone() {
    for options in heads() {
        let expected = on_ranks(RANKS, |place| train(place, &options, 1, 1));
        let found = on_ranks(RANKS, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let rows = partialfc_testing::training::batch_rows(&options, place.rank, 0);
            let batch = Batch::draw(&options, place.rank, 0, rows);
            let loss = head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("forward");
            let wrong = place.rank == 1;
            let mut grad = Rows::output(if wrong { rows + 1 } else { rows }, DIM);
            let outcome = head.backward(1.0, 1.0, &mut grad);
            if wrong {
                let rows = (rows + 1).to_string();
                assert_refused("rank 1", outcome, Status::InvalidArgument, &["grad_embeddings.rows", &rows, "rank 1"]);
            } else {
                outcome.expect("its own gradient is good");
            }
            head.update(partialfc_testing::training::learning_rate(0)).expect("update");
            let mut trace = Trace::default();
            trace.saw_step(loss, &grad, head.sample_ids().expect("ids"));
            trace.saw_rows(&mut head, &options);
            trace
        });
        let without_gradients = |mut traces: Vec<Trace>| {
            traces[1].grads.clear();
            traces
        };
        assert_same_bits(
            &format!("{:?} rate {}", options.placement, options.sample_rate),
            &without_gradients(found),
            &without_gradients(expected),
        );
    }
}

/// What a rank finds wrong after the labels have gone round is told in the sums, whose size is this step's, not the last one's.
#[test]
fn a_fault_after_a_prepare_of_another_size_is_told_to_all() {
    works_on(|head, place, what| {
        let (large, small) = (batch(place, 3 * (place.rank + 1)), batch(place, 2));
        head.forward(&mut large.rows(DIM), Some(&large.labels)).expect("a larger step");
        head.prepare(&small.labels).expect("a smaller one prepared");
        // Rank 1 comes with a row too many.
        let outcome = match place.rank {
            1 => head.forward(&mut batch(place, 3).rows(DIM), None),
            _ => head.forward(&mut small.rows(DIM), None),
        };
        match place.rank {
            1 => assert_refused(what, outcome, Status::InvalidArgument, &["embeddings", "3", "2"]),
            _ => assert_refused(what, outcome, Status::Remote, &["rank 1"]),
        };
        head.metrics().expect("figures of what was left");
    });
}
