//! Kernels without a head: stateless functions on a device, over the caller's memory.
//!
//! E is B x d and W is S x d, both as they are; E^ and W^ are their rows divided by their L2 norms (a norm below 1e-12 gives a row
//! of zeros). Arithmetic is in float32.
//!
//! MEMORY. On a CPU device all memory is host memory. On a CUDA device each matrix and each array may be in GPU memory or in host
//! memory; arguments in host memory are copied to buffers of the device, and results are copied back. The workspace is in GPU
//! memory. It must be aligned to 16 bytes on a CUDA device and to 8 bytes on a CPU device, else INVALID_ARGUMENT.
//!
//! WAITING. On a CUDA device the work is enqueued on the device's stream, and GPU memory is borrowed until the stream has run it. A
//! call waits for the stream if it writes to host memory, if it returns a count, or if it checks the contents of an array in GPU
//! memory. The arrays that are checked are targets, positives and ids, and in pfc_fused_backward row_sums, target_logits and offsets:
//! keep them in host memory if you can.

// The header's brackets are indices of arrays.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::c_void;

use super::device::pfc_device;
use super::status::pfc_status;
use super::types::{matrix, pfc_margin, pfc_matrix, pfc_optimizer, read_sized};
use super::{array, boundary, output, required};
use crate::device::{Device, FusedBackward, FusedForward, RowOffsets, RowState, SampleDraw, Workspace};
use crate::margin::Margin;
use crate::{ensure, Result};

/// Divides each row by its L2 norm.
///
/// A row with a NaN becomes NaN, and so does its inverse norm. With an infinity the inverse norm is 0: infinite elements become NaN, the
/// others 0. The inverse of a norm above 8e37 is a subnormal number, which has fewer digits, and so has the row.
///
/// @param rows n x d
/// @param normalized n x d, written; may be rows
/// @param inverse_norms n, written: 1 / norm, 0 for a norm below 1e-12; or NULL
#[no_mangle]
pub unsafe extern "C" fn pfc_normalize_rows(
    device: *const pfc_device,
    rows: *const pfc_matrix,
    normalized: *const pfc_matrix,
    inverse_norms: *mut f32,
) -> pfc_status {
    boundary(|| {
        let device = working_device(device)?;
        let from = matrix("rows", rows, required("rows", rows)?.cols)?;
        let to = matrix("normalized", normalized, from.cols as u64)?;
        same_rows("normalized", to.rows, from.rows)?;
        if !inverse_norms.is_null() {
            array("inverse_norms", inverse_norms, from.rows as u64)?;
        } else if from.cols == 0 {
            // Nothing to read or to write, however many rows.
            return Ok(());
        }
        device.normalize_rows(&from, &to, inverse_norms)
    })
}

/// Cosines of all pairs: E^ @ W^.T.
///
/// A row or class center with a NaN or an infinity has NaN cosines; the others have theirs.
///
/// @param embeddings B x d
/// @param centers S x d
/// @param cosines B x S in f32, written
/// @param workspace pfc_normalize_gemm_workspace bytes
#[no_mangle]
pub unsafe extern "C" fn pfc_normalize_gemm(
    device: *const pfc_device,
    embeddings: *const pfc_matrix,
    centers: *const pfc_matrix,
    cosines: *const pfc_matrix,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> pfc_status {
    boundary(|| {
        let device = working_device(device)?;
        let e = matrix("embeddings", embeddings, required("embeddings", embeddings)?.cols)?;
        let w = matrix("centers", centers, e.cols as u64)?;
        let out = matrix("cosines", cosines, w.rows as u64)?;
        same_rows("cosines", out.rows, e.rows)?;
        device.normalize_gemm(&e, &w, &out, workspace_of(workspace, workspace_bytes)?)
    })
}

/// Bytes of workspace that pfc_normalize_gemm needs for B x d and S x d.
#[no_mangle]
pub unsafe extern "C" fn pfc_normalize_gemm_workspace(
    device: *const pfc_device,
    batch: u64,
    dim: u64,
    classes: u64,
    bytes: *mut u64,
) -> pfc_status {
    boundary(|| {
        *output("bytes", bytes)? = device_of(device)?.normalize_gemm_workspace(batch, dim, classes)?;
        Ok(())
    })
}

/// Target logits: scale * (cos(m1 * theta + m2) - m3).
///
/// Cosines beyond -1 and 1, infinities among them, count as -1 and 1; a NaN stays one.
///
/// @param cosines n target cosines
/// @param logits n, written; may be cosines
#[no_mangle]
pub unsafe extern "C" fn pfc_margin_forward(
    device: *const pfc_device,
    margin: *const pfc_margin,
    cosines: *const f32,
    count: u64,
    logits: *mut f32,
) -> pfc_status {
    boundary(|| {
        let device = working_device(device)?;
        let margin = checked_margin(margin)?;
        if count == 0 {
            return Ok(());
        }
        let count = array("cosines", cosines, count)?;
        array("logits", logits, count as u64)?;
        device.margin_forward(&margin, cosines, count, logits)
    })
}

/// Gradient through the margin: grad_cosines = grad_logits * d logit / d cosine.
///
/// Cosines beyond -1 and 1 count as -1 and 1. What is no number in an element's cosine or gradient makes its result none.
///
/// @param cosines n target cosines
/// @param grad_logits n
/// @param grad_cosines n, written; may be grad_logits
#[no_mangle]
pub unsafe extern "C" fn pfc_margin_backward(
    device: *const pfc_device,
    margin: *const pfc_margin,
    cosines: *const f32,
    grad_logits: *const f32,
    count: u64,
    grad_cosines: *mut f32,
) -> pfc_status {
    boundary(|| {
        let device = working_device(device)?;
        let margin = checked_margin(margin)?;
        if count == 0 {
            return Ok(());
        }
        let count = array("cosines", cosines, count)?;
        array("grad_logits", grad_logits, count as u64)?;
        array("grad_cosines", grad_cosines, count as u64)?;
        device.margin_backward(&margin, cosines, grad_logits, count, grad_cosines)
    })
}

/// Turns cosines into softmax numerators, in place: P = exp(scale * cos - c) with c = max(0, scale - 64). The target of each row is
/// left out.
///
/// At scales above 75 the numerators and the sum of a row whose negatives are all far away may be 0: pfc_partial_softmax_offsets has
/// them. A NaN cosine makes its numerator and its row's sum NaN.
///
/// @param cosines B x S in f32; overwritten with P; a filtered negative and the target become 0
/// @param targets B: the column of the row's own class, or -1
/// @param row_sums B, written: the sum of each row's numerators (a filtered negative adds exp(-c))
#[no_mangle]
pub unsafe extern "C" fn pfc_partial_softmax(
    device: *const pfc_device,
    margin: *const pfc_margin,
    cosines: *const pfc_matrix,
    targets: *const i64,
    row_sums: *mut f32,
) -> pfc_status {
    boundary(|| softmax(device, margin, cosines, targets, row_sums, std::ptr::null_mut()))
}

/// As pfc_partial_softmax, relative to an offset for each row: P = exp(scale * cos - row_offsets[i]).
///
/// A row's offset is c, or the logit of its largest negative where all its numerators would be next to nothing relative to exp(c). So
/// a row with a negative has a sum above 0 at every scale.
///
/// @param cosines B x S in f32; overwritten with P; a filtered negative and the target become 0
/// @param targets B: the column of the row's own class, or -1
/// @param row_sums B, written: the sum of each row's numerators
/// @param row_offsets B, written: what each row's numerators and sum are relative to
#[no_mangle]
pub unsafe extern "C" fn pfc_partial_softmax_offsets(
    device: *const pfc_device,
    margin: *const pfc_margin,
    cosines: *const pfc_matrix,
    targets: *const i64,
    row_sums: *mut f32,
    row_offsets: *mut f32,
) -> pfc_status {
    boundary(|| {
        array("row_offsets", row_offsets, required("cosines", cosines)?.rows)?;
        softmax(device, margin, cosines, targets, row_sums, row_offsets)
    })
}

/// One rank's forward without a head: row sums, target logits and P @ W^. No logits are kept.
///
/// With several ranks, sum row_sums and target_logits over the ranks before pfc_fused_backward. A row of embeddings with a NaN or an
/// infinity gets NaN and spoils no other; a class center with one spoils all rows. At scales above 75 take pfc_fused_forward_offsets: the sum of a row whose negatives are all far away
/// may be 0 here.
///
/// @param embeddings B x d
/// @param centers S x d
/// @param targets B: the row of centers that holds the row's own class, or -1 if another rank has it
/// @param row_sums B, written: the sum of each row's numerators
/// @param target_logits B, written: the target logit with margin, 0 where targets is -1
/// @param weighted B x d in f32, written: P @ W^
/// @param workspace pfc_fused_workspace bytes
#[no_mangle]
pub unsafe extern "C" fn pfc_fused_forward(
    device: *const pfc_device,
    margin: *const pfc_margin,
    embeddings: *const pfc_matrix,
    centers: *const pfc_matrix,
    targets: *const i64,
    row_sums: *mut f32,
    target_logits: *mut f32,
    weighted: *const pfc_matrix,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> pfc_status {
    let outputs = ForwardOutputs { row_sums, row_offsets: std::ptr::null_mut(), target_logits, weighted };
    boundary(|| forward(device, margin, embeddings, centers, targets, outputs, workspace, workspace_bytes))
}

/// As pfc_fused_forward, relative to an offset for each row: P = exp(z - row_offsets[i]).
///
/// A row's offset is c, or the logit of its largest negative where all its numerators would be next to nothing relative to exp(c). So
/// loss and gradient are right at every scale. With several ranks, sum target_logits over the ranks; sum_offsets[i] is the largest of
/// the ranks' row_offsets[i], and row i's sum is that of the ranks' row_sums[i] * exp(row_offsets[i] - sum_offsets[i]). A row without a
/// negative has the least offset there is. The loss of a row is softplus(log(row_sums[i]) + sum_offsets[i] - target_logits[i]). On a
/// CUDA device the numerators are computed twice at scales above 75.
///
/// @param embeddings B x d
/// @param centers S x d
/// @param targets B: the row of centers that holds the row's own class, or -1 if another rank has it
/// @param row_sums B, written: the sum of each row's numerators
/// @param row_offsets B, written: what each row's numerators, sum and P @ W^ are relative to
/// @param target_logits B, written: the target logit with margin, 0 where targets is -1
/// @param weighted B x d in f32, written: P @ W^
/// @param workspace pfc_fused_workspace bytes
#[no_mangle]
pub unsafe extern "C" fn pfc_fused_forward_offsets(
    device: *const pfc_device,
    margin: *const pfc_margin,
    embeddings: *const pfc_matrix,
    centers: *const pfc_matrix,
    targets: *const i64,
    row_sums: *mut f32,
    row_offsets: *mut f32,
    target_logits: *mut f32,
    weighted: *const pfc_matrix,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> pfc_status {
    let outputs = ForwardOutputs { row_sums, row_offsets, target_logits, weighted };
    boundary(|| {
        array("row_offsets", row_offsets, required("embeddings", embeddings)?.rows)?;
        forward(device, margin, embeddings, centers, targets, outputs, workspace, workspace_bytes)
    })
}

/// One rank's backward without a head: this rank's part of the gradient of E, and the gradient of W.
///
/// With several ranks, sum grad_embeddings over the ranks. A row whose row sum is 0 gets no gradient. A row sum or a target logit that
/// is NaN or infinite gives NOT_FINITE, with nothing written; so does, at scales above 75, a sum that has lost the row's negatives
/// where they count. A NaN in embeddings or centers makes NaN of what it takes part in.
///
/// @param row_sums B, summed over ranks
/// @param target_logits B, summed over ranks
/// @param weighted B x d in f32: P @ W^ of this rank, from pfc_fused_forward
/// @param loss_weight multiplies both gradients; 1 / B for a mean
/// @param grad_embeddings B x d, written
/// @param grad_centers S x d, written
/// @param workspace pfc_fused_workspace bytes
#[no_mangle]
pub unsafe extern "C" fn pfc_fused_backward(
    device: *const pfc_device,
    margin: *const pfc_margin,
    embeddings: *const pfc_matrix,
    centers: *const pfc_matrix,
    targets: *const i64,
    row_sums: *const f32,
    target_logits: *const f32,
    weighted: *const pfc_matrix,
    loss_weight: f64,
    grad_embeddings: *const pfc_matrix,
    grad_centers: *const pfc_matrix,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> pfc_status {
    let inputs = BackwardInputs { row_sums, offsets: None, target_logits, weighted, loss_weight };
    let outputs = [grad_embeddings, grad_centers];
    boundary(|| backward(device, margin, [embeddings, centers], targets, inputs, outputs, workspace, workspace_bytes))
}

/// As pfc_fused_backward, after pfc_fused_forward_offsets.
///
/// @param row_sums B, over ranks, relative to exp(sum_offsets[i])
/// @param sum_offsets B; with one rank row_offsets
/// @param target_logits B, summed over ranks
/// @param row_offsets B, of this rank, from pfc_fused_forward_offsets
/// @param weighted B x d in f32: P @ W^ of this rank, from pfc_fused_forward_offsets
/// @param loss_weight multiplies both gradients; 1 / B for a mean
/// @param grad_embeddings B x d, written
/// @param grad_centers S x d, written
/// @param workspace pfc_fused_workspace bytes
#[no_mangle]
pub unsafe extern "C" fn pfc_fused_backward_offsets(
    device: *const pfc_device,
    margin: *const pfc_margin,
    embeddings: *const pfc_matrix,
    centers: *const pfc_matrix,
    targets: *const i64,
    row_sums: *const f32,
    sum_offsets: *const f32,
    target_logits: *const f32,
    row_offsets: *const f32,
    weighted: *const pfc_matrix,
    loss_weight: f64,
    grad_embeddings: *const pfc_matrix,
    grad_centers: *const pfc_matrix,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> pfc_status {
    let offsets = Some(RowOffsets { of_rank: row_offsets, of_sums: sum_offsets });
    let inputs = BackwardInputs { row_sums, offsets, target_logits, weighted, loss_weight };
    let outputs = [grad_embeddings, grad_centers];
    boundary(|| {
        let rows = required("embeddings", embeddings)?.rows;
        array("row_offsets", row_offsets, rows)?;
        array("sum_offsets", sum_offsets, rows)?;
        backward(device, margin, [embeddings, centers], targets, inputs, outputs, workspace, workspace_bytes)
    })
}

/// Bytes of workspace that pfc_fused_forward and pfc_fused_backward need for B x d and S x d.
///
/// The size does not grow with B x S. On a CUDA device d is at most 1024, else UNSUPPORTED.
#[no_mangle]
pub unsafe extern "C" fn pfc_fused_workspace(
    device: *const pfc_device,
    batch: u64,
    dim: u64,
    classes: u64,
    bytes: *mut u64,
) -> pfc_status {
    boundary(|| {
        *output("bytes", bytes)? = device_of(device)?.fused_workspace(batch, dim, classes)?;
        Ok(())
    })
}

/// Draws a sample: all positives, then negatives uniformly without replacement up to `sample_size` classes.
///
/// Gives the ids that a head with that seed and sample_block 1 draws in that step, on every device.
///
/// @param seed as pfc_head_options.seed
/// @param step number of draws before this one
/// @param first id of the first class of the shard
/// @param rows number of classes in the shard, at most 2^40; on a CUDA device at most 2^32 - 8192
/// @param positives class ids of the shard, ascending, without repeats
/// @param positive_count number of positives; if more than sample_size, the sample is the positives
/// @param sample_size number of classes wanted, at most rows
/// @param ids max(positive_count, sample_size) ids, written, ascending
/// @param count written: number of ids in the sample
#[no_mangle]
pub unsafe extern "C" fn pfc_sample_classes(
    device: *const pfc_device,
    seed: u64,
    step: u64,
    first: u64,
    rows: u64,
    positives: *const i64,
    positive_count: u64,
    sample_size: u64,
    ids: *mut i64,
    count: *mut u64,
) -> pfc_status {
    boundary(|| {
        let device = working_device(device)?;
        let count = output("count", count)?;
        let positive_count = array("positives", positives, positive_count)?;
        array("ids", ids, sample_size.max(positive_count as u64))?;
        let draw = SampleDraw { seed, step, first, rows, positives, positive_count, sample_size };
        *count = device.sample_classes(&draw, ids)?;
        Ok(())
    })
}

/// Updates rows of W by their gradients: row i of gradients belongs to row `ids[i]` of centers.
///
/// A NaN or an infinity in a gradient or in the state goes into its element, and no further. A second
/// moment below zero makes its element NaN.
///
/// @param centers n x d in f32, updated
/// @param momentum n x d in f32, updated: SGD's momentum or AdamW's first moment
/// @param second_moment n x d in f32, updated: AdamW's second moment; NULL for SGD
/// @param ids count row numbers of centers, without repeats
/// @param gradients count x d
/// @param learning_rate 0 or more
/// @param update number of this update, from 1; for AdamW's bias correction
#[no_mangle]
pub unsafe extern "C" fn pfc_update_rows(
    device: *const pfc_device,
    optimizer: *const pfc_optimizer,
    centers: *const pfc_matrix,
    momentum: *const pfc_matrix,
    second_moment: *const pfc_matrix,
    ids: *const i64,
    gradients: *const pfc_matrix,
    learning_rate: f64,
    update: u64,
) -> pfc_status {
    boundary(|| {
        let device = working_device(device)?;
        let optimizer = read_sized(optimizer)?.to_optimizer()?;
        optimizer.check()?;
        let w = matrix("centers", centers, required("centers", centers)?.cols)?;
        let m = matrix("momentum", momentum, w.cols as u64)?;
        same_rows("momentum", m.rows, w.rows)?;
        let v = if second_moment.is_null() { None } else { Some(matrix("second_moment", second_moment, w.cols as u64)?) };
        if let Some(v) = &v {
            same_rows("second_moment", v.rows, w.rows)?;
        }
        let g = matrix("gradients", gradients, w.cols as u64)?;
        ensure!(
            g.rows <= w.rows,
            InvalidArgument,
            "gradients.rows must be at most centers.rows, {}, since no id repeats, got {}",
            w.rows,
            g.rows
        );
        array("ids", ids, g.rows as u64)?;
        let state = RowState { centers: &w, momentum: &m, second_moment: v.as_ref() };
        device.update_rows(&optimizer, &state, ids, &g, learning_rate, update)
    })
}

unsafe fn softmax(
    device: *const pfc_device,
    margin: *const pfc_margin,
    cosines: *const pfc_matrix,
    targets: *const i64,
    row_sums: *mut f32,
    row_offsets: *mut f32,
) -> Result<()> {
    let device = working_device(device)?;
    let margin = checked_margin(margin)?;
    let logits = matrix("cosines", cosines, required("cosines", cosines)?.cols)?;
    if logits.rows == 0 {
        return Ok(());
    }
    array("targets", targets, logits.rows as u64)?;
    array("row_sums", row_sums, logits.rows as u64)?;
    device.partial_softmax(&margin, &logits, targets, row_sums, row_offsets)
}

struct ForwardOutputs {
    row_sums: *mut f32,
    row_offsets: *mut f32,
    target_logits: *mut f32,
    weighted: *const pfc_matrix,
}

#[allow(clippy::too_many_arguments)] // As many as the C functions have.
unsafe fn forward(
    device: *const pfc_device,
    margin: *const pfc_margin,
    embeddings: *const pfc_matrix,
    centers: *const pfc_matrix,
    targets: *const i64,
    outputs: ForwardOutputs,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> Result<()> {
    let device = working_device(device)?;
    let margin = checked_margin(margin)?;
    let e = matrix("embeddings", embeddings, required("embeddings", embeddings)?.cols)?;
    let w = matrix("centers", centers, e.cols as u64)?;
    let out = matrix("weighted", outputs.weighted, e.cols as u64)?;
    same_rows("weighted", out.rows, e.rows)?;
    if e.rows == 0 {
        return Ok(());
    }
    array("targets", targets, e.rows as u64)?;
    array("row_sums", outputs.row_sums, e.rows as u64)?;
    array("target_logits", outputs.target_logits, e.rows as u64)?;
    device.fused_forward(&FusedForward {
        margin: &margin,
        embeddings: &e,
        centers: &w,
        targets,
        row_sums: outputs.row_sums,
        row_offsets: outputs.row_offsets,
        target_logits: outputs.target_logits,
        weighted: &out,
        workspace: workspace_of(workspace, workspace_bytes)?,
    })
}

struct BackwardInputs {
    row_sums: *const f32,
    offsets: Option<RowOffsets>,
    target_logits: *const f32,
    weighted: *const pfc_matrix,
    loss_weight: f64,
}

#[allow(clippy::too_many_arguments)] // As many as the C functions have.
unsafe fn backward(
    device: *const pfc_device,
    margin: *const pfc_margin,
    [embeddings, centers]: [*const pfc_matrix; 2],
    targets: *const i64,
    inputs: BackwardInputs,
    [grad_embeddings, grad_centers]: [*const pfc_matrix; 2],
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> Result<()> {
    let device = working_device(device)?;
    let margin = checked_margin(margin)?;
    let BackwardInputs { row_sums, offsets, target_logits, weighted, loss_weight } = inputs;
    let e = matrix("embeddings", embeddings, required("embeddings", embeddings)?.cols)?;
    let w = matrix("centers", centers, e.cols as u64)?;
    let weighted = matrix("weighted", weighted, e.cols as u64)?;
    let grad_e = matrix("grad_embeddings", grad_embeddings, e.cols as u64)?;
    let grad_w = matrix("grad_centers", grad_centers, e.cols as u64)?;
    same_rows("weighted", weighted.rows, e.rows)?;
    same_rows("grad_embeddings", grad_e.rows, e.rows)?;
    same_rows("grad_centers", grad_w.rows, w.rows)?;
    array("targets", targets, e.rows as u64)?;
    array("row_sums", row_sums, e.rows as u64)?;
    array("target_logits", target_logits, e.rows as u64)?;
    device.fused_backward(&FusedBackward {
        margin: &margin,
        embeddings: &e,
        centers: &w,
        targets,
        row_sums,
        offsets,
        target_logits,
        weighted: &weighted,
        loss_weight,
        grad_embeddings: &grad_e,
        grad_centers: &grad_w,
        workspace: workspace_of(workspace, workspace_bytes)?,
    })
}

/// A device argument, made in this process.
unsafe fn device_of<'a>(device: *const pfc_device) -> Result<&'a dyn Device> {
    let device = &*required("device", device)?.device;
    let (made_in, this) = (device.process(), std::process::id());
    ensure!(made_in == this, Forked, "the device was made in process {made_in} and cannot be used in process {this}");
    Ok(device)
}

/// The same, for a call that works on it.
unsafe fn working_device<'a>(device: *const pfc_device) -> Result<&'a dyn Device> {
    let device = device_of(device)?;
    device.check_not_capturing()?;
    Ok(device)
}

unsafe fn checked_margin(margin: *const pfc_margin) -> Result<Margin> {
    let margin = read_sized(margin)?.to_margin()?;
    margin.check()?;
    Ok(margin)
}

fn same_rows(name: &str, rows: usize, expected: usize) -> Result<()> {
    ensure!(rows == expected, InvalidArgument, "{name}.rows must be {expected}, got {rows}");
    Ok(())
}

unsafe fn workspace_of(data: *mut c_void, bytes: u64) -> Result<Workspace> {
    ensure!(!data.is_null() || bytes == 0, InvalidArgument, "workspace must not be NULL for a workspace_bytes of {bytes}");
    Ok(Workspace { data: data.cast(), bytes: array("workspace", data.cast::<u8>(), bytes)? })
}
