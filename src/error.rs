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

/// A status and a sentence that names the argument, the value and the rank.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {message}")]
pub struct Error {
    pub status: Status,
    pub message: String,
}

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    /// What a rank says of another one's failure; `status` is the number that travelled.
    pub(crate) fn remote(rank: usize, status: i64) -> Error {
        match Status::from_code(status) {
            Some(status) => crate::error!(Remote, "rank {rank} failed with {status}"),
            None => crate::error!(Remote, "rank {rank} failed with status {status}"),
        }
    }

    /// The same error with what was being done in front of it.
    pub fn during(mut self, what: &str) -> Error {
        self.message = format!("{what}: {}", self.message);
        self
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
        $crate::Error::new($crate::Status::$status, format!($($message)*))
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
