//! The CPU device's threads: one job at a time, split into tasks that are taken in order as threads come free.
//!
//! Not rayon: its global pool deadlocks in a forked child, and here the calling thread must be able to do something else
//! (a collective) while the others have begun.

use std::any::Any;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::thread::JoinHandle;

use crate::float_environment;

/// A job's body: (task, worker). Workers are numbered from 0, the calling thread.
type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

pub struct Pool {
    threads: usize,
    process: u32,
    shared: Arc<Shared>,
    /// Held for the length of a job.
    job: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    /// The current job's first task that nobody has taken.
    next: AtomicUsize,
    /// A job has come, or the pool is closing.
    begun: Condvar,
    /// A worker has finished its part of the job.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// Counts jobs, so that a worker takes part in each once.
    generation: u64,
    job: Option<Job>,
    working: usize,
    closing: bool,
    panic: Option<Box<dyn Any + Send>>,
}

#[derive(Clone, Copy)]
struct Job {
    /// Borrowed from the caller of `run`, who does not return before `working` is 0 again.
    body: *const Body<'static>,
    tasks: usize,
}

// SAFETY: the body is Sync, and lives as long as the job (see `run_beside`).
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the calling one among them; 0: as many as this process may use.
    pub fn new(threads: usize) -> Pool {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let shared = Shared { state: Mutex::default(), next: AtomicUsize::default(), begun: Condvar::new(), ended: Condvar::new() };
        let shared = Arc::new(shared);
        let mut workers = Vec::new();
        for worker in 1..threads {
            let shared = shared.clone();
            match std::thread::Builder::new().name(format!("partialfc-{worker}")).spawn(move || work(&shared, worker)) {
                Ok(handle) => workers.push(handle),
                // Fewer threads are slower, not wrong.
                Err(_) => break,
            }
        }
        Pool { threads, process: std::process::id(), shared, job: Mutex::new(workers) }
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Whether a thread beside the calling one could be started.
    pub fn has_workers(&self) -> bool {
        !self.job.lock().unwrap_or_else(|e| e.into_inner()).is_empty()
    }

    pub fn process(&self) -> u32 {
        self.process
    }

    /// Runs `body(task, worker)` for every task.
    pub fn run(&self, tasks: usize, body: &Body<'_>) {
        match tasks {
            // Nobody is woken for it.
            1 => body(0, 0),
            _ => self.run_beside(tasks, body, || ()),
        }
    }

    /// As `run`, with the calling thread doing `beside` first while the workers have begun.
    ///
    /// A pool that is busy with another caller's job is not waited for: that caller may itself be waiting for this one in a
    /// collective. The calling thread then does all the tasks.
    pub fn run_beside<R>(&self, tasks: usize, body: &Body<'_>, beside: impl FnOnce() -> R) -> R {
        let guard = match self.job.try_lock() {
            Ok(guard) => Some(guard),
            // A caller unwound from its own task; the workers are as good as before.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let (Some(workers), true) = (guard, self.threads > 1 && tasks > 0) else {
            let result = beside();
            (0..tasks).for_each(|task| body(task, 0));
            return result;
        };
        // SAFETY: only the lifetime is erased; `Finish` waits for every worker before this frame ends, however it ends.
        let body_static: *const Body<'static> = unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body) };
        let job = Job { body: body_static, tasks };
        {
            let mut state = self.shared.lock();
            // No worker is inside: the job before has waited for all of them.
            self.shared.next.store(0, Ordering::Relaxed);
            state.generation += 1;
            state.panic = None;
            state.job = Some(job);
        }
        self.shared.begun.notify_all();
        let finish = Finish { shared: &self.shared, job };
        let result = beside();
        job.take_tasks(&self.shared.next, 0);
        drop(finish);
        let panic = self.shared.lock().panic.take();
        drop(workers);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        result
    }
}

/// Ends the job: no new worker joins, and those inside are waited for.
struct Finish<'a> {
    shared: &'a Shared,
    job: Job,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        // Where the caller is unwinding, the rest of the tasks is not wanted.
        self.shared.next.store(self.job.tasks, Ordering::Relaxed);
        let mut state = self.shared.lock();
        state.job = None;
        while state.working > 0 {
            state = self.shared.ended.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl Job {
    fn take_tasks(&self, next: &AtomicUsize, worker: usize) {
        // SAFETY: the caller of run_beside keeps the body alive until every worker has left.
        let body = unsafe { &*self.body };
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            body(task, worker);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn work(shared: &Shared, worker: usize) {
    // A thread begins with the settings of the one that made it.
    let _maker = float_environment::usual();
    let mut seen = 0;
    let mut state = shared.lock();
    loop {
        let job = loop {
            if state.closing {
                return;
            }
            match &state.job {
                Some(job) if state.generation != seen => break *job,
                _ => state = shared.begun.wait(state).unwrap_or_else(|e| e.into_inner()),
            }
        };
        seen = state.generation;
        state.working += 1;
        drop(state);
        let outcome = catch_unwind(AssertUnwindSafe(|| job.take_tasks(&shared.next, worker)));
        state = shared.lock();
        if let Err(panic) = outcome {
            shared.next.store(job.tasks, Ordering::Relaxed);
            state.panic.get_or_insert(panic);
        }
        state.working -= 1;
        shared.ended.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let workers = std::mem::take(self.job.get_mut().unwrap_or_else(|e| e.into_inner()));
        if self.process != std::process::id() {
            // A forked child has the handles but not the threads.
            std::mem::forget(workers);
            return;
        }
        self.shared.lock().closing = true;
        self.shared.begun.notify_all();
        for worker in workers {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests;
