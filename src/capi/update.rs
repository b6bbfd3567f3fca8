//! Updates with more than a learning rate, and of several steps at once.

use super::boundary;
use super::head::locked::with_head;
use super::head::pfc_head;
use super::status::pfc_status;
use super::types::{init_sized, read_sized, sized, Sized64};
use crate::device::UpdateCall;
use crate::ensure;

/// Options of pfc_head_update_with. Prepare with pfc_update_options_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_update_options {
    /// sizeof(pfc_update_options), set by pfc_update_options_init.
    pub struct_size: u64,
    /// 0 or more; must be set. (default: NaN, which is refused)
    pub learning_rate: f64,
    /// Multiplies the gradient of the class centers, not their weight decay or momentum. (default: 1)
    pub factor: f64,
    /// Multiplies it, too: one number, in host memory or in the CUDA device's memory; NULL: 1. In device memory it is read in the
    /// order of the stream that the device was made with, the call does not wait for it, and the stream may overwrite it afterwards.
    /// (default: NULL)
    pub device_factor: *const f32,
    /// Must be 0.
    pub reserved: u64,
}

sized!(
    pfc_update_options,
    pfc_update_options { struct_size: 0, learning_rate: f64::NAN, factor: 1.0, device_factor: std::ptr::null(), reserved: 0 }
);

/// Fills options with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_update_options_init_sized(options: *mut pfc_update_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// pfc_head_update with the gradient of the class centers multiplied by factor times device_factor: a loss weight that is known late,
/// gradient clipping, the inverse of a loss scale. Collective when replicated.
///
/// If the product is not a finite float32 (a NaN, an infinity), the update is skipped: rows, state and the count of updates stay as
/// they are, the call succeeds, and skipped_updates of pfc_metrics counts it. So a mixed-precision trainer needs no wait to find out.
///
/// The product must be the same on all ranks. A difference is MISMATCH on all of them in the next step, and poisons the heads.
///
/// @param options borrowed for the call; wrong ones change nothing, and the call may be repeated
/// @return with a loss in device memory, on a rank whose own forward failed: that error, after its part in the exchange
#[no_mangle]
pub unsafe extern "C" fn pfc_head_update_with(head: *mut pfc_head, options: *const pfc_update_options) -> pfc_status {
    with_head(head, |head| {
        let pfc_update_options { learning_rate, factor, device_factor, reserved, .. } = read_sized(options)?;
        ensure!(reserved == 0, InvalidArgument, "reserved must be 0, got {reserved}");
        head.update_with(UpdateCall { learning_rate, factor, device_factor })
    })
}

/// After pfc_head_backward, in place of pfc_head_update: keeps the step's gradient of the sampled class centers, added up by class with
/// what earlier calls have kept. The next pfc_head_update, pfc_head_update_with or pfc_head_step applies all of it at once, with its own
/// step's if there is one under way: momentum, weight decay and the count of updates once, for all classes of any of the samples. This is
/// what accumulating the gradient over micro-batches comes to; loss_weight 1/k makes it the mean of k. Not collective, but all ranks call
/// it, or none: a difference is MISMATCH in the next step.
///
/// An update may also come right after pfc_head_accumulate. If it is skipped (pfc_head_update_with), all that was kept is dropped.
///
/// A step that fails, or that a second forward abandons, adds nothing; what was kept before it stays. pfc_head_write_centers,
/// pfc_head_write_state and pfc_head_write_progress drop all that was kept: call them on all ranks or on none. Reading rows and progress
/// changes nothing, and what is kept is not in it.
///
/// Memory, beyond what the plan says, from the first call to the end of the head: 4 (embedding_dim + 1) bytes for each class that has a
/// gradient, at most those of the shard, and 4 for each class of the shard. Sharded: 4 * embedding_dim more for each class of a sample
/// (CUDA: of a chunk of it). CUDA: the classes that have a gradient are counted as the sum of the most that the samples can have; where
/// that grows, the call waits for the GPU.
///
/// @return OUT_OF_MEMORY with nothing changed, and the call may be repeated; with a loss in device memory, on a rank whose own forward
///   failed: that error
#[no_mangle]
pub unsafe extern "C" fn pfc_head_accumulate(head: *mut pfc_head) -> pfc_status {
    with_head(head, |head| head.accumulate())
}
