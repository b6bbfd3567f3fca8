//! Gradients of micro-batches in the GPU's memory: the sums of a CPU, without a wait once there is room for them.
//!
//! On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU.

use partialfc::options::{HeadOptions, Placement, Precision, RowUpdate};
use partialfc_testing::capi::{options, to_c, Comm, Device, Head, Rows, LEAST};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu;
use partialfc_testing::numbers::assert_close;
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{Batch, Trace, ADAMW};

use super::loss::{Step, CLASSES, DIM, ROWS, WAITS};

fn heads() -> Vec<HeadOptions> {
    let sharded = HeadOptions { sample_rate: 0.3, precision: Precision::F32, ..options(CLASSES, DIM as u32, ROWS as u64) };
    let replicated = HeadOptions { placement: Placement::Replicated, optimizer: ADAMW, ..sharded.clone() };
    vec![
        HeadOptions { row_update: RowUpdate::Dense, ..sharded.clone() },
        HeadOptions { row_update: RowUpdate::Dense, optimizer: ADAMW, workspace_limit: LEAST, ..sharded.clone() },
        HeadOptions { row_update: RowUpdate::Dense, ..replicated.clone() },
        replicated,
        HeadOptions { workspace_limit: LEAST, ..sharded.clone() },
        sharded,
    ]
}

/// Updates by two micro-batches that have been accumulated, by one and the step under way, and none at all.
fn train(device: &Device, place: &Rank, options: &HeadOptions) -> Trace {
    let mut head = Head::new(device, &place.comm, options);
    let batch = |step| Batch::draw(options, place.rank, step, ROWS);
    for step in 0..7 {
        // Some have been prepared before the update.
        let labels = batch(step).labels;
        let given = if [2, 4].contains(&step) { None } else { Some(&labels[..]) };
        head.forward(&mut batch(step).rows(DIM), given).expect("forward");
        head.backward(1.0, 1.0, &mut Rows::output(ROWS, DIM)).expect("backward");
        match step {
            0 | 2 | 4 | 5 => head.accumulate().expect("accumulate"),
            1 => {
                head.accumulate().expect("accumulate");
                head.prepare(&batch(2).labels).expect("prepare");
                head.update(0.1).expect("an update of what was kept");
            }
            3 => {
                head.prepare(&batch(4).labels).expect("prepare");
                head.update_with(0.2, 0.5, std::ptr::null()).expect("an update of both");
            }
            _ => head.update_with(0.1, f64::NAN, std::ptr::null()).expect("skipped"),
        }
    }
    let metrics = head.last_metrics().expect("metrics");
    assert_eq!((metrics.updates, metrics.skipped_updates), (2, 1));
    let mut trace = Trace::default();
    trace.saw_rows(&mut head, options);
    trace
}

#[test]
fn a_gpu_accumulates_as_a_cpu_does() {
    let _turn = emulator::turn(21);
    for options in heads() {
        let found = on_ranks(2, |place| train(&gpu(), place, &options));
        let options = HeadOptions { workspace_limit: 0, ..options };
        let expected = on_ranks(2, |place| train(&Device::cpu(1), place, &options));
        for (found, expected) in found.iter().zip(&expected) {
            assert_close(&format!("W of {options:?}"), &found.centers(), &expected.centers(), 2e-5);
            assert_close(&format!("momentum of {options:?}"), &found.momentum(), &expected.momentum(), 2e-5);
        }
    }
}

/// A step that the GPU finds to have failed adds nothing, and the update is of the others; without any there is none.
#[test]
fn a_step_that_fails_late_is_not_accumulated() {
    let _turn = emulator::turn(22);
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..options(CLASSES, DIM as u32, ROWS as u64) };
        let train = |bad: bool| {
            on_ranks(2, |place| {
                let device = gpu();
                let mut head = Head::create(&device, &place.comm, &to_c(&options)).expect("a head");
                let steps: Vec<Step> =
                    (0..4).map(|number| Step::draw(place.rank, number, number % 2 == 1 && place.rank == 1)).collect();
                for (number, step) in steps[..3].iter().enumerate() {
                    if number == 1 && !bad {
                        continue;
                    }
                    step.begin(&head).expect("an enqueued step");
                    head.accumulate().expect("accumulate");
                }
                head.update(0.1).expect("update");
                assert_eq!(head.wait().is_err(), bad);
                let centers = head.centers();
                if bad {
                    steps[3].begin(&head).expect("an enqueued step");
                    head.accumulate().expect("accumulate");
                    head.update(0.1).expect("an update of nothing");
                    head.wait().expect_err("a label that is no class");
                    assert_eq!(head.centers(), centers);
                    assert_eq!(head.last_metrics().expect("metrics").updates, 1);
                }
                centers
            })
        };
        assert_eq!(train(true), train(false), "{placement:?}");
    }
}

#[test]
fn micro_batches_wait_for_nothing_once_there_is_room() {
    let turn = emulator::turn(23);
    let (device, comm) = (gpu(), Comm::solo());
    for options in heads() {
        let options = HeadOptions { workspace_limit: 0, ..options };
        let mut head = Head::create(&device, &comm, &to_c(&options)).expect("a head");
        let steps: Vec<Step> = (0..6).map(|number| Step::draw(0, number, false)).collect();
        let waits = || WAITS.map(|function| turn.calls(function));
        let mut before = waits();
        for (number, step) in steps.iter().enumerate() {
            if number == 3 {
                before = waits();
            }
            step.begin(&head).expect("an enqueued step");
            head.accumulate().expect("accumulate");
            if number % 3 == 2 {
                head.update(0.1).expect("update");
            }
        }
        assert_eq!(waits(), before, "{WAITS:?}");
        head.wait().expect("good steps");
    }
}
