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
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::Status;

    fn manifest() -> Manifest {
        let file = |name: &str, first, rows| RowsFile { name: name.to_owned(), first, rows, checksums_crc32: 7 };
        Manifest {
            format: FORMAT,
            library: "0.1.0".to_owned(),
            generation: 3,
            num_classes: 10,
            embedding_dim: 4,
            tensors: vec!["weight".to_owned(), "momentum".to_owned()],
            dtypes: Vec::new(),
            draws: 12,
            updates: 11,
            files: vec![file("rows-3-0-of-2.safetensors", 0, 5), file("rows-3-1-of-2.safetensors", 5, 5)],
        }
    }

    fn read(text: &[u8]) -> Result<Manifest> {
        // Tests run side by side, some with the same text.
        static FILES: AtomicUsize = AtomicUsize::new(0);
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("partialfc-manifest-{}-{number}", std::process::id()));
        std::fs::write(&path, text).expect("a file");
        let manifest = Manifest::read(&path);
        std::fs::remove_file(&path).expect("the file");
        manifest
    }

    #[test]
    fn a_manifest_is_what_was_written() {
        let text = manifest().to_text().expect("text");
        assert_eq!(read(&text), Ok(manifest()));
        // No byte of it can be another one: white space and the order of fields say nothing.
        for at in 0..text.len() {
            let mut other = text.clone();
            other[at] ^= 1;
            let found = read(&other);
            assert!(found.is_err() || found == Ok(manifest()), "byte {at}: {found:?}");
            assert!(!found.is_err_and(|error| error.status == Status::Panic), "byte {at}");
        }
        for length in 0..text.len() - 2 {
            assert_eq!(read(&text[..length]).map_err(|error| error.status), Err(Status::Corrupt), "{length} bytes");
        }
    }

    #[test]
    fn a_later_format_is_unsupported() {
        let text = Manifest { format: 3, ..manifest() }.to_text().expect("text");
        let error = read(&text).expect_err("a later format");
        assert_eq!(error.status, Status::Unsupported);
        assert!(error.message.ends_with("has format 3, written by partialfc 0.1.0; this library reads formats 1 to 2"), "{error}");
    }

    #[test]
    fn a_later_format_tells_the_types() {
        let typed = |format: u64, dtypes: &[&str]| {
            let dtypes = dtypes.iter().map(|&name| name.to_owned()).collect();
            let written = Manifest { format, dtypes, ..manifest() };
            let found = read(&written.to_text().expect("text"));
            assert!(found.is_err() || found == Ok(written));
            found.map(|manifest| [manifest.dtype(0), manifest.dtype(1)]).map_err(|error| error.status)
        };
        assert_eq!(typed(1, &[]), Ok([Some(DType::F32); 2]));
        assert_eq!(typed(2, &["bf16", "f32"]), Ok([Some(DType::Bf16), Some(DType::F32)]));
        for (format, dtypes) in [(1, &["bf16", "f32"][..]), (2, &[]), (2, &["bf16"]), (2, &["bf16", "f16"]), (2, &["bf16", "F32"])]
        {
            assert_eq!(typed(format, dtypes), Err(Status::Corrupt), "{format} {dtypes:?}");
        }
        assert_eq!(Manifest::typed(&[DType::F32; 2]), (1, Vec::new()));
        assert_eq!(Manifest::typed(&[DType::F32, DType::Bf16]), (2, vec!["f32".to_owned(), "bf16".to_owned()]));
    }

    #[test]
    fn files_have_each_class_once() {
        let changed = |change: fn(&mut Vec<RowsFile>)| {
            let mut manifest = manifest();
            change(&mut manifest.files);
            read(&manifest.to_text().expect("text")).map_err(|error| error.status)
        };
        assert_eq!(changed(|files| files[1].first = 4), Err(Status::Corrupt));
        assert_eq!(changed(|files| files.swap(0, 1)), Err(Status::Corrupt));
        assert_eq!(changed(|files| files.truncate(1)), Err(Status::Corrupt));
        assert_eq!(changed(|files| files[1].rows = u64::MAX), Err(Status::Corrupt));
        assert_eq!(changed(|files| files[1].name = "../rows".to_owned()), Err(Status::Corrupt));
    }
}
