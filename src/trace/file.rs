//! The file of a trace: Chrome's trace events, which spans are added to. It is whole after each time, so that it can be looked at while
//! the program runs, and when it has crashed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::Span;

const BEGINNING: &str = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
/// Overwritten by the next events.
const END: &str = "\n]}\n";

/// The ranks of a process, and how many there are in all.
#[derive(Default)]
pub(super) struct Held {
    here: BTreeSet<u32>,
    ranks: u32,
}

impl Held {
    pub fn add(&mut self, rank: u32, ranks: u32) {
        self.here.insert(rank);
        self.ranks = self.ranks.max(ranks);
    }

    /// Its own file for a process that does not hold all ranks.
    pub fn path(&self, path: &Path) -> PathBuf {
        let Some(first) = self.here.first().filter(|_| (self.here.len() as u32) < self.ranks) else { return path.into() };
        let extension = path.extension().map_or(String::new(), |extension| format!(".{}", extension.to_string_lossy()));
        path.with_extension(format!("rank{first}{extension}"))
    }
}

pub(super) struct EventFile {
    path: PathBuf,
    /// Until something went wrong, which is told once.
    file: Result<File, String>,
    events: Events,
    /// Where the next events go.
    end: u64,
}

impl EventFile {
    /// Empties the file or makes it. Links are not followed: who else can write to the folder must not choose what is overwritten.
    pub fn create(path: PathBuf) -> EventFile {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let opened = options.open(&path).and_then(|file| match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::other("it is not a file that holds data")),
        });
        let opened = opened.map_err(|error| {
            let link = path.symlink_metadata().is_ok_and(|data| data.is_symlink());
            let why = if link { "it is a link, which is not followed".to_owned() } else { error.to_string() };
            format!("cannot write {}: {why}", path.display())
        });
        let mut file = EventFile { path, file: opened, events: Events::default(), end: 0 };
        // Of no events, so that a program without a step leaves a whole file, too.
        if let Err(text) = file.put(BEGINNING) {
            file.file = Err(text);
        }
        file
    }

    /// Why nothing can be written.
    pub fn check(&self) -> Result<(), String> {
        self.file.as_ref().map(|_| ()).map_err(Clone::clone)
    }

    /// Adds spans; what goes wrong is told once.
    pub fn add(&mut self, spans: &[Span]) -> Result<(), String> {
        if spans.is_empty() || self.file.is_err() {
            return Ok(());
        }
        let text = self.events.of(spans);
        self.put(&text).inspect_err(|text| self.file = Err(text.clone()))
    }

    fn put(&mut self, text: &str) -> Result<(), String> {
        let Ok(file) = &mut self.file else { return self.check() };
        let written = file.seek(SeekFrom::Start(self.end)).and_then(|_| file.write_all(format!("{text}{END}").as_bytes()));
        written.map_err(|error| format!("cannot write {}: {error}", self.path.display()))?;
        self.end += text.len() as u64;
        Ok(())
    }
}

/// Complete events ("X"), with names for the processes and threads before their first.
#[derive(Default)]
struct Events {
    /// Numbered by their places here.
    tracks: Vec<(u32, String)>,
    some: bool,
}

impl Events {
    fn of(&mut self, spans: &[Span]) -> String {
        let mut text = String::new();
        for span in spans {
            let known = self.tracks.iter().position(|(rank, track)| *rank == span.rank && *track == span.track);
            let thread = known.unwrap_or_else(|| self.begin(span, &mut text));
            let name = &span.name;
            let (rank, start, duration, step) = (span.rank, span.start_us, span.duration_us, span.step);
            self.event(
                &mut text,
                format_args!(
                    r#"{{"name":"{name}","ph":"X","pid":{rank},"tid":{thread},"ts":{start:.3},"dur":{duration:.3},"args":{{"step":{step}}}}}"#
                ),
            );
        }
        text
    }

    /// The number of a new track.
    fn begin(&mut self, span: &Span, text: &mut String) -> usize {
        let (rank, track, thread) = (span.rank, &span.track, self.tracks.len());
        self.event(text, format_args!(r#"{{"name":"process_name","ph":"M","pid":{rank},"args":{{"name":"rank {rank}"}}}}"#));
        self.event(
            text,
            format_args!(r#"{{"name":"thread_name","ph":"M","pid":{rank},"tid":{thread},"args":{{"name":"{track}"}}}}"#),
        );
        self.tracks.push((rank, track.clone()));
        thread
    }

    fn event(&mut self, text: &mut String, event: std::fmt::Arguments<'_>) {
        let comma = if std::mem::replace(&mut self.some, true) { "," } else { "" };
        // Writing to a string does not fail.
        let _ = write!(text, "{comma}\n{event}");
    }
}

#[cfg(test)]
mod tests;
