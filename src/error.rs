//! Statuses and errors: one list for the library and for the C interface.

use std::fmt;

/// What went wrong, as `pfc_status` numbers it (0 is success and has no variant).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Status {
    InvalidArgument = 1,
    Unsupported = 2,
    OutOfMemory = 3,
    Device = 4,
    Comm = 5,
    Remote = 6,
    Timeout = 7,
    Aborted = 8,
    Io = 9,
    Corrupt = 10,
    Mismatch = 11,
    Label = 12,
    NotFinite = 13,
    Poisoned = 14,
    Forked = 15,
    Panic = 16,
}

impl Status {
    pub const ALL: [Status; 16] = [
        Status::InvalidArgument,
        Status::Unsupported,
        Status::OutOfMemory,
        Status::Device,
        Status::Comm,
        Status::Remote,
        Status::Timeout,
        Status::Aborted,
        Status::Io,
        Status::Corrupt,
        Status::Mismatch,
        Status::Label,
        Status::NotFinite,
        Status::Poisoned,
        Status::Forked,
        Status::Panic,
    ];

    pub fn from_code(code: i64) -> Option<Status> {
        Status::ALL.into_iter().find(|&s| s as i64 == code)
    }

    /// The name of the constant in the C header, without its prefix.
    pub fn name(self) -> &'static str {
        match self {
            Status::InvalidArgument => "INVALID_ARGUMENT",
            Status::Unsupported => "UNSUPPORTED",
            Status::OutOfMemory => "OUT_OF_MEMORY",
            Status::Device => "DEVICE",
            Status::Comm => "COMM",
            Status::Remote => "REMOTE",
            Status::Timeout => "TIMEOUT",
            Status::Aborted => "ABORTED",
            Status::Io => "IO",
            Status::Corrupt => "CORRUPT",
            Status::Mismatch => "MISMATCH",
            Status::Label => "LABEL",
            Status::NotFinite => "NOT_FINITE",
            Status::Poisoned => "POISONED",
            Status::Forked => "FORKED",
            Status::Panic => "PANIC",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A status and a sentence that names the argument, the value and the rank. Where there is no memory for the sentence it is cut, or
/// empty: the status remains.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {message}")]
pub struct Error {
    pub status: Status,
    pub message: String,
}

impl Clone for Error {
    fn clone(&self) -> Error {
        Error::formatted(self.status, format_args!("{}", self.message))
    }
}

/// A string that stays as it is where there is no memory for more.
#[derive(Default)]
struct Text(String);

impl fmt::Write for Text {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        self.0.try_reserve(more.len()).map_err(|_| fmt::Error)?;
        self.0.push_str(more);
        Ok(())
    }
}

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    /// The error of `error!`.
    #[doc(hidden)]
    pub fn formatted(status: Status, message: fmt::Arguments<'_>) -> Error {
        let mut text = Text::default();
        // What fits is what there is.
        let _ = fmt::Write::write_fmt(&mut text, message);
        Error { status, message: text.0 }
    }

    /// What a rank says of another one's failure; `status` is the number that travelled.
    pub(crate) fn remote(rank: usize, status: i64) -> Error {
        match Status::from_code(status) {
            Some(status) => crate::error!(Remote, "rank {rank} failed with {status}"),
            None => crate::error!(Remote, "rank {rank} failed with status {status}"),
        }
    }

    /// The same error with what was being done in front of it.
    pub fn during(self, what: impl fmt::Display) -> Error {
        Error::formatted(self.status, format_args!("{what}: {}", self.message))
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// What a rank brings to a call that all ranks make: a value, or the failure of its own checks.
///
/// A rank that has failed still takes part in the messages that its peers have begun, so that all of them learn of the failure and
/// none waits for it. So the failure travels on as an argument, and is returned only when the others know.
pub type Contribution<T> = Result<T>;

/// `error!(Label, "row {row} ...")`: an [`Error`] of that status with a formatted message.
#[macro_export]
#[doc(hidden)]
macro_rules! error {
    ($status:ident, $($message:tt)*) => {
        $crate::Error::formatted($crate::Status::$status, format_args!($($message)*))
    };
}

/// `ensure!(condition, Label, "row {row} ...")`: returns that error unless the condition holds.
#[macro_export]
#[doc(hidden)]
macro_rules! ensure {
    ($condition:expr, $status:ident, $($message:tt)*) => {
        if !$condition {
            return Err($crate::error!($status, $($message)*));
        }
    };
}
