//! How an update begins and ends, whichever kernels apply the gradient.

use std::sync::Arc;

use super::super::driver::{Context, Event};
use super::super::shared_structs::Ledger;
use super::super::streams::StreamRole;
use super::{run, CudaHead};
use crate::device::UpdateCall;
use crate::Result;

/// Where the device has what the last update multiplied the gradient by.
pub(super) struct LastFactor {
    /// Of the ledger's two: an update overwrites that of the one before the last, which no draft's labels tell any more.
    slot: u32,
    /// The host does not know it.
    on_device: bool,
    /// It has been computed.
    known: Event,
}

impl LastFactor {
    pub fn new(context: &Arc<Context>) -> Result<LastFactor> {
        Ok(LastFactor { slot: 0, on_device: false, known: Event::new(context)? })
    }
}

impl CudaHead {
    /// Computes the update's coefficients, and whether it is skipped.
    /// `counts` are those of the accumulated gradients that it applies; NULL: it applies the step's.
    pub(super) fn begin_update(&mut self, update: UpdateCall, counts: *mut u32) {
        let (arrays, on_device) = (self.arrays(), !update.device_factor.is_null());
        self.last_factor.slot = 1 - self.last_factor.slot;
        self.last_factor.on_device = on_device;
        if on_device {
            // A copy in the order of the caller's stream, on which the caller may enqueue what overwrites it as soon as this returns.
            let copy = arrays.ledger.cast::<u8>().wrapping_add(std::mem::offset_of!(Ledger, device_factor));
            // SAFETY: the head's own ledger; the caller gave a number.
            let copied = unsafe { self.gpu.stream.copy(copy.cast(), update.device_factor.cast(), size_of::<f32>()) };
            self.remember_error(copied);
            self.join(StreamRole::Centers, StreamRole::Main);
        }
        let UpdateCall { learning_rate, factor, .. } = update;
        let slot = self.last_factor.slot;
        run!(self, Centers, begin_update, (arrays, learning_rate, factor, i32::from(on_device), slot, counts.cast()));
        if on_device {
            let recorded = self.last_factor.known.record(self.streams.of(StreamRole::Centers));
            self.remember_error(recorded);
        }
    }

    /// Where the labels of the next step find the factor of the last update on the device; -1: the host has told it.
    pub(super) fn factor_of_last_update(&mut self) -> i32 {
        if !self.last_factor.on_device {
            return -1;
        }
        let waited = self.streams.of(StreamRole::Draw).wait(&self.last_factor.known);
        self.remember_error(waited);
        self.last_factor.slot as i32
    }

    pub(super) fn finish_update(&mut self) {
        self.has_squares[1] = true;
        self.count_update();
    }

    /// Ends an update whose rows have been written.
    pub(super) fn count_update(&mut self) {
        let arrays = self.arrays();
        if self.dense() {
            run!(self, Centers, advance_history, (arrays,));
        }
        run!(self, Centers, end_update, (arrays,));
        self.updates += 1;
        let half = self.sizes().capacities.history / 2;
        if self.dense() && self.updates.is_multiple_of(half) {
            // No row misses more updates than the ring holds: afterwards rows are at most half as old.
            let before = self.updates - half / 2;
            run!(self, Centers, catch_up_rows, (arrays, before));
        }
        self.step_in_progress = false;
        self.gather_ahead();
    }
}
