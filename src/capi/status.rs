//! Statuses, the text of the last error, the version of the library.

use std::cell::Cell;
use std::ffi::{c_char, CStr};

use crate::Error;

/// PFC_OK or one of PFC_ERROR_*.
pub type pfc_status = i32;

/// Success.
pub const PFC_OK: pfc_status = 0;
/// An argument, an option or the order of calls is wrong; the message names it.
pub const PFC_ERROR_INVALID_ARGUMENT: pfc_status = 1;
/// Not in this build, on this machine, or not yet; the message says which.
pub const PFC_ERROR_UNSUPPORTED: pfc_status = 2;
/// An allocation failed; the message names the bytes.
pub const PFC_ERROR_OUT_OF_MEMORY: pfc_status = 3;
/// The device failed.
pub const PFC_ERROR_DEVICE: pfc_status = 4;
/// The communicator failed on this rank; for a custom one the message has its own code.
pub const PFC_ERROR_COMM: pfc_status = 5;
/// Another rank failed; the message names it and its status.
pub const PFC_ERROR_REMOTE: pfc_status = 6;
/// A collective took longer than pfc_comm_set_timeout allows; the message names it and, where known, the missing rank.
pub const PFC_ERROR_TIMEOUT: pfc_status = 7;
/// The communicator was aborted earlier.
pub const PFC_ERROR_ABORTED: pfc_status = 8;
/// Reading or writing a file failed.
pub const PFC_ERROR_IO: pfc_status = 9;
/// A file's contents are damaged.
pub const PFC_ERROR_CORRUPT: pfc_status = 10;
/// The ranks disagree: options, steps, operations or sizes; the message names rank, field and values.
pub const PFC_ERROR_MISMATCH: pfc_status = 11;
/// A label is out of range; the message names row, value and rank. Nothing was updated.
pub const PFC_ERROR_LABEL: pfc_status = 12;
/// An embedding or a sum is NaN or infinite; the message names row and rank. Nothing was updated.
pub const PFC_ERROR_NOT_FINITE: pfc_status = 13;
/// An earlier failure left the handle unusable: free it and load a checkpoint.
pub const PFC_ERROR_POISONED: pfc_status = 14;
/// The handle was made by the parent of this process, before a fork().
pub const PFC_ERROR_FORKED: pfc_status = 15;
/// A bug in the library: it panicked. The handle is poisoned and its communicator aborted.
pub const PFC_ERROR_PANIC: pfc_status = 16;

/// Bytes of an error's text that is kept, with its terminating zero; longer texts are cut.
const LONGEST: usize = 1024;

/// The text of an error as callers get it. Needs no allocation: it is there when memory is not.
#[derive(Clone, Copy)]
pub(super) struct ErrorText([u8; LONGEST]);

impl ErrorText {
    pub const EMPTY: ErrorText = ErrorText([0; LONGEST]);

    pub fn of(error: &Error) -> ErrorText {
        let text = match error.message.is_empty() {
            true => "there is no memory for the text of this error",
            false => error.message.as_str(),
        };
        let mut bytes = [0; LONGEST];
        let mut length = 0;
        for character in text.chars() {
            // A zero would end the text.
            let character = if character == '\0' { '?' } else { character };
            if length + character.len_utf8() >= LONGEST {
                break;
            }
            length += character.encode_utf8(&mut bytes[length..]).len();
        }
        ErrorText(bytes)
    }

    /// Copies the text, cut to `size` bytes including its terminating zero, unless `buffer` is NULL; bytes of the whole text.
    ///
    /// # Safety
    /// There is room for `size` bytes at `buffer`.
    pub unsafe fn copy_to(&self, buffer: *mut c_char, size: u64) -> u64 {
        let length = self.0.iter().position(|&byte| byte == 0).unwrap_or(LONGEST - 1);
        if !buffer.is_null() && size > 0 {
            let kept = length.min(size as usize - 1);
            std::ptr::copy_nonoverlapping(self.0.as_ptr(), buffer.cast(), kept);
            *buffer.add(kept) = 0;
        }
        length as u64 + 1
    }
}

thread_local! {
    /// Has no destructor: it is there while a thread ends.
    static LAST_ERROR: Cell<ErrorText> = const { Cell::new(ErrorText::EMPTY) };
}

/// Remembers the error for pfc_last_error and gives its status.
pub(super) fn fail(error: &Error) -> pfc_status {
    LAST_ERROR.set(ErrorText::of(error));
    error.status as pfc_status
}

/// The library's version: major << 16 | minor << 8 | patch. Any thread.
#[no_mangle]
pub extern "C" fn pfc_version() -> u32 {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    part(env!("CARGO_PKG_VERSION_MAJOR")) << 16 | part(env!("CARGO_PKG_VERSION_MINOR")) << 8 | part(env!("CARGO_PKG_VERSION_PATCH"))
}

/// Version, commit, target and backends of this build, as one line of text that stays valid. Any thread.
#[no_mangle]
pub extern "C" fn pfc_build_info() -> *const c_char {
    concat!(
        "partialfc ",
        env!("CARGO_PKG_VERSION"),
        " (",
        env!("PFC_COMMIT"),
        ", ",
        env!("PFC_TARGET"),
        ") devices: cpu; cuda: ",
        env!("PFC_CUDA_IMAGES"),
        "; communicators: self threads custom nccl\0"
    )
    .as_ptr()
    .cast()
}

/// The name of a status, such as "PFC_ERROR_LABEL"; "PFC_ERROR_UNKNOWN" for any other number. Stays valid. Any thread.
#[no_mangle]
pub extern "C" fn pfc_status_name(status: pfc_status) -> *const c_char {
    let name: &CStr = match status {
        PFC_OK => c"PFC_OK",
        PFC_ERROR_INVALID_ARGUMENT => c"PFC_ERROR_INVALID_ARGUMENT",
        PFC_ERROR_UNSUPPORTED => c"PFC_ERROR_UNSUPPORTED",
        PFC_ERROR_OUT_OF_MEMORY => c"PFC_ERROR_OUT_OF_MEMORY",
        PFC_ERROR_DEVICE => c"PFC_ERROR_DEVICE",
        PFC_ERROR_COMM => c"PFC_ERROR_COMM",
        PFC_ERROR_REMOTE => c"PFC_ERROR_REMOTE",
        PFC_ERROR_TIMEOUT => c"PFC_ERROR_TIMEOUT",
        PFC_ERROR_ABORTED => c"PFC_ERROR_ABORTED",
        PFC_ERROR_IO => c"PFC_ERROR_IO",
        PFC_ERROR_CORRUPT => c"PFC_ERROR_CORRUPT",
        PFC_ERROR_MISMATCH => c"PFC_ERROR_MISMATCH",
        PFC_ERROR_LABEL => c"PFC_ERROR_LABEL",
        PFC_ERROR_NOT_FINITE => c"PFC_ERROR_NOT_FINITE",
        PFC_ERROR_POISONED => c"PFC_ERROR_POISONED",
        PFC_ERROR_FORKED => c"PFC_ERROR_FORKED",
        PFC_ERROR_PANIC => c"PFC_ERROR_PANIC",
        _ => c"PFC_ERROR_UNKNOWN",
    };
    name.as_ptr()
}

/// The text of this thread's last error, or "". At most 1023 bytes. Valid until this thread's next failing call, or its end.
#[no_mangle]
pub extern "C" fn pfc_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.as_ptr().cast_const().cast())
}

/// Copies the text of pfc_last_error, cut to `size` bytes including its terminating zero. For managed languages.
///
/// @param buffer written, or NULL to ask for the size only
/// @param size bytes at buffer
/// @return bytes of the whole text, including its terminating zero
#[no_mangle]
pub unsafe extern "C" fn pfc_last_error_copy(buffer: *mut c_char, size: u64) -> u64 {
    LAST_ERROR.get().copy_to(buffer, size)
}
