//! The training loop. A rank is a thread with its own replica of the backbone, its own part of every batch, and its shard of the
//! head.

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Error, Result};
use clap::ValueEnum;
use partialfc::matrix::DType;
use partialfc::optimizer::{self, Optimizer};
use partialfc::options::{self, Placement};
use partialfc::Status;
use rayon::prelude::*;
use serde::Serialize;

use crate::augment::{augment, TRAINING};
use crate::backbone::{Backbone, Sgd};
use crate::dataset::{Dataset, Shot};
use crate::head::{arcface, Comm, Head};
use crate::random::{Order, Purpose, Random};
use crate::render::PIXELS;

/// What class centers and their optimizer state are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RowType {
    F32,
    Bf16,
}

impl RowType {
    fn dtype(self) -> DType {
        match self {
            RowType::F32 => DType::F32,
            RowType::Bf16 => DType::Bf16,
        }
    }
}

/// What the head multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    F32,
    Half,
}

#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub ranks: usize,
    pub replicated: bool,
    pub sample_rate: f64,
    pub sample_block: u32,
    pub row_type: RowType,
    pub precision: Precision,
    pub margin: f64,
    pub scale: f64,
    pub steps: usize,
    /// Images of all ranks in a step.
    pub batch: usize,
    pub dim: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub seed: u64,
    /// Of all ranks together.
    pub threads: usize,
}

const MOMENTUM: f64 = 0.9;
/// Share of the steps over which the learning rate rises to its full value.
const WARM_UP: f64 = 0.05;

impl Settings {
    /// A short rise, then half a cosine down to 0.
    fn learning_rate(&self, step: usize) -> f64 {
        let done = step as f64 / self.steps as f64;
        let rise = ((step + 1) as f64 / (WARM_UP * self.steps as f64)).min(1.0);
        self.learning_rate * rise * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }

    pub fn threads_of_a_rank(&self) -> usize {
        (self.threads / self.ranks).max(1)
    }

    /// The rows of a global batch that are a rank's.
    fn rows(&self, rank: usize) -> std::ops::Range<usize> {
        rank * self.batch / self.ranks..(rank + 1) * self.batch / self.ranks
    }
}

/// Seconds a rank spent in each part of a step.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Phases {
    pub images: f64,
    pub forward: f64,
    pub head: f64,
    pub backward: f64,
    pub all_reduce: f64,
    pub update: f64,
}

impl Phases {
    pub fn named(&self) -> [(&'static str, f64); 6] {
        [
            ("images", self.images),
            ("forward", self.forward),
            ("head", self.head),
            ("backward", self.backward),
            ("all-reduce", self.all_reduce),
            ("update", self.update),
        ]
    }
}

impl AddAssign for Phases {
    fn add_assign(&mut self, other: Self) {
        self.images += other.images;
        self.forward += other.forward;
        self.head += other.head;
        self.backward += other.backward;
        self.all_reduce += other.all_reduce;
        self.update += other.update;
    }
}

/// What a run hears of after every step, from rank 0.
pub struct Progress {
    pub step: usize,
    pub loss: f64,
    pub elapsed: Duration,
    /// Since the run began.
    pub phases: Phases,
}

pub struct Trained {
    pub backbone: Backbone,
    pub losses: Vec<f64>,
    pub seconds: f64,
    /// Rank 0's.
    pub phases: Phases,
    /// Classes in rank 0's last sample.
    pub sample: usize,
    /// The last batch's share of images whose own class was the nearest of the sample.
    pub top1: f64,
    /// Bytes rank 0 handed to collectives in a step, on average.
    pub traffic: f64,
}

/// Trains, and checks that the ranks' replicas ended bitwise equal.
pub fn train(data: &Dataset, settings: &Settings, report: &(dyn Fn(Progress) + Sync)) -> Result<Trained> {
    let comms = Comm::group(settings.ranks)?;
    let start = Instant::now();
    let results: Vec<Result<Trained>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = comms
            .into_iter()
            .enumerate()
            .map(|(rank, comm)| scope.spawn(move || run_rank(data, settings, rank, comm, start, report)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|_| Err(anyhow!("a rank panicked")))).collect()
    });
    let mut replicas = Vec::with_capacity(results.len());
    let mut failures = Vec::new();
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(trained) => replicas.push(trained),
            Err(error) => failures.push(error.context(format!("rank {rank}"))),
        }
    }
    // One failure makes the other ranks fail as well: tell the cause.
    let echo = |error: &Error| {
        let status = error.downcast_ref::<partialfc::Error>().map(|error| error.status);
        matches!(status, Some(Status::Remote | Status::Aborted))
    };
    if let Some(failure) = failures.iter().find(|error| !echo(error)).or(failures.first()) {
        bail!("training failed: {failure:#}");
    }
    let bits = |trained: &Trained| trained.backbone.state().iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let first = bits(&replicas[0]);
    for (rank, replica) in replicas.iter().enumerate() {
        ensure!(bits(replica) == first, "the backbone of rank {rank} differs from that of rank 0 at the end of training");
    }
    Ok(replicas.swap_remove(0))
}

/// One rank, in a thread pool of its own, so that ranks do not wait for each other's work.
fn run_rank(
    data: &Dataset,
    settings: &Settings,
    rank: usize,
    comm: Comm,
    start: Instant,
    report: &(dyn Fn(Progress) + Sync),
) -> Result<Trained> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(settings.threads_of_a_rank()).build();
    // The communicator moves along: it belongs to one thread.
    let work = move || {
        let result = steps(data, settings, rank, &comm, start, report);
        if result.is_err() {
            // The other ranks wait for this one in their next collective: let them fail as well.
            comm.abort();
        }
        result
    };
    match pool {
        Ok(pool) => pool.install(work),
        Err(error) => {
            eprintln!("Rank {rank} gets no threads of its own ({error}) and shares those of the process.");
            work()
        }
    }
}

fn steps(
    data: &Dataset,
    settings: &Settings,
    rank: usize,
    comm: &Comm,
    start: Instant,
    report: &(dyn Fn(Progress) + Sync),
) -> Result<Trained> {
    let rows = settings.rows(rank);
    let mut backbone = Backbone::new(settings.dim, settings.seed)?;
    // Batches are equal on all ranks for the head, also where the batch does not divide evenly.
    let mut options = arcface(data.classes(), settings.dim, settings.batch.div_ceil(settings.ranks));
    if settings.replicated {
        options.placement = Placement::Replicated;
    }
    (options.sample_rate, options.sample_block, options.seed) = (settings.sample_rate, settings.sample_block, settings.seed);
    let dtype = settings.row_type.dtype();
    (options.weight_dtype, options.state_dtype) = (dtype, dtype);
    options.precision = match settings.precision {
        Precision::F32 => options::Precision::F32,
        Precision::Half => options::Precision::Half,
    };
    (options.margin.scale, options.margin.m2) = (settings.scale, settings.margin);
    options.optimizer = Optimizer::Sgd(optimizer::Sgd { momentum: MOMENTUM, weight_decay: settings.weight_decay });
    // The backbone's gradients are averaged over ranks below.
    options.gradient_scale = settings.ranks as f64;
    let mut head = Head::new(comm, settings.threads_of_a_rank(), options)?;
    let mut order = Order::new(settings.seed, data.shots.len());
    let (mut losses, mut phases) = (Vec::with_capacity(settings.steps), Phases::default());
    let mut grad_embeddings = vec![0.0; rows.len() * settings.dim];
    for step in 0..settings.steps {
        let mut clock = Clock(Instant::now());
        let (images, labels) = batch(data, &mut order, settings, step, rows.clone());
        let image_time = clock.lap();
        let (embeddings, trace) = backbone.forward(images)?;
        let forward = clock.lap();
        let rate = settings.learning_rate(step);
        let loss = head.step(&embeddings, &labels, rate, &mut grad_embeddings).with_context(|| format!("step {}", step + 1))?;
        let head_time = clock.lap();
        let mut gradients = backbone.backward(trace, &grad_embeddings)?;
        let backward = clock.lap();
        comm.all_reduce(&mut gradients)?;
        gradients.iter_mut().for_each(|value| *value /= settings.ranks as f32);
        let all_reduce = clock.lap();
        let sgd = Sgd { learning_rate: rate as f32, momentum: MOMENTUM as f32, weight_decay: settings.weight_decay as f32 };
        backbone.update(&gradients, &sgd)?;
        phases += Phases { images: image_time, forward, head: head_time, backward, all_reduce, update: clock.lap() };
        losses.push(loss);
        if rank == 0 {
            report(Progress { step: step + 1, loss, elapsed: start.elapsed(), phases });
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let traffic = comm.traffic() as f64 / settings.steps as f64;
    let metrics = head.metrics()?;
    Ok(Trained { backbone, losses, seconds, phases, sample: metrics.sample_size as usize, top1: metrics.top1, traffic })
}

/// A rank's rows of a step's batch: the same images in the same rows for any number of ranks.
fn batch(
    data: &Dataset,
    order: &mut Order,
    settings: &Settings,
    step: usize,
    rows: std::ops::Range<usize>,
) -> (Vec<f32>, Vec<i64>) {
    let mut images = vec![0.0; rows.len() * PIXELS];
    let shots: Vec<Shot> = rows.clone().map(|row| data.shots[order.at((step * settings.batch + row) as u64) as usize]).collect();
    images.par_chunks_exact_mut(PIXELS).zip(&shots).zip(rows).for_each(|((image, &shot), row)| {
        augment(data.picture(shot), &TRAINING, &mut Random::new(settings.seed, Purpose::Augment, step as u64, row as u64), image);
    });
    (images, shots.iter().map(|shot| i64::from(shot.label)).collect())
}

struct Clock(Instant);

impl Clock {
    /// Seconds since the last lap.
    fn lap(&mut self) -> f64 {
        let before = std::mem::replace(&mut self.0, Instant::now());
        (self.0 - before).as_secs_f64()
    }
}
