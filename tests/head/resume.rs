//! What a head is made of can be read, and another head goes on from it to the bit.

use partialfc::optimizer::{Adamw, Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc_testing::capi::{on_cuda, options, Comm, Device, Head, Rows, PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{stored_both_ways, Batch};

const DIM: usize = 6;
const BATCH: usize = 4;

fn step(head: &mut Head, options: &HeadOptions, rank: usize, number: usize) -> (u64, Vec<f32>) {
    let batch = Batch::draw(options, rank, number, BATCH);
    let mut grad = Rows::output(BATCH, DIM);
    let rate = 0.05 / (1.0 + number as f64);
    let loss = head.step(&mut batch.rows(DIM), &batch.labels, rate, &mut grad).expect("a step");
    (loss.to_bits(), grad.values_f32())
}

fn has_second(options: &HeadOptions) -> bool {
    matches!(options.optimizer, Optimizer::Adamw(_))
}

/// Everything of a head that there is to save.
#[derive(Debug, PartialEq)]
struct Saved {
    progress: (u64, u64),
    centers: Vec<f32>,
    momentum: Vec<f32>,
    second_moment: Vec<f32>,
}

fn save(head: &mut Head, options: &HeadOptions) -> Saved {
    Saved {
        progress: head.read_progress().expect("progress"),
        centers: head.centers(),
        momentum: head.momentum(),
        second_moment: if has_second(options) { head.second_moment() } else { Vec::new() },
    }
}

fn restore(comm: &Comm, options: &HeadOptions, saved: &Saved) -> Head {
    let mut head = Head::new(&Device::under_test(1), comm, options);
    let first = head.shard().0;
    head.write_centers(first, &saved.centers).expect("class centers");
    head.write_state(PFC_STATE_MOMENTUM, first, &saved.momentum).expect("momentum");
    if has_second(options) {
        head.write_state(PFC_STATE_SECOND_MOMENT, first, &saved.second_moment).expect("second moment");
    }
    head.write_progress(saved.progress).expect("progress");
    head
}

/// On the emulator what it can do in a minute.
fn every_kind() -> impl Iterator<Item = HeadOptions> {
    let sgd = Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-2 });
    let adamw = Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 });
    let rates = if on_cuda() { &[0.3][..] } else { &[0.3, 1.0] };
    let kinds = [sgd, adamw].into_iter().flat_map(move |optimizer| rates.iter().map(move |&sample_rate| (optimizer, sample_rate)));
    let kinds = kinds.flat_map(|kind| [RowUpdate::Lazy, RowUpdate::Dense].map(|row_update| (kind, row_update)));
    let heads = kinds.flat_map(|((optimizer, sample_rate), row_update)| {
        [Placement::Sharded, Placement::Replicated].map(|placement| HeadOptions {
            optimizer,
            sample_rate,
            row_update,
            placement,
            ..options(40, DIM as u32, BATCH as u64)
        })
    });
    heads.flat_map(stored_both_ways)
}

#[test]
fn a_restored_head_goes_on_to_the_bit() {
    for options in every_kind() {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            (0..7).for_each(|number| drop(step(&mut head, &options, place.rank, number)));
            let saved = save(&mut head, &options);
            assert_eq!(saved.progress, (7, 7));
            let mut restored = restore(&place.comm, &options, &saved);
            assert_eq!(save(&mut restored, &options), saved, "{options:?}: what was written");
            for number in 7..12 {
                let expected = step(&mut head, &options, place.rank, number);
                assert_eq!(step(&mut restored, &options, place.rank, number), expected, "{options:?}: step {number}");
                assert_eq!(restored.sample_ids(), head.sample_ids(), "{options:?}: sample {number}");
            }
            assert_eq!(save(&mut restored, &options), save(&mut head, &options), "{options:?}: five steps later");
            assert_eq!(restored.metrics().expect("metrics").updates, 12);
        });
    }
}

/// A sample that was drawn early and not used is drawn again by who goes on from here.
#[test]
fn progress_between_prepare_and_forward() {
    let lazy = HeadOptions { sample_rate: 0.3, ..options(40, DIM as u32, BATCH as u64) };
    // Saving rounds dense rows that are behind, and a GPU may have gathered some for the step that is prepared.
    let [_, dense] = stored_both_ways(HeadOptions { row_update: RowUpdate::Dense, ..lazy.clone() });
    for options in [lazy, dense] {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            (0..4).for_each(|number| drop(step(&mut head, &options, place.rank, number)));
            let batch = Batch::draw(&options, place.rank, 4, BATCH);
            head.prepare(&batch.labels).expect("a prepared step");
            let prepared = head.sample_ids().expect("its sample");
            let saved = save(&mut head, &options);
            assert_eq!(saved.progress, (4, 4));
            let mut restored = restore(&place.comm, &options, &saved);
            let again = step(&mut restored, &options, place.rank, 4);
            assert_eq!(restored.sample_ids().expect("a sample"), prepared);
            // The head that was saved goes on with the step that it has prepared.
            let mut grad = Rows::output(BATCH, DIM);
            let loss = head.forward(&mut batch.rows(DIM), None).expect("a forward");
            head.backward(1.0, 1.0, &mut grad).expect("a backward");
            assert_eq!((loss.to_bits(), grad.values_f32()), again, "{options:?}");
        });
    }
}

/// A head that has gone elsewhere: its stale dense rows are brought to now before its count of updates becomes another.
#[test]
fn progress_of_a_head_that_has_rows_of_its_own() {
    let one = |options: &HeadOptions| !on_cuda() || options.placement == Placement::Sharded;
    for options in every_kind().filter(|options| options.row_update == RowUpdate::Dense).filter(one) {
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            (0..5).for_each(|number| drop(step(&mut head, &options, place.rank, number)));
            // Brings them to now, which rounds what is stored in bfloat16.
            head.read_progress().expect("progress");
            let before = (head.centers(), head.momentum());
            head.write_progress((100, 200)).expect("progress");
            assert_eq!((head.centers(), head.momentum()), before, "{options:?}: the rows keep their values");
            assert_eq!(head.read_progress(), Ok((100, 200)));
            let saved = save(&mut head, &options);
            let mut restored = restore(&place.comm, &options, &saved);
            assert_eq!(step(&mut restored, &options, place.rank, 5), step(&mut head, &options, place.rank, 5), "{options:?}");
            assert_eq!(save(&mut restored, &options), save(&mut head, &options), "{options:?}");
        });
    }
}

#[test]
fn progress_that_no_head_can_have() {
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 3));
        let refused = head.write_progress((1 << 56, 0)).expect_err("too many draws");
        assert!(refused.message.contains("draws must be below 2^56"), "{refused:?}");
        let refused = head.write_progress((0, 1 << 32)).expect_err("too many updates");
        assert!(refused.message.contains("updates must be below 2^32"), "{refused:?}");
        assert_eq!(head.read_progress(), Ok((0, 0)));
        head.write_progress(((1 << 56) - 1, (1 << 32) - 1)).expect("the last that fits");
    });
}
