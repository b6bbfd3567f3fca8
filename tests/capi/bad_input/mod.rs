//! What a head does with what it cannot use: the status and the text on every rank, and that it works afterwards or is poisoned.

mod arrays;
mod disagreement;
mod lies;
mod options;
mod overflow;
mod pointers;
mod ranks;
mod row_terms;
mod rows;
mod steps;
mod transports;

use partialfc::Status;
use partialfc_testing::capi::{status_name, Failure, Outcome};

/// Asserts the failure: its status, and that its text has every word.
#[track_caller]
fn assert_refused<T: std::fmt::Debug>(what: &str, result: Outcome<T>, status: Status, words: &[&str]) -> Failure {
    let failure = match result {
        Ok(value) => panic!("{what}: passed with {value:?}, expected {status}"),
        Err(failure) => failure,
    };
    assert_eq!(status_name(failure.status), format!("PFC_ERROR_{status}"), "{what}: {failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{what}: the text does not say {word:?}: {failure:?}");
    }
    failure
}
