//! Other classes for a head that trains: identities come, go, and turn out to be one.
//!
//! The head remains, with its device, its communicator and its progress. Rows that keep their class, under whatever number, keep their
//! optimizer state; the ranks' shards are those of the new number of classes. What was prepared, chosen or begun is dropped.
//!
//! While such a call runs there are two of the head: its rows are there twice, in memory or, with residency file, on the disk, and so is
//! its working memory. If workspace_limit is 0 and memory is short then, the head keeps less of the softmax from then on. Classes that
//! become one take 8 bytes of host memory for each of their elements. The ranks wait for the slowest of them: pfc_comm_set_timeout
//! must allow for it.

use std::ffi::c_void;

use super::checkpoint::{pfc_progress_fn, table, tell};
use super::head::locked::with_head;
use super::head::pfc_head;
use super::status::pfc_status;
use super::types::{init_sized, read_sized, sized, Sized64};
use super::{array, boundary};
use crate::head::{merge_table, ClassTable, Head, RemapRequest};
use crate::{ensure, Contribution, Result};

/// Options of pfc_head_resize, pfc_head_remap and pfc_head_merge. Prepare with pfc_remap_options_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_remap_options {
    /// sizeof(pfc_remap_options), set by pfc_remap_options_init.
    pub struct_size: u64,
    /// (default: NULL)
    pub progress: pfc_progress_fn,
    /// Handed to progress. (default: NULL)
    pub user: *mut c_void,
    /// How much each of the head's classes counts where several become one, such as its number of images: above 0, finite. All ranks
    /// must give the same. NULL: all count alike; pfc_head_resize takes no other. In host memory, borrowed for the call. (default: NULL)
    pub class_weights: *const f32,
    /// Entries of class_weights: the head's number of classes; 0 with NULL. (default: 0)
    pub class_weights_count: u64,
}

sized!(
    pfc_remap_options,
    pfc_remap_options {
        struct_size: 0,
        progress: None,
        user: std::ptr::null_mut(),
        class_weights: std::ptr::null(),
        class_weights_count: 0,
    }
);

/// Fills options with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_remap_options_init_sized(options: *mut pfc_remap_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// Changes the number of classes: new ones come behind those that there are, with their start values, or the last ones go.
/// Collective; call it between two steps.
///
/// @param num_classes from now on; the same on all ranks
/// @param options NULL for the defaults
/// @return as pfc_head_remap
#[no_mangle]
pub unsafe extern "C" fn pfc_head_resize(head: *mut pfc_head, num_classes: u64, options: *const pfc_remap_options) -> pfc_status {
    with_head(head, |head| {
        remap(head, options, |weights| Ok(RemapRequest { num_classes, table: ClassTable { map: None, weights } }))
    })
}

/// Gives classes other numbers, removes some, makes several one, and adds new ones, by a table. Collective; call it between two steps.
///
/// Classes that none becomes are new and have their start values. Those that several become have the mean of their directions, with
/// the mean of their lengths, both weighted by class_weights, and no state. Until the next step there is no last sample, and of a last
/// step pfc_head_metrics has the counts alone.
///
/// @param num_classes from now on; the same on all ranks
/// @param class_map for each of the head's classes its new number, or -1: it goes; the same on all ranks. In host memory
/// @param class_map_count entries of class_map: the head's number of classes
/// @param options NULL for the defaults
/// @return these leave the heads of all ranks usable, with the classes that they had: INVALID_ARGUMENT for an entry that is no class,
///   for a number of classes that no head can have, and while micro-batches are accumulated; MISMATCH where class_map_count is not
///   the head's number of classes, or ranks ask for different classes; OUT_OF_MEMORY or IO where there is no room for the new rows
///   beside the old; NOT_FINITE for a row that no head would take; on a CUDA device, what pfc_head_wait would tell of the steps
///   before. A failure of the communicator or the device, or ranks at different steps, poison the heads. After PFC_OK, a label that
///   is no class any more is LABEL
#[no_mangle]
pub unsafe extern "C" fn pfc_head_remap(
    head: *mut pfc_head,
    num_classes: u64,
    class_map: *const i64,
    class_map_count: u64,
    options: *const pfc_remap_options,
) -> pfc_status {
    with_head(head, |head| {
        let map = table(head, "class_map", class_map, class_map_count);
        remap(head, options, |weights| {
            let map = map?;
            ensure!(map.is_some(), InvalidArgument, "class_map must not be NULL");
            Ok(RemapRequest { num_classes, table: ClassTable { map, weights } })
        })
    })
}

/// Makes classes one that turned out to be the same identity: each class of from becomes the class at its place in into. Collective;
/// call it between two steps. The classes behind one that has gone move up, so that there are count classes less: class_map tells their
/// new numbers.
///
/// @param from classes that go, each named once; the same on all ranks. In host memory
/// @param into for each of them the class that both are from now on, none of them in from. In host memory
/// @param count entries of from and into
/// @param class_map written: for each class that the head had its new number, by which labels have to change; or NULL. In host memory
/// @param class_map_capacity entries that fit: the head's number of classes at least; 0 with NULL
/// @param options NULL for the defaults
/// @return as pfc_head_remap
#[no_mangle]
pub unsafe extern "C" fn pfc_head_merge(
    head: *mut pfc_head,
    from: *const i64,
    into: *const i64,
    count: u64,
    class_map: *mut i64,
    class_map_capacity: u64,
    options: *const pfc_remap_options,
) -> pfc_status {
    with_head(head, |head| {
        let classes = head.num_classes();
        let merged = (|| {
            let from = table(head, "from", from, count)?.unwrap_or(&[]);
            let into = table(head, "into", into, count)?.unwrap_or(&[]);
            array("class_map", class_map, class_map_capacity)?;
            head.require_host("class_map", class_map)?;
            ensure!(
                class_map.is_null() || class_map_capacity >= classes,
                InvalidArgument,
                "class_map_capacity must be at least {classes}, the classes of the head, got {class_map_capacity}"
            );
            merge_table(classes, from, into)
        })();
        let map = merged.as_ref().map(|(left, map)| (*left, map.as_slice())).map_err(Clone::clone);
        remap(head, options, |weights| {
            let (num_classes, map) = map?;
            Ok(RemapRequest { num_classes, table: ClassTable { map: Some(map), weights } })
        })?;
        if let (Ok((_, map)), false) = (&merged, class_map.is_null()) {
            class_map.copy_from_nonoverlapping(map.as_ptr(), map.len());
        }
        Ok(())
    })
}

/// Changes the classes as `request` says, given the weights among the options.
unsafe fn remap<'a>(
    head: &mut Head,
    options: *const pfc_remap_options,
    request: impl FnOnce(Option<&'a [f32]>) -> Contribution<RemapRequest<'a>>,
) -> Result<()> {
    let options = if options.is_null() { Ok(pfc_remap_options::defaults()) } else { read_sized(options) };
    let report = options.as_ref().map_or((None, std::ptr::null_mut()), |options| (options.progress, options.user));
    let weights = options.and_then(|options| table(head, "class_weights", options.class_weights, options.class_weights_count));
    head.remap(weights.and_then(request), &mut |done, total| tell(report, done, total))
}
