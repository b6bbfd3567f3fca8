//! A save beside training: a copy of the rows, a thread that writes it, and what the ranks do when all have written.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use super::checkpoint::{Report, Saving};
use super::staged::Staged;
use super::Head;
use crate::available_memory::AvailableMemory;
use crate::checkpoint::{swap_if_big_endian, Directory, Layout, RowsWriter, Tensor};
use crate::comm::gather_words;
use crate::{ensure, error, Contribution, Error, Result};

/// Bytes that are written before the thread looks whether the save has been given up.
const BYTES_BETWEEN_LOOKS: usize = 4 << 20;

/// A save that has begun. Dropping it gives it up.
pub(super) struct BackgroundSave {
    saving: Saving,
    /// This rank's file.
    name: String,
    shared: Arc<Shared>,
    /// `None` once its result has been taken.
    thread: Option<JoinHandle<Result<u32>>>,
    /// That result: the checksum of the file's checksums.
    written: Option<Result<u32>>,
    /// The file may be part of a checkpoint, and is not this one's to remove.
    handed_over: bool,
    /// The process that began it: its forked children have no such thread.
    process: u32,
}

/// What the thread tells, and is told.
struct Shared {
    done: AtomicU64,
    total: u64,
    given_up: AtomicBool,
}

impl Shared {
    fn go_on(&self) -> Result<()> {
        ensure!(!self.given_up.load(Ordering::Relaxed), Aborted, "the save was given up");
        Ok(())
    }
}

/// The rows of one rank, on their way to a file.
struct Copied {
    path: PathBuf,
    name: String,
    tensors: Vec<Tensor>,
    dim: u64,
    rows: usize,
    staged: Staged,
}

impl Copied {
    /// Writes them to a file that has its name when this returns. Returns the checksum of its checksums.
    fn write(mut self, shared: &Shared) -> Result<u32> {
        let directory = Directory(&self.path);
        let layout = Layout { dim: self.dim, rows: self.rows as u64, tensors: &self.tensors };
        let mut file = RowsWriter::create(&directory.path(&Directory::unfinished(&self.name)), layout)?;
        for (number, &Tensor { dtype, .. }) in self.tensors.iter().enumerate() {
            for bytes in self.staged.bytes(number, self.rows).chunks_mut(BYTES_BETWEEN_LOOKS) {
                shared.go_on()?;
                swap_if_big_endian(bytes, dtype.size());
                file.write(number, bytes)?;
                shared.done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
        }
        shared.go_on()?;
        let checksum = file.finish()?;
        directory.finish(&self.name)?;
        directory.sync()?;
        Ok(checksum)
    }
}

impl BackgroundSave {
    fn start(saving: Saving, copied: Copied, total: u64) -> Result<BackgroundSave> {
        let shared = Arc::new(Shared { done: AtomicU64::new(0), total, given_up: AtomicBool::new(false) });
        let (told, name) = (shared.clone(), copied.name.clone());
        let thread = Builder::new().name("pfc-save".to_owned()).spawn(move || copied.write(&told));
        let thread = Some(thread.map_err(|cause| error!(OutOfMemory, "cannot start a thread that saves: {cause}"))?);
        Ok(BackgroundSave { saving, name, shared, thread, written: None, handed_over: false, process: std::process::id() })
    }

    /// What has become of this rank's file; `None` while it is being written.
    fn written(&mut self, report: Report<'_>) -> Option<&Result<u32>> {
        if let Some(thread) = self.thread.take_if(|thread| thread.is_finished()) {
            let panicked = |_| Err(error!(Panic, "the thread that saves has panicked"));
            self.written = Some(thread.join().unwrap_or_else(panicked));
        }
        report(self.shared.done.load(Ordering::Relaxed), self.shared.total);
        self.written.as_ref()
    }
}

impl Drop for BackgroundSave {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // Not even detached: the handle may be that of another thread here.
            std::mem::forget(self.thread.take());
            return;
        }
        self.shared.given_up.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Whatever it says, the save is over.
            let _ = thread.join();
        }
        if !self.handed_over {
            log::warn!("generation {} of {} was given up", self.saving.generation, self.saving.directory.display());
            let directory = Directory(&self.saving.directory);
            for name in [Directory::unfinished(&self.name), self.name.clone()] {
                // One of them is not there.
                let _ = std::fs::remove_file(directory.path(&name));
            }
        }
    }
}

/// What a rank tells the others at a poll.
const WRITING: u64 = 0;
const WRITTEN_WITH_CHECKSUM: u64 = 1;
const FAILED_WITH_STATUS: u64 = 2;

impl Head {
    /// Begins a save that goes on beside training; see `pfc_head_save_start`.
    pub fn save_start(&mut self, directory: Contribution<&Path>, report: Report<'_>) -> Result<()> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        // The process may be in another directory when the file is written.
        let absolute =
            |path: &Path| std::path::absolute(path).map_err(|cause| error!(Io, "cannot find {}: {cause}", path.display()));
        let directory = directory.and_then(absolute);
        let saving = self.agree_on_save(directory.as_deref().map_err(Error::clone))?;
        let begun = self.copy_rows(saving, report);
        let words = begun.as_ref().map(|_| []).map_err(|error| self.name_rank(error));
        let agreed = gather_words(&self.comm, words);
        self.poison_without_peers(agreed)?;
        self.background = Some(begun?);
        Ok(())
    }

    /// Looks whether the save that was begun is over on all ranks, and ends it if it is; see `pfc_head_save_poll`.
    pub fn save_poll(&mut self, asked: Contribution<()>, report: Report<'_>) -> Result<bool> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let under_way =
            self.background.as_mut().ok_or_else(|| error!(InvalidArgument, "no save is under way: pfc_head_save_start begins one"));
        let number = self.number;
        let words = asked.and(under_way).map(|background| {
            let [state, value] = match background.written(report) {
                None => [WRITING, 0],
                Some(Ok(checksum)) => [WRITTEN_WITH_CHECKSUM, u64::from(*checksum)],
                Some(Err(error)) => [FAILED_WITH_STATUS, error.status as u64],
            };
            // Where this rank is not told of the others, rank 0 may make the files the checkpoint.
            background.handed_over = state == WRITTEN_WITH_CHECKSUM;
            [number, state, value]
        });
        let agreed = gather_words(&self.comm, words.map_err(|error| self.name_rank(&error)));
        let agreed = agreed.and_then(|all| self.require_same_head(&all, "pfc_head_save_poll", |words| words[0]).map(|()| all));
        let over = agreed.as_ref().is_ok_and(|all| all.iter().all(|&[_, state, _]| state == WRITTEN_WITH_CHECKSUM));
        if let Some(background) = self.background.as_mut().filter(|_| !over && self.comm.failure().is_none()) {
            background.handed_over = false;
        }
        let all = self.poison_without_peers(agreed)?;
        if let Some(failed) = all.iter().position(|&[_, state, _]| state == FAILED_WITH_STATUS) {
            return Err(self.give_up_save(failed, all[failed][2]));
        }
        let Some(background) = self.background.take_if(|_| over) else { return Ok(false) };
        let checksums: Vec<u64> = all.iter().map(|&[.., checksum]| checksum).collect();
        self.publish(&background.saving, &checksums)?;
        Ok(true)
    }

    /// Copies the rows that this rank writes, and starts to write them.
    fn copy_rows(&mut self, saving: Saving, report: Report<'_>) -> Result<BackgroundSave> {
        let own = self.written_classes(saving.num_classes, self.rank());
        let (tensors, rows, dim) = (self.tensors(), own.rows as usize, self.options.embedding_dim as usize);
        let (total, what) = (self.bytes(&tensors, own.rows), "a copy of the rows to be saved");
        AvailableMemory::now().require(total, what)?;
        let mut staged = Staged::new(&tensors, rows, dim, what)?;
        report(0, total);
        let at_once = self.staged_rows(&tensors);
        for first in (0..rows).step_by(at_once) {
            let some = first..rows.min(first + at_once);
            self.read_staged(&mut staged, own.first + first as u64, some.clone())?;
            staged.require_finite(some.clone(), own.first + first as u64)?;
            report(self.bytes(&tensors, some.end as u64), total);
        }
        let name = Directory::rows_name(saving.generation, self.rank(), self.comm.size());
        let copied = Copied { path: saving.directory.clone(), name, tensors, dim: dim as u64, rows, staged };
        BackgroundSave::start(saving, copied, total)
    }

    /// Ends a save that rank `failed` could not do, with such a status. Returns the error for this rank's caller.
    fn give_up_save(&mut self, failed: usize, status: u64) -> Error {
        let own = self.background.take().and_then(|mut background| background.written.take());
        match own {
            Some(Err(error)) => self.name_rank(&error),
            _ => Error::remote(failed, status as i64),
        }
    }
}
