//! GPUs of other sizes: few and many multiprocessors, and little shared memory. Heads train on them as they do on a CPU.

use std::ffi::CStr;

use partialfc::capi::device::pfc_device_info;
use partialfc::options::{HeadOptions, Precision};
use partialfc_testing::capi::{self, Comm, Device, Head, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu;
use partialfc_testing::numbers::{assert_close, widen};
use partialfc_testing::training::Batch;

const STEPS: usize = 3;

/// The losses of some steps, and the class centers after them.
fn train(device: &Device, options: &HeadOptions, rows: usize) -> (Vec<f64>, Vec<f32>) {
    let mut head = Head::new(device, &Comm::solo(), options);
    let dim = options.embedding_dim as usize;
    let losses = (0..STEPS)
        .map(|step| {
            let batch = Batch::draw(options, 0, step, rows);
            head.step(&mut batch.rows(dim), &batch.labels, 0.1, &mut Rows::output(rows, dim)).expect("a step")
        })
        .collect();
    (losses, head.centers())
}

/// The grids and the splits of a product follow the number of multiprocessors: an odd one, and more than there are tiles.
#[test]
fn gpus_with_any_number_of_multiprocessors_train_as_a_cpu_does() {
    let turn = emulator::turn(5);
    if !turn.is_emulator() {
        return;
    }
    for (precision, error) in [(Precision::F32, 1e-5), (Precision::Half, 4e-3)] {
        let options = HeadOptions { precision, sample_rate: 0.7, ..capi::options(1300, 70, 40) };
        let (losses, centers) = train(&Device::cpu(1), &options, 40);
        for multiprocessors in [2, 17, 188] {
            turn.multiprocessors(multiprocessors);
            let device = gpu();
            // SAFETY: a live device; its text lives as long.
            let info = unsafe { CStr::from_ptr(pfc_device_info(device.0)) }.to_string_lossy();
            assert!(info.contains(&format!("{multiprocessors} multiprocessors")), "{info}");
            let (found, rows) = train(&device, &options, 40);
            let what = format!("{multiprocessors} multiprocessors, {precision:?}");
            assert_close(&format!("{what}: losses"), &found, &losses, error);
            assert_close(&format!("{what}: class centers"), &widen(&rows), &widen(&centers), error);
        }
    }
}

/// A block may have 99 KiB on some GPUs and 163 or 227 on others: the stages of a product differ, and no bit does.
#[test]
fn gpus_with_little_shared_memory_compute_the_same_bits() {
    let turn = emulator::turn(6);
    if !turn.is_emulator() {
        return;
    }
    for precision in [Precision::F32, Precision::Half] {
        for dim in [512, 1024] {
            let options = HeadOptions { precision, ..capi::options(200, dim, 5) };
            turn.profile(8, 0);
            let expected = train(&gpu(), &options, 5);
            for (major, minor) in [(8, 6), (8, 9), (9, 0), (12, 0)] {
                turn.profile(major, minor);
                assert_eq!(train(&gpu(), &options, 5), expected, "{major}.{minor}, {precision:?}, dimension {dim}");
            }
        }
    }
}
