//! Devices: where rows live and arithmetic runs.
//!
//! A [`Device`] makes a [`HeadDevice`] for each head and offers the kernels by themselves. A [`HeadDevice`] is one head's rows and
//! workspace: `head.rs` calls its phases in the order of a step and carries its [`Exchange`]s through the communicator between them.
//! Neither knows of ranks beyond their number.

mod checks;
mod cpu;
mod cuda;

use std::any::Any;
use std::ffi::{c_void, CStr};
use std::fmt;
use std::sync::Arc;

use crate::comm::{Communicator, Place, ReduceOp};
use crate::margin::Margin;
use crate::matrix::{DType, Matrix};
use crate::optimizer::Optimizer;
use crate::options::{HeadOptions, Precision};
pub use crate::protocol::Step;
use crate::shard::Shard;
use crate::{Error, Result};

pub use cpu::Memory;
pub(crate) use cpu::{keep_best, memory_needed, sample_capacity};

/// The CPU, with a pool of `threads` threads (0: as many as this process may use).
pub fn cpu(threads: u32) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(cpu::Cpu::new(threads)?))
}

/// GPU `ordinal` as the CUDA driver numbers them, with all work on the caller's stream.
///
/// # Safety
/// `stream` is a stream of the driver's, or NULL for the default stream, and outlives the device.
pub unsafe fn cuda(ordinal: i32, stream: *mut c_void) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(cuda::CudaDevice(Arc::new(cuda::Cuda::new(ordinal, stream)?))))
}

/// What a head device is made for.
#[derive(Clone, Debug)]
pub struct HeadSpec {
    pub options: HeadOptions,
    pub ranks: u32,
    pub rank: u32,
    pub shard: Shard,
}

/// Labels of one rank's batch, borrowed for a call.
#[derive(Clone, Copy, Debug)]
pub struct Labels {
    pub data: *const i64,
    pub count: usize,
}

impl Labels {
    /// # Safety
    /// `data` points to `count` labels in host memory.
    pub unsafe fn as_slice<'a>(&self) -> &'a [i64] {
        match self.count {
            0 => &[],
            count => std::slice::from_raw_parts(self.data, count),
        }
    }
}

/// A moment on a stream, which other streams can wait for: whatever the backend that recorded it makes of it. Any thread may ask
/// and drop it.
pub trait Moment: Any + Send + Sync {
    /// Whether the stream has come to it.
    fn is_over(&self) -> Result<bool>;
}

pub type Event = Arc<dyn Moment>;

/// The most ranks' buffers that [`StreamMemory::reduce`] takes.
pub const MOST_REDUCED: usize = 16;

/// Memory that a device's streams read and write: what a communicator needs to work on it without making the host wait.
///
/// All but `to_host`, `to_device` and `synchronise` return once the work is on the stream, which runs it after all that was put
/// there before. Ranks in one process hand their pointers and events to each other, so every method takes those of any memory of
/// the same `kind`. Methods are called from any thread, whatever context is current there. Buffers are not empty.
///
/// # Safety
/// The pointers are valid for the sizes named until the stream has run the work; `copy`'s buffers do not overlap. Dropping an event
/// that streams still wait for is allowed.
#[allow(clippy::missing_safety_doc)] // The one above is every method's.
pub trait StreamMemory: Send + Sync {
    /// Names it in messages ("cuda"). Ranks whose kinds differ cannot work on each other's memory.
    fn kind(&self) -> &'static str;
    /// What `stream` has reached once all that is on it now has run.
    fn record(&self, stream: *mut c_void) -> Result<Event>;
    /// What is put on `stream` from here on runs after `event`, which any rank's memory of this kind recorded.
    fn wait(&self, stream: *mut c_void, event: &Event) -> Result<()>;
    unsafe fn copy(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Combines elements `first .. first + count` of the sources, in their order, into the same elements of every destination.
    ///
    /// At most [`MOST_REDUCED`] sources, and either as many destinations or one. A destination may be a source. f32, f64, i32 and
    /// i64, with [`ReduceOp`]'s rules for NaN and overflow.
    #[allow(clippy::too_many_arguments)] // The buffers, the range, the operation: each is one of them.
    unsafe fn reduce(
        &self,
        sources: &[*const u8],
        destinations: &[*mut u8],
        first: usize,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: *mut c_void,
    ) -> Result<()>;
    /// Copies what `stream` leaves in `source` to host memory and returns when it is there.
    unsafe fn to_host(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Copies host memory to `destination` after all that is on `stream` and returns when `source` may be written to again.
    unsafe fn to_device(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Returns when all that is on `stream` has run.
    fn synchronise(&self, stream: *mut c_void) -> Result<()>;
}

/// A device with streams, for a carrier that works on it by itself.
pub trait StreamDevice: StreamMemory {
    /// Its number among those of its kind.
    fn ordinal(&self) -> i32;
    /// Makes it the thread's current device, as libraries beside this one find it, until the guard goes.
    fn enter(&self) -> Result<Box<dyn Entered + '_>>;
    /// A stream and memory for what does not come from a head.
    fn scratch(&self) -> Result<Box<dyn Scratch>>;
}

/// While it lives a device is the thread's current one.
#[must_use]
pub trait Entered {}

/// A stream of its own, and memory on it that grows.
pub trait Scratch: Send {
    fn stream(&self) -> *mut c_void;
    /// At least so many bytes, not 0; what was in them is lost.
    fn room(&mut self, bytes: usize) -> Result<*mut u8>;
}

impl fmt::Debug for dyn StreamMemory + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())
    }
}

/// Memory of the device that a collective reads and writes: `count` elements a rank.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub send: *const u8,
    pub recv: *mut u8,
    pub count: usize,
    pub dtype: DType,
    /// Where `send` and `recv` are; `None`: in the host's memory.
    pub memory: Option<Arc<dyn StreamMemory>>,
    /// Orders the accesses to `memory`; without meaning for the host's.
    pub stream: *mut c_void,
    /// Why `send` is not what it should be: the other ranks must not get it.
    pub failure: Option<Error>,
}

impl Exchange {
    fn place(&self) -> Result<Place<'_>> {
        match (&self.failure, &self.memory) {
            (Some(failure), _) => Err(failure.clone()),
            (None, Some(memory)) => Ok(Place::Device { memory: &**memory, stream: self.stream }),
            (None, None) => Ok(Place::Host),
        }
    }

    pub(crate) fn all_gather(&self, comm: &Communicator) -> Result<()> {
        // SAFETY: a head device hands out exchanges over buffers of its own, large enough for the ranks it was made for.
        unsafe { comm.all_gather_raw(self.send, self.recv, self.count * self.dtype.size(), self.place()?) }
    }

    pub(crate) fn all_reduce(&self, comm: &Communicator, op: ReduceOp) -> Result<()> {
        // SAFETY: as above.
        unsafe { comm.all_reduce_raw(self.send, self.recv, self.count, self.dtype, op, self.place()?) }
    }

    pub(crate) fn reduce_scatter(&self, comm: &Communicator) -> Result<()> {
        // SAFETY: as above.
        unsafe { comm.reduce_scatter_raw(self.send, self.recv, self.count, self.dtype, ReduceOp::Sum, self.place()?) }
    }
}

/// W or a tensor of the optimizer state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateTensor {
    Centers,
    /// SGD's m, AdamW's first moment.
    Momentum,
    /// AdamW's second moment.
    SecondMoment,
}

/// Class ids and cosines, [queries, k], nearest first, equal cosines by ascending id.
#[derive(Clone, Debug, Default)]
pub struct Nearest {
    pub ids: Vec<i64>,
    pub cosines: Vec<f32>,
}

/// What a step was like, this rank's part of it.
#[derive(Clone, Debug, Default)]
pub struct StepFigures {
    /// Updates done by this head.
    pub updates: u64,
    /// Rows of the global batch.
    pub rows: u64,
    pub valid_rows: u64,
    pub sample_size: u64,
    pub loss: f64,
    /// Sum of the valid rows' target cosines, over all ranks.
    pub target_cosines: f64,
    /// For each row this device computed: the largest cosine of the sample's negatives, -2 where there is none.
    pub best_negatives: Vec<f32>,
    /// For each row this device computed: its target cosine, -2 where another rank owns the class, 2 for an ignored row.
    pub own_target_cosines: Vec<f32>,
    /// Sum of the squares of the embeddings' gradient as handed out on this rank.
    pub grad_embeddings: f64,
    /// Sum of the squares of the gradient of this rank's sampled class centres.
    pub grad_centers: f64,
}

/// One head's rows and workspace on a device, and the phases of a step over them.
///
/// Two samples live here at most: the next step's, drawn by `sample`, and the current step's, which `begin` makes of it.
/// Where a phase has failed on this rank, the exchanges after it are still handed out, so that the other ranks hear of it.
pub trait HeadDevice: Send {
    /// Phase 1: this rank's block of A. The labels are copied.
    fn pack_labels(&mut self, step: Step, labels: Result<Labels>) -> Exchange;
    /// Phase 1: the verdict on the gathered blocks, the same on all ranks. A device with streams leaves it to `judge_sums`.
    fn judge_labels(&mut self) -> Result<()>;
    /// Phase 2: draws the next step's sample, or takes the caller's ids (positives missing from them are added).
    fn sample(&mut self, step: u64, chosen: Option<&[i64]>) -> Result<()>;
    /// The ids last drawn, ascending.
    fn sample_ids(&self) -> Result<Vec<i64>>;
    /// This rank's labels of the next step: how many, and which if the host has them.
    fn next_labels(&self) -> (usize, Option<&[i64]>);
    /// Makes the next step's sample the current step's.
    fn begin(&mut self) -> Result<()>;
    /// Rows of this rank in the current step.
    fn batch(&self) -> usize;
    /// Phase 1, sharded: this rank's embeddings for B; zeros without.
    fn pack_embeddings(&mut self, embeddings: Option<&Matrix>) -> Exchange;
    /// Phases 3 and 4: normalised rows, targets, numerators, row sums, P @ W^. Replicated: of `embeddings`.
    fn forward(&mut self, embeddings: &Matrix) -> Result<()>;
    /// Phase 4: this rank's part of C, or its failure. `late`: its loss is in the device's memory; `None`: it has no place for one.
    fn pack_sums(&mut self, outcome: &Result<()>, late: Option<bool>) -> Exchange;
    /// Phase 4, after C: whether the other ranks' losses are in the device's memory; `None` where no rank has a place for one.
    /// Waits.
    fn others_late(&mut self) -> Result<Option<bool>> {
        Ok(None)
    }
    /// Phase 4: the loss from the reduced sums, or the same failure on all ranks. With a `loss` of the device's memory nothing is
    /// waited for: the loss goes there, a failure comes from `wait`.
    fn judge_sums(&mut self, loss: Option<*mut f64>) -> Result<f64>;
    /// Whether the failure that `judge_sums` gave was in the labels: then no sample was drawn.
    fn failed_at_labels(&self) -> bool {
        false
    }
    /// Whether the failure that `judge_sums` or `wait` gave is that the ranks are at different steps.
    fn parted(&self) -> bool {
        false
    }
    /// The verdict of everything enqueued.
    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
    /// Whether a caller's memory is the device's own, which the host does not read. The error names the argument.
    fn holds(&self, _name: &str, _pointer: *const u8) -> Result<bool> {
        Ok(false)
    }
    /// Copies a caller's bytes to the host from wherever they are, and waits for them. The error names the argument.
    ///
    /// # Safety
    /// There are as many at `from`.
    unsafe fn read_values(&self, _name: &str, from: *const u8, to: &mut [u8]) -> Result<()> {
        std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
        Ok(())
    }
    /// Copies bytes to where a caller wants them, and waits until they are there. The error names the argument.
    ///
    /// # Safety
    /// There is room for as many at `to`.
    unsafe fn write_values(&self, _name: &str, to: *mut u8, from: &[u8]) -> Result<()> {
        std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        Ok(())
    }
    /// Phase 5: the gradient of the normalised embeddings; sharded: this rank's part of all ranks' rows, for D.
    fn backward(&mut self) -> Exchange;
    /// Phase 5, after D: the backward of normalize, times `factor`, into the caller's matrix.
    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()>;
    /// Phase 5, sharded: the class centres' gradient and the optimizer, row by row. The calling thread runs `beside` meanwhile.
    fn update(&mut self, learning_rate: f64, loss_weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// Phase 5, replicated: the sampled class centres' gradient, to be summed over the ranks.
    fn center_gradient(&mut self, loss_weight: f64) -> Exchange;
    /// Phase 5, replicated: the optimizer on the summed gradient.
    fn apply_gradient(&mut self, learning_rate: f64) -> Result<()>;
    /// What the current step was like.
    fn figures(&mut self) -> Result<StepFigures>;
    /// Reads rows of this rank's shard into a host matrix; `first` counts from the shard's first class.
    fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()>;
    /// Overwrites rows of this rank's shard: DEVICE where some are written and some are not, else all or none.
    fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()>;
    /// For each query its `k` nearest class centres of the shard, k at most its rows.
    fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest>;
}

/// Scratch memory of the caller's for a stateless kernel.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    pub data: *mut u8,
    pub bytes: usize,
}

/// Arguments of `pfc_fused_forward`.
pub struct FusedForward<'a> {
    pub margin: &'a Margin,
    pub embeddings: &'a Matrix,
    pub centers: &'a Matrix,
    pub targets: *const i64,
    pub row_sums: *mut f32,
    pub target_logits: *mut f32,
    pub weighted: &'a Matrix,
    pub workspace: Workspace,
}

/// Arguments of `pfc_fused_backward`.
pub struct FusedBackward<'a> {
    pub margin: &'a Margin,
    pub embeddings: &'a Matrix,
    pub centers: &'a Matrix,
    pub targets: *const i64,
    pub row_sums: *const f32,
    pub target_logits: *const f32,
    pub weighted: &'a Matrix,
    pub loss_weight: f64,
    pub grad_embeddings: &'a Matrix,
    pub grad_centers: &'a Matrix,
    pub workspace: Workspace,
}

/// Arguments of `pfc_sample_classes`.
pub struct SampleDraw {
    pub seed: u64,
    pub step: u64,
    pub first: u64,
    pub rows: u64,
    pub positives: *const i64,
    pub positive_count: usize,
    pub sample_size: u64,
}

/// The tensors of `pfc_update_rows`.
pub struct RowState<'a> {
    pub centers: &'a Matrix,
    pub momentum: &'a Matrix,
    pub second_moment: Option<&'a Matrix>,
}

/// A backend. The kernels are those of `src/capi/kernels.rs`, which documents their arguments and has checked the pointers and shapes.
pub trait Device: Send + Sync {
    /// One line for people.
    fn info(&self) -> &CStr;
    /// The process that made it: a forked child has its memory but not its threads.
    fn process(&self) -> u32;
    /// What `Precision::Auto` is on it.
    fn auto_precision(&self) -> Precision {
        Precision::F32
    }
    /// What a carrier that works on the device by itself needs of it; `None`: the device has no streams.
    fn streams(&self) -> Option<Arc<dyn StreamDevice>> {
        None
    }
    /// As [`HeadDevice::holds`].
    fn holds(&self, _name: &str, _pointer: *const u8) -> Result<bool> {
        Ok(false)
    }
    /// Makes the rows (start values) and the workspace of a head.
    fn open(&self, spec: HeadSpec) -> Result<Box<dyn HeadDevice>>;

    fn normalize_rows(&self, rows: &Matrix, normalized: &Matrix, inverse_norms: *mut f32) -> Result<()>;
    fn normalize_gemm(&self, embeddings: &Matrix, centers: &Matrix, cosines: &Matrix, workspace: Workspace) -> Result<()>;
    fn normalize_gemm_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64>;
    fn margin_forward(&self, margin: &Margin, cosines: *const f32, count: usize, logits: *mut f32) -> Result<()>;
    fn margin_backward(
        &self,
        margin: &Margin,
        cosines: *const f32,
        grad_logits: *const f32,
        count: usize,
        grad_cosines: *mut f32,
    ) -> Result<()>;
    fn partial_softmax(&self, margin: &Margin, cosines: &Matrix, targets: *const i64, row_sums: *mut f32) -> Result<()>;
    fn fused_forward(&self, arguments: &FusedForward<'_>) -> Result<()>;
    fn fused_backward(&self, arguments: &FusedBackward<'_>) -> Result<()>;
    fn fused_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64>;
    fn sample_classes(&self, draw: &SampleDraw, ids: *mut i64) -> Result<u64>;
    fn update_rows(
        &self,
        optimizer: &Optimizer,
        state: &RowState<'_>,
        ids: *const i64,
        gradients: &Matrix,
        learning_rate: f64,
        update: u64,
    ) -> Result<()>;
}
