//! The C interface: `include/partialfc.h` is generated from here, one file for each object.
//!
//! No logic: an entry checks its pointers, calls the library and turns an error into a status and a text. A wrong argument of a
//! call that begins a step does not return at once; it is handed on as an error, so that the other ranks hear of it.

#![allow(non_camel_case_types, clippy::missing_safety_doc)]

pub mod comm;
pub mod device;
pub mod head;
pub mod kernels;
pub mod log;
pub mod plan;
pub mod status;
pub mod types;

use std::panic::{catch_unwind, AssertUnwindSafe};

use self::status::{fail, pfc_status, PFC_OK};
use crate::{Error, Result, Status};

/// Runs an entry: no panic crosses, an error becomes a status.
fn boundary(body: impl FnOnce() -> Result<()>) -> pfc_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => PFC_OK,
        Ok(Err(error)) => fail(&error),
        Err(panic) => fail(&panicked(panic.as_ref())),
    }
}

/// The error a panic becomes.
fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    Error::new(Status::Panic, format!("the library panicked: {text}"))
}

/// A pointer argument, or the error that names it.
unsafe fn required<'a, T>(name: &str, pointer: *const T) -> Result<&'a T> {
    pointer.as_ref().ok_or_else(|| Error::new(Status::InvalidArgument, format!("{name} must not be NULL")))
}

/// An output argument, or the error that names it.
unsafe fn output<'a, T>(name: &str, pointer: *mut T) -> Result<&'a mut T> {
    pointer.as_mut().ok_or_else(|| Error::new(Status::InvalidArgument, format!("{name} must not be NULL")))
}
