//! What a step spends its time on: phases, collectives and kernels as spans of one time line.
//!
//! With `PFC_TRACE=file` in the environment the library collects spans from its first head on, and writes them as Chrome's trace
//! events (for chrome://tracing or ui.perfetto.dev) whenever a head is freed. A process that holds only some of the ranks puts the
//! first of them into the name: `trace.json` becomes `trace.rank3.json`. Rust programs call [`start`] and [`take`] instead.
//!
//! Each rank is a process of the trace. Its track `host` has the phases as the calling thread went through them; a device with
//! streams adds a track for each of them, with every kernel and collective as the device ran it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

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

struct Collector {
    on: AtomicBool,
    file: Option<PathBuf>,
    process: u32,
    origin: Instant,
    spans: Mutex<Vec<Span>>,
}

fn collector() -> &'static Collector {
    static COLLECTOR: OnceLock<Collector> = OnceLock::new();
    COLLECTOR.get_or_init(|| {
        let file = environment::setting("PFC_TRACE").map(PathBuf::from);
        Collector {
            on: AtomicBool::new(file.is_some()),
            file,
            process: std::process::id(),
            origin: Instant::now(),
            spans: Mutex::default(),
        }
    })
}

/// Collects spans from now on; heads that exist already add none of their device's.
pub fn start() {
    collector().on.store(true, Ordering::Relaxed);
}

/// The spans collected so far, which are then forgotten, in no order. A device's come when something has waited for them.
pub fn take() -> Vec<Span> {
    std::mem::take(&mut *spans())
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
    let mut spans = spans();
    if spans.len() == MOST_SPANS {
        return;
    }
    spans.push(span);
    let full = spans.len() == MOST_SPANS;
    // The log's callback may be the caller's.
    drop(spans);
    if full {
        log::warn!("the trace is full: it keeps its first {MOST_SPANS} spans");
    }
}

/// Writes the trace when it is dropped: the last field of what makes spans.
pub(crate) struct Writer;

impl Drop for Writer {
    fn drop(&mut self) {
        write();
    }
}

/// Writes what was collected to the file that PFC_TRACE names, if it names one.
fn write() {
    // A forked child's spans are its parent's.
    let Some(file) = collector().file.as_ref().filter(|_| collector().process == std::process::id()) else { return };
    let spans = spans();
    let file = file_of(file, &spans);
    if let Err(error) = std::fs::write(&file, text(&spans)) {
        log::warn!("PFC_TRACE: {}: {error}", file.display());
    }
}

fn spans() -> std::sync::MutexGuard<'static, Vec<Span>> {
    collector().spans.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Its own file for a process that does not hold all ranks.
fn file_of(file: &Path, spans: &[Span]) -> PathBuf {
    let held: BTreeSet<u32> = spans.iter().map(|span| span.rank).collect();
    let (Some(first), Some(ranks)) = (held.first(), spans.iter().map(|span| span.ranks).max()) else { return file.into() };
    if held.len() as u32 == ranks {
        return file.into();
    }
    let extension = file.extension().map_or(String::new(), |extension| format!(".{}", extension.to_string_lossy()));
    file.with_extension(format!("rank{first}{extension}"))
}

/// Chrome's trace events: complete events ("X"), with names for the processes and threads.
fn text(spans: &[Span]) -> String {
    let tracks: BTreeSet<(u32, &str)> = spans.iter().map(|span| (span.rank, span.track.as_str())).collect();
    let tracks: Vec<_> = tracks.into_iter().collect();
    let mut lines = Vec::with_capacity(spans.len() + 2 * tracks.len());
    for (thread, (rank, track)) in tracks.iter().enumerate() {
        lines.push(format!(r#"{{"name":"process_name","ph":"M","pid":{rank},"args":{{"name":"rank {rank}"}}}}"#));
        lines.push(format!(r#"{{"name":"thread_name","ph":"M","pid":{rank},"tid":{thread},"args":{{"name":"{track}"}}}}"#));
    }
    for span in spans {
        let thread = tracks.binary_search(&(span.rank, span.track.as_str())).unwrap_or(0);
        let mut line = String::new();
        // Writing to a string does not fail.
        let _ = write!(
            line,
            r#"{{"name":"{}","ph":"X","pid":{},"tid":{thread},"ts":{:.3},"dur":{:.3},"args":{{"step":{}}}}}"#,
            span.name, span.rank, span.start_us, span.duration_us, span.step
        );
        lines.push(line);
    }
    format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(rank: u32, ranks: u32, track: &str) -> Span {
        Span { name: "forward".into(), track: track.into(), rank, ranks, step: 7, start_us: 1.5, duration_us: 2.25 }
    }

    #[test]
    fn a_process_with_some_of_the_ranks_has_a_file_of_its_own() {
        let file = Path::new("out/trace.json");
        assert_eq!(file_of(file, &[span(0, 2, "host"), span(1, 2, "host")]), file);
        assert_eq!(file_of(file, &[span(3, 4, "host")]), Path::new("out/trace.rank3.json"));
        assert_eq!(file_of(Path::new("trace"), &[span(1, 2, "host")]), Path::new("trace.rank1"));
        assert_eq!(file_of(file, &[]), file);
    }

    #[test]
    fn the_text_is_chrome_s() {
        let expected = concat!(
            "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n",
            "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":0,\"args\":{\"name\":\"rank 0\"}},\n",
            "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":0,\"tid\":0,\"args\":{\"name\":\"host\"}},\n",
            "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"rank 1\"}},\n",
            "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":1,\"args\":{\"name\":\"main\"}},\n",
            "{\"name\":\"forward\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":1.500,\"dur\":2.250,\"args\":{\"step\":7}},\n",
            "{\"name\":\"forward\",\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":1.500,\"dur\":2.250,\"args\":{\"step\":7}}\n",
            "]}\n"
        );
        assert_eq!(text(&[span(1, 2, "main"), span(0, 2, "host")]), expected);
    }
}
