//! Runs a body on every rank of a group of threads.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::Mutex;
use std::time::Duration;

use crate::capi::Comm;

/// A wait that no test reaches unless something hangs, on a machine with ten times as many programs as cores either.
pub const LONG: Duration = Duration::from_secs(240);

/// Runs ranks of which some wait in vain. Their deadline is for what is sound before that, too, which takes as long as the machine is busy:
/// where it was `too_short` they run again, with a longer one. Gives the deadline, and what came of it.
pub fn with_ample_time<T>(run: impl Fn(Duration) -> T, too_short: impl Fn(&T) -> bool) -> (Duration, T) {
    let mut deadline = Duration::from_secs(5);
    loop {
        let outcome = run(deadline);
        if deadline >= LONG || !too_short(&outcome) {
            return (deadline, outcome);
        }
        deadline *= 4;
    }
}

/// One rank's place in the group.
pub struct Rank {
    pub rank: usize,
    pub size: usize,
    pub comm: Comm,
}

/// Calls `body` on `n` ranks at once, each on a thread of its own; gives what they return, in rank order.
///
/// When one panics its communicator is aborted, so that the others return from their collectives; the first panic is then the
/// caller's.
pub fn on_ranks<T: Send>(n: usize, body: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    on_comms(Comm::threads(n as u32), body)
}

/// The same over communicators of the test's own making.
pub fn on_comms<T: Send>(comms: Vec<Comm>, body: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    let size = comms.len();
    let first_panic = Mutex::new(None);
    let results: Vec<Option<T>> = std::thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .enumerate()
            .map(|(rank, comm)| {
                let (body, first_panic) = (&body, &first_panic);
                scope.spawn(move || {
                    comm.set_timeout(LONG);
                    let place = Rank { rank, size, comm };
                    catch_unwind(AssertUnwindSafe(|| body(&place)))
                        .map_err(|panic| {
                            first_panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
                            place.comm.abort();
                        })
                        .ok()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught")).collect()
    });
    if let Some(panic) = first_panic.into_inner().unwrap_or_else(|e| e.into_inner()) {
        resume_unwind(panic);
    }
    results.into_iter().map(|result| result.expect("no panic, so a result")).collect()
}

/// A group of threads, for [`together`].
pub fn group(size: u32) -> Vec<Comm> {
    let ranks = Comm::threads(size);
    ranks.iter().for_each(|rank| rank.set_timeout(LONG));
    ranks
}

/// Runs `body` on a thread for each rank; what they returned, in rank order. A rank that panics leaves the others waiting.
pub fn together<T: Send>(ranks: &[Comm], body: impl Fn(&Comm) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's thread")).collect()
    })
}
