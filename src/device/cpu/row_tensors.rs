//! The tensors of some rows in host memory: class centers and the optimizer's state.

use std::ops::Range;

use super::table::{Rounding, Table, TableParts};
use crate::optimizer::StateTensor;
use crate::options::HeadOptions;
use crate::random::{self, Purpose};
use crate::{error, Result};

/// A row of the shard, and its slot in the tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub row: usize,
    pub slot: usize,
}

/// Which slots rows have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slots {
    /// All rows have one: that of their number.
    OfRows,
    /// Those of a list have one: that of their position in it.
    OfPositions,
}

impl Slots {
    pub fn place(self, row: usize, position: usize) -> Place {
        Place { row, slot: if self == Slots::OfRows { row } else { position } }
    }
}

pub(super) struct RowTensors {
    pub dim: usize,
    pub slots: usize,
    pub centers: Table,
    pub momentum: Table,
    /// Empty for an optimizer with one tensor of state.
    pub second_moment: Table,
}

/// The same for several threads, each of which touches other slots.
#[derive(Clone, Copy)]
pub(super) struct RowTensorParts<'a> {
    pub dim: usize,
    pub centers: TableParts<'a>,
    pub momentum: TableParts<'a>,
    pub second_moment: Option<TableParts<'a>>,
}

/// A row to compute with.
pub(super) struct Row<'a> {
    pub w: &'a mut [f32],
    pub m: &'a mut [f32],
    /// Empty for an optimizer with one tensor of state.
    pub v: &'a mut [f32],
}

/// What the random bits of a row's rounding are made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundingKey {
    pub seed: u64,
    pub class: u64,
    pub update: u64,
}

impl RowTensors {
    /// Zeros.
    pub fn zeroed(options: &HeadOptions, slots: usize) -> Result<RowTensors> {
        let dim = options.embedding_dim as usize;
        let elements = slots
            .checked_mul(dim)
            .ok_or_else(|| error!(OutOfMemory, "cannot allocate {slots} x {dim} elements for class centers"))?;
        let second = options.optimizer.state_tensors() > 1;
        Ok(RowTensors {
            dim,
            slots,
            centers: Table::zeroed(options.weight_dtype, elements, "class centers")?,
            momentum: Table::zeroed(options.state_dtype, elements, "momentum")?,
            second_moment: Table::zeroed(options.state_dtype, if second { elements } else { 0 }, "second moment")?,
        })
    }

    /// Zeros in the same types.
    pub fn like(&self, slots: usize) -> Result<RowTensors> {
        let zeros =
            |table: &Table, what: &str| Table::zeroed(table.dtype(), if table.is_empty() { 0 } else { slots * self.dim }, what);
        Ok(RowTensors {
            dim: self.dim,
            slots,
            centers: zeros(&self.centers, "class centers of a file")?,
            momentum: zeros(&self.momentum, "momentum of a file")?,
            second_moment: zeros(&self.second_moment, "second moment of a file")?,
        })
    }

    pub fn at(&self, slot: usize) -> Range<usize> {
        slot * self.dim..(slot + 1) * self.dim
    }

    pub fn table(&self, tensor: StateTensor) -> &Table {
        match tensor {
            StateTensor::Centers => &self.centers,
            StateTensor::Momentum => &self.momentum,
            StateTensor::SecondMoment => &self.second_moment,
        }
    }

    pub fn has_second_moment(&self) -> bool {
        !self.second_moment.is_empty()
    }

    pub fn parts(&mut self) -> RowTensorParts<'_> {
        RowTensorParts {
            dim: self.dim,
            second_moment: self.has_second_moment().then(|| self.second_moment.parts()),
            centers: self.centers.parts(),
            momentum: self.momentum.parts(),
        }
    }

    /// Copies a row's momentum and second moment into a scratch of two rows.
    pub fn copy_state<'b>(&self, slot: usize, scratch_rows: &'b mut [f32]) -> (&'b mut [f32], &'b mut [f32]) {
        let (m, v) = split_state(scratch_rows, self.dim, self.has_second_moment());
        self.momentum.read(self.at(slot), m);
        if !v.is_empty() {
            self.second_moment.read(self.at(slot), v);
        }
        (m, v)
    }
}

impl RowTensorParts<'_> {
    pub fn at(&self, slot: usize) -> Range<usize> {
        slot * self.dim..(slot + 1) * self.dim
    }

    /// `None` for a second moment that the optimizer does not have.
    pub fn table(&self, tensor: StateTensor) -> Option<&TableParts<'_>> {
        match tensor {
            StateTensor::Centers => Some(&self.centers),
            StateTensor::Momentum => Some(&self.momentum),
            StateTensor::SecondMoment => self.second_moment.as_ref(),
        }
    }

    fn tables(&self) -> impl Iterator<Item = &TableParts<'_>> {
        [Some(&self.centers), Some(&self.momentum), self.second_moment.as_ref()].into_iter().flatten()
    }

    /// The row's tensors; `copies` has three rows for those that are stored in another type.
    ///
    /// # Safety
    /// No other thread touches this slot.
    pub unsafe fn load<'b>(&'b self, slot: usize, copies: &'b mut [f32]) -> Row<'b> {
        let (w, rest) = copies.split_at_mut(self.dim);
        let (m, rest) = rest.split_at_mut(self.dim);
        Row {
            w: self.centers.load(self.at(slot), w),
            m: self.momentum.load(self.at(slot), m),
            v: match &self.second_moment {
                Some(second_moment) => second_moment.load(self.at(slot), &mut rest[..self.dim]),
                None => &mut [],
            },
        }
    }

    /// Stores what `load` gave. Gives false where that makes a number infinite.
    ///
    /// Momentum decays to nearest as well; weights and second moments would stand still.
    ///
    /// # Safety
    /// No other thread touches this slot.
    pub unsafe fn store(&self, slot: usize, key: RoundingKey, values: &Row<'_>) -> bool {
        let at_random = |table: &TableParts<'_>, values: &[f32], purpose: Purpose| match table {
            TableParts::F32(_) => true,
            TableParts::Bf16(_) => {
                let key = random::rounding_key(key.seed, key.class, key.update, purpose);
                table.store(self.at(slot), values, Rounding::AtRandom(key))
            }
        };
        let w = at_random(&self.centers, values.w, Purpose::Weight);
        let m = self.momentum.store(self.at(slot), values.m, Rounding::Nearest);
        let v = self.second_moment.as_ref().is_none_or(|table| at_random(table, values.v, Purpose::SecondMoment));
        w && m && v
    }

    /// Copies a row's momentum and second moment into a scratch of two rows.
    ///
    /// # Safety
    /// No other thread writes this slot.
    pub unsafe fn copy_state<'b>(&self, slot: usize, scratch_rows: &'b mut [f32]) -> (&'b mut [f32], &'b mut [f32]) {
        let (m, v) = split_state(scratch_rows, self.dim, self.second_moment.is_some());
        self.momentum.read(self.at(slot), m);
        if let Some(second_moment) = &self.second_moment {
            second_moment.read(self.at(slot), v);
        }
        (m, v)
    }

    /// Gives a slot the start values of a class; its state is zero. `copy` is a row of scratch.
    ///
    /// # Safety
    /// No other thread touches this slot.
    pub unsafe fn start(&self, slot: usize, start: &StartValues, class: u64, copy: &mut [f32]) {
        let values = self.centers.load(self.at(slot), &mut copy[..self.dim]);
        start.values(class, values);
        self.centers.store(self.at(slot), values, Rounding::Nearest);
    }

    /// Zeros the state of a slot.
    ///
    /// # Safety
    /// No other thread touches this slot.
    pub unsafe fn clear_state(&self, slot: usize) {
        for table in self.tables().skip(1) {
            table.stored(self.at(slot)).fill(0);
        }
    }

    /// Takes a row's tensors as `copy_record` gave them.
    ///
    /// # Safety
    /// No other thread touches this slot.
    pub unsafe fn take_record(&self, slot: usize, mut record: &[u8]) {
        for table in self.tables() {
            let stored = table.stored(self.at(slot));
            let (own, rest) = record.split_at(stored.len());
            stored.copy_from_slice(own);
            record = rest;
        }
    }

    /// Copies a row's tensors as they are stored, one after the other.
    ///
    /// # Safety
    /// No other thread writes this slot.
    pub unsafe fn copy_record(&self, slot: usize, mut record: &mut [u8]) {
        for table in self.tables() {
            let stored = table.stored(self.at(slot));
            let (own, rest) = record.split_at_mut(stored.len());
            own.copy_from_slice(stored);
            record = rest;
        }
    }

    /// Hints that a row will be touched soon.
    pub fn prefetch(&self, slot: usize) {
        self.tables().for_each(|table| table.prefetch(self.at(slot)));
    }
}

/// The pure function of its class that a row is until it is first written.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartValues {
    pub seed: u64,
    pub init_std: f64,
}

impl StartValues {
    pub fn values(&self, class: u64, out: &mut [f32]) {
        random::start_values(self.seed, class, self.init_std, out);
    }
}

fn split_state(scratch_rows: &mut [f32], dim: usize, second: bool) -> (&mut [f32], &mut [f32]) {
    let (m, rest) = scratch_rows.split_at_mut(dim);
    (m, &mut rest[..if second { dim } else { 0 }])
}
