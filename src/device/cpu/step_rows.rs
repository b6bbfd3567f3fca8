//! The rows of a step as its passes see them: read by a forward, read and changed by an update.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::row_tensors::{Place, RoundingKey, Row, RowTensorParts, Slots};
use crate::memory::Parts;
use crate::optimizer::{Replay, UpdateRule};
use crate::protocol::bad_update;
use crate::Result;

/// Rows that may be read while others of the sample are on their way.
#[derive(Clone, Copy)]
pub(super) struct ReadableRows<'a> {
    pub slots: Slots,
    pub tensors: RowTensorParts<'a>,
    pub last_update: &'a [u64],
    pub updates: u64,
}

/// The rows while an update runs.
pub(super) struct UpdatingRows<'a> {
    pub tensors: RowTensorParts<'a>,
    pub copies: Parts<'a, f32>,
    pub last_update: Option<Parts<'a, u64>>,
    pub replay: &'a Replay,
    pub rule: UpdateRule,
    pub slots: Slots,
    pub seed: u64,
    pub first_class: u64,
    /// The number of the update that is being done.
    pub update: u64,
    /// The first row that this update has taken out of its type; `usize::MAX`: none.
    pub bad_row: AtomicUsize,
}

impl ReadableRows<'_> {
    /// Copies a row into `out` as it is now; `scratch_rows` holds two rows.
    ///
    /// # Safety
    /// No other thread writes this row, and it has been brought.
    pub unsafe fn read(&self, replay: &Replay, place: Place, out: &mut [f32], scratch_rows: &mut [f32]) {
        self.tensors.centers.read(self.tensors.at(place.slot), out);
        if !self.last_update.is_empty() && self.last_update[place.row] != self.updates {
            let (m, v) = self.tensors.copy_state(place.slot, scratch_rows);
            replay.catch_up(self.last_update[place.row], out, m, v);
        }
    }

    /// Hints that a row will be read soon.
    pub fn prefetch(&self, place: Place) {
        self.tensors.centers.prefetch(self.tensors.at(place.slot));
    }
}

impl UpdatingRows<'_> {
    /// Copies a row into `out` as it is before this update; `scratch_rows` holds two rows.
    ///
    /// # Safety
    /// No other thread writes this row.
    pub unsafe fn read(&self, place: Place, out: &mut [f32], scratch_rows: &mut [f32]) {
        self.tensors.centers.read(self.tensors.at(place.slot), out);
        if let Some(last) = &self.last_update {
            let last = last.range(place.row..place.row + 1)[0];
            if last + 1 != self.update {
                let (m, v) = self.tensors.copy_state(place.slot, scratch_rows);
                self.replay.catch_up(last, out, m, v);
            }
        }
    }

    /// Gives a row its gradient.
    ///
    /// # Safety
    /// No other thread touches this row, or has this worker's number.
    pub unsafe fn apply(&self, place: Place, worker: usize, gradient: &[f32]) {
        let values = self.current(place, worker_copies(&self.copies, worker, self.tensors.dim));
        self.apply_to_current(place, values, gradient);
    }

    /// Gives a row its gradient, of which `current` has given the tensors.
    ///
    /// # Safety
    /// No other thread touches this row.
    pub unsafe fn apply_to_current(&self, place: Place, values: Row<'_>, gradient: &[f32]) {
        let Row { w, m, v } = values;
        let finite = self.rule.apply(w, m, v, gradient);
        let key = RoundingKey { seed: self.seed, class: self.first_class + place.row as u64, update: self.update };
        if !(self.tensors.store(place.slot, key, &Row { w, m, v }) && finite) {
            self.bad_row.fetch_min(place.row, Ordering::Relaxed);
        }
    }

    /// NOT_FINITE if the update has taken a row out of the type that it is stored in.
    pub fn verdict(&self) -> Result<()> {
        match self.bad_row.load(Ordering::Relaxed) {
            usize::MAX => Ok(()),
            row => Err(bad_update(self.first_class + row as u64, self.update)),
        }
    }

    /// The row's tensors, brought to the update before this one; `copies` holds three rows.
    ///
    /// # Safety
    /// No other thread touches this row.
    pub unsafe fn current<'b>(&'b self, place: Place, copies: &'b mut [f32]) -> Row<'b> {
        let values = self.tensors.load(place.slot, copies);
        if let Some(last) = &self.last_update {
            let last = &mut last.range(place.row..place.row + 1)[0];
            if *last + 1 != self.update {
                self.replay.catch_up(*last, values.w, values.m, values.v);
            }
            *last = self.update;
        }
        values
    }

    /// Hints that a row will be updated soon.
    pub fn prefetch(&self, place: Place) {
        self.tensors.prefetch(place.slot);
    }
}

/// A worker's part of the copies.
///
/// # Safety
/// No other thread has this worker's number.
#[allow(clippy::mut_from_ref)]
pub(super) unsafe fn worker_copies<'a>(copies: &Parts<'a, f32>, worker: usize, dim: usize) -> &'a mut [f32] {
    copies.range(worker * 3 * dim..(worker + 1) * 3 * dim)
}
