//! Heads.
//!
//! A STEP is pfc_head_forward, pfc_head_backward and pfc_head_update, in this order; pfc_head_step is all three in one call.
//! pfc_head_prepare may begin the next step early. pfc_head_set_sample replaces the draw of its sample. If pfc_head_update is never
//! called, the class centers stay as they are. pfc_head_accumulate in its place leaves the update to a later step.
//! pfc_head_forward_with takes margins and weights of the rows' own. All ranks make the same calls in the same order.
//!
//! The ranks exchange messages, which these names stand for. Sharded: `labels` (all-gather), `embeddings` (all-gather), `sums`
//! (all-reduce), `gradient` (reduce-scatter). Replicated: `labels`, `replicated sums` (all-reduce), `center gradient` (all-reduce).
//!
//! ERRORS BEFORE THE UPDATE. LABEL, NOT_FINITE, INVALID_ARGUMENT, OUT_OF_MEMORY and, with residency file, IO while rows are read in
//! pfc_head_prepare, pfc_head_forward and pfc_head_step update nothing and leave the head usable. Every rank gets an error: the same status, or REMOTE where only another
//! rank's own arguments were wrong. pfc_head_backward and pfc_head_update exchange no status: a wrong argument there is an error on
//! its own rank only. If the ranks have then done different numbers of updates, the next step is MISMATCH on all of them.
//!
//! ERRORS THAT END A HEAD. After COMM, TIMEOUT, ABORTED, DEVICE, PANIC, any failure inside an update or among the rows of a
//! pfc_head_load, or a MISMATCH of steps or operations, the head is POISONED and its communicator is aborted, so that no rank waits for it. Free both. (A MISMATCH of the
//! ids of pfc_head_set_sample, of classes, or in pfc_head_top_k or pfc_head_metrics leaves the head usable.) If nothing failed inside an update,
//! a poisoned head on a CPU device still gives its rows: pfc_head_read_centers, pfc_head_read_state, pfc_head_read_progress.
//!
//! WHAT RANKS MUST HAVE IN COMMON. Before a step the ranks compare which head and which call it is, how many samples they have drawn
//! and updates they have done, the learning rate and the loss weight (of pfc_head_step its own; otherwise those of the update and
//! the backward before), the factor of the last update, how many steps have been accumulated since, and, replicated, the rows that
//! pfc_head_write_centers and pfc_head_write_state have written. A difference is MISMATCH on all ranks.
//!
//! ON A CUDA DEVICE the head enqueues its work on the device's stream. pfc_head_prepare does not wait for the other ranks' labels:
//! LABEL, MISMATCH and REMOTE come from the forward that follows. If this rank's own arguments were wrong, pfc_head_prepare says so
//! at once, and the rank still has to call pfc_head_forward, as the other ranks do.
//!
//! A LOSS IN DEVICE MEMORY. In one step all ranks keep the loss in host memory, or all in device memory. With a loss in device
//! memory no call waits for the GPU, but for a host argument of more than 64 KiB. A step that fails then becomes a no-op on every rank: its loss is NaN, its gradients are
//! zeros, it updates nothing, and the steps after it go on. pfc_head_wait reports it once on every rank, with the step's number. A
//! rank whose own arguments were wrong also gets the error from pfc_head_forward. The other ranks go on with the step, so this rank
//! must go on too: its pfc_head_backward and pfc_head_update take part in the exchanges, write nothing and return that error again.
//! If the loss pointer itself is invalid, this rank uses the location that the other ranks chose; its pfc_head_forward waits for
//! theirs.

mod arguments;
pub(super) mod locked;

use std::ffi::c_char;
use std::sync::atomic::AtomicBool;
use std::sync::Mutex;

pub(super) use self::arguments::step_input;
use self::arguments::{label_argument, rows, state_tensor};
use self::locked::{last_error, locked, with_head, with_outside};
use super::comm::{abort_on_panic, pfc_comm};
use super::device::pfc_device;
use super::status::{pfc_status, ErrorText};
use super::types::{matrix, pfc_head_options, pfc_matrix, read_sized};
use super::{array, boundary, output, required};
use crate::ensure;
use crate::head::{require_host, Head, HeadOutside, Labels, LossTarget, Progress, StateTensor};

/// SGD: m. AdamW: the first moment.
pub const PFC_STATE_MOMENTUM: i32 = 1;
/// AdamW: the second moment.
pub const PFC_STATE_SECOND_MOMENT: i32 = 2;

/// A classification head: a shard of the class centers, their optimizer state, and the step that trains them.
pub struct pfc_head {
    head: Mutex<Head>,
    /// For calls that do not wait for the lock.
    outside: HeadOutside,
    /// A call that needs the head alone is inside.
    busy: AtomicBool,
    /// A forked child must not wait for a lock that a thread of its parent held.
    process: u32,
    /// Of the last call on this head that failed, on whatever thread.
    last_error: Mutex<ErrorText>,
}

/// Makes a head. Collective.
///
/// The start value of a class center depends on the seed, the class and the column alone, not on the number of ranks. The ranks
/// compare their options: a difference is MISMATCH on every rank, with the field and both values.
///
/// @param device where the head computes; the head keeps a reference
/// @param comm the ranks; the head keeps a reference; several heads may share one communicator,
///   if all ranks call them in the same order, one thread at a time
/// @param options borrowed for the call
/// @param out the head; free with pfc_head_free
#[no_mangle]
pub unsafe extern "C" fn pfc_head_create(
    device: *const pfc_device,
    comm: *mut pfc_comm,
    options: *const pfc_head_options,
    out: *mut *mut pfc_head,
) -> pfc_status {
    boundary(|| {
        let comm = required("comm", comm)?.comm.clone();
        // What is wrong on this rank alone still has to be told to the others, so it travels as an error.
        let request = (|| {
            let device = required("device", device)?.device.clone();
            output("out", out)?;
            Ok((device, read_sized(options)?.to_options()?))
        })();
        let head = abort_on_panic(&comm, || Head::create(comm.clone(), request))?;
        let (process, outside) = (head.process(), head.outside());
        let handle = pfc_head {
            head: Mutex::new(head),
            outside,
            busy: AtomicBool::new(false),
            process,
            last_error: Mutex::new(ErrorText::EMPTY),
        };
        *output("out", out)? = Box::into_raw(Box::new(handle));
        Ok(())
    })
}

/// Frees the head. NULL is fine. Not collective. A save that pfc_head_save_start has begun is given up, which may wait for the disk.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_free(head: *mut pfc_head) {
    if !head.is_null() {
        boundary(|| {
            drop(Box::from_raw(head));
            Ok(())
        });
    }
}

/// Copies the text of the last error of a call on this head, on whatever thread that call was, cut to `size` bytes including its
/// terminating zero. For languages whose code moves between threads. Any thread, also while another one uses the head; waits for no
/// other call. Not collective.
///
/// Calls that succeed leave the text as it is. pfc_last_error still has the text of this thread's last error, and alone that of a
/// pfc_head_create, of a NULL head and of a head in a process that fork() has made.
///
/// @param buffer written, or NULL to ask for the size only
/// @param size bytes at buffer
/// @return bytes of the whole text, including its terminating zero: 1 before the first error; 0, with nothing written, if head is
///   NULL or was made by the parent of this process
#[no_mangle]
pub unsafe extern "C" fn pfc_head_error(head: *const pfc_head, buffer: *mut c_char, size: u64) -> u64 {
    last_error(head).map_or(0, |text| text.copy_to(buffer, size))
}

/// Begins the next step early: gathers the labels and draws the sample. Collective. Optional; any time after the last forward.
///
/// The step gives the same bits as without this call. A second call before forward replaces the first one; the first one's draw (or
/// the ids of pfc_head_set_sample) is used up.
///
/// @param labels class ids, 0 to num_classes - 1 or ignore_label; copied
/// @param batch rows on this rank, at most max_batch unless that is 0; may differ between ranks and may be 0
#[no_mangle]
pub unsafe extern "C" fn pfc_head_prepare(head: *mut pfc_head, labels: *const i64, batch: u64) -> pfc_status {
    with_head(head, |head| head.prepare(label_argument(labels, batch)))
}

/// Sets the class ids of the next sample, instead of a draw. Not collective. Positives that are missing are added.
///
/// The ids serve one step. They are used up when that step's labels have been accepted (CUDA: when they have been handed over),
/// even if the step fails later.
///
/// CUDA: with more ids than a draw can have, the head allocates memory and waits: pfc_head_prepare or pfc_head_forward waits for
/// the GPU, and pfc_head_update of a replicated head waits for the other ranks' forwards.
///
/// @param ids ascending, without repeats, all in this rank's shard; copied. Replicated: the same on all ranks, which forward
///   checks. CUDA: in host memory or in device memory; the call waits for ids in device memory.
/// @param count number of ids
#[no_mangle]
pub unsafe extern "C" fn pfc_head_set_sample(head: *mut pfc_head, ids: *const i64, count: u64) -> pfc_status {
    with_head(head, |head| {
        array("ids", ids, count)?;
        let rows = head.shard().rows;
        ensure!(
            count <= rows,
            InvalidArgument,
            "count must be at most {rows}, the classes of the shard, got {count} (rank {})",
            head.rank()
        );
        head.set_sample(Labels { data: ids, count: count as usize })
    })
}

/// Phases 1 to 4 of a step, up to the loss. Collective.
///
/// A second forward before pfc_head_update abandons the step before it, which then updates nothing.
///
/// @param embeddings batch x embedding_dim, f32, f16 or bf16; not normalized
/// @param labels one for each row; NULL: those of pfc_head_prepare
/// @param loss written: the mean over the valid rows of all ranks, the same on every rank. CUDA: in host memory, or in device
///   memory, and then the call does not wait.
/// @return LABEL or NOT_FINITE on all ranks, with nothing updated and the head usable. With a loss in device memory they come from
///   pfc_head_wait.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_forward(
    head: *mut pfc_head,
    embeddings: *const pfc_matrix,
    labels: *const i64,
    loss: *mut f64,
) -> pfc_status {
    with_head(head, |head| {
        let (target, usable) = head.loss_target(loss);
        let input = (|| {
            usable?;
            step_input(head, embeddings, labels)
        })();
        let value = head.forward(input, target)?;
        if let LossTarget::Host = target {
            *loss = value;
        }
        Ok(())
    })
}

/// Phase 5 for the embeddings: writes their gradient. Collective. After pfc_head_forward.
///
/// @param loss_weight multiplies the loss, so also this step's gradient of the class centers; 1 for one head, 1/k for k
///   micro-batches
/// @param loss_scale multiplies grad_embeddings only, as the loss scale of mixed precision
/// @param grad_embeddings batch x embedding_dim, written: the gradient times loss_weight * loss_scale * gradient_scale, rounded to
///   its dtype. A wrong matrix is an error on this rank only, which still takes part in the exchange; pfc_head_update may follow. A
///   wrong loss_weight or loss_scale abandons the step.
/// @return with a loss in device memory, on a rank whose own forward failed: that error, after its part in the exchange
#[no_mangle]
pub unsafe extern "C" fn pfc_head_backward(
    head: *mut pfc_head,
    loss_weight: f64,
    loss_scale: f64,
    grad_embeddings: *const pfc_matrix,
) -> pfc_status {
    with_head(head, |head| {
        let gradient = matrix("grad_embeddings", grad_embeddings, head.embedding_dim());
        head.backward(loss_weight, loss_scale, gradient)
    })
}

/// Phase 5 for the class centers: updates the sampled rows. After pfc_head_backward. Collective when replicated.
///
/// pfc_head_update_with also multiplies the gradient.
///
/// @param learning_rate 0 or more; a wrong one changes nothing, and the call may be repeated
/// @return with a loss in device memory, on a rank whose own forward failed: that error, after its part in the exchange
#[no_mangle]
pub unsafe extern "C" fn pfc_head_update(head: *mut pfc_head, learning_rate: f64) -> pfc_status {
    with_head(head, |head| head.update(learning_rate))
}

/// Forward, backward (loss_weight 1, loss_scale 1) and update in one call. Collective. The reduce-scatter of the embeddings'
/// gradient runs beside the update.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_step(
    head: *mut pfc_head,
    embeddings: *const pfc_matrix,
    labels: *const i64,
    learning_rate: f64,
    grad_embeddings: *const pfc_matrix,
    loss: *mut f64,
) -> pfc_status {
    with_head(head, |head| {
        let (target, usable) = head.loss_target(loss);
        let input = (|| {
            usable?;
            let gradient = matrix("grad_embeddings", grad_embeddings, head.embedding_dim())?;
            Ok((step_input(head, embeddings, labels)?, gradient))
        })();
        let value = head.step(input, learning_rate, target)?;
        if let LossTarget::Host = target {
            *loss = value;
        }
        Ok(())
    })
}

/// Waits for the device and reports what failed since the last call.
///
/// CPU: every call has returned its own status already; this one returns OK, POISONED or FORKED.
///
/// CUDA: for steps with a loss in device memory, returns the error of the first step that became a no-op. The text has the number
/// of that step, which counts draws from 0, and how many steps failed after it. All ranks get the same status; if one rank's own
/// arguments were wrong, that rank gets its error and the others get REMOTE. Each failure is reported once.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_wait(head: *mut pfc_head) -> pfc_status {
    with_head(head, |head| head.wait())
}

/// Finds the k class centers nearest to each embedding, over all classes of all ranks. Collective. For evaluation; changes nothing.
/// Each array may be in host memory or in the CUDA device's memory. Up to k = 128 a CUDA device searches by itself; a larger k is
/// searched on the host.
///
/// @param embeddings rows x embedding_dim; rows may differ between ranks, may be 0 and need not keep to max_batch
/// @param k 1 to num_classes, equal on all ranks
/// @param ids rows x k, written: class ids, nearest first; equal cosines in ascending order of id
/// @param cosines rows x k, written
#[no_mangle]
pub unsafe extern "C" fn pfc_head_top_k(
    head: *mut pfc_head,
    embeddings: *const pfc_matrix,
    k: u64,
    ids: *mut i64,
    cosines: *mut f32,
) -> pfc_status {
    with_head(head, |head| {
        let queries = matrix("embeddings", embeddings, head.embedding_dim()).and_then(|queries| {
            // A k that no head has is refused as such.
            let places = (queries.rows as u64).saturating_mul(k.min(1 << 40));
            array("ids", ids, places)?;
            array("cosines", cosines, places)?;
            if queries.rows > 0 {
                head.check_reachable("ids", ids)?;
                head.check_reachable("cosines", cosines)?;
            }
            Ok(queries)
        });
        let found = head.top_k(queries, k)?;
        head.write_values("ids", ids, &found.ids)?;
        head.write_values("cosines", cosines, &found.cosines)
    })
}

/// The class ids of this rank's last sample, ascending. After pfc_head_prepare or pfc_head_forward. On a CPU device it does not
/// wait for a step that another thread is in; on a CUDA device it does.
///
/// @param ids written, in host memory or in the CUDA device's memory; NULL to ask for the count only
/// @param capacity number of ids that fit
/// @param count written: number of ids in the sample
#[no_mangle]
pub unsafe extern "C" fn pfc_head_sample_ids(head: *const pfc_head, ids: *mut i64, capacity: u64, count: *mut u64) -> pfc_status {
    with_outside(head, |handle| {
        require_host(&*handle.outside.device, handle.outside.rank, "count", count)?;
        let count = output("count", count)?;
        let room = |found: usize| {
            ensure!(
                ids.is_null() || found as u64 <= capacity,
                InvalidArgument,
                "capacity must be at least {found}, the ids of the sample, got {capacity} (rank {})",
                handle.outside.rank
            );
            Ok(found as u64)
        };
        let known = handle.outside.with_last_sample(|sample| {
            let Some(sample) = sample else { return Ok(None) };
            let found = room(sample.count)?;
            if !ids.is_null() {
                array("ids", ids, found)?;
                sample.ids().enumerate().for_each(|(i, id)| *ids.add(i) = id);
            }
            Ok(Some(found))
        })?;
        if let Some(found) = known {
            *count = found;
            return Ok(());
        }
        let sample = locked(handle, |head| {
            let sample = head.sample_ids()?;
            if !ids.is_null() && room(sample.len()).is_ok() {
                array("ids", ids, sample.len() as u64)?;
                head.write_values("ids", ids, &sample)?;
            }
            Ok(sample)
        })?;
        *count = room(sample.len())?;
        Ok(())
    })
}

/// The classes this rank owns: first to first + count - 1. Does not wait for a step.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_shard(head: *const pfc_head, first: *mut u64, count: *mut u64) -> pfc_status {
    with_outside(head, |handle| {
        let HeadOutside { device, rank, .. } = &handle.outside;
        require_host(&**device, *rank, "first", first)?;
        require_host(&**device, *rank, "count", count)?;
        let (first, count) = (output("first", first)?, output("count", count)?);
        let shard = handle.outside.shard();
        (*first, *count) = (shard.first, shard.rows);
        Ok(())
    })
}

/// Reads class centers of this rank's shard as of the last update. Not collective. With dense row updates the rows are first
/// replayed.
///
/// @param first id of the first class
/// @param count number of classes
/// @param centers count x embedding_dim, written. CUDA: into device memory the copy is only enqueued, on the stream that the device
///   was made with; the rows are valid once pfc_head_wait has returned PFC_OK.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_read_centers(
    head: *mut pfc_head,
    first: u64,
    count: u64,
    centers: *const pfc_matrix,
) -> pfc_status {
    rows(head, first, count, "centers", centers, |head, rows| head.read_rows(StateTensor::Centers, first, &rows))
}

/// Overwrites class centers of this rank's shard. Not collective. Between forward and update it abandons the step, so then call it
/// on all ranks or on none.
///
/// @param centers count x embedding_dim, all finite, which is checked before any row is written
/// @return after an error the rows and a step under way are unchanged, except after DEVICE, which makes the head POISONED
#[no_mangle]
pub unsafe extern "C" fn pfc_head_write_centers(
    head: *mut pfc_head,
    first: u64,
    count: u64,
    centers: *const pfc_matrix,
) -> pfc_status {
    rows(head, first, count, "centers", centers, |head, rows| head.write_rows(StateTensor::Centers, first, &rows))
}

/// Reads optimizer state, as pfc_head_read_centers does.
///
/// @param tensor PFC_STATE_*
#[no_mangle]
pub unsafe extern "C" fn pfc_head_read_state(
    head: *mut pfc_head,
    tensor: i32,
    first: u64,
    count: u64,
    state: *const pfc_matrix,
) -> pfc_status {
    rows(head, first, count, "state", state, |head, rows| head.read_rows(state_tensor(tensor)?, first, &rows))
}

/// Overwrites optimizer state, as pfc_head_write_centers does.
///
/// @param tensor PFC_STATE_*
#[no_mangle]
pub unsafe extern "C" fn pfc_head_write_state(
    head: *mut pfc_head,
    tensor: i32,
    first: u64,
    count: u64,
    state: *const pfc_matrix,
) -> pfc_status {
    rows(head, first, count, "state", state, |head, rows| head.write_rows(state_tensor(tensor)?, first, &rows))
}

/// Reads how far the head is, which with the class centers and their state is all there is to save. Not collective.
///
/// To save a head, read its progress, its class centers and its state between two steps. To go on, on as many ranks with the same
/// options, write the rows first and then the progress: the steps that follow then give the same bits as those of the head that was
/// saved. With dense row updates this call brings every row up to date: the head that was saved must have made it before it went on,
/// and on all ranks of a replicated head or on none, else the next step is MISMATCH. Rows in bf16 are rounded then: read them after it.
///
/// @param draws written: samples drawn, not counting that of a pfc_head_prepare that no forward has followed yet
/// @param updates written: updates done; CUDA: not counting steps that failed
#[no_mangle]
pub unsafe extern "C" fn pfc_head_read_progress(head: *mut pfc_head, draws: *mut u64, updates: *mut u64) -> pfc_status {
    with_head(head, |head| {
        head.require_host("draws", draws)?;
        head.require_host("updates", updates)?;
        let (draws, updates) = (output("draws", draws)?, output("updates", updates)?);
        let progress = head.read_progress()?;
        (*draws, *updates) = (progress.draws, progress.updates);
        Ok(())
    })
}

/// Goes on from the progress of another head. Not collective; ranks whose progress differs get MISMATCH in the next step.
///
/// The rows keep their values, which from now on are those after as many updates. A pfc_head_prepare and a step under way are
/// abandoned, so then call it on all ranks or on none.
///
/// @param draws of pfc_head_read_progress, below 2^56
/// @param updates of pfc_head_read_progress, below 2^32
#[no_mangle]
pub unsafe extern "C" fn pfc_head_write_progress(head: *mut pfc_head, draws: u64, updates: u64) -> pfc_status {
    with_head(head, |head| head.write_progress(Progress { draws, updates }))
}
