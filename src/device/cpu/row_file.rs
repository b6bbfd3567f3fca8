//! Rows on disk: one file of a head, a record for each row of its shard, which is the row's tensors as they are stored in memory.
//!
//! A row that was never written is not stored: its start value is a function of its class, and a bitmap tells which rows are there. The
//! file belongs to the head and goes with it; what outlives the head is a checkpoint.
//!
//! The first rows may stay in memory: negatives are drawn alike from all classes, so these save as much as any others.
//!
//! Rows go past the page cache, where the file system can do that, from several threads at once: sorted rows that lie side by side in one
//! transfer. They are never mapped, since a disk that fails would then be a signal and not an error.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use super::pool::Pool;
use super::row_set::RowSet;
use super::row_tensors::{Place, RowTensorParts, StartValues};
use super::sizes::{cached_rows, record_bytes};
use crate::device::HeadSpec;
use crate::file;
use crate::memory::{Buffer, Parts};
use crate::{error, Error, Result};

/// Threads that wait for the disk: more are no faster at any size of a run that was measured.
const THREADS: usize = 16;
/// Bytes of a transfer; more where one unit is longer.
const PIECE: usize = 256 << 10;
/// Bytes that nobody wants are read as well if that saves a transfer.
const GAP: usize = 8 << 10;
/// The smallest sector that a disk may have, and the largest.
const SECTOR: usize = 512;
const LARGEST_SECTOR: usize = 4096;

pub(super) struct RowFile {
    records: Records,
    /// The records that the file does not have: those of the first rows.
    cache: Buffer<u8>,
    pool: Pool,
    /// A piece for each of the pool's threads.
    pieces: Pieces,
}

/// The file, and what is known of it.
struct Records {
    path: PathBuf,
    file: File,
    /// The process that made it: its forked children do not remove it.
    process: u32,
    layout: Layout,
    /// The first row that the file has.
    first: usize,
    first_class: u64,
    start: StartValues,
    written: RowSet,
    /// Held while something moves, and alone while that changes to go through the page cache: a page that is written through it must not
    /// take rows with it that go past it at the same time.
    direct: RwLock<()>,
}

/// Where records lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// Bytes of a row.
    record: usize,
    /// Bytes from one row to the next.
    stride: usize,
    /// Bytes that only move together: whole sectors and whole rows.
    unit: usize,
}

/// Ascending rows, by their position in a list.
#[derive(Clone, Copy)]
pub(super) struct RowList<'a> {
    pub count: usize,
    /// Positions that one thread moves at a time.
    pub a_task: usize,
    pub place: &'a (dyn Fn(usize) -> Place + Sync),
}

/// Memory for transfers, each piece at a whole sector.
pub(super) struct Pieces {
    memory: Buffer<u8>,
    first: usize,
    length: usize,
}

impl Layout {
    fn new(record: usize, sector: usize) -> Layout {
        // Few rows share a sector, and none lies across two for nothing.
        let stride = match record {
            0..=SECTOR => record.next_power_of_two(),
            _ if record < sector => record.next_multiple_of(SECTOR),
            _ => record.next_multiple_of(sector),
        };
        let mut unit = stride;
        while !unit.is_multiple_of(sector) {
            unit += stride;
        }
        Layout { record, stride, unit }
    }

    /// The bytes of the unit that a row is in: the first, and the one after the last.
    fn unit_of(&self, row: usize) -> (u64, u64) {
        let at = row as u64 * self.stride as u64;
        let first = at - at % self.unit as u64;
        (first, first + self.unit as u64)
    }

    fn bytes(&self, rows: usize) -> u64 {
        (rows as u64 * self.stride as u64).next_multiple_of(self.unit as u64)
    }

    fn piece(&self) -> usize {
        PIECE.max(self.unit)
    }
}

impl Pieces {
    fn new(count: usize, length: usize) -> Result<Pieces> {
        let memory = Buffer::<u8>::zeroed(count * length + LARGEST_SECTOR, "rows on their way to or from a file")?;
        let first = memory.as_ptr().align_offset(LARGEST_SECTOR);
        Ok(Pieces { memory, first, length })
    }

    fn parts(&mut self) -> Parts<'_, u8> {
        Parts::of(&mut self.memory[self.first..])
    }
}

/// Bytes of a file of as many rows, on a disk with the largest sectors.
pub(super) fn bytes(record: usize, rows: usize) -> u64 {
    Layout::new(record, LARGEST_SECTOR).bytes(rows)
}

/// Bytes of memory that moving rows takes.
pub(super) fn memory(record: usize, dim: usize) -> usize {
    THREADS * (Layout::new(record, LARGEST_SECTOR).piece() + 3 * 4 * dim)
}

impl RowFile {
    /// A file in which no row is written, in a directory that is made if it is not there.
    pub fn create(spec: &HeadSpec, directory: &Path, start: StartValues) -> Result<RowFile> {
        let (record, rows) = (record_bytes(&spec.options), spec.shard.rows as usize);
        let first = cached_rows(&spec.options, spec.shard.rows);
        let cache = Buffer::zeroed(first * record, "rows that no file has")?;
        let written = RowSet::none_of(rows)?;
        let name = format!("rows-{}-of-{}.partialfc", spec.rank, spec.ranks);
        let next = format!("{name}{SUCCESSOR}");
        let (path, file) = match spec.successor {
            false => open_alone(directory, &name)?,
            // The one before has the other name, if its own could not be changed.
            true => open_alone(directory, &next).or_else(|error| open_alone(directory, &name).map_err(|_| error))?,
        };
        // From here on the file goes with the head, also if that comes to nothing.
        let mut records = Records {
            layout: Layout::new(record, LARGEST_SECTOR),
            first,
            first_class: spec.shard.first,
            start,
            written,
            process: std::process::id(),
            path,
            file,
            direct: RwLock::new(()),
        };
        // What a process that was killed has left.
        if !spec.successor && directory.join(&next).exists() {
            if let Ok((left, _alone)) = open_alone(directory, &next) {
                let _ = std::fs::remove_file(left);
            }
        }
        let emptied = records.file.set_len(0).and_then(|()| records.file.set_len(2 * LARGEST_SECTOR as u64));
        emptied.map_err(|cause| error!(Io, "cannot empty {}: {cause}", records.path.display()))?;
        records.layout = Layout::new(record, sector(&records.file));
        let stored = rows - first;
        let bytes = records.layout.bytes(stored);
        let room = file::reserve_room(&records.file, bytes).and_then(|()| records.file.set_len(bytes));
        let path = records.path.display();
        room.map_err(|cause| error!(Io, "cannot reserve {bytes} bytes for {stored} rows in {path}: {cause}"))?;
        Ok(RowFile { pool: Pool::new(THREADS), pieces: Pieces::new(THREADS, records.layout.piece())?, cache, records })
    }

    /// Takes the name of the file that this one is the successor of. Where it cannot, it keeps the name it has.
    pub fn succeed(&mut self) {
        let Records { path, .. } = &mut self.records;
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(SUCCESSOR));
        let Some(named) = name.map(|name| path.with_file_name(name)) else { return };
        match std::fs::rename(&*path, &named) {
            Ok(()) => *path = named,
            Err(cause) => log::warn!("cannot rename {} to {}: {cause}", path.display(), named.display()),
        }
    }

    /// Whether a row has been written.
    pub fn has(&self, row: usize) -> bool {
        self.records.written.has(row)
    }

    /// Bytes of a row.
    pub fn record_bytes(&self) -> usize {
        self.records.layout.record
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The threads that wait for the disk.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whether something can be done beside a transfer at all.
    pub fn has_workers(&self) -> bool {
        self.pool.has_workers()
    }

    /// A piece for [`RowFile::read_with`].
    pub fn piece(&self) -> Result<Pieces> {
        Pieces::new(1, self.records.layout.piece())
    }

    /// Brings rows into their slots. `copies` has a row of scratch for each of [`RowFile::threads`].
    pub fn read(&mut self, list: RowList<'_>, tensors: RowTensorParts<'_>, copies: &mut Buffer<f32>) -> Result<()> {
        self.read_beside(list, tensors, copies, &|_| false, |_, _| (), || ()).1
    }

    /// The same while the calling thread runs `beside`, but not into the slots that are `taken`. `came` is told of each task's
    /// positions how it went.
    pub fn read_beside<R>(
        &mut self,
        list: RowList<'_>,
        tensors: RowTensorParts<'_>,
        copies: &mut Buffer<f32>,
        taken: &(dyn Fn(usize) -> bool + Sync),
        came: impl Fn(&Range<usize>, bool) + Sync,
        beside: impl FnOnce() -> R,
    ) -> (R, Result<()>) {
        let RowFile { records, cache, pool, pieces } = self;
        let (length, dim, cache) = (pieces.length, tensors.dim, &**cache);
        let (parts, copies) = (pieces.parts(), copies.parts());
        run_beside(pool, list.count.div_ceil(list.a_task), beside, |task, worker| {
            let positions = task * list.a_task..((task + 1) * list.a_task).min(list.count);
            let _told = OnPanic(|| came(&positions, false));
            // SAFETY: a worker number belongs to one thread, a position to one task.
            let read = unsafe {
                let piece = parts.range(worker * length..(worker + 1) * length);
                let copy = copies.range(worker * dim..(worker + 1) * dim);
                records.read(cache, list, positions.clone(), tensors, taken, piece, copy)
            };
            came(&positions, read.is_ok());
            read
        })
    }

    /// The same as `read` on the calling thread alone, with a piece of its own and a row of scratch.
    pub fn read_with(&self, piece: &mut Pieces, list: RowList<'_>, tensors: RowTensorParts<'_>, copy: &mut [f32]) -> Result<()> {
        let length = piece.length;
        // SAFETY: the one piece has one user, and the tensors are this thread's.
        unsafe { self.records.read(&self.cache, list, 0..list.count, tensors, &|_| false, piece.parts().range(0..length), copy) }
    }

    /// Writes the rows that are in their slots. After a failure some may be written and some not.
    pub fn write(&mut self, list: RowList<'_>, tensors: RowTensorParts<'_>) -> Result<()> {
        self.write_beside(list, tensors, |_| true, || ()).1
    }

    /// The same while the calling thread runs `beside`. `wait` gives true when positions are ready, and false if they never will be.
    pub fn write_beside<R>(
        &mut self,
        list: RowList<'_>,
        tensors: RowTensorParts<'_>,
        wait: impl Fn(&Range<usize>) -> bool + Sync,
        beside: impl FnOnce() -> R,
    ) -> (R, Result<()>) {
        let RowFile { records, cache, pool, pieces } = self;
        let length = pieces.length;
        let (parts, cache) = (pieces.parts(), cache.parts());
        // A unit is written by one task.
        let begin = |task: usize| {
            let mut position = (task * list.a_task).min(list.count);
            // `None`: in memory.
            let unit = |position: usize| records.unit_of((list.place)(position).row).map(|(first, _)| first);
            while position > 0 && position < list.count && unit(position).is_some_and(|own| unit(position - 1) == Some(own)) {
                position += 1;
            }
            position
        };
        let (result, outcome) = run_beside(pool, list.count.div_ceil(list.a_task), beside, |task, worker| {
            let positions = begin(task)..begin(task + 1);
            if !wait(&positions) {
                return Ok(());
            }
            // SAFETY: a worker number belongs to one thread, a position to one task.
            unsafe {
                let piece = parts.range(worker * length..(worker + 1) * length);
                records.write(&cache, list, positions, tensors, piece)
            }
        });
        if outcome.is_ok() {
            for row in (0..list.count).map(|position| (list.place)(position).row) {
                records.written.add(row);
            }
        }
        (result, outcome)
    }
}

/// Runs tasks that may fail, after or, if there are threads for it, beside something else. Returns the first failure by time.
fn run_beside<R>(
    pool: &Pool,
    tasks: usize,
    beside: impl FnOnce() -> R,
    body: impl Fn(usize, usize) -> Result<()> + Sync,
) -> (R, Result<()>) {
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    let result = pool.run_beside(
        tasks,
        &|task, worker| {
            if let Err(error) = body(task, worker) {
                failed().get_or_insert(error);
            }
        },
        beside,
    );
    (result, failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err))
}

/// Does something if it is dropped by a panic.
struct OnPanic<F: Fn()>(F);

impl<F: Fn()> Drop for OnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)();
        }
    }
}

impl Records {
    /// The bytes of the unit that a row is in; `None` for one that the file does not have.
    fn unit_of(&self, row: usize) -> Option<(u64, u64)> {
        row.checked_sub(self.first).map(|row| self.layout.unit_of(row))
    }

    /// # Safety
    /// No other thread touches the slots of these positions, or writes their records.
    #[allow(clippy::too_many_arguments)]
    unsafe fn read(
        &self,
        cache: &[u8],
        list: RowList<'_>,
        positions: Range<usize>,
        tensors: RowTensorParts<'_>,
        taken: &dyn Fn(usize) -> bool,
        piece: &mut [u8],
        copy: &mut [f32],
    ) -> Result<()> {
        let mut position = positions.start;
        while position < positions.end {
            let Place { row, slot } = (list.place)(position);
            if !self.written.has(row) {
                if !taken(slot) {
                    tensors.start(slot, &self.start, self.first_class + row as u64, copy);
                    tensors.clear_state(slot);
                }
                position += 1;
                continue;
            }
            let Some((first, mut end)) = self.unit_of(row) else {
                if !taken(slot) {
                    tensors.take_record(slot, &cache[self.cached(row)]);
                }
                position += 1;
                continue;
            };
            let run = position;
            position += 1;
            while position < positions.end && self.written.has((list.place)(position).row) {
                let Some((next, after)) = self.unit_of((list.place)(position).row) else { break };
                if next > end + GAP as u64 || after - first > piece.len() as u64 {
                    break;
                }
                (end, position) = (after, position + 1);
            }
            let bytes = &mut piece[..(end - first) as usize];
            self.read_exact(bytes, first)?;
            for Place { row, slot } in (run..position).map(list.place) {
                if !taken(slot) {
                    tensors.take_record(slot, &bytes[self.record_in(first, row)]);
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// No other thread writes the slots of these positions, or touches their records or their units of the file.
    unsafe fn write(
        &self,
        cache: &Parts<'_, u8>,
        list: RowList<'_>,
        positions: Range<usize>,
        tensors: RowTensorParts<'_>,
        piece: &mut [u8],
    ) -> Result<()> {
        let mut position = positions.start;
        while position < positions.end {
            let Place { row, slot } = (list.place)(position);
            let Some((first, mut end)) = self.unit_of(row) else {
                tensors.copy_record(slot, cache.range(self.cached(row)));
                position += 1;
                continue;
            };
            let run = position;
            position += 1;
            while position < positions.end {
                let Some((next, after)) = self.unit_of((list.place)(position).row) else { break };
                if next > end || after - first > piece.len() as u64 {
                    break;
                }
                (end, position) = (after, position + 1);
            }
            let bytes = &mut piece[..(end - first) as usize];
            if (position - run) * self.layout.stride < bytes.len() {
                // Rows that stay as they are.
                self.read_exact(bytes, first)?;
            }
            for Place { row, slot } in (run..position).map(list.place) {
                tensors.copy_record(slot, &mut bytes[self.record_in(first, row)]);
            }
            self.write_all(bytes, first)?;
        }
        Ok(())
    }

    /// Where in memory the record of a row is that the file does not have.
    fn cached(&self, row: usize) -> Range<usize> {
        row * self.layout.record..(row + 1) * self.layout.record
    }

    /// Where in a piece that begins at byte `first` a row's record is.
    fn record_in(&self, first: u64, row: usize) -> Range<usize> {
        let at = ((row - self.first) as u64 * self.layout.stride as u64 - first) as usize;
        at..at + self.layout.record
    }

    fn read_exact(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        let length = bytes.len();
        let read = |done: usize| match self.file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => Err(std::io::Error::other("the file was cut short under the head")),
            read => read,
        };
        self.all_of(length, read).map_err(|cause| self.refused("read", length, at, &cause))
    }

    fn write_all(&self, bytes: &[u8], at: u64) -> Result<()> {
        let write = |done: usize| match self.file.write_at(&bytes[done..], at + done as u64) {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            written => written,
        };
        self.all_of(bytes.len(), write).map_err(|cause| self.refused("write", bytes.len(), at, &cause))
    }

    /// Moves `length` bytes by calls that may move some of them, from a number of bytes on.
    fn all_of(&self, length: usize, mut some: impl FnMut(usize) -> std::io::Result<usize>) -> std::io::Result<()> {
        let (mut done, mut through_cache) = (0, false);
        while done < length {
            let moved = {
                let _direct = self.direct.read().unwrap_or_else(PoisonError::into_inner);
                some(done)
            };
            match moved {
                Ok(moved) => done += moved,
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                // Some file systems learn only here that they cannot go past the page cache.
                Err(cause) if file::is_refusal(&cause) && !through_cache => through_cache = true,
                Err(cause) => return Err(cause),
            }
            // Nor can any from the middle of a sector.
            if through_cache || !done.is_multiple_of(SECTOR) {
                let _alone = self.direct.write().unwrap_or_else(PoisonError::into_inner);
                file::set_direct(&self.file, false);
                through_cache = true;
            }
        }
        Ok(())
    }

    fn refused(&self, what: &str, length: usize, at: u64, cause: &std::io::Error) -> Error {
        error!(Io, "cannot {what} {length} bytes at {at} of {}: {cause}", self.path.display())
    }
}

/// What the name of a file ends in while the one that it takes the rows from has the name without.
const SUCCESSOR: &str = ".next";

/// Opens a file that no other head has open, and makes it and its directory if they are not there.
fn open_alone(directory: &Path, name: &str) -> Result<(PathBuf, File)> {
    let path = directory.join(name);
    let refused = |what: &str, path: &Path, cause: std::io::Error| error!(Io, "cannot {what} {}: {cause}", path.display());
    std::fs::create_dir_all(directory).map_err(|cause| refused("create", directory, cause))?;
    loop {
        // A link may lead to a file of somebody's, which would be emptied.
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = file.map_err(|cause| refused("open", &path, cause))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(error!(Io, "cannot use {}: another head has its rows in it", path.display()));
            }
            Err(TryLockError::Error(cause)) => return Err(refused("lock", &path, cause)),
        }
        // A head that ends removes its file: the lock may be one of a file that has no name any more.
        if is_named(&file, &path) {
            return Ok((path, file));
        }
    }
}

/// Whether a path leads to an open file.
fn is_named(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(file), Ok(named)) => (named.dev(), named.ino()) == (file.dev(), file.ino()),
        _ => false,
    }
}

/// The smallest sector that the disk reads past the page cache. The file, of two of the largest ones, is read and written so from here
/// on, if the file system can do that.
fn sector(file: &File) -> usize {
    if !file::set_direct(file, true) {
        return SECTOR;
    }
    if let Ok(mut pieces) = Pieces::new(1, LARGEST_SECTOR) {
        // SAFETY: the one piece has one user.
        let piece = unsafe { pieces.parts().range(0..LARGEST_SECTOR) };
        for sector in [SECTOR, LARGEST_SECTOR] {
            // Not at the file's beginning, which is at a multiple of everything.
            if file.read_at(&mut piece[..sector], sector as u64).is_ok() {
                return sector;
            }
        }
    }
    file::set_direct(file, false);
    SECTOR
}

impl Drop for Records {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // A forked child may have it open for long: its room is given back now. It may be gone already.
            let _ = self.file.set_len(0);
            // By now the name may be its successor's.
            if is_named(&self.file, &self.path) {
                let _ = std::fs::remove_file(&self.path);
            }
        }
    }
}
