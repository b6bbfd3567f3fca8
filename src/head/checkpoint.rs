//! Saving a head to a directory, and loading one from it: the order of both over the ranks. Files are those of [`crate::checkpoint`].
//!
//! A save: all ranks agree on a generation; each writes, flushes and renames a file with rows; when all have, rank 0 writes the manifest
//! and renames it into place, which is the commit; files of other generations go.
//!
//! A load: each rank reads the manifest and the rows that it owns, from whichever files have them. What is wrong with the manifest or
//! does not fit the head changes nothing. What is wrong with a block of rows poisons the head on all ranks, since some rows are new then.

use std::path::{Path, PathBuf};

use super::class_map::{ClassMap, ClassTable};
use super::moving_rows::MovingRows;
use super::staged::Staged;
use super::{CallState, Head, Progress};
use crate::checkpoint::{swap_if_big_endian, Directory, Layout, Manifest, RowsFile, RowsReader, RowsWriter, Tensor, MANIFEST};
use crate::comm::gather_words;
use crate::matrix::DType;
use crate::memory::{reserve, zeros};
use crate::options::{HeadOptions, Placement};
use crate::shard::Shard;
use crate::{ensure, error, random, Contribution, Result};

/// Is told how many bytes of this rank are done, and how many there are.
pub type Report<'a> = &'a mut dyn FnMut(u64, u64);

/// What a rank asks to be loaded.
pub struct LoadRequest<'a> {
    pub directory: &'a Path,
    pub table: ClassTable<'a>,
}

/// A save that the ranks have agreed on.
pub(super) struct Saving {
    pub directory: PathBuf,
    pub generation: u64,
    progress: Progress,
    /// Of the head when it began.
    pub num_classes: u64,
}

impl Head {
    /// Writes the head to a directory; see `pfc_head_save`.
    pub fn save(&mut self, directory: Contribution<&Path>, report: Report<'_>) -> Result<()> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let saving = self.agree_on_save(directory)?;
        let directory = Directory(&saving.directory);
        let written = self.write_file(&saving, report);
        let words = written.map(|checksum| [u64::from(checksum)]).map_err(|error| self.name_rank(&error));
        let failed = words.is_err();
        let agreed = gather_words(&self.comm, words);
        // Where only this rank was not told that all is well, rank 0 may be committing: then the next save removes the files.
        if failed || (agreed.is_err() && self.comm.failure().is_none()) {
            directory.remove(|found| found == saving.generation);
        }
        let checksums: Vec<u64> = self.poison_without_peers(agreed)?.into_iter().map(|[checksum]| checksum).collect();
        self.publish(&saving, &checksums)
    }

    /// Before the first byte is written.
    pub(super) fn agree_on_save(&mut self, directory: Contribution<&Path>) -> Result<Saving> {
        // Also where the directory is wrong: replicas bring dense rows to now on all ranks or on none.
        let progress = self.read_progress();
        let begun = directory.and_then(|directory| self.begin_save(directory, progress?));
        let words = begun.as_ref().map(|(_, Progress { draws, updates }, newest)| [*newest, *draws, *updates]);
        let agreed = gather_words(&self.comm, words.map_err(|error| self.name_rank(error)));
        let all = self.poison_without_peers(agreed)?;
        let (directory, progress, _) = begun?;
        self.require_same_progress(&all, |&[_, draws, updates]| [draws, updates])?;
        let generation = all.iter().map(|words| words[0]).max().unwrap_or(0).saturating_add(1);
        Ok(Saving { directory: directory.to_owned(), generation, progress, num_classes: self.options.num_classes })
    }

    /// Makes files that all ranks have written the checkpoint. `checksums` are those of their checksums.
    pub(super) fn publish(&mut self, saving: &Saving, checksums: &[u64]) -> Result<()> {
        let committed = match self.rank() {
            0 => self.commit(saving, checksums),
            _ => Ok(()),
        };
        let words = committed.map(|()| []).map_err(|error| self.name_rank(&error));
        let agreed = gather_words(&self.comm, words);
        self.poison_without_peers(agreed)?;
        if self.rank() == 0 {
            Directory(&saving.directory).remove(|found| found != saving.generation);
        }
        Ok(())
    }

    /// Ranks at different steps never meet again. `progress` is where a rank's words have its draws and updates.
    pub(super) fn require_same_progress<const N: usize>(
        &mut self,
        all: &[[u64; N]],
        progress: impl Fn(&[u64; N]) -> [u64; 2],
    ) -> Result<()> {
        let [draws, updates] = progress(&all[0]);
        let differs = all.iter().map(progress).enumerate().find(|&(_, other)| other != [draws, updates]);
        let Some((rank, [others_draws, others_updates])) = differs else { return Ok(()) };
        let error = error!(
            Mismatch,
            "the ranks are at different steps: {draws} samples drawn and {updates} updates done on rank 0, \
             {others_draws} and {others_updates} on rank {rank}"
        );
        self.poison_before_update(&error);
        Err(error)
    }

    /// What ranks have told each other. A rank's own failure leaves the heads usable, a failure to tell it does not.
    pub(super) fn poison_without_peers<T>(&mut self, agreed: Result<T>) -> Result<T> {
        let agreed = self.prefer_comm_failure(agreed);
        if let (Err(error), Some(_)) = (&agreed, self.comm.failure()) {
            self.poison_before_update(error);
        }
        agreed
    }

    /// What a rank does before the first byte is written.
    fn begin_save<'a>(&self, path: &'a Path, progress: Progress) -> Result<(&'a Path, Progress, u64)> {
        let directory = Directory(path);
        ensure!(self.background.is_none(), InvalidArgument, "a save is under way: pfc_head_save_poll tells when it is over");
        ensure!(
            self.accumulated == 0,
            InvalidArgument,
            "{} micro-batches have been accumulated, and a checkpoint does not hold them: update first",
            self.accumulated
        );
        directory.create()?;
        let newest = directory.newest_generation()?;
        if self.rank() == 0 {
            // What killed saves have left may be what the disk has no room for.
            directory.remove_unnamed();
        }
        Ok((path, progress, newest))
    }

    /// The classes whose rows a rank writes.
    pub(super) fn written_classes(&self, num_classes: u64, rank: u32) -> Shard {
        Shard::of(num_classes, self.comm.size().into(), rank.into())
    }

    fn layout<'a>(&self, tensors: &'a [Tensor], rows: u64) -> Layout<'a> {
        Layout { dim: self.options.embedding_dim.into(), rows, tensors }
    }

    /// Writes this rank's rows. Returns the checksum of their checksums.
    fn write_file(&mut self, saving: &Saving, report: Report<'_>) -> Result<u32> {
        let directory = Directory(&saving.directory);
        let own = self.written_classes(saving.num_classes, self.rank());
        let dim = self.options.embedding_dim as usize;
        let tensors = self.tensors();
        let layout = self.layout(&tensors, own.rows);
        let name = Directory::rows_name(saving.generation, self.rank(), self.comm.size());
        let mut file = RowsWriter::create(&directory.path(&Directory::unfinished(&name)), layout)?;
        let at_once = self.staged_rows(&tensors).min(own.rows as usize);
        let mut staged = Staged::new(&tensors, at_once, dim, "rows on their way to a file")?;
        let total = self.bytes(&tensors, own.rows);
        let mut done = 0;
        report(done, total);
        for first in (0..own.rows).step_by(at_once.max(1)) {
            let rows = at_once.min((own.rows - first) as usize);
            self.read_staged(&mut staged, own.first + first, 0..rows)?;
            staged.require_finite(0..rows, own.first + first)?;
            for (number, &Tensor { dtype, .. }) in tensors.iter().enumerate() {
                let bytes = staged.bytes(number, rows);
                swap_if_big_endian(bytes, dtype.size());
                file.write(number, bytes)?;
                done += bytes.len() as u64;
                report(done, total);
            }
        }
        let checksum = file.finish()?;
        directory.finish(&name)?;
        directory.sync()?;
        Ok(checksum)
    }

    /// Makes the generation the one that a load finds.
    fn commit(&self, saving: &Saving, checksums: &[u64]) -> Result<()> {
        let &Saving { ref directory, generation, progress, num_classes } = saving;
        let directory = &Directory(directory);
        let files = checksums.iter().zip(0..).map(|(&checksum, rank)| {
            let Shard { first, rows } = self.written_classes(num_classes, rank);
            RowsFile {
                name: Directory::rows_name(generation, rank, self.comm.size()),
                first,
                rows,
                checksums_crc32: checksum as u32,
            }
        });
        let tensors = self.tensors();
        let (format, dtypes) = Manifest::typed(&tensors.iter().map(|tensor| tensor.dtype).collect::<Vec<_>>());
        let manifest = Manifest {
            format,
            library: env!("CARGO_PKG_VERSION").to_owned(),
            generation,
            num_classes,
            embedding_dim: self.options.embedding_dim.into(),
            tensors: tensors.iter().map(|tensor| tensor.name.to_owned()).collect(),
            dtypes,
            draws: progress.draws,
            updates: progress.updates,
            files: files.collect(),
        };
        if let Err(error) = self.see_files(directory, &manifest).and_then(|()| directory.write_manifest(&manifest)) {
            directory.remove_unfinished_manifest();
            directory.remove(|found| found == generation);
            return Err(error);
        }
        if let Err(error) = directory.finish(MANIFEST) {
            // Over a network a rename may be reported as failed and have happened: then the new files are those that count.
            match directory.manifest() {
                Ok(found) if found == manifest => {}
                Ok(_) => {
                    directory.remove_unfinished_manifest();
                    directory.remove(|found| found == generation);
                    return Err(error);
                }
                // Without a manifest it is not known: the next save removes what is not named.
                Err(_) => return Err(error),
            }
        }
        directory.sync()
    }

    /// All ranks must have written to one directory.
    fn see_files(&self, directory: &Directory<'_>, manifest: &Manifest) -> Result<()> {
        for (rank, RowsFile { name, .. }) in manifest.files.iter().enumerate() {
            let path = directory.path(name);
            ensure!(
                path.exists(),
                Io,
                "rank {rank} has written {name}, which is not in the directory of rank 0, {}: all ranks must see one directory",
                directory.0.display()
            );
        }
        Ok(())
    }

    /// Reads the head from a directory; see `pfc_head_load`.
    pub fn load(&mut self, request: Contribution<LoadRequest<'_>>, report: Report<'_>) -> Result<()> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let read = request.and_then(|LoadRequest { directory, table }| {
            let manifest = Directory(directory).manifest()?;
            let tensors = self.check_manifest(&manifest, directory, table.map.is_some())?;
            let whose = format_args!("the checkpoint {}", directory.display());
            let classes = ClassMap::new(table, whose, manifest.num_classes, self.options.num_classes, self.shard)?;
            // What can be seen before the first row is written leaves the head as it is.
            for named in manifest.files.iter().filter(|named| classes.of_shard(named.shard()).is_some()) {
                RowsReader::check(&Directory(directory).path(&named.name), self.layout(&tensors, named.rows), named)?;
            }
            let checksums = [manifest.checksum()?, classes.checksum()].map(u64::from);
            Ok((Directory(directory), manifest, tensors, classes, checksums))
        });
        let words = read.as_ref().map(|(.., checksums)| *checksums).map_err(|error| self.name_rank(error));
        let agreed = gather_words(&self.comm, words);
        let all = self.poison_without_peers(agreed)?;
        let (directory, manifest, tensors, classes, checksums) = read?;
        if let Some(rank) = (1..all.len()).find(|&rank| all[rank] != all[0]) {
            let what = match all[rank][0] != all[0][0] {
                true => "have read different manifests: all ranks must see one directory",
                false => "have been given different class maps",
            };
            return Err(error!(Mismatch, "rank 0 and rank {rank} {what}"));
        }
        let loaded = self
            .read_files(&directory, &manifest, &tensors, &classes, report)
            .and_then(|()| self.write_progress(Progress { draws: manifest.draws, updates: manifest.updates }));
        let words = loaded.map(|()| []).map_err(|error| self.name_rank(&error));
        let agreed = gather_words(&self.comm, words);
        self.poison_on_failure(agreed)?;
        // All replicas hold these rows.
        self.written_rows = checksums[0] | checksums[1] << 32;
        Ok(())
    }

    /// Refuses a checkpoint of another kind of head. Returns the tensors, in the types that they have in the files.
    fn check_manifest(&self, manifest: &Manifest, directory: &Path, other_classes: bool) -> Result<Vec<Tensor>> {
        let own = |name: &str, there: u64, here: u64| {
            ensure!(
                there == here,
                Mismatch,
                "{name} is {there} in the checkpoint {} and {here} in the head (rank {})",
                directory.display(),
                self.rank()
            );
            Ok(())
        };
        if !other_classes {
            own("num_classes", manifest.num_classes, self.options.num_classes)?;
        }
        own("embedding_dim", manifest.embedding_dim, self.options.embedding_dim.into())?;
        let mut tensors = self.tensors();
        let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name).collect();
        ensure!(
            manifest.tensors == names,
            Mismatch,
            "the checkpoint {} holds {}, and the head's optimizer needs {} (rank {})",
            directory.display(),
            manifest.tensors.join(", "),
            names.join(", "),
            self.rank()
        );
        for (number, tensor) in tensors.iter_mut().enumerate() {
            tensor.dtype = manifest.dtype(number).unwrap_or(DType::F32);
        }
        Ok(tensors)
    }

    /// Reads the rows of this rank's shard from the files that have them.
    fn read_files(
        &mut self,
        directory: &Directory<'_>,
        manifest: &Manifest,
        tensors: &[Tensor],
        classes: &ClassMap<'_>,
        report: Report<'_>,
    ) -> Result<()> {
        (self.state, self.prepared, self.chosen) = (CallState::Idle, None, None);
        let dim = self.options.embedding_dim as usize;
        let at_once = self.staged_rows(tensors).min(manifest.num_classes as usize);
        let mut staged = Staged::new(tensors, at_once, dim, "rows on their way from a file")?;
        let mut moving = MovingRows::new(classes, zeros(&[dim], "a class center")?);
        let total = self.bytes(tensors, self.shard.rows);
        let mut done = 0;
        report(done, total);
        for named in &manifest.files {
            let Some(range) = classes.of_shard(named.shard()) else { continue };
            // No other rank reads the same rows.
            let once = self.options.placement == Placement::Sharded && !classes.is_given();
            let path = directory.path(&named.name);
            // Each reads ahead.
            let mut readers = Vec::new();
            reserve(&mut readers, tensors.len(), "files")?;
            for tensor in 0..tensors.len() {
                readers.push(RowsReader::open(&path, self.layout(tensors, named.rows), named, tensor, once)?);
            }
            for first in range.clone().step_by(at_once) {
                let some = first..range.end.min(first + at_once as u64);
                if !classes.has_any(some.clone()) {
                    continue;
                }
                let rows = (some.end - first) as usize;
                for (tensor, reader) in readers.iter_mut().enumerate() {
                    reader.read(first - named.first, staged.bytes(tensor, rows))?;
                }
                let alone = moving.take(&mut *self.backend, &mut staged, 0, some, |_| false)?;
                done += self.bytes(tensors, alone);
                report(done, total);
            }
        }
        if classes.is_given() {
            drop(staged);
            let mut others = self.staged_f32(self.shard.rows, "rows that no class becomes")?;
            let HeadOptions { seed, init_std, .. } = self.options;
            moving.finish(&mut *self.backend, &mut others, |row, center| {
                random::start_values(seed, self.shard.first + row, init_std, center);
                true
            })?;
            report(total, total);
        }
        Ok(())
    }
}
