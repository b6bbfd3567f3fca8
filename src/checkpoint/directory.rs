//! The directory of checkpoints: its names, and the renames that make a save whole.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::{refused, Manifest, MANIFEST};
use crate::Result;

/// What a file's name ends with until it is whole.
const UNFINISHED: &str = ".tmp";

pub(crate) struct Directory<'a>(pub &'a Path);

impl Directory<'_> {
    /// Makes the directory if it is not there.
    pub fn create(&self) -> Result<()> {
        let is_new = !self.0.exists();
        std::fs::create_dir_all(self.0).map_err(|cause| refused("create", self.0, &cause))?;
        match self.0.parent() {
            // Its own name is to be on the disk, too.
            Some(parent) if is_new && !parent.as_os_str().is_empty() => Directory(parent).sync(),
            _ => Ok(()),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn manifest(&self) -> Result<Manifest> {
        Manifest::read(&self.path(MANIFEST))
    }

    /// The name of a rank's file.
    pub fn rows_name(generation: u64, rank: u32, ranks: u32) -> String {
        format!("rows-{generation}-{rank}-of-{ranks}.safetensors")
    }

    /// A name for a file until it is whole.
    pub fn unfinished(name: &str) -> String {
        format!("{name}{UNFINISHED}")
    }

    /// The highest generation that a file is of, whole or not; 0 without any.
    pub fn newest_generation(&self) -> Result<u64> {
        Ok(self.rows_files()?.into_iter().map(|(generation, _)| generation).max().unwrap_or(0))
    }

    /// Gives a file that is whole its name.
    pub fn finish(&self, name: &str) -> Result<()> {
        let (from, to) = (self.path(&Self::unfinished(name)), self.path(name));
        std::fs::rename(&from, &to).map_err(|cause| refused("rename to", &to, &cause))
    }

    /// Waits until the names are on the disk.
    pub fn sync(&self) -> Result<()> {
        let synced = File::open(self.0).and_then(|directory| directory.sync_all());
        synced.map_err(|cause| refused("flush", self.0, &cause))
    }

    /// Writes the manifest under a name that no one reads.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<()> {
        let (path, text) = (self.path(&Self::unfinished(MANIFEST)), manifest.to_text()?);
        let mut file = File::create(&path).map_err(|cause| refused("create", &path, &cause))?;
        let written = file.write_all(&text).and_then(|()| file.sync_all());
        written.map_err(|cause| refused("write", &path, &cause))
    }

    /// Removes a manifest that was not committed.
    pub fn remove_unfinished_manifest(&self) {
        // It may not be there.
        let _ = std::fs::remove_file(self.path(&Self::unfinished(MANIFEST)));
    }

    /// Removes the files of rows of these generations. What cannot be removed stays: the manifest does not name it.
    pub fn remove(&self, of: impl Fn(u64) -> bool) {
        for (_, path) in self.rows_files().unwrap_or_default().into_iter().filter(|&(generation, _)| of(generation)) {
            match std::fs::remove_file(&path) {
                // Another rank was faster.
                Err(cause) if cause.kind() != ErrorKind::NotFound => log::warn!("cannot remove {}: {cause}", path.display()),
                _ => {}
            }
        }
    }

    /// Removes the files of rows that no manifest names, where that is known.
    pub fn remove_unnamed(&self) {
        match self.manifest() {
            Ok(manifest) => self.remove(|generation| generation != manifest.generation),
            // Only where it is certain that there is none: a disk that does not answer may have one.
            Err(_) if matches!(self.path(MANIFEST).try_exists(), Ok(false)) => self.remove(|_| true),
            Err(_) => {}
        }
    }

    /// The generation and the path of every file of rows.
    fn rows_files(&self) -> Result<Vec<(u64, PathBuf)>> {
        let list = || -> std::io::Result<Vec<(u64, PathBuf)>> {
            let mut files = Vec::new();
            for entry in std::fs::read_dir(self.0)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let generation = Self::generation(&name);
                files.extend(generation.map(|generation| (generation, path)));
            }
            Ok(files)
        };
        list().map_err(|cause| refused("list", self.0, &cause))
    }

    /// The generation of a file of rows; `None` for any other file.
    fn generation(name: &str) -> Option<u64> {
        let name = name.strip_suffix(UNFINISHED).unwrap_or(name);
        let (generation, rest) = name.strip_prefix("rows-")?.split_once('-')?;
        let (rank, ranks) = rest.strip_suffix(".safetensors")?.split_once("-of-")?;
        let (generation, rank, ranks) = (generation.parse().ok()?, rank.parse().ok()?, ranks.parse().ok()?);
        (Self::rows_name(generation, rank, ranks) == name && generation < u64::MAX).then_some(generation)
    }
}

#[cfg(test)]
mod tests;
