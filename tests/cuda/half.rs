//! Precision half on a GPU: what travels in it. The numbers are held to the reference in tests/properties/half.rs.

use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Precision};
use partialfc::Status;
use partialfc_testing::capi::{self, plan, plan_cuda, to_c, traffic_between, Head, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu;
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::Batch;

/// What a communicator counts of a step is what the plan of a GPU says, and that of a CPU in the same precision.
#[test]
fn full_batches_hand_over_the_bytes_that_the_plan_names() {
    let _turn = emulator::turn(3);
    for precision in [Precision::Half, Precision::F32, Precision::Auto] {
        for gather_dtype in [None, Some(DType::F32), Some(DType::F16), Some(DType::Bf16)] {
            let options = HeadOptions { precision, gather_dtype, ..capi::options(101, 7, 6) };
            let mut planned = to_c(&options);
            if precision == Precision::Auto {
                planned.precision = Precision::Half as i32;
            }
            let report = plan_cuda(&to_c(&options), 2, 3, 1 << 30).expect("a plan of a GPU");
            let of_a_cpu = plan(&planned, 2, 6).expect("a plan");
            assert_eq!(of_a_cpu.traffic_bytes, report.traffic_bytes, "{precision:?} {gather_dtype:?}");
            let bytes = gather_dtype.map_or(if precision == Precision::F32 { 4 } else { 2 }, DType::size) as u64;
            assert_eq!(report.embeddings_bytes, 6 * 7 * bytes, "{precision:?} {gather_dtype:?}");
            on_ranks(2, |place| {
                let mut head = Head::create(&gpu(), &place.comm, &to_c(&options)).expect("a head");
                let batch = Batch::draw(&options, place.rank, 0, 6);
                let before = place.comm.traffic();
                head.step(&mut batch.rows(7), &batch.labels, 0.1, &mut Rows::output(6, 7)).expect("a step");
                let counted = traffic_between(&before, &place.comm.traffic());
                let named = [report.labels_bytes + report.embeddings_bytes, report.sums_bytes, report.grad_embeddings_bytes, 0];
                assert_eq!(counted, named, "{precision:?} {gather_dtype:?}, rank {}", place.rank);
            });
        }
    }
}

/// A row that is no number is one for all ranks, whatever it was scaled by to travel.
#[test]
fn a_row_that_is_no_number_is_named_on_all_ranks() {
    let _turn = emulator::turn(4);
    let options = HeadOptions { precision: Precision::Half, ..capi::options(11, 3, 2) };
    on_ranks(2, |place| {
        let mut head = Head::new(&gpu(), &place.comm, &options);
        for (bad, beside) in [(f32::NAN, 1e-30), (f32::INFINITY, 1e30), (f32::NEG_INFINITY, 1.0)] {
            let mut rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0f32];
            if place.rank == 1 {
                rows[3..].copy_from_slice(&[beside, bad, -beside]);
            }
            let failure = head.forward(&mut Rows::f32(&rows, 3), Some(&[1, 2])).expect_err("no number");
            assert_eq!(failure.status, Status::NotFinite as i32, "{failure:?}");
            assert!(failure.message.contains("row 1") && failure.message.contains("rank 1"), "{failure:?}");
        }
        // The largest numbers there are, and rows without a direction: those have no gradient at all.
        let mut grad = Rows::output(2, 3);
        head.forward(&mut Rows::f32(&[f32::MAX, 0.0, -f32::MAX, 1e-13, -1e-13, 0.0], 3), Some(&[1, 2])).expect("numbers");
        head.backward(1.0, 1.0, &mut grad).expect("backward");
        assert!(grad.values().iter().all(|g| g.is_finite()), "{grad:?}");
        assert_eq!(grad.values()[3..], [0.0; 3]);
    });
}
