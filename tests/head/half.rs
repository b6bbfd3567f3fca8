//! Precision half on the CPU, on whatever multiplies there; `PFC_CPU` chooses. tests/properties/half.rs holds its numbers to the reference,
//! and `PFC_TEST_PRECISION=half` runs other suites in it.

use std::ffi::CStr;

use partialfc::capi::device::{pfc_device_cpu, pfc_device_info};
use partialfc::matrix::DType;
use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Precision};
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, plan, to_c, Comm, Device, Head, Rows};
use partialfc_testing::numbers::{distance, norm, widen, Random};
use partialfc_testing::processes::run_alone;
use partialfc_testing::training::Batch;

use super::checkpoint::assert_failure;

const DIM: usize = 64;

/// dE and dW of a step of a head with all classes in the sample, whose only row has this cosine with its class center. The others are near it
/// too.
fn gradients(precision: Precision, cosine: f64, classes: usize) -> [Vec<f64>; 2] {
    let mut options = options(classes as u64, DIM as u32, 1);
    options.optimizer = Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0 });
    let mut head = Head::new(&Device::cpu(1), &Comm::solo(), &HeadOptions { precision, gather_dtype: None, ..options });
    let mut random = Random(7);
    let first: Vec<f64> = (0..DIM).map(|_| random.normal()).collect();
    let mut near = |i: usize| if i < DIM { first[i] } else { first[i % DIM] + random.normal() };
    let centers: Vec<f32> = (0..classes * DIM).map(&mut near).map(|x| x as f32).collect();
    head.write_centers(0, &centers).expect("class centers");
    let target = widen(&centers[..DIM]);
    let mut across: Vec<f64> = (0..DIM).map(|_| random.normal()).collect();
    let along = across.iter().zip(&target).map(|(a, t)| a * t).sum::<f64>() / norm(&target).powi(2);
    across.iter_mut().zip(&target).for_each(|(a, t)| *a -= along * t);
    let (of_target, of_across) = (cosine / norm(&target), (1.0 - cosine * cosine).sqrt() / norm(&across));
    let row: Vec<f32> = target.iter().zip(&across).map(|(t, a)| (t * of_target + a * of_across) as f32).collect();
    let mut grad = Rows::output(1, DIM);
    head.step(&mut Rows::f32(&row, DIM), &[0], 0.1, &mut grad).expect("a step");
    [grad.values(), widen(&head.momentum())]
}

#[test]
fn a_row_that_has_converged_keeps_its_gradients_signs_and_two_digits() {
    let [exact, half] = [Precision::F32, Precision::Half].map(|precision| gradients(precision, 0.99, 200));
    for (what, exact, half) in [("dE", &exact[0], &half[0]), ("dW", &exact[1], &half[1])] {
        assert!(norm(exact) > 0.0, "{what}");
        let largest = exact.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
        let counted: Vec<_> = exact.iter().zip(half).filter(|(exact, _)| exact.abs() > largest / 4.0).collect();
        assert!(counted.len() >= DIM / 4, "{what}: {}", counted.len());
        for (exact, half) in counted {
            assert!((half / exact - 1.0).abs() < 0.01, "{what}: {half:e}, in f32 {exact:e}");
        }
    }
}

/// Where embeddings travel as they are it is that of f32, but for cosines that are products in two terms.
#[test]
fn the_loss_is_that_of_f32() {
    let losses = [Precision::F32, Precision::Half].map(|precision| {
        let options = HeadOptions { precision, gather_dtype: Some(DType::F32), ..options(700, 512, 33) };
        let batch = Batch::draw(&options, 0, 0, 33);
        let mut head = Head::new(&Device::cpu(2), &Comm::solo(), &options);
        head.forward(&mut batch.rows(512), Some(&batch.labels)).expect("a forward")
    });
    assert!((losses[1] / losses[0] - 1.0).abs() <= 1e-5, "{losses:?}");
}

#[test]
fn operands_of_the_gradients_are_rounded() {
    let [exact, half] = [Precision::F32, Precision::Half].map(|precision| gradients(precision, 0.3, 300));
    for (what, exact, half) in [("dE", &exact[0], &half[0]), ("dW", &exact[1], &half[1])] {
        let off = distance(half, exact) / norm(exact);
        assert!((1e-5..4e-3).contains(&off), "{what} is off by {off:e}");
    }
}

/// `PFC_CPU` is read once, when the first device is made.
#[test]
fn an_instruction_set_can_be_chosen() {
    let mut raw = std::ptr::null_mut();
    // SAFETY: an output that outlives the call.
    let mut make = || outcome(unsafe { pfc_device_cpu(1, &mut raw) });
    match std::env::var("PFC_CPU").as_deref() {
        Ok("portable") => {
            make().expect("what every machine has");
            let device = Device(raw);
            // SAFETY: a live device, whose text lives as long.
            assert_eq!(unsafe { CStr::from_ptr(pfc_device_info(device.0)) }, c"cpu: 1 threads, portable");
        }
        Ok("mmx") => {
            assert_failure("a device", make(), Status::InvalidArgument, &["PFC_CPU must be one of", "avx2", "got \"mmx\""]);
        }
        _ => ["portable", "mmx"]
            .into_iter()
            .for_each(|cpu| run_alone(module_path!(), "an_instruction_set_can_be_chosen", "PFC_CPU", cpu)),
    }
}

#[test]
fn numerators_take_half_the_memory() {
    // 1,024 rows: 64 lines of floats, or 32 of pairs, and one that keeps columns apart in the cache.
    let of = |precision| {
        let options = HeadOptions { precision, ..options(100_000, 512, 1024) };
        plan(&to_c(&options), 1, 1024).expect("a plan").probability_bytes
    };
    let chunks = 100_000u64.div_ceil(256);
    assert_eq!(of(Precision::F32), chunks * 256 * 65 * 64);
    assert_eq!(of(Precision::Half), chunks * 256 * 33 * 64);
}
