//! Cancellation of a thread, as pthread_cancel has it: an unwinding that Rust's frames do not let through, so that the process would be
//! aborted. It waits until the thread has left the library.

use std::ffi::c_int;

#[cfg(target_os = "linux")]
mod system {
    use super::c_int;

    pub const DISABLE: c_int = 1;

    extern "C" {
        pub fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
    }
}

/// The thread cannot be cancelled, until this is dropped.
pub(crate) struct Deferred {
    /// How it was before.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    before: c_int,
}

/// Where the thread waits, in a function of the caller's or in the system's, it goes on.
pub(crate) fn defer() -> Deferred {
    #[cfg_attr(not(target_os = "linux"), allow(unused_mut))]
    let mut before = 0;
    // SAFETY: changes the calling thread's state only, and `before` outlives the call.
    #[cfg(target_os = "linux")]
    unsafe {
        system::pthread_setcancelstate(system::DISABLE, &mut before);
    }
    Deferred { before }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        // SAFETY: as above; a state that the thread had.
        #[cfg(target_os = "linux")]
        unsafe {
            system::pthread_setcancelstate(self.before, &mut 0);
        }
    }
}
