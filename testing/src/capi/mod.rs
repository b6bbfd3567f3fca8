//! The C interface as tests call it: handles that free themselves, statuses with their texts.

mod classes;
mod comm;
mod device;
mod head;
mod matrix;
mod options;

use std::ffi::CStr;
use std::fmt;

use partialfc::capi::status::{pfc_last_error, pfc_status_name, PFC_OK};

pub use self::comm::{traffic_between, Comm, Number};
pub use self::device::{on_cuda, tested_precision, Device, TestedResidency};
pub use self::head::{plan, plan_cuda, Head, LEAST};
pub use self::matrix::Rows;
pub use self::options::{head_options, options, to_c};
pub use partialfc::capi::comm::pfc_traffic;
pub use partialfc::capi::head::{PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
pub use partialfc::capi::metrics::pfc_metrics;
pub use partialfc::capi::plan::pfc_plan_report;
pub use partialfc::capi::update::pfc_update_options;

/// A status that is not PFC_OK, and the text that goes with it.
#[derive(Clone, PartialEq, Eq)]
pub struct Failure {
    pub status: i32,
    pub message: String,
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", status_name(self.status), self.message)
    }
}

pub type Outcome<T = ()> = Result<T, Failure>;

/// What a call that fails so gives.
pub fn failure<T>(status: i32, message: impl Into<String>) -> Outcome<T> {
    Err(Failure { status, message: message.into() })
}

/// Asserts a failure and that its text has all the parts.
#[track_caller]
pub fn assert_failed(outcome: &Outcome, status: i32, parts: &[&str]) {
    let failure = outcome.as_ref().expect_err("it should have failed");
    assert_eq!(failure.status, status, "{failure:?}");
    parts.iter().for_each(|part| assert!(failure.message.contains(part), "{part:?} is not in {failure:?}"));
}

pub fn status_name(status: i32) -> String {
    // SAFETY: the name lives for ever.
    unsafe { CStr::from_ptr(pfc_status_name(status)) }.to_string_lossy().into_owned()
}

/// The text of this thread's last error.
pub fn last_error() -> String {
    // SAFETY: valid until this thread's next failing call.
    unsafe { CStr::from_ptr(pfc_last_error()) }.to_string_lossy().into_owned()
}

/// A status as a result, with this thread's error text.
pub fn outcome(status: i32) -> Outcome {
    if status == PFC_OK {
        return Ok(());
    }
    let message = last_error();
    assert!(!message.is_empty(), "{} without a message", status_name(status));
    Err(Failure { status, message })
}
