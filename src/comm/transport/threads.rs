//! N ranks in one process: each rank's thread calls with its own end, and copies straight from and to its peers' memory.
//!
//! An operation has two meetings. Before the first a rank posts its pointers. At the first, *begin*, the outcome is decided under
//! one lock: the last rank arrives and the operation begins on every rank, or a failure (deadline, abort, mismatch, a freed end)
//! comes first and it begins on none. So a rank that gives up never had a peer in its memory. From begin on no rank waits for
//! anything but its peers' copying, hence the second meeting, *done*, needs no deadline: until it, nobody returns.
//!
//! In a device's memory the same meetings order streams: what a rank does is put onto its stream, and no rank waits for a device.
//! Each brings an event to begin, after which its buffers are as the operation should find them, and its stream waits for all
//! peers' events before it touches them; each brings another to done, after its share, and what comes onto a stream later waits for
//! those. Putting work onto a stream may fail: a rank then brings its failure to done, and the operation fails on all.

use std::any::Any;
use std::ffi::c_void;
use std::ops::Range;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::number::Number;
use super::{Call, MemorySpace, Operation, Reduction, Signature, Transport};
use crate::matrix::{DType, ReduceOp};
use crate::stream::{Event, StreamMemory, MOST_REDUCED};
use crate::{ensure, error, Error, Result, Status};

/// More ranks than that in one process are a mistake.
const MOST_RANKS: u32 = 4096;

/// How long a rank polls before it sleeps: about what a sleep and a wake-up cost.
const SPIN: Duration = Duration::from_micros(20);

/// Elements a reduction combines at a time, in the first-level cache.
const CHUNK: usize = 1024;

/// A share of a reduction is a multiple of it (but the last): no two ranks write to one cache line of an aligned buffer.
const GRANULE: usize = 16;

/// Makes the ends of a group of `size` ranks, in rank order.
pub fn group(size: u32) -> Result<Vec<ThreadComm>> {
    ensure!((1..=MOST_RANKS).contains(&size), InvalidArgument, "n must be 1 to {MOST_RANKS}, got {size}");
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let group = Arc::new(Group {
        posts: (0..size).map(|_| Post::default()).collect(),
        begun: AtomicU64::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        meeting: Mutex::new(Meeting {
            arrived: vec![false; size as usize],
            ready: vec![None; size as usize],
            finished: vec![None; size as usize],
            ..Meeting::default()
        }),
        changed: Condvar::new(),
        // With more ranks than cores a polling rank only keeps an overdue one from running.
        spin: if size as usize <= cores { SPIN } else { Duration::ZERO },
    });
    Ok((0..size).map(|rank| ThreadComm { group: group.clone(), rank, turn: AtomicU64::new(0) }).collect())
}

/// One rank's end.
pub struct ThreadComm {
    group: Arc<Group>,
    rank: u32,
    /// Operations this rank has entered.
    turn: AtomicU64,
}

struct Group {
    posts: Box<[Post]>,
    /// Operations that all ranks have arrived at.
    begun: AtomicU64,
    /// Operations that all ranks have finished.
    done: AtomicU64,
    /// Whether `meeting.failure` is set, for those who poll.
    failed: AtomicBool,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    spin: Duration,
}

/// A rank's pointers for the operation it is in: written before begin, read between begin and done.
#[derive(Default)]
#[repr(align(64))]
struct Post {
    send: AtomicPtr<u8>,
    recv: AtomicPtr<u8>,
}

#[derive(Default)]
struct Meeting {
    /// The first rank at the coming operation and what it asks for.
    first: Option<(u32, Request)>,
    arrived: Vec<bool>,
    arrivals: usize,
    /// Ranks that are still copying.
    working: usize,
    /// In a device's memory, by rank: what the rank had on its stream before the operation, and with its share of it.
    ready: Vec<Option<Event>>,
    finished: Vec<Option<Event>>,
    /// Ranks that have yet to take `finished`.
    leaving: usize,
    /// The operation had begun when a rank could not do its share. `failure` is set too: no other operation follows.
    broken: Option<Error>,
    sleepers: usize,
    /// Why no further operation begins.
    failure: Option<Error>,
}

/// What all ranks must agree on: the operation, and the kind of memory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Request {
    signature: Signature,
    memory: &'static str,
}

impl Request {
    /// The first field in which two ranks differ, and both values.
    fn difference(&self, other: &Request) -> Option<(&'static str, String, String)> {
        let memory = || ("memory", self.memory.to_owned(), other.memory.to_owned());
        self.signature.difference(&other.signature).or_else(|| (self.memory != other.memory).then(memory))
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Wakes whoever sleeps, with the lock given back first so that they need not wait for it.
    fn wake(&self, meeting: MutexGuard<'_, Meeting>) {
        let sleepers = meeting.sleepers;
        drop(meeting);
        if sleepers > 0 {
            self.changed.notify_all();
        }
    }

    /// Lets no further operation begin. The first cause counts.
    fn fail(&self, mut meeting: MutexGuard<'_, Meeting>, cause: Error) {
        if meeting.failure.is_none() {
            meeting.failure = Some(cause);
            self.failed.store(true, Ordering::Release);
            if meeting.working == 0 {
                // Of an operation that will not begin; otherwise they go with the one that runs.
                meeting.ready.fill(None);
            }
            self.wake(meeting);
        }
    }

    fn spin(&self, ready: impl Fn() -> bool) -> bool {
        if self.spin.is_zero() {
            return ready();
        }
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.spin {
                return false;
            }
        }
    }
}

impl ThreadComm {
    /// One operation: begin, this rank's share of the work, done. The work does not wait; in host memory it does not fail either.
    fn operate(&self, send: *const u8, recv: *mut u8, call: &Call<'_>, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let named = |error: Error| self.report(&error, call);
        let request = Request { signature: call.signature, memory: call.space.kind() };
        let MemorySpace::Device { memory, stream } = call.space else {
            let turn = self.begin(request, send, recv, None, call)?;
            if call.signature.operation != Operation::Barrier {
                work()?;
                self.done(turn);
            }
            return Ok(());
        };
        let size = self.group.posts.len();
        ensure!(
            size <= MOST_REDUCED,
            Unsupported,
            "{}: {} memory must be exchanged by at most {MOST_REDUCED} ranks, got {size} (rank {})",
            call.label(),
            memory.kind(),
            self.rank
        );
        let ready = memory.record(stream).map_err(named)?;
        let turn = self.begin(request, send, recv, Some(ready), call)?;
        let worked = caught(|| {
            let ready = self.peers(&self.group.lock().ready);
            ready.iter().try_for_each(|event| memory.wait(stream, event))?;
            work()
        });
        // Also where the work has failed: part of it may be on the stream, and the peers have to wait for that.
        let recorded = caught(|| memory.record(stream));
        let failure = worked.as_ref().err().or(recorded.as_ref().err()).map(Failure::error);
        let mut meeting = self.group.lock();
        meeting.finished[self.rank as usize] = recorded.as_ref().ok().cloned();
        match failure {
            Some(cause) => {
                let cause = error!(Aborted, "rank {} could not do its share: {cause}", self.rank);
                meeting.broken.get_or_insert_with(|| cause.clone());
                self.group.fail(meeting, cause);
            }
            None => drop(meeting),
        }
        self.done(turn);
        let (finished, broken) = self.leave();
        // Even if the operation has failed: the caller may free its buffers now, in the stream's order.
        let followed = finished.iter().try_for_each(|event| memory.wait(stream, event));
        worked.and(recorded).map_err(|failure| named(failure.resume()))?;
        broken.map_or(followed, Err).map_err(named)
    }

    /// The events of all ranks but this one.
    fn peers(&self, events: &[Option<Event>]) -> Vec<Event> {
        events.iter().enumerate().filter(|(rank, _)| *rank != self.rank as usize).filter_map(|(_, event)| event.clone()).collect()
    }

    /// What this rank's stream has to wait for after done, and why the operation failed all the same.
    fn leave(&self) -> (Vec<Event>, Option<Error>) {
        let mut meeting = self.group.lock();
        let finished = self.peers(&meeting.finished);
        // No event outlives its operation here: its device may be gone before the next one. Of `ready` a rank takes back its own
        // only, since those who left before may have come to the next operation with theirs; none is in that one's `finished` yet.
        meeting.ready[self.rank as usize] = None;
        meeting.leaving -= 1;
        if meeting.leaving == 0 {
            meeting.finished.fill(None);
        }
        (finished, meeting.broken.clone())
    }

    fn begin(&self, request: Request, send: *const u8, recv: *mut u8, ready: Option<Event>, call: &Call<'_>) -> Result<u64> {
        let group = &*self.group;
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) + 1;
        let post = &group.posts[self.rank as usize];
        // The lock below orders these before the peers' reads.
        post.send.store(send.cast_mut(), Ordering::Relaxed);
        post.recv.store(recv, Ordering::Relaxed);
        let mut meeting = group.lock();
        if let Some(cause) = &meeting.failure {
            return Err(self.report(cause, call));
        }
        match meeting.first {
            None => meeting.first = Some((self.rank, request)),
            Some((rank, first)) if first != request => {
                let (low, high) =
                    if rank < self.rank { ((rank, first), (self.rank, request)) } else { ((self.rank, request), (rank, first)) };
                let cause = match low.1.difference(&high.1) {
                    Some((field, a, b)) => error!(Mismatch, "{field} is {a} on rank {} and {b} on rank {}", low.0, high.0),
                    None => error!(Mismatch, "ranks {} and {} differ", low.0, high.0),
                };
                let report = self.report(&cause, call);
                group.fail(meeting, cause);
                return Err(report);
            }
            Some(_) => (),
        }
        meeting.arrived[self.rank as usize] = true;
        meeting.ready[self.rank as usize] = ready;
        meeting.arrivals += 1;
        if meeting.arrivals == group.posts.len() {
            meeting.arrived.fill(false);
            meeting.arrivals = 0;
            meeting.first = None;
            if call.signature.operation == Operation::Barrier {
                group.done.store(turn, Ordering::Release);
            } else {
                meeting.working = group.posts.len();
                meeting.leaving = group.posts.len();
            }
            group.begun.store(turn, Ordering::Release);
            group.wake(meeting);
            return Ok(turn);
        }
        drop(meeting);
        let begun = || group.begun.load(Ordering::Acquire) >= turn;
        group.spin(|| begun() || group.failed.load(Ordering::Acquire));
        if begun() {
            return Ok(turn);
        }
        let mut meeting = group.lock();
        loop {
            if begun() {
                return Ok(turn);
            }
            if let Some(cause) = &meeting.failure {
                return Err(self.report(cause, call));
            }
            let left = call.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let cause = error!(Timeout, "{} did not arrive within {} ms", absent(&meeting.arrived), call.timeout.as_millis());
                let report = self.report(&cause, call);
                group.fail(meeting, cause);
                return Err(report);
            }
            meeting.sleepers += 1;
            meeting = group.changed.wait_timeout(meeting, left).unwrap_or_else(|e| e.into_inner()).0;
            meeting.sleepers -= 1;
        }
    }

    fn done(&self, turn: u64) {
        let group = &*self.group;
        let mut meeting = group.lock();
        meeting.working -= 1;
        if meeting.working == 0 {
            group.done.store(turn, Ordering::Release);
            return group.wake(meeting);
        }
        drop(meeting);
        let done = || group.done.load(Ordering::Acquire) >= turn;
        if group.spin(done) {
            return;
        }
        let mut meeting = group.lock();
        while !done() {
            meeting.sleepers += 1;
            meeting = group.changed.wait(meeting).unwrap_or_else(|e| e.into_inner());
            meeting.sleepers -= 1;
        }
    }

    fn report(&self, cause: &Error, call: &Call<'_>) -> Error {
        Error::formatted(cause.status, format_args!("{}: {} (this is rank {})", call.label(), cause.message, self.rank))
    }

    fn senders(&self) -> impl Iterator<Item = *const u8> + '_ {
        self.group.posts.iter().map(|post| post.send.load(Ordering::Relaxed).cast_const())
    }

    fn receivers(&self) -> impl Iterator<Item = *mut u8> + '_ {
        self.group.posts.iter().map(|post| post.recv.load(Ordering::Relaxed))
    }

    /// Combines elements `range` of all ranks' send buffers, in rank order; hands them on in chunks: `put(offset in range, ..)`.
    unsafe fn reduce<T: Number>(&self, range: Range<usize>, op: ReduceOp, put: impl Fn(usize, &[T])) {
        let mut sums = [T::default(); CHUNK];
        for start in range.clone().step_by(CHUNK) {
            let sums = &mut sums[..CHUNK.min(range.end - start)];
            for (rank, send) in self.senders().enumerate() {
                let values = std::slice::from_raw_parts(send.cast::<T>().add(start), sums.len());
                match (rank, op) {
                    (0, _) => sums.copy_from_slice(values),
                    (_, ReduceOp::Sum) => sums.iter_mut().zip(values).for_each(|(a, &b)| *a = a.sum(b)),
                    (_, ReduceOp::Max) => sums.iter_mut().zip(values).for_each(|(a, &b)| *a = a.largest(b)),
                }
            }
            put(start - range.start, sums);
        }
    }

    /// This rank's share of an all-reduce: nobody else touches these elements of any buffer, so send may be recv.
    unsafe fn reduce_share<T: Number>(&self, range: Range<usize>, op: ReduceOp) {
        self.reduce(range.clone(), op, |offset, sums: &[T]| {
            for recv in self.receivers() {
                std::ptr::copy_nonoverlapping(sums.as_ptr(), recv.cast::<T>().add(range.start + offset), sums.len());
            }
        });
    }

    /// The same on a stream.
    unsafe fn reduce_share_on(
        &self,
        memory: &dyn StreamMemory,
        stream: *mut c_void,
        range: Range<usize>,
        dtype: DType,
        op: ReduceOp,
    ) -> Result<()> {
        let (sources, destinations): (Vec<_>, Vec<_>) = (self.senders().collect(), self.receivers().collect());
        match range.len() {
            0 => Ok(()),
            count => memory.reduce(&sources, &destinations, range.start, count, dtype, op, stream),
        }
    }

    /// This rank's block of a reduce-scatter: nobody else reads that block of any send buffer, so recv may be this rank's own.
    unsafe fn reduce_block<T: Number>(&self, recv: *mut u8, count: usize, op: ReduceOp) {
        let start = self.rank as usize * count;
        self.reduce(start..start + count, op, |offset, sums: &[T]| {
            std::ptr::copy_nonoverlapping(sums.as_ptr(), recv.cast::<T>().add(offset), sums.len());
        });
    }

    /// The same on a stream.
    unsafe fn reduce_block_on(
        &self,
        memory: &dyn StreamMemory,
        stream: *mut c_void,
        recv: *mut u8,
        count: usize,
        dtype: DType,
        op: ReduceOp,
    ) -> Result<()> {
        let start = self.rank as usize * count * dtype.size();
        let sources: Vec<_> = self.senders().map(|send| send.wrapping_add(start)).collect();
        match count {
            0 => Ok(()),
            count => memory.reduce(&sources, &[recv], 0, count, dtype, op, stream),
        }
    }

    fn reducible(&self, dtype: DType) -> Result<()> {
        let known = matches!(dtype, DType::F32 | DType::F64 | DType::I32 | DType::I64);
        ensure!(known, Unsupported, "cannot reduce {} (rank {})", dtype.name(), self.rank);
        Ok(())
    }
}

impl Transport for ThreadComm {
    fn kind(&self) -> &'static str {
        "threads"
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.group.posts.len() as u32
    }

    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, call: &Call<'_>) -> Result<()> {
        self.operate(send, recv, call, || {
            self.senders().enumerate().try_for_each(|(rank, block)| call.space.copy(recv.wrapping_add(rank * bytes), block, bytes))
        })
    }

    unsafe fn all_reduce(&self, send: *const u8, recv: *mut u8, count: usize, reduction: Reduction, call: &Call<'_>) -> Result<()> {
        let Reduction { dtype, op } = reduction;
        self.reducible(dtype)?;
        let range = share(count, self.rank as usize, self.group.posts.len());
        self.operate(send, recv, call, || {
            match (call.space, dtype) {
                (MemorySpace::Device { memory, stream }, _) => self.reduce_share_on(memory, stream, range, dtype, op)?,
                (_, DType::F32) => self.reduce_share::<f32>(range, op),
                (_, DType::F64) => self.reduce_share::<f64>(range, op),
                (_, DType::I32) => self.reduce_share::<i32>(range, op),
                (_, DType::I64) => self.reduce_share::<i64>(range, op),
                (_, DType::F16 | DType::Bf16) => (),
            }
            Ok(())
        })
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        reduction: Reduction,
        call: &Call<'_>,
    ) -> Result<()> {
        let Reduction { dtype, op } = reduction;
        self.reducible(dtype)?;
        self.operate(send, recv, call, || {
            match (call.space, dtype) {
                (MemorySpace::Device { memory, stream }, _) => self.reduce_block_on(memory, stream, recv, count, dtype, op)?,
                (_, DType::F32) => self.reduce_block::<f32>(recv, count, op),
                (_, DType::F64) => self.reduce_block::<f64>(recv, count, op),
                (_, DType::I32) => self.reduce_block::<i32>(recv, count, op),
                (_, DType::I64) => self.reduce_block::<i64>(recv, count, op),
                (_, DType::F16 | DType::Bf16) => (),
            }
            Ok(())
        })
    }

    unsafe fn broadcast(&self, buffer: *mut u8, bytes: usize, root: u32, call: &Call<'_>) -> Result<()> {
        self.operate(buffer, buffer, call, || {
            let from = self.group.posts[root as usize].send.load(Ordering::Relaxed);
            match self.rank == root {
                true => Ok(()),
                false => call.space.copy(buffer, from, bytes),
            }
        })
    }

    fn barrier(&self, call: &Call<'_>) -> Result<()> {
        let none = std::ptr::null_mut();
        self.operate(none, none, call, || Ok(()))
    }

    fn abort(&self, cause: &Error) {
        let text = match cause.status {
            Status::Aborted => cause.message.clone(),
            _ => cause.to_string(),
        };
        self.group.fail(self.group.lock(), error!(Aborted, "rank {} aborted the communicator: {text}", self.rank));
    }
}

impl Drop for ThreadComm {
    fn drop(&mut self) {
        self.group.fail(self.group.lock(), error!(Comm, "rank {} freed its communicator", self.rank));
    }
}

/// Why a rank could not do its share on a stream.
enum Failure {
    Error(Error),
    /// It goes on unwinding when the peers know.
    Panicked(Box<dyn Any + Send>),
}

impl Failure {
    fn error(&self) -> Error {
        match self {
            Failure::Error(error) => error.clone(),
            Failure::Panicked(_) => error!(Panic, "it panicked"),
        }
    }

    fn resume(self) -> Error {
        match self {
            Failure::Error(error) => error,
            Failure::Panicked(panic) => resume_unwind(panic),
        }
    }
}

/// A rank that has begun must come to done, whatever happens.
fn caught<T>(body: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(outcome) => outcome.map_err(Failure::Error),
        Err(panic) => Err(Failure::Panicked(panic)),
    }
}

/// The elements of `count` that a rank combines.
fn share(count: usize, rank: usize, size: usize) -> Range<usize> {
    let granules = count.div_ceil(GRANULE);
    let (each, more) = (granules / size, granules % size);
    let start = |rank: usize| ((rank * each + rank.min(more)) * GRANULE).min(count);
    start(rank)..start(rank + 1)
}

/// "rank 3", "ranks 1 and 3", "ranks 0, 1, 2, 3, 4, 5 and 90 more".
fn absent(arrived: &[bool]) -> String {
    const NAMED: usize = 6;
    let missing: Vec<String> = arrived.iter().enumerate().filter(|(_, &here)| !here).map(|(rank, _)| rank.to_string()).collect();
    match missing.split_last() {
        Some((_, [])) => format!("rank {}", missing[0]),
        _ if missing.len() > NAMED => format!("ranks {} and {} more", missing[..NAMED].join(", "), missing.len() - NAMED),
        Some((last, others)) => format!("ranks {} and {last}", others.join(", ")),
        None => "no rank".to_owned(),
    }
}

#[cfg(test)]
mod tests;
