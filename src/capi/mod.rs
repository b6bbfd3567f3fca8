//! The C interface: `include/partialfc.h` is generated from here, one file for each object.
//!
//! No logic: an entry checks its pointers, calls the library and turns an error into a status and a text. A wrong argument of a
//! call that begins a step does not return at once; it is handed on as a contribution, so that the other ranks learn of it.

#![allow(non_camel_case_types, clippy::missing_safety_doc)]

pub mod checkpoint;
pub mod classes;
pub mod comm;
pub mod device;
pub mod forward;
pub mod head;
pub mod kernels;
pub mod log;
pub mod metrics;
pub mod plan;
pub mod status;
pub mod types;
pub mod update;

use std::panic::{catch_unwind, AssertUnwindSafe};

use self::status::{fail, pfc_status, PFC_OK};
use crate::matrix::check_address;
use crate::{cancellation, ensure, error, float_environment, Result};

/// Runs an entry: no panic crosses, and an error becomes a status and a text. How the caller rounds changes no bit of a result, and
/// the thread cannot be cancelled before it is out again.
fn boundary(body: impl FnOnce() -> Result<()>) -> pfc_status {
    let _cancellation = cancellation::defer();
    let _caller = float_environment::usual();
    match caught(body) {
        Ok(()) => PFC_OK,
        Err(error) => fail(&error),
    }
}

/// Runs what may panic; a panic becomes the error PANIC.
fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        Err(error!(Panic, "the library panicked: {}", text.unwrap_or("no message")))
    })
}

/// A pointer argument, or the error that names it.
unsafe fn required<'a, T>(name: &str, pointer: *const T) -> Result<&'a T> {
    ensure!(!pointer.is_null(), InvalidArgument, "{name} must not be NULL");
    check_address(name, pointer, 1)?;
    Ok(&*pointer)
}

/// An output argument, or the error that names it.
unsafe fn output<'a, T>(name: &str, pointer: *mut T) -> Result<&'a mut T> {
    required(name, pointer.cast_const())?;
    Ok(&mut *pointer)
}

/// The length of an array argument of `count` elements that are there, or the error that names it.
fn array<T>(name: &str, data: *const T, count: u64) -> Result<usize> {
    ensure!(!data.is_null() || count == 0, InvalidArgument, "{name} must not be NULL for a count of {count}");
    check_address(name, data, count)?;
    Ok(count as usize)
}
