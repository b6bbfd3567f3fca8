//! How a call reaches its head: by a living handle, in the process that made it, with the lock held.

use std::sync::atomic::Ordering;
use std::sync::PoisonError;

use super::pfc_head;
use crate::capi::status::{pfc_status, ErrorText};
use crate::capi::{boundary, caught, required};
use crate::head::Head;
use crate::{ensure, error, Result, Status};

/// Runs a call on a head that needs it alone.
pub(in crate::capi) unsafe fn with_head(head: *mut pfc_head, body: impl FnOnce(&mut Head) -> Result<()>) -> pfc_status {
    boundary(|| {
        let handle = required("head", head)?;
        check_process(handle)?;
        if handle.busy.swap(true, Ordering::Acquire) {
            return remembered(handle, Err(error!(InvalidArgument, "head is in use by another thread")));
        }
        let outcome = locked(handle, body);
        handle.busy.store(false, Ordering::Release);
        remembered(handle, outcome)
    })
}

/// Runs a call that several threads may make at once, and that waits for no other.
pub(super) unsafe fn with_outside(head: *const pfc_head, body: impl FnOnce(&pfc_head) -> Result<()>) -> pfc_status {
    boundary(|| {
        let handle = required("head", head)?;
        check_process(handle)?;
        remembered(handle, caught(|| body(handle)).map_err(|error| handle.outside.name_rank(&error)))
    })
}

/// Keeps the text of a failure for pfc_head_error.
fn remembered<T>(handle: &pfc_head, outcome: Result<T>) -> Result<T> {
    if let Err(error) = &outcome {
        *handle.last_error.lock().unwrap_or_else(PoisonError::into_inner) = ErrorText::of(error);
    }
    outcome
}

/// The text of the last failure on a head, if there is a head in this process.
pub(super) unsafe fn last_error(head: *const pfc_head) -> Option<ErrorText> {
    let handle = required("head", head).ok()?;
    check_process(handle).ok()?;
    Some(*handle.last_error.lock().unwrap_or_else(PoisonError::into_inner))
}

fn check_process(handle: &pfc_head) -> Result<()> {
    let (made_in, this) = (handle.process, std::process::id());
    ensure!(made_in == this, Forked, "the head was made in process {made_in} and cannot be used in process {this}");
    Ok(())
}

/// Runs `body` when no other thread is inside. A panic poisons the head and aborts its communicator, so that the other ranks do not
/// wait for it.
pub(super) fn locked<T>(handle: &pfc_head, body: impl FnOnce(&mut Head) -> Result<T>) -> Result<T> {
    let mut head = handle.head.lock().unwrap_or_else(PoisonError::into_inner);
    caught(|| body(&mut head)).map_err(|error| {
        if error.status == Status::Panic {
            head.poison(&error);
        }
        head.name_rank(&error)
    })
}
