//! Log lines.

use std::ffi::{c_char, c_void, CString};
use std::sync::{OnceLock, RwLock};

use log::{Level, LevelFilter, Log, Metadata, Record};

use super::boundary;
use super::status::pfc_status;
use crate::error;

/// Nothing.
pub const PFC_LOG_OFF: i32 = 0;
/// Failures.
pub const PFC_LOG_ERROR: i32 = 1;
/// Surprises: what works, but perhaps not as intended.
pub const PFC_LOG_WARN: i32 = 2;
/// One line for each handle made, with the choices that the library made.
pub const PFC_LOG_INFO: i32 = 3;
/// Details, for debugging the library.
pub const PFC_LOG_DEBUG: i32 = 4;

/// Receives a log line: level is PFC_LOG_*; message is valid during the call only. Called from any thread. Must not call pfc_
/// functions on handles. It may still be running on another thread after pfc_set_log has replaced it, so keep what user points to.
pub type pfc_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: i32, message: *const c_char)>;

struct Sink {
    function: unsafe extern "C" fn(*mut c_void, i32, *const c_char),
    user: usize,
}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);
/// Whether the program's logger is ours.
static INSTALLED: OnceLock<bool> = OnceLock::new();

struct Forward;

impl Log for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let (function, user) = match SINK.read().unwrap_or_else(|e| e.into_inner()).as_ref() {
            Some(sink) => (sink.function, sink.user),
            None => return,
        };
        let level = match record.level() {
            Level::Error => PFC_LOG_ERROR,
            Level::Warn => PFC_LOG_WARN,
            Level::Info => PFC_LOG_INFO,
            Level::Debug | Level::Trace => PFC_LOG_DEBUG,
        };
        if let Ok(text) = CString::new(record.args().to_string()) {
            // SAFETY: the caller of pfc_set_log promised a function that may be called with its pointer from any thread.
            unsafe { function(user as *mut c_void, level, text.as_ptr()) }
        }
    }

    fn flush(&self) {}
}

/// Sends log lines up to a level to a function. The library is silent until this is called. Any thread; the last call counts.
///
/// @param function receives the lines, or NULL to be silent again
/// @param user passed to the function unchanged
/// @param level PFC_LOG_OFF to PFC_LOG_DEBUG
/// @return UNSUPPORTED if the program is in Rust and has installed its own logger
#[no_mangle]
pub unsafe extern "C" fn pfc_set_log(function: pfc_log_fn, user: *mut c_void, level: i32) -> pfc_status {
    boundary(|| {
        let filter = match level {
            PFC_LOG_OFF => LevelFilter::Off,
            PFC_LOG_ERROR => LevelFilter::Error,
            PFC_LOG_WARN => LevelFilter::Warn,
            PFC_LOG_INFO => LevelFilter::Info,
            PFC_LOG_DEBUG => LevelFilter::Debug,
            _ => return Err(error!(InvalidArgument, "level must be PFC_LOG_OFF (0) to PFC_LOG_DEBUG (4), got {level}")),
        };
        if !INSTALLED.get_or_init(|| log::set_logger(&Forward).is_ok()) {
            return Err(error!(Unsupported, "this program has installed a logger of its own: use that one"));
        }
        *SINK.write().unwrap_or_else(|e| e.into_inner()) = function.map(|function| Sink { function, user: user as usize });
        log::set_max_level(if function.is_some() { filter } else { LevelFilter::Off });
        Ok(())
    })
}
