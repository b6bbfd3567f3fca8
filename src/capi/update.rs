//! Updates with more than a learning rate.

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
