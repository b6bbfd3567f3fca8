//! Steps whose rows have margins and weights of their own.
//!
//! In a head with row_terms on, each row of a step may have its own m2, m3 and weight. The loss is then
//!
//!   sum over the valid rows i of weight_i * loss_i / valid rows,
//!
//! where loss_i = -log softmax(z_i) at the row's own class, whose logit is scale * (cos(max(m1 * theta_i + m2_i, 0)) - m3_i).
//!
//! AdaFace (arXiv:2204.00964), MagFace (arXiv:2103.06627) and ElasticFace (arXiv:2109.09416) come to an m2 and an m3 for each row,
//! class-balanced losses (arXiv:1901.05555) to a weight.

use super::boundary;
use super::head::locked::with_head;
use super::head::{pfc_head, step_input};
use super::status::pfc_status;
use super::types::{init_sized, matrix, pfc_matrix, read_sized, sized, Sized64};
use crate::ensure;
use crate::head::{BackwardCall, LossTarget};
use crate::row_terms::{MarginGradientArrays, RowTermArrays};

/// Options of pfc_head_forward_with. Prepare with pfc_forward_options_init. Each array has a number for each row of this rank's batch,
/// in host memory or in the CUDA device's memory, and is borrowed for the call; in device memory it is read in the order of the stream
/// that the device was made with. NULL: the default of all rows. Ranks need not give the same arrays. Numbers of ignored rows are not
/// used and may be NaN.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_forward_options {
    /// sizeof(pfc_forward_options), set by pfc_forward_options_init.
    pub struct_size: u64,
    /// In radians, -pi to pi: unlike an option, a row's may be below 0. (default: NULL, m2 of pfc_head_options)
    pub m2: *const f32,
    /// 0 to 2. (default: NULL, m3 of pfc_head_options)
    pub m3: *const f32,
    /// 0 or more, finite. The sum is divided by the number of valid rows, not by the sum of their weights. (default: NULL, 1)
    pub weight: *const f32,
    /// Must be 0.
    pub reserved: u64,
}

/// Options of pfc_head_backward_with. Prepare with pfc_backward_options_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_backward_options {
    /// sizeof(pfc_backward_options), set by pfc_backward_options_init.
    pub struct_size: u64,
    /// As in pfc_head_backward. (default: 1)
    pub loss_weight: f64,
    /// As in pfc_head_backward; multiplies grad_m2 and grad_m3, too. (default: 1)
    pub loss_scale: f64,
    /// A number for each row of this rank's batch, written: the derivative of the loss by the row's m2, times loss_weight * loss_scale *
    /// gradient_scale, as grad_embeddings; 0 for an ignored row. It is that of the formula, whatever margin_gradient says. In host
    /// memory or in the CUDA device's memory; needs row_terms on. (default: NULL, not wanted)
    pub grad_m2: *mut f32,
    /// The same by the row's m3. (default: NULL, not wanted)
    pub grad_m3: *mut f32,
    /// Must be 0.
    pub reserved: u64,
}

sized!(
    pfc_forward_options,
    pfc_forward_options { struct_size: 0, m2: std::ptr::null(), m3: std::ptr::null(), weight: std::ptr::null(), reserved: 0 }
);

sized!(
    pfc_backward_options,
    pfc_backward_options {
        struct_size: 0,
        loss_weight: 1.0,
        loss_scale: 1.0,
        grad_m2: std::ptr::null_mut(),
        grad_m3: std::ptr::null_mut(),
        reserved: 0,
    }
);

/// Fills options with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_forward_options_init_sized(options: *mut pfc_forward_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// Fills options with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_backward_options_init_sized(options: *mut pfc_backward_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// pfc_head_forward with margins and weights of the rows' own. Collective; the same call as pfc_head_forward to the other ranks. It may
/// follow pfc_head_prepare.
///
/// In a head with row_terms on, pfc_head_forward and pfc_head_step are this with defaults alone.
///
/// @param embeddings as in pfc_head_forward
/// @param labels as in pfc_head_forward
/// @param options borrowed for the call
/// @param loss as in pfc_head_forward
/// @return as pfc_head_forward; INVALID_ARGUMENT on all ranks, with the row, the value and its rank, for a number out of its range. With
///   a loss in device memory it comes from pfc_head_wait. INVALID_ARGUMENT on this rank and REMOTE on the others for an array that is
///   given to a head without row_terms, or that the device cannot read. NOT_FINITE for a row that a large weight takes out of float32.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_forward_with(
    head: *mut pfc_head,
    embeddings: *const pfc_matrix,
    labels: *const i64,
    options: *const pfc_forward_options,
    loss: *mut f64,
) -> pfc_status {
    with_head(head, |head| {
        let (target, usable) = head.loss_target(loss);
        let input = (|| {
            usable?;
            let pfc_forward_options { m2, m3, weight, reserved, .. } = read_sized(options)?;
            ensure!(reserved == 0, InvalidArgument, "reserved must be 0, got {reserved}");
            let mut input = step_input(head, embeddings, labels)?;
            input.terms = RowTermArrays([m2, m3, weight]);
            Ok(input)
        })();
        let value = head.forward(input, target)?;
        if let LossTarget::Host = target {
            *loss = value;
        }
        Ok(())
    })
}

/// pfc_head_backward with gradients of the rows' margins. Collective. After pfc_head_forward or pfc_head_forward_with.
///
///   d loss / d m3_i = weight_i / valid rows * (1 - p_i) * scale
///   d loss / d m2_i = that * sin(max(m1 * theta_i + m2_i, 0))
///
/// p_i is the softmax of the row's own class. With margin_guard the second is that of the guard's formula beyond pi.
///
/// @param options borrowed for the call. Wrong ones, but for a wrong grad_m2 or grad_m3, abandon the step, as a wrong loss_weight does in
///   pfc_head_backward.
/// @param grad_embeddings as in pfc_head_backward
/// @return as pfc_head_backward. A wrong grad_m2 or grad_m3 is an error on this rank only, as a wrong grad_embeddings is: then neither
///   of the two is written, and pfc_head_update may follow.
#[no_mangle]
pub unsafe extern "C" fn pfc_head_backward_with(
    head: *mut pfc_head,
    options: *const pfc_backward_options,
    grad_embeddings: *const pfc_matrix,
) -> pfc_status {
    with_head(head, |head| {
        let call = (|| {
            let pfc_backward_options { loss_weight, loss_scale, grad_m2, grad_m3, reserved, .. } = read_sized(options)?;
            ensure!(reserved == 0, InvalidArgument, "reserved must be 0, got {reserved}");
            Ok(BackwardCall { loss_weight, loss_scale, margin_gradients: MarginGradientArrays([grad_m2, grad_m3]) })
        })();
        let gradient = matrix("grad_embeddings", grad_embeddings, head.embedding_dim());
        head.backward_with(call, gradient)
    })
}
