//! What the standard library does not ask of a file system: transfers past the page cache, and room set aside.

use std::fs::File;
use std::io::{Error, Result};

/// Whether what is read from a file and written to it goes past the page cache from here on. Returns whether that has changed anything.
#[cfg(target_os = "linux")]
pub(crate) fn set_direct(file: &File, direct: bool) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: reads and changes flags of a file that is open.
    unsafe {
        let before = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        let after = if direct { before | libc::O_DIRECT } else { before & !libc::O_DIRECT };
        before >= 0 && before != after && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, after) == 0
    }
}

/// Whether an error is that of a transfer that cannot go past the page cache.
#[cfg(target_os = "linux")]
pub(crate) fn is_refusal(cause: &Error) -> bool {
    cause.raw_os_error() == Some(libc::EINVAL)
}

/// Reserves the disk's room for a file, so that a disk that is too small is known before the first byte is written.
#[cfg(target_os = "linux")]
pub(crate) fn reserve_room(file: &File, bytes: u64) -> Result<()> {
    use std::os::fd::AsRawFd;
    let Ok(bytes) = bytes.try_into() else { return Ok(()) };
    // SAFETY: the file is open. A length of 0 is refused with EINVAL, and needs no room.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes) } {
        0 => Ok(()),
        // Many file systems cannot reserve any. What else is wrong, the writes will tell.
        _ => match Error::last_os_error() {
            cause if matches!(cause.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)) => Err(cause),
            _ => Ok(()),
        },
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn set_direct(_: &File, _: bool) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn is_refusal(_: &Error) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn reserve_room(_: &File, _: u64) -> Result<()> {
    Ok(())
}
