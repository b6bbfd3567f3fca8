//! Devices: where class centers live and arithmetic runs.
//!
//! A [`Device`] makes a [`HeadDevice`] for each head and offers the kernels by themselves. A [`HeadDevice`] has one head's class centers
//! and workspace: `head/step.rs` calls its phases in the order of a step, and gives its [`Exchange`]s to the communicator between
//! them. Neither knows of ranks beyond their number.
//!
//! `cpu/` and `cuda/` mirror each other: the same part has the same file name. What both use stands here, above them.

mod cpu;
mod cuda;
mod gemm;
mod host_math;
mod nearest;
mod sizes;
mod stateless;
mod tensor_rows;
#[cfg(test)]
mod test_spec;
mod workspace;

use std::ffi::{c_void, CStr};
use std::sync::Arc;

use crate::exchange::Exchange;
use crate::margin::Margin;
use crate::matrix::Matrix;
use crate::optimizer::Optimizer;
use crate::options::{HeadOptions, Placement, Precision};
pub use crate::protocol::{Announcement, LossPlace, StepCall};
use crate::row_terms::{MarginGradientArrays, RowTermArrays};
use crate::shard::Shard;
use crate::stream::StreamDevice;
use crate::{Contribution, Result};

pub use cpu::step_efficiency;
pub(crate) use cpu::{memory_needed, storage_needed};
pub(crate) use cuda::memory_needed as gpu_memory_needed;
pub(crate) use nearest::keep_best;
pub use nearest::Nearest;
pub(crate) use sizes::sample_capacity;
pub use sizes::Memory;
pub use stateless::{FusedBackward, FusedForward, RowOffsets, RowState, SampleDraw, Workspace};
pub use tensor_rows::TensorRows;

/// The CPU, with a pool of `threads` threads (0: as many as this process may use).
pub fn cpu(threads: u32) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(cpu::Cpu::new(threads)?))
}

/// GPU `ordinal` as the CUDA driver numbers them, with all work on the caller's stream.
///
/// # Safety
/// `stream` is a stream of the driver's, or NULL for the default stream, and outlives the device.
pub unsafe fn cuda(ordinal: i32, stream: *mut c_void) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(cuda::CudaDevice::new(ordinal, stream)?))
}

/// What a head device is made for.
#[derive(Clone, Debug)]
pub struct HeadSpec {
    pub options: HeadOptions,
    pub ranks: u32,
    pub rank: u32,
    pub shard: Shard,
    /// Collectives run on the device beside the head's products, and need a part of it. Those that the host waits in do not.
    pub collectives_beside: bool,
    /// It takes the rows over from one with other classes, which is there until this one is told to [`HeadDevice::succeed`] it.
    pub successor: bool,
}

impl HeadSpec {
    fn is_sharded(&self) -> bool {
        self.options.placement == Placement::Sharded
    }
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

/// The ascending ids of a sample.
#[derive(Clone, Copy, Debug)]
pub struct SampleIds<'a> {
    pub first: i64,
    pub count: usize,
    /// Empty where the sample is the whole shard, from `first` on.
    pub listed: &'a [i64],
}

impl<'a> SampleIds<'a> {
    pub fn ids(self) -> impl Iterator<Item = i64> + 'a {
        (0..self.count).map(move |column| self.listed.get(column).copied().unwrap_or(self.first + column as i64))
    }
}

/// An update as its caller asks for it.
#[derive(Clone, Copy, Debug)]
pub struct UpdateCall {
    pub learning_rate: f64,
    /// Multiplies the gradient of the class centers. If it is no finite float32, the update is skipped.
    pub factor: f64,
    /// In the device's memory, and multiplies it, too; NULL: 1.
    pub device_factor: *const f32,
}

impl UpdateCall {
    pub fn of(learning_rate: f64) -> UpdateCall {
        UpdateCall { learning_rate, factor: 1.0, device_factor: std::ptr::null() }
    }
}

/// What a step was like, this rank's part of it.
#[derive(Clone, Debug, Default)]
pub struct StepFigures {
    /// Updates done by this head.
    pub updates: u64,
    /// Updates skipped for a factor that was not finite.
    pub skipped_updates: u64,
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
    /// Sum of the squares of the gradient of this rank's sampled class centers.
    pub grad_centers: f64,
}

/// One head's class centers and workspace on a device, and the phases of a step over them.
///
/// Two samples live here at most: the next step's, drawn by `sample`, and the current step's, which `begin` makes of it.
/// Where a phase has failed on this rank, the exchanges after it are still handed out, so that the other ranks learn of it.
pub trait HeadDevice: Send {
    /// Phase 1: this rank's block of *labels*. The labels are copied, unless there is no room for them: then the block asks for it.
    fn pack_labels(&mut self, announcement: &Announcement, labels: Contribution<Labels>) -> Exchange;
    /// Phase 1, where batches have no largest size: rows of the largest that a rank asks for, `limit` at most. Waits.
    fn largest_batch(&mut self, limit: u64) -> Result<u64>;
    /// Makes memory for batches of as many rows, and puts it aside. What there is stays as it is.
    fn reserve_batch(&mut self, rows: u64) -> Result<()>;
    /// Uses what was put aside, from the next *labels* on, or drops it. The step under way keeps its arrays until it is over.
    fn take_reserved(&mut self, used: bool);
    /// Phase 1: the verdict on the gathered blocks, the same on all ranks. A device with streams leaves it to `judge_sums`.
    fn judge_labels(&mut self) -> Result<()>;
    /// Phase 2: draws the next step's sample, number `draw`, or takes the caller's ids (positives missing from them are added).
    fn sample(&mut self, draw: u64, chosen: Option<&[i64]>) -> Result<()>;
    /// The ids last drawn, ascending.
    fn sample_ids(&self) -> Result<Vec<i64>>;
    /// The same where the host has them.
    fn known_sample_ids(&self) -> Option<SampleIds<'_>> {
        None
    }
    /// This rank's labels of the next step: how many, and which if the host has them.
    fn next_labels(&self) -> (usize, Option<&[i64]>);
    /// Makes the next step's sample the current step's.
    fn begin(&mut self) -> Result<()>;
    /// Rows of this rank in the current step.
    fn batch(&self) -> usize;
    /// Phase 1, sharded: this rank's block of *embeddings*; zeros without.
    fn pack_embeddings(&mut self, embeddings: Option<&Matrix>) -> Exchange;
    /// Phases 3 and 4: normalized rows, targets, numerators, row sums, weighted centers. Replicated: of `embeddings`. `terms`: of this
    /// rank's rows, where the head has row terms.
    fn forward(&mut self, embeddings: &Matrix, terms: &RowTermArrays) -> Result<()>;
    /// Phase 4: this rank's part of *sums*, or its failure. `loss_place` is where this rank has its loss.
    fn pack_sums(&mut self, outcome: &Result<()>, loss_place: LossPlace) -> Exchange;
    /// Enqueues what `forward` has left to run beside the all-reduce of *sums*.
    fn run_beside_sums(&mut self) {}
    /// Phase 4, after *sums*: where the ranks with a usable loss pointer have their losses. Waits. Only a device with memory of its
    /// own has more than one answer.
    fn others_loss_place(&mut self) -> Result<LossPlace> {
        Ok(LossPlace::Unknown)
    }
    /// Phase 4: the loss from the reduced sums, or the same failure on all ranks. With a `loss` in the device's memory nothing is
    /// waited for: the loss goes there, and a failure comes from `wait`.
    fn judge_sums(&mut self, loss: Option<*mut f64>) -> Result<f64>;
    /// Whether the failure that `judge_sums` gave was in the labels: then no sample was drawn.
    fn failed_in_labels(&self) -> bool {
        false
    }
    /// Whether the failure that `judge_sums` or `wait` gave ends the head: announcements that differ, or rows that an update
    /// took out of its type.
    fn is_fatal(&self) -> bool {
        false
    }
    /// The verdict of everything enqueued.
    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
    /// Whether a caller's memory is the device's own, which the host does not read. The error names the argument.
    fn is_device_memory(&self, _name: &str, _pointer: *const u8) -> Result<bool> {
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
    /// Phase 5: the gradient of the normalized embeddings; sharded: this rank's part of all ranks' rows, for *gradient*.
    fn backward(&mut self) -> Exchange;
    /// Phase 5, after *gradient*: the backward of normalize, times `factor`, into the caller's matrix.
    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()>;
    /// After the loss, where the head has row terms: the gradients of this rank's m2 and m3, times `factor`, into the caller's arrays.
    fn margin_gradients(&mut self, factor: f64, gradients: &MarginGradientArrays) -> Result<()>;
    /// Phase 5, sharded: the class centers' gradient and the optimizer, row by row. The calling thread runs `beside` meanwhile.
    fn update(&mut self, update: UpdateCall, loss_weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// Phase 5, replicated: the sampled class centers' gradient, for *center gradient*, which adds it up over the ranks.
    fn center_gradient(&mut self, loss_weight: f64) -> Exchange;
    /// Phase 5, replicated: the optimizer on the summed gradient.
    fn apply_gradient(&mut self, update: UpdateCall) -> Result<()>;
    /// Phase 5, in place of an update: keeps the gradient of the sampled class centers, added up by class with what is kept already.
    /// Out of memory, it changes nothing.
    fn accumulate(&mut self, loss_weight: f64) -> Result<()>;
    /// Drops what is kept.
    fn drop_accumulated(&mut self);
    /// Phase 5, replicated: what is kept, for *center gradient*.
    fn accumulated_gradient(&mut self) -> Exchange;
    /// Phase 5: the optimizer on what is kept, summed over the ranks if they are replicas. Nothing is kept any more.
    fn apply_accumulated(&mut self, update: UpdateCall) -> Result<()>;
    /// What the current step was like.
    fn figures(&mut self) -> Result<StepFigures>;
    /// Reads the same rows of this rank's shard from each of these tensors into its host matrix; `first` counts from the shard's first
    /// class.
    fn read_rows(&self, first: u64, tensors: &[TensorRows]) -> Result<()>;
    /// Overwrites the same rows of this rank's shard in each of these tensors: DEVICE where some are written and some are not, else all
    /// or none.
    fn write_rows(&mut self, first: u64, tensors: &[TensorRows]) -> Result<()>;
    /// Brings every dense row to now. Rows in float32 come to the same if it is done later; those in bf16 are rounded now.
    fn catch_up(&mut self) -> Result<()>;
    /// Updates that have moved rows, all of which have been brought to now. Waits for the device.
    fn updates(&mut self) -> Result<u64>;
    /// Takes the rows, all of them brought to now, as those after update `updates`.
    fn set_updates(&mut self, updates: u64) -> Result<()>;
    /// Whether a row of the shard has its start values and takes no memory: another head has it without being given it.
    fn is_start(&self, _row: u64) -> bool {
        false
    }
    /// Takes the place of the one that it is the successor of, which is dropped next.
    fn succeed(&mut self) {}
    /// For each query its `k` nearest class centers of the shard, k at most its rows.
    fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest>;
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
    /// What a transport that works on the device by itself needs of it; `None`: the device has no streams.
    fn streams(&self) -> Option<Arc<dyn StreamDevice>> {
        None
    }
    /// Refuses a call while the caller's stream is captured: a graph would hold what the call enqueues, and the call would not run.
    fn check_not_capturing(&self) -> Result<()> {
        Ok(())
    }
    /// As [`HeadDevice::is_device_memory`].
    fn is_device_memory(&self, _name: &str, _pointer: *const u8) -> Result<bool> {
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
    /// `row_offsets` may be NULL: all rows then have offset c.
    fn partial_softmax(
        &self,
        margin: &Margin,
        cosines: &Matrix,
        targets: *const i64,
        row_sums: *mut f32,
        row_offsets: *mut f32,
    ) -> Result<()>;
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
