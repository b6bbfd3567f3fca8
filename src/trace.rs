//! What a step spends its time on: phases, collectives and kernels as spans of one time line.
//!
//! With `PFC_TRACE=file` in the environment the library collects spans from its first head on, and adds them to the file, as Chrome's
//! trace events (for chrome://tracing or ui.perfetto.dev), whenever a head is freed, whenever many have come together, and when the
//! program ends. A process that holds only some of the ranks puts the first of them into the name: `trace.json` becomes
//! `trace.rank3.json`. Rust programs call [`start`] and [`take`] instead.
//!
//! Each rank is a process of the trace. Its track `host` has the phases as the calling thread went through them; a device with
//! streams adds a track for each of them, with every kernel and collective as the device ran it.

mod file;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use self::file::{EventFile, Held};
use crate::environment;

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The phase, the collective or the kernel.
    pub name: String,
    /// What it ran on: `host`, or one of the device's streams.
    pub track: String,
    pub rank: u32,
    pub ranks: u32,
    /// The step's number: how many samples had been drawn before its own.
    pub step: u64,
    /// Microseconds since the process's first span could be.
    pub start_us: f64,
    pub duration_us: f64,
}

/// Beyond this many, spans are dropped: half a gigabyte of text.
const MOST_SPANS: usize = 4 << 20;
/// This many are added to the file at once, if no head is freed before.
const MANY_SPANS: usize = 1 << 14;

struct Collector {
    on: AtomicBool,
    /// What PFC_TRACE names.
    path: Option<PathBuf>,
    process: u32,
    origin: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Collected, and neither taken nor in the file.
    spans: Vec<Span>,
    /// So many have been collected.
    count: usize,
    /// The ranks that have heads here.
    held: Held,
    file: Option<EventFile>,
}

fn collector() -> &'static Collector {
    static COLLECTOR: OnceLock<Collector> = OnceLock::new();
    COLLECTOR.get_or_init(|| {
        let path = environment::setting("PFC_TRACE").map(PathBuf::from);
        Collector {
            on: AtomicBool::new(path.is_some()),
            path,
            process: std::process::id(),
            origin: Instant::now(),
            state: Mutex::default(),
        }
    })
}

/// Collects spans from now on; heads that exist already add none of their device's.
pub fn start() {
    collector().on.store(true, Ordering::Relaxed);
}

/// The spans collected so far, which are then forgotten, in no order. A device's come when something has waited for them.
pub fn take() -> Vec<Span> {
    let mut state = state();
    state.count = 0;
    std::mem::take(&mut state.spans)
}

pub(crate) fn is_on() -> bool {
    collector().on.load(Ordering::Relaxed)
}

/// Microseconds on the time line of [`Span::start_us`].
pub(crate) fn now() -> f64 {
    collector().origin.elapsed().as_secs_f64() * 1e6
}

/// Whose spans: a rank's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope {
    pub rank: u32,
    pub ranks: u32,
    pub step: u64,
}

impl Scope {
    /// Runs something of the calling thread's as a span.
    pub fn host<T>(self, name: &str, run: impl FnOnce() -> T) -> T {
        if !is_on() {
            return run();
        }
        let start = now();
        let outcome = run();
        self.add(name, "host", start, now() - start);
        outcome
    }

    pub fn add(self, name: &str, track: &str, start_us: f64, duration_us: f64) {
        let Scope { rank, ranks, step } = self;
        add(Span { name: name.into(), track: track.into(), rank, ranks, step, start_us, duration_us });
    }
}

fn add(span: Span) {
    let mut state = state();
    if state.count == MOST_SPANS {
        return;
    }
    state.spans.push(span);
    state.count += 1;
    let full = state.count == MOST_SPANS;
    let written = if state.spans.len() >= MANY_SPANS { state.write() } else { Ok(()) };
    // The log's callback may be the caller's.
    drop(state);
    tell_of(written);
    if full {
        log::warn!("the trace is full: it keeps its first {MOST_SPANS} spans");
    }
}

/// A head's part in the trace. Dropped last of what makes spans, since it adds them to the file.
pub(crate) struct Writer;

impl Writer {
    /// For a head that is about to be made with the other ranks, of which this process may hold more.
    pub fn new(rank: u32, ranks: u32) -> Writer {
        state().held.add(rank, ranks);
        Writer
    }

    /// The ranks have met, so that those of this process are known, and what the file is called.
    pub fn open(&self) {
        let collector = collector();
        let Some(path) = &collector.path else { return };
        let mut state = state();
        if state.file.is_some() || collector.process != std::process::id() {
            return;
        }
        let file = EventFile::create(state.held.path(path));
        let told = file.check();
        state.file = Some(file);
        drop(state);
        tell_of(told);
        // SAFETY: a function of ours, in a library that is never unloaded.
        unsafe { libc::atexit(end) };
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A forked child's spans are its parent's.
        if collector().process == std::process::id() {
            let written = state().write();
            tell_of(written);
        }
    }
}

impl State {
    /// Adds what has come to the file, if there is one, or says why it cannot. In a forked child the file is its parent's.
    fn write(&mut self) -> Result<(), String> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let spans = std::mem::take(&mut self.spans);
        match collector().process == std::process::id() {
            true => file.add(&spans),
            false => Ok(()),
        }
    }
}

/// How long the end of the program waits for a thread that is adding spans.
const LAST_WAIT: Duration = Duration::from_millis(500);

/// Runs when the program ends by exit() or returns from main. Other threads may be in the library still.
extern "C" fn end() {
    let collector = collector();
    if collector.process != std::process::id() {
        return;
    }
    let begun = Instant::now();
    loop {
        match collector.state.try_lock() {
            Ok(mut state) => return tell_of(state.write()),
            Err(TryLockError::Poisoned(poisoned)) => return tell_of(poisoned.into_inner().write()),
            Err(TryLockError::WouldBlock) if begun.elapsed() < LAST_WAIT => std::thread::yield_now(),
            Err(TryLockError::WouldBlock) => return,
        }
    }
}

/// Says what is wrong with the file: to the log, or where nobody has set one, to the standard error.
fn tell_of(outcome: Result<(), String>) {
    let Err(text) = outcome else { return };
    match log::log_enabled!(log::Level::Warn) {
        true => log::warn!("PFC_TRACE: {text}"),
        // Nothing is lost but the text where there is no standard error.
        false => drop(writeln!(std::io::stderr(), "partialfc: PFC_TRACE: {text}")),
    }
}

fn state() -> MutexGuard<'static, State> {
    collector().state.lock().unwrap_or_else(PoisonError::into_inner)
}
