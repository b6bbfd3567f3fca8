//! Checkpoints of a head.

use std::ffi::{c_char, c_void, CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::head::locked::with_head;
use super::head::pfc_head;
use super::status::pfc_status;
use super::types::{init_sized, read_sized, sized, Sized64};
use super::{array, boundary, output, required};
use crate::head::{ClassTable, Head, LoadRequest, Report};
use crate::{ensure, Result};

/// Is told how far a rank is with its own part: done of total bytes. Called on the calling thread, first with 0 and last with all of
/// them; by pfc_head_save_poll once. Must not call pfc_ functions on handles.
pub type pfc_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, done: u64, total: u64)>;

/// Options of pfc_head_save, pfc_head_save_start and pfc_head_save_poll. Prepare with pfc_save_options_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_save_options {
    /// sizeof(pfc_save_options), set by pfc_save_options_init.
    pub struct_size: u64,
    /// (default: NULL)
    pub progress: pfc_progress_fn,
    /// Handed to progress. (default: NULL)
    pub user: *mut c_void,
}

sized!(pfc_save_options, pfc_save_options { struct_size: 0, progress: None, user: std::ptr::null_mut() });

/// Fills options with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_save_options_init_sized(options: *mut pfc_save_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// Options of pfc_head_load. Prepare with pfc_load_options_init.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_load_options {
    /// sizeof(pfc_load_options), set by pfc_load_options_init.
    pub struct_size: u64,
    /// (default: NULL)
    pub progress: pfc_progress_fn,
    /// Handed to progress. (default: NULL)
    pub user: *mut c_void,
    /// For each class of the checkpoint the class of the head that it becomes, or -1: none. Classes of the head that none becomes begin
    /// anew; those that several become have the mean of their directions, with the mean of their lengths, both weighted by class_weights,
    /// and no state. All ranks must give the same. NULL: the classes are the same. In host memory, borrowed for the call. (default: NULL)
    pub class_map: *const i64,
    /// Entries of class_map: the checkpoint's num_classes; 0 with NULL. (default: 0)
    pub class_map_count: u64,
    /// With class_map: how much each class of the checkpoint counts where several become one, such as its number of images: above 0,
    /// finite. All ranks must give the same. NULL: all count alike. In host memory, borrowed for the call. (default: NULL)
    pub class_weights: *const f32,
    /// Entries of class_weights: the checkpoint's num_classes; 0 with NULL. (default: 0)
    pub class_weights_count: u64,
}

sized!(
    pfc_load_options,
    pfc_load_options {
        struct_size: 0,
        progress: None,
        user: std::ptr::null_mut(),
        class_map: std::ptr::null(),
        class_map_count: 0,
        class_weights: std::ptr::null(),
        class_weights_count: 0,
    }
);

/// Fills options with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_load_options_init_sized(options: *mut pfc_load_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// Saves the head: class centers, the optimizer's state, and how far it is. Collective; call it between two steps. The head remains as
/// it is, but for dense rows, which are brought to now as by pfc_head_read_progress. Micro-batches that have been accumulated are not
/// saved: the call is refused while there are any.
///
/// The directory, which all ranks must see, is made if it is not there. Each rank writes a safetensors file of its own, with tensors
/// weight, momentum and, for AdamW, second_moment, of [rows, embedding_dim] in the types that the head stores them in, F32 or BF16, and a
/// checksum of each MiB; rank 0 then renames the manifest, manifest.json, into place. Until then the directory holds the checkpoint that
/// was there before, whatever happens; from then on it holds the new one, and the files of the old one are removed. What a save that was
/// cut short has left, the next save removes.
///
/// The ranks wait for the slowest of them: pfc_comm_set_timeout must allow for it.
///
/// @param directory a path, ending with a zero byte
/// @param options NULL for the defaults
/// @return IO where the system refuses, which names the file, and REMOTE on the other ranks: the head is usable, and the directory
///   holds the checkpoint before or, if only its names could not be flushed, the new one; NOT_FINITE for a row that no load would take,
///   which names the class, with nothing changed
#[no_mangle]
pub unsafe extern "C" fn pfc_head_save(
    head: *mut pfc_head,
    directory: *const c_char,
    options: *const pfc_save_options,
) -> pfc_status {
    with_head(head, |head| save_with(head, directory, options, Head::save))
}

/// Begins a save that goes on beside training: copies what pfc_head_save would write, and starts a thread that writes it. Collective. The
/// checkpoint is that of now, whatever the head does until pfc_head_save_poll says that it is there. Until then the head cannot be
/// saved again. A head that is freed gives the save up, and so does one that is poisoned: the directory keeps the checkpoint before.
///
/// The copy takes as much memory as the rows that this rank writes, until they are written. Each rank is checked alone: those of one
/// machine must fit together. The ranks wait for the slowest copy.
///
/// @param directory as for pfc_head_save
/// @param options NULL for the defaults. progress is told of the copy
/// @return as pfc_head_save before it writes; OUT_OF_MEMORY where there is no memory for the copy, with nothing changed
#[no_mangle]
pub unsafe extern "C" fn pfc_head_save_start(
    head: *mut pfc_head,
    directory: *const c_char,
    options: *const pfc_save_options,
) -> pfc_status {
    with_head(head, |head| save_with(head, directory, options, Head::save_start))
}

/// Looks whether the save that pfc_head_save_start has begun is over, and if all ranks have written makes their files the checkpoint.
/// Collective, also while nothing is over. Call it between two steps, every now and then. After the last step call it with pauses until
/// it is done.
///
/// @param done written: 1 when the directory holds the new checkpoint; 0 while a rank is writing
/// @param options NULL for the defaults. progress is told, once, how far this rank's file is
/// @return INVALID_ARGUMENT where no save is under way, or for an argument of this rank's, and REMOTE on the others: a save that is
///   under way goes on. As pfc_head_save for what went wrong with the files: then it is over, and the next poll says that none is under
///   way. MISMATCH where ranks poll different heads
#[no_mangle]
pub unsafe extern "C" fn pfc_head_save_poll(head: *mut pfc_head, done: *mut i32, options: *const pfc_save_options) -> pfc_status {
    with_head(head, |head| {
        let (options, report) = save_options(options);
        let asked = options.and_then(|_| {
            head.require_host("done", done)?;
            output("done", done)
        });
        let (asked, done) = match asked {
            Ok(done) => (Ok(()), Some(done)),
            Err(error) => (Err(error), None),
        };
        let over = head.save_poll(asked, &mut |done, total| tell(report, done, total))?;
        if let Some(done) = done {
            *done = over.into();
        }
        Ok(())
    })
}

/// Loads a checkpoint into a head, from a save of any number of ranks and of any placement. Collective. The head goes on from there: on
/// as many ranks, with the options of the head that was saved, with the same bits. What was prepared, chosen, begun or accumulated is
/// dropped. No other job may save to the directory meanwhile.
///
/// The head must have been made with the checkpoint's embedding_dim and optimizer, and with its num_classes unless options has a
/// class_map, by which classes come, go, change their numbers and become one; its other options are its own. What it stores in bf16 and
/// the checkpoint has in f32 is rounded to nearest.
///
/// @param directory as for pfc_head_save
/// @param options NULL for the defaults
/// @return MISMATCH for a checkpoint of another kind of head, which names what differs and both values, and for ranks with different
///   class maps; INVALID_ARGUMENT for an entry of class_map that is no class of the head; UNSUPPORTED for a checkpoint of a later
///   format; CORRUPT where a file is not what was written, which names the file and the bytes; IO where the system refuses. If that is
///   found in the manifest, nothing has changed. If it is found in the rows, some of them are new: the heads of all ranks are poisoned
#[no_mangle]
pub unsafe extern "C" fn pfc_head_load(
    head: *mut pfc_head,
    directory: *const c_char,
    options: *const pfc_load_options,
) -> pfc_status {
    with_head(head, |head| {
        let options = if options.is_null() { Ok(pfc_load_options::defaults()) } else { read_sized(options) };
        let report = options.as_ref().map_or((None, std::ptr::null_mut()), |options| (options.progress, options.user));
        let request = options.and_then(|options| {
            let map = table(head, "class_map", options.class_map, options.class_map_count)?;
            let weights = table(head, "class_weights", options.class_weights, options.class_weights_count)?;
            Ok(LoadRequest { directory: path("directory", directory)?, table: ClassTable { map, weights } })
        });
        head.load(request, &mut |done, total| tell(report, done, total))
    })
}

unsafe fn save_with(
    head: &mut Head,
    directory: *const c_char,
    options: *const pfc_save_options,
    save: impl FnOnce(&mut Head, Result<&Path>, Report<'_>) -> Result<()>,
) -> Result<()> {
    let (options, report) = save_options(options);
    let directory = options.and_then(|_| path("directory", directory));
    save(head, directory, &mut |done, total| tell(report, done, total))
}

/// The options of a save, or what is wrong with them; and whom to tell how far it is.
unsafe fn save_options(options: *const pfc_save_options) -> (Result<pfc_save_options>, (pfc_progress_fn, *mut c_void)) {
    let options = if options.is_null() { Ok(pfc_save_options::defaults()) } else { read_sized(options) };
    let report = options.as_ref().map_or((None, std::ptr::null_mut()), |options| (options.progress, options.user));
    (options, report)
}

/// A path argument, or the error that names it.
pub(super) unsafe fn path<'a>(name: &str, text: *const c_char) -> Result<&'a Path> {
    let first = required(name, text)?;
    ensure!(*first != 0, InvalidArgument, "{name} must not be empty");
    Ok(Path::new(OsStr::from_bytes(CStr::from_ptr(text).to_bytes())))
}

/// An array that has an entry for each class, in host memory; `None`: NULL.
pub(super) unsafe fn table<'a, T>(head: &Head, name: &str, entries: *const T, count: u64) -> Result<Option<&'a [T]>> {
    let count = array(name, entries, count)?;
    head.require_host(name, entries)?;
    Ok((!entries.is_null()).then(|| match count {
        0 => &[][..],
        count => std::slice::from_raw_parts(entries, count),
    }))
}

/// Calls the caller's function, if there is one.
pub(super) fn tell((progress, user): (pfc_progress_fn, *mut c_void), done: u64, total: u64) {
    if let Some(progress) = progress {
        // SAFETY: the caller gave a function that may be called with its pointer.
        unsafe { progress(user, done, total) }
    }
}
