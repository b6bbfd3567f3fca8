//! The manifest: which files a checkpoint consists of, and how far its head was.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{corrupt, refused};
use crate::matrix::DType;
use crate::shard::Shard;
use crate::{ensure, error, Result};

/// The version of the format where all tensors are f32. [`TYPED`] is that where the manifest tells their types.
const FORMAT: u64 = 1;
const TYPED: u64 = 2;
pub(crate) const MANIFEST: &str = "manifest.json";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub format: u64,
    /// The version of the library that wrote it.
    pub library: String,
    /// Higher than that of the checkpoint before it in the directory.
    pub generation: u64,
    pub num_classes: u64,
    pub embedding_dim: u64,
    /// In the order of the files.
    pub tensors: Vec<String>,
    /// Their types, as `DType::name` has them; empty: all f32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dtypes: Vec<String>,
    /// Samples drawn.
    pub draws: u64,
    /// Updates that have moved rows.
    pub updates: u64,
    /// In the order of the classes.
    pub files: Vec<RowsFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RowsFile {
    pub name: String,
    /// The first class.
    pub first: u64,
    pub rows: u64,
    /// Of the file's checksums.
    pub checksums_crc32: u32,
}

/// What is in the file: the checksum is that of the manifest as JSON without white space.
#[derive(Serialize, Deserialize)]
struct Sealed {
    manifest: Manifest,
    crc32: u32,
}

impl RowsFile {
    pub fn shard(&self) -> Shard {
        Shard { first: self.first, rows: self.rows }
    }
}

impl Manifest {
    /// The format and the list of types of tensors of these types.
    pub fn typed(dtypes: &[DType]) -> (u64, Vec<String>) {
        match dtypes.iter().all(|&dtype| dtype == DType::F32) {
            true => (FORMAT, Vec::new()),
            false => (TYPED, dtypes.iter().map(|dtype| dtype.name().to_owned()).collect()),
        }
    }

    /// The type of the tensor with this number; `None`: one that no file has.
    pub fn dtype(&self, number: usize) -> Option<DType> {
        match self.dtypes.get(number) {
            None => Some(DType::F32),
            Some(name) => [DType::F32, DType::Bf16].into_iter().find(|dtype| dtype.name() == name),
        }
    }

    /// The file that holds it.
    pub fn to_text(&self) -> Result<Vec<u8>> {
        let sealed = Sealed { manifest: self.clone(), crc32: self.checksum()? };
        let mut text = serde_json::to_vec_pretty(&sealed).map_err(|cause| error!(Io, "cannot write a manifest: {cause}"))?;
        text.push(b'\n');
        Ok(text)
    }

    /// A number that manifests share only if they are equal, but for a chance of 2^-32.
    pub fn checksum(&self) -> Result<u32> {
        let compact = serde_json::to_vec(self).map_err(|cause| error!(Io, "cannot write a manifest: {cause}"))?;
        Ok(crc32fast::hash(&compact))
    }

    pub fn read(path: &Path) -> Result<Manifest> {
        let text = std::fs::read(path).map_err(|cause| refused("read", path, &cause))?;
        let not_one = |cause: serde_json::Error| corrupt(path, format_args!("this is no manifest of a checkpoint: {cause}"));
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(not_one)?;
        if let Some(format) = value["manifest"]["format"].as_u64() {
            let written_by = value["manifest"]["library"].as_str().unwrap_or("another version");
            ensure!(
                (FORMAT..=TYPED).contains(&format),
                Unsupported,
                "{}: the checkpoint has format {format}, written by partialfc {written_by}; this library reads formats {FORMAT} to {TYPED}",
                path.display()
            );
        }
        let Sealed { manifest, crc32 } = serde_json::from_value(value).map_err(not_one)?;
        if manifest.checksum()? != crc32 {
            return Err(corrupt(path, format_args!("the manifest is not the one that was written")));
        }
        manifest.check(path)?;
        Ok(manifest)
    }

    /// The files hold each class once.
    fn check(&self, path: &Path) -> Result<()> {
        if self.draws >= 1 << 56 || self.updates >= 1 << 32 {
            return Err(corrupt(path, format_args!("no head has drawn {} samples and done {} updates", self.draws, self.updates)));
        }
        let typed = if self.format == FORMAT { 0 } else { self.tensors.len() };
        if self.dtypes.len() != typed || (0..typed).any(|number| self.dtype(number).is_none()) {
            return Err(corrupt(path, format_args!("{:?} are no types of {} tensors", self.dtypes, self.tensors.len())));
        }
        let mut next = 0u64;
        for RowsFile { name, first, rows, .. } in &self.files {
            let end = first.checked_add(*rows).filter(|&end| *first == next && end <= self.num_classes);
            let Some(end) = end else {
                return Err(corrupt(path, format_args!("{name} has classes from {first} on, and those from {next} on come next")));
            };
            if !name.starts_with("rows-") || name.contains('/') {
                return Err(corrupt(path, format_args!("{name:?} is no file of a checkpoint")));
            }
            next = end;
        }
        if next != self.num_classes {
            return Err(corrupt(path, format_args!("the files have {next} of {} classes", self.num_classes)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
