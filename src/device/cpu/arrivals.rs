//! The chunks of a sample as they come in from a file or are ready to go back, for threads that wait for them.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::buffers::resize;
use super::products::CHUNK;
use crate::Result;

#[derive(Default)]
pub(super) struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    there: Vec<bool>,
    /// No other chunk will come.
    over: bool,
}

impl Arrivals {
    /// Of as many chunks from the next `restart` on. Made when a step begins: in an update, a lack of memory would end the head.
    pub fn resize(&mut self, chunks: usize) -> Result<()> {
        resize(&mut self.state.get_mut().unwrap_or_else(PoisonError::into_inner).there, chunks)
    }

    /// No chunk is there any more.
    pub fn restart(&mut self) {
        let State { there, over } = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        there.fill(false);
        *over = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chunk of these columns is there, whole.
    pub fn has_come(&self, columns: &Range<usize>) {
        self.lock().there[columns.start / CHUNK] = true;
        self.changed.notify_all();
    }

    /// What has not come until now never will.
    pub fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Ends when the guard goes, be it by a panic.
    pub fn ending(&self) -> Ending<'_> {
        Ending(self)
    }

    /// Waits for all chunks of these columns. Gives false where one of them will never come.
    pub fn wait(&self, columns: &Range<usize>) -> bool {
        let chunks = columns.start / CHUNK..columns.end.div_ceil(CHUNK);
        let mut state = self.lock();
        loop {
            if state.there[chunks.clone()].iter().all(|&there| there) {
                return true;
            }
            if state.over {
                return false;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

pub(super) struct Ending<'a>(&'a Arrivals);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests;
