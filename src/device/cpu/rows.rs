//! The rows of a shard in host memory: class centers, optimizer state, and when each row was last brought up to date.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::pool::Pool;
use super::table::{Rounding, Table, TableParts};
use crate::matrix::Matrix;
use crate::memory::{zeros, Buffer, Parts};
use crate::optimizer::{History, Optimizer, Replay, StateTensor, UpdateRule};
use crate::options::{HeadOptions, RowUpdate};
use crate::protocol::bad_update;
use crate::random::{self, Purpose};
use crate::shard::Shard;
use crate::{ensure, error, rounding, Result};

/// Learning rates are looked over for ones no row needs any more when their number has doubled, and not below this.
const SHORTEST_HISTORY: usize = 1024;
/// From here on the rows that keep old ones needed are brought to now: a step's replay takes time and memory in their number.
const LONGEST_HISTORY: usize = 16384;
/// Rows that one task brings to now.
const ROWS_A_TASK: usize = 256;

pub(super) struct HostRows {
    shard: Shard,
    dim: usize,
    seed: u64,
    optimizer: Optimizer,
    centers: Table,
    momentum: Table,
    /// Empty for an optimizer with one tensor of state.
    second_moment: Table,
    /// Dense rows: the update each row was last brought to. Empty for lazy rows.
    last_update: Buffer<u64>,
    history: History,
    trim_at: usize,
    updates: u64,
    /// For each worker three rows: what [`RowTensors::load`] copies.
    copies: Buffer<f32>,
}

/// The tensors of the rows, for several threads, each of which touches other rows.
#[derive(Clone, Copy)]
struct RowTensors<'a> {
    dim: usize,
    centers: TableParts<'a>,
    momentum: TableParts<'a>,
    second_moment: Option<TableParts<'a>>,
    seed: u64,
    first_class: u64,
}

/// A row to compute with.
pub(super) struct Row<'a> {
    pub w: &'a mut [f32],
    pub m: &'a mut [f32],
    /// Empty for an optimizer with one tensor of state.
    pub v: &'a mut [f32],
}

/// The rows while an update runs.
pub(super) struct UpdatingRows<'a> {
    tensors: RowTensors<'a>,
    copies: Parts<'a, f32>,
    last_update: Option<Parts<'a, u64>>,
    replay: &'a Replay,
    rule: UpdateRule,
    /// The number of the update that is being done.
    update: u64,
    /// The first row that this update has taken out of float32; `usize::MAX`: none.
    bad_row: AtomicUsize,
}

impl<'a> RowTensors<'a> {
    fn at(&self, row: usize) -> std::ops::Range<usize> {
        row * self.dim..(row + 1) * self.dim
    }

    /// The row's tensors; `copies` has three rows for those that are stored in another type.
    ///
    /// # Safety
    /// No other thread touches this row.
    unsafe fn load<'b>(&self, row: usize, copies: &'b mut [f32]) -> Row<'b>
    where
        'a: 'b,
    {
        let (w, rest) = copies.split_at_mut(self.dim);
        let (m, rest) = rest.split_at_mut(self.dim);
        Row {
            w: self.centers.load(self.at(row), w),
            m: self.momentum.load(self.at(row), m),
            v: match &self.second_moment {
                Some(second_moment) => second_moment.load(self.at(row), &mut rest[..self.dim]),
                None => &mut [],
            },
        }
    }

    /// Stores what `load` gave, as it is after update `update`. Gives false where that makes a number infinite.
    ///
    /// Momentum decays to nearest as well; weights and second moments would stand still.
    ///
    /// # Safety
    /// No other thread touches this row.
    unsafe fn store(&self, row: usize, update: u64, values: &Row<'_>) -> bool {
        let at_random = |table: &TableParts<'_>, values: &[f32], purpose: Purpose| match table {
            TableParts::F32(_) => true,
            TableParts::Bf16(_) => {
                let key = random::rounding_key(self.seed, self.first_class + row as u64, update, purpose);
                table.store(self.at(row), values, Rounding::AtRandom(key))
            }
        };
        let w = at_random(&self.centers, values.w, Purpose::Weight);
        let m = self.momentum.store(self.at(row), values.m, Rounding::Nearest);
        let v = self.second_moment.as_ref().is_none_or(|table| at_random(table, values.v, Purpose::SecondMoment));
        w && m && v
    }

    /// Copies a row's momentum and second moment into a scratch of two rows.
    ///
    /// # Safety
    /// No other thread writes this row.
    unsafe fn copy_state<'b>(&self, row: usize, scratch_rows: &'b mut [f32]) -> (&'b mut [f32], &'b mut [f32]) {
        let (m, rest) = scratch_rows.split_at_mut(self.dim);
        self.momentum.read(self.at(row), m);
        let v = match &self.second_moment {
            Some(second_moment) => {
                second_moment.read(self.at(row), &mut rest[..self.dim]);
                &mut rest[..self.dim]
            }
            None => &mut [],
        };
        (m, v)
    }
}

impl HostRows {
    /// Start values for all rows of the shard.
    pub fn new(options: &HeadOptions, shard: Shard, pool: &Pool) -> Result<HostRows> {
        let dim = options.embedding_dim as usize;
        let rows = shard.rows as usize;
        let elements = rows
            .checked_mul(dim)
            .ok_or_else(|| error!(OutOfMemory, "cannot allocate {rows} x {dim} elements for class centers"))?;
        let dense = options.row_update == RowUpdate::Dense;
        let second = options.optimizer.state_tensors() > 1;
        let mut made = HostRows {
            shard,
            dim,
            seed: options.seed,
            optimizer: options.optimizer,
            centers: Table::zeroed(options.weight_dtype, elements, "class centers")?,
            momentum: Table::zeroed(options.state_dtype, elements, "momentum")?,
            second_moment: Table::zeroed(options.state_dtype, if second { elements } else { 0 }, "second moment")?,
            last_update: Buffer::zeroed(if dense { rows } else { 0 }, "last steps of rows")?,
            history: History::with_room(if dense { LONGEST_HISTORY } else { 0 })?,
            trim_at: SHORTEST_HISTORY,
            updates: 0,
            copies: Buffer::zeroed(pool.threads() * 3 * dim, "copies of rows")?,
        };
        let (centers, copies) = (made.centers.parts(), made.copies.parts());
        // A task of some hundred kilobytes: long enough to be worth handing out, short enough to share evenly.
        let rows_a_task = (1 << 17) / dim + 1;
        pool.run(rows.div_ceil(rows_a_task), &|task, worker| {
            for row in task * rows_a_task..((task + 1) * rows_a_task).min(rows) {
                let at = row * dim..(row + 1) * dim;
                // SAFETY: each row belongs to one task, a worker number to one thread.
                unsafe {
                    let values = centers.load(at.clone(), &mut worker_copies(&copies, worker, dim)[..dim]);
                    random::start_values(options.seed, shard.first + row as u64, options.init_std, values);
                    centers.store(at, values, Rounding::Nearest);
                }
            }
        });
        Ok(made)
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    pub fn updates(&self) -> u64 {
        self.updates
    }

    fn dense(&self) -> bool {
        !self.last_update.is_empty()
    }

    /// What brings rows of any age to now; made once, before rows are read.
    pub fn replay(&self) -> Result<Replay> {
        // Lazy rows keep no history: theirs is the replay of nothing.
        Replay::new(&self.optimizer, &self.history, self.history.updates())
    }

    /// Copies row `row` (from the shard's first) into `out` as it is now; `scratch_rows` holds two rows.
    pub fn read(&self, replay: &Replay, row: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        let at = row * self.dim..(row + 1) * self.dim;
        self.centers.read(at, out);
        if self.dense() && self.last_update[row] != self.updates {
            let (m, v) = self.copy_state(row, scratch_rows);
            replay.catch_up(self.last_update[row], out, m, v);
        }
    }

    /// Copies a row's momentum and second moment into a scratch of two rows.
    fn copy_state<'b>(&self, row: usize, scratch_rows: &'b mut [f32]) -> (&'b mut [f32], &'b mut [f32]) {
        let at = row * self.dim..(row + 1) * self.dim;
        let (m, rest) = scratch_rows.split_at_mut(self.dim);
        let v = &mut rest[..if self.second_moment.is_empty() { 0 } else { self.dim }];
        self.momentum.read(at.clone(), m);
        if !v.is_empty() {
            self.second_moment.read(at, v);
        }
        (m, v)
    }

    /// Hints that a row will be read soon.
    pub fn prefetch(&self, row: usize) {
        self.centers.prefetch(row * self.dim..(row + 1) * self.dim);
    }

    /// What is changed by row, and the workers' copies.
    fn parts(&mut self) -> (RowTensors<'_>, Parts<'_, u64>, Parts<'_, f32>) {
        let tensors = RowTensors {
            dim: self.dim,
            second_moment: (!self.second_moment.is_empty()).then(|| self.second_moment.parts()),
            centers: self.centers.parts(),
            momentum: self.momentum.parts(),
            seed: self.seed,
            first_class: self.shard.first,
        };
        (tensors, self.last_update.parts(), self.copies.parts())
    }

    /// The rows for update number `updates() + 1`.
    pub fn updating<'a>(&'a mut self, replay: &'a Replay, learning_rate: f64) -> UpdatingRows<'a> {
        let (update, dense) = (self.updates + 1, self.dense());
        let rule = UpdateRule::new(&self.optimizer, learning_rate, update);
        let (tensors, last_update, copies) = self.parts();
        let last_update = dense.then_some(last_update);
        UpdatingRows { tensors, copies, last_update, replay, rule, update, bad_row: AtomicUsize::new(usize::MAX) }
    }

    /// Counts an update whose rows have been written.
    pub fn count_update(&mut self, learning_rate: f64, pool: &Pool) -> Result<()> {
        self.updates += 1;
        if self.dense() {
            self.history.push(learning_rate);
            if self.history.rates().len() >= self.trim_at {
                if self.trim_at >= LONGEST_HISTORY {
                    self.catch_up_before(self.updates - LONGEST_HISTORY as u64 / 2, pool)?;
                }
                let oldest = self.last_update.iter().copied().min().unwrap_or(self.updates);
                self.history.trim(oldest);
                self.trim_at = (2 * self.history.rates().len()).clamp(SHORTEST_HISTORY, LONGEST_HISTORY);
            }
        }
        Ok(())
    }

    /// Brings every row to now, and forgets the learning rates that this needed.
    pub fn catch_up(&mut self, pool: &Pool) -> Result<()> {
        if self.dense() {
            self.catch_up_before(self.updates, pool)?;
            self.history.trim(self.updates);
        }
        Ok(())
    }

    /// Takes the rows, all of them brought to now, as those after update `updates`.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
        if self.dense() {
            self.last_update.fill(updates);
            self.history.restart(updates);
            self.trim_at = SHORTEST_HISTORY;
        }
    }

    /// Brings the rows last touched before `update` to now.
    fn catch_up_before(&mut self, update: u64, pool: &Pool) -> Result<()> {
        let (replay, dim, now, rows) = (self.replay()?, self.dim, self.updates, self.last_update.len());
        let (tensors, last_update, copies) = self.parts();
        pool.run(rows.div_ceil(ROWS_A_TASK), &|task, worker| {
            for row in task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(rows) {
                // SAFETY: each row belongs to one task, a worker number to one thread.
                unsafe {
                    let last = &mut last_update.range(row..row + 1)[0];
                    if *last < update {
                        let Row { w, m, v } = tensors.load(row, worker_copies(&copies, worker, dim));
                        replay.catch_up(*last, w, m, v);
                        tensors.store(row, now, &Row { w, m, v });
                        *last = now;
                    }
                }
            }
        });
        Ok(())
    }

    /// Reads rows, replayed to now, into a host matrix.
    pub fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        let replay = self.replay()?;
        let (dim, mut row) = (self.dim, zeros(&[3, self.dim], "rows to read")?);
        let (w, rest) = row.split_at_mut(dim);
        for i in 0..rows.rows {
            let r = first as usize + i;
            self.centers.read(r * dim..(r + 1) * dim, w);
            let (m, v) = self.copy_state(r, rest);
            if self.dense() {
                replay.catch_up(self.last_update[r], w, m, v);
            }
            // SAFETY: the caller of the head's entry gave a matrix of its host memory of this many rows.
            unsafe {
                match tensor {
                    StateTensor::Centers => rows.write_row(i, w),
                    StateTensor::Momentum => rows.write_row(i, m),
                    StateTensor::SecondMoment => rows.write_row(i, v),
                }
            }
        }
        Ok(())
    }

    /// Overwrites rows; the other tensors of a dense row are brought to now first. bfloat16 takes the nearest of what is given.
    pub fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        let (dim, mut values) = (self.dim, zeros(&[self.dim], "a row to write")?);
        let mut rounded = zeros(&[if self.is_bf16(tensor) { dim } else { 0 }], "a row to write")?;
        for i in 0..rows.rows {
            // SAFETY: as in read_rows.
            unsafe { rows.read_row(i, &mut values) };
            let class = self.shard.first + first + i as u64;
            ensure!(values.iter().all(|x| x.is_finite()), InvalidArgument, "row {i} (class {class}) contains a NaN or an infinity");
            let negative = tensor == StateTensor::SecondMoment && values.iter().any(|&x| x < 0.0);
            ensure!(!negative, InvalidArgument, "row {i} (class {class}) of the second moment must not be negative");
            let fits = rounded.is_empty() || rounding::to_nearest(&values, &mut rounded);
            ensure!(fits, InvalidArgument, "row {i} (class {class}) contains a number beyond bfloat16");
        }
        let (replay, dense, now) = (self.replay()?, self.dense(), self.updates);
        let (tensors, last_update, copies) = self.parts();
        let mut lazy = now;
        for i in 0..rows.rows {
            let r = first as usize + i;
            // SAFETY: as in read_rows; and this thread alone has the rows.
            unsafe {
                rows.read_row(i, &mut values);
                let last = if dense { &mut last_update.range(r..r + 1)[0] } else { &mut lazy };
                if *last != now {
                    let Row { w, m, v } = tensors.load(r, worker_copies(&copies, 0, dim));
                    replay.catch_up(*last, w, m, v);
                    tensors.store(r, now, &Row { w, m, v });
                    *last = now;
                }
                let table = match tensor {
                    StateTensor::Centers => tensors.centers,
                    StateTensor::Momentum => tensors.momentum,
                    StateTensor::SecondMoment => tensors.second_moment.expect("checked above"),
                };
                let out = table.load(r * dim..(r + 1) * dim, &mut worker_copies(&copies, 0, dim)[..dim]);
                out.copy_from_slice(&values);
                table.store(r * dim..(r + 1) * dim, out, Rounding::Nearest);
            }
        }
        Ok(())
    }

    fn is_bf16(&self, tensor: StateTensor) -> bool {
        let table = match tensor {
            StateTensor::Centers => &self.centers,
            StateTensor::Momentum => &self.momentum,
            StateTensor::SecondMoment => &self.second_moment,
        };
        matches!(table, Table::Bf16(_))
    }

    fn check_state(&self, tensor: StateTensor) -> Result<()> {
        ensure!(
            tensor != StateTensor::SecondMoment || !self.second_moment.is_empty(),
            InvalidArgument,
            "tensor must not be the second moment: this head's optimizer has none"
        );
        Ok(())
    }
}

impl UpdatingRows<'_> {
    /// Copies a row into `out` as it is before this update; `scratch_rows` holds two rows.
    ///
    /// # Safety
    /// No other thread writes this row.
    pub unsafe fn read(&self, row: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        self.tensors.centers.read(self.tensors.at(row), out);
        if let Some(last) = &self.last_update {
            let last = last.range(row..row + 1)[0];
            if last + 1 != self.update {
                let (m, v) = self.tensors.copy_state(row, scratch_rows);
                self.replay.catch_up(last, out, m, v);
            }
        }
    }

    /// Gives row `row` its gradient.
    ///
    /// # Safety
    /// No other thread touches this row, or has this worker's number.
    pub unsafe fn apply(&self, row: usize, worker: usize, gradient: &[f32]) {
        let values = self.current(row, worker_copies(&self.copies, worker, self.tensors.dim));
        self.apply_to_current(row, values, gradient);
    }

    /// Gives a row its gradient, of which `current` has given the tensors.
    ///
    /// # Safety
    /// No other thread touches this row.
    pub unsafe fn apply_to_current(&self, row: usize, values: Row<'_>, gradient: &[f32]) {
        let Row { w, m, v } = values;
        let finite = self.rule.apply(w, m, v, gradient);
        if !(self.tensors.store(row, self.update, &Row { w, m, v }) && finite) {
            self.bad_row.fetch_min(row, Ordering::Relaxed);
        }
    }

    /// NOT_FINITE if the update has taken a row out of the type that it is stored in.
    pub fn verdict(&self) -> Result<()> {
        match self.bad_row.load(Ordering::Relaxed) {
            usize::MAX => Ok(()),
            row => Err(bad_update(self.tensors.first_class + row as u64, self.update)),
        }
    }

    /// The row's tensors, brought to the update before this one; `copies` holds three rows.
    ///
    /// # Safety
    /// No other thread touches this row.
    pub unsafe fn current<'b>(&'b self, row: usize, copies: &'b mut [f32]) -> Row<'b> {
        let values = self.tensors.load(row, copies);
        if let Some(last) = &self.last_update {
            let last = &mut last.range(row..row + 1)[0];
            if *last + 1 != self.update {
                self.replay.catch_up(*last, values.w, values.m, values.v);
            }
            *last = self.update;
        }
        values
    }

    /// Hints that a row will be updated soon.
    pub fn prefetch(&self, row: usize) {
        let RowTensors { centers, momentum, second_moment, .. } = &self.tensors;
        for table in [Some(centers), Some(momentum), second_moment.as_ref()].into_iter().flatten() {
            table.prefetch(self.tensors.at(row));
        }
    }
}

/// A worker's part of the copies.
///
/// # Safety
/// No other thread has this worker's number.
#[allow(clippy::mut_from_ref)]
unsafe fn worker_copies<'a>(copies: &Parts<'a, f32>, worker: usize, dim: usize) -> &'a mut [f32] {
    copies.range(worker * 3 * dim..(worker + 1) * 3 * dim)
}
