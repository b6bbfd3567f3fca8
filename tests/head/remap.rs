//! Classes that come, go, change their numbers and become one while a head trains: to the bit what a save and a load with the same table
//! give, and all of it or nothing.

use std::path::Path;

use partialfc::matrix::DType;
use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::Status;
use partialfc_testing::capi::{on_cuda, options, Comm, Device, Head, Outcome, Rows};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{assert_same_bits, bits, stored_both_ways, train_step, ways_to_update, Batch, Trace};

use super::checkpoint::{assert_failure, folder};
use super::class_map::table;

const DIM: usize = 12;

fn base() -> HeadOptions {
    HeadOptions { sample_rate: 0.5, seed: 8, ..options(40, DIM as u32, 6) }
}

/// A head after three steps.
fn trained(place: &Rank, options: &HeadOptions) -> Head {
    let mut head = Head::new(&Device::under_test(1), &place.comm, options);
    (0..3).for_each(|step| train_step(&mut head, place, options, step, &mut Trace::default()));
    head
}

/// What a head with other classes has, and gives in three more steps.
fn goes_on(mut head: Head, place: &Rank, options: &HeadOptions) -> Trace {
    assert_eq!(head.read_progress().expect("progress"), (3, 3));
    let mut trace = Trace::default();
    trace.saw_rows(&mut head, options);
    // As if they were what it gave.
    trace.grads.push([&trace.centers[..], &trace.momentum, &trace.second_moment].concat());
    (3..6).for_each(|step| train_step(&mut head, place, options, step, &mut trace));
    trace.saw_rows(&mut head, options);
    trace
}

/// The same after a save, and a load by the table into a new head.
fn loaded(options: &HeadOptions, classes: u64, class_map: &[i64], ranks: usize, folder: &Path) -> Vec<Trace> {
    let other = HeadOptions { num_classes: classes, ..options.clone() };
    on_ranks(ranks, |place| {
        trained(place, options).save(folder).expect("a save");
        let mut head = Head::new(&Device::under_test(1), &place.comm, &other);
        head.load_mapped(folder, class_map).expect("a load");
        goes_on(head, place, &other)
    })
}

#[test]
fn a_head_with_other_classes_is_that_of_a_save_and_a_load() {
    for (number, options) in ways_to_update(&base()).into_iter().flat_map(stored_both_ways).enumerate() {
        let other = HeadOptions { num_classes: 52, ..options.clone() };
        let found = on_ranks(3, |place| {
            let mut head = trained(place, &options);
            head.remap(52, &table()).expect("other classes");
            goes_on(head, place, &other)
        });
        let what = format!("{:?} {:?} {:?}", options.placement, options.row_update, options.optimizer);
        assert_same_bits(&what, &found, &loaded(&options, 52, &table(), 3, &folder(&format!("remap-{number}"))));
    }
}

#[test]
fn classes_are_added_behind_the_others_and_removed_from_behind() {
    // Also to a class for each rank, and from there.
    for (from, to) in [(40, 53), (40, 31), (40, 3), (3, 40), (40, 40)] {
        let options = HeadOptions { num_classes: from, ..base() };
        let table: Vec<i64> = (0..from as i64).map(|class| if class < to as i64 { class } else { -1 }).collect();
        let other = HeadOptions { num_classes: to, ..options.clone() };
        let found = on_ranks(3, |place| {
            let mut head = trained(place, &options);
            head.resize(to).expect("other classes");
            goes_on(head, place, &other)
        });
        assert_same_bits(&format!("{from} to {to}"), &found, &loaded(&options, to, &table, 3, &folder("resize")));
    }
}

/// 16 MiB of rows are on their way at a time: here a shard is several times as much. Rows of that length are a CPU's.
#[test]
fn rows_go_round_in_pieces() {
    if on_cuda() {
        return;
    }
    let options = HeadOptions { weight_dtype: DType::Bf16, ..options(700, 16384, 2) };
    let table: Vec<i64> = (0..700).map(|class| if class % 50 == 7 { 3 } else { class * 3 % 700 }).collect();
    let row = |class: i64| (0..16384).map(move |column| ((class * 31 + column) % 64) as f32 - 31.5).collect::<Vec<f32>>();
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..options.clone() };
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let (first, count) = head.shard();
            for class in first..first + count {
                head.write_centers(class, &row(class as i64)).expect("a row");
            }
            head.remap(710, &table).expect("other classes");
            let (first, count) = head.shard();
            let found = head.centers();
            for (class, found) in (first..first + count).zip(found.chunks_exact(16384)) {
                let sources: Vec<i64> = (0..700).filter(|&from| table[from as usize] == class as i64).collect();
                match sources[..] {
                    [from] => assert!(found == row(from), "{placement:?}: class {class} was {from}"),
                    [] => assert!(found.iter().all(|w| w.abs() < 0.1), "{placement:?}: class {class} is new"),
                    _ => assert!(class == 3 && sources.len() > 10 && found.iter().any(|w| w.abs() > 0.1)),
                }
            }
        });
    }
}

#[test]
fn a_head_changes_its_classes_again_and_again() {
    let options = base();
    on_ranks(2, |place| {
        let mut head = trained(place, &options);
        let before = head.centers();
        let (first, count) = head.shard();
        for classes in [41, 80, 200, 1000, 40] {
            head.resize(classes).expect("other classes");
            let share = classes / 2 + u64::from(place.rank == 0) * (classes % 2);
            assert_eq!(head.shard().1, share, "{classes} classes");
        }
        assert_eq!(head.shard(), (first, count));
        assert_eq!(bits(&head.centers()), bits(&before));
        train_step(&mut head, place, &options, 3, &mut Trace::default());
    });
}

#[test]
fn classes_become_one_with_their_weights() {
    let options = base();
    let weights: Vec<f32> = (0..40).map(|class| 1.0 + class as f32).collect();
    // 7 and 20 are 39, and 3 is 4.
    let expected: Vec<i64> = {
        let mut next = -1;
        let mut map: Vec<i64> = (0..40)
            .map(|class| {
                if [3, 7, 20].contains(&class) {
                    -1
                } else {
                    next += 1;
                    next
                }
            })
            .collect();
        (map[3], map[7], map[20]) = (map[4], map[39], map[39]);
        map
    };
    let other = HeadOptions { num_classes: 37, ..options.clone() };
    let merged = |weights: Option<&[f32]>| {
        on_ranks(2, |place| {
            let mut head = trained(place, &options);
            assert_eq!(head.merge(&[3, 7, 20], &[4, 39, 39], 40, weights).expect("a merge"), expected);
            goes_on(head, place, &other)
        })
    };
    assert_same_bits("without weights", &merged(None), &loaded(&options, 37, &expected, 2, &folder("merge")));
    let before = on_ranks(2, |place| trained(place, &options).centers()).concat();
    let row = |class: usize| &before[class * DIM..(class + 1) * DIM];
    let length = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
    let found = on_ranks(2, |place| {
        let mut head = trained(place, &options);
        head.merge(&[3, 7, 20], &[4, 39, 39], 40, Some(&weights)).expect("a merge");
        head.centers()
    });
    let found = &found.concat()[36 * DIM..];
    let sources = [7, 20, 39];
    let total: f64 = sources.iter().map(|&class| f64::from(weights[class])).sum();
    let mean = |of: &dyn Fn(usize) -> f64| sources.iter().map(|&class| f64::from(weights[class]) * of(class)).sum::<f64>() / total;
    let direction: Vec<f64> = (0..DIM).map(|column| mean(&|class| f64::from(row(class)[column]) / length(row(class)))).collect();
    let scale = mean(&|class| length(row(class))) / direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (&w, x) in found.iter().zip(direction) {
        assert!((f64::from(w) - x * scale).abs() < 1e-6, "{w} and not {}", x * scale);
    }
    // Weights that are all 1 change nothing.
    assert_same_bits("weights of 1", &merged(Some(&[1.0; 40])), &merged(None));
}

#[test]
fn what_cannot_be_changes_nothing() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..base() };
        let untouched = on_ranks(2, |place| goes_on(trained(place, &options), place, &options));
        let found = on_ranks(2, |place| {
            let mut head = trained(place, &options);
            let same: Vec<i64> = (0..40).collect();
            let mut beyond = same.clone();
            beyond[17] = 40;
            let mut own = same.clone();
            own.swap(0, place.rank);
            let ranked = 40 + place.rank as u64;
            let refuse =
                |what: &str, outcome: Outcome, status: Status, words: &str| assert_failure(what, outcome, status, &[words]);
            let invalid = Status::InvalidArgument;
            refuse("no classes", head.resize(0), invalid, "num_classes must be at least 1, got 0");
            let words = "class_map has 39 entries, and the head has 40 classes";
            refuse("a short table", head.remap(40, &same[..39]), Status::Mismatch, words);
            let words = "class_map[17] must be -1 or a class of the head, 0 to 39, got 40";
            refuse("a class that is not there", head.remap(40, &beyond), invalid, words);
            let words = "rank 0 and rank 1 have been given different class_map";
            refuse("tables that differ", head.remap(40, &own), Status::Mismatch, words);
            let words = "rank 0 and rank 1 have been given different num_classes";
            refuse("numbers that differ", head.resize(ranked), Status::Mismatch, words);
            let words = "into[0] is class 2, which is in from itself";
            refuse("a class into itself", head.merge(&[2], &[2], 40, None).map(|_| ()), invalid, words);
            let words = "class_weights has 2 entries, and the head has 40 classes";
            refuse("few weights", head.merge(&[2], &[3], 40, Some(&[1.0; 2])).map(|_| ()), Status::Mismatch, words);
            let words = "class_weights[1] must be above 0 and finite, got 0.0";
            let mut weights = [1.0; 40];
            weights[1] = 0.0;
            refuse("no weight", head.merge(&[2], &[3], 40, Some(&weights)).map(|_| ()), invalid, words);
            // One rank's own.
            let outcome = head.remap(40, if place.rank == 0 { &beyond } else { &same });
            let expected = if place.rank == 0 { invalid } else { Status::Remote };
            assert_failure("a rank's own", outcome, expected, &["rank 0"]);
            goes_on(head, place, &options)
        });
        assert_same_bits(&format!("{placement:?}"), &found, &untouched);
    }
}

#[test]
fn what_was_under_way_is_over() {
    let options = base();
    on_ranks(2, |place| {
        let mut head = trained(place, &options);
        let batch = Batch::draw(&options, place.rank, 3, 4);
        let mut grad = Rows::output(4, DIM);
        // Micro-batches have classes that are about to change.
        head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("a forward");
        head.backward(1.0, 1.0, &mut grad).expect("a backward");
        head.accumulate().expect("a micro-batch");
        assert_failure("a micro-batch", head.resize(39), Status::InvalidArgument, &["1 micro-batches have been accumulated"]);
        head.update(0.1).expect("an update");
        assert_eq!(head.metrics().expect("metrics").valid_rows, 8);
        // A step under way and a prepared one.
        head.forward(&mut batch.rows(DIM), Some(&batch.labels)).expect("a forward");
        head.prepare(&batch.labels).expect("a prepared step");
        head.resize(39).expect("other classes");
        let refused = head.backward(1.0, 1.0, &mut grad);
        assert_failure("a step", refused, Status::InvalidArgument, &["the head is idle"]);
        assert_failure("a sample", head.sample_ids().map(|_| ()), Status::InvalidArgument, &["must come after pfc_head_prepare"]);
        let metrics = head.metrics().expect("metrics");
        assert_eq!((metrics.valid_rows, metrics.updates, metrics.draws), (0, 4, 5));
        // The same draw comes again.
        assert_eq!(head.read_progress().expect("progress"), (5, 4));
        // A class that is gone.
        let gone = head.forward(&mut Rows::f32(&[0.5; DIM], DIM), Some(&[39]));
        let words = ["must be 0 to 38 or ignore_label, got 39", "the head once had 40 classes, and has 39 now"];
        assert_failure("a class that is gone", gone.map(|_| ()), Status::Label, &words);
        let narrow = HeadOptions { num_classes: 39, ..options.clone() };
        train_step(&mut head, place, &narrow, 4, &mut Trace::default());
    });
}

/// Dense rows that no sample has may leave float32 unseen.
#[test]
fn a_row_that_no_head_would_take_leaves_the_classes_as_they_are() {
    let sgd = Optimizer::Sgd(Sgd { momentum: 0.0, weight_decay: 1e13 });
    let options = HeadOptions { sample_rate: 0.0, row_update: RowUpdate::Dense, optimizer: sgd, ..options(4, 2, 0) };
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &options);
    // The class that the steps look at is the last to leave it.
    head.write_centers(0, &[1e-30, 1e-30]).expect("a row");
    for _ in 0..4 {
        head.step(&mut Rows::f32(&[1.0, 2.0], 2), &[0], 0.1, &mut Rows::output(1, 2)).expect("a step");
    }
    let words = ["weight of class 1 is not finite, and no head would take it", "rank 0"];
    assert_failure("other classes", head.resize(5), Status::NotFinite, &words);
    assert_eq!(head.shard(), (0, 4));
    // Where they go they are in nobody's way.
    head.resize(1).expect("other classes");
}

/// Of two ranks one has such a row. Both go on.
#[test]
fn what_fails_on_one_rank_leaves_the_classes_on_all() {
    let sgd = Optimizer::Sgd(Sgd { momentum: 0.0, weight_decay: 1e10 });
    let options = HeadOptions { sample_rate: 0.0, row_update: RowUpdate::Dense, optimizer: sgd, ..options(6, 2, 1) };
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        // Four updates take them to 1e26 and to 1e46.
        let value = if place.rank == 0 { 1e-10 } else { 1e10 };
        head.write_centers(head.shard().0, &[value; 6]).expect("rows");
        for _ in 0..4 {
            head.forward(&mut Rows::f32(&[1.0, 2.0], 2), Some(&[0])).expect("a forward");
            head.backward(1.0, 0.0, &mut Rows::output(1, 2)).expect("a backward");
            head.update(0.1).expect("an update");
        }
        let refused = head.resize(7);
        match place.rank {
            1 => assert_failure("its own", refused, Status::NotFinite, &["weight of class 3 is not finite", "rank 1"]),
            _ => assert_failure("the other's", refused, Status::Remote, &["rank 1", "NOT_FINITE"]),
        }
        assert_eq!(head.shard(), (3 * place.rank as u64, 3));
        head.resize(3).expect("other classes");
    });
}
