//! The chunks of a sample as they come in from a file or are ready to go back, for threads that wait for them.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::products::CHUNK;
use crate::memory::zeros;
use crate::Result;

pub(super) struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    there: Vec<bool>,
    /// No other chunk will come.
    over: bool,
}

impl Arrivals {
    /// Of none of these chunks yet.
    pub fn new(chunks: usize) -> Result<Arrivals> {
        let state = State { there: zeros(&[chunks], "chunks of a sample")?, over: false };
        Ok(Arrivals { state: Mutex::new(state), changed: Condvar::new() })
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
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_told_of_the_chunk_or_of_the_end() {
        let arrivals = Arrivals::new(3).expect("memory");
        let (first, last) = (0..CHUNK, 2 * CHUNK..2 * CHUNK + 1);
        std::thread::scope(|scope| {
            let early = scope.spawn(|| arrivals.wait(&first));
            let both = scope.spawn(|| arrivals.wait(&(CHUNK - 1..CHUNK + 1)));
            let never = scope.spawn(|| arrivals.wait(&last));
            arrivals.has_come(&first);
            assert!(early.join().expect("no panic"));
            arrivals.has_come(&(CHUNK..2 * CHUNK));
            assert!(both.join().expect("no panic"));
            drop(arrivals.ending());
            assert!(!never.join().expect("no panic"));
        });
        // What has come is there after the end as well.
        assert!(arrivals.wait(&first) && arrivals.wait(&(0..0)));
    }
}
