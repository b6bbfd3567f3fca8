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
    for (format, dtypes) in [(1, &["bf16", "f32"][..]), (2, &[]), (2, &["bf16"]), (2, &["bf16", "f16"]), (2, &["bf16", "F32"])] {
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
