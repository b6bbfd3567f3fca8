//! Updates that take class centers out of their type, and values that no center or state can have.

use partialfc::optimizer::{Adamw, Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, Device, Failure, Head, Outcome, Rows, PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
use partialfc_testing::numbers::Random;
use partialfc_testing::ranks::on_ranks;

fn step(head: &mut Head, rate: f64) -> Outcome<f64> {
    let embeddings = Random(3).normals(4 * 4, 1.0);
    head.step(&mut Rows::f32(&embeddings, 4), &[0, 1, 2, 3], rate, &mut Rows::output(4, 4))
}

/// The first failure of steps at this rate.
fn first_failure(head: &mut Head, rate: f64) -> Failure {
    (0..200).find_map(|_| step(head, rate).err()).expect("a class center that leaves float32")
}

/// On a CPU the step that does it says so; on a GPU the next one, as nobody waits for an update.
#[test]
fn an_update_that_leaves_float32_names_the_class() {
    let exploding = Optimizer::Sgd(Sgd { momentum: 0.0, weight_decay: 50.0 });
    for (optimizer, rate) in [(exploding, 0.1), (options(10, 4, 4).optimizer, 1e38)] {
        on_ranks(1, |place| {
            let options = HeadOptions { optimizer, ..options(10, 4, 4) };
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let told = assert_refused::<()>("told", Err(first_failure(&mut head, rate)), Status::NotFinite, &["class center"]);
            assert!(told.message.contains("out of the range of its type"), "{told:?}");
            assert_refused("poisoned", step(&mut head, 0.1), Status::Poisoned, &["load a checkpoint"]);
            assert_refused("poisoned", head.read_centers(0, 1), Status::Poisoned, &[]);
        });
    }
}

/// The same for an update by the gradients of micro-batches.
#[test]
fn an_accumulated_update_that_leaves_float32_names_the_class() {
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 4));
        let embeddings = Random(3).normals(4 * 4, 1.0);
        let mut micro_batch = || {
            head.forward(&mut Rows::f32(&embeddings, 4), Some(&[0, 1, 2, 3]))?;
            head.backward(1.0, 1.0, &mut Rows::output(4, 4))?;
            head.accumulate()?;
            head.update(1e38)
        };
        let told = (0..200).find_map(|_| micro_batch().err()).expect("a class center that leaves float32");
        assert_refused::<()>("told", Err(told), Status::NotFinite, &["class center", "out of the range of its type"]);
        assert_refused("poisoned", step(&mut head, 0.1), Status::Poisoned, &["load a checkpoint"]);
    });
}

/// The rank whose class it is says which; no rank waits for it.
#[test]
fn other_ranks_do_not_wait_for_a_rank_whose_update_failed() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..options(10, 4, 4) };
        let told = on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            first_failure(&mut head, 1e38)
        });
        assert!(told.iter().any(|failure| failure.message.contains("class center")), "{told:?}");
        let expected = [Status::NotFinite as i32, Status::Aborted as i32, Status::Remote as i32];
        assert!(told.iter().all(|failure| expected.contains(&failure.status)), "{told:?}");
    }
}

/// Dense rows move without an update of their own: the forward that reads them names the class.
#[test]
fn a_dense_row_that_has_left_float32_is_named_by_the_forward_that_reads_it() {
    let optimizer = Optimizer::Sgd(Sgd { momentum: 0.0, weight_decay: 50.0 });
    let options = HeadOptions { optimizer, row_update: RowUpdate::Dense, sample_rate: 0.0, ..options(150, 4, 4) };
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let mut rows = Rows::f32(&[1.0; 8], 4);
        // Each of these multiplies the rows that take no part by -4.
        head.write_centers(0, &[1e-30; 8]).expect("two rows that take part, small enough to remain");
        for _ in 0..80 {
            head.step(&mut rows, &[0, 1], 0.1, &mut Rows::output(2, 4)).expect("a step of two classes");
        }
        let told = ["class center 7 is not finite"];
        assert_refused("forward", head.forward(&mut rows, Some(&[0, 7])), Status::NotFinite, &told);
        assert_refused("top_k", head.top_k(&mut rows, 1), Status::NotFinite, &["class center", "not finite"]);
        assert_refused("top_k of all", head.top_k(&mut rows, 150), Status::NotFinite, &["class center", "not finite"]);
    });
}

#[test]
fn a_second_moment_below_zero_is_refused() {
    let optimizer = Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 });
    let options = HeadOptions { optimizer, ..options(10, 4, 4) };
    on_ranks(1, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let values = [1.0, 0.0, 2.0, 3.0, 1.0, -1e-30, 0.0, 0.0];
        let refused = head.write_state(PFC_STATE_SECOND_MOMENT, 3, &values);
        assert_refused("negative", refused, Status::InvalidArgument, &["row 1 (class 4)", "second moment", "negative"]);
        assert_eq!(head.second_moment(), [0.0; 40], "nothing is written");
        head.write_state(PFC_STATE_SECOND_MOMENT, 3, &[0.0, -0.0, 1e-45, 3e38]).expect("values that it can have");
        head.write_state(PFC_STATE_MOMENTUM, 3, &values).expect("a momentum has any sign");
    });
}
