//! The rows of a shard in host memory: class centers, optimizer state, and when each row was last brought up to date.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::matrix::Matrix;
use crate::memory::{zeros, Buffer, Parts};
use crate::optimizer::{History, Optimizer, Replay, StateTensor, UpdateRule};
use crate::options::{HeadOptions, RowUpdate};
use crate::protocol::bad_update;
use crate::random;
use crate::sample::Parallel;
use crate::shard::Shard;
use crate::{ensure, error, Result};

/// Learning rates are looked over for ones no row needs any more when their number has doubled, and not below this.
const SHORTEST_HISTORY: usize = 1024;
/// From here on the rows that keep old ones needed are brought to now: a step's replay takes time and memory in their number.
const LONGEST_HISTORY: usize = 16384;
/// Rows that one task brings to now.
const ROWS_A_TASK: usize = 256;

pub(super) struct HostRows {
    shard: Shard,
    dim: usize,
    optimizer: Optimizer,
    centers: Buffer<f32>,
    momentum: Buffer<f32>,
    /// Empty for an optimizer with one tensor of state.
    second_moment: Buffer<f32>,
    /// Dense rows: the update each row was last brought to. Empty for lazy rows.
    last_update: Buffer<u64>,
    history: History,
    trim_at: usize,
    updates: u64,
}

/// The rows while an update runs, for several threads, each of which touches other rows.
pub(super) struct UpdatingRows<'a> {
    dim: usize,
    centers: Parts<'a, f32>,
    momentum: Parts<'a, f32>,
    second_moment: Option<Parts<'a, f32>>,
    last_update: Option<Parts<'a, u64>>,
    replay: &'a Replay,
    rule: UpdateRule,
    /// The number of the update that is being done.
    update: u64,
    /// The first row that this update has taken out of float32; `usize::MAX`: none.
    bad_row: AtomicUsize,
    first_class: u64,
}

impl HostRows {
    /// Start values for all rows of the shard; `parallel` runs tasks on several threads.
    pub fn new(options: &HeadOptions, shard: Shard, parallel: &Parallel) -> Result<HostRows> {
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
            optimizer: options.optimizer,
            centers: Buffer::zeroed(elements, "class centers")?,
            momentum: Buffer::zeroed(elements, "momentum")?,
            second_moment: Buffer::zeroed(if second { elements } else { 0 }, "second moment")?,
            last_update: Buffer::zeroed(if dense { rows } else { 0 }, "last steps of rows")?,
            history: History::with_room(if dense { LONGEST_HISTORY } else { 0 })?,
            trim_at: SHORTEST_HISTORY,
            updates: 0,
        };
        let centers = made.centers.parts();
        // A task of some hundred kilobytes: long enough to be worth handing out, short enough to share evenly.
        let rows_a_task = (1 << 17) / dim + 1;
        parallel(rows.div_ceil(rows_a_task), &|task| {
            for row in task * rows_a_task..((task + 1) * rows_a_task).min(rows) {
                // SAFETY: each row belongs to one task.
                let values = unsafe { centers.range(row * dim..(row + 1) * dim) };
                random::start_values(options.seed, shard.first + row as u64, options.init_std, values);
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
        out.copy_from_slice(&self.centers[at.clone()]);
        if self.dense() && self.last_update[row] != self.updates {
            let second_moment = if self.second_moment.is_empty() { &[][..] } else { &self.second_moment[at.clone()] };
            catch_up_copy(replay, self.last_update[row], out, &self.momentum[at], second_moment, scratch_rows);
        }
    }

    /// Hints that a row will be read soon.
    pub fn prefetch(&self, row: usize) {
        prefetch(&self.centers[row * self.dim..(row + 1) * self.dim]);
    }

    /// The rows for update number `updates() + 1`.
    pub fn updating<'a>(&'a mut self, replay: &'a Replay, learning_rate: f64) -> UpdatingRows<'a> {
        let update = self.updates + 1;
        let dense = self.dense();
        UpdatingRows {
            dim: self.dim,
            rule: UpdateRule::new(&self.optimizer, learning_rate, update),
            second_moment: (!self.second_moment.is_empty()).then(|| self.second_moment.parts()),
            last_update: dense.then(|| self.last_update.parts()),
            centers: self.centers.parts(),
            momentum: self.momentum.parts(),
            replay,
            update,
            bad_row: AtomicUsize::new(usize::MAX),
            first_class: self.shard.first,
        }
    }

    /// Counts an update whose rows have been written.
    pub fn count_update(&mut self, learning_rate: f64, parallel: &Parallel) -> Result<()> {
        self.updates += 1;
        if self.dense() {
            self.history.push(learning_rate);
            if self.history.rates().len() >= self.trim_at {
                if self.trim_at >= LONGEST_HISTORY {
                    self.catch_up_before(self.updates - LONGEST_HISTORY as u64 / 2, parallel)?;
                }
                let oldest = self.last_update.iter().copied().min().unwrap_or(self.updates);
                self.history.trim(oldest);
                self.trim_at = (2 * self.history.rates().len()).clamp(SHORTEST_HISTORY, LONGEST_HISTORY);
            }
        }
        Ok(())
    }

    /// Brings every row to now, and forgets the learning rates that this needed.
    pub fn catch_up(&mut self, parallel: &Parallel) -> Result<()> {
        if self.dense() {
            self.catch_up_before(self.updates, parallel)?;
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
    fn catch_up_before(&mut self, update: u64, parallel: &Parallel) -> Result<()> {
        let (replay, dim, now, rows) = (self.replay()?, self.dim, self.updates, self.last_update.len());
        let (centers, momentum, last_update) = (self.centers.parts(), self.momentum.parts(), self.last_update.parts());
        let second_moment = (!self.second_moment.is_empty()).then(|| self.second_moment.parts());
        parallel(rows.div_ceil(ROWS_A_TASK), &|task| {
            for row in task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(rows) {
                let at = row * dim..(row + 1) * dim;
                // SAFETY: each row belongs to one task.
                unsafe {
                    let last = &mut last_update.range(row..row + 1)[0];
                    if *last < update {
                        let v: &mut [f32] = second_moment.as_ref().map_or(&mut [], |all| all.range(at.clone()));
                        replay.catch_up(*last, centers.range(at.clone()), momentum.range(at), v);
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
            let at = r * dim..(r + 1) * dim;
            let (m, v) = rest.split_at_mut(dim);
            let v = &mut v[..if self.second_moment.is_empty() { 0 } else { dim }];
            w.copy_from_slice(&self.centers[at.clone()]);
            m.copy_from_slice(&self.momentum[at.clone()]);
            v.copy_from_slice(if v.is_empty() { &[] } else { &self.second_moment[at] });
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

    /// Overwrites rows; the other tensors of a dense row are brought to now first.
    pub fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        let (dim, mut values) = (self.dim, zeros(&[self.dim], "a row to write")?);
        for i in 0..rows.rows {
            // SAFETY: as in read_rows.
            unsafe { rows.read_row(i, &mut values) };
            let class = self.shard.first + first + i as u64;
            ensure!(values.iter().all(|x| x.is_finite()), InvalidArgument, "row {i} (class {class}) contains a NaN or an infinity");
            let negative = tensor == StateTensor::SecondMoment && values.iter().any(|&x| x < 0.0);
            ensure!(!negative, InvalidArgument, "row {i} (class {class}) of the second moment must not be negative");
        }
        let replay = self.replay()?;
        let updates = self.updates;
        for i in 0..rows.rows {
            let r = first as usize + i;
            let at = r * dim..(r + 1) * dim;
            unsafe { rows.read_row(i, &mut values) };
            if self.dense() {
                let v: &mut [f32] = if self.second_moment.is_empty() { &mut [] } else { &mut self.second_moment[at.clone()] };
                replay.catch_up(self.last_update[r], &mut self.centers[at.clone()], &mut self.momentum[at.clone()], v);
                self.last_update[r] = updates;
            }
            match tensor {
                StateTensor::Centers => self.centers[at].copy_from_slice(&values),
                StateTensor::Momentum => self.momentum[at].copy_from_slice(&values),
                StateTensor::SecondMoment => self.second_moment[at].copy_from_slice(&values),
            }
        }
        Ok(())
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
        let at = row * self.dim..(row + 1) * self.dim;
        out.copy_from_slice(self.centers.range(at.clone()));
        if let Some(last) = &self.last_update {
            let last = last.range(row..row + 1)[0];
            if last + 1 != self.update {
                let second_moment = self.second_moment.as_ref().map_or(&[][..], |all| all.range(at.clone()));
                catch_up_copy(self.replay, last, out, self.momentum.range(at), second_moment, scratch_rows);
            }
        }
    }

    /// Gives row `row` its gradient.
    ///
    /// # Safety
    /// No other thread touches this row.
    pub unsafe fn apply(&self, row: usize, gradient: &[f32]) {
        let (w, m, v) = self.current(row);
        self.apply_to_current(row, w, m, v, gradient);
    }

    /// Gives a row its gradient, of which `current` has given the tensors.
    pub fn apply_to_current(&self, row: usize, w: &mut [f32], m: &mut [f32], v: &mut [f32], gradient: &[f32]) {
        if !self.rule.apply(w, m, v, gradient) {
            self.bad_row.fetch_min(row, Ordering::Relaxed);
        }
    }

    /// NOT_FINITE if the update has taken a row out of float32.
    pub fn verdict(&self) -> Result<()> {
        match self.bad_row.load(Ordering::Relaxed) {
            usize::MAX => Ok(()),
            row => Err(bad_update(self.first_class + row as u64, self.update)),
        }
    }

    /// The row's tensors, brought to the update before this one.
    ///
    /// # Safety
    /// No other thread touches this row.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn current(&self, row: usize) -> (&mut [f32], &mut [f32], &mut [f32]) {
        let at = row * self.dim..(row + 1) * self.dim;
        let w = self.centers.range(at.clone());
        let m = self.momentum.range(at.clone());
        let v: &mut [f32] = match &self.second_moment {
            Some(second_moment) => second_moment.range(at),
            None => &mut [],
        };
        if let Some(last) = &self.last_update {
            let last = &mut last.range(row..row + 1)[0];
            if *last + 1 != self.update {
                self.replay.catch_up(*last, w, m, v);
            }
            *last = self.update;
        }
        (w, m, v)
    }

    /// Hints that a row will be updated soon.
    pub fn prefetch(&self, row: usize) {
        let at = row * self.dim..(row + 1) * self.dim;
        // SAFETY: a hint does not access the memory.
        unsafe {
            prefetch(self.centers.range(at.clone()));
            prefetch(self.momentum.range(at.clone()));
            if let Some(second_moment) = &self.second_moment {
                prefetch(second_moment.range(at));
            }
        }
    }
}

/// Brings a copied row to now with copies of its state, so that reading a row early or twice changes nothing.
fn catch_up_copy(replay: &Replay, last: u64, w: &mut [f32], momentum: &[f32], second_moment: &[f32], scratch_rows: &mut [f32]) {
    let (m, v) = scratch_rows.split_at_mut(w.len());
    let v = &mut v[..second_moment.len()];
    m.copy_from_slice(momentum);
    v.copy_from_slice(second_moment);
    replay.catch_up(last, w, m, v);
}

/// Asks for every cache line of a row.
fn prefetch(row: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(16) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a hint; the address is in the row.
        unsafe { _mm_prefetch(line.as_ptr().cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}
