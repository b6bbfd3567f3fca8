//! Rows of the shard in their order, as they are now: for callers, checkpoints and searches.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::pool::Pool;
use super::row_file::{Pieces, RowFile};
use super::row_tensors::{Place, RowTensors};
use super::rows::{list_of, HostRows};
use crate::device::TensorRows;
use crate::memory::{reserve, zeros};
use crate::optimizer::{Replay, StateTensor};
use crate::Result;

/// Rows that one thread reads at a time.
const ROWS_OF_A_RUN: usize = 256;

/// Rows that follow each other, in slots that do so.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    tensors: &'a RowTensors,
    /// The row that slot 0 has.
    first: usize,
}

/// What one thread reads runs with.
pub(super) struct RunReader<'a> {
    rows: &'a HostRows,
    /// Where there is a file: rows of it, and what reading takes.
    read: Option<(RowTensors, Pieces, Vec<f32>)>,
}

impl HostRows {
    pub fn reader(&self) -> Result<RunReader<'_>> {
        let read = match &self.file {
            Some(file) => {
                let tensors = self.tensors.like(ROWS_OF_A_RUN.min(self.shard.rows as usize))?;
                Some((tensors, file.piece()?, zeros(&[self.dim], "a row of start values")?))
            }
            None => None,
        };
        Ok(RunReader { rows: self, read })
    }

    /// Copies a row of a run into `out` as it is now; `scratch_rows` holds two rows.
    pub fn read_run(&self, run: Run<'_>, replay: &Replay, row: usize, out: &mut [f32], scratch_rows: &mut [f32]) {
        self.read_stored(run, row, out);
        if self.dense() && self.last_update[row] != self.updates {
            let (m, v) = run.tensors.copy_state(row - run.first, scratch_rows);
            replay.catch_up(self.last_update[row], out, m, v);
        }
    }

    /// Copies a row of a run as it is stored, or would be.
    fn read_stored(&self, run: Run<'_>, row: usize, out: &mut [f32]) {
        if self.file.is_some() || self.stored.has(row) {
            run.tensors.centers.read(run.at(row), out);
        } else {
            run.tensors.centers.read_start(&self.start, self.shard.first + row as u64, out);
        }
    }

    /// Reads rows, replayed to now; those of a file on the threads that wait for it, others on those of `pool`.
    pub fn read_rows(&self, first: u64, tensors: &[TensorRows], pool: &Pool) -> Result<()> {
        let count = self.check_tensors(tensors)?;
        let replay = self.replay()?;
        let pool = self.file.as_ref().map_or(pool, RowFile::pool);
        let (mut readers, failure) = (Vec::new(), Mutex::new(None));
        reserve(&mut readers, pool.threads(), "threads that read rows")?;
        readers.resize_with(pool.threads(), || Mutex::new(None));
        pool.run(count.div_ceil(ROWS_OF_A_RUN), &|task, worker| {
            let some = task * ROWS_OF_A_RUN..((task + 1) * ROWS_OF_A_RUN).min(count);
            // A worker number belongs to one thread: nobody waits.
            let mut reader = readers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = self.read_some(&mut reader, first as usize, some, &replay, tensors) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Reads rows `some` of the matrices, of which row 0 is row `first` of the shard. The reader is made when it is first needed.
    fn read_some<'a>(
        &'a self,
        reader: &mut Option<(RunReader<'a>, Vec<f32>)>,
        first: usize,
        some: Range<usize>,
        replay: &Replay,
        tensors: &[TensorRows],
    ) -> Result<()> {
        let (reader, row) = match reader {
            Some(made) => made,
            None => reader.insert((self.reader()?, zeros(&[3, self.dim], "rows to read")?)),
        };
        let (w, rest) = row.split_at_mut(self.dim);
        let run = reader.run(first + some.start..first + some.end)?;
        // A dense row is brought to now from all of its tensors.
        let dense = self.dense();
        let centers = dense || tensors.iter().any(|wanted| wanted.tensor == StateTensor::Centers);
        let state = dense || tensors.iter().any(|wanted| wanted.tensor != StateTensor::Centers);
        for i in some {
            let r = first + i;
            if centers {
                self.read_stored(run, r, w);
            }
            let (m, v) = match state {
                true => run.tensors.copy_state(r - run.first, rest),
                false => rest.split_at_mut(self.dim),
            };
            if dense {
                replay.catch_up(self.last_update[r], w, m, v);
            }
            for wanted in tensors {
                let values: &[f32] = match wanted.tensor {
                    StateTensor::Centers => w,
                    StateTensor::Momentum => m,
                    StateTensor::SecondMoment => v,
                };
                // SAFETY: the caller of the head's entry gave matrices of its host memory of this many rows; each is in one task.
                unsafe { wanted.rows.write_row(i, values) };
            }
        }
        Ok(())
    }
}

impl Run<'_> {
    fn at(&self, row: usize) -> Range<usize> {
        self.tensors.at(row - self.first)
    }
}

impl RunReader<'_> {
    /// Rows of the shard, 256 at most.
    pub fn run(&mut self, rows: Range<usize>) -> Result<Run<'_>> {
        match (&mut self.read, &self.rows.file) {
            (Some((tensors, piece, start)), Some(file)) => {
                let place = |slot: usize| Place { row: rows.start + slot, slot };
                let list = list_of(rows.len(), &place);
                file.read_with(piece, list, tensors.parts(), start)?;
                Ok(Run { tensors, first: rows.start })
            }
            _ => Ok(Run { tensors: &self.rows.tensors, first: 0 }),
        }
    }
}
