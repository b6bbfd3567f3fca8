//! What a head tells of itself: the figures of the last step, and the nearest class centres.

use super::{Head, Seconds};
use crate::comm::{exchange, ReduceOp};
use crate::device::{keep_best, StepFigures};
use crate::matrix::Matrix;
use crate::options::Placement;
use crate::{ensure, error, Result};

/// What the last step was like; `pfc_metrics` documents each.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub updates: u64,
    pub samples: u64,
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

/// Class ids and cosines, [rows, k], nearest first.
#[derive(Clone, Debug, Default)]
pub struct Nearest {
    pub ids: Vec<i64>,
    pub cosines: Vec<f32>,
}

impl Head {
    /// What the last step was like; collective.
    pub fn metrics(&mut self) -> Result<Metrics> {
        self.usable()?;
        let figures = self.rows.figures();
        let correct = self.count_top1(&figures);
        let correct = self.survive(correct)?;
        let mut squares = [figures.grad_embeddings, figures.grad_centers];
        let reduced = self.comm.all_reduce(&mut squares, ReduceOp::Sum);
        self.survive(reduced)?;
        let share = |sum: f64| if figures.valid_rows == 0 { 0.0 } else { sum / figures.valid_rows as f64 };
        Ok(Metrics {
            updates: self.rows.updates(),
            samples: self.samples,
            rows: figures.rows,
            valid_rows: figures.valid_rows,
            sample_size: figures.sample_size,
            loss: figures.loss,
            top1: share(correct),
            mean_target_cosine: share(figures.target_cosines),
            grad_embeddings_norm: squares[0].sqrt(),
            // A replicated head's ranks all hold the whole gradient.
            grad_centers_norm: match self.options.placement {
                Placement::Sharded => squares[1].sqrt(),
                Placement::Replicated => figures.grad_centers.sqrt(),
            },
            seconds: self.seconds,
        })
    }

    /// The nearest class centres of all ranks; see `pfc_head_top_k`. Collective.
    pub fn top_k(&mut self, queries: Result<Matrix>, k: u64) -> Result<Nearest> {
        self.usable()?;
        let outcome = self.run_top_k(queries, k);
        self.survive(outcome)
    }

    /// Rows whose target cosine is above every negative's, over all ranks.
    fn count_top1(&self, figures: &StepFigures) -> Result<f64> {
        let ahead = |target: f32, best: f32| (-1.5..=1.5).contains(&target) && target > best;
        match self.options.placement {
            Placement::Sharded => {
                let mut cells = figures.own_target_cosines.clone();
                cells.extend_from_slice(&figures.best_negatives);
                self.comm.all_reduce(&mut cells, ReduceOp::Max)?;
                let (targets, best) = cells.split_at(figures.own_target_cosines.len());
                Ok(targets.iter().zip(best).filter(|(&target, &best)| ahead(target, best)).count() as f64)
            }
            Placement::Replicated => {
                let pairs = figures.own_target_cosines.iter().zip(&figures.best_negatives);
                let mut correct = [pairs.filter(|(&target, &best)| ahead(target, best)).count() as f64];
                self.comm.all_reduce(&mut correct, ReduceOp::Sum)?;
                Ok(correct[0])
            }
        }
    }

    fn run_top_k(&mut self, queries: Result<Matrix>, k: u64) -> Result<Nearest> {
        let (rank, dim) = (self.rank() as usize, self.options.embedding_dim as usize);
        let checked = queries.and_then(|queries| {
            let limit = self.options.num_classes;
            ensure!((1..=limit).contains(&k), InvalidArgument, "k is {k} on rank {rank}; it is 1 to num_classes, {limit}");
            Ok(queries)
        });
        let shapes = exchange(&self.comm, checked.clone().map(|queries| [queries.rows as u64, k]))?;
        let queries = checked?;
        if let Some(other) = shapes.iter().position(|shape| shape[1] != k) {
            return Err(error!(Mismatch, "k is {k} on rank {rank} and {} on rank {other}", shapes[other][1]));
        }
        let k = k as usize;
        let mut own = vec![0.0; queries.rows * dim];
        for (row, out) in own.chunks_exact_mut(dim).enumerate() {
            // SAFETY: the caller of the head's entry gave a matrix of its host memory of this many rows.
            unsafe { queries.read_row(row, out) };
        }
        let found = match self.options.placement {
            Placement::Replicated => self.rows.nearest(&own, k)?,
            Placement::Sharded => self.nearest_of_all(&own, &shapes, k)?,
        };
        Ok(Nearest { ids: found.iter().map(|hit| hit.1).collect(), cosines: found.iter().map(|hit| hit.0).collect() })
    }

    /// Each rank answers every rank's queries from its shard; the answers are merged where the query came from.
    fn nearest_of_all(&self, own: &[f32], shapes: &[[u64; 2]], k: usize) -> Result<Vec<(f32, i64)>> {
        let (ranks, rank) = (self.comm.size() as usize, self.rank() as usize);
        let dim = self.options.embedding_dim as usize;
        let padded = shapes.iter().map(|shape| shape[0] as usize).max().unwrap_or(0);
        let mut block = own.to_vec();
        block.resize(padded * dim, 0.0);
        let mut all = vec![0.0; ranks * padded * dim];
        self.comm.all_gather(&block, &mut all)?;
        // A shard with fewer than k rows answers with what it has; the rest is further away than anything.
        let depth = k.min(self.shard.rows as usize);
        let answers = self.rows.nearest(&all, depth)?;
        let (mut cosines, mut ids) = (vec![f32::NEG_INFINITY; ranks * padded * k], vec![i64::MAX; ranks * padded * k]);
        for (query, hits) in answers.chunks_exact(depth.max(1)).enumerate() {
            for (slot, hit) in hits.iter().enumerate() {
                (cosines[query * k + slot], ids[query * k + slot]) = *hit;
            }
        }
        let mut all_cosines = vec![0.0; ranks * cosines.len()];
        let mut all_ids = vec![0; ranks * ids.len()];
        self.comm.all_gather(&cosines, &mut all_cosines)?;
        self.comm.all_gather(&ids, &mut all_ids)?;
        let rows = shapes[rank][0] as usize;
        let mut found = Vec::with_capacity(rows * k);
        for query in 0..rows {
            let place = |other: usize, slot: usize| ((other * ranks + rank) * padded + query) * k + slot;
            let places = (0..ranks).flat_map(|other| (0..k).map(move |slot| place(other, slot)));
            let mut hits: Vec<(f32, i64)> = places.map(|place| (all_cosines[place], all_ids[place])).collect();
            keep_best(&mut hits, k);
            found.extend(hits);
        }
        Ok(found)
    }
}
