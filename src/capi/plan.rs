//! What a head will need, before there is one.

use super::boundary;
use super::status::pfc_status;
use super::types::{init_sized, pfc_head_options, read_sized, sized, write_sized, Sized64};
use crate::plan;

/// Bytes of memory of the largest rank, and bytes a step that one rank hands to each collective. Fill with pfc_plan_report_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_plan_report {
    /// sizeof(pfc_plan_report), set by pfc_plan_report_init.
    pub struct_size: u64,
    /// Rows of W on the rank that owns most.
    pub shard_rows: u64,
    /// Classes in a step's sample on that rank: int(sample_rate * rows) or, if more, the batch's positives at most.
    pub sample_capacity: u64,
    /// W.
    pub weight_bytes: u64,
    /// Optimizer state and, for dense rows, the rows' last steps.
    pub state_bytes: u64,
    /// Embeddings, their gradient and the accumulators.
    pub activation_bytes: u64,
    /// The softmax's numerators P that are kept from forward to update.
    pub probability_bytes: u64,
    /// All of these.
    pub total_bytes: u64,
    /// Labels and statuses (all_gather), a step.
    pub labels_bytes: u64,
    /// Embeddings (all_gather), a step.
    pub embeddings_bytes: u64,
    /// Row sums and target logits, or loss and statuses (all_reduce), a step.
    pub sums_bytes: u64,
    /// Embeddings' gradient (reduce_scatter), a step.
    pub grad_embeddings_bytes: u64,
    /// Class centres' gradient (all_reduce, replicated), a step.
    pub grad_centers_bytes: u64,
    /// All of these: what pfc_comm_traffic counts in a step.
    pub traffic_bytes: u64,
}

sized!(
    pfc_plan_report,
    pfc_plan_report {
        struct_size: 0,
        shard_rows: 0,
        sample_capacity: 0,
        weight_bytes: 0,
        state_bytes: 0,
        activation_bytes: 0,
        probability_bytes: 0,
        total_bytes: 0,
        labels_bytes: 0,
        embeddings_bytes: 0,
        sums_bytes: 0,
        grad_embeddings_bytes: 0,
        grad_centers_bytes: 0,
        traffic_bytes: 0,
    }
);

/// Fills the struct with zeros and its size; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_plan_report_init_sized(report: *mut pfc_plan_report, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(report, struct_size))
}

/// Predicts memory and traffic of a head on the CPU device, before there is one. Not collective.
///
/// Precision auto counts as the CPU's, f32, of which gather_dtype auto is f32. The traffic of a CUDA device, for which precision
/// auto is half and gather_dtype auto then f16, is that of the precision it computes in, PFC_PRECISION_HALF or PFC_PRECISION_F32,
/// for a batch of max_batch: it hands over as much, whatever the batch.
///
/// @param options the head
/// @param ranks number of ranks
/// @param batch rows on each rank
/// @param report prepared with pfc_plan_report_init; written
#[no_mangle]
pub unsafe extern "C" fn pfc_plan(
    options: *const pfc_head_options,
    ranks: u32,
    batch: u64,
    report: *mut pfc_plan_report,
) -> pfc_status {
    boundary(|| {
        let plan = plan::plan(&read_sized(options)?.to_options()?, ranks, batch)?;
        let value = pfc_plan_report {
            struct_size: 0,
            shard_rows: plan.shard_rows,
            sample_capacity: plan.sample_capacity,
            weight_bytes: plan.memory.weight,
            state_bytes: plan.memory.state,
            activation_bytes: plan.memory.activation,
            probability_bytes: plan.memory.probability,
            total_bytes: plan.memory.total(),
            labels_bytes: plan.traffic.labels,
            embeddings_bytes: plan.traffic.embeddings,
            sums_bytes: plan.traffic.sums,
            grad_embeddings_bytes: plan.traffic.grad_embeddings,
            grad_centers_bytes: plan.traffic.grad_centers,
            traffic_bytes: plan.traffic.total(),
        };
        write_sized(report, value)
    })
}
