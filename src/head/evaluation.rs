//! Evaluation: metrics of the last step, and the nearest class centers.

use super::{Head, Seconds};
use crate::comm::{gather_words, Communicator};
use crate::device::{keep_best, Nearest, StepFigures};
use crate::matrix::{Matrix, ReduceOp};
use crate::memory::{reserve, zeros};
use crate::options::Placement;
use crate::{ensure, error, Contribution, Result};

/// What the last step was like; `pfc_metrics` documents each.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub updates: u64,
    pub skipped_updates: u64,
    pub draws: u64,
    pub rows: u64,
    pub valid_rows: u64,
    pub sample_size: u64,
    pub loss: f64,
    pub top1: f64,
    pub mean_target_cosine: f64,
    pub grad_embeddings_norm: f64,
    pub grad_centers_norm: f64,
    pub seconds: Seconds,
}

impl Head {
    /// What the last step was like; collective.
    pub fn metrics(&mut self) -> Result<Metrics> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let figures = self.backend.figures();
        // Its first message says which head it is of.
        let met = gather_words(&self.comm, figures.as_ref().map(|_| [self.number]).map_err(Clone::clone));
        let met = met.and_then(|heads| self.require_same_head(&heads, "pfc_head_metrics", |words| words[0]));
        self.poison_unless_recoverable(met)?;
        let figures = self.poison_unless_recoverable(figures)?;
        let correct = self.count_top1(&figures);
        let correct = self.poison_unless_recoverable(correct)?;
        let mut squares = [figures.grad_embeddings, figures.grad_centers];
        let reduced = self.comm.all_reduce(&mut squares, ReduceOp::Sum);
        self.poison_unless_recoverable(reduced)?;
        let grad_centers = match self.options.placement {
            Placement::Sharded => squares[1],
            // A replicated head's ranks all hold the whole gradient.
            Placement::Replicated => figures.grad_centers,
        };
        Ok(self.metrics_of(&figures, share(correct, figures.valid_rows), squares[0], grad_centers))
    }

    /// What this rank knows of the last step; see `pfc_head_last_metrics`.
    pub fn last_metrics(&mut self) -> Result<Metrics> {
        self.check_usable()?;
        let figures = self.backend.figures();
        let figures = self.poison_unless_recoverable(figures)?;
        let top1 = match self.options.placement {
            Placement::Sharded if self.comm.size() > 1 => f64::NAN,
            Placement::Sharded | Placement::Replicated => {
                let own_valid = figures.own_target_cosines.iter().filter(|&&cosine| cosine < IGNORED).count();
                share(own_top1(&figures) as f64, own_valid as u64)
            }
        };
        Ok(self.metrics_of(&figures, top1, figures.grad_embeddings, figures.grad_centers))
    }

    /// `grad_embeddings`, `grad_centers`: sums of squares.
    fn metrics_of(&self, figures: &StepFigures, top1: f64, grad_embeddings: f64, grad_centers: f64) -> Metrics {
        let StepFigures { updates, skipped_updates, .. } = *figures;
        let skipped_updates = skipped_updates + self.skipped_before;
        let counts = Metrics { updates, skipped_updates, draws: self.draws, seconds: self.seconds, ..Metrics::default() };
        // A step that nobody waited for is known by its loss alone.
        if self.failed || figures.loss.is_nan() {
            return counts;
        }
        Metrics {
            rows: figures.rows,
            valid_rows: figures.valid_rows,
            sample_size: figures.sample_size,
            loss: figures.loss,
            top1,
            mean_target_cosine: share(figures.target_cosines, figures.valid_rows),
            grad_embeddings_norm: grad_embeddings.sqrt(),
            grad_centers_norm: grad_centers.sqrt(),
            ..counts
        }
    }

    /// The nearest class centers of all ranks; see `pfc_head_top_k`. Collective.
    pub fn top_k(&mut self, queries: Contribution<Matrix>, k: u64) -> Result<Nearest> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let outcome = self.run_top_k(queries, k);
        self.poison_unless_recoverable(outcome)
    }

    /// Refuses a call that ranks have made on different heads of one communicator.
    pub(super) fn require_same_head<const N: usize>(
        &self,
        all: &[[u64; N]],
        call: &str,
        head: impl Fn(&[u64; N]) -> u64,
    ) -> Result<()> {
        match all.iter().map(head).enumerate().find(|&(_, number)| number != self.number) {
            None => Ok(()),
            Some((other, number)) => Err(error!(
                Mismatch,
                "rank {} has called {call} on head {} of its communicator and rank {other} on head {number}",
                self.rank(),
                self.number
            )),
        }
    }

    /// Rows whose target cosine is above every negative's, over all ranks.
    fn count_top1(&self, figures: &StepFigures) -> Result<f64> {
        match self.options.placement {
            Placement::Sharded => {
                let mut cells = Vec::new();
                let room = figures.own_target_cosines.len() + figures.best_negatives.len();
                self.comm.or_abort(reserve(&mut cells, room, "cosines of a step"))?;
                cells.extend_from_slice(&figures.own_target_cosines);
                cells.extend_from_slice(&figures.best_negatives);
                self.comm.all_reduce(&mut cells, ReduceOp::Max)?;
                let (targets, best) = cells.split_at(figures.own_target_cosines.len());
                Ok(targets.iter().zip(best).filter(|(&target, &best)| is_ahead(target, best)).count() as f64)
            }
            Placement::Replicated => {
                let mut correct = [own_top1(figures) as f64];
                self.comm.all_reduce(&mut correct, ReduceOp::Sum)?;
                Ok(correct[0])
            }
        }
    }

    fn run_top_k(&mut self, queries: Contribution<Matrix>, k: u64) -> Result<Nearest> {
        let rank = self.rank() as usize;
        let own = queries.and_then(|queries| {
            let limit = self.options.num_classes;
            ensure!((1..=limit).contains(&k), InvalidArgument, "k must be 1 to num_classes, {limit}, got {k} (rank {rank})");
            self.read_queries(&queries)
        });
        let dim = self.options.embedding_dim as usize;
        let shapes =
            gather_words(&self.comm, own.as_ref().map(|own| [(own.len() / dim) as u64, k, self.number]).map_err(Clone::clone))?;
        let own = own?;
        self.require_same_head(&shapes, "pfc_head_top_k", |words| words[2])?;
        if let Some(other) = shapes.iter().position(|shape| shape[1] != k) {
            return Err(error!(Mismatch, "k is {k} on rank {rank} and {} on rank {other}", shapes[other][1]));
        }
        match self.options.placement {
            Placement::Replicated => self.backend.nearest(&own, k as usize),
            Placement::Sharded => self.nearest_of_all(&own, &shapes, k as usize),
        }
    }

    /// The caller's rows as f32.
    fn read_queries(&self, queries: &Matrix) -> Result<Vec<f32>> {
        let dim = self.options.embedding_dim as usize;
        // SAFETY: the caller of the head's entry gave a matrix of this many rows.
        let (queries, _copy) = unsafe { self.readable("embeddings", queries) }?;
        let mut own = zeros(&[queries.rows, dim], "queries of top_k")?;
        for (row, out) in own.chunks_exact_mut(dim).enumerate() {
            // SAFETY: of this many rows, which the host can read.
            unsafe { queries.read_row(row, out) };
            ensure!(
                out.iter().all(|x| x.is_finite()),
                NotFinite,
                "embeddings row {row} contains a NaN or an infinity (rank {})",
                self.rank()
            );
        }
        Ok(own)
    }

    /// Each rank answers every rank's queries from its shard; the answers are merged where the query came from.
    ///
    /// What may fail on one rank alone is told to all before the next exchange.
    fn nearest_of_all(&self, own: &[f32], shapes: &[[u64; 3]], k: usize) -> Result<Nearest> {
        let (ranks, rank) = (self.comm.size() as usize, self.rank() as usize);
        let dim = self.options.embedding_dim as usize;
        let padded = shapes.iter().map(|shape| shape[0] as usize).max().unwrap_or(0);
        let memory = (|| {
            let mut block = zeros(&[padded, dim], "queries of top_k")?;
            block[..own.len()].copy_from_slice(own);
            let answers =
                (zeros(&[ranks, ranks, padded, k], "cosines of top_k")?, zeros(&[ranks, ranks, padded, k], "ids of top_k")?);
            let (mut found, mut hits, own) = (Nearest::default(), Vec::new(), own.len() / dim);
            reserve(&mut found.ids, own * k, "ids of top_k")?;
            reserve(&mut found.cosines, own * k, "cosines of top_k")?;
            reserve(&mut hits, ranks * k, "answers of top_k")?;
            Ok((block, zeros(&[ranks, padded, dim], "gathered queries of top_k")?, answers, found, hits))
        })();
        let (block, mut all, (mut all_cosines, mut all_ids), mut found, mut hits) = agree_on(&self.comm, memory)?;
        self.comm.all_gather(&block, &mut all)?;
        // A shard with fewer than k rows answers with what it has; the rest is further away than anything.
        let depth = k.min(self.shard.rows as usize);
        let answers = (|| {
            let found = self.backend.nearest(&all, depth)?;
            let mut padded_out = Nearest {
                ids: zeros(&[ranks, padded, k], "ids of top_k")?,
                cosines: zeros(&[ranks, padded, k], "cosines of top_k")?,
            };
            padded_out.ids.fill(i64::MAX);
            padded_out.cosines.fill(f32::NEG_INFINITY);
            for query in 0..ranks * padded {
                let (from, to) = (query * depth..(query + 1) * depth, query * k..query * k + depth);
                padded_out.ids[to.clone()].copy_from_slice(&found.ids[from.clone()]);
                padded_out.cosines[to].copy_from_slice(&found.cosines[from]);
            }
            Ok(padded_out)
        })();
        let answers = agree_on(&self.comm, answers)?;
        self.comm.all_gather(&answers.cosines, &mut all_cosines)?;
        self.comm.all_gather(&answers.ids, &mut all_ids)?;
        let classes = self.options.num_classes as i64;
        let stray = all_ids.iter().position(|&id| id != i64::MAX && !(0..classes).contains(&id));
        if let Some(place) = stray {
            let other = place / (ranks * padded * k);
            return Err(error!(Comm, "all_gather brought back {} as a class of rank {other} (rank {rank})", all_ids[place]));
        }
        // A place without a class is behind all others, so that the caller never gets its id.
        let is_cosine = |(&cosine, &id): (&f32, &i64)| match id {
            i64::MAX => cosine == f32::NEG_INFINITY,
            _ => (-1.5..=1.5).contains(&cosine),
        };
        if let Some(place) = all_cosines.iter().zip(&all_ids).position(|answer| !is_cosine(answer)) {
            let other = place / (ranks * padded * k);
            return Err(error!(Comm, "all_gather brought back {} as a cosine of rank {other} (rank {rank})", all_cosines[place]));
        }
        // As many as this rank asked for: the caller's arrays have room for no more.
        for query in 0..own.len() / dim {
            let index = |other: usize, slot: usize| ((other * ranks + rank) * padded + query) * k + slot;
            let answers = (0..ranks).flat_map(|other| (0..k).map(move |slot| index(other, slot)));
            hits.clear();
            hits.extend(answers.map(|answer| (all_cosines[answer], all_ids[answer])));
            keep_best(&mut hits, k);
            found.ids.extend(hits.iter().map(|hit| hit.1));
            found.cosines.extend(hits.iter().map(|hit| hit.0));
        }
        Ok(found)
    }
}

/// A target's cosine in the figures where the row is ignored.
const IGNORED: f32 = 2.0;

/// Whether a row's own class, without margin, is nearer than every negative.
fn is_ahead(target: f32, best: f32) -> bool {
    (-1.5..=1.5).contains(&target) && target > best
}

/// Rows of which this rank computed the target and all negatives, and the target is nearer.
fn own_top1(figures: &StepFigures) -> usize {
    let pairs = figures.own_target_cosines.iter().zip(&figures.best_negatives);
    pairs.filter(|(&target, &best)| is_ahead(target, best)).count()
}

fn share(sum: f64, rows: u64) -> f64 {
    if rows == 0 {
        0.0
    } else {
        sum / rows as f64
    }
}

/// Tells the other ranks whether this one can go on: all do, or none.
fn agree_on<T>(comm: &Communicator, outcome: Result<T>) -> Result<T> {
    gather_words(comm, outcome.as_ref().map(|_| []).map_err(Clone::clone))?;
    outcome
}
