//! Heads.
//!
//! A step is pfc_head_forward, pfc_head_backward and pfc_head_update, in this order, or pfc_head_step, which is all three.
//! pfc_head_prepare may begin a step early, pfc_head_set_sample replaces its draw. Without pfc_head_update the class centres stay as
//! they are.
//!
//! LABEL, NOT_FINITE, INVALID_ARGUMENT and OUT_OF_MEMORY in pfc_head_prepare, _forward and _step leave the head usable and nothing
//! updated; the other ranks get the same status, or REMOTE. pfc_head_backward and _update have no message for a rank's own mistake: it
//! is that rank's alone, and ranks that then differ in their steps get MISMATCH in the next one. After that, after COMM, TIMEOUT,
//! ABORTED, DEVICE or PANIC, or a failure inside an update, the head is POISONED and its communicator aborted: free both.
//!
//! On a CUDA device work is enqueued on its stream. pfc_head_prepare does not wait for the other ranks' labels: LABEL, MISMATCH and
//! REMOTE come from the forward that follows. What is wrong with a rank's own arguments it hears at once, and the others with that
//! forward, which it has to call as they do.
//!
//! All ranks keep the loss of a step on the host, or all in the device's memory. With a loss in the device's memory no call waits, and
//! a failed step is known to nobody until pfc_head_wait tells it, once and with the step's number, on all ranks: its gradients are
//! zeros, its loss is NaN, it updates nothing, and the steps after it go on. A rank whose own arguments were wrong hears so from
//! pfc_head_forward, too; but its peers go on with the step, and it has to make the calls that they make: pfc_head_backward and
//! pfc_head_update then take part in what the others wait for, write nothing and give that error again. A rank whose loss pointer
//! is what was wrong does as its peers do, too: its pfc_head_forward waits for theirs, to hear where they have their loss.

use std::ffi::c_char;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::comm::pfc_comm;
use super::device::pfc_device;
use super::status::{fail, pfc_status, PFC_OK};
use super::types::{init_sized, matrix, pfc_head_options, pfc_matrix, read_sized, sized, write_sized, Sized64};
use super::{boundary, output, panicked, required};
use crate::head::{Head, Labels, LossTarget, StateTensor, StepInput};
use crate::{ensure, error, Error, Result, Status};

/// SGD: m. AdamW: the first moment.
pub const PFC_STATE_MOMENTUM: i32 = 1;
/// AdamW: the second moment.
pub const PFC_STATE_SECOND_MOMENT: i32 = 2;

/// A classification head: a shard of the class centres, their optimizer state, and the step that trains them.
pub struct pfc_head {
    head: Mutex<Head>,
    /// A call that needs the head alone is inside.
    busy: AtomicBool,
    /// A forked child must not wait for a lock that a thread of its parent held.
    process: u32,
}

/// What pfc_head_metrics tells of the last step. Fill with pfc_metrics_init.
///
/// Seconds are the calling thread's. On a CUDA device they are what it takes to enqueue a phase, not to run it, beside what a
/// communicator waits for; with a loss in host memory seconds_reduce has the wait for all that was enqueued up to the loss.
/// PFC_TRACE tells when the device ran what.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_metrics {
    /// sizeof(pfc_metrics), set by pfc_metrics_init.
    pub struct_size: u64,
    /// Updates done.
    pub updates: u64,
    /// Samples drawn.
    pub samples: u64,
    /// Rows of the global batch.
    pub rows: u64,
    /// Those whose label is not ignore_label.
    pub valid_rows: u64,
    /// Classes in this rank's sample.
    pub sample_size: u64,
    /// Mean loss of the valid rows.
    pub loss: f64,
    /// Share of the valid rows whose target cosine, without margin, is the largest of the sample.
    pub top1: f64,
    /// Mean target cosine, without margin, of the valid rows.
    pub mean_target_cosine: f64,
    /// L2 norm of the gradient of all ranks' embeddings as handed out; 0 before backward.
    pub grad_embeddings_norm: f64,
    /// L2 norm of the gradient of all ranks' sampled class centres; 0 before update.
    pub grad_centers_norm: f64,
    /// Seconds this rank spent in phase 1: gathering labels and embeddings.
    pub seconds_gather: f64,
    /// Phase 2: sampling.
    pub seconds_sample: f64,
    /// Phases 3 and 4: rows, cosines, numerators, P @ W^.
    pub seconds_forward: f64,
    /// The all-reduce of the sums and the loss.
    pub seconds_reduce: f64,
    /// Phase 5: the embeddings' gradient, its reduce-scatter included (in pfc_head_step that runs beside the update, and is counted there).
    pub seconds_backward: f64,
    /// The class centres' gradient and the optimizer.
    pub seconds_update: f64,
}

sized!(
    pfc_metrics,
    pfc_metrics {
        struct_size: 0,
        updates: 0,
        samples: 0,
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
    }
);

/// For pfc_head_save. Fields come with checkpoints.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_save_options {
    /// sizeof(pfc_save_options).
    pub struct_size: u64,
}

/// For pfc_head_load. Fields come with checkpoints.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_load_options {
    /// sizeof(pfc_load_options).
    pub struct_size: u64,
}

/// Runs a call on a head that needs it alone.
unsafe fn with_head(head: *mut pfc_head, body: impl FnOnce(&mut Head) -> Result<()>) -> pfc_status {
    let handle = match required("head", head) {
        Ok(handle) => handle,
        Err(error) => return fail(&error),
    };
    if let Err(error) = own_process(handle) {
        return fail(&error);
    }
    if handle.busy.swap(true, Ordering::Acquire) {
        return fail(&Error::new(Status::InvalidArgument, "head is in use by another thread"));
    }
    let status = with_locked(handle.head.lock().unwrap_or_else(PoisonError::into_inner), body);
    handle.busy.store(false, Ordering::Release);
    status
}

fn own_process(handle: &pfc_head) -> Result<()> {
    let (made_in, this) = (handle.process, std::process::id());
    ensure!(made_in == this, Forked, "the head was made in process {made_in} and cannot be used in process {this}");
    Ok(())
}

/// Runs a call that several threads may make at once: they take turns.
unsafe fn with_shared_head(head: *const pfc_head, body: impl FnOnce(&Head) -> Result<()>) -> pfc_status {
    match required("head", head) {
        Ok(handle) => match own_process(handle) {
            Ok(()) => with_locked(handle.head.lock().unwrap_or_else(PoisonError::into_inner), |head| body(head)),
            Err(error) => fail(&error),
        },
        Err(error) => fail(&error),
    }
}

/// A panic poisons the head and aborts its communicator, so that the other ranks do not wait for it.
fn with_locked(mut guard: MutexGuard<'_, Head>, body: impl FnOnce(&mut Head) -> Result<()>) -> pfc_status {
    match catch_unwind(AssertUnwindSafe(|| body(&mut guard))) {
        Ok(Ok(())) => PFC_OK,
        Ok(Err(error)) => fail(&guard.name_rank(&error)),
        Err(panic) => {
            let error = panicked(panic.as_ref());
            guard.poison(&error);
            fail(&error)
        }
    }
}

/// Fills the struct with zeros and its size; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_metrics_init_sized(metrics: *mut pfc_metrics, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(metrics, struct_size))
}

/// Makes a head: its shard gets start values that depend on seed, class and column alone, whatever the number of ranks.
///
/// Collective. All ranks compare their options: a difference is MISMATCH on every rank.
///
/// @param device where it computes; the head keeps a reference
/// @param comm the ranks; the head keeps a reference; several heads may share it
/// @param options what it is; borrowed for the call
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
        let head = match catch_unwind(AssertUnwindSafe(|| Head::create(comm.clone(), request))) {
            Ok(head) => head?,
            Err(panic) => {
                let error = panicked(panic.as_ref());
                comm.abort(&error);
                return Err(error);
            }
        };
        let process = head.process();
        *output("out", out)? = Box::into_raw(Box::new(pfc_head { head: Mutex::new(head), busy: AtomicBool::new(false), process }));
        Ok(())
    })
}

/// Gives the head back. NULL is fine. Not collective.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_free(head: *mut pfc_head) {
    if !head.is_null() {
        boundary(|| {
            drop(Box::from_raw(head));
            Ok(())
        });
    }
}

/// Begins the next step early: gathers the labels and draws the sample. Collective; optional; any time after the last forward.
///
/// The step that follows gives the same bits as without it. A second call before forward replaces the first, which has drawn its
/// sample (or taken the ids of pfc_head_set_sample) all the same.
///
/// @param labels class ids, 0 to num_classes - 1 or ignore_label; copied
/// @param batch rows on this rank, at most max_batch; may differ between ranks and may be 0
#[no_mangle]
pub unsafe extern "C" fn pfc_head_prepare(head: *mut pfc_head, labels: *const i64, batch: u64) -> pfc_status {
    with_head(head, |head| head.prepare(label_argument(labels, batch)))
}

/// Gives the ids that the next sample consists of instead of a draw; positives missing from it are added. Not collective. They are
/// used up once a step's labels were good (CUDA: once they were given), whatever becomes of that step.
///
/// CUDA: more ids than any draw has take memory and wait: the step's pfc_head_prepare or _forward for the device, and a replicated
/// head's pfc_head_update for the ranks' forwards.
///
/// @param ids ascending, without repeats, of this rank's shard (replicated: the same on all ranks, checked in forward); copied;
///   CUDA: in host memory, or in the device's, and then waited for
/// @param count ids
#[no_mangle]
pub unsafe extern "C" fn pfc_head_set_sample(head: *mut pfc_head, ids: *const i64, count: u64) -> pfc_status {
    with_head(head, |head| {
        ensure!(
            !ids.is_null() || count == 0,
            InvalidArgument,
            "ids must not be NULL for a count of {count} (rank {})",
            head.rank()
        );
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
/// Called again before pfc_head_update it abandons the step before: nothing of that one is updated.
///
/// @param embeddings batch x embedding_dim, f32, f16 or bf16; not normalised
/// @param labels one for each row; NULL: those of pfc_head_prepare
/// @param loss written: the mean over the valid rows of all ranks, the same on every rank; CUDA: in host memory, or in the device's,
///   and then nothing is waited for
/// @return LABEL or NOT_FINITE on all ranks, with nothing updated and the head usable; with a loss in the device's memory they come
///   from pfc_head_wait
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
/// @param loss_weight multiplies the loss, for this step's class centres too; 1 for one head, 1/k for k micro-batches
/// @param loss_scale multiplies grad_embeddings only, as AMP has it
/// @param grad_embeddings written: batch x embedding_dim, times loss_weight * loss_scale * gradient_scale, rounded to its dtype. A
///   wrong one is an error on this rank alone, after its part in the exchange: pfc_head_update may follow. A wrong factor abandons the step.
/// @return with a loss in the device's memory, on a rank whose own forward failed: that failure, after its part in the exchange
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

/// Phase 5 for the class centres: updates the sampled rows. After pfc_head_backward. Collective when replicated.
///
/// With a loss in the device's memory, on a rank whose own forward failed: gives that failure, after its part in the exchange.
///
/// @param learning_rate 0 or more; a wrong one changes nothing, and the call may be made again
#[no_mangle]
pub unsafe extern "C" fn pfc_head_update(head: *mut pfc_head, learning_rate: f64) -> pfc_status {
    with_head(head, |head| head.update(learning_rate))
}

/// Forward, backward (loss_weight 1, loss_scale 1) and update in one call, with communication under the update. Collective.
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

/// The verdict of everything enqueued. On the CPU device every call has given its own: returns OK, POISONED or FORKED.
///
/// CUDA: waits for the device. The failure of the first step with a loss in the device's memory that came to nothing since the last
/// call, with the step's number, counted from 0 as samples are drawn, and how many came after it; the same status on all ranks, but
/// where it was one rank's own: then that one, and REMOTE on the others. Told once.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_wait(head: *mut pfc_head) -> pfc_status {
    with_head(head, |head| head.wait())
}

/// What the last step was like. Collective.
///
/// @param metrics prepared with pfc_metrics_init; written
#[no_mangle]
pub unsafe extern "C" fn pfc_head_metrics(head: *mut pfc_head, metrics: *mut pfc_metrics) -> pfc_status {
    with_head(head, |head| {
        // The other ranks are in it already: the exchange comes first.
        let m = head.metrics()?;
        ensure!(!metrics.is_null(), InvalidArgument, "metrics must not be NULL (rank {})", head.rank());
        head.require_host("metrics", metrics)?;
        let value = pfc_metrics {
            struct_size: 0,
            updates: m.updates,
            samples: m.draws,
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
        };
        write_sized(metrics, value)
    })
}

/// The k class centres nearest to each embedding, over all classes of all ranks. Collective; for evaluation; changes nothing.
/// The arrays are in host memory or, each by itself, in the CUDA device's.
///
/// @param embeddings rows x embedding_dim; rows may differ between ranks, may be 0 and need not keep to max_batch
/// @param k 1 to num_classes, equal on all ranks
/// @param ids rows x k, written: class ids, nearest first, equal cosines by ascending id
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
            ensure!(queries.rows == 0 || !ids.is_null(), InvalidArgument, "ids must not be NULL (rank {})", head.rank());
            ensure!(queries.rows == 0 || !cosines.is_null(), InvalidArgument, "cosines must not be NULL (rank {})", head.rank());
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

/// The class ids of this rank's last sample, ascending. After pfc_head_prepare or pfc_head_forward.
///
/// @param ids where to, in host memory or the CUDA device's, or NULL to ask for the count
/// @param capacity ids that fit
/// @param count written: ids in the sample
#[no_mangle]
pub unsafe extern "C" fn pfc_head_sample_ids(head: *const pfc_head, ids: *mut i64, capacity: u64, count: *mut u64) -> pfc_status {
    with_shared_head(head, |head| {
        head.require_host("count", count)?;
        let count = output("count", count)?;
        let sample = head.sample_ids()?;
        if !ids.is_null() {
            ensure!(
                sample.len() as u64 <= capacity,
                InvalidArgument,
                "capacity must be at least {}, the ids of the sample, got {capacity} (rank {})",
                sample.len(),
                head.rank()
            );
            head.write_values("ids", ids, &sample)?;
        }
        *count = sample.len() as u64;
        Ok(())
    })
}

/// The classes this rank owns: first to first + count - 1.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_shard(head: *const pfc_head, first: *mut u64, count: *mut u64) -> pfc_status {
    with_shared_head(head, |head| {
        head.require_host("first", first)?;
        head.require_host("count", count)?;
        let (first, count) = (output("first", first)?, output("count", count)?);
        let shard = head.shard();
        (*first, *count) = (shard.first, shard.rows);
        Ok(())
    })
}

/// Reads class centres of this rank's shard, replayed up to the last update. Not collective.
///
/// @param first class id
/// @param count classes
/// @param centers count x embedding_dim, written; CUDA: in the device's memory that is only enqueued, on the stream the device
///   was made with, and nothing is waited for: the rows count once pfc_head_wait has given PFC_OK
#[no_mangle]
pub unsafe extern "C" fn pfc_head_read_centers(
    head: *mut pfc_head,
    first: u64,
    count: u64,
    centers: *const pfc_matrix,
) -> pfc_status {
    rows(head, first, count, "centers", centers, |head, rows| head.read_rows(StateTensor::Centers, first, &rows))
}

/// Overwrites class centres of this rank's shard. Not collective. Between forward and update it abandons the step: call it on all ranks
/// then, or on none.
///
/// @param centers count x embedding_dim, finite: all are looked at before any is written
/// @return an error leaves the rows and a step under way alone; but DEVICE, after which the head is POISONED
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

/// Writes a checkpoint. Collective.
///
/// @return UNSUPPORTED in this version: pfc_head_read_centers and pfc_head_read_state give all there is to save
#[no_mangle]
pub unsafe extern "C" fn pfc_head_save(
    head: *mut pfc_head,
    directory: *const c_char,
    options: *const pfc_save_options,
) -> pfc_status {
    let _ = (directory, options);
    with_head(head, |_| {
        Err(error!(
            Unsupported,
            "pfc_head_save is not supported yet: save what pfc_head_read_centers and pfc_head_read_state return"
        ))
    })
}

/// Reads a checkpoint. Collective.
///
/// @return UNSUPPORTED in this version: pfc_head_write_centers and pfc_head_write_state put back what was read
#[no_mangle]
pub unsafe extern "C" fn pfc_head_load(
    head: *mut pfc_head,
    directory: *const c_char,
    options: *const pfc_load_options,
) -> pfc_status {
    let _ = (directory, options);
    with_head(head, |_| {
        Err(error!(Unsupported, "pfc_head_load is not supported yet: use pfc_head_write_centers and pfc_head_write_state"))
    })
}

unsafe fn rows(
    head: *mut pfc_head,
    first: u64,
    count: u64,
    name: &str,
    argument: *const pfc_matrix,
    body: impl FnOnce(&mut Head, crate::matrix::Matrix) -> Result<()>,
) -> pfc_status {
    with_head(head, |head| {
        let rows = matrix(name, argument, head.embedding_dim())?;
        ensure!(
            rows.rows as u64 == count,
            InvalidArgument,
            "{name}.rows must be {count}, the count from class {first}, got {} (rank {})",
            rows.rows,
            head.rank()
        );
        body(head, rows)
    })
}

fn state_tensor(code: i32) -> Result<StateTensor> {
    match code {
        PFC_STATE_MOMENTUM => Ok(StateTensor::Momentum),
        PFC_STATE_SECOND_MOMENT => Ok(StateTensor::SecondMoment),
        _ => Err(error!(InvalidArgument, "tensor must be PFC_STATE_MOMENTUM (1) or PFC_STATE_SECOND_MOMENT (2), got {code}")),
    }
}

unsafe fn step_input(head: &Head, embeddings: *const pfc_matrix, labels: *const i64) -> Result<StepInput> {
    let embeddings = matrix("embeddings", embeddings, head.embedding_dim())?;
    // An empty batch needs no labels: the pointer of an empty array may be NULL.
    let given = !labels.is_null() || embeddings.rows == 0;
    let labels = if given { Some(label_argument(labels, embeddings.rows as u64)?) } else { None };
    Ok(StepInput { embeddings, labels })
}

fn label_argument(labels: *const i64, batch: u64) -> Result<Labels> {
    ensure!(!labels.is_null() || batch == 0, InvalidArgument, "labels must not be NULL for a batch of {batch}");
    Ok(Labels { data: labels, count: batch as usize })
}
