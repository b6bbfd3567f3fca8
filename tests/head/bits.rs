//! The same bits: whatever the threads, prepared ahead or not, after abandoned steps, beside another head.

use partialfc::options::{HeadOptions, Placement, RowUpdate};

use partialfc_testing::capi::{on_cuda, options, Device, Head, Rows, LEAST};
use partialfc_testing::numbers::{assert_close, relative_l2};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, batch_rows, learning_rate, train, train_step, Batch, Trace, ADAMW};

/// Heads that differ where their code does: placement, sampling, optimizer, rows. On the emulated GPU four of the twelve, which have each
/// of those.
fn kinds(classes: u64, dim: u32, max_batch: u64) -> Vec<HeadOptions> {
    let base = options(classes, dim, max_batch);
    let mut kinds = Vec::new();
    for placement in [Placement::Sharded, Placement::Replicated] {
        for (sample_rate, row_update) in [(1.0, RowUpdate::Lazy), (0.3, RowUpdate::Lazy), (0.3, RowUpdate::Dense)] {
            kinds.push(HeadOptions { placement, sample_rate, row_update, ..base.clone() });
            kinds.push(HeadOptions { placement, sample_rate, row_update, optimizer: ADAMW, ..base.clone() });
        }
    }
    match on_cuda() {
        true => [0, 3, 5, 10].map(|number| kinds[number].clone()).to_vec(),
        false => kinds,
    }
}

fn describe(options: &HeadOptions) -> String {
    format!("{:?} rate {} {:?} {:?}", options.placement, options.sample_rate, options.row_update, options.optimizer)
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for options in kinds(3001, 37, 33) {
        let one = on_ranks(2, |place| train(place, &options, 1, 2));
        for threads in [2, 3] {
            let found = on_ranks(2, |place| train(place, &options, threads, 2));
            assert_same_bits(&format!("{} threads {threads}", describe(&options)), &found, &one);
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads_when_numerators_are_recomputed() {
    for options in kinds(3001, 37, 33) {
        let options = HeadOptions { workspace_limit: LEAST, ..options };
        let one = on_ranks(1, |place| train(place, &options, 1, 2));
        for threads in [2, 3] {
            let found = on_ranks(1, |place| train(place, &options, threads, 2));
            assert_same_bits(&format!("recomputed {} threads {threads}", describe(&options)), &found, &one);
        }
    }
}

/// Threads that the splits do not fill take blocks of the batch's rows.
#[test]
fn bits_do_not_depend_on_the_number_of_threads_beyond_the_splits() {
    if on_cuda() {
        return;
    }
    for workspace_limit in [0, LEAST] {
        for (rows, dim) in [(301, 37), (511, 16), (301, 67)] {
            let options = HeadOptions { workspace_limit, ..options(600, dim, rows) };
            let one = on_ranks(1, |place| train(place, &options, 1, 2));
            for threads in [4, 9, 16] {
                let found = on_ranks(1, |place| train(place, &options, threads, 2));
                assert_same_bits(&format!("{rows} rows of {dim}, limit {workspace_limit}, {threads} threads"), &found, &one);
            }
        }
    }
}

#[test]
fn recomputed_numerators_give_what_kept_ones_give() {
    for kept in kinds(1501, 24, 21) {
        let recomputed = HeadOptions { workspace_limit: LEAST, ..kept.clone() };
        let expected = on_ranks(2, |place| train(place, &kept, 2, 1));
        let found = on_ranks(2, |place| train(place, &recomputed, 2, 1));
        for (rank, (f, e)) in found.iter().zip(&expected).enumerate() {
            let what = |tensor: &str| format!("{} rank {rank} {tensor}", describe(&kept));
            assert_eq!(f.samples, e.samples, "{}", what("samples"));
            assert_close(&what("loss"), &f.losses(), &e.losses(), 1e-5);
            assert_close(&what("dE"), &f.grads(), &e.grads(), 5e-5);
            assert_close(&what("momentum"), &f.momentum(), &e.momentum(), 5e-5);
            // AdamW's first step is the gradient's sign, near 0 a matter of rounding.
            if kept.optimizer != ADAMW {
                assert_close(&what("W"), &f.centers(), &e.centers(), 5e-5);
            }
        }
    }
}

#[test]
fn a_run_prepared_ahead_gives_the_bits_of_an_unprepared_one() {
    // Few classes, so that a step's rows are mostly in the next step too: those must be taken after the update.
    for options in kinds(40, 11, 12) {
        let plain = on_ranks(2, |place| train(place, &options, 2, 6));
        let ahead = on_ranks(2, |place| {
            let device = Device::under_test(2);
            let mut head = Head::new(&device, &place.comm, &options);
            let mut trace = Trace::default();
            let batch = |step: usize| Batch::draw(&options, place.rank, step, batch_rows(&options, place.rank, step));
            head.prepare(&batch(0).labels).expect("prepare");
            for step in 0..6 {
                let now = batch(step);
                let mut grad = Rows::output(now.labels.len(), head.dim);
                let loss = head.forward(&mut now.rows(head.dim), None).expect("forward");
                let sample = head.sample_ids().expect("the sample");
                // At each of the three places where a program may do it.
                let next = batch(step + 1).labels;
                if step % 3 == 0 {
                    head.prepare(&next).expect("prepare after forward");
                }
                head.backward(1.0, 1.0, &mut grad).expect("backward");
                if step % 3 == 1 {
                    head.prepare(&next).expect("prepare after backward");
                }
                head.update(learning_rate(step)).expect("update");
                if step % 3 == 2 {
                    head.prepare(&next).expect("prepare after update");
                }
                trace.saw_step(loss, &grad, sample);
            }
            trace.saw_rows(&mut head, &options);
            trace
        });
        assert_same_bits(&describe(&options), &ahead, &plain);
    }
}

#[test]
fn pfc_head_step_gives_the_bits_of_the_three_calls() {
    for options in kinds(60, 11, 12) {
        let plain = on_ranks(2, |place| train(place, &options, 2, 4));
        let found = on_ranks(2, |place| {
            let device = Device::under_test(2);
            let mut head = Head::new(&device, &place.comm, &options);
            let mut trace = Trace::default();
            for step in 0..4 {
                let batch = Batch::draw(&options, place.rank, step, batch_rows(&options, place.rank, step));
                let mut grad = Rows::output(batch.labels.len(), head.dim);
                let loss = head.step(&mut batch.rows(head.dim), &batch.labels, learning_rate(step), &mut grad).expect("step");
                trace.saw_step(loss, &grad, head.sample_ids().expect("the sample"));
            }
            trace.saw_rows(&mut head, &options);
            trace
        });
        assert_same_bits(&describe(&options), &found, &plain);
    }
}

/// Gives the caller's sample of a step: the draw moves on with every forward, so that an abandoned step would change later ones.
fn give_sample(head: &mut Head, options: &HeadOptions, step: usize) {
    let (first, count) = head.shard();
    let kept = (first..first + count).filter(|class| options.sample_rate == 1.0 || (class + step as u64).is_multiple_of(3));
    head.set_sample(&kept.map(|class| class as i64).collect::<Vec<_>>()).expect("a sample");
}

#[test]
fn abandoned_steps_leave_nothing_behind() {
    for options in kinds(50, 11, 12) {
        let run = |abandoning: bool| {
            on_ranks(2, |place| {
                let device = Device::under_test(2);
                let mut head = Head::new(&device, &place.comm, &options);
                let mut trace = Trace::default();
                for step in 0..7 {
                    if abandoning && step % 2 == 1 {
                        // Another batch and another sample, forwarded, and in every second case backwarded, then left.
                        give_sample(&mut head, &options, step + 1);
                        let other = Batch::draw(&options, place.rank, 100 + step, 5);
                        head.forward(&mut other.rows(head.dim), Some(&other.labels)).expect("forward");
                        if step % 4 == 1 {
                            head.backward(3.0, 128.0, &mut Rows::output(5, head.dim)).expect("backward");
                        }
                    }
                    give_sample(&mut head, &options, step);
                    train_step(&mut head, place, &options, step, &mut trace);
                }
                trace.saw_rows(&mut head, &options);
                trace
            })
        };
        assert_same_bits(&describe(&options), &run(true), &run(false));
    }
}

#[test]
fn two_heads_on_one_communicator_do_not_meet() {
    let first = HeadOptions { sample_rate: 0.3, seed: 5, ..options(70, 8, 9) };
    let second = HeadOptions { placement: Placement::Replicated, optimizer: ADAMW, seed: 6, ..options(31, 13, 4) };
    let alone = [on_ranks(3, |place| train(place, &first, 1, 4)), on_ranks(3, |place| train(place, &second, 1, 4))];
    let together = on_ranks(3, |place| {
        let device = Device::under_test(1);
        let mut a = Head::new(&device, &place.comm, &first);
        let mut b = Head::new(&device, &place.comm, &second);
        // Both outlive the handle of what they stand on.
        drop(device);
        let (mut trace_a, mut trace_b) = (Trace::default(), Trace::default());
        for step in 0..4 {
            // Interleaved inside a step, too: a's forward, all of b's step, the rest of a's.
            let batch = Batch::draw(&first, place.rank, step, batch_rows(&first, place.rank, step));
            let mut grad = Rows::output(batch.labels.len(), a.dim);
            let loss = a.forward(&mut batch.rows(a.dim), Some(&batch.labels)).expect("forward");
            train_step(&mut b, place, &second, step, &mut trace_b);
            a.backward(1.0, 1.0, &mut grad).expect("backward");
            let sample = a.sample_ids().expect("the sample");
            a.update(learning_rate(step)).expect("update");
            trace_a.saw_step(loss, &grad, sample);
        }
        trace_a.saw_rows(&mut a, &first);
        trace_b.saw_rows(&mut b, &second);
        (trace_a, trace_b)
    });
    let (a, b): (Vec<Trace>, Vec<Trace>) = together.into_iter().unzip();
    assert_same_bits("the first head", &a, &alone[0]);
    assert_same_bits("the second head", &b, &alone[1]);
}

#[test]
fn without_update_the_class_centers_stay() {
    for options in kinds(50, 11, 12) {
        on_ranks(2, |place| {
            let device = Device::under_test(2);
            let mut head = Head::new(&device, &place.comm, &options);
            let start = head.centers();
            let mut losses = Vec::new();
            for _ in 0..3 {
                // The same sample, so that the same batch has the same loss as long as nothing moves.
                give_sample(&mut head, &options, 0);
                let batch = Batch::draw(&options, place.rank, 0, 7);
                losses.push(head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward"));
                head.backward(1.0, 1.0, &mut Rows::output(7, head.dim)).expect("backward");
            }
            assert_eq!(losses, [losses[0]; 3], "{}", describe(&options));
            assert_eq!(head.centers(), start, "{}", describe(&options));
            assert!(head.momentum().iter().all(|&m| m == 0.0), "{}: momentum moved", describe(&options));
        });
    }
}

#[test]
fn one_bit_of_difference_is_seen() {
    let options = options(12, 3, 4);
    let expected = on_ranks(2, |place| train(place, &options, 1, 1));
    assert_same_bits("the same run", &expected.clone(), &expected);
    let spoils: [fn(&mut Trace); 4] = [
        |trace| trace.losses[0] ^= 1,
        |trace| trace.grads[0][0] ^= 1,
        |trace| trace.centers[5] ^= 1,
        |trace| trace.momentum[5] ^= 1,
    ];
    for spoil in spoils {
        let mut found = expected.clone();
        spoil(&mut found[1]);
        assert!(std::panic::catch_unwind(|| assert_same_bits("spoiled", &found, &expected)).is_err(), "a bit goes unseen");
    }
}

#[test]
fn sharded_and_replicated_train_alike() {
    // AdamW's first steps are signs of gradients, near 0 a matter of rounding: only SGD can be compared after updates.
    let sharded = options(67, 19, 10);
    let expected = on_ranks(1, |place| train_all(place, &sharded, 3));
    for ranks in 1..=4 {
        for placement in [Placement::Sharded, Placement::Replicated] {
            let options = HeadOptions { placement, ..sharded.clone() };
            let found = on_ranks(ranks, |place| train_all(place, &options, 3));
            let what = |tensor: &str| format!("{placement:?} on {ranks} ranks: {tensor}");
            for (rank, trace) in found.iter().enumerate() {
                assert_eq!(trace.losses, found[0].losses, "{} of rank {rank}", what("loss"));
            }
            assert_close(&what("loss"), &found[0].losses(), &expected[0].losses(), 1e-5);
            let centers: Vec<f64> = match placement {
                Placement::Sharded => found.iter().flat_map(Trace::centers).collect(),
                Placement::Replicated => found[0].centers(),
            };
            assert_close(&what("W"), &centers, &expected[0].centers(), 1e-5);
            if placement == Placement::Replicated {
                found.iter().for_each(|trace| assert_eq!(trace.centers, found[0].centers, "{}", what("W differs between ranks")));
            }
        }
    }
    // The comparison can fail: half the learning rate is further off.
    let slower = on_ranks(1, |place| {
        let device = Device::under_test(1);
        let mut head = Head::new(&device, &place.comm, &sharded);
        let batch = Batch::draw(&sharded, 0, 0, 10);
        head.step(&mut batch.rows(head.dim), &batch.labels, learning_rate(0) / 2.0, &mut Rows::output(10, head.dim)).expect("step");
        head.centers()
    });
    let slower: Vec<f64> = slower[0].iter().map(|&x| f64::from(x)).collect();
    assert!(relative_l2(&slower, &expected[0].centers()) > 1e-4, "W hardly moves");
}

/// Training on a global batch of 10 rows, dealt out to the ranks.
fn train_all(place: &partialfc_testing::ranks::Rank, options: &HeadOptions, steps: usize) -> Trace {
    let device = Device::under_test(1);
    let mut head = Head::new(&device, &place.comm, options);
    let mut trace = Trace::default();
    for step in 0..steps {
        let whole = Batch::draw(options, 0, step, 10);
        let own: Vec<usize> = (0..10).filter(|row| row * place.size / 10 == place.rank).collect();
        let labels: Vec<i64> = own.iter().map(|&row| whole.labels[row]).collect();
        let embeddings: Vec<f32> = own.iter().flat_map(|&row| whole.embeddings[row * head.dim..][..head.dim].to_vec()).collect();
        let mut grad = Rows::output(labels.len(), head.dim);
        let loss = head.step(&mut Rows::f32(&embeddings, head.dim), &labels, learning_rate(step), &mut grad).expect("step");
        trace.saw_step(loss, &grad, head.sample_ids().expect("the sample"));
    }
    trace.saw_rows(&mut head, options);
    trace
}
