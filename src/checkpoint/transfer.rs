//! Pieces of a file on their way to the disk or from it, beside the caller's work: a thread waits for the disk while the caller fills the
//! next piece or uses the one before.
//!
//! A checkpoint has little use for the page cache, which would lose other files' pages to it. Writes go past the cache where the file
//! system can do that. Reads go through it, since the system reads ahead faster than single transfers are (1,250 MB/s against 800 where it
//! was measured), and leave it at once if no other rank reads the same rows.

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::file::{is_refusal, set_direct};
use crate::memory::zeros;

/// Bytes of a piece. Of this size one transfer at a time keeps a disk busy.
pub(super) const PIECE: usize = 4 << 20;
/// Direct writes begin, end and lie in memory at multiples of a sector. A disk with larger ones refuses, and is written through the cache.
pub(super) const SECTOR: usize = 4096;

/// Memory for [`PIECE`] bytes.
pub(super) struct Piece {
    memory: Vec<u8>,
    /// The first byte at a multiple of [`SECTOR`].
    first: usize,
}

impl Piece {
    pub fn new() -> crate::Result<Piece> {
        let memory = zeros::<u8>(&[PIECE + SECTOR], "a piece of a checkpoint")?;
        let first = memory.as_ptr().align_offset(SECTOR);
        Ok(Piece { memory, first })
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.first..self.first + PIECE]
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.first..self.first + PIECE]
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Direction {
    Read {
        /// Nobody else reads these pieces, nor does anybody soon.
        once: bool,
    },
    Write,
}

/// Moves one piece at a time.
pub(super) struct Mover {
    shared: Arc<Shared>,
    /// `None` where no thread could be started: then pieces are moved as they are begun.
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    file: File,
    direction: Direction,
    state: Mutex<State>,
    changed: Condvar,
}

enum State {
    Idle,
    Begun(Piece, u64, Range<usize>),
    Moved(Piece, Result<usize>),
    Over,
}

impl Mover {
    pub fn new(file: File, direction: Direction) -> Mover {
        match direction {
            Direction::Read { .. } => advise(&file, Advice::InOrder),
            Direction::Write => {
                set_direct(&file, true);
            }
        }
        let shared = Arc::new(Shared { file, direction, state: Mutex::new(State::Idle), changed: Condvar::new() });
        let own = shared.clone();
        let thread = std::thread::Builder::new().name("pfc-checkpoint".to_owned()).spawn(move || own.keep_moving()).ok();
        Mover { shared, thread }
    }

    /// Begins to move some bytes of a piece, from a whole sector on; the piece lies at byte `at` of the file, a multiple of [`PIECE`]. The
    /// piece before has been ended.
    pub fn begin(&self, piece: Piece, at: u64, bytes: Range<usize>) {
        debug_assert!(at.is_multiple_of(PIECE as u64) && bytes.start.is_multiple_of(SECTOR) && bytes.end <= PIECE);
        let next = match self.thread {
            Some(_) => State::Begun(piece, at, bytes),
            None => self.shared.moved(piece, at, bytes),
        };
        *self.shared.lock() = next;
        self.shared.changed.notify_all();
    }

    /// Waits for the piece that was begun. Returns it with the number of its bytes that have been moved: fewer than asked for at the end
    /// of a file that is read.
    pub fn end(&self) -> (Piece, Result<usize>) {
        let mut state = self.shared.lock();
        loop {
            match std::mem::replace(&mut *state, State::Idle) {
                State::Moved(piece, result) => return (piece, result),
                State::Begun(piece, at, bytes) => *state = State::Begun(piece, at, bytes),
                // The thread has it.
                State::Idle | State::Over => {}
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The file, written through the page cache from here on: for what is no multiple of a sector.
    pub fn file(&self) -> &File {
        set_direct(&self.shared.file, false);
        &self.shared.file
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        *self.shared.lock() = State::Over;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It does not panic, and if it had, nobody is left to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread does.
    fn keep_moving(&self) {
        let mut state = self.lock();
        loop {
            match std::mem::replace(&mut *state, State::Idle) {
                State::Begun(piece, at, bytes) => {
                    drop(state);
                    let moved = self.moved(piece, at, bytes);
                    state = self.lock();
                    if matches!(*state, State::Over) {
                        return;
                    }
                    *state = moved;
                    self.changed.notify_all();
                }
                State::Over => return,
                other => {
                    *state = other;
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn moved(&self, mut piece: Piece, at: u64, bytes: Range<usize>) -> State {
        let result = self.transfer(&mut piece[bytes.clone()], at + bytes.start as u64);
        State::Moved(piece, result)
    }

    fn transfer(&self, bytes: &mut [u8], at: u64) -> Result<usize> {
        let mut done = 0;
        while done < bytes.len() {
            let now = match self.direction {
                Direction::Read { .. } => self.file.read_at(&mut bytes[done..], at + done as u64),
                Direction::Write => self.file.write_at(&bytes[done..], at + done as u64),
            };
            match (now, self.direction) {
                (Ok(0), Direction::Read { .. }) => break,
                (Ok(0), Direction::Write) => return Err(ErrorKind::WriteZero.into()),
                (Ok(moved), _) => {
                    done += moved;
                    if !done.is_multiple_of(SECTOR) {
                        set_direct(&self.file, false);
                    }
                }
                (Err(cause), _) if cause.kind() == ErrorKind::Interrupted => {}
                // Some file systems learn only here that they cannot.
                (Err(cause), Direction::Write) if is_refusal(&cause) && set_direct(&self.file, false) => {}
                (Err(cause), _) => return Err(cause),
            }
        }
        if let Direction::Read { once: true } = self.direction {
            advise(&self.file, Advice::NotAgain { at, length: bytes.len() });
        }
        Ok(done)
    }
}

/// What the page cache is told of a file.
enum Advice {
    InOrder,
    NotAgain { at: u64, length: usize },
}

#[cfg(target_os = "linux")]
fn advise(file: &File, advice: Advice) {
    use std::os::fd::AsRawFd;
    let (at, length, advice) = match advice {
        Advice::InOrder => (0, 0, libc::POSIX_FADV_SEQUENTIAL),
        Advice::NotAgain { at, length } => (at as libc::off_t, length as libc::off_t, libc::POSIX_FADV_DONTNEED),
    };
    // SAFETY: the file is open. Advice that is not taken changes nothing but the time.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), at, length, advice) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &File, _: Advice) {}

#[cfg(test)]
mod tests;
