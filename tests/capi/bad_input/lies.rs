//! Transports that bring back what the ranks did not send, or bring it to another place. No number of another rank's is an index before
//! it was checked, no memory of the caller's is touched beyond what this rank handed in, and the status is COMM.

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, Device, Failure, Head, Outcome, Rows};
use partialfc_testing::ranks::on_comms;
use partialfc_testing::transport::{group, Fault};

const MAX_BATCH: usize = 8;

/// Rank r has as many rows: an own block that is another rank's would have another batch.
fn rows_of(rank: usize) -> usize {
    3 * rank + 1
}

/// What two ranks hear of a call in which operation `at` of rank 0 lies; its buffers end where the rank's batch does.
fn lied_to(placement: Placement, at: i64, fault: Fault, call: impl Fn(usize, &mut Head) -> Outcome<()> + Sync) -> Vec<Outcome<()>> {
    let options = HeadOptions { placement, ..options(10, 4, MAX_BATCH as u64) };
    let (comms, transports) = group(2);
    on_comms(comms, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        if place.rank == 0 {
            transports[0].plant(at, fault);
        }
        call(place.rank, &mut head)
    })
}

fn step(rank: usize, head: &mut Head) -> Outcome<()> {
    let rows = rows_of(rank);
    let labels = vec![rank as i64; rows];
    head.step(&mut Rows::f32(&vec![1.0; 4 * rows], 4), &labels, 0.1, &mut Rows::output(rows, 4)).map(|_| ())
}

fn top_k(rank: usize, head: &mut Head) -> Outcome<()> {
    head.top_k(&mut Rows::f32(&vec![1.0; 4 * rows_of(rank)], 4), 3).map(|_| ())
}

/// The rank that was lied to says COMM, the other one hears of it in this step or in the next.
#[track_caller]
fn assert_comm(what: &str, outcomes: Vec<Outcome<()>>, words: &[&str]) -> Failure {
    let own = outcomes.into_iter().next().expect("rank 0's");
    assert_refused(what, own, Status::Comm, words)
}

#[test]
fn blocks_in_another_order() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let what = format!("{placement:?}");
        let told = lied_to(placement, 0, Fault::Reversed, step);
        assert_comm(&format!("{what} step"), told, &["own block of rank 0", "all_gather of the labels"]);
        let told = lied_to(placement, 0, Fault::Reversed, top_k);
        assert_comm(&format!("{what} top_k"), told, &["own block of rank 0"]);
    }
}

/// Words of a block of labels: status, rank, batch.
#[test]
fn numbers_of_another_rank() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        for batch in [MAX_BATCH as i64 + 1, -1, i64::MAX, i64::MIN, 1 << 32] {
            let told = lied_to(placement, 0, Fault::Word { block: 1, word: 2, value: batch }, step);
            assert_comm(&format!("{placement:?}"), told, &[&format!("a batch of {batch} rows for rank 1"), "max_batch is 8"]);
        }
        let told = lied_to(placement, 0, Fault::Word { block: 1, word: 1, value: 0 }, step);
        assert_comm(&format!("{placement:?}"), told, &["a block of rank 0 at the place of rank 1"]);
        let told = lied_to(placement, 0, Fault::Word { block: 0, word: 2, value: 8 }, step);
        assert_comm(&format!("{placement:?}"), told, &["own block of rank 0"]);
    }
}

/// The operations of top_k on a sharded head: its handshake, whether memory was there, the queries, whether an answer was found,
/// the answers' cosines and their ids.
#[test]
fn classes_of_another_rank_that_are_none() {
    for value in [10, -1, i64::MIN] {
        let told = lied_to(Placement::Sharded, 5, Fault::Word { block: 1, word: 0, value }, top_k);
        assert_comm("ids", told, &[&format!("{value} as a class of rank 1")]);
    }
}

#[test]
fn cosines_of_another_rank_that_are_none() {
    for cosine in [1e20, -3.0, f32::NAN, f32::NEG_INFINITY] {
        let value = i64::from(cosine.to_bits()) | i64::from(cosine.to_bits()) << 32;
        let told = lied_to(Placement::Sharded, 4, Fault::Word { block: 1, word: 0, value }, top_k);
        assert_comm("cosines", told, &[&format!("{cosine} as a cosine of rank 1")]);
    }
}
