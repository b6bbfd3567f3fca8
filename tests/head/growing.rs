//! A head without `max_batch` makes room for larger batches as they come, on all ranks or on none.

use partialfc::matrix::DType;
use partialfc::options::HeadOptions;
use partialfc::Status;
use partialfc_testing::capi::{on_cuda, options, Device, Head, Rows, LEAST};
use partialfc_testing::numbers::assert_close;
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{assert_same_bits, learning_rate, stored_both_ways, ways_to_update, Batch, Trace};

const DIM: usize = 6;
/// Rows of each rank, by step: growing by little and by much, shrinking, none.
const BATCHES: [[usize; 2]; 8] = [[3, 1], [9, 2], [8, 40], [1, 0], [0, 0], [41, 7], [5, 70], [3, 3]];

fn base() -> HeadOptions {
    HeadOptions { sample_rate: 0.3, seed: 5, ..options(61, DIM as u32, 0) }
}

/// Trains through all batches. Every second step is prepared while the step before it is under way, and two gradients are accumulated.
fn train(place: &Rank, options: &HeadOptions) -> Trace {
    let device = Device::under_test(2);
    let mut head = Head::new(&device, &place.comm, options);
    let mut trace = Trace::default();
    let batch = |step: usize| Batch::draw(options, place.rank, step, BATCHES[step][place.rank]);
    for step in 0..BATCHES.len() {
        let Batch { labels, .. } = batch(step);
        let mut grad = Rows::output(labels.len(), DIM);
        let loss = head.forward(&mut batch(step).rows(DIM), (step % 2 == 0).then_some(&labels)).expect("forward");
        let sample = head.sample_ids().expect("the sample");
        if step % 2 == 0 {
            head.prepare(&batch(step + 1).labels).expect("prepare");
        }
        head.backward(1.0, 1.0, &mut grad).expect("backward");
        match step {
            4 | 5 => head.accumulate().expect("accumulate"),
            _ => head.update(learning_rate(step)).expect("update"),
        }
        trace.saw_step(loss, &grad, sample);
    }
    trace.saw_rows(&mut head, options);
    trace
}

/// On a GPU with one kind of rows in bfloat16.
fn heads() -> Vec<HeadOptions> {
    let wide = ways_to_update(&base());
    match on_cuda() {
        true => wide[1..].iter().cloned().chain(stored_both_ways(wide[0].clone())).collect(),
        false => wide.into_iter().flat_map(stored_both_ways).collect(),
    }
}

#[test]
fn growing_does_not_change_what_a_head_does() {
    for options in heads() {
        let HeadOptions { placement, row_update, optimizer, weight_dtype, .. } = &options;
        let what = format!("{placement:?} {row_update:?} {optimizer:?} {weight_dtype:?}");
        let largest = BATCHES.iter().flatten().copied().max().unwrap() as u64;
        let of = |max_batch: u64| {
            let options = HeadOptions { max_batch, ..options.clone() };
            on_ranks(2, |place| train(place, &options))
        };
        let (grown, expected) = (of(0), of(largest));
        if !on_cuda() {
            assert_same_bits(&what, &grown, &expected);
            continue;
        }
        // A GPU's products are cut by the room that there is; what is nearly the same may be rounded apart.
        let near = if *weight_dtype == DType::Bf16 { 1e-2 } else { 1e-5 };
        for (grown, expected) in grown.iter().zip(&expected) {
            assert_eq!(grown.samples, expected.samples, "{what}");
            assert_close(&format!("{what}: losses"), &grown.losses(), &expected.losses(), near);
            assert_close(&format!("{what}: dE"), &grown.grads(), &expected.grads(), 10.0 * near);
            assert_close(&format!("{what}: W"), &grown.centers(), &expected.centers(), near);
        }
    }
}

/// A rank that lacks the memory says so; the others learn it, and all go on with batches that fit.
#[test]
fn a_rank_without_room_fails_the_step_on_all() {
    let outcomes = on_ranks(2, |place| {
        let device = Device::under_test(1);
        let limit = if place.rank == 0 { LEAST + (1 << 30) } else { LEAST };
        let mut head = Head::new(&device, &place.comm, &HeadOptions { workspace_limit: limit, ..base() });
        let mut step = |number: usize, rows: usize| {
            let batch = Batch::draw(&base(), place.rank, number, rows);
            head.step(&mut batch.rows(DIM), &batch.labels, 0.1, &mut Rows::output(rows, DIM))
        };
        let before = step(0, 5).expect("a batch that fits");
        let larger = [step(1, if place.rank == 0 { 200 } else { 3 }), step(1, 300)];
        (before, larger, step(1, 8).expect("a batch that fits, again"))
    });
    let expected = on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
        [5, 8].map(|rows| {
            let batch = Batch::draw(&base(), place.rank, usize::from(rows == 8), rows);
            head.step(&mut batch.rows(DIM), &batch.labels, 0.1, &mut Rows::output(rows, DIM)).expect("step")
        })
    });
    for (rank, (before, larger, after)) in outcomes.into_iter().enumerate() {
        for refused in larger {
            let failure = refused.expect_err("room for a larger batch");
            let (status, words) = match rank {
                1 => (Status::InvalidArgument, ["workspace_limit must be", "rank"]),
                _ => (Status::Remote, ["rank 1", "INVALID_ARGUMENT"]),
            };
            assert_eq!(failure.status, status as i32, "{failure:?}");
            assert!(words.iter().all(|word| failure.message.contains(word)), "{failure:?}");
        }
        assert_close("losses", &[before, after], &expected[rank], 1e-5);
    }
}
