//! One thread at a time: a call that exchanges messages has its end of the communicator to itself, from its first message to its
//! last. A second thread's call is refused, not put in a queue: what it exchanged in between, or next, the other ranks would take for
//! something else.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Communicator;
use crate::{error, Result};

/// Which thread exchanges messages; 0: none.
#[derive(Default)]
pub(super) struct Holder(AtomicUsize);

/// A thread's right to exchange messages, until it is dropped.
pub struct Turn<'a> {
    /// `None` for a call within one that has it.
    holder: Option<&'a Holder>,
}

/// A number that no other living thread has.
fn this_thread() -> usize {
    thread_local! {
        static HERE: u8 = const { 0 };
    }
    HERE.with(|here| std::ptr::from_ref(here) as usize)
}

impl Communicator {
    /// The calling thread's turn. INVALID_ARGUMENT if another thread has it, whose call goes on.
    pub fn take_turn(&self) -> Result<Turn<'_>> {
        self.own_process()?;
        let (holder, this) = (&self.holder, this_thread());
        match holder.0.compare_exchange(0, this, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Ok(Turn { holder: Some(holder) }),
            Err(thread) if thread == this => Ok(Turn { holder: None }),
            Err(_) => Err(error!(InvalidArgument, "comm is in use by another thread (rank {})", self.rank())),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(holder) = self.holder {
            holder.0.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests;
