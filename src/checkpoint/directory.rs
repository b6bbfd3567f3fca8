//! The directory of checkpoints: its names, and the renames that make a save whole.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{refused, Manifest, MANIFEST};
use crate::Result;

/// What a file's name ends with until it is whole.
const UNFINISHED: &str = ".tmp";

pub(crate) struct Directory<'a>(pub &'a Path);

impl Directory<'_> {
    /// Makes the directory if it is not there.
    pub fn create(&self) -> Result<()> {
        std::fs::create_dir_all(self.0).map_err(|cause| refused("create", self.0, &cause))
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

    /// Removes files of rows that are not of this generation, or that are, and what was left unfinished. What cannot be removed stays:
    /// the manifest does not name it.
    pub fn remove(&self, generation: u64, of_it: bool) {
        for (found, path) in self.rows_files().unwrap_or_default() {
            let unfinished = path.to_string_lossy().ends_with(UNFINISHED);
            if (found == generation) == of_it || (!of_it && unfinished) {
                if let Err(cause) = std::fs::remove_file(&path) {
                    log::warn!("cannot remove {}: {cause}", path.display());
                }
            }
        }
    }

    /// The generation and the path of every file of rows.
    fn rows_files(&self) -> Result<Vec<(u64, PathBuf)>> {
        let list = || -> std::io::Result<Vec<(u64, PathBuf)>> {
            let mut files = Vec::new();
            for entry in std::fs::read_dir(self.0)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let stem = name.strip_suffix(UNFINISHED).unwrap_or(&name).strip_suffix(".safetensors");
                let generation = stem.and_then(|stem| stem.strip_prefix("rows-")?.split('-').next()?.parse().ok());
                files.extend(generation.map(|generation| (generation, path)));
            }
            Ok(files)
        };
        list().map_err(|cause| refused("list", self.0, &cause))
    }
}
