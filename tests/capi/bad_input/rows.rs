//! Rows and class centers asked for or written where there are none.

use partialfc::matrix::DType;
use partialfc::options::HeadOptions;
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, Device, Head, Rows, PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::ADAMW;

#[test]
fn rows_outside_the_shard_are_refused() {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(11, 3, 4));
        let (first, count) = head.shard();
        let before = head.centers();
        let rank = format!("rank {}", place.rank);
        for (start, rows) in [(first + count, 1), (first + count - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 3), (11, 1)] {
            let what = format!("{rank}: {rows} rows from {start}");
            assert_refused(&what, head.read_centers(start, rows), Status::InvalidArgument, &["shard", &rank, &start.to_string()]);
            let values = vec![1.0; rows as usize * 3];
            assert_refused(&what, head.write_centers(start, &values), Status::InvalidArgument, &["shard", &rank]);
            assert_refused(&what, head.read_state(PFC_STATE_MOMENTUM, start, rows), Status::InvalidArgument, &["shard"]);
            assert_refused(&what, head.write_state(PFC_STATE_MOMENTUM, start, &values), Status::InvalidArgument, &["shard"]);
        }
        if first > 0 {
            assert_refused("rank 0's row", head.read_centers(first - 1, 1), Status::InvalidArgument, &["shard"]);
        }
        assert_eq!(head.read_centers(first, 0).expect("no rows"), Vec::<f32>::new());
        assert_eq!(head.centers(), before);
    });
}

#[test]
fn values_that_are_not_finite_are_not_written() {
    on_ranks(1, |place| {
        let options = HeadOptions { optimizer: ADAMW, ..options(11, 3, 4) };
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let before = head.centers();
        for bad in [f32::NAN, f32::INFINITY] {
            let values = [1.0, 2.0, 3.0, 4.0, bad, 6.0];
            let refused = head.write_centers(5, &values);
            assert_refused("class centers", refused, Status::InvalidArgument, &["class 6"]);
            assert_refused("momentum", head.write_state(PFC_STATE_MOMENTUM, 5, &values), Status::InvalidArgument, &["class 6"]);
            assert_refused(
                "second moment",
                head.write_state(PFC_STATE_SECOND_MOMENT, 5, &values),
                Status::InvalidArgument,
                &["class 6"],
            );
        }
        assert_eq!(head.centers(), before);
        assert!(head.momentum().iter().chain(&head.second_moment()).all(|&x| x == 0.0), "the state was written");
    });
}

#[test]
fn state_that_the_optimizer_does_not_have_is_refused() {
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(11, 3, 4));
        let refused = head.read_state(PFC_STATE_SECOND_MOMENT, 0, 11);
        assert_refused("SGD has no second moment", refused, Status::InvalidArgument, &["second"]);
        assert_refused("tensor 3", head.read_state(3, 0, 11), Status::InvalidArgument, &["tensor", "3"]);
        assert_refused("tensor 0", head.write_state(0, 0, &[0.0; 3]), Status::InvalidArgument, &["tensor", "0"]);
    });
}

#[test]
fn top_k_refuses_a_k_that_cannot_be() {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(11, 3, 4));
        let mut query = Rows::f32(&[1.0, 2.0, 3.0], 3);
        for k in [0, 12] {
            let odd = if place.rank == 1 { k } else { 2 };
            let refused = head.top_k(&mut query, odd);
            match place.rank {
                1 => assert_refused("rank 1", refused, Status::InvalidArgument, &["k must be 1", &k.to_string(), "11"]),
                _ => assert_refused("rank 0", refused, Status::Remote, &["rank 1"]),
            };
        }
        let refused = head.top_k(&mut query, 2 + place.rank as u64);
        assert_refused(&format!("rank {}", place.rank), refused, Status::Mismatch, &["k is", "2", "3"]);
        head.top_k(&mut query, 11).expect("all of them");
    });
}

/// Finite rows whose squares leave float32 have a direction all the same, or are refused: they are not taken for zero.
#[test]
fn large_finite_embeddings_are_used_or_refused_but_not_lost() {
    on_ranks(1, |place| {
        let options = options(5, 3, 2);
        let device = Device::under_test(1);
        let mut head = Head::new(&device, &place.comm, &options);
        head.write_centers(0, &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]).expect("rows");
        let direction = [0.6f32, 0.0, -0.8];
        let expected = head.forward(&mut Rows::f32(&direction, 3), Some(&[2])).expect("forward");
        for size in [1e15f32, 1e19, 1e25, 3e38] {
            let row: Vec<f32> = direction.iter().map(|x| x * size).collect();
            match head.forward(&mut Rows::f32(&row, 3), Some(&[2])) {
                Ok(loss) => assert!((loss - expected).abs() < 1e-5 * expected, "size {size:e}: loss {loss}, expected {expected}"),
                Err(failure) => assert_eq!(failure.status, Status::NotFinite as i32, "size {size:e}: {failure:?}"),
            }
        }
    });
}

#[test]
fn an_embedding_that_is_no_number_is_named_on_all_ranks_in_whatever_type_it_travels() {
    for gather_dtype in [None, Some(DType::F32), Some(DType::F16), Some(DType::Bf16)] {
        on_ranks(2, |place| {
            let options = HeadOptions { gather_dtype, ..options(5, 3, 2) };
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let good = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0f32];
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                // Beside elements of any size: a scale of the row's hides it no more than it makes others one.
                for beside in [1e-30, 1.0, 1e30] {
                    let mut rows = good;
                    if place.rank == 1 {
                        rows[3..].copy_from_slice(&[beside, bad, -beside]);
                    }
                    let refused = head.forward(&mut Rows::f32(&rows, 3), Some(&[1, 2]));
                    let what = format!("rank {}, {bad} beside {beside:e} in {gather_dtype:?}", place.rank);
                    assert_refused(&what, refused, Status::NotFinite, &["row 1", "rank 1"]);
                }
            }
            head.forward(&mut Rows::f32(&good, 3), Some(&[1, 2])).expect("numbers");
        });
    }
}

#[test]
fn finite_embeddings_of_any_size_travel_in_f16() {
    on_ranks(2, |place| {
        let options = HeadOptions { gather_dtype: Some(DType::F16), ..options(5, 3, 2) };
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let good = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0f32];
        let expected = head.forward(&mut Rows::f32(&good, 3), Some(&[1, 2])).expect("forward");
        // Powers of two: not a bit of the direction changes.
        for exponent in [-39, -24, -1, 14, 100, 125] {
            let rows = good.map(|x| x * 2f32.powi(exponent));
            let loss = head.forward(&mut Rows::f32(&rows, 3), Some(&[1, 2])).expect("forward");
            assert_eq!(loss, expected, "2^{exponent}");
        }
        let long = [f32::MAX, 0.0, -f32::MAX, f32::MAX, f32::MIN_POSITIVE, 1.0];
        let loss = head.forward(&mut Rows::f32(&long, 3), Some(&[1, 2])).expect("the longest rows there are");
        let short = [1.0, 0.0, -1.0, 1.0, 0.0, 0.0];
        assert_eq!(loss, head.forward(&mut Rows::f32(&short, 3), Some(&[1, 2])).expect("forward"));
    });
}
