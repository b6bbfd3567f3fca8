//! Dense rows: what the reference does to an unsampled row in every step, a head does when the row is next touched or read.

use partialfc::optimizer::{Adamw, Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc_testing::reference::{self, RankInput};

use partialfc_testing::capi::{options, Device, Head, Rows};
use partialfc_testing::numbers::{assert_close, widen, Random};
use partialfc_testing::ranks::on_ranks;

const CLASSES: usize = 7;
const DIM: usize = 5;
/// The row that is left alone for a while.
const SLEEPER: i64 = 5;

/// A schedule that a closed formula with one learning rate would not get right.
fn learning_rate(step: usize) -> f64 {
    let warm_up = ((step + 1) as f64 / 5.0).min(1.0);
    0.02 * warm_up * (0.6 + 0.4 * (step as f64 / 37.0).cos())
}

fn optimizers() -> [(&'static str, Optimizer); 4] {
    [
        ("sgd", Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-4 })),
        // 1 - lr * wd and mu both far from 1: the two roots of the recurrence differ.
        ("sgd, heavy decay", Optimizer::Sgd(Sgd { momentum: 0.5, weight_decay: 0.5 })),
        ("sgd without momentum", Optimizer::Sgd(Sgd { momentum: 0.0, weight_decay: 0.1 })),
        ("adamw", Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-3, weight_decay: 0.1 })),
    ]
}

/// Touches the sleeper, then `gap` steps without it, then one with it if `touch`, and compares all rows.
fn sleep(options: &HeadOptions, gap: usize, touch: bool, what: &str) {
    let mut random = Random(7);
    let start = random.normals(CLASSES * DIM, 0.5);
    let mut judge = reference::Head::new(options.clone(), 1, widen(&start));
    let steps: Vec<(Vec<f32>, Vec<i64>, Vec<i64>)> = (0..gap + 2)
        .filter(|&step| touch || step <= gap)
        .map(|step| {
            let awake = step == 0 || step == gap + 1;
            let labels = if awake { vec![SLEEPER, 1] } else { vec![0, 2] };
            let sample = if awake { vec![0, 1, SLEEPER] } else { vec![0, 2, 3] };
            (random.normals(2 * DIM, 1.0), labels, sample)
        })
        .collect();
    for (step, (embeddings, labels, sample)) in steps.iter().enumerate() {
        let embeddings = widen(embeddings);
        let taken = judge.forward(&[RankInput { embeddings: &embeddings, labels, sample }]).expect("a step");
        judge.update(&taken, 1.0, learning_rate(step));
    }
    let sleeper = SLEEPER as usize * DIM..(SLEEPER as usize + 1) * DIM;
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        head.write_centers(0, &start).expect("start values");
        for (step, (embeddings, labels, sample)) in steps.iter().enumerate() {
            head.set_sample(sample).expect("a sample");
            let mut grad = Rows::output(2, DIM);
            head.step(&mut Rows::f32(embeddings, DIM), labels, learning_rate(step), &mut grad).expect("step");
        }
        let (centers, momentum) = (widen(&head.centers()), widen(&head.momentum()));
        // 1000 steps of float32 in the rows that took part in each, one replay in the others.
        assert_close(&format!("{what}: W"), &centers, &judge.centers, 3e-5);
        assert_close(&format!("{what}: W of the sleeper"), &centers[sleeper.clone()], &judge.centers[sleeper.clone()], 1e-5);
        assert_close(&format!("{what}: momentum"), &momentum, &judge.momentum, 2e-4);
        if gap <= 10 {
            // After long gaps the momentum is what decay leaves of W, a difference of two small numbers.
            assert_close(
                &format!("{what}: momentum of the sleeper"),
                &momentum[sleeper.clone()],
                &judge.momentum[sleeper.clone()],
                1e-4,
            );
        }
        if matches!(options.optimizer, Optimizer::Adamw(_)) {
            let second = widen(&head.second_moment());
            assert_close(&format!("{what}: second moment"), &second, &judge.second_moment, 2e-4);
        }
    });
}

#[test]
fn rows_left_alone_move_as_if_they_had_been_in_every_step() {
    for (name, optimizer) in optimizers() {
        for gap in [0, 1, 2, 10, 159, 160, 161, 1000] {
            for touch in [false, true] {
                if touch && gap == 1000 && name == "sgd, heavy decay" {
                    continue; // the row's norm is 1e-6 by then, and its gradient 1e6: nothing to compare
                }
                let options = HeadOptions { optimizer, row_update: RowUpdate::Dense, ..gap_options() };
                sleep(&options, gap, touch, &format!("{name}, gap {gap}, touched again: {touch}"));
            }
        }
    }
}

#[test]
fn lazy_rows_left_alone_stay() {
    for (name, optimizer) in optimizers() {
        sleep(&HeadOptions { optimizer, ..gap_options() }, 10, false, &format!("lazy {name}"));
    }
}

/// A small scale keeps 1000 steps of training tame, so that two precisions stay together.
fn gap_options() -> HeadOptions {
    let mut options = options(CLASSES as u64, DIM as u32, 2);
    options.margin.scale = 4.0;
    options
}

#[test]
fn rows_never_sampled_decay_from_their_start_values() {
    let options = HeadOptions { optimizer: optimizers()[1].1, row_update: RowUpdate::Dense, sample_rate: 0.0, ..gap_options() };
    on_ranks(2, |place| {
        for placement in [Placement::Sharded, Placement::Replicated] {
            let options = HeadOptions { placement, ..options.clone() };
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let (first, count) = head.shard();
            let start = widen(&head.centers());
            let (mut w, mut m) = (1.0, 0.0);
            for step in 0..25 {
                let rate = learning_rate(step);
                head.step(&mut Rows::f32(&[1.0; DIM], DIM), &[0], rate, &mut Rows::output(1, DIM)).expect("step");
                m = 0.5 * m + 0.5 * w;
                w -= rate * m;
            }
            let own = usize::from(first == 0) * DIM..count as usize * DIM;
            let expected: Vec<f64> = start.iter().map(|x| x * w).collect();
            let what = format!("{placement:?} rank {}", place.rank);
            assert_close(&what, &widen(&head.centers())[own.clone()], &expected[own.clone()], 1e-6);
            let expected: Vec<f64> = start.iter().map(|x| x * m).collect();
            assert_close(&format!("{what} momentum"), &widen(&head.momentum())[own.clone()], &expected[own], 1e-5);
        }
    });
}

/// Beyond 1,024 updates the history is trimmed, beyond 16,384 rows left alone are caught up: no row may notice. Class 0 is in every
/// sample, class 1 in every hundredth, and the others in none.
#[test]
fn rows_left_alone_for_thousands_of_updates_decay_as_they_should() {
    const ROWS: usize = 12;
    const WIDE: usize = 4;
    for (name, optimizer) in optimizers() {
        // What the updates leave of a row whose gradient is 0: multiples of its own start values.
        let options =
            HeadOptions { optimizer, row_update: RowUpdate::Dense, sample_rate: 0.0, ..options(ROWS as u64, WIDE as u32, 1) };
        on_ranks(1, |place| {
            let mut head = Head::new(&Device::cpu(1), &place.comm, &options);
            let start = widen(&head.centers());
            let (mut w, mut m) = (1.0, 0.0);
            for update in 1..=17_500 {
                let label = i64::from(update % 100 == 0);
                let rate = 1e-3 * learning_rate(update);
                head.step(&mut Rows::f32(&[1.0; WIDE], WIDE), &[label], rate, &mut Rows::output(1, WIDE)).expect("step");
                match optimizer {
                    Optimizer::Sgd(sgd) => {
                        m = sgd.momentum * m + sgd.weight_decay * w;
                        w -= rate * m;
                    }
                    Optimizer::Adamw(adamw) => w *= 1.0 - rate * adamw.weight_decay,
                }
                if ![1_023, 1_024, 1_025, 2_047, 2_049, 5_000, 16_383, 16_384, 16_385, 16_500, 17_500].contains(&update) {
                    continue;
                }
                let alone = 2 * WIDE..ROWS * WIDE;
                let expected: Vec<f64> = start.iter().map(|x| x * w).collect();
                let what = format!("{name}, after {update} updates");
                assert_close(&what, &widen(&head.centers())[alone.clone()], &expected[alone.clone()], 1e-6);
                if m != 0.0 {
                    let expected: Vec<f64> = start.iter().map(|x| x * m).collect();
                    assert_close(&format!("{what}, momentum"), &widen(&head.momentum())[alone.clone()], &expected[alone], 1e-5);
                }
            }
        });
    }
}

/// Writing one tensor of a row that has missed updates leaves the others as they would be without it.
#[test]
fn a_written_row_s_other_tensors_have_missed_nothing() {
    for (name, optimizer) in optimizers() {
        let options = HeadOptions { optimizer, row_update: RowUpdate::Dense, ..gap_options() };
        let run = |written: Option<i32>, later: usize| {
            on_ranks(1, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let mut random = Random(11);
                for step in 0..9 {
                    // The sleeper moves at first, so that its state is not 0.
                    head.set_sample(if step < 2 { &[0, 1, SLEEPER] } else { &[0, 1] }).expect("a sample");
                    let embeddings = random.normals(2 * DIM, 1.0);
                    let mut grad = Rows::output(2, DIM);
                    let labels = if step < 2 { [SLEEPER, 1] } else { [0, 1] };
                    head.step(&mut Rows::f32(&embeddings, DIM), &labels, learning_rate(step), &mut grad).expect("step");
                    if step == 9 - 1 - later {
                        match written {
                            Some(0) => head.write_centers(SLEEPER as u64, &[0.5; DIM]).expect("centers"),
                            Some(tensor) => head.write_state(tensor, SLEEPER as u64, &[0.5; DIM]).expect("a state"),
                            None => {}
                        }
                    }
                }
                let at = SLEEPER as usize * DIM..(SLEEPER as usize + 1) * DIM;
                let second =
                    if matches!(optimizer, Optimizer::Adamw(_)) { widen(&head.second_moment()) } else { vec![0.0; CLASSES * DIM] };
                [widen(&head.centers()), widen(&head.momentum()), second].map(|tensor| tensor[at.clone()].to_vec())
            })
            .remove(0)
        };
        let untouched = run(None, 0);
        let tensors = if matches!(optimizer, Optimizer::Adamw(_)) { 3 } else { 2 };
        for written in 0..tensors {
            let found = run(Some(written as i32), 0);
            for (tensor, (found, untouched)) in found.iter().zip(&untouched).enumerate().take(tensors) {
                let what = format!("{name}: tensor {tensor} after tensor {written} was written");
                let expected = if tensor == written { vec![0.5; DIM] } else { untouched.clone() };
                assert_close(&what, found, &expected, 1e-6);
            }
            // And from there on they move together.
            let later = run(Some(written as i32), 3);
            assert!(later.iter().take(tensors).all(|tensor| tensor.iter().all(|x| x.is_finite())), "{name}: {later:?}");
        }
    }
}

#[test]
fn reading_rows_changes_no_later_result() {
    for (name, optimizer) in optimizers() {
        let options = HeadOptions { optimizer, row_update: RowUpdate::Dense, sample_rate: 0.3, ..options(30, 4, 3) };
        let run = |peek: bool| {
            on_ranks(1, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let mut random = Random(3);
                let mut losses = Vec::new();
                for step in 0..40 {
                    let (embeddings, labels) = (random.normals(12, 1.0), random.labels(3, 30));
                    let mut grad = Rows::output(3, 4);
                    losses.push(head.step(&mut Rows::f32(&embeddings, 4), &labels, learning_rate(step), &mut grad).expect("step"));
                    if peek && step % 7 == 3 {
                        head.centers();
                    }
                }
                (losses, widen(&head.centers()))
            })
            .remove(0)
        };
        let ((read, read_centers), (unread, centers)) = (run(true), run(false));
        // Two replays in place of one round twice.
        assert_close(&format!("{name}: losses"), &read, &unread, 1e-6);
        assert_close(&format!("{name}: W"), &read_centers, &centers, 1e-6);
    }
}
