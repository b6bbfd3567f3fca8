//! Prediction of the memory and the traffic of a head.

use super::boundary;
use super::status::pfc_status;
use super::types::{init_sized, pfc_head_options, read_sized, sized, write_sized, Sized64};
use crate::plan;

/// Bytes of memory on the rank that owns most, and bytes that one rank passes to each collective in a step. Prepare with
/// pfc_plan_report_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_plan_report {
    /// sizeof(pfc_plan_report), set by pfc_plan_report_init.
    pub struct_size: u64,
    /// Rows of W on the rank that owns most.
    pub shard_rows: u64,
    /// Most classes that a step's sample can have on that rank: the larger of int(sample_rate * rows) and the most positives that a
    /// batch can have.
    pub sample_capacity: u64,
    /// Bytes of W.
    pub weight_bytes: u64,
    /// Bytes of optimizer state and, for dense row updates, the number of the last update of each row.
    pub state_bytes: u64,
    /// Bytes of embeddings, their gradient and the accumulators.
    pub activation_bytes: u64,
    /// Bytes of the softmax numerators P that are kept from forward to update.
    pub probability_bytes: u64,
    /// The sum of the four fields before.
    pub total_bytes: u64,
    /// Message `labels`: labels and statuses, an all-gather.
    pub labels_bytes: u64,
    /// Message `embeddings`, an all-gather; 0 when replicated.
    pub embeddings_bytes: u64,
    /// Message `sums`: row sums and target logits; when replicated `replicated sums`: losses and statuses. An all-reduce.
    pub sums_bytes: u64,
    /// Message `gradient`: of the embeddings, a reduce-scatter; 0 when replicated.
    pub grad_embeddings_bytes: u64,
    /// Message `center gradient`, an all-reduce; 0 when sharded.
    pub grad_centers_bytes: u64,
    /// The sum of the five messages: what pfc_comm_traffic counts in a step.
    pub traffic_bytes: u64,
    /// The file of the rank that owns most, for residency file; else 0.
    pub storage_bytes: u64,
    /// Of total_bytes those in the host's memory: all of them on a CPU; on a GPU class centers and state for residency host, else 0.
    pub host_bytes: u64,
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
        storage_bytes: 0,
        host_bytes: 0,
    }
);

/// Fills the struct with zeros and its size; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_plan_report_init_sized(report: *mut pfc_plan_report, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(report, struct_size))
}

/// Predicts the memory and the traffic of a head on the CPU device, before it is made. Not collective.
///
/// Precision auto is f32. With max_batch 0 memory and traffic are those of a head that has
/// had such a batch. What pfc_head_accumulate takes is not in it.
///
/// @param options the options of the head
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
    boundary(|| write_sized(report, plan::plan(&read_sized(options)?.to_options()?, ranks, batch)?.into()))
}

/// Predicts the memory and the traffic of a head on a CUDA device, which need not be there. Not collective.
///
/// Precision auto is half. Traffic is that of max_batch rows: a CUDA device always passes as many to the collectives. The head fits if
/// total_bytes - host_bytes is at most gpu_memory. Sizes are those on a GPU of 132 multiprocessors, such as an H100; the kernels and the
/// driver take some hundred MB beside them.
///
/// @param options the options of the head
/// @param ranks number of ranks, each with a GPU of its own
/// @param batch rows on each rank
/// @param gpu_memory bytes of the GPU that are free for the head. With workspace_limit 0 the workspace may have three quarters of
///   what class centers and state leave of it: softmax numerators that do not fit are computed twice, by chunks. Then
///   probability_bytes is one chunk. With 0 the report is of the least that a head can do with. A workspace_limit takes its place.
/// @param report prepared with pfc_plan_report_init; written
/// @return INVALID_ARGUMENT for options that no head can have, no ranks, a batch beyond max_batch, a workspace_limit that is too
///   small or more rows or classes than a GPU numbers in 32 bits; UNSUPPORTED for options that no CUDA device takes
#[no_mangle]
pub unsafe extern "C" fn pfc_plan_cuda(
    options: *const pfc_head_options,
    ranks: u32,
    batch: u64,
    gpu_memory: u64,
    report: *mut pfc_plan_report,
) -> pfc_status {
    boundary(|| write_sized(report, plan::plan_cuda(&read_sized(options)?.to_options()?, ranks, batch, gpu_memory)?.into()))
}

impl From<plan::Plan> for pfc_plan_report {
    fn from(plan: plan::Plan) -> pfc_plan_report {
        pfc_plan_report {
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
            storage_bytes: plan.storage,
            host_bytes: plan.host,
        }
    }
}
