//! Values of the host's on their way to the GPU while the host goes on.
//!
//! A driver may read memory that is not page-locked when it enqueues the copy, or later. So whoever hands it such memory waits for the
//! copy; values that nobody is to wait for go through page-locked memory, in slots that are used in turn.

use std::mem::size_of_val;
use std::sync::Arc;

use super::driver::{Context, Event, PinnedBuffer, Stream};
use crate::memory::Plain;
use crate::Result;

/// Bytes of what goes this way. More is waited for: page-locked memory is dear.
pub(super) const MOST_BYTES: usize = 64 << 10;

pub(super) struct UploadSlots<T: Plain> {
    slots: Vec<Slot<T>>,
    next: usize,
}

struct Slot<T: Plain> {
    values: PinnedBuffer<T>,
    /// The copy from it is done.
    copied: Event,
}

impl<T: Plain> UploadSlots<T> {
    /// So many slots, the copies that may be under way before the host waits for the oldest, for `len` values each. `what` names them in
    /// the error.
    pub fn new(context: &Arc<Context>, slots: usize, len: usize, what: &str) -> Result<UploadSlots<T>> {
        let slot = || Ok(Slot { values: PinnedBuffer::zeroed(context, len, what)?, copied: Event::new(context)? });
        Ok(UploadSlots { slots: (0..slots).map(|_| slot()).collect::<Result<_>>()?, next: 0 })
    }

    /// Enqueues a copy of `values`, no more than a slot has, which may change when it returns.
    ///
    /// # Safety
    /// There is room for them at `destination` on the device until the stream has done it.
    pub unsafe fn upload(&mut self, stream: &Stream, destination: *mut T, values: &[T]) -> Result<()> {
        let slot = &mut self.slots[self.next];
        if !slot.copied.is_over()? {
            slot.copied.synchronize()?;
        }
        slot.values[..values.len()].copy_from_slice(values);
        // The slot is not written again before the event.
        stream.upload(destination.cast(), slot.values.as_raw().cast(), size_of_val(values))?;
        slot.copied.record(stream)?;
        self.next = (self.next + 1) % self.slots.len();
        Ok(())
    }
}
