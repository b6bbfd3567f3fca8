//! How a call reaches its head: by a living handle, in the process that made it, with the lock held.

use std::sync::atomic::Ordering;
use std::sync::PoisonError;

use super::pfc_head;
use crate::capi::status::pfc_status;
use crate::capi::{boundary, caught, required};
use crate::head::Head;
use crate::{ensure, Result, Status};

/// Runs a call on a head that needs it alone.
pub(super) unsafe fn with_head(head: *mut pfc_head, body: impl FnOnce(&mut Head) -> Result<()>) -> pfc_status {
    boundary(|| {
        let handle = required("head", head)?;
        check_process(handle)?;
        ensure!(!handle.busy.swap(true, Ordering::Acquire), InvalidArgument, "head is in use by another thread");
        let outcome = locked(handle, body);
        handle.busy.store(false, Ordering::Release);
        outcome
    })
}

/// Runs a call that several threads may make at once, and that waits for no other.
pub(super) unsafe fn with_outside(head: *const pfc_head, body: impl FnOnce(&pfc_head) -> Result<()>) -> pfc_status {
    boundary(|| {
        let handle = required("head", head)?;
        check_process(handle)?;
        body(handle).map_err(|error| handle.outside.name_rank(&error))
    })
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
