//! The environment's settings. Nothing else reads the environment when a program runs.

use std::ffi::OsString;

use crate::{error, Result};

/// What a variable is set to; `None` where it is unset or empty.
///
/// A program that runs with rights which its user does not have (set-user-ID, set-group-ID, file capabilities) has none of them: the
/// user would choose which library it loads and which files it writes.
pub(crate) fn setting(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    if is_privileged() {
        log::warn!("{name} is ignored in a program with more rights than its user");
        return None;
    }
    Some(value)
}

/// Whether a switch is on: 1, true, yes or on, in either case. It is off at 0, false, no, off, or unset.
pub(crate) fn switch(name: &str) -> Result<bool> {
    setting(name).map_or(Ok(false), |value| parse_switch(name, &value.to_string_lossy()))
}

fn parse_switch(name: &str, value: &str) -> Result<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(error!(InvalidArgument, "{name} must be 1, true, yes or on, or 0, false, no or off, got {value:?}")),
    }
}

/// Whether the system says so of this process: what the loader goes by when it ignores LD_PRELOAD.
fn is_privileged() -> bool {
    // SAFETY: a question without arguments in memory.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let answer = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    // SAFETY: the same.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let answer = unsafe { libc::getuid() != libc::geteuid() || libc::getgid() != libc::getegid() };
    answer
}

#[cfg(test)]
mod tests;
