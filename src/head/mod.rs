//! The classification head on one rank.
//!
//! | file | what it has |
//! |---|---|
//! | `step.rs` | a training step: gather, sample, forward, sums, loss, backward, update |
//! | `accumulation.rs` | gradients of micro-batches, kept until an update |
//! | `arguments.rs` | checks of what callers pass in, and copies from and to wherever it lies |
//! | `failure.rs` | what a failure does to the head, its step and the other ranks |
//! | `checkpoint.rs` | saving a head to a directory, and loading one |
//! | `background.rs` | saving one beside training |
//! | `remap.rs` | other classes for a head that trains |
//! | `class_map.rs`, `moving_rows.rs`, `staged.rs` | which classes become which, and their rows on their way |
//! | `rows.rs` | reading and writing the shard's class centers and their state |
//! | `evaluation.rs` | metrics of the last step, and the nearest class centers |
//!
//! A head knows no backend and no transport: it speaks to a [`HeadDevice`] and a [`Communicator`].

mod accumulation;
mod arguments;
mod background;
mod checkpoint;
mod class_map;
mod evaluation;
mod failure;
mod moving_rows;
mod remap;
mod rows;
mod staged;
mod step;

use std::sync::{Arc, Mutex, PoisonError};

pub use self::arguments::require_host;
pub use self::checkpoint::{LoadRequest, Report};
pub use self::class_map::ClassTable;
pub use self::evaluation::Metrics;
pub use self::remap::{merge_table, RemapRequest};
use crate::comm::{agree, Communicator};
use crate::device::{Device, HeadDevice, HeadSpec, SampleIds};
pub use crate::device::{Labels, Nearest};
use crate::matrix::Matrix;
pub use crate::optimizer::StateTensor;
use crate::options::HeadOptions;
use crate::protocol::LossPlace;
use crate::row_terms::{MarginGradientArrays, RowTermArrays};
use crate::shard::Shard;
use crate::{trace, Contribution, Error, Result};

/// How far the calls of a step have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallState {
    Idle,
    Forwarded,
    Backwarded,
}

/// What a forward takes: this rank's embeddings, their labels unless `prepare` had them, and their row terms.
#[derive(Clone, Copy, Debug)]
pub struct StepInput {
    pub embeddings: Matrix,
    pub labels: Option<Labels>,
    pub terms: RowTermArrays,
}

/// What a backward takes beside the matrix for the gradient.
#[derive(Clone, Copy, Debug)]
pub struct BackwardCall {
    pub loss_weight: f64,
    pub loss_scale: f64,
    pub margin_gradients: MarginGradientArrays,
}

/// Where a forward leaves its loss.
#[derive(Clone, Copy, Debug)]
pub enum LossTarget {
    /// With the caller, who waits for it and for the verdict.
    Host,
    /// In the device's memory. The verdict comes from the next call that waits.
    Device(*mut f64),
    /// Nowhere: the caller's pointer is unusable, so the rank fails the step and takes part in it as its peers do.
    Nowhere,
}

impl LossTarget {
    /// As the ranks tell each other.
    fn place(self) -> LossPlace {
        match self {
            LossTarget::Host => LossPlace::Host,
            LossTarget::Device(_) => LossPlace::Device,
            LossTarget::Nowhere => LossPlace::Unknown,
        }
    }
}

/// Seconds a rank spent in each part of its last step.
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
    /// Phase 5 for the embeddings.
    pub backward: f64,
    /// Phase 5 for the class centers.
    pub update: f64,
}

/// Why a head is of no use any more, but perhaps to read its rows.
struct Poison {
    cause: Error,
    /// The rows are those of the last update that succeeded.
    whole_rows: bool,
}

/// How far a head is; see `pfc_head_read_progress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub draws: u64,
    pub updates: u64,
}

/// What can be asked of a head while another thread works with it.
pub struct HeadOutside {
    pub device: Arc<dyn Device>,
    pub rank: u32,
    shared: Arc<Mutex<Shared>>,
}

impl HeadOutside {
    /// An error of the head, with its rank where the message has none.
    pub fn name_rank(&self, error: &Error) -> Error {
        failure::on_rank(error, self.rank)
    }

    /// The classes this rank owns.
    pub fn shard(&self) -> Shard {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).shard
    }

    /// Gives `body` the ids of the last sample, where the host has them and the head is usable.
    pub fn with_last_sample<T>(&self, body: impl FnOnce(Option<SampleIds<'_>>) -> T) -> T {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        body(shared.known.then_some(SampleIds { first: shared.first, count: shared.count, listed: &shared.listed }))
    }
}

/// A copy of the shard and of the last sample's ids, beside the head's lock.
struct Shared {
    shard: Shard,
    /// There is such a sample.
    known: bool,
    first: i64,
    count: usize,
    listed: Vec<i64>,
}

/// A classification head on one rank.
pub struct Head {
    options: HeadOptions,
    shard: Shard,
    device: Arc<dyn Device>,
    backend: Box<dyn HeadDevice>,
    comm: Arc<Communicator>,
    state: CallState,
    /// The next step has its labels and its sample, or has failed since the ranks gathered their labels.
    prepared: Option<Result<()>>,
    /// Rows of a rank's batch that the head has room for: the same on all ranks.
    batch_room: u64,
    /// The caller's ids for the next sample.
    chosen: Option<Vec<i64>>,
    /// Samples drawn so far.
    draws: u64,
    /// The device has the ids of one.
    has_sample: bool,
    /// The current step's number: how many samples had been drawn before its own.
    step: u64,
    /// Updates asked for: the same on all ranks that made the same calls.
    updates: u64,
    /// Of the last update.
    learning_rate: f64,
    /// Of the last update, as far as the host knows it.
    factor: f64,
    /// Micro-batches whose gradients are kept until the next update.
    accumulated: u64,
    /// The log says that a gradient was dropped.
    told_of_dropped_gradient: bool,
    /// Of the last backward.
    loss_weight: f64,
    /// See [`crate::protocol::Announcement`].
    written_rows: u64,
    /// Heads that had been made on the communicator before this one: the same on all ranks.
    number: u64,
    /// Where the last loss was.
    loss_place: LossPlace,
    /// Why the current step has failed on this rank, whose peers do not know it yet and go on with the step.
    own_failure: Option<Error>,
    seconds: Seconds,
    /// Updates that were skipped before the head was given other classes.
    skipped_before: u64,
    /// The most classes that the head has had.
    most_classes: u64,
    /// The last step has no loss, as far as this rank knows.
    failed: bool,
    poisoned: Option<Poison>,
    /// The save that `save_start` has begun.
    background: Option<background::BackgroundSave>,
    /// After `backend`, which hands in its last spans when it is dropped.
    _trace: trace::Writer,
    /// Beside the head's lock: what can be asked for while a step waits.
    shared: Arc<Mutex<Shared>>,
}

impl Head {
    /// Makes a head. Collective; `request` is what this rank asks for, or why it cannot.
    ///
    /// # Errors
    /// This rank's own error; REMOTE where another rank failed; MISMATCH on all ranks where their options differ.
    pub fn create(comm: Arc<Communicator>, request: Contribution<(Arc<dyn Device>, HeadOptions)>) -> Result<Head> {
        let turn = comm.take_turn()?;
        let trace = trace::Writer::new(comm.rank(), comm.size());
        let number = comm.count_head();
        let opened = request.and_then(|(device, options)| {
            options.check(comm.size())?;
            device.check_not_capturing()?;
            comm.check_device(device.streams())?;
            let backend = open(&*device, &comm, &options, options.batch_room(0, comm.size()), false)?;
            Ok((device, options, backend))
        });
        let fields = match &opened {
            Ok((device, options, _)) => Ok(options.fields(device.auto_precision())),
            Err(error) => Err(failure::on_rank(error, comm.rank())),
        };
        agree(&comm, fields)?;
        drop(turn);
        trace.open();
        let (device, options, backend) = opened?;
        let shard = options.shard(comm.size(), comm.rank());
        let shared = Shared { shard, known: false, first: 0, count: 0, listed: Vec::new() };
        Ok(Head {
            batch_room: options.batch_room(0, comm.size()),
            most_classes: options.num_classes,
            options,
            shard,
            device,
            backend,
            comm,
            state: CallState::Idle,
            prepared: None,
            chosen: None,
            draws: 0,
            has_sample: false,
            step: 0,
            updates: 0,
            learning_rate: 0.0,
            factor: 1.0,
            accumulated: 0,
            told_of_dropped_gradient: false,
            loss_weight: 1.0,
            written_rows: 0,
            number,
            loss_place: LossPlace::Host,
            own_failure: None,
            seconds: Seconds::default(),
            skipped_before: 0,
            failed: false,
            poisoned: None,
            background: None,
            _trace: trace,
            shared: Arc::new(Mutex::new(shared)),
        })
    }

    pub fn rank(&self) -> u32 {
        self.comm.rank()
    }

    pub fn num_classes(&self) -> u64 {
        self.options.num_classes
    }

    pub fn embedding_dim(&self) -> u64 {
        self.options.embedding_dim.into()
    }

    /// The classes this rank owns.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// What is known of the head while another thread works with it.
    pub fn outside(&self) -> HeadOutside {
        HeadOutside { device: self.device.clone(), rank: self.rank(), shared: self.shared.clone() }
    }

    /// Copies the ids of the last sample to where they can be asked for while a step waits.
    fn share_sample(&self) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.known = false;
        shared.listed.clear();
        let Some(SampleIds { first, count, listed }) = self.backend.known_sample_ids() else { return };
        // Without memory for a copy, callers wait for the step.
        if shared.listed.try_reserve(listed.len()).is_ok() {
            shared.listed.extend_from_slice(listed);
            (shared.known, shared.first, shared.count) = (true, first, count);
        }
    }

    /// Tells the shard where it can be asked for while a step waits.
    fn share_shard(&self) {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).shard = self.shard;
    }

    /// Nobody is to ask for the last sample beside the head's lock.
    fn hide_sample(&self) {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).known = false;
    }

    /// The process that the head was made in.
    pub fn process(&self) -> u32 {
        self.device.process()
    }
}

/// A rank's part of a head on its device. `successor`: another that it takes the rows over from is still there.
fn open(
    device: &dyn Device,
    comm: &Communicator,
    options: &HeadOptions,
    batch_room: u64,
    successor: bool,
) -> Result<Box<dyn HeadDevice>> {
    let (ranks, rank) = (comm.size(), comm.rank());
    let room = HeadOptions { max_batch: batch_room, ..options.clone() };
    let collectives_beside = ranks > 1 && comm.is_asynchronous();
    device.open(HeadSpec { options: room, ranks, rank, shard: options.shard(ranks, rank), collectives_beside, successor })
}
