//! The rows of a shard: class centers, optimizer state, and when each row was last brought up to date.
//!
//! All of them are in host memory, each in the slot of its own number, or they are in a file and memory holds those of a step, each in the
//! slot of its column: [`HostRows::bring`] and [`HostRows::put_back`]. What computes with rows is told their [`Place`] and does not know.
//!
//! Either way a lazy row is its start values until it is first stored: in memory when a step has it, in a file when it is written. So a
//! head of many classes is made at once, and takes its memory in its first steps.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::arrivals::Arrivals;
use super::pool::Pool;
use super::products::CHUNK;
use super::row_file::{RowFile, RowList};
use super::row_set::RowSet;
use super::row_tensors::{Place, RoundingKey, RowTensorParts, RowTensors, Slots, StartValues};
use super::sample::{Draft, Sample};
use super::step_rows::{worker_copies, ReadableRows, UpdatingRows};
use super::table::Rounding;
use crate::device::tensor_rows::check_row;
use crate::device::{HeadSpec, TensorRows};
use crate::memory::{Buffer, Parts};
use crate::optimizer::{History, Optimizer, Replay, StateTensor, UpdateRule};
use crate::options::{Residency, RowUpdate};
use crate::shard::Shard;
use crate::{ensure, error, Error, Result};

/// Learning rates are looked over for ones no row needs any more when their number has doubled, and not below this.
const SHORTEST_HISTORY: usize = 1024;
/// From here on the rows that keep old ones needed are brought to now: a step's replay takes time and memory in their number.
const LONGEST_HISTORY: usize = 16384;
/// Rows that one task brings to now.
const ROWS_A_TASK: usize = 256;
/// Rows that memory has room for at least, if there are as many.
const FEWEST_SLOTS: usize = 256;
/// Targets that one thread reads: a step waits for them, so they are shared among all threads.
const TARGETS_A_TASK: usize = 8;
/// Rows of a file that are changed at a time where all of them are: enough for all threads that wait for the disk, and their memory.
const CHANGED_ROWS: usize = 4096;
const CHANGED_BYTES: usize = 16 << 20;

pub(super) struct HostRows {
    pub(super) shard: Shard,
    pub(super) dim: usize,
    optimizer: Optimizer,
    /// All rows, or where there is a file those of the step.
    pub(super) tensors: RowTensors,
    pub(super) file: Option<RowFile>,
    pub(super) start: StartValues,
    /// Without a file: the rows that memory has.
    pub(super) stored: RowSet,
    /// With a file: memory has the rows of a step.
    brought: bool,
    /// Dense rows: the update each row was last brought to. Empty for lazy rows.
    pub(super) last_update: Buffer<u64>,
    history: History,
    trim_at: usize,
    pub(super) updates: u64,
    /// The head still has its rows elsewhere.
    successor: bool,
    /// For each worker three rows: what [`RowTensorParts::load`] copies.
    copies: Buffer<f32>,
}

/// Rows that follow each other, to be changed, and what that takes.
struct ChangingRun<'a> {
    tensors: RowTensorParts<'a>,
    first: usize,
    copies: Parts<'a, f32>,
    last_update: Option<Parts<'a, u64>>,
}

impl HostRows {
    /// All rows of the shard at their start. With a file, memory has `slots` of them at least.
    pub fn new(spec: &HeadSpec, slots: usize, pool: &Pool) -> Result<HostRows> {
        let (options, shard) = (&spec.options, spec.shard);
        let (dim, rows) = (options.embedding_dim as usize, shard.rows as usize);
        let dense = options.row_update == RowUpdate::Dense;
        let start = StartValues { seed: options.seed, init_std: options.init_std };
        let storage = match &options.residency {
            Residency::File { directory, .. } => Some(directory),
            // The CPU's own memory is the host's.
            Residency::Device | Residency::Host => None,
        };
        let tensors = RowTensors::zeroed(options, if storage.is_some() { slots.max(FEWEST_SLOTS).min(rows) } else { rows })?;
        let file = storage.map(|directory| RowFile::create(spec, directory, start)).transpose()?;
        let workers = file.as_ref().map_or(0, RowFile::threads).max(pool.threads());
        let mut made = HostRows {
            shard,
            dim,
            optimizer: options.optimizer,
            tensors,
            start,
            stored: RowSet::none_of(if file.is_none() { rows } else { 0 })?,
            file,
            brought: false,
            successor: spec.successor,
            last_update: Buffer::zeroed(if dense { rows } else { 0 }, "last steps of rows")?,
            history: History::with_room(if dense { LONGEST_HISTORY } else { 0 })?,
            trim_at: SHORTEST_HISTORY,
            updates: 0,
            copies: Buffer::zeroed(workers * 3 * dim, "copies of rows")?,
        };
        if dense {
            // Every update changes them all.
            made.store_start(rows, &|row| row, pool);
        }
        Ok(made)
    }

    /// Stores those of these rows that memory does not have; the rows of a file are there when they have been brought.
    fn store_start(&mut self, count: usize, row: &(dyn Fn(usize) -> usize + Sync), pool: &Pool) {
        if self.file.is_some() || self.stored.count() == self.tensors.slots {
            return;
        }
        let (dim, start, first, stored) = (self.dim, &self.start, self.shard.first, &self.stored);
        let (tensors, copies) = (self.tensors.parts(), self.copies.parts());
        // A task of some hundred kilobytes: long enough to be worth handing out, short enough to share evenly.
        let rows_a_task = (1 << 17) / dim + 1;
        pool.run(count.div_ceil(rows_a_task), &|task, worker| {
            let positions = task * rows_a_task..((task + 1) * rows_a_task).min(count);
            for row in positions.map(row).filter(|&row| !stored.has(row)) {
                // SAFETY: each row belongs to one task, a worker number to one thread.
                unsafe { tensors.start(row, start, first + row as u64, worker_copies(&copies, worker, dim)) };
            }
        });
        (0..count).for_each(|position| self.stored.add(row(position)));
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Rows that memory will have and does not have yet.
    pub fn unstored(&self) -> usize {
        match self.file {
            Some(_) => 0,
            None => self.tensors.slots - self.stored.count(),
        }
    }

    /// Whether a row has its start values, and is stored nowhere.
    pub fn is_start(&self, row: usize) -> bool {
        match &self.file {
            Some(file) => !file.has(row),
            None => !self.stored.has(row),
        }
    }

    pub fn dense(&self) -> bool {
        !self.last_update.is_empty()
    }

    /// Where rows are once they have been brought.
    pub fn slots(&self) -> Slots {
        match self.file {
            Some(_) => Slots::OfPositions,
            None => Slots::OfRows,
        }
    }

    /// How many rows can be brought at once: all that there are where they need not be.
    pub fn slot_count(&self) -> usize {
        self.tensors.slots
    }

    /// Brings ascending rows, [`HostRows::slot_count`] at most, into the slots of their positions. Rows that were brought before are there
    /// no more.
    pub fn bring(&mut self, count: usize, row: &(dyn Fn(usize) -> usize + Sync)) -> Result<()> {
        self.brought = false;
        match &mut self.file {
            Some(file) => file.read(list_of(count, &|slot| Place { row: row(slot), slot }), self.tensors.parts(), &mut self.copies),
            None => Ok(()),
        }
    }

    /// Stores rows that were brought and changed.
    pub fn put_back(&mut self, count: usize, row: &(dyn Fn(usize) -> usize + Sync)) -> Result<()> {
        match &mut self.file {
            Some(file) => file.write(list_of(count, &|slot| Place { row: row(slot), slot }), self.tensors.parts()),
            None => Ok(()),
        }
    }

    /// The rows that memory has.
    pub fn readable(&mut self) -> ReadableRows<'_> {
        let slots = self.slots();
        ReadableRows { slots, tensors: self.tensors.parts(), last_update: &self.last_update, updates: self.updates }
    }

    /// Brings a step's sample, the targets first, and gives the rows to `beside` as soon as these are there. Of the others `arrivals` tells.
    pub fn bring_beside<R>(
        &mut self,
        draft: &Draft,
        arrivals: &Arrivals,
        pool: &Pool,
        beside: impl FnOnce(&ReadableRows<'_>) -> Result<R>,
    ) -> Result<R> {
        let (sample, slots) = (&draft.sample, self.slots());
        self.brought = false;
        self.store_start(sample.len(), &|column| sample.row(column), pool);
        if self.file.is_some() && sample.len() > self.tensors.slots {
            // A caller's sample beyond every draw.
            self.tensors = self.tensors.like(sample.len())?;
        }
        let readable = ReadableRows { slots, tensors: self.tensors.parts(), last_update: &self.last_update, updates: self.updates };
        let Some(file) = &mut self.file else { return beside(&readable) };
        let targets = draft.target_columns()?;
        let of_targets = |number: usize| sample.place(slots, targets[number] as usize);
        file.read(
            RowList { count: targets.len(), a_task: TARGETS_A_TASK, place: &of_targets },
            readable.tensors,
            &mut self.copies,
        )?;
        let place = |column: usize| sample.place(slots, column);
        let list = list_of(sample.len(), &place);
        let is_target = |column: usize| targets.binary_search(&(column as u32)).is_ok();
        let came = |columns: &Range<usize>, well: bool| if well { arrivals.has_come(columns) } else { arrivals.end() };
        let (result, brought) = match file.has_workers() {
            true => file.read_beside(list, readable.tensors, &mut self.copies, &is_target, came, || beside(&readable)),
            false => {
                let read = file.read_beside(list, readable.tensors, &mut self.copies, &is_target, came, || ()).1;
                (beside(&readable), read)
            }
        };
        brought?;
        self.brought = true;
        result
    }

    /// No step is under way whose rows have been brought.
    pub fn end_step(&mut self) {
        self.brought = false;
    }

    /// Gives the rows of the sample, which have been brought, to `beside` for update number `updates() + 1`, and stores what it makes of
    /// them. `arrivals` is to be told of each chunk that is updated.
    pub fn update_beside<R>(
        &mut self,
        sample: &Sample,
        replay: &Replay,
        learning_rate: f64,
        arrivals: &Arrivals,
        beside: impl FnOnce(&UpdatingRows<'_>) -> Result<R>,
    ) -> Result<R> {
        let slots = self.slots();
        self.brought = false;
        let (updating, file) = self.updating_and_file(replay, learning_rate);
        let Some(file) = file else { return beside(&updating) };
        let place = |column: usize| sample.place(slots, column);
        let list = list_of(sample.len(), &place);
        // Nobody waits for chunks that a panic keeps from coming.
        let to_its_end = || {
            let _end = arrivals.ending();
            beside(&updating)
        };
        let (result, stored) = match file.has_workers() {
            true => file.write_beside(list, updating.tensors, |columns| arrivals.wait(columns), to_its_end),
            false => {
                let result = to_its_end();
                (result, file.write(list, updating.tensors))
            }
        };
        stored.and(result)
    }

    /// What brings rows of any age to now; made once, before rows are read.
    pub fn replay(&self) -> Result<Replay> {
        // Lazy rows keep no history: theirs is the replay of nothing.
        Replay::new(&self.optimizer, &self.history, self.history.updates())
    }

    fn key(&self, row: usize) -> RoundingKey {
        RoundingKey { seed: self.start.seed, class: self.shard.first + row as u64, update: self.updates }
    }

    /// The rows that memory has, for update number `updates() + 1`.
    pub fn updating<'a>(&'a mut self, replay: &'a Replay, learning_rate: f64) -> UpdatingRows<'a> {
        self.updating_and_file(replay, learning_rate).0
    }

    fn updating_and_file<'a>(&'a mut self, replay: &'a Replay, learning_rate: f64) -> (UpdatingRows<'a>, Option<&'a mut RowFile>) {
        let (update, dense, slots) = (self.updates + 1, self.dense(), self.slots());
        let updating = UpdatingRows {
            rule: UpdateRule::new(&self.optimizer, learning_rate, update),
            tensors: self.tensors.parts(),
            copies: self.copies.parts(),
            last_update: dense.then(|| self.last_update.parts()),
            replay,
            slots,
            seed: self.start.seed,
            first_class: self.shard.first,
            update,
            bad_row: AtomicUsize::new(usize::MAX),
        };
        (updating, self.file.as_mut())
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

    /// Brings every row to now, also those of the sample that a step under way has brought, and forgets the learning rates that this
    /// needed.
    ///
    /// # Errors
    /// DEVICE where a file's rows are not all at the same update any more.
    pub fn catch_up(&mut self, sample: &Sample, pool: &Pool) -> Result<()> {
        if !self.dense() {
            return Ok(());
        }
        self.catch_up_before(self.updates, pool).map_err(|error| self.torn_if_on_file(error))?;
        self.history.trim(self.updates);
        if std::mem::take(&mut self.brought) {
            self.bring(sample.len(), &|column| sample.row(column)).map_err(|error| torn(&error))?;
            self.brought = true;
        }
        Ok(())
    }

    fn torn_if_on_file(&self, error: Error) -> Error {
        if self.file.is_some() {
            torn(&error)
        } else {
            error
        }
    }

    /// See [`crate::device::HeadDevice::succeed`].
    pub fn succeed(&mut self) {
        self.successor = false;
        self.file.iter_mut().for_each(RowFile::succeed);
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
        let (replay, now, key) = (self.replay()?, self.updates, self.key(0));
        let is_behind = |last: &[u64]| last.iter().any(|&last| last < update);
        self.change(0..self.last_update.len(), OldRows::Read { wanted: &is_behind }, |rows, run| {
            pool.run(rows.len().div_ceil(ROWS_A_TASK), &|task, worker| {
                let first = rows.start + task * ROWS_A_TASK;
                for row in first..(first + ROWS_A_TASK).min(rows.end) {
                    // SAFETY: each row belongs to one task, a worker number to one thread.
                    unsafe { run.catch_up(row, update, now, &replay, key, worker) };
                }
            });
        })
    }

    /// Gives rows of the shard to `body`, some at a time, and stores what it makes of them.
    ///
    /// # Errors
    /// DEVICE where rows may have been changed, unless the head has them elsewhere.
    fn change(&mut self, rows: Range<usize>, old: OldRows<'_>, mut body: impl FnMut(Range<usize>, ChangingRun<'_>)) -> Result<()> {
        let dense = self.dense();
        let Some(file) = &mut self.file else {
            let last_update = dense.then(|| self.last_update.parts());
            body(rows, ChangingRun { tensors: self.tensors.parts(), first: 0, copies: self.copies.parts(), last_update });
            return Ok(());
        };
        let at_once = (CHANGED_BYTES / file.record_bytes()).clamp(1, CHANGED_ROWS).min(rows.len());
        let mut tensors = self.tensors.like(at_once)?;
        let torn = |error: Error| if self.successor { error } else { torn(&error) };
        let mut changed = false;
        for first in rows.clone().step_by(at_once.max(1)) {
            let run = first..(first + at_once).min(rows.end);
            let place = |slot: usize| Place { row: first + slot, slot };
            let list = list_of(run.len(), &place);
            match old {
                OldRows::Read { wanted } if dense && !wanted(&self.last_update[run.clone()]) => continue,
                OldRows::Read { .. } => {
                    let read = file.read(list, tensors.parts(), &mut self.copies);
                    read.map_err(|error| if changed { torn(error) } else { error })?;
                }
                OldRows::Overwritten => {}
            }
            changed = true;
            let last_update = dense.then(|| self.last_update.parts());
            body(run, ChangingRun { tensors: tensors.parts(), first, copies: self.copies.parts(), last_update });
            file.write(list, tensors.parts()).map_err(torn)?;
        }
        Ok(())
    }

    /// Overwrites rows in some tensors; the others of a dense row are brought to now first. bfloat16 takes the nearest of what is given.
    pub fn write_rows(&mut self, first: u64, tensors: &[TensorRows], pool: &Pool) -> Result<()> {
        let count = self.check_tensors(tensors)?;
        self.check_values(first, tensors, pool)?;
        let (replay, now, key, first, dim) = (self.replay()?, self.updates, self.key(0), first as usize, self.dim);
        let given = |tensor| tensors.iter().any(|given| given.tensor == tensor);
        if !given(StateTensor::Centers) {
            self.store_start(count, &|number| first + number, pool);
        } else if self.file.is_none() {
            (first..first + count).for_each(|row| self.stored.add(row));
        }
        let all = [StateTensor::Centers, StateTensor::Momentum, StateTensor::SecondMoment];
        let whole = all.into_iter().all(|tensor| given(tensor) || self.tensors.table(tensor).is_empty());
        let old = if whole { OldRows::Overwritten } else { OldRows::Read { wanted: &|_| true } };
        self.change(first..first + count, old, |some, run| {
            pool.run(some.len().div_ceil(ROWS_A_TASK), &|task, worker| {
                let from = some.start + task * ROWS_A_TASK;
                for row in from..(from + ROWS_A_TASK).min(some.end) {
                    // SAFETY: each row belongs to one task, a worker number to one thread; the rest as in read_rows.
                    unsafe {
                        match whole {
                            true => run.set_last_update(row, now),
                            false => run.catch_up(row, now, now, &replay, key, worker),
                        }
                        let at = run.tensors.at(row - run.first);
                        for TensorRows { tensor, rows } in tensors {
                            let Some(table) = run.tensors.table(*tensor) else { unreachable!("a tensor that was checked") };
                            let values = table.load(at.clone(), &mut worker_copies(&run.copies, worker, dim)[..dim]);
                            rows.read_row(row - first, values);
                            table.store(at.clone(), values, Rounding::Nearest);
                        }
                    }
                }
            });
        })
    }

    /// Refuses values that cannot be stored, by the first row that has one.
    fn check_values(&mut self, first: u64, tensors: &[TensorRows], pool: &Pool) -> Result<()> {
        let (dim, first, copies) = (self.dim, self.shard.first + first, self.copies.parts());
        for &TensorRows { tensor, rows } in tensors {
            let dtype = self.tensors.table(tensor).dtype();
            let check = |row: usize, worker: usize| {
                // SAFETY: as in write_rows.
                let values = unsafe {
                    let values = &mut worker_copies(&copies, worker, dim)[..dim];
                    rows.read_row(row, values);
                    values
                };
                check_row(tensor, dtype, row, first + row as u64, values)
            };
            let wrong = AtomicUsize::new(usize::MAX);
            pool.run(rows.rows.div_ceil(ROWS_A_TASK), &|task, worker| {
                let mut some = task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(rows.rows);
                if let Some(row) = some.find(|&row| check(row, worker).is_err()) {
                    wrong.fetch_min(row, Ordering::Relaxed);
                }
            });
            match wrong.into_inner() {
                usize::MAX => {}
                row => return check(row, 0),
            }
        }
        Ok(())
    }

    /// Refuses tensors that this head does not have. Gives the number of their rows.
    pub fn check_tensors(&self, tensors: &[TensorRows]) -> Result<usize> {
        for wanted in tensors {
            ensure!(
                wanted.tensor != StateTensor::SecondMoment || self.tensors.has_second_moment(),
                InvalidArgument,
                "tensor must not be the second moment: this head's optimizer has none"
            );
        }
        let count = tensors.first().map_or(0, |wanted| wanted.rows.rows);
        assert!(tensors.iter().all(|wanted| wanted.rows.rows == count), "the same rows of all tensors");
        Ok(count)
    }
}

/// What is done with the rows that a file has before they are changed.
enum OldRows<'a> {
    /// They are read; dense rows that follow each other only if `wanted` says so of the updates they were last brought to.
    Read { wanted: &'a dyn Fn(&[u64]) -> bool },
    /// Nothing of them stays.
    Overwritten,
}

impl ChangingRun<'_> {
    /// Takes a row, of which nothing stays, as one that has been brought to now.
    ///
    /// # Safety
    /// No other thread touches this row.
    unsafe fn set_last_update(&self, row: usize, now: u64) {
        if let Some(last_update) = &self.last_update {
            last_update.range(row..row + 1)[0] = now;
        }
    }

    /// Brings a row that was last touched before `update` to now.
    ///
    /// # Safety
    /// No other thread touches this row, or has this worker's number.
    unsafe fn catch_up(&self, row: usize, update: u64, now: u64, replay: &Replay, of_first_row: RoundingKey, worker: usize) {
        let Some(last_update) = &self.last_update else { return };
        let (last, slot) = (&mut last_update.range(row..row + 1)[0], row - self.first);
        if *last < update {
            let values = self.tensors.load(slot, worker_copies(&self.copies, worker, self.tensors.dim));
            replay.catch_up(*last, values.w, values.m, values.v);
            let key = RoundingKey { class: of_first_row.class + row as u64, ..of_first_row };
            self.tensors.store(slot, key, &values);
            *last = now;
        }
    }
}

/// Rows that move by chunks.
pub(super) fn list_of<'a>(count: usize, place: &'a (dyn Fn(usize) -> Place + Sync)) -> RowList<'a> {
    RowList { count, a_task: CHUNK, place }
}

/// The error of rows of which some may have changed and some not.
fn torn(error: &Error) -> Error {
    error!(Device, "{}", error.message)
}
