//! A factor of the update in the GPU's memory: read in the order of the stream, with no wait, and the same on all ranks.

use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::Status;
use partialfc_testing::capi::{assert_failed, options, Head, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, Remote};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, learning_rate, Batch, Trace};

const ROWS: usize = 3;

fn heads() -> [HeadOptions; 3] {
    let sharded = HeadOptions { sample_rate: 0.5, ..options(40, 6, ROWS as u64) };
    let dense = HeadOptions { row_update: RowUpdate::Dense, ..sharded.clone() };
    [HeadOptions { placement: Placement::Replicated, ..sharded.clone() }, dense, sharded]
}

/// Prepared ahead, so that labels travel beside the updates; the factor of each step from host or device memory.
fn train(options: &HeadOptions, ranks: usize, factors: &[f32], on_device: bool) -> Vec<Trace> {
    on_ranks(ranks, |place| {
        let mut head = Head::new(&gpu(), &place.comm, options);
        let mut trace = Trace::default();
        for (step, factor) in factors.iter().enumerate() {
            let batch = |step| Batch::draw(options, place.rank, step, ROWS);
            let mut grad = Rows::output(ROWS, head.dim);
            let again = step == 0;
            let loss = head.forward(&mut batch(step).rows(head.dim), again.then_some(&batch(step).labels)).expect("forward");
            let sample = head.sample_ids().expect("the sample");
            if step + 1 < factors.len() {
                head.prepare(&batch(step + 1).labels).expect("prepare");
            }
            head.backward(1.0, 1.0, &mut grad).expect("backward");
            let there = Remote::of(&[*factor]);
            let pointer = if on_device { there.pointer::<f32>().cast_const() } else { factor };
            head.update_with(learning_rate(step), 0.5, pointer).expect("update");
            trace.saw_step(loss, &grad, sample);
            head.wait().expect("all is well");
        }
        let skipped = factors.iter().filter(|factor| !factor.is_finite()).count() as u64;
        let metrics = head.last_metrics().expect("metrics");
        assert_eq!((metrics.updates, metrics.skipped_updates), (factors.len() as u64 - skipped, skipped));
        trace.saw_rows(&mut head, options);
        trace
    })
}

#[test]
fn a_factor_in_device_memory_gives_the_bits_of_one_in_host_memory() {
    let _turn = emulator::turn(11);
    for options in heads() {
        for ranks in [1, 2] {
            let factors = [1.0, 0.25, f32::NAN, 3.0, f32::INFINITY, 1.0];
            let there = train(&options, ranks, &factors, true);
            assert_same_bits(&format!("{options:?}"), &there, &train(&options, ranks, &factors, false));
        }
    }
}

#[test]
fn other_factors_in_device_memory_are_a_mismatch() {
    let _turn = emulator::turn(12);
    for options in heads() {
        on_ranks(2, |place| {
            let mut head = Head::new(&gpu(), &place.comm, &options);
            for step in 0..2 {
                let batch = Batch::draw(&options, place.rank, step, ROWS);
                let told = head.forward(&mut batch.rows(head.dim), Some(&batch.labels));
                if step == 1 {
                    assert_failed(&told.map(drop), Status::Mismatch as i32, &["factor", "0.5 on rank 0", "not finite on rank 1"]);
                    break;
                }
                head.backward(1.0, 1.0, &mut Rows::output(ROWS, head.dim)).expect("backward");
                let factor = Remote::of(&[[0.5, f32::NAN][place.rank]]);
                head.update_with(0.1, 1.0, factor.pointer()).expect("nothing is compared in an update");
                head.wait().expect("all is well");
            }
        });
    }
}
