//! Measurements of a head.

use super::boundary;
use super::head::locked::with_head;
use super::head::pfc_head;
use super::status::pfc_status;
use super::types::{init_sized, sized, write_sized, Sized64};
use crate::head::{Head, Metrics};
use crate::{ensure, Result};

/// Measurements of the last step, for pfc_head_metrics and pfc_head_last_metrics. Prepare with pfc_metrics_init.
///
/// After a step that failed all but updates, skipped_updates, draws and the seconds is 0.
///
/// Seconds are wall time of the calling thread. On a CUDA device they measure how long it took to enqueue a phase and to wait for
/// the communicator, not how long the GPU worked. With a loss in host memory, seconds_reduce includes the wait for everything that
/// was enqueued before the loss. Set PFC_TRACE to see when the GPU ran what.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_metrics {
    /// sizeof(pfc_metrics), set by pfc_metrics_init.
    pub struct_size: u64,
    /// Updates done since the head was made.
    pub updates: u64,
    /// Samples drawn since the head was made. These are draws of classes, not training examples.
    pub draws: u64,
    /// Rows of the global batch.
    pub rows: u64,
    /// Rows of the global batch whose label is not ignore_label.
    pub valid_rows: u64,
    /// Classes in this rank's sample.
    pub sample_size: u64,
    /// Mean loss of the valid rows.
    pub loss: f64,
    /// Share of the valid rows whose target cosine, without margin, is the largest of the sample.
    pub top1: f64,
    /// Mean target cosine, without margin, of the valid rows.
    pub mean_target_cosine: f64,
    /// L2 norm of grad_embeddings over all ranks, as it was written; 0 before backward.
    pub grad_embeddings_norm: f64,
    /// L2 norm of the gradient of all ranks' sampled class centers, times the update's factor; 0 before update, and after an update
    /// that was skipped.
    pub grad_centers_norm: f64,
    /// Seconds in phase 1: gathering labels and embeddings.
    pub seconds_gather: f64,
    /// Seconds in phase 2: drawing the sample.
    pub seconds_sample: f64,
    /// Seconds in phases 3 and 4: reading rows, cosines, numerators, P @ W^.
    pub seconds_forward: f64,
    /// Seconds in the all-reduce of the sums, and the loss.
    pub seconds_reduce: f64,
    /// Seconds in phase 5 for the embeddings: their gradient and its reduce-scatter. In pfc_head_step the reduce-scatter runs
    /// beside the update and counts as seconds_update.
    pub seconds_backward: f64,
    /// Seconds in phase 5 for the class centers: their gradient and the optimizer.
    pub seconds_update: f64,
    /// Updates skipped since the head was made, because pfc_head_update_with had a factor that was not finite.
    pub skipped_updates: u64,
}

sized!(
    pfc_metrics,
    pfc_metrics {
        struct_size: 0,
        updates: 0,
        draws: 0,
        rows: 0,
        valid_rows: 0,
        sample_size: 0,
        loss: 0.0,
        top1: 0.0,
        mean_target_cosine: 0.0,
        grad_embeddings_norm: 0.0,
        grad_centers_norm: 0.0,
        seconds_gather: 0.0,
        seconds_sample: 0.0,
        seconds_forward: 0.0,
        seconds_reduce: 0.0,
        seconds_backward: 0.0,
        seconds_update: 0.0,
        skipped_updates: 0,
    }
);

/// Fills the struct with zeros and its size; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_metrics_init_sized(metrics: *mut pfc_metrics, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(metrics, struct_size))
}

/// Measurements of the last step. Collective: all ranks must call it, or those that do wait for the others; pfc_head_last_metrics is
/// for one rank alone.
///
/// @param metrics prepared with pfc_metrics_init; written
#[no_mangle]
pub unsafe extern "C" fn pfc_head_metrics(head: *mut pfc_head, metrics: *mut pfc_metrics) -> pfc_status {
    with_head(head, |head| {
        // The other ranks are in it already: the exchange comes first.
        let values = head.metrics()?;
        write(head, metrics, &values)
    })
}

/// What this rank knows of the last step, for a logger on one rank. Not collective. On a CUDA device it waits for what has been
/// enqueued.
///
/// Of all ranks, as pfc_head_metrics gives them: updates, skipped_updates, draws, rows, valid_rows, loss,
/// mean_target_cosine. Of this rank alone:
/// sample_size, the seconds, grad_embeddings_norm (of its own rows) and grad_centers_norm (sharded: of the sampled class centers of
/// its shard; replicated: of all sampled class centers, as pfc_head_metrics). top1 is NaN where the negatives of a row are on several
/// ranks: sharded, on more than one rank. Replicated it is the share of this rank's own valid rows, 0 where there are none. On one
/// rank all fields are those of pfc_head_metrics.
///
/// @param metrics prepared with pfc_metrics_init; written
#[no_mangle]
pub unsafe extern "C" fn pfc_head_last_metrics(head: *mut pfc_head, metrics: *mut pfc_metrics) -> pfc_status {
    with_head(head, |head| {
        let values = head.last_metrics()?;
        write(head, metrics, &values)
    })
}

unsafe fn write(head: &Head, metrics: *mut pfc_metrics, m: &Metrics) -> Result<()> {
    ensure!(!metrics.is_null(), InvalidArgument, "metrics must not be NULL (rank {})", head.rank());
    head.require_host("metrics", metrics)?;
    let value = pfc_metrics {
        struct_size: 0,
        updates: m.updates,
        draws: m.draws,
        rows: m.rows,
        valid_rows: m.valid_rows,
        sample_size: m.sample_size,
        loss: m.loss,
        top1: m.top1,
        mean_target_cosine: m.mean_target_cosine,
        grad_embeddings_norm: m.grad_embeddings_norm,
        grad_centers_norm: m.grad_centers_norm,
        seconds_gather: m.seconds.gather,
        seconds_sample: m.seconds.sample,
        seconds_forward: m.seconds.forward,
        seconds_reduce: m.seconds.reduce,
        seconds_backward: m.seconds.backward,
        seconds_update: m.seconds.update,
        skipped_updates: m.skipped_updates,
    };
    write_sized(metrics, value)
}
