//! Start values of W: a pure function of seed, class and column.

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;

use partialfc_testing::capi::{assert_failed, options, Comm, Device, Head};
use partialfc_testing::ranks::on_ranks;

fn start(options: &HeadOptions, ranks: usize) -> Vec<f32> {
    let shards = on_ranks(ranks, |place| Head::new(&Device::under_test(1), &place.comm, options).centers());
    match options.placement {
        Placement::Sharded => shards.concat(),
        Placement::Replicated => {
            shards.iter().for_each(|rows| assert_eq!(rows, &shards[0], "replicated start values differ between ranks"));
            shards[0].clone()
        }
    }
}

#[test]
fn start_values_do_not_depend_on_ranks_or_placement() {
    let sharded = HeadOptions { seed: 77, ..options(53, 6, 4) };
    let expected = start(&sharded, 1);
    for ranks in 1..=4 {
        assert_eq!(start(&sharded, ranks), expected, "sharded over {ranks}");
        let replicated = HeadOptions { placement: Placement::Replicated, ..sharded.clone() };
        assert_eq!(start(&replicated, ranks), expected, "replicated on {ranks}");
    }
    // More classes do not move those that were there.
    let more = start(&HeadOptions { num_classes: 60, ..sharded.clone() }, 1);
    assert_eq!(more[..53 * 6], expected[..]);
    assert_ne!(start(&HeadOptions { seed: 78, ..sharded }, 1), expected, "another seed");
}

#[test]
fn start_values_are_normal_with_the_standard_deviation_asked_for() {
    for init_std in [0.01, 1.0] {
        let options = HeadOptions { init_std, seed: 3, ..options(2000, 50, 1) };
        let values = start(&options, 1);
        let n = values.len() as f64;
        let unit: Vec<f64> = values.iter().map(|&w| f64::from(w) / init_std).collect();
        let moment = |power: i32| unit.iter().map(|z| z.powi(power)).sum::<f64>() / n;
        // 100,000 values: the moments' standard errors are 0.0032, 0.0045, 0.012 and 0.031; five of each.
        assert!(moment(1).abs() < 0.016, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.023, "variance {}", moment(2));
        assert!(moment(3).abs() < 0.06, "skewness {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.155, "kurtosis {}", moment(4));
        // Neighbors by column and by class are independent.
        for lag in [1, 50] {
            let together: f64 = unit.iter().zip(&unit[lag..]).map(|(a, b)| a * b).sum::<f64>() / n;
            assert!(together.abs() < 0.016, "correlation {together} at lag {lag}");
        }
    }
}

#[test]
fn written_rows_are_read_back_and_the_others_stay() {
    let device = Device::under_test(2);
    let mut head = Head::new(&device, &Comm::solo(), &options(9, 3, 4));
    let before = head.centers();
    head.write_centers(4, &[1.5, -2.0, 0.25, 4.0, 5.0, 6.0]).expect("two rows");
    let after = head.centers();
    assert_eq!(after[12..18], [1.5, -2.0, 0.25, 4.0, 5.0, 6.0]);
    assert_eq!((&after[..12], &after[18..]), (&before[..12], &before[18..]));
    assert_eq!(head.read_centers(5, 1).expect("one row"), [4.0, 5.0, 6.0]);
    head.write_state(partialfc_testing::capi::PFC_STATE_MOMENTUM, 8, &[7.0, 8.0, 9.0]).expect("state");
    assert_eq!(head.momentum()[24..], [7.0, 8.0, 9.0]);
    assert_eq!(head.centers(), after);
}

/// Also where the threads that look at them come upon another one first.
#[test]
fn the_first_of_many_wrong_written_rows_is_named_and_none_is_written() {
    let mut head = Head::new(&Device::under_test(4), &Comm::solo(), &options(3000, 2, 4));
    let before = head.centers();
    let mut rows = vec![1.0; 2 * 2900];
    for wrong in [2899, 2000, 1600, 700] {
        rows[2 * wrong + 1] = f32::NAN;
        let outcome = head.write_centers(50, &rows);
        let words = format!("row {wrong} (class {})", wrong + 50);
        assert_failed(&outcome, Status::InvalidArgument as i32, &[&words]);
    }
    assert_eq!(head.centers(), before);
}
