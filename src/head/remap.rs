//! Other classes for a head that trains: they come, go, change their numbers and become one.
//!
//! A second part of a head, made for the new classes, takes the rows over from the first and then its place. A rank that fails before
//! all ranks have done so leaves all of them with the classes they had. The rows of a sharded head go round the ranks in blocks, and
//! each rank keeps those that become its own.

use std::ops::Range;

use super::checkpoint::Report;
use super::class_map::{ClassMap, ClassTable};
use super::failure::on_rank;
use super::moving_rows::MovingRows;
use super::staged::Staged;
use super::{open, CallState, Head, Progress};
use crate::comm::{gather_words, MemorySpace};
use crate::device::HeadDevice;
use crate::memory::zeros;
use crate::options::{HeadOptions, Placement};
use crate::{ensure, error, Contribution, Result};

/// The classes that a rank asks for.
#[derive(Clone, Copy)]
pub struct RemapRequest<'a> {
    pub num_classes: u64,
    pub table: ClassTable<'a>,
}

/// What a rank has before the first row moves.
struct Begun<'a> {
    options: HeadOptions,
    progress: Progress,
    skipped: u64,
    classes: ClassMap<'a>,
    backend: Box<dyn HeadDevice>,
    /// This rank's rows, then those of all ranks, where they go round.
    staged: Staged,
    gathered: Option<Staged>,
    /// Which of these rows have their start values, by a 1; as many for each rank.
    starts: Vec<u8>,
    gathered_starts: Vec<u8>,
    /// Memory for rows that several classes become, and for a class center on its way into them.
    merged: Staged,
    center: Vec<f32>,
}

impl Head {
    /// Gives the head other classes; see `pfc_head_remap`.
    pub fn remap(&mut self, request: Contribution<RemapRequest<'_>>, report: Report<'_>) -> Result<()> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        // What is still to be told of steps before would go with the part that knows it.
        let settled = self.wait();
        // Also where the request is wrong: replicas bring dense rows to now on all ranks or on none.
        let progress = self.read_progress();
        let begun = settled.and_then(|()| self.begin_remap(request?, progress?));
        let begun = self.poison_unless_recoverable(begun);
        let words = begun.as_ref().map(|begun| {
            let (Progress { draws, updates }, classes) = (begun.progress, begun.options.num_classes);
            [self.number, draws, updates, classes, begun.classes.checksum().into()]
        });
        let agreed = gather_words(&self.comm, words.map_err(|error| on_rank(error, self.rank())));
        let agreed = self.poison_without_peers(agreed);
        let changed = agreed.and_then(|all| self.change_classes(begun?, &all, report));
        // What has gone has given its memory back, and on a GPU that waits for all that is on it: no rank may be a step ahead.
        if self.comm.failure().is_none() {
            let gone = self.comm.barrier();
            self.poison_without_peers(gone)?;
        }
        changed
    }

    /// The same where all ranks have begun, with what they have told of themselves.
    fn change_classes(&mut self, mut begun: Begun<'_>, all: &[[u64; 5]], report: Report<'_>) -> Result<()> {
        let same = self.require_same_head(all, "pfc_head_resize, pfc_head_remap or pfc_head_merge", |words| words[0]);
        self.poison_unless_recoverable(same)?;
        self.require_same_progress(all, |&[_, draws, updates, ..]| [draws, updates])?;
        for (what, word) in [("num_classes", 3), ("class_map or class_weights", 4)] {
            if let Some(rank) = (1..all.len()).find(|&rank| all[rank][word] != all[0][word]) {
                return Err(error!(Mismatch, "rank 0 and rank {rank} have been given different {what}"));
            }
        }
        let moved = self.move_rows(&mut begun, report);
        let moved = self.poison_unless_recoverable(moved);
        let words = moved.map(|()| []).map_err(|error| on_rank(&error, self.rank()));
        let agreed = gather_words(&self.comm, words);
        self.poison_without_peers(agreed)?;
        self.take_over(begun);
        Ok(())
    }

    /// What a rank does before it is known that all ranks can.
    fn begin_remap<'a>(&mut self, request: RemapRequest<'a>, progress: Progress) -> Result<Begun<'a>> {
        let RemapRequest { num_classes, table } = request;
        ensure!(
            self.accumulated == 0,
            InvalidArgument,
            "{} micro-batches have been accumulated, and their classes are about to change: update first",
            self.accumulated
        );
        let options = HeadOptions { num_classes, ..self.options.clone() };
        options.check(self.comm.size())?;
        let shard = options.shard(self.comm.size(), self.rank());
        let classes = ClassMap::new(table, "the head", self.options.num_classes, num_classes, shard)?;
        let backend = open(&*self.device, &self.comm, &options, self.batch_room, true)?;
        let (tensors, dim) = (self.tensors(), options.embedding_dim as usize);
        let ranks = self.blocks();
        let at_once = (self.staged_rows(&tensors) / ranks).clamp(1, self.most_rows() as usize);
        let what = "rows on their way to other classes";
        let staged = |rows: usize| Staged::new(&tensors, rows, dim, what);
        if ranks > 1 {
            let widest = tensors.iter().map(|tensor| tensor.dtype.size()).max().unwrap_or(4);
            self.comm.reserve_all_gather(at_once * dim * widest)?;
        }
        Ok(Begun {
            progress,
            skipped: self.backend.figures()?.skipped_updates,
            classes,
            backend,
            staged: staged(at_once)?,
            gathered: if ranks > 1 { Some(staged(ranks * at_once)?) } else { None },
            starts: zeros(&[at_once], what)?,
            gathered_starts: zeros(&[if ranks > 1 { ranks * at_once } else { 0 }], what)?,
            merged: self.staged_f32(shard.rows, "classes that become one")?,
            center: zeros(&[dim], "a class center")?,
            options,
        })
    }

    /// Ranks whose rows this one has to look at, its own alone where it has all of them.
    fn blocks(&self) -> usize {
        match self.options.placement {
            Placement::Sharded => self.comm.size() as usize,
            Placement::Replicated => 1,
        }
    }

    /// Rows of the largest shard.
    fn most_rows(&self) -> u64 {
        self.options.shard(self.comm.size(), 0).rows
    }

    /// Brings this rank's new rows together. A rank that fails takes part in the exchanges all the same.
    fn move_rows(&self, begun: &mut Begun<'_>, report: Report<'_>) -> Result<()> {
        let Begun { progress, classes, backend, staged, gathered, starts, gathered_starts, merged, center, .. } = begun;
        let (ranks, own, at_once) = (self.blocks(), self.rank() as usize, staged.capacity());
        let tensors = self.tensors();
        let mut moving = MovingRows::new(classes, std::mem::take(center));
        let (mut done, total) = (0, self.bytes(&tensors, self.shard.rows));
        report(done, total);
        let mut outcome = Ok(());
        for start in (0..self.most_rows()).step_by(at_once) {
            // The classes of a rank's rows that have their turn.
            let turn = |rank: usize| -> Range<u64> {
                let shard = self.options.shard(self.comm.size(), rank as u32);
                let at = |row: u64| shard.end().min(shard.first + row);
                at(start)..at(start + at_once as u64)
            };
            let Range { start: first, end } = turn(own);
            if outcome.is_ok() && first < end {
                outcome = self.read_staged(staged, first, 0..(end - first) as usize);
                // A row that goes is in nobody's way.
                for (row, class) in (first..end).enumerate().filter(|&(_, class)| classes.is_kept(class)) {
                    outcome = outcome.and_then(|()| staged.require_finite(row..row + 1, class));
                }
                for (class, is_start) in (first..end).zip(starts.iter_mut()) {
                    *is_start = self.backend.is_start(class - self.shard.first).into();
                }
            }
            if outcome.is_err() {
                // The others are to hear of the failure, not to stumble over these rows.
                staged.clear();
            }
            let (sources, starts) = match gathered {
                Some(gathered) => {
                    self.gather_bytes(starts, gathered_starts)?;
                    for tensor in 0..tensors.len() {
                        self.gather_bytes(staged.bytes(tensor, at_once), gathered.bytes(tensor, ranks * at_once))?;
                    }
                    (gathered, &*gathered_starts)
                }
                None => (&mut *staged, &*starts),
            };
            for block in 0..ranks {
                let classes = turn(if ranks > 1 { block } else { own });
                if outcome.is_ok() {
                    let taken = moving.take(&mut **backend, sources, block * at_once, classes, |row| starts[row] == 1);
                    outcome = taken.map(|_| ());
                }
            }
            done += self.bytes(&tensors, end - first);
            report(done, total);
        }
        outcome?;
        // Rows that no class becomes have their start values already.
        moving.finish(&mut **backend, merged, |_, _| false)?;
        backend.set_updates(progress.updates)
    }

    /// Gathers as many bytes from each rank.
    fn gather_bytes(&self, send: &[u8], recv: &mut [u8]) -> Result<()> {
        assert_eq!(recv.len(), send.len() * self.comm.size() as usize, "a gather of {} bytes", send.len());
        // SAFETY: both are as long as the operation takes them to be.
        unsafe { self.comm.all_gather_raw(send.as_ptr(), recv.as_mut_ptr(), send.len(), MemorySpace::Host) }
    }

    /// The head is the one with the other classes from here on.
    fn take_over(&mut self, begun: Begun<'_>) {
        let Begun { options, progress, skipped, mut backend, .. } = begun;
        backend.succeed();
        // In this order: the old part hands in its last spans and gives its memory back.
        self.backend = backend;
        self.shard = options.shard(self.comm.size(), self.rank());
        self.most_classes = self.most_classes.max(options.num_classes);
        self.options = options;
        (self.state, self.prepared, self.chosen, self.own_failure) = (CallState::Idle, None, None, None);
        (self.has_sample, self.failed) = (false, true);
        self.draws = progress.draws;
        self.skipped_before += skipped;
        self.hide_sample();
        self.share_shard();
    }
}

/// The classes that are left where each class `from[i]` becomes class `into[i]`, and for each old class its new number: those behind a
/// class that has gone move up.
pub fn merge_table(num_classes: u64, from: &[i64], into: &[i64]) -> Result<(u64, Vec<i64>)> {
    const MERGED: i64 = -2;
    let mut map = zeros::<i64>(&[num_classes as usize], "a class map")?;
    for (i, &class) in from.iter().enumerate() {
        ensure!(
            class >= 0 && (class as u64) < num_classes,
            InvalidArgument,
            "from[{i}] must be a class, 0 to {}, got {class}",
            num_classes - 1
        );
        ensure!(map[class as usize] != MERGED, InvalidArgument, "from[{i}] is class {class}, which is in from already");
        map[class as usize] = MERGED;
    }
    for (i, &class) in into.iter().enumerate() {
        ensure!(
            class >= 0 && (class as u64) < num_classes,
            InvalidArgument,
            "into[{i}] must be a class, 0 to {}, got {class}",
            num_classes - 1
        );
        ensure!(
            map[class as usize] != MERGED,
            InvalidArgument,
            "into[{i}] is class {class}, which is in from itself: name the class that both become"
        );
    }
    let mut left = 0;
    for to in map.iter_mut().filter(|to| **to != MERGED) {
        *to = left;
        left += 1;
    }
    for (&from, &into) in from.iter().zip(into) {
        map[from as usize] = map[into as usize];
    }
    Ok((left as u64, map))
}

#[cfg(test)]
mod tests;
