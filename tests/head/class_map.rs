//! Classes that come, go, change their numbers and become one when a checkpoint is loaded.

use std::path::Path;

use partialfc::options::HeadOptions;
use partialfc::Status;
use partialfc_testing::capi::{options, Comm, Device, Head};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, bits, stored_both_ways, train_step, ways_to_update, Trace};

use super::checkpoint::{assert_failure, folder};

const DIM: usize = 12;

fn base(classes: u64) -> HeadOptions {
    HeadOptions { sample_rate: 0.5, seed: 8, ..options(classes, DIM as u32, 6) }
}

/// W and momentum after three steps on two ranks, saved.
fn saved(options: &HeadOptions, folder: &Path) -> [Vec<f32>; 2] {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        (0..3).for_each(|step| train_step(&mut head, place, options, step, &mut Trace::default()));
        head.save(folder).expect("a save");
    });
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), options);
    head.load(folder).expect("a load");
    [head.centers(), head.momentum()]
}

fn row(rows: &[f32], class: usize) -> &[f32] {
    &rows[class * DIM..(class + 1) * DIM]
}

/// Of 40 classes: 3 and 39 go, 7 and 20 turn out to be 8, the others move up behind them, and 16 new ones come.
pub(super) fn table() -> Vec<i64> {
    let mut next = 0;
    let mut moved: Vec<i64> = (0..40)
        .map(|class| match class {
            3 | 39 => -1,
            7 | 20 => -2,
            _ => {
                next += 1;
                next - 1
            }
        })
        .collect();
    let merged = moved[8];
    moved.iter_mut().filter(|to| **to == -2).for_each(|to| *to = merged);
    moved
}

#[test]
fn classes_come_go_and_become_one() {
    let table = table();
    for (number, narrow) in ways_to_update(&base(40)).into_iter().flat_map(stored_both_ways).enumerate() {
        let folder = folder(&format!("map-{number}"));
        let [centers, momentum] = saved(&narrow, &folder);
        let wide = HeadOptions { num_classes: 52, ..narrow.clone() };
        let fresh = Head::new(&Device::under_test(1), &Comm::solo(), &wide).centers();
        on_ranks(3, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &wide);
            train_step(&mut head, place, &wide, 9, &mut Trace::default());
            head.load_mapped(&folder, &table).expect("a load");
            assert_eq!(head.read_progress().expect("progress"), (3, 3));
            let (first, count) = head.shard();
            let (found, state) = (head.centers(), head.momentum());
            for class in first..first + count {
                let (own, sources) = ((class - first) as usize, (0..40).filter(|&from| table[from] == class as i64));
                let what = format!("{wide:?}: class {class}");
                match sources.collect::<Vec<usize>>()[..] {
                    [] => {
                        assert_eq!(bits(row(&found, own)), bits(row(&fresh, class as usize)), "{what} begins anew");
                        assert!(class >= 36 && row(&state, own).iter().all(|&m| m == 0.0), "{what}");
                    }
                    [from] => {
                        assert_eq!(bits(row(&found, own)), bits(row(&centers, from)), "{what} was {from}");
                        assert_eq!(bits(row(&state, own)), bits(row(&momentum, from)), "{what} was {from}");
                    }
                    ref several => {
                        assert_eq!((several, class), (&[7, 8, 20][..], 6), "{what}");
                        let length = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
                        let mean = |column: usize| -> f64 {
                            several.iter().map(|&from| f64::from(row(&centers, from)[column]) / length(row(&centers, from))).sum()
                        };
                        let direction: Vec<f64> = (0..DIM).map(mean).collect();
                        let scale = several.iter().map(|&from| length(row(&centers, from))).sum::<f64>()
                            / 3.0
                            / direction.iter().map(|x| x * x).sum::<f64>().sqrt();
                        for (&w, x) in row(&found, own).iter().zip(direction) {
                            let error = (f64::from(w) - x * scale).abs();
                            assert!(error <= 4e-3 * (x * scale).abs() + 1e-9, "{what}: {w} and not {}", x * scale);
                        }
                        assert!(row(&state, own).iter().all(|&m| m == 0.0), "{what}");
                    }
                }
            }
            // And on it goes, with the new labels.
            train_step(&mut head, place, &wide, 3, &mut Trace::default());
        });
    }
}

#[test]
fn a_table_that_changes_nothing_changes_nothing() {
    let options = base(40);
    let folder = folder("map-same");
    saved(&options, &folder);
    let run = |table: Option<Vec<i64>>| {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            match &table {
                Some(table) => head.load_mapped(&folder, table).expect("a load"),
                None => head.load(&folder).expect("a load"),
            }
            let mut trace = Trace::default();
            (3..6).for_each(|step| train_step(&mut head, place, &options, step, &mut trace));
            trace.saw_rows(&mut head, &options);
            trace
        })
    };
    assert_same_bits("a table", &run(Some((0..40).collect())), &run(None));
}

#[test]
fn a_table_that_cannot_be_changes_nothing() {
    let options = base(40);
    let folder = folder("map-refused");
    saved(&options, &folder);
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let before = head.centers();
        let short: Vec<i64> = (0..39).collect();
        let refused = head.load_mapped(&folder, &short);
        assert_failure("a short table", refused, Status::Mismatch, &["class_map has 39 entries", "has 40 classes", "rank"]);
        let mut beyond: Vec<i64> = (0..40).collect();
        beyond[17] = 40;
        let refused = head.load_mapped(&folder, &beyond);
        let words = ["class_map[17] must be -1 or a class of the head, 0 to 39, got 40", "rank"];
        assert_failure("a class that is not there", refused, Status::InvalidArgument, &words);
        let mut own: Vec<i64> = (0..40).collect();
        own.swap(0, place.rank);
        let words = ["rank 0 and rank 1 have been given different class maps"];
        assert_failure("tables that differ", head.load_mapped(&folder, &own), Status::Mismatch, &words);
        assert_eq!(head.centers(), before);
        train_step(&mut head, place, &options, 0, &mut Trace::default());
    });
}
