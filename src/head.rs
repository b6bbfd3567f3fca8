//! The head: one step, phase by phase.
//!
//! A step, as its users think of it:
//!
//! ```text
//! E      = all_gather(local embeddings), y = all_gather(labels)          phase 1
//! W_s    = rows of my shard: my positives + random negatives             phases 2, 3
//! z      = scale * margin(normalize(E) @ normalize(W_s).T, y)            phase 4
//! loss   = cross entropy over all ranks' samples
//! dE     = reduce_scatter(dz @ W_s), dW_s = dz.T @ E                     phase 5
//! update only the sampled rows of W
//! ```
//!
//! What happens to numbers is the device's part, what travels between ranks the communicator's; this file knows neither, only their
//! order. The ranks exchange, for a sharded head, exactly: (A) an all-gather of {status, step, batch, labels}; (B) an all-gather of E,
//! padded to the largest batch; (C) an all-reduce of the row sums; (D) a reduce-scatter of dE. A replicated head has A, an all-reduce
//! of its losses and statuses, and one of dW.
//!
//! A rank that fails still takes part in what its peers have begun, so that all hear of it and none waits.

mod evaluation;
mod memory;

use std::sync::Arc;
use std::time::Instant;

pub use self::evaluation::{Metrics, Nearest};
use crate::comm::{agree, Communicator, ReduceOp};
use crate::device::{Device, HeadDevice, HeadSpec, Step};
pub use crate::device::{Labels, StateTensor};
use crate::matrix::Matrix;
use crate::options::{HeadOptions, Placement};
use crate::shard::Shard;
use crate::{ensure, error, trace, Error, Result, Status};

/// Where a head is in the order of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Forwarded,
    Backwarded,
}

/// What a forward takes: this rank's embeddings, and their labels unless `prepare` had them.
#[derive(Clone, Copy, Debug)]
pub struct StepInput {
    pub embeddings: Matrix,
    pub labels: Option<Labels>,
}

/// Where a forward leaves its loss.
#[derive(Clone, Copy, Debug)]
pub enum LossTarget {
    /// With the caller, who waits for it and for the verdict.
    Host,
    /// In the device's memory; the verdict comes from the next call that waits.
    Device(*mut f64),
    /// Nowhere: the rank fails the step, and goes on with it as its peers do.
    Nowhere,
}

/// Seconds a rank spent in each phase of its last step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seconds {
    /// Phase 1: labels and embeddings.
    pub gather: f64,
    /// Phase 2.
    pub sample: f64,
    /// Phases 3 and 4 up to the sums.
    pub forward: f64,
    /// Phase 4: the all-reduce and the loss.
    pub reduce: f64,
    /// Phase 5 for E.
    pub backward: f64,
    /// Phase 5 for W.
    pub update: f64,
}

/// A classification head on one rank.
pub struct Head {
    options: HeadOptions,
    shard: Shard,
    device: Arc<dyn Device>,
    rows: Box<dyn HeadDevice>,
    comm: Arc<Communicator>,
    phase: Phase,
    /// The next step has its labels and its sample: prepared, with the batch of this rank; or what went wrong after the labels.
    prepared: Option<Result<()>>,
    /// The caller's ids for the next sample.
    chosen: Option<Vec<i64>>,
    samples: u64,
    /// The number of the step that `begin_step` made the current one.
    step: u64,
    /// Updates asked for: the same on all ranks that made the same calls.
    updates: u64,
    loss_weight: f64,
    /// Where the last loss was: in the device's memory.
    late: bool,
    /// Why the step under way has come to nothing on this rank, whose peers do not know it yet and go on with it.
    own_failure: Option<Error>,
    seconds: Seconds,
    poisoned: Option<Error>,
    /// After `rows`, whose last spans come when they go.
    _trace: trace::Writer,
}

impl Head {
    /// Makes a head. Collective; `request` is what this rank asks for, or why it cannot.
    ///
    /// # Errors
    /// This rank's own error; REMOTE where another rank failed; MISMATCH on all ranks where their options differ.
    pub fn create(comm: Arc<Communicator>, request: Result<(Arc<dyn Device>, HeadOptions)>) -> Result<Head> {
        let opened = request.and_then(|(device, options)| {
            options.check(comm.size())?;
            comm.admit(&*device)?;
            let shard = options.shard(comm.size(), comm.rank());
            let spec = HeadSpec { options: options.clone(), ranks: comm.size(), rank: comm.rank(), shard };
            let rows = device.open(spec)?;
            Ok((device, options, shard, rows))
        });
        let fields = match &opened {
            Ok((device, options, _, _)) => Ok(options.fields(device.auto_precision())),
            Err(error) => Err(on_rank(error, comm.rank())),
        };
        agree(&comm, fields)?;
        let (device, options, shard, rows) = opened?;
        Ok(Head {
            options,
            shard,
            device,
            rows,
            comm,
            phase: Phase::Idle,
            prepared: None,
            chosen: None,
            samples: 0,
            step: 0,
            updates: 0,
            loss_weight: 1.0,
            late: false,
            own_failure: None,
            seconds: Seconds::default(),
            poisoned: None,
            _trace: trace::Writer,
        })
    }

    pub fn rank(&self) -> u32 {
        self.comm.rank()
    }

    pub fn embedding_dim(&self) -> u64 {
        self.options.embedding_dim.into()
    }

    /// The classes this rank owns.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// An error of this head, with its rank where the message has none.
    pub fn name_rank(&self, error: &Error) -> Error {
        on_rank(error, self.rank())
    }

    /// The process that the head was made in.
    pub fn process(&self) -> u32 {
        self.device.process()
    }

    /// Makes every later call fail, and tells the other ranks.
    pub fn poison(&mut self, cause: &Error) {
        if self.poisoned.is_none() {
            self.poisoned = Some(cause.clone());
            self.comm.abort(cause);
            log::error!("rank {}: head poisoned: {cause}", self.rank());
        }
    }

    /// Begins the next step early; see `pfc_head_prepare`.
    pub fn prepare(&mut self, labels: Result<Labels>) -> Result<()> {
        self.usable()?;
        self.seconds = Seconds { gather: 0.0, sample: 0.0, ..self.seconds };
        self.gather_labels(labels)
    }

    /// The ids that the next sample consists of; see `pfc_head_set_sample`.
    pub fn set_sample(&mut self, ids: Labels) -> Result<()> {
        self.usable()?;
        // SAFETY: the caller of the head's entry gave this many.
        let ids = unsafe { self.take("ids", ids.data, ids.count) };
        let ids = self.survive(ids)?;
        let (rank, shard) = (self.rank(), self.shard);
        for (i, &id) in ids.iter().enumerate() {
            ensure!(
                shard.contains(id),
                InvalidArgument,
                "ids[{i}] must be in the shard, {} to {}, got {id} (rank {rank})",
                shard.first,
                shard.end() as i64 - 1
            );
            let previous = if i == 0 { None } else { Some(ids[i - 1]) };
            if let Some(previous) = previous.filter(|&previous| previous >= id) {
                return Err(error!(InvalidArgument, "ids must ascend: ids[{i}] is {id} after {previous} (rank {rank})"));
            }
        }
        self.chosen = Some(ids);
        Ok(())
    }

    /// Phases 1 to 4; see `pfc_head_forward`.
    pub fn forward(&mut self, input: Result<StepInput>, loss: LossTarget) -> Result<f64> {
        self.usable()?;
        let input = self.begin_step(input)?;
        let outcome = self.run_forward(input, loss);
        self.survive(outcome)
    }

    /// Phase 5 for the embeddings; see `pfc_head_backward`.
    pub fn backward(&mut self, loss_weight: f64, loss_scale: f64, gradient: Result<Matrix>) -> Result<()> {
        self.usable()?;
        self.expect(Phase::Forwarded, "pfc_head_backward", "pfc_head_forward")?;
        let factors = self.check_factor("loss_weight", loss_weight).and(self.check_factor("loss_scale", loss_scale));
        let gradient = gradient.and_then(|gradient| {
            self.check_shape("grad_embeddings", &gradient, self.rows.batch())?;
            self.check_memory("grad_embeddings", &gradient)?;
            Ok(gradient)
        });
        self.loss_weight = loss_weight;
        let (start, scope) = (Instant::now(), self.scope());
        let exchange = scope.host("backward", || self.rows.backward());
        let reduced = match self.options.placement {
            Placement::Sharded => scope.host("reduce_scatter gradient", || exchange.reduce_scatter(&self.comm)),
            Placement::Replicated => Ok(()),
        };
        self.survive(reduced)?;
        if let Some(error) = &self.own_failure {
            self.phase = Phase::Backwarded;
            return Err(error.clone());
        }
        // The other ranks have their gradient either way. Without a weight there is nothing to update by: the step is abandoned.
        self.phase = Phase::Idle;
        factors?;
        let factor = loss_weight * loss_scale * self.options.gradient_scale;
        let finished = scope.host("finish gradient", || self.rows.finish_gradient(factor, gradient.as_ref().ok()));
        self.phase = Phase::Backwarded;
        self.survive(finished)?;
        self.seconds.backward = start.elapsed().as_secs_f64();
        gradient.map(|_| ())
    }

    /// Phase 5 for the class centres; see `pfc_head_update`.
    pub fn update(&mut self, learning_rate: f64) -> Result<()> {
        self.usable()?;
        self.expect(Phase::Backwarded, "pfc_head_update", "pfc_head_backward")?;
        self.check_factor("learning_rate", learning_rate)?;
        let outcome = self.run_update(learning_rate, &mut || Ok(()));
        self.survive_update(outcome)?;
        self.own_failure.take().map_or(Ok(()), Err)
    }

    /// Forward, backward and update in one; see `pfc_head_step`.
    pub fn step(&mut self, input: Result<(StepInput, Matrix)>, learning_rate: f64, loss: LossTarget) -> Result<f64> {
        self.usable()?;
        let (mut gradient, checked) = (None, self.check_factor("learning_rate", learning_rate));
        let input = input.and_then(|(input, matrix)| {
            checked?;
            self.check_shape("grad_embeddings", &matrix, input.embeddings.rows)?;
            self.check_memory("grad_embeddings", &matrix)?;
            gradient = Some(matrix);
            Ok(input)
        });
        let input = self.begin_step(input)?;
        let outcome = self.run_forward(input, loss);
        let loss = self.survive(outcome);
        if self.phase == Phase::Idle {
            return loss;
        }
        self.loss_weight = 1.0;
        if self.own_failure.is_some() {
            gradient = None;
        }
        let outcome = self.finish_step(learning_rate, gradient.as_ref());
        self.survive_update(outcome)?;
        self.own_failure.take().map_or(loss, Err)
    }

    /// The verdict of everything enqueued: on a device that waits by itself, that of the head.
    pub fn wait(&mut self) -> Result<()> {
        self.usable()?;
        let verdict = self.rows.wait();
        self.survive_judged(verdict)
    }

    /// Where a loss pointer of the caller's lies, and what is wrong with it: where nothing can be left the step is to fail.
    pub fn loss_target(&self, loss: *mut f64) -> (LossTarget, Result<()>) {
        let rank = self.rank();
        let place = match loss.is_null() {
            true => Err(error!(InvalidArgument, "loss must not be NULL (rank {rank})")),
            false => self.rows.holds("loss", loss.cast_const().cast()),
        };
        match place {
            Ok(true) => (LossTarget::Device(loss), Ok(())),
            Ok(false) => (LossTarget::Host, Ok(())),
            Err(error) => (LossTarget::Nowhere, Err(error)),
        }
    }

    /// The ids of the last sample.
    pub fn sample_ids(&self) -> Result<Vec<i64>> {
        self.usable()?;
        ensure!(
            self.samples > 0,
            InvalidArgument,
            "pfc_head_sample_ids must come after pfc_head_prepare or pfc_head_forward (rank {})",
            self.rank()
        );
        self.heard(self.rows.sample_ids())
    }

    /// Reads rows of the shard into a host matrix.
    pub fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.usable()?;
        let first = self.row_range(first, rows)?;
        self.heard(self.rows.read_rows(tensor, first, rows))
    }

    /// Overwrites rows of the shard; abandons a step between forward and update.
    pub fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.usable()?;
        let first = self.row_range(first, rows)?;
        // What fails before the first row is written leaves a step under way alone, what fails later poisons the head.
        let written = self.rows.write_rows(tensor, first, rows);
        self.survive(written)?;
        self.phase = Phase::Idle;
        Ok(())
    }

    /// A and the sample of the next step. An error after A is kept: the ranks that do not know of it will go on to B.
    fn gather_labels(&mut self, labels: Result<Labels>) -> Result<()> {
        let start = Instant::now();
        let labels = labels.and_then(|labels| {
            ensure!(
                labels.count as u64 <= self.options.max_batch,
                InvalidArgument,
                "the batch must be at most max_batch, {}, got {} rows (rank {})",
                self.options.max_batch,
                labels.count,
                self.rank()
            );
            Ok(labels)
        });
        self.prepared = None;
        let step = Step { samples: self.samples, updates: self.updates };
        let scope = trace::Scope { step: self.samples, ..self.scope() };
        let block = self.rows.pack_labels(step, labels.map_err(|error| on_rank(&error, self.comm.rank())));
        let gathered = scope.host("all_gather labels", || block.all_gather(&self.comm));
        self.survive(gathered)?;
        if let Err(error) = self.rows.judge_labels() {
            // Ranks that have not made the same calls never come together again.
            if error.status == Status::Mismatch {
                self.poison(&error);
            }
            return self.survive(Err(error));
        }
        self.seconds.gather = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let chosen = self.chosen.take();
        let sampled = scope.host("sample", || self.rows.sample(self.samples, chosen.as_deref()));
        self.samples += 1;
        self.seconds.sample = start.elapsed().as_secs_f64();
        self.prepared = Some(sampled.clone());
        self.survive(sampled)
    }

    /// Makes the next step the current one: prepared before, or now from the labels that came with the embeddings.
    ///
    /// Returns what this rank takes into B: its input, or its failure if the ranks are past A.
    fn begin_step(&mut self, input: Result<StepInput>) -> Result<Result<StepInput>> {
        (self.phase, self.own_failure) = (Phase::Idle, None);
        let input = input.and_then(|input| {
            self.check_memory("embeddings", &input.embeddings)?;
            Ok(input)
        });
        let input = match self.prepared.is_some() {
            true => input.and_then(|input| self.check_prepared(input)),
            false => {
                self.seconds = Seconds::default();
                let labels = input.clone().and_then(|input| {
                    input.labels.ok_or_else(|| {
                        error!(InvalidArgument, "labels must not be NULL without pfc_head_prepare (rank {})", self.rank())
                    })
                });
                // What fails in A fails on every rank; what fails after it is told in C.
                if let Err(error) = self.gather_labels(labels) {
                    if self.prepared.is_none() || self.poisoned.is_some() {
                        return Err(error);
                    }
                }
                input
            }
        };
        let prepared = self.prepared.take().unwrap_or(Ok(()));
        self.step = self.samples - 1;
        let begun = self.rows.begin();
        Ok(prepared.and(begun).and(input))
    }

    /// A forward after `prepare`: its batch, and its labels if it has any, are those of then.
    fn check_prepared(&self, input: StepInput) -> Result<StepInput> {
        let (batch, known) = self.rows.next_labels();
        let rows = input.embeddings.rows;
        ensure!(
            rows == batch,
            InvalidArgument,
            "embeddings.rows must be {batch}, the batch of pfc_head_prepare, got {rows} (rank {})",
            self.rank()
        );
        let given = match input.labels {
            Some(labels) if labels.count > 0 && !self.rows.holds("labels", labels.data.cast())? => Some(labels),
            _ => None,
        };
        if let (Some(labels), Some(known)) = (given, known) {
            // SAFETY: the caller of the head's entry gave this many labels, and they are in host memory.
            let labels = unsafe { labels.as_slice() };
            let differs = labels.iter().zip(known).position(|(now, then)| now != then);
            if let Some(row) = differs {
                return Err(error!(
                    InvalidArgument,
                    "labels[{row}] must be {}, as in pfc_head_prepare, got {} (rank {})",
                    known[row],
                    labels[row],
                    self.rank()
                ));
            }
        }
        Ok(input)
    }

    /// B, phases 3 and 4, C and the loss.
    fn run_forward(&mut self, input: Result<StepInput>, target: LossTarget) -> Result<f64> {
        let (start, scope) = (Instant::now(), self.scope());
        let sharded = self.options.placement == Placement::Sharded;
        if sharded {
            let block = self.rows.pack_embeddings(input.as_ref().ok().map(|input| &input.embeddings));
            scope.host("all_gather embeddings", || block.all_gather(&self.comm))?;
        }
        self.seconds.gather += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let outcome = scope.host("forward", || input.and_then(|input| self.rows.forward(&input.embeddings)));
        self.seconds.forward = start.elapsed().as_secs_f64();
        let start = Instant::now();
        // A rank that failed by itself has not judged the embeddings and comes here in any case, so all do.
        let late = match target {
            LossTarget::Host => Some(false),
            LossTarget::Device(_) => Some(true),
            LossTarget::Nowhere => None,
        };
        let sums = self.rows.pack_sums(&outcome, late);
        scope.host("all_reduce sums", || sums.all_reduce(&self.comm, ReduceOp::Sum))?;
        // Without a place for a loss: as the others; if no rank has one, as in the step before.
        self.late = match late {
            Some(late) => late,
            None => self.rows.others_late()?.unwrap_or(self.late),
        };
        let loss = match target {
            LossTarget::Device(loss) => loss,
            LossTarget::Host | LossTarget::Nowhere => std::ptr::null_mut(),
        };
        let judged = scope.host("loss", || self.rows.judge_sums(self.late.then_some(loss)));
        if self.rows.failed_at_labels() {
            self.samples -= 1;
        }
        if let (true, Err(error)) = (self.late, &outcome) {
            self.phase = Phase::Forwarded;
            self.own_failure = Some(error.clone());
        }
        outcome?;
        let loss = self.survive_judged(judged)?;
        self.seconds.reduce = start.elapsed().as_secs_f64();
        self.phase = Phase::Forwarded;
        Ok(loss)
    }

    /// D under the update.
    fn finish_step(&mut self, learning_rate: f64, gradient: Option<&Matrix>) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope());
        let exchange = scope.host("backward", || self.rows.backward());
        self.seconds.backward = start.elapsed().as_secs_f64();
        let comm = self.comm.clone();
        let sharded = self.options.placement == Placement::Sharded;
        self.run_update(learning_rate, &mut || match sharded {
            true => scope.host("reduce_scatter gradient", || exchange.reduce_scatter(&comm)),
            false => Ok(()),
        })?;
        scope.host("finish gradient", || self.rows.finish_gradient(self.options.gradient_scale, gradient))
    }

    fn run_update(&mut self, learning_rate: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope());
        match self.options.placement {
            Placement::Sharded => scope.host("update", || self.rows.update(learning_rate, self.loss_weight, beside))?,
            Placement::Replicated => {
                let gradient = scope.host("center gradient", || self.rows.center_gradient(self.loss_weight));
                scope.host("all_reduce center gradient", || gradient.all_reduce(&self.comm, ReduceOp::Sum))?;
                scope.host("update", || self.rows.apply_gradient(learning_rate))?;
            }
        }
        self.updates += 1;
        self.seconds.update = start.elapsed().as_secs_f64();
        self.phase = Phase::Idle;
        Ok(())
    }

    /// Whose spans the current step's are.
    fn scope(&self) -> trace::Scope {
        trace::Scope { rank: self.comm.rank(), ranks: self.comm.size(), step: self.step }
    }

    fn usable(&self) -> Result<()> {
        let made_in = self.device.process();
        ensure!(
            made_in == std::process::id(),
            Forked,
            "the head of rank {} was made in process {made_in} and cannot be used in process {}",
            self.rank(),
            std::process::id()
        );
        match &self.poisoned {
            Some(cause) => Err(error!(
                Poisoned,
                "the head of rank {} is unusable since an earlier failure ({cause}): free it and load a checkpoint",
                self.rank()
            )),
            None => Ok(()),
        }
    }

    /// The outcome of a call that may have waited for exchanges on the device's streams: if one of them did not come about, that is
    /// what there is to tell, and anything else comes of it.
    fn heard<T>(&self, outcome: Result<T>) -> Result<T> {
        let ended = self.comm.failure().is_some();
        match (outcome, self.comm.check()) {
            (outcome, Err(cause)) if !ended || outcome.is_ok() => Err(cause),
            (outcome, _) => outcome,
        }
    }

    /// Passes an outcome on; one that leaves the ranks at different places, or rows half written, poisons the head.
    fn survive<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let outcome = self.heard(outcome);
        if let Err(error) = &outcome {
            let harmless = matches!(
                error.status,
                Status::Label
                    | Status::NotFinite
                    | Status::InvalidArgument
                    | Status::OutOfMemory
                    | Status::Remote
                    | Status::Mismatch
            );
            if !harmless || self.comm.failure().is_some() {
                self.poison(error);
            }
        }
        outcome
    }

    /// As `survive` for a verdict on what the ranks have told each other.
    fn survive_judged<T>(&mut self, verdict: Result<T>) -> Result<T> {
        let verdict = self.heard(verdict);
        if let (Err(error), true) = (&verdict, self.rows.parted()) {
            // Ranks that have not made the same calls never come together again.
            self.poison(error);
        }
        self.survive(verdict)
    }

    /// As `survive` for an update, after whose failure the ranks' rows are not what one step makes of them.
    fn survive_update<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let outcome = self.heard(outcome);
        if let Err(error) = &outcome {
            self.poison(error);
        }
        outcome
    }

    fn expect(&self, phase: Phase, call: &str, before: &str) -> Result<()> {
        ensure!(
            self.phase == phase,
            InvalidArgument,
            "{call} must come right after {before}, but the head is {} (rank {})",
            match self.phase {
                Phase::Idle => "idle",
                Phase::Forwarded => "forwarded",
                Phase::Backwarded => "backwarded",
            },
            self.rank()
        );
        Ok(())
    }

    fn check_shape(&self, name: &str, matrix: &Matrix, rows: usize) -> Result<()> {
        ensure!(
            matrix.rows == rows,
            InvalidArgument,
            "{name}.rows must be {rows}, the batch, got {} (rank {})",
            matrix.rows,
            self.rank()
        );
        Ok(())
    }

    /// Whether the device can use a matrix where it lies.
    fn check_memory(&self, name: &str, matrix: &Matrix) -> Result<()> {
        match matrix.rows {
            0 => Ok(()),
            _ => self.rows.holds(name, matrix.data).map(|_| ()),
        }
    }

    fn check_factor(&self, name: &str, value: f64) -> Result<()> {
        ensure!(
            (0.0..=f64::from(f32::MAX)).contains(&value),
            InvalidArgument,
            "{name} must be a float32 of at least 0, got {value} (rank {})",
            self.rank()
        );
        Ok(())
    }

    /// Where in the shard a range of class ids begins.
    fn row_range(&self, first: u64, rows: &Matrix) -> Result<u64> {
        let (shard, count) = (self.shard, rows.rows as u64);
        ensure!(
            first >= shard.first && first.checked_add(count).is_some_and(|end| end <= shard.end()),
            InvalidArgument,
            "classes must be in the shard, {} to {}, got {first} to {} (rank {})",
            shard.first,
            shard.end() as i128 - 1,
            first as i128 + count as i128 - 1,
            self.rank()
        );
        Ok(first - shard.first)
    }
}

/// An error that says which rank it is of.
fn on_rank(error: &Error, rank: u32) -> Error {
    match error.message.contains("rank ") {
        true => error.clone(),
        false => Error::new(error.status, format!("{} (rank {rank})", error.message)),
    }
}
