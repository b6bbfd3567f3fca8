//! Ends operations that outlive their deadline: those that a thread waits in, and those that were left on a stream.
//!
//! Only a transport knows how to stop what it runs ([`Stop`]). A thread of the watchdog's, made with the first operation and asleep as
//! long as nothing can expire, tells it to. A thread that waits for a stream needs no deadline of its own then: the transport's stop
//! makes the stream go on, and [`Watchdog::poll_failure`] says why.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Call;
use super::Label;
use crate::stream::Event;
use crate::{error, Error, Result, Status};

/// How often what is on a stream is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// How a transport ends its operations.
pub(super) trait Stop: Send + Sync {
    fn rank(&self) -> u32;

    /// Makes what runs, what is on streams, and what comes later end with an error. Called once, from any thread.
    fn stop(&self);

    /// Why `stop` can do nothing, if that is so.
    fn cannot_stop_reason(&self) -> Option<&'static str> {
        None
    }

    /// A failure that came up behind the callers' backs. Asked by the watchdog's thread as long as something is on a stream.
    fn async_error(&self) -> Result<()> {
        Ok(())
    }
}

pub(super) struct Watchdog {
    shared: Arc<Shared>,
}

struct Shared {
    stop: Arc<dyn Stop>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The operation that a thread is in.
    running: Option<Deadline>,
    /// There were operations on streams.
    followed: bool,
    /// Operations on streams, and the events after them.
    enqueued: Vec<(Event, Deadline)>,
    /// The thread sleeps until then; `None`: until it is woken.
    asleep_until: Option<Instant>,
    /// The running operation's deadline has passed and the transport was stopped for it.
    expired: bool,
    /// Why the transport was stopped, which it is once; or why it should have been.
    ended: Option<Error>,
    quit: bool,
    thread: Option<JoinHandle<()>>,
}

/// An operation by name, and when it must be over.
#[derive(Clone)]
struct Deadline {
    at: Instant,
    label: Label,
    timeout: Duration,
}

impl Deadline {
    fn of(call: &Call<'_>) -> Deadline {
        Deadline { at: call.deadline, label: call.label(), timeout: call.timeout }
    }
}

/// What became of a running operation while it ran.
pub(super) struct OperationOutcome {
    /// It was stopped at its deadline.
    pub expired: bool,
    /// The transport was stopped, for whatever reason.
    pub ended: Option<Error>,
}

impl Watchdog {
    pub fn new(stop: Arc<dyn Stop>) -> Watchdog {
        Watchdog { shared: Arc::new(Shared { stop, state: Mutex::default(), changed: Condvar::new() }) }
    }

    /// Watches an operation until `finish`, unless the transport has been stopped.
    pub fn start(&self, call: &Call<'_>) -> Result<()> {
        let mut state = self.shared.lock();
        if let Some(cause) = &state.ended {
            return Err(aborted(call, cause, self.shared.stop.rank()));
        }
        self.awaken(&mut state, call, call.deadline)?;
        state.running = Some(Deadline::of(call));
        state.expired = false;
        Ok(())
    }

    pub fn finish(&self) -> OperationOutcome {
        let mut state = self.shared.lock();
        state.running = None;
        OperationOutcome { expired: state.expired, ended: state.ended.clone() }
    }

    /// Watches an operation that is on a stream until the event after it has come.
    pub fn follow(&self, call: &Call<'_>, event: Event) -> Result<()> {
        let mut state = self.shared.lock();
        self.awaken(&mut state, call, call.deadline.min(Instant::now() + INTERVAL))?;
        state.followed = true;
        state.enqueued.push((event, Deadline::of(call)));
        Ok(())
    }

    /// Why the transport was stopped, if it was and had ever left anything on a stream: whoever waited for one is to know.
    pub fn poll_failure(&self) -> Result<()> {
        let state = self.shared.lock();
        match &state.ended {
            Some(cause) if state.followed => Err(cause.clone()),
            _ => Ok(()),
        }
    }

    /// Stops the transport, unless it has been.
    pub fn end(&self, cause: &Error) {
        self.shared.end(self.shared.lock(), cause.clone());
    }

    /// Sees to a thread that looks at `by` or before.
    fn awaken(&self, state: &mut State, call: &Call<'_>, by: Instant) -> Result<()> {
        if state.thread.is_none() {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("pfc-watchdog".to_owned()).spawn(move || shared.keep_watch());
            state.thread =
                Some(thread.map_err(|e| error!(OutOfMemory, "{}: cannot start the watchdog thread: {e}", call.label()))?);
        }
        if state.asleep_until.is_none_or(|until| until > by) {
            self.shared.changed.notify_one();
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The thread's life.
    fn keep_watch(&self) {
        let mut state = self.lock();
        while !state.quit {
            let now = Instant::now();
            if state.running.as_ref().is_some_and(|running| running.at <= now) {
                self.expire(state);
                state = self.lock();
                continue;
            }
            if !state.enqueued.is_empty() {
                state = self.look(state);
            }
            // A later operation with a later deadline lets it sleep on: it looks again when it wakes.
            let next = state.running.as_ref().map(|running| running.at);
            let poll = state.enqueued.iter().map(|(_, deadline)| deadline.at.min(Instant::now() + INTERVAL)).min();
            state.asleep_until = next.into_iter().chain(poll).min();
            if state.quit {
                break;
            }
            state = match state.asleep_until {
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0
                }
                None => self.changed.wait(state).unwrap_or_else(|e| e.into_inner()),
            };
        }
    }

    /// The deadline of the operation that a thread is in has passed.
    fn expire(&self, mut state: MutexGuard<'_, State>) {
        let Some(Deadline { label, .. }) = state.running.take() else { return };
        let rank = self.stop.rank();
        match self.stop.cannot_stop_reason() {
            None if state.ended.is_none() => {
                // Under the lock that saw it running: the verdict is this operation's, not the next one's.
                state.expired = true;
                self.end(state, error!(Timeout, "{label} ran beyond its deadline on rank {rank}"));
            }
            reason => {
                drop(state);
                log::error!(
                    "{label} exceeded its timeout on rank {rank} and cannot be stopped: {}",
                    reason.unwrap_or("abort was called before")
                );
            }
        }
    }

    /// Forgets what is over on the streams, and stops the transport for what should be or has failed.
    fn look<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut enqueued = std::mem::take(&mut state.enqueued);
        let ended = state.ended.is_some();
        // Not under the lock: the driver may take its time.
        drop(state);
        // A device that cannot say has failed, which others are told of.
        enqueued.retain(|(event, _)| !event.is_over().unwrap_or(true));
        let now = Instant::now();
        let failed = match enqueued.iter().find(|(_, deadline)| deadline.at <= now) {
            _ if ended => None,
            Some((_, Deadline { label, timeout, .. })) => {
                let (limit, rank) = (timeout.as_millis(), self.stop.rank());
                Some(error!(Timeout, "{label} did not finish on its stream within {limit} ms (this is rank {rank})"))
            }
            None => self.stop.async_error().err(),
        };
        if failed.is_some() || ended {
            // It ends with the transport or not at all.
            enqueued.clear();
        }
        if let Some(cause) = failed {
            if let Some(reason) = self.stop.cannot_stop_reason() {
                log::error!("{}; {reason}", cause.message);
            }
            self.end(self.lock(), cause);
        }
        let mut state = self.lock();
        state.enqueued.append(&mut enqueued);
        state
    }

    /// The first cause counts.
    fn end(&self, mut state: MutexGuard<'_, State>, cause: Error) {
        if state.ended.is_none() {
            state.ended = Some(cause);
            drop(state);
            self.stop.stop();
        }
    }
}

impl Drop for Watchdog {
    /// The thread may be inside the transport's `stop`: what that needs goes after.
    fn drop(&mut self) {
        let thread = {
            let mut state = self.shared.lock();
            state.quit = true;
            self.shared.changed.notify_one();
            state.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// The error of an operation that came upon a transport that was stopped.
pub(super) fn aborted(call: &Call<'_>, cause: &Error, rank: u32) -> Error {
    let text = match cause.status {
        Status::Aborted => cause.message.clone(),
        _ => cause.to_string(),
    };
    error!(Aborted, "{}: the communicator was aborted: {text} (this is rank {rank})", call.label())
}
